"""Trace files: tables of requests in CSV and JSON, with columns of many names."""

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from neupims.machine.workload import LONGEST, SHOWN

# The names of columns by role, in lower case without spaces and underscores.
ROLES: dict[str, tuple[str, ...]] = {
    "length": ("seqlen", "seqlens", "length", "lengths", "sequencelength", "kvlen"),
    "channel": ("chidx", "channel", "channels", "channelidx"),
    "input": (
        *("input", "inputlength", "inputlen", "inputtokens", "contexttokens", "prompt"),
        *("promptlength", "promptlen", "prompttokens", "requesttokens", "numprefilltokens"),
    ),
    "output": (
        *("output", "outputlength", "outputlen", "outputtokens", "generatedtokens", "response"),
        *("responselength", "responselen", "responsetokens", "completiontokens", "numdecodetokens"),
    ),
}
KNOWN = "seq_len; seq_len,ch_idx; input,output; ContextTokens,GeneratedTokens"
SEPARATORS = ",;\t"
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
WHOLE = re.compile(r"\s*[+-]?[0-9]{1,18}(\.0*)?\s*", re.ASCII)
# What a row is: its number in the file, and its cells in the order of the columns.
Rows = list[tuple[int, list[Any]]]


def read_table_of(path: str, columns: Mapping[str, str] | None) -> dict[str, np.ndarray]:
    """Returns the numbers of a trace file by role, one for each request, (r,) each.

    The roles are "length" or "input" and "output", and "channel" where there is one.

    Args:
        path: The file, CSV or JSON.
        columns: Column name, or number from 1, by role (default: found by name).

    Raises:
        ValueError: The file is no table, its columns are unknown or ambiguous, or a cell is no
            whole number; the sentence names the line.
        OSError: The file cannot be read.
    """
    names, rows = read_rows(path)
    places = _places(path, names, columns)
    least = {"length": 1, "input": 0, "output": 0, "channel": -LONGEST}
    return {
        role: np.array(
            [_number(path, line, role, row, place, least[role]) for line, row in rows], np.int64
        )
        for role, place in places.items()
    }


def read_rows(path: str) -> tuple[list[str], Rows]:
    """Returns the names of the columns of a trace file, and its rows.

    Args:
        path: The file, CSV or JSON.

    Raises:
        ValueError: The file is no table.
        OSError: The file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a CSV file: {error}; save it as UTF-8") from None
    return (_read_json if _is_json(path, text) else _read_csv)(path, text)


def _is_json(path: str, text: str) -> bool:
    return path.lower().endswith(JSON_SUFFIXES) or text.lstrip()[:1] in ("{", "[")


def _read_csv(path: str, text: str) -> tuple[list[str], Rows]:
    """The names of the columns, empty for a table without, and its rows."""
    head = next((line for line in text.splitlines() if line.strip()), "")
    if not head:
        raise ValueError(f"{path} is empty; a trace has the columns {KNOWN}")
    separator = next((each for each in SEPARATORS if each in head), ",")
    reader = csv.reader(text.splitlines(keepends=True), delimiter=separator)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from None
    first = [cell.strip() for cell in rows[0][1]]
    if all(map(WHOLE.fullmatch, first)):
        if len(first) > 1:
            return [f"column {place + 1}" for place in range(len(first))], rows
        return [""], rows
    return first, rows[1:]


def _read_json(path: str, text: str) -> tuple[list[str], Rows]:
    """The names of the columns, and rows: JSON lines, or a list of objects or of lengths."""
    try:
        if text.lstrip().startswith("["):
            entries = list(enumerate(json.loads(text), start=1))
        else:
            entries = [
                (line, json.loads(each))
                for line, each in enumerate(text.splitlines(), start=1)
                if each.strip()
            ]
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON with one request a line: {error}") from None
    if entries and all(isinstance(each, dict) for _, each in entries):
        names = list(dict.fromkeys(name for _, each in entries for name in each))
        return names, [(line, [each.get(name) for name in names]) for line, each in entries]
    if any(isinstance(each, dict | list) for _, each in entries):
        raise ValueError(f"{path} must hold one object, or one length, for each request")
    return [""], [(line, [each]) for line, each in entries]


def _places(path: str, names: list[str], columns: Mapping[str, str] | None) -> dict[str, int]:
    """The place of the column of each role."""
    listed = ",".join(names)[:SHOWN]
    if columns:
        if unknown := set(columns) - set(ROLES):
            raise ValueError(
                f"a column is length, channel, input or output, not {', '.join(sorted(unknown))}"
            )
        places = {role: find_column(path, names, str(name)) for role, name in columns.items()}
    elif len(names) == 1 and _role(names[0]) in (None, "length", "input"):
        places = {"length": 0}
    else:
        found: dict[str, list[int]] = {}
        for place, name in enumerate(names):
            if role := _role(name):
                found.setdefault(role, []).append(place)
        for role, several in found.items():
            if len(several) > 1:
                named = " or ".join(names[place] for place in several)
                raise ValueError(
                    f"{path}: the {role} may be {named}: choose one with --columns {role}=NAME,..."
                )
        places = {role: several[0] for role, several in found.items()}
    if set(places) - {"channel"} not in ({"length"}, {"input", "output"}):
        raise ValueError(
            f"{path} has the columns {listed!r}: it is not clear which hold the lengths; a trace"
            f" has {KNOWN}, or give --columns length=NAME or --columns input=NAME,output=NAME (a"
            " number counts columns from 1)"
        )
    return places


def _role(name: str) -> str | None:
    plain = re.sub(r"[\s_\-.]", "", name).lower()
    return next((role for role, known in ROLES.items() if plain in known), None)


def find_column(path: str, names: list[str], name: str) -> int:
    """Returns the place of a column, counted from 0.

    Args:
        path: The file, for the error.
        names: The names of its columns.
        name: The name of the column, or its number, counted from 1.

    Raises:
        ValueError: There is no such column.
    """
    if name in names:
        return names.index(name)
    if name.isdecimal() and 1 <= int(name) <= len(names):
        return int(name) - 1
    raise ValueError(f"{path} has no column {name!r}; it has {', '.join(names)[:SHOWN]}")


def _number(path: str, line: int, role: str, row: list[Any], place: int, least: int) -> int:
    """The whole number of a cell."""
    cell = row[place] if place < len(row) else None
    text = cell if isinstance(cell, str) else "" if cell is None else json.dumps(cell)
    if not WHOLE.fullmatch(text):
        shown = "nothing" if not text.strip() else repr(text.strip()[:SHOWN])
        raise ValueError(f"{path}, line {line}: the {role} must be a whole number, not {shown}")
    number = int(text.partition(".")[0])
    if not least <= number <= LONGEST:
        raise ValueError(
            f"{path}, line {line}: the {role} must be from {least} to {LONGEST}, not {number}"
        )
    return number
