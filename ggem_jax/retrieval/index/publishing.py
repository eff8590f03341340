"""The next version of an index, in one transaction, and the vectors that it no longer needs."""

import os
import sqlite3
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from ggem_jax.retrieval.index.folder import File
from ggem_jax.retrieval.index.shards import append_vectors, is_sound, map_shard
from ggem_jax.retrieval.index.store import Facts, write_facts

ROWS_COPIED = 4096  # vectors that are copied at a time


def change(
    database: sqlite3.Connection,
    folder: Path,
    facts: Facts,
    *,
    dropped: Iterable[bytes],
    others: Iterable[File] = (),
) -> None:
    """Drops entries, and writes the facts of the next version.

    Args:
        database: A connection to `index.sqlite`, in a transaction.
        folder: Folder of the index.
        facts: Facts of the next version with all shards that may be used; the shards that are kept
            and the number of images are found here.
        dropped: Paths of the entries that are dropped.
        others: Files that were opened and are no images.

    Raises:
        OSError, sqlite3.Error: A file cannot be read or written.
    """
    database.executemany("DELETE FROM images WHERE path = ?", ((name,) for name in dropped))
    database.executemany(
        "INSERT OR REPLACE INTO others VALUES (?, ?, ?, ?, ?)",
        ((os.fsencode(file.path), *file.stamp) for file in others),
    )
    shards = _compact(database, folder, facts)
    count = database.execute("SELECT COUNT(*) FROM images").fetchone()[0]
    facts = replace(facts, shards=shards, count=count, revision=facts.revision + 1)
    write_facts(database, facts)


def _compact(database: sqlite3.Connection, folder: Path, facts: Facts) -> dict[int, int]:
    """The shards in use, with their rows; they are written anew if most of the rows are unused.

    They become new files, as a journal may have rows behind those of the index.
    """
    used = dict(database.execute("SELECT shard, COUNT(DISTINCT row) FROM images GROUP BY shard"))
    shards = {shard: rows for shard, rows in facts.shards.items() if shard in used}
    if 2 * sum(used.values()) >= sum(shards.values()):
        return shards
    moving = {
        shard
        for shard, rows in shards.items()
        if used[shard] < rows and is_sound(folder, shard, facts)
    }
    entries = [
        (id, (shard, row))
        for id, shard, row in database.execute("SELECT id, shard, row FROM images ORDER BY id")
        if shard in moving
    ]
    new, places = _copy(folder, facts, list(dict.fromkeys(place for _, place in entries)))
    database.executemany(
        "UPDATE images SET shard = ?, row = ? WHERE id = ?",
        ((*places[place], id) for id, place in entries),
    )
    return {shard: rows for shard, rows in shards.items() if shard not in moving} | new.shards


def _copy(
    folder: Path, facts: Facts, places: list[tuple[int, int]]
) -> tuple[Facts, dict[tuple[int, int], tuple[int, int]]]:
    """Copies the vectors at `(shard, row)` places to new shards; few files are open at a time."""
    opened = lru_cache(4)(lambda shard: map_shard(folder, shard, facts))
    new, moved = replace(facts, shards={}), dict[tuple[int, int], tuple[int, int]]()
    for start in range(0, len(places), ROWS_COPIED):
        block = places[start : start + ROWS_COPIED]
        vectors = np.stack([opened(shard)[row] for shard, row in block])
        new, at = append_vectors(folder, new, vectors)
        moved |= zip(block, at, strict=True)
    return new, moved
