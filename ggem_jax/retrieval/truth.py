"""Ground truth of one's own: a CSV file of queries and what each should find. Loads no JAX.

The columns are `query` and `relevant`, and optionally `ignored` (images that are neither right nor
wrong) and `x1`, `y1`, `x2`, `y2` (the box that a query is cropped to, in pixels). A row holds one
pair, or several images separated by `;`. The rows with the same query and box are merged. Paths are
relative to the CSV file, or to a given root.
"""

import csv
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ggem_jax.retrieval.metrics import Relevance

COLUMNS = ("query", "relevant", "ignored", "x1", "y1", "x2", "y2")
BOX = COLUMNS[3:]

Box = tuple[float, float, float, float]


class Query(NamedTuple):
    """A query and the images that it should find, and those that count neither way."""

    path: Path  # image of the query; relative paths are joined to the root
    box: Box | None  # x1, y1, x2, y2 in pixels that the query is cropped to; None for all of it
    relevant: list[Path]  # images that the query should find
    ignored: list[Path]  # images that are neither right nor wrong


def read_truth(path: str | Path, *, root: str | Path | None = None) -> list[Query]:
    """Returns the queries in the order of their first rows. No image is read.

    Args:
        path: CSV file in UTF-8 with the columns of this module.
        root: Folder that the paths are relative to; None takes the folder of the file.

    Raises:
        ValueError: The file cannot be read, or a line is wrong; the message names it.
    """
    path = Path(path)
    root = path.parent if root is None else Path(root)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, strict=True)
            header = [name.strip() for name in next(rows, [])]
            _check_header(path, header)
            queries: dict[tuple[Path, Box | None], Query] = {}
            for row in rows:
                if any(cell.strip() for cell in row):
                    _add_row(queries, header, row, root, f"{path}, line {rows.line_num}")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8: {error.reason} at byte {error.start}"
        ) from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}, is no CSV: {error}") from None
    if not queries:
        raise ValueError(f"{path} has no row under its header")
    return list(queries.values())


def to_relevance(queries: Sequence[Query], database: Iterable[Path]) -> list[Relevance]:
    """Returns the relevant and ignored rows of the database for each query.

    The query's own image is ignored unless it is listed as relevant.

    Args:
        queries: Queries as `read_truth` returns them.
        database: Path of each row, relative or absolute as those of the queries are.

    Raises:
        ValueError: A listed image is not in the database.
    """
    place = {_plain(path): i for i, path in enumerate(database)}

    def places(query: Query, kind: str) -> np.ndarray:
        paths = getattr(query, kind)
        if missing := [each for each in paths if _plain(each) not in place]:
            more = f", nor are {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{missing[0]}, {kind} for {query.path}, is not in the database{more}")
        return np.array(sorted({place[_plain(each)] for each in paths}), int)

    found = []
    for query in queries:
        relevant, ignored = places(query, "relevant"), places(query, "ignored")
        own = place.get(_plain(query.path))
        if own is not None and own not in relevant:
            ignored = np.union1d(ignored, [own])
        found.append(Relevance(relevant, ignored))
    return found


def _check_header(path: Path, header: list[str]) -> None:
    if len(header) == 1 and ";" in header[0]:
        raise ValueError(
            f"the columns of {path} must be separated by commas; ; separates images within a column"
        )
    named = (
        f"the first line of {path} must name the columns query and relevant, and may name ignored,"
        " x1, y1, x2 and y2"
    )
    wrong = [name for name in header if name not in COLUMNS]
    if wrong or not {"query", "relevant"} <= set(header):
        raise ValueError(f"{named}; it is {','.join(header)[:200]!r}")
    if len(set(header)) != len(header):
        raise ValueError(f"{named}, each once; it is {','.join(header)!r}")
    if 0 < len(set(BOX) & set(header)) < len(BOX):
        raise ValueError(f"{named}, the last four together; it is {','.join(header)!r}")


def _add_row(
    queries: dict[tuple[Path, Box | None], Query],
    header: list[str],
    row: list[str],
    root: Path,
    where: str,
) -> None:
    if len(row) != len(header):
        raise ValueError(
            f"{where}, must have {len(header)} columns as the first line has, not {len(row)}"
        )
    cells = dict(zip(header, (cell.strip() for cell in row), strict=True))
    if not cells["query"]:
        raise ValueError(f"{where}, names no query")
    path, box = _plain(root / cells["query"]), _box(cells, where)
    query = queries.setdefault((path, box), Query(path, box, [], []))
    for kind, other in (("relevant", query.ignored), ("ignored", query.relevant)):
        own = getattr(query, kind)
        for name in filter(None, map(str.strip, cells.get(kind, "").split(";"))):
            image = _plain(root / name)
            if image in other:
                raise ValueError(
                    f"{where}, has {name} both relevant and ignored for {cells['query']}"
                )
            if image not in own:
                own.append(image)


def _box(cells: dict[str, str], where: str) -> Box | None:
    values = [cells.get(name, "") for name in BOX]
    if not any(values):
        return None
    try:
        x1, y1, x2, y2 = map(float, values)
        fits = math.isfinite(x1 + y1 + x2 + y2) and x1 < x2 and y1 < y2
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{where}, must have a box x1, y1, x2, y2 of numbers with x1 < x2 and y1 < y2, or none,"
            f" not {','.join(values)!r}"
        )
    return x1, y1, x2, y2


def _plain(path: Path) -> Path:
    """A path without `.` and `..`, so that one image has one name."""
    return Path(os.path.normpath(path))
