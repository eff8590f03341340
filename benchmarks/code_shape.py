"""How the code is shaped: sizes of files and functions, width of lines, and what docstrings tell.

    python -m benchmarks.code_shape            # the library and its scripts
    python -m benchmarks.code_shape ggem_jax   # some folders
    python -m benchmarks.code_shape --root DIR # another checkout

A body is the statements of a function without its docstring. A public function is one whose name,
and whose class's and module's names, have no leading underscore.
"""

import argparse
import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

FOLDERS = ("ggem_jax", "kernels", "neupims", "train", "eval")
WIDTH = 100  # columns
Function = ast.FunctionDef | ast.AsyncFunctionDef


def measure(root: Path, folders: Sequence[str] = FOLDERS) -> dict[str, float]:
    """Returns figures of the Python files in some folders of a checkout, by name.

    Args:
        root: Folder of the checkout.
        folders: Folders below it.
    """
    files = [path for folder in folders for path in _python_files(root / folder)]
    texts = [path.read_text() for path in files]
    lines = [line for text in texts for line in text.splitlines()]
    trees = [ast.parse(text) for text in texts]
    bodies = [_body_lines(f) for tree in trees for f in ast.walk(tree) if isinstance(f, Function)]
    public = [f for tree in trees for f in _public(tree.body)]
    docs = [doc for f in public if (doc := ast.get_docstring(f))]
    sections = [doc for doc in docs if "Args:" in doc or "Example:" in doc]
    sizes = [len(text.splitlines()) for text in texts]
    return {
        "files": len(files),
        "lines": len(lines),
        "file length, median": float(np.median(sizes)),
        "file length, 90th percentile": float(np.percentile(sizes, 90)),
        "body length, median": float(np.median(bodies)),
        "body length, 90th percentile": float(np.percentile(bodies, 90)),
        f"lines over {WIDTH} columns, %": 100 * np.mean([len(line) > WIDTH for line in lines]),
        "public functions and classes": len(public),
        "with a docstring, %": 100 * len(docs) / len(public),
        "words of a docstring, mean": float(np.mean([len(doc.split()) for doc in docs])),
        "docstrings with Args or Example, %": 100 * len(sections) / len(docs),
        "README, bytes": (root / "README.md").stat().st_size,
    }


def _python_files(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder in order; a linked folder belongs to where it is linked."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _python_files(path)
        elif path.suffix == ".py":
            yield path


def _public(body: Sequence[ast.stmt]) -> Iterator[Function | ast.ClassDef]:
    """Yields public functions and classes of a module, and the public methods of the classes."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body)


def _body_lines(function: Function) -> int:
    """The number of lines of a body."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", default=FOLDERS)
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent)
    options = parser.parse_args(argv)
    for name, figure in measure(options.root, options.folders).items():
        print(f"{name:36}{figure:10,.1f}".removesuffix(".0"))


if __name__ == "__main__":
    main()
