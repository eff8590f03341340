"""README and docs/: their Python runs from top to bottom, and what they name exists."""

import contextlib
import importlib
import pkgutil
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import plot_exponents
from ggem_jax.weights import write_safetensors

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
}
PYTHON = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)|(?:src|srcset)=\"(?!https?:)([^\"]+)\"")
NAME = re.compile(r"(?:python -m |`)((?:train|eval|benchmarks|ggem_jax|neupims)(?:\.\w+)+)")
TOOLS = {  # what a command begins with -> the module of its tool, which has subcommands
    "ggem-retrieval": "ggem_jax.retrieval.__main__",
    "neupims": "neupims.__main__",
    "python -m neupims": "neupims.__main__",
    "python -m ggem_jax.weights": "ggem_jax.weights.__main__",
}
BLOCK = re.compile(r"^ *```\n(.*?)^ *```", flags=re.DOTALL | re.MULTILINE)
COMMAND = re.compile(
    rf"^(?:\$ )?({'|'.join(TOOLS)}|python -m (?:train|eval)[\w.]+)(?: ([a-z]+))?( .*--.*)"
)


def python_of(page: str) -> list[str]:
    """The Python blocks of a page, each at its line, so that a traceback names the right one."""
    return ["\n" * page[: block.start(1)].count("\n") + block[1] for block in PYTHON.finditer(page)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of a reader: vectors, a photo and a published network of small size."""
    rng = np.random.default_rng(0)
    for name, rows in (("queries", 3), ("database", 500)):
        vectors = rng.normal(size=(rows, 64)).astype(np.float32)
        np.save(tmp_path / f"{name}.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    pixels = rng.integers(0, 256, (240, 320, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "query.jpg", "photos/1.jpg", "photos/2.jpg", "photos/3.jpg"):
        Image.fromarray(np.roll(pixels, len(name), axis=1)).save(tmp_path / name)
    with np.load(ROOT / "tests" / "data" / "vit" / "timm-deit-distilled.npz") as file:
        weights = {
            name.removeprefix("weights/"): file[name].astype(np.float32)
            for name in file.files
            if name.startswith("weights/")
        }
    write_safetensors(tmp_path / "deit_small_patch16_224.safetensors", weights)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if PYTHON.search(text)])
def test_the_python_of_a_page_runs_from_top_to_bottom(page, folder):
    names: dict = {"__name__": page}
    for block in python_of(PAGES[page]):
        exec(compile(block, page, "exec"), names)
    if page == "README.md":
        assert names["descriptor"].shape == (8, 384)
        assert names["ids"].shape == (3, 400)
        assert float(names["iteration"].tokens_per_second) > 0
    if page == "docs/vit.md":
        assert names["output"].logits.shape == (2, 1000)
        assert names["logits"].shape == (1, 102)
    if page == "docs/retrieval.md":
        assert names["results"].paths.shape == (1, 3)
    if page == "docs/poolings.md":
        assert names["gradient"].p[...].shape == (6,)


def test_the_readme_has_at_most_8_kilobytes_and_its_first_screen():
    readme = PAGES["README.md"]
    assert len(readme.encode()) <= 8000
    screen = "\n".join(readme.splitlines()[:45])
    for part in ("<picture>", "pip install", "```python", "docs/index.md"):
        assert part in screen
    code = PYTHON.search(readme)
    assert code is not None
    assert code[1].count("\n") <= 10


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_links_to_exist(page):
    for found in LINK.finditer(PAGES[page]):
        target = found[1] or found[2]
        if target == "changelog.md":  # made by docs/hooks.py
            continue
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize(
    "name",
    sorted(
        {name for page in PAGES if page != "CHANGELOG.md" for name in NAME.findall(PAGES[page])}
    ),
)
def test_what_the_pages_name_exists(name):
    pkgutil.resolve_name(name)


def commands_of(page: str) -> list[tuple[str, str, list[str]]]:
    """The tool, subcommand and flags of each command in the blocks that name no language."""
    lines = "".join(BLOCK.findall(page)).replace("\\\n", " ").splitlines()
    matches = filter(None, (COMMAND.match(line.partition(" # ")[0]) for line in lines))
    return [(m[1], m[2] or "", re.findall(r"(?<= )--[\w.-]+", m[3])) for m in matches]


@pytest.mark.parametrize(
    ("page", "tool", "subcommand", "flags"),
    [(page, *command) for page, text in PAGES.items() for command in commands_of(text)],
)
def test_the_flags_of_a_command_exist(page, tool, subcommand, flags, capsys):
    module = TOOLS.get(tool) or tool.removeprefix("python -m ")
    with contextlib.suppress(SystemExit):
        subcommands = [subcommand] if tool in TOOLS else []
        importlib.import_module(module).main([*subcommands, "--help"])
    text = capsys.readouterr().out
    assert flags
    for flag in flags:
        assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), flag


def test_every_command_of_the_readme_is_in_the_makefile():
    targets = re.findall(r"^make (\w+)", PAGES["README.md"], flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_figure_of_the_readme_is_drawn_from_the_study(tmp_path):
    plot_exponents.main(["--out", str(tmp_path)])
    for theme in ("light", "dark"):
        drawn = (tmp_path / f"exponents-{theme}.svg").read_text()
        committed = (plot_exponents.IMAGES / f"exponents-{theme}.svg").read_text()
        if f"Matplotlib v{version('matplotlib')}," in committed:  # others place letters otherwise
            assert drawn == committed
    with pytest.raises(SystemExit, match=r"no part planted of eval\.studies\.pooling"):
        plot_exponents.main(["--study", __file__])
