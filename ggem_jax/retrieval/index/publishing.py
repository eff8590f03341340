"""The next version of an index: the entries of `pending.sqlite` become visible at once."""

import contextlib
import os
import secrets
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from ggem_jax.retrieval.index.folder import File
from ggem_jax.retrieval.index.store import (
    COLUMNS,
    INDEX,
    NEXT,
    PENDING,
    PUT,
    Damaged,
    Facts,
    map_shard,
    shard_file,
    sync,
    writable,
    write_facts,
    write_shard,
)

SHARD_BYTES = 1 << 28  # largest merged shard: a reader of 16 GiB of vectors maps 64 files
SMALL_SHARDS = 8  # if more shards than this are less than half full, they are merged
_ROWS_COPIED = 4096


def publish(
    folder: Path,
    facts: Facts,
    chosen: list[bytes],
    gone: list[bytes],
    lost: set[int],
    others: Iterable[File] = (),
) -> None:
    """Replaces `index.sqlite` by its next version.

    Args:
        folder: Folder of the index.
        facts: Facts of the next version with all shards that may be used; the shards that are kept
            and the number of images are found here.
        chosen: Paths of the entries of `pending.sqlite` that are taken over.
        gone: Paths of the entries that are dropped.
        lost: Ids of the damaged entries, which are dropped.
        others: Files that were opened and are no images.

    Raises:
        OSError, sqlite3.Error: A file cannot be read or written.
    """
    following = folder / NEXT
    if (folder / INDEX).exists():
        shutil.copyfile(folder / INDEX, following)
    with contextlib.closing(writable(following)) as database:
        database.execute("PRAGMA journal_mode=OFF")  # a private file until it is complete
        database.execute("PRAGMA synchronous=OFF")
        database.execute("BEGIN")
        database.executemany("DELETE FROM images WHERE id = ?", [(number,) for number in lost])
        database.executemany("DELETE FROM images WHERE path = ?", [(name,) for name in gone])
        if chosen:
            with contextlib.closing(writable(folder / PENDING)) as pending:
                query = f"SELECT {COLUMNS}, entry_crc32 FROM images WHERE path = ?"
                database.executemany(
                    PUT, (pending.execute(query, (name,)).fetchone() for name in chosen)
                )
        database.executemany(
            "INSERT OR REPLACE INTO others VALUES (?, ?, ?, ?, ?)",
            ((os.fsencode(file.path), *file.stamp) for file in others),
        )
        shards = _compact(database, folder, facts)
        count = database.execute("SELECT COUNT(*) FROM images").fetchone()[0]
        write_facts(database, replace(facts, shards=shards, count=count))
        database.execute("COMMIT")
    sync(following)
    sync(folder)
    os.replace(following, folder / INDEX)
    sync(folder)


def _compact(database: sqlite3.Connection, folder: Path, facts: Facts) -> dict[int, int]:
    """The shards in use, with their rows.

    Shards are written anew if more than half of all rows are unused, or if many are small.
    """
    used = dict(database.execute("SELECT shard, COUNT(DISTINCT row) FROM images GROUP BY shard"))
    shards = {shard: rows for shard, rows in facts.shards.items() if shard in used}
    capacity = max(1, SHARD_BYTES // max(1, facts.row_bytes()))
    moving = {shard for shard in shards if 2 * shards[shard] < capacity}
    if len(moving) <= SMALL_SHARDS:
        moving = set()
    if 2 * sum(used.values()) < sum(shards.values()):
        moving |= {shard for shard in shards if used[shard] < shards[shard]}
    moving = {shard for shard in moving if _is_sound(folder, shard, facts)}
    if not moving:
        return shards
    entries = [
        entry
        for entry in database.execute("SELECT id, shard, row FROM images ORDER BY id")
        if entry[1] in moving
    ]
    rows = list(dict.fromkeys(entry[1:] for entry in entries))
    new: dict[tuple[int, int], tuple[int, int]] = {}
    shards = {shard: shards[shard] for shard in shards if shard not in moving}
    for start in range(0, len(rows), capacity):
        part, shard = rows[start : start + capacity], secrets.randbits(47)
        write_shard(shard_file(folder, shard), _gather(folder, part, facts), len(part), facts)
        new |= {old: (shard, row) for row, old in enumerate(part)}
        shards[shard] = len(part)
    database.executemany(
        "UPDATE images SET shard = ?, row = ? WHERE id = ?",
        ((*new[entry[1:]], entry[0]) for entry in entries),
    )
    return shards


def _is_sound(folder: Path, shard: int, facts: Facts) -> bool:
    try:
        return len(map_shard(folder, shard, facts)) > 0
    except (Damaged, FileNotFoundError):
        return False


def _gather(folder: Path, rows: list[tuple[int, int]], facts: Facts) -> Iterator[np.ndarray]:
    """The vectors of `(shard, row)` pairs, in blocks, with few files open at a time."""
    opened = lru_cache(4)(lambda shard: map_shard(folder, shard, facts))
    for start in range(0, len(rows), _ROWS_COPIED):
        yield np.stack([opened(shard)[row] for shard, row in rows[start : start + _ROWS_COPIED]])
