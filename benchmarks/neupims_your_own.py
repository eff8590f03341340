"""Runs the commands of docs/accelerator/your_own.md and writes what they print into the page.

    python -m benchmarks.neupims_your_own

A block of TOML whose first line is a comment with a file's name is that file. A block `console`
begins with a command after `$ `, and goes on with what the command prints, its notes and warnings
first; `...` stands for any number of lines that are left out. Lines are found again by their words,
so their numbers may change; where words change, the page is to be read and written again.
"""

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

from neupims.__main__ import main as neupims

PAGE = Path(__file__).parent.parent / "docs" / "accelerator" / "your_own.md"
FILE = re.compile(r"^```toml\n# (\S+\.toml)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```console\n\$ (.*?[^\\])\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
OMITTED = "..."


def main() -> None:
    PAGE.write_text(refresh(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def refresh(page: str) -> str:
    """Returns the page with the lines that its commands print now.

    Its files are written into the working directory.
    """
    write_files(page)
    return BLOCK.sub(_refresh_block, page)


def _refresh_block(block: re.Match) -> str:
    lines = align(block[2].splitlines(), run(block[1]))
    return "\n".join(["```console", f"$ {block[1]}", *lines, "```"])


def write_files(page: str) -> None:
    """Writes the files of a page into the working directory."""
    for name, text in FILE.findall(page):
        Path(name).write_text(text, encoding="utf-8")


def run(command: str) -> list[str]:
    """Returns the lines that a command of `neupims` prints, notes and warnings first.

    Raises:
        ValueError: It is no such command, or it fails.
    """
    words = shlex.split(command.replace("\\\n", " "))
    if words[:1] != ["neupims"]:
        raise ValueError(f"a command begins with neupims: {command!r}")
    said, printed = io.StringIO(), io.StringIO()
    os.environ["COLUMNS"] = "130"
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        code = neupims(words[1:])
    if code:
        raise ValueError(f"{command!r} fails: {said.getvalue()}")
    lines = f"{said.getvalue()}\n{printed.getvalue()}".splitlines()
    return [line.rstrip() for line in lines if line.strip()]


def align(shown: list[str], printed: list[str]) -> list[str]:
    """Returns the printed line for each shown one; they have the same words in the same order.

    Raises:
        ValueError: A shown line is not printed, or a line between two of them is not shown.
    """
    found: list[str] = []
    place, omits = 0, False
    for line in shown:
        if line.strip() == OMITTED:
            omits = True
            found.append(line)
            continue
        candidates = range(place, len(printed) if omits else min(place + 1, len(printed)))
        at = next((i for i in candidates if _words(printed[i]) == _words(line)), None)
        if at is None:
            raise ValueError(f"{line!r} is not printed after {printed[:place][-1:]}")
        found.append(printed[at])
        place, omits = at + 1, False
    if not omits and printed[place:]:
        raise ValueError(f"these lines are not shown: {printed[place:]}")
    return found


def _words(line: str) -> list[str]:
    """The words of a line, without its numbers and without the lengths of its rules."""
    return re.sub(r"([─━])+", r"\1", NUMBER.sub("0", line)).split()


if __name__ == "__main__":
    main()
