"""Damage of an index: entries and vectors that differ from their checksums, and what to do."""

import os
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ggem_jax.retrieval.index.folder import shown
from ggem_jax.retrieval.index.shards import map_shard, shard_file
from ggem_jax.retrieval.index.store import COLUMNS, INDEX, Damaged, Entry, Facts, IndexRefused


class Flaw(NamedTuple):
    """An entry that cannot be used."""

    id: int  # row of the entry in its SQLite file
    path: str  # path of the image, relative to the root
    file: str  # name of the damaged file
    what: str  # what is wrong, as it follows the file's name in a sentence


def flaws(
    database: sqlite3.Connection, folder: Path, facts: Facts, table: str = "images"
) -> Iterator[Flaw]:
    """Yields the entries that cannot be used: all checksums of entries and vectors are compared.

    Args:
        database: An open connection to the SQLite file.
        folder: Folder of the index.
        facts: Facts of the index, or of its journal.
        table: "images", or "pending" for the entries of the journal.
    """
    current, vectors, trouble = -1, np.empty((0, 0)), ""
    for number, entry_crc32, *values in database.execute(
        f"SELECT id, entry_crc32, {COLUMNS} FROM {table} ORDER BY shard, row"
    ):
        entry = Entry(*values)
        path = os.fsdecode(entry.path) if isinstance(entry.path, bytes) else str(entry.path)
        if entry.crc32() != entry_crc32:
            yield Flaw(number, path, INDEX, "holds altered entries")
            continue
        if (
            entry.shard not in facts.shards
            or not isinstance(entry.row, int)
            or not 0 <= entry.row < facts.shards[entry.shard]
        ):
            yield Flaw(number, path, INDEX, "names vectors that are not there")
            continue
        if entry.shard != current:
            current, trouble = entry.shard, ""
            try:
                vectors = map_shard(folder, current, facts)
            except FileNotFoundError:
                trouble = "is missing"
            except (OSError, Damaged) as error:
                trouble = getattr(error, "strerror", None) or str(error)
        if (
            not trouble
            and zlib.crc32(np.ascontiguousarray(vectors[entry.row]).data) == entry.vector_crc32
        ):
            continue
        yield Flaw(
            number, path, shard_file(folder, current).name, trouble or "holds altered vectors"
        )


def some(paths: list[str]) -> str:
    """Returns `3 images (a.jpg, b.jpg, c.jpg)`, with at most five names.

    Args:
        paths: Paths of images, in any order.
    """
    names = ", ".join(map(shown, sorted(paths)[:5])) + (
        f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    )
    return f"{len(paths)} image{'s' if len(paths) != 1 else ''} ({names})"


def describe_damage(folder: Path, file: str, what: str, paths: list[str] | None = None) -> str:
    """Returns the sentence for a damaged file, with the images that it concerns.

    Args:
        folder: Folder of the index.
        file: Name of the damaged file.
        what: What is wrong, as it follows the name in a sentence, such as "is missing".
        paths: Paths of the images that it concerns; None if they are not known.
    """
    concerned = f": {some(paths)} cannot be found by it" if paths else ""
    return (
        f"{folder / file} {what}{concerned}; put a copy of the file in its place, or add with"
        " repair, which extracts such images again"
    )


def map_or_refuse(folder: Path, shard: int, facts: Facts) -> np.ndarray:
    """Returns the vectors of a shard, `(rows, dim)`, memory-mapped.

    Unlike in `map_shard`, the error for damage is a whole sentence with a remedy.

    Args:
        folder, shard, facts: As in `map_shard`.

    Raises:
        Damaged: The file is missing, too short or has another header.
        IndexRefused: The file cannot be read.
    """
    file = shard_file(folder, shard)
    try:
        return map_shard(folder, shard, facts)
    except Damaged as error:
        raise Damaged(describe_damage(folder, file.name, str(error))) from None
    except FileNotFoundError:
        raise Damaged(describe_damage(folder, file.name, "is missing")) from None
    except OSError as error:
        raise IndexRefused(f"{file} cannot be read: {error.strerror}") from error


def find_lost(database: sqlite3.Connection, folder: Path, facts: Facts) -> set[int]:
    """Returns the ids of the entries that cannot be used.

    Args:
        database: An open connection to the SQLite file.
        folder: Folder of the index.
        facts: Facts of the index.

    Raises:
        Damaged: SQLite's own structure is broken.
    """
    problem = " ".join(database.execute("PRAGMA integrity_check(1)").fetchone()[0].split())
    if problem != "ok":
        raise Damaged(
            f"{folder / INDEX} is damaged ({problem}) beyond repair: put a copy in its place, or"
            " build the index again in another folder"
        )
    return {flaw.id for flaw in flaws(database, folder, facts)}
