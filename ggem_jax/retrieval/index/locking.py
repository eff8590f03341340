"""The lock of a writer: one process at a time writes an index, and tidies its folder."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ggem_jax.retrieval.index.store import (
    INDEX,
    LOCK,
    NEXT,
    PENDING,
    Damaged,
    IndexRefused,
    facts_of,
    flaws,
    holds_shards,
    index_is_missing,
    is_shard,
    is_unfinished,
    read_facts,
    shard_file,
    writable,
)


@contextlib.contextmanager
def reporting_failures(folder: Path) -> Iterator[None]:
    """Raises `IndexRefused` with one sentence if writing fails in a `with` block.

    Args:
        folder: Folder of the index, which the sentence names.

    Yields:
        None.

    Raises:
        IndexRefused: The block raised `OSError` or an error of SQLite.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise IndexRefused(
            f"{folder} could not be written: {reason}; the index is unchanged, and the same call"
            " resumes"
        ) from error


@contextlib.contextmanager
def locking(folder: Path, *, new: bool = False) -> Iterator[None]:
    """Keeps other writers out of an index, and removes files that no index uses, before and after.

    Args:
        folder: Folder of the index.
        new: Whether the index may be missing, so that the folder is made.

    Yields:
        None.

    Raises:
        IndexRefused: There is no usable index, the folder holds something else, another process
            holds the lock, or the folder cannot be written.
    """
    made = new and not folder.exists()
    if not new or (folder / INDEX).exists():
        facts_of(folder)
    elif not made and not is_unfinished(folder):
        raise IndexRefused(
            f"{folder} exists and is not an index: choose another path, nothing is overwritten"
        )
    with contextlib.ExitStack() as stack:
        with reporting_failures(folder):
            if new:
                folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_folder(folder))
            _tidy(folder)
        try:
            yield
        finally:
            with contextlib.suppress(
                OSError, sqlite3.Error, IndexRefused
            ):  # otherwise the next writer does it
                _tidy(folder)
                if set(os.listdir(folder)) == {LOCK}:  # nothing was written
                    (folder / LOCK).unlink()
                    if made:
                        folder.rmdir()


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder with flock, which the system releases however the process ends.

    The short timeout is for a lock file that its owner removes between our opening and locking it.
    A soft lock, which a killed process would leave behind, is never used in its place.

    Args:
        folder: The folder, which must exist.

    Yields:
        None.

    Raises:
        IndexRefused: Another process holds the lock.
    """
    lock = FileLock(folder / LOCK, timeout=0.2, poll_interval=0.02, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise IndexRefused(
            f"another process is writing to {folder}: wait until it has finished (searches may go"
            " on)"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _tidy(folder: Path) -> None:
    """Removes shards that neither SQLite file names, and a pending file that cannot be used.

    Without an index, shards belong to an unfinished build if its pending file counts no image of an
    index. Other shards belong to an index whose SQLite file has been lost, and are refused.
    """
    ours, unusable = (folder / INDEX).exists(), False
    kept = set(facts_of(folder).shards) if ours else set()
    if (folder / PENDING).exists():
        try:
            with contextlib.closing(writable(folder / PENDING)) as database:
                ours = ours or read_facts(database, folder / PENDING).count == 0
                if ours:
                    kept |= _usable_shards(database, folder)
        except (Damaged, sqlite3.DatabaseError) as error:
            if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF not in (
                sqlite3.SQLITE_CORRUPT,
                sqlite3.SQLITE_NOTADB,
            ):
                raise  # for example a full disk: the file itself is sound
            unusable = True
    if not ours and holds_shards(folder):
        raise index_is_missing(folder)
    names = {shard_file(folder, shard).name for shard in kept}
    for name in os.listdir(folder):
        if name.startswith(NEXT) or (is_shard(name) and name not in names):
            (folder / name).unlink()
    if unusable:
        drop_pending(folder)


def _usable_shards(pending: sqlite3.Connection, folder: Path) -> set[int]:
    if pending.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
        raise Damaged("its structure is broken")
    if not pending.execute("SELECT 1 FROM images").fetchone():
        raise Damaged("there is nothing in it")
    facts = read_facts(pending, folder / PENDING)
    lost = [(flaw.id,) for flaw in flaws(pending, folder, facts, PENDING)]
    pending.executemany("DELETE FROM images WHERE id = ?", lost)
    return {shard for (shard,) in pending.execute("SELECT DISTINCT shard FROM images")}


def drop_pending(folder: Path) -> None:
    """Removes `pending.sqlite` and its journal, which an interrupted writer leaves behind.

    Args:
        folder: Folder of the index.
    """
    for name in (f"{PENDING}-journal", PENDING):
        (folder / name).unlink(missing_ok=True)
