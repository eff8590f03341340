"""docs/your_own_images.md: each command runs and prints lines of the form that the page shows."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import write_run

from ggem_jax.models.vit import ViTConfig
from ggem_jax.retrieval.__main__ import main as retrieval
from tests.conftest import COMPILATION_CACHE
from train.config import Data

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "your_own_images.md").read_text(encoding="utf-8")
FILE = re.compile(r"^```py\n# (\S+\.py)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```console\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
# command -> the lines that it prints
COMMANDS = [
    (first, lines)
    for block in BLOCK.findall(TEXT)
    for first, *lines in (part.splitlines() for part in re.split(r"^\$ ", block, flags=re.M)[1:])
]
SMALL = ViTConfig(patch=2, width=48, depth=1, heads=4, mlp_width=32, image=8)


def form(line: str) -> str:
    """A line without its numbers and the folder that it was printed in."""
    line = re.sub(r"/\S*/(?=photos)", "/", line.rstrip())
    line = re.sub(r"\d[\d,]*(?:\.\d+)?", "#", line)
    return re.sub(r" +", " ", line)


def compare(shown: list[str], printed: list[str]) -> None:
    """`...` stands for lines that are left out, or for the rest of a line."""
    if shown[:1] == ["..."]:
        shown, printed = shown[1:], printed[1 - len(shown) :]
    assert len(shown) == len(printed), (shown, printed)
    for ours, theirs in zip(map(form, shown), map(form, printed), strict=True):
        end = ours.removesuffix("...")
        assert theirs == ours if end == ours else theirs.startswith(end)


def lines_of(*texts: str) -> list[str]:
    return [line for text in texts for line in text.splitlines() if line.strip()]


def run_in_a_process(command: str) -> list[str]:
    """The lines on standard output, then those on standard error."""
    words = shlex.split(command)
    arguments = (
        ["-m", "ggem_jax.retrieval", *words[1:]] if words[0] == "ggem-retrieval" else words[1:]
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("XLA_")}
    own |= COMPILATION_CACHE | {"JAX_PLATFORMS": "cpu"}
    # the program that knows nothing of this package cannot import it either
    own["PYTHONPATH"] = "" if "elsewhere.py" in words else str(ROOT)
    done = subprocess.run(
        [sys.executable, *arguments], env=own, capture_output=True, text=True, timeout=1200
    )
    return lines_of(done.stdout, done.stderr)


def run_here(command: str, capsys) -> list[str]:
    """The same for a tool of ours, in this process."""
    words = shlex.split(command)
    said = ""
    if words[0] == "ggem-retrieval":
        retrieval(words[1:])
    else:
        try:
            importlib.import_module(words[2]).main(words[3:])
        except SystemExit as stop:
            said = f"{stop.code}"
    printed = capsys.readouterr()
    return lines_of(printed.out, printed.err, said)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in FILE.findall(TEXT):
        Path(name).write_text(text, encoding="utf-8")


def test_the_page_after_its_trainings(folder, capsys):
    """With runs of random weights in the place of those that the page trains."""
    data = Data(eval_zoom=1.0)
    write_run(Path("runs/digits"), classes="0123456789", model=SMALL, data=data)
    write_run(Path("runs/metric-digits"), dim=32, model=SMALL, data=data)
    done = 0
    for command, shown in COMMANDS:
        if re.match(r"python -m train\.(classify|metric)", command):
            continue
        own = command.startswith(("python -m", "ggem-retrieval"))
        compare(shown, run_here(command, capsys) if own else run_in_a_process(command))
        done += 1
    assert done == 10
    assert set(Path("photos").iterdir()) > {Path("photos/2-265.png"), Path("photos/0-012.png")}


@pytest.mark.slow
def test_the_page_from_top_to_bottom(folder):
    for command, shown in COMMANDS:
        printed = run_in_a_process(command)
        compare(shown, printed)
        if command.startswith("python elsewhere.py"):
            for line in printed:
                label, found = re.match(r"photos/(\d)-\d+\.png +(\d) ", line).groups()
                assert label == found
        if command.startswith("python -m train.metric"):
            assert float(re.search(r"recall@1 ([\d.]+)%", printed[-1])[1]) > 70


def test_forms_are_compared():
    compare(["...", "step 1  top-1 2.5%"], ["a", "b", "step 20  top-1 95.25%"])
    compare(["1 of /home/you/photos", '{"a": ...'], ["2 of /tmp/1/photos", '{"a": 3, "b": 4}'])
    for shown, printed in ((["a 1"], ["b 1"]), (["a"], []), (["a", "b"], ["a"])):
        with pytest.raises(AssertionError):
            compare(shown, printed)
