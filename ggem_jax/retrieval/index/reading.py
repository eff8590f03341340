"""Opens an index for reading, also while another process writes it or where nothing is writable."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from ggem_jax.retrieval.index.shards import is_shard
from ggem_jax.retrieval.index.store import (
    INDEX,
    UNKNOWN,
    Damaged,
    Facts,
    IndexRefused,
    find_facts,
    read_facts,
)

PENDING, NEXT = "pending.sqlite", "next.sqlite"  # of writers of formats 1 and 2

_WAIT_SECONDS = 60.0  # for a reader or writer that has SQLite's lock for a moment
# errors of SQLite that are no damage: locks, rights, memory, disks
_HINDRANCES = tuple(
    getattr(sqlite3, f"SQLITE_{name}")
    for name in (
        "BUSY", "CANTOPEN", "FULL", "IOERR", "LOCKED", "NOLFS", "NOMEM", "PERM", "PROTOCOL",
        "READONLY",
    )
)  # fmt: skip
# codes of SQLite where it cannot write the files beside a file in WAL mode
_CANNOT_WRITE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR)
# format 1 as if it were format 2: a temporary view hides the table of the same name
_VIEWS = f"""
    CREATE TEMP VIEW images AS
        SELECT *, {UNKNOWN} AS ctime_ns, {UNKNOWN} AS inode FROM main.images;
    CREATE TEMP TABLE others (path BLOB, size, mtime_ns, ctime_ns, inode);
"""


def connect(file: Path, mode: str) -> sqlite3.Connection:
    """Returns a connection to a SQLite file without implicit transactions.

    Args:
        file: The SQLite file.
        mode: Parameters of a SQLite URI, such as "mode=ro".
    """
    name = f"file:{quote(os.fsencode(file.absolute()))}?{mode}"
    return sqlite3.connect(name, uri=True, isolation_level=None, timeout=_WAIT_SECONDS)


@contextlib.contextmanager
def reading(folder: Path, *, copy: bool = False) -> Iterator[sqlite3.Connection]:
    """Opens the SQLite file of an index; all queries see the same version of it.

    Args:
        folder: Folder of the index.
        copy: Whether the connection is to a copy in memory, so that a long block keeps no writer
            waiting.

    Yields:
        A read-only connection to `index.sqlite`.

    Raises:
        IndexRefused: There is no index, or the folder cannot be read.
        Damaged: The block found the file to be damaged.
    """
    file = folder / INDEX
    try:
        if not file.is_file():
            raise no_index(folder)
        with reporting_damage(file), contextlib.closing(_connect_to_read(file)) as database:
            if not copy:
                yield database
                return
            with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as copied:
                database.backup(copied)
                database.close()
                show_format_1(copied)
                yield copied
    except OSError as error:
        raise IndexRefused(f"{folder} cannot be read: {error.strerror}") from error


def _connect_to_read(file: Path) -> sqlite3.Connection:
    """A connection in a read transaction.

    A writer that was killed may leave a WAL or a rollback journal. SQLite reads or takes back what
    is in it; where it cannot, as nothing may be written there or the disk is full, the file alone
    is not the index. Without such files it is, also if it is still in WAL mode.
    """
    try:
        return _begin(connect(file, "mode=ro"))
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in _CANNOT_WRITE:
            raise
    beside = [file.with_name(f"{file.name}-{ending}") for ending in ("wal", "journal")]
    left = [path for path in beside if path.exists() and path.stat().st_size]
    if not left:
        return _begin(connect(file, "mode=ro&immutable=1"))
    try:
        return _begin(connect(file, "mode=rw"))
    except sqlite3.OperationalError as error:
        raise IndexRefused(
            f"{left[0]} holds what an interrupted writer wrote, which cannot be read where nothing"
            " can be written: copy the folder to another place and read it there"
        ) from error


def _begin(database: sqlite3.Connection) -> sqlite3.Connection:
    try:
        show_format_1(database)
        database.execute("BEGIN")
        database.execute("SELECT 1 FROM sqlite_master").fetchone()
    except BaseException:
        database.close()
        raise
    return database


def show_format_1(database: sqlite3.Connection) -> None:
    """Makes a connection show format 1 as format 2, where it is format 1.

    Args:
        database: An open connection to the SQLite file.
    """
    if database.execute("PRAGMA user_version").fetchone()[0] == 1:
        database.executescript(_VIEWS)


@contextlib.contextmanager
def reporting_damage(file: Path) -> Iterator[None]:
    """Raises one sentence for SQLite's own errors and for those that altered values cause.

    Args:
        file: The SQLite file, which the sentence names.

    Yields:
        None.

    Raises:
        Damaged: The file is damaged.
        IndexRefused: It cannot be opened, or another process keeps it locked.
    """
    try:
        yield
    except IndexRefused:
        raise
    except (sqlite3.Error, ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in _HINDRANCES:
            raise IndexRefused(f"{file} cannot be read: {error}") from error
        raise damage_of(file, error) from error


def damage_of(file: Path, error: Exception | str) -> Damaged:
    """Returns the error for a damaged SQLite file.

    Args:
        file: The file.
        error: What is wrong.
    """
    what = " ".join(str(error).split())
    return Damaged(
        f"{file} is damaged ({what}): put a copy in its place, or build the index again in"
        " another folder"
    )


def is_damage(error: Exception) -> bool:
    """Returns whether an error tells of a damaged SQLite file, and not of a full disk or the like.

    Args:
        error: The error.
    """
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    return isinstance(error, sqlite3.Error | Damaged) and code in (
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
    )


def facts_of(folder: Path) -> Facts:
    """Returns the facts of an index as it is now.

    Args:
        folder: Folder of the index.

    Raises:
        IndexRefused: There is no index, it is damaged, or of another version.
    """
    with reading(folder) as database:
        return read_facts(database, folder / INDEX)


def is_built(folder: Path) -> bool:
    """Returns whether a folder holds a finished index.

    Args:
        folder: Folder of an index, which may be missing.

    Raises:
        IndexRefused: The index is damaged, or of another version.
    """
    if not (folder / INDEX).exists():
        return False
    with reading(folder) as database:
        return find_facts(database, folder / INDEX) is not None


def no_index(folder: Path) -> IndexRefused:
    """Returns the error for a folder without `index.sqlite`.

    Args:
        folder: The folder, which may be missing.
    """
    names = os.listdir(folder) if folder.is_dir() else []
    if any(map(is_shard, names)) and PENDING not in names:
        return index_is_missing(folder)
    state = "no finished build" if PENDING in names else "no index"
    return IndexRefused(f"{folder} holds {state} (there is no {INDEX} in it): build it first")


def index_is_missing(folder: Path) -> IndexRefused:
    """Returns the error for vectors without an index.

    Args:
        folder: Folder of the index, which the error names.
    """
    return IndexRefused(
        f"{INDEX} is missing in {folder}: put a copy in its place, or delete the folder to build it"
        " anew"
    )
