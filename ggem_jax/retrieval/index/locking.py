"""The lock of a writer: one process at a time writes an index, and tidies its folder."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ggem_jax.retrieval.index.migration import read_pending
from ggem_jax.retrieval.index.reading import (
    NEXT,
    PENDING,
    facts_of,
    index_is_missing,
    is_built,
    reading,
)
from ggem_jax.retrieval.index.shards import is_shard, shard_file
from ggem_jax.retrieval.index.store import (
    FORMAT,
    INDEX,
    LOCK,
    IndexRefused,
    check_format,
    find_facts,
)
from ggem_jax.retrieval.index.transactions import opening, reporting_failures


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
    if not new:
        facts_of(folder)
    elif made and folder.is_symlink():
        raise IndexRefused(f"{folder} is a link that leads nowhere: choose another path")
    elif not is_built(folder) and not made and not _is_unfinished(folder):
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


def _is_unfinished(folder: Path) -> bool:
    """Whether a folder holds at most what an interrupted build leaves."""
    return folder.is_dir() and all(
        name == LOCK or name.startswith((INDEX, PENDING, NEXT)) or is_shard(name)
        for name in os.listdir(folder)
    )


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
    """Removes shards that neither the index nor its journal uses, and an index without contents."""
    if not (folder / INDEX).exists():
        earlier, _ = read_pending(folder)
        if any(map(is_shard, os.listdir(folder))) and (earlier is None or earlier.count):
            raise index_is_missing(folder)
        return
    if (folder / PENDING).exists():
        return  # of an earlier format; it names shards too
    if any(name.startswith(f"{INDEX}-") for name in os.listdir(folder)):
        with opening(folder):  # leaves one file
            pass
    with reading(folder) as database:
        facts, journal = find_facts(database, folder / INDEX), None
        if check_format(database, folder / INDEX) == FORMAT:
            journal = find_facts(database, folder / INDEX, "journal")
        is_empty = facts is None and (
            journal is None or not database.execute("SELECT 1 FROM pending").fetchone()
        )
    used = [each for each in (facts, journal) if each is not None and not is_empty]
    names = {shard_file(folder, shard).name for each in used for shard in each.shards}
    for name in os.listdir(folder):
        if name.startswith(NEXT) or (is_shard(name) and name not in names):
            (folder / name).unlink()
    if is_empty:  # the WAL first: it must not be taken for that of another file
        for name in (f"{INDEX}-wal", f"{INDEX}-shm", f"{INDEX}-journal", INDEX):
            (folder / name).unlink(missing_ok=True)
