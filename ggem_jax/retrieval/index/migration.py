"""The tables of an index, and how those of earlier formats become the present ones.

Writers of formats 1 and 2 kept what was not yet part of the index in `pending.sqlite`; hours of an
interrupted build may be in it.
"""

import contextlib
import sqlite3
from pathlib import Path

from ggem_jax.retrieval.index.reading import NEXT, PENDING, connect, is_damage, show_format_1
from ggem_jax.retrieval.index.store import (
    APPLICATION,
    COLUMNS,
    FORMAT,
    INDEX,
    UNKNOWN,
    Damaged,
    Entry,
    Facts,
    check_format,
    find_facts,
    put_entries,
    write_facts,
)

_FACTS = "id INTEGER PRIMARY KEY CHECK (id = 0), value TEXT NOT NULL, crc32 INTEGER NOT NULL"
_ENTRY = """
    path BLOB NOT NULL UNIQUE, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL, inode INTEGER NOT NULL, content BLOB NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL, vector_crc32 INTEGER NOT NULL,
    entry_crc32 INTEGER NOT NULL, shard INTEGER NOT NULL, row INTEGER NOT NULL"""
_TABLES = f"""
    CREATE TABLE IF NOT EXISTS facts ({_FACTS});
    CREATE TABLE IF NOT EXISTS images (id INTEGER PRIMARY KEY, {_ENTRY});
    CREATE INDEX IF NOT EXISTS contents ON images (content);
    CREATE TABLE IF NOT EXISTS others (
        path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
        ctime_ns INTEGER NOT NULL, inode INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS journal ({_FACTS});
    CREATE TABLE IF NOT EXISTS pending (id INTEGER PRIMARY KEY, place INTEGER, {_ENTRY});
    CREATE INDEX IF NOT EXISTS pending_contents ON pending (content);
    PRAGMA application_id={APPLICATION};
    PRAGMA user_version={FORMAT}"""
_FORMAT_2 = f"""
    ALTER TABLE images ADD COLUMN ctime_ns INTEGER NOT NULL DEFAULT {UNKNOWN};
    ALTER TABLE images ADD COLUMN inode INTEGER NOT NULL DEFAULT {UNKNOWN}"""


def is_outdated(database: sqlite3.Connection, folder: Path) -> bool:
    """Returns whether an index has an earlier format, no tables, or a file of an earlier writer.

    Args:
        database: An open connection to its `index.sqlite`.
        folder: Folder of the index.
    """
    return check_format(database, folder / INDEX) < FORMAT or (folder / PENDING).exists()


def bring_up_to_date(database: sqlite3.Connection, folder: Path) -> None:
    """Makes the tables of the present format, and takes over those of earlier ones.

    Args:
        database: A connection to `index.sqlite`, in a transaction.
        folder: Folder of the index.
    """
    earlier = _FORMAT_2 + ";" if check_format(database, folder / INDEX) == 1 else ""
    for statement in (earlier + _TABLES).split(";"):
        database.execute(statement)
    facts, entries = read_pending(folder)
    if facts is not None:
        write_facts(database, facts, "journal")
        put_entries(database, entries, "pending")


def read_pending(folder: Path) -> tuple[Facts | None, list[Entry]]:
    """Returns the facts and the entries of an interrupted writer of an earlier format.

    Args:
        folder: Folder of the index.

    Returns:
        The facts, None where there is no such file or a damaged one, and the sound entries.
    """
    file = folder / PENDING
    if not file.exists():
        return None, []
    try:
        with contextlib.closing(connect(file, "mode=rw")) as earlier:
            show_format_1(earlier)
            facts = find_facts(earlier, file)
            query = f"SELECT entry_crc32, {COLUMNS} FROM images ORDER BY id"
            rows = earlier.execute(query).fetchall() if facts is not None else []
    except (Damaged, sqlite3.DatabaseError) as error:
        if not is_damage(error):
            raise
        return None, []
    entries = [(crc32, Entry(*values)) for crc32, *values in rows]
    return facts, [entry for crc32, entry in entries if entry.crc32() == crc32]


def drop_earlier_files(folder: Path) -> None:
    """Removes the files of earlier writers, which `bring_up_to_date` took over.

    Args:
        folder: Folder of the index.
    """
    for name in (NEXT, f"{PENDING}-journal", PENDING):
        (folder / name).unlink(missing_ok=True)
