"""README and docs/: their Python runs from top to bottom, and what they name exists."""

import contextlib
import importlib
import inspect
import pkgutil
import re
import shlex
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ggem_jax
import neupims
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
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)
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
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')  # no published size
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
    if page == "docs/weights.md":
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


def test_every_public_name_is_in_the_reference():
    """A block `::: MODULE` of docs/api shows all of a module, or the members that it lists."""
    pages = [text for name, text in PAGES.items() if name.startswith("docs/api/")]
    blocks = [
        (found[1], re.search(r"members:\s*([^:]+?)(?:\n\n|\n +\w+:|\Z)", found[2] + "\n\n"))
        for text in pages
        for found in re.finditer(r"^::: (\S+)\n((?:[ ]+.*\n?)*)", text, flags=re.MULTILINE)
    ]
    shown = set()
    for module, members in blocks:
        own = importlib.import_module(module)
        if members:
            listed = re.findall(r"\w+", members[1])
        else:  # what a module imports is not shown
            defined = [name for name in vars(own) if _module_of(own, name) == module]
            listed = [*defined, *getattr(own, "__all__", ())]
        shown |= {id(getattr(own, name)) for name in listed}
    for package in (ggem_jax, neupims):
        public = {name: getattr(package, name) for name in package.__all__}
        missing = [
            name
            for name, value in public.items()
            if not inspect.ismodule(value) and id(value) not in shown
        ]
        assert missing == [], package.__name__


def _module_of(module, name: str) -> str:
    return getattr(getattr(module, name), "__module__", "")


def plain_lines(page: str) -> list[str]:
    """The lines of the blocks that name no language; continued lines are joined."""
    blocks = [text for language, text in BLOCK.findall(page) if not language]
    return "".join(blocks).replace("\\\n", " ").splitlines()


def commands_of(page: str) -> list[tuple[str, str, list[str]]]:
    """The tool, subcommand and flags of each command."""
    lines = (line.partition(" # ")[0] for line in plain_lines(page))
    matches = filter(None, map(COMMAND.match, lines))
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


def words_of(page: str) -> list[list[str]]:
    """The words of each command of `neupims` in a page."""
    commands = [
        shlex.split(line, comments=True) for line in plain_lines(page) if "neupims " in line
    ]
    starts = (["neupims"], ["python", "-m", "neupims"])
    return [
        words[len(start) :]
        for words in commands
        for start in starts
        if words[: len(start)] == start
    ]


class Reached(Exception):
    pass


@pytest.mark.parametrize(
    "words",
    [words for text in PAGES.values() for words in words_of(text)],
    ids=" ".join,
)
def test_a_command_of_neupims_is_one_that_the_tool_accepts(words, folder, monkeypatch):
    """The flags fit together: the tool reads the files and calls the library."""

    def stop(*_, **__):
        raise Reached

    for place in (
        "neupims.simulation.simulate_case",
        "neupims.commands.search.search_schedule",
        "neupims.serving.serve.serve",
        "neupims.serving.rates.sweep_rates",
        "neupims.exploration.compare.compare",
        "neupims.exploration.explore.explore",
        "neupims.timing.fit.fit",
        "neupims.validation.validate",
        "neupims.commands.show.print_json",
    ):
        monkeypatch.setattr(place, stop)
    for name in ("trace.csv", "FILE"):
        Path(name).write_text("seq_len,ch_idx\n300,0\n40,1\n77,2\n")
    from neupims.__main__ import main

    with pytest.raises(Reached):
        main([*words, "--json"])


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
