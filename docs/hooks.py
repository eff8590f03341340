"""Hooks of the documentation build (mkdocs.yml): files outside docs/ that become part of the site.

The pages link to `../benchmarks/results/FILE`, so that the links also work in the repository; in
the site those files lie under `results/`. `examples.md` gets the text of `examples/*.py`, and
CHANGELOG.md becomes `changelog.md`.
"""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Adds the committed result files, under `results/`, and the changelog to the site."""
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links to result files into the site, and puts the examples into their page."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((?:\.\./)+benchmarks/results/", f"]({up}results/", markdown)
    if page.file.src_uri == "examples.md":
        markdown += "".join(map(_example, sorted((ROOT / "examples").glob("*.py"))))
    return markdown


def _example(path: Path) -> str:
    """A section with the first sentence of the file's docstring as its text, and its code."""
    source = path.read_text()
    summary = (ast.get_docstring(ast.parse(source)) or path.stem).partition("\n\n")[0]
    summary = re.sub(r":?\s*python examples/.*", ".", summary, flags=re.DOTALL)
    return f"\n## {path.name}\n\n{summary}\n\n```python\n{source.strip()}\n```\n"
