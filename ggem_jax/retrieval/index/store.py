"""The files of an index: vectors in `vectors-*.npy`, and SQLite files that list the image of each.

A file of vectors, a shard, never changes once it is written. `index.sqlite` is replaced as a whole
by a rename, so that an index is what one version of this file says. Readers open it as immutable,
take no lock and require no right to write. `pending.sqlite` has the same tables and holds what a
writer has extracted but not yet published. The writer holds `lock` with flock; the operating system
releases it however the process ends.

Every vector and every entry has a CRC-32. Paths are stored as bytes. The table `others` lists files
that were opened and are no images, so that they need not be opened again.

Format 2 added this table, and the ctime and inode of each image. An index of format 1 is read as it
is, and becomes one of format 2 when it is written.
"""

import contextlib
import json
import os
import platform
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

import ggem_jax
from ggem_jax.retrieval.index.exclusions import Exclusions
from ggem_jax.retrieval.index.folder import shown

FORMAT = 2
UNKNOWN = -1  # ctime and inode of an entry that was written in format 1
DTYPES = ("float16", "float32")
INDEX, PENDING, NEXT, LOCK = "index.sqlite", "pending.sqlite", "next.sqlite", "lock"

_APPLICATION = int.from_bytes(b"ggem")
_TABLES = """
    CREATE TABLE facts (
        id INTEGER PRIMARY KEY CHECK (id = 0), value TEXT NOT NULL, crc32 INTEGER NOT NULL);
    CREATE TABLE images (
        id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE, size INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL, content BLOB NOT NULL, width INTEGER NOT NULL,
        height INTEGER NOT NULL, vector_crc32 INTEGER NOT NULL, entry_crc32 INTEGER NOT NULL,
        shard INTEGER NOT NULL, row INTEGER NOT NULL);
    CREATE INDEX contents ON images (content);
"""
# what format 2 adds
_ADDED = f"""
    ALTER TABLE images ADD COLUMN ctime_ns INTEGER NOT NULL DEFAULT {UNKNOWN};
    ALTER TABLE images ADD COLUMN inode INTEGER NOT NULL DEFAULT {UNKNOWN};
    CREATE TABLE others (
        path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
        ctime_ns INTEGER NOT NULL, inode INTEGER NOT NULL);
"""
# format 1 as if it were format 2: a temporary view hides the table of the same name
_VIEWS = f"""
    CREATE TEMP VIEW images AS
        SELECT *, {UNKNOWN} AS ctime_ns, {UNKNOWN} AS inode FROM main.images;
    CREATE TEMP TABLE others (path BLOB, size, mtime_ns, ctime_ns, inode);
"""

COLUMNS = "path, size, mtime_ns, ctime_ns, inode, content, width, height, vector_crc32, shard, row"
_UPDATED = (*COLUMNS.split(", ")[1:], "entry_crc32")
PUT = f"""INSERT INTO images ({COLUMNS}, entry_crc32) VALUES ({", ".join(12 * "?")})
    ON CONFLICT (path) DO UPDATE SET
    {", ".join(f"{name} = excluded.{name}" for name in _UPDATED)}"""


class IndexRefused(ValueError):
    """This index does not allow the call; one sentence names the cause and the remedy."""


class Damaged(IndexRefused):
    """A file of the index is not what the index wrote."""


class Entry(NamedTuple):
    """An image of the index. Images with the same content share a vector, `row` of `shard`."""

    path: bytes  # relative to the root
    size: int  # bytes of the file
    mtime_ns: int  # time of the file's last change, nanoseconds since 1970
    ctime_ns: int  # time of the last change of the file or its inode; UNKNOWN in format 1
    inode: int  # number of the file on its disk; UNKNOWN in format 1
    content: bytes  # hash of the file, 16 bytes
    width: int  # pixels
    height: int  # pixels
    vector_crc32: int  # checksum of the vector as it is stored
    shard: int  # number of the file of vectors
    row: int  # row of the vector in it

    def crc32(self) -> int:
        """Returns the CRC-32 of all fields except the vector's place, which compaction changes.

        Where ctime and inode are unknown they do not count, as in format 1.
        """
        known = self.ctime_ns != UNKNOWN or self.inode != UNKNOWN
        return zlib.crc32(repr(self[:9] if known else self[:3] + self[5:9]).encode())

    @property
    def stamp(self) -> tuple[int, int, int, int]:
        """Size, times and inode, as in `File`."""
        return self[1:5]


@dataclass(frozen=True)
class Facts:
    """The properties of a whole index."""

    settings: dict[str, Any]  # JSON values that describe how vectors are made
    dtype: str  # dtype of the vectors on disk, one of `DTYPES`
    root: str  # absolute path of the folder of the images
    dim: int = 0  # dimension of a vector; 0 before the first one
    count: int = 0  # number of images
    shards: dict[int, int] = field(default_factory=dict)  # shard -> number of rows
    versions: dict[str, str] = field(default_factory=dict)  # library -> version that wrote it
    exclusions: Exclusions = field(default_factory=Exclusions)  # what is left out of the folder
    part: str | None = None  # "I/N" where it holds one part of the folder, as in `Part`

    def stored(self) -> np.dtype:
        """Returns the dtype on disk, little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    def row_bytes(self) -> int:
        """Returns the size of a vector on disk, bytes."""
        return self.dim * self.stored().itemsize


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[sqlite3.Connection]:
    """Opens the SQLite file of an index as it is now; writers do not change what it shows.

    Args:
        folder: Folder of the index.

    Yields:
        A read-only connection to `index.sqlite`.

    Raises:
        IndexRefused: There is no index, or the folder cannot be read.
        Damaged: The block found the file to be damaged.
    """
    file = folder / INDEX
    try:
        if not file.is_file():
            if not (folder / PENDING).exists() and is_unfinished(folder) and holds_shards(folder):
                raise index_is_missing(folder)
            state = "no finished build" if is_unfinished(folder) else "no index"
            raise IndexRefused(
                f"{folder} holds {state} (there is no {INDEX} in it): build it first"
            )
        with (
            _damage_in_one_sentence(file),
            contextlib.closing(connect(file, "mode=ro&immutable=1")) as database,
        ):
            yield database
    except OSError as error:
        raise IndexRefused(f"{folder} cannot be read: {error.strerror}") from error


def writable(file: Path) -> sqlite3.Connection:
    """Returns a connection to a SQLite file of a writer.

    A missing file is created with its tables, and one of format 1 gets those of format 2.
    Transactions are explicit, and on disk when they are committed.

    Args:
        file: `pending.sqlite` or `next.sqlite` of an index.
    """
    database = connect(file, "mode=rwc")
    database.execute("PRAGMA synchronous=FULL")
    if not database.execute("PRAGMA application_id").fetchone()[0]:
        database.executescript(
            f"BEGIN; {_TABLES} {_ADDED} PRAGMA application_id={_APPLICATION};"
            f" PRAGMA user_version={FORMAT}; COMMIT;"
        )
    elif database.execute("PRAGMA user_version").fetchone()[0] == 1:
        database.executescript(f"BEGIN; {_ADDED} PRAGMA user_version={FORMAT}; COMMIT;")
    return database


def connect(file: Path, mode: str) -> sqlite3.Connection:
    """Returns a connection to a SQLite file without implicit transactions.

    Read-only connections show format 1 as format 2.

    Args:
        file: The SQLite file.
        mode: Parameters of a SQLite URI, such as "mode=ro&immutable=1".
    """
    database = sqlite3.connect(
        f"file:{quote(os.fsencode(file.absolute()))}?{mode}", uri=True, isolation_level=None
    )
    if "mode=ro" in mode:
        try:
            if database.execute("PRAGMA user_version").fetchone()[0] == 1:
                database.executescript(_VIEWS)
        except sqlite3.Error:
            database.close()
            raise
    return database


@contextlib.contextmanager
def _damage_in_one_sentence(file: Path) -> Iterator[None]:
    try:
        yield
    except IndexRefused:
        raise
    # SQLite's own errors, and those that altered values cause
    except (sqlite3.Error, ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
        raise Damaged(
            f"{file} is damaged ({error}): put a copy in its place, or build the index again in"
            " another folder"
        ) from error


def read_facts(database: sqlite3.Connection, file: Path) -> Facts:
    """Returns the facts of an index, or of a pending one.

    Args:
        database: An open connection to the SQLite file.
        file: The SQLite file, which errors name.

    Raises:
        Damaged: The file is damaged, or of another program.
        IndexRefused: The file has the format of another version.
    """
    application, version = (
        database.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("application_id", "user_version")
    )
    if application != _APPLICATION:
        raise Damaged(f"{file} is not an index of ggem_jax: name the folder of one, or build one")
    if version not in (1, FORMAT):
        raise IndexRefused(
            f"{file} has format {version} where this version of ggem_jax reads format {FORMAT}:"
            " update ggem_jax"
        )
    value, crc32 = database.execute("SELECT value, crc32 FROM facts").fetchone() or ("", -1)
    if zlib.crc32(value.encode()) != crc32:
        raise Damaged(
            f"{file} is damaged (its settings have been altered): put a copy in its place, or build"
            " the index again in another folder"
        )
    values = json.loads(value)
    values["shards"] = {int(shard): rows for shard, rows in values["shards"].items()}
    if "exclusions" in values:
        kept = {name: tuple(patterns) for name, patterns in values["exclusions"].items()}
        values["exclusions"] = Exclusions(**kept)
    return Facts(**values)


def write_facts(database: sqlite3.Connection, facts: Facts) -> None:
    """Writes the facts with the present versions of the libraries.

    Args:
        database: An open connection to the SQLite file.
        facts: The facts, whose `versions` are replaced.
    """
    from_now = {
        "ggem_jax": ggem_jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        **{name: metadata.version(name) for name in ("jax", "pillow")},
    }
    value = json.dumps(asdict(replace(facts, versions=from_now)))
    database.execute(
        "INSERT OR REPLACE INTO facts VALUES (0, ?, ?)", (value, zlib.crc32(value.encode()))
    )


def is_unfinished(folder: Path) -> bool:
    """Returns whether a folder holds at most what an interrupted build leaves.

    Args:
        folder: Folder of an index, which may be missing.
    """
    return (
        all(
            name == LOCK or name.startswith((PENDING, NEXT)) or is_shard(name)
            for name in os.listdir(folder)
        )
        if folder.is_dir()
        else False
    )


def holds_shards(folder: Path) -> bool:
    """Returns whether a folder holds files of vectors.

    Args:
        folder: Folder of an index, which must exist.
    """
    return any(map(is_shard, os.listdir(folder)))


def index_is_missing(folder: Path) -> IndexRefused:
    """Returns the error for vectors without an index.

    Args:
        folder: Folder of the index, which the error names.
    """
    return IndexRefused(
        f"{INDEX} is missing in {folder}: put a copy in its place, or delete the folder to build it"
        " anew"
    )


def is_shard(name: str) -> bool:
    """Returns whether a file's name is that of a file of vectors.

    Args:
        name: Name of the file without its folder.
    """
    return name.startswith("vectors-") and name.endswith(".npy")


def shard_file(folder: Path, shard: int) -> Path:
    """Returns the file of a shard.

    Args:
        folder: Folder of the index.
        shard: Number of the shard, a random one of 47 bits.
    """
    return folder / f"vectors-{shard:012x}.npy"


def write_shard(file: Path, blocks: Iterable[np.ndarray], rows: int, facts: Facts) -> None:
    """Writes vectors as one new `.npy` file, through to the disk.

    Args:
        file: The file, which must not exist.
        blocks: Blocks `(n, dim)` of vectors in the dtype of the index.
        rows: Number of vectors in all blocks.
        facts: Facts of the index, with `dim` and `dtype`.

    Raises:
        OSError: The file exists or cannot be written.
    """
    with file.open("xb") as handle:
        handle.write(_npy_header(rows, facts))
        for block in blocks:
            handle.write(np.ascontiguousarray(block).data)
        handle.flush()
        os.fsync(handle.fileno())


def sync(path: Path) -> None:
    """Flushes a file, or the list of names in a folder, to the disk.

    Args:
        path: The file or folder.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def map_shard(folder: Path, shard: int, facts: Facts) -> np.ndarray:
    """Returns the vectors of a shard, `(rows, dim)`, memory-mapped.

    Args:
        folder: Folder of the index.
        shard: Number of the shard, a key of `facts.shards`.
        facts: Facts of the index.

    Raises:
        FileNotFoundError: There is no such file.
        Damaged: The file has another size or header; the text follows its name in a sentence.
    """
    rows = facts.shards[shard]
    header, file = _npy_header(rows, facts), shard_file(folder, shard)
    with file.open("rb") as handle:
        there, expected = os.fstat(handle.fileno()).st_size, len(header) + rows * facts.row_bytes()
        if there != expected:
            raise Damaged(
                f"is {'truncated' if there < expected else 'too long'} ({there} bytes where"
                f" {expected} are expected)"
            )
        if handle.read(len(header)) != header:
            raise Damaged("has an altered header")
        return np.asarray(
            np.memmap(handle, facts.stored(), "r", len(header), (rows, facts.dim))
        )  # indexing np.memmap itself is slow


def _npy_header(rows: int, facts: Facts) -> bytes:
    """Version 1.0 of NumPy's format, padded to 64 bytes; the same bytes for any NumPy."""
    text = (
        f"{{'descr': '{facts.stored().str}', 'fortran_order': False, 'shape': ({rows},"
        f" {facts.dim}), }}"
    )
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")


class Flaw(NamedTuple):
    """An entry that cannot be used."""

    id: int  # row of the entry in its SQLite file
    path: str  # path of the image, relative to the root
    file: str  # name of the damaged file
    what: str  # what is wrong, as it follows the file's name in a sentence


def flaws(
    database: sqlite3.Connection, folder: Path, facts: Facts, name: str = INDEX
) -> Iterator[Flaw]:
    """Yields the entries that cannot be used: all checksums of entries and vectors are compared.

    Args:
        database: An open connection to the SQLite file.
        folder: Folder of the index.
        facts: Facts of the SQLite file.
        name: Name of the SQLite file, by which a flaw calls it.
    """
    current, vectors, trouble = -1, np.empty((0, 0)), ""
    for number, entry_crc32, *values in database.execute(
        f"SELECT id, entry_crc32, {COLUMNS} FROM images ORDER BY shard, row"
    ):
        entry = Entry(*values)
        path = os.fsdecode(entry.path) if isinstance(entry.path, bytes) else str(entry.path)
        if entry.crc32() != entry_crc32:
            yield Flaw(number, path, name, "holds altered entries")
            continue
        if (
            entry.shard not in facts.shards
            or not isinstance(entry.row, int)
            or not 0 <= entry.row < facts.shards[entry.shard]
        ):
            yield Flaw(number, path, name, "names vectors that are not there")
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


def mend(folder: Path, file: str, what: str, paths: list[str] | None = None) -> str:
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
        FileNotFoundError: There is no such file.
        Damaged: The file has another size or header.
        IndexRefused: The file cannot be read.
    """
    try:
        return map_shard(folder, shard, facts)
    except Damaged as error:
        raise Damaged(mend(folder, shard_file(folder, shard).name, str(error))) from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise IndexRefused(
            f"{shard_file(folder, shard)} cannot be read: {error.strerror}"
        ) from error


def facts_of(folder: Path) -> Facts:
    """Returns the facts of an index as it is now.

    Args:
        folder: Folder of the index.

    Raises:
        IndexRefused: There is no index, it is damaged, or of another version.
    """
    with reading(folder) as database:
        return read_facts(database, folder / INDEX)


def as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings as they come back from JSON: tuples become lists, keys text.

    Args:
        settings: A dictionary of JSON values.

    Raises:
        IndexRefused: The settings are not such a dictionary.
    """
    try:
        return dict(json.loads(json.dumps(settings)))
    except (TypeError, ValueError) as error:
        raise IndexRefused(f"settings must be a dictionary of JSON values: {error}") from None


def refuse_other_settings(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises `IndexRefused`, which lists all differences, unless the settings are equal.

    Args:
        folder: Folder of the index, which the error names.
        there: Settings of the index.
        here: Settings of the caller, a dictionary of JSON values.
    """
    flat_there, flat_here = _flat(there), _flat(as_json(here))
    names = [
        name
        for name in flat_there | flat_here
        if flat_there.get(name, "not set") != flat_here.get(name, "not set")
    ]
    if names:
        told = "; ".join(
            f"{name} is {flat_there.get(name, 'not set')} there, {flat_here.get(name, 'not set')}"
            " here"
            for name in names
        )
        raise IndexRefused(
            f"{folder} was made with other settings ({told}): use those, or build an index of its"
            " own for these"
        )


def refuse_other_build(folder: Path, there: Facts, here: Facts) -> None:
    """Raises `IndexRefused` unless settings, dtype, folder of the images and part are equal.

    Args:
        folder: Folder of the index, which the error names.
        there: Facts of the index, or of an interrupted build.
        here: Facts of the caller.
    """
    facts_there, facts_here = (
        {**facts.settings, "dtype": facts.dtype, "folder": facts.root, "shard": facts.part}
        for facts in (there, here)
    )
    refuse_other_settings(folder, facts_there, facts_here)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"pooling": {"p": 3}} -> {"pooling.p": "3"}"""
    flat: dict[str, str] = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, dict) and value
            else {f"{prefix}{name}": json.dumps(value, ensure_ascii=False)}
        )
    return flat
