"""Intervals in rows of CSV files, and tables in Markdown."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.statistics import Interval
from ggem_jax.files.atomic import replacing

ENDS = {"": "value", "_low": "low", "_high": "high"}


def interval_columns(name: str, interval: Interval | None) -> dict[str, str]:
    """Returns the columns `name`, `name_low` and `name_high` of a row, with four decimals.

    Args:
        name: Name of the measure.
        interval: The estimate. None leaves the columns empty.
    """
    return {
        f"{name}{end}": "" if interval is None else f"{getattr(interval, field):.4f}"
        for end, field in ENDS.items()
    }


def format_cell(row: Mapping[str, Any], name: str) -> str:
    """Returns a measure of a row with its interval, in percent; empty columns give "".

    A difference, whose name contains `_less_`, gets its sign.

    Args:
        row: A row with the columns of `interval_columns`, as numbers or as text.
        name: Name of the measure.
    """
    if row[name] == "":
        return ""
    return format_interval(
        Interval(*(float(row[f"{name}{end}"]) for end in ENDS)), digits=1, sign="_less_" in name
    )


def format_interval(
    interval: Interval, *, percent: bool = True, digits: int = 2, sign: bool = False
) -> str:
    """Returns the value and the ends of an interval as text, or the value alone if an end is NaN.

    Args:
        interval: The estimate.
        percent: Whether the numbers are multiplied by 100.
        digits: Digits after the decimal point.
        sign: Whether a positive value gets a plus.
    """
    factor = 100 if percent else 1
    value = f"{factor * interval.value:{'+' if sign else ''}.{digits}f}"
    if not np.isfinite([interval.low, interval.high]).all():
        return value
    return f"{value} [{factor * interval.low:.{digits}f}, {factor * interval.high:.{digits}f}]"


def make_table(heads: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """Returns a table in Markdown that ends with a line break.

    Args:
        heads: Titles of the columns.
        rows: Cells of each row; they are converted with `str`.
    """
    lines = [
        f"| {' | '.join(heads)} |",
        f"|{' --- |' * len(heads)}",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with the same columns as a CSV file, which is never half written.

    Args:
        path: The file; it is replaced.
        rows: Rows by column, at least one.

    Raises:
        OSError: The file cannot be written.
    """
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
