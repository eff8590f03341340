"""docs/accelerator/your_own.md: each command prints what the page shows."""

import re
from pathlib import Path

import pytest

from benchmarks.neupims_your_own import BLOCK, FILE, NUMBER, PAGE, align, run, write_files

TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = BLOCK.findall(TEXT)


def numbers_of(line):
    return [text.replace(",", "") for text in NUMBER.findall(line)]


def last_digit(text):
    """The worth of the last digit of a number: 0.01 of 3.14, 1 of 314."""
    mantissa, _, exponent = text.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "130")
    write_files(TEXT)


@pytest.mark.parametrize(("command", "shown"), BLOCKS, ids=[block[0] for block in BLOCKS])
def test_a_command_prints_what_the_page_shows(command, shown, folder):
    """Numbers may differ by one in their last digit, which processors round differently."""
    lines = shown.splitlines()
    for line, printed in zip(lines, align(lines, run(command)), strict=True):
        for ours, theirs in zip(numbers_of(line), numbers_of(printed), strict=True):
            assert abs(float(ours) - float(theirs)) <= 1.01 * last_digit(theirs), (line, printed)


@pytest.mark.slow
def test_the_paths_are_within_two_per_cent(folder):
    """As the page says of --path."""
    (command,) = [
        command for command, _ in BLOCKS if "npu-pim --fidelity intended --path" in command
    ]
    closed, exact = (
        float(re.search(r"layer +([\d,]+) cycles", "\n".join(run(text)))[1].replace(",", ""))
        for text in (command, command.replace(" --path closed", ""))
    )
    assert closed == pytest.approx(exact, rel=0.02)
    assert closed != exact


def test_the_page_has_its_files_and_every_command_is_run(folder):
    assert TEXT.count("```console") == len(BLOCKS)
    assert TEXT.count("$ neupims ") == len(BLOCKS)
    named = {name for command, _ in BLOCKS for name in re.findall(r"[\w.-]+\.toml", command)}
    assert named <= {name for name, _ in FILE.findall(TEXT)}
    for name in named:
        assert Path(name).exists()


def test_lines_are_aligned_by_their_words():
    printed = ["title", "layer 1,234 cycles", "rate 5.5 W", "end"]
    assert align(["...", "layer 9 cycles", "..."], printed) == ["...", "layer 1,234 cycles", "..."]
    assert align(["title", "layer 1 cycles", "..."], printed)[1] == "layer 1,234 cycles"
    for shown in (
        ["...", "layer 9 seconds", "..."],  # other words
        ["title", "rate 5.5 W", "..."],  # a line between them is not shown
        ["...", "end", "title"],  # another order
        ["title", "layer 1 cycles"],  # more is printed
    ):
        with pytest.raises(ValueError, match=r"not printed after|not shown"):
            align(shown, printed)
    with pytest.raises(ValueError, match="begins with neupims"):
        run("ls")
