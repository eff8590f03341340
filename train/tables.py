"""Tables of images in text files: their columns, and their rows as text by column."""

import csv
import io
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.cli import Refused
from train.config import SEPARATORS, Data

# Names of columns that are known, the first of them first: those of open_clip (filepath, title), of
# Hugging Face's folders of images (file_name, text) and of img2dataset (caption).
IMAGE_KEYS = ("image", "filepath", "file_name", "image_path")
CAPTION_KEYS = ("caption", "title", "text", "TEXT")


@dataclass(frozen=True)
class Table:
    """The rows of a table below its header."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]  # as long as the columns; short rows are filled up with ""
    separator: str

    def column(self, key: str | None, known: Sequence[str], flag: str, what: str) -> list[str]:
        """Returns a column without the spaces around its values.

        Args:
            key: Name of the column; None takes the first that exists of the known names.
            known: The known names.
            flag: The flag that names the column, for the sentence.
            what: What the column holds, for the sentence.

        Raises:
            Refused: There is no such column.
        """
        names = known if key is None else (key,)
        name = next((each for each in names if each in self.columns), None)
        if name is None:
            separator = "tabs" if self.separator == "\t" else f"{self.separator!r}"
            listed = ", ".join(each or "(one without a name)" for each in self.columns)
            raise Refused(
                f"{self.path} has no column {' or '.join(names)} with the {what}; its first line,"
                f" separated by {separator}, names {listed or 'nothing'}: choose with {flag} or"
                " --separator"
            )
        place = self.columns.index(name)
        return [row[place].strip() for row in self.rows]


def read_table(path: Path, data: Data, what: str) -> Table:
    """Returns a table in UTF-8 whose first line names its columns.

    Args:
        path: The file.
        data: The settings of separator and quoting. Without a separator it is a tab if the first
            line has one, and a comma otherwise. With quoting "auto", quotes are those of CSV where
            the whole file can be read so; in files separated by tabs they otherwise are text, which
            a line on standard error says.
        what: What the file holds, for errors.

    Raises:
        Refused: The file cannot be read, can be read in two ways, names a column twice, or has a
            row that is longer than the first.
    """
    text = read_text(path, what)
    separator = SEPARATORS.get(data.separator or "", data.separator) or (
        "\t" if "\t" in text.partition("\n")[0] else ","
    )
    numbered = list(_split(path, text, separator, data.quoting))
    columns = numbered[0][1] if numbered else ()
    named = [name for name in columns if name]
    if len(set(named)) < len(named):
        raise Refused(f"{path} names a column twice in its first line: {', '.join(columns)}")
    for number, row in numbered[1:]:
        if len(row) > len(columns):
            raise Refused(
                f"line {number} of {path} has more columns than the first: text that holds"
                f" {separator!r} needs quotes, or another --separator"
            )
    rows = tuple(row + ("",) * (len(columns) - len(row)) for _, row in numbered[1:])
    return Table(path, tuple(columns), rows, separator)


def read_text(path: Path, what: str) -> str:
    """Returns the text of a file in UTF-8.

    Args:
        path: The file; a byte order mark at its start is dropped.
        what: How an error names the file, such as its flag.

    Raises:
        Refused: The file cannot be read or is not in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Refused(f"{what}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Refused(f"{what}: {path} is not in UTF-8") from None


def check_complete(lacking: dict[str, str], source: str, corrupt: str) -> None:
    """Reports incomplete rows or pairs in one line, and refuses them by default.

    Args:
        lacking: What is missing, by the name of the row or pair.
        source: What they are of, for the sentence: "rows of FILE" or "pairs of FILE".
        corrupt: "refuse", or "skip" for a line on standard error.

    Raises:
        Refused: Something is missing and `corrupt` is "refuse".
    """
    if not lacking:
        return
    first = ", ".join(f"{name} ({what})" for name, what in itertools.islice(lacking.items(), 3))
    said = (
        f"{len(lacking)} of the {source} are not complete:"
        f" {first}{', ...' if len(lacking) > 3 else ''}"
    )
    if corrupt == "refuse":
        raise Refused(f"{said} (--data.corrupt skip leaves them out)")
    print(f"skipped: {said}", file=sys.stderr, flush=True)


Row = tuple[int, tuple[str, ...]]  # number of its last line, from 1, and its values


def _split(path: Path, text: str, separator: str, quoting: str) -> list[Row]:
    """The rows that are not empty; see `read_table`."""
    if quoting == "none" or (quoting == "auto" and '"' not in text):
        return list(_split_lines(text, separator))
    try:
        quoted = list(_split_quoted(text, separator))
    except csv.Error as error:
        line = getattr(error, "line", 0)
        as_text = _even(plain := list(_split_lines(text, separator)))
        if quoting == "auto" and separator == "\t" and as_text:
            print(
                f"{path}: its quotes are taken as text, as line {line} does not quote as CSV does"
                " (--quoting csv or none decides)",
                file=sys.stderr,
                flush=True,
            )
            return plain
        raise Refused(
            f"{path} cannot be read as CSV after line {line - 1}: {error} (--quoting none takes"
            " quotes as text)"
        ) from None
    over = next((row for row in quoted if any("\n" in value for value in row[1])), None)
    if quoting == "auto" and over and _even(list(_split_lines(text, separator))):
        raise Refused(
            f"{path} can be read in two ways: a quote opens text over several lines that ends in"
            f" line {over[0]}, or is text itself: choose --quoting csv or --quoting none"
        )
    return quoted


def _split_lines(text: str, separator: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line:
            yield number, tuple(line.split(separator))


def _split_quoted(text: str, separator: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    before = 0
    try:
        for row in reader:
            before = reader.line_num
            if row:
                yield before, tuple(row)
    except csv.Error as error:
        error.line = before + 1  # type: ignore[attr-defined]
        raise


def _even(rows: list[Row]) -> bool:
    return len({len(row) for _, row in rows}) == 1
