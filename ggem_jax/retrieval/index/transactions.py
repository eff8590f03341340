"""Writes to `index.sqlite`: in WAL mode, each transaction through to the disk."""

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from ggem_jax.retrieval.index.migration import (
    bring_up_to_date,
    drop_earlier_files,
    is_outdated,
)
from ggem_jax.retrieval.index.reading import connect, damage_of, is_damage
from ggem_jax.retrieval.index.store import INDEX, IndexRefused

_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)  # codes for a full disk
_UNUSED_PAGES = 1 / 4  # share of unused pages above which the file is written anew


@contextlib.contextmanager
def opening(folder: Path) -> Iterator[sqlite3.Connection]:
    """Opens `index.sqlite` for writing, in the present format, and leaves one file without a WAL.

    Where a reader or a full disk prevents the latter, the WAL stays, and the next writer does it.

    Args:
        folder: Folder of the index, whose lock this process holds.

    Yields:
        A connection without implicit transactions.

    Raises:
        IndexRefused: The file cannot be written.
        Damaged: The file is damaged.
    """
    try:
        with contextlib.closing(connect(folder / INDEX, "mode=rwc")) as database:
            database.execute("PRAGMA synchronous=FULL")
            if is_outdated(database, folder):
                with reporting_failures(folder), transaction(database):
                    bring_up_to_date(database, folder)
                with reporting_failures(folder):
                    drop_earlier_files(folder)
            try:
                yield database
            finally:
                with contextlib.suppress(sqlite3.Error):
                    _drop_unused_pages(database)
                    database.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.Error as error:  # other errors may be those of an extractor
        raise _failure(folder, error) from error


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Commits what a `with` block writes, through to the disk; after an error nothing is written.

    Args:
        database: A connection from `opening`.

    Yields:
        None.
    """
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            database.execute("ROLLBACK")
        raise


def _drop_unused_pages(database: sqlite3.Connection) -> None:
    pages, unused = (
        database.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count")
    )
    if unused > _UNUSED_PAGES * pages:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("VACUUM")


@contextlib.contextmanager
def reporting_failures(folder: Path) -> Iterator[None]:
    """Raises one sentence if writing fails in a `with` block.

    Args:
        folder: Folder of the index, which the sentence names.

    Yields:
        None.

    Raises:
        IndexRefused: The block raised `OSError` or an error of SQLite.
        Damaged: The error tells of damage.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise _failure(folder, error) from error


def _failure(folder: Path, error: OSError | sqlite3.Error) -> IndexRefused:
    if is_damage(error):
        return damage_of(folder / INDEX, error)
    if getattr(error, "sqlite_errorcode", None) in _FULL:
        reason = os.strerror(errno.ENOSPC)
    else:
        reason = getattr(error, "strerror", None) or str(error)
    return IndexRefused(
        f"{folder} could not be written: {reason}; nothing is lost, and the same call resumes"
    )
