"""An index on disk: `index.sqlite` lists the images, `vectors-*.npy` hold their vectors.

While an index is written, `index.sqlite` is in SQLite's WAL mode. The table `journal` and the
entries in `pending` belong to a writer; they are not part of the index until one transaction moves
them to `images`. Readers see the last such transaction, take only SQLite's short read lock, and
require no right to write. At rest there is one SQLite file, without a WAL, so that the folder can
be copied and read from read-only media.

Every vector and every entry has a CRC-32. Paths are stored as bytes. The table `others` lists files
that were opened and are no images, so that they need not be opened again.

Format 3 added the tables of the writer, format 2 the ctime and inode of each image and `others`.
Indexes of these formats are read as they are, and become format 3 when they are written
(`ggem_jax.retrieval.index.migration`).
"""

import json
import platform
import sqlite3
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import ggem_jax
from ggem_jax.retrieval.index.exclusions import Exclusions

FORMAT = 3
APPLICATION = int.from_bytes(b"ggem")
UNKNOWN = -1  # ctime and inode of an entry that was written in format 1
DTYPES = ("float16", "float32")
INDEX, LOCK = "index.sqlite", "lock"
COLUMNS = "path, size, mtime_ns, ctime_ns, inode, content, width, height, vector_crc32, shard, row"
# how an entry takes the place of the one of the same path
REPLACING = "ON CONFLICT (path) DO UPDATE SET " + ", ".join(
    f"{name} = excluded.{name}" for name in [*COLUMNS.split(", ")[1:], "entry_crc32"]
)


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
    revision: int = 0  # number of times that the index was changed

    def stored(self) -> np.dtype:
        """Returns the dtype on disk, little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    def row_bytes(self) -> int:
        """Returns the size of a vector on disk, bytes."""
        return self.dim * self.stored().itemsize


def read_facts(database: sqlite3.Connection, file: Path) -> Facts:
    """Returns the facts of an index.

    Args:
        database: An open connection to the SQLite file.
        file: The SQLite file, which errors name.

    Raises:
        Damaged: The file is damaged, or of another program.
        IndexRefused: The file holds no finished build, or has the format of another version.
    """
    facts = find_facts(database, file)
    if facts is None:
        raise IndexRefused(f"{file.parent} holds no finished build: build it first")
    return facts


def find_facts(
    database: sqlite3.Connection, file: Path, table: Literal["facts", "journal"] = "facts"
) -> Facts | None:
    """Returns the facts of an index or of its journal; None where a build has not finished.

    Args:
        database, file: As in `read_facts`.
        table: "facts" of the index, or those of its "journal".

    Raises:
        Damaged, IndexRefused: As in `read_facts`.
    """
    if not check_format(database, file):
        return None
    found = database.execute(f"SELECT value, crc32 FROM {table}").fetchone()
    if found is None and (
        table == "journal" or not database.execute("SELECT 1 FROM images LIMIT 1").fetchone()
    ):
        return None
    value, crc32 = found or ("", -1)
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


def check_format(database: sqlite3.Connection, file: Path) -> int:
    """Returns the format of a SQLite file; 0 where nothing was written to it yet.

    Args:
        database, file: As in `read_facts`.

    Raises:
        Damaged: The file is of another program.
        IndexRefused: The file has the format of another version.
    """
    if not database.execute("SELECT 1 FROM sqlite_master").fetchone():
        return 0
    application, version = (
        database.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("application_id", "user_version")
    )
    if application != APPLICATION:
        raise Damaged(f"{file} is not an index of ggem_jax: name the folder of one, or build one")
    if not 1 <= version <= FORMAT:
        raise IndexRefused(
            f"{file} has format {version} where this version of ggem_jax reads format {FORMAT}:"
            " update ggem_jax"
        )
    return version


def write_facts(
    database: sqlite3.Connection, facts: Facts, table: Literal["facts", "journal"] = "facts"
) -> None:
    """Writes the facts with the present versions of the libraries.

    Args:
        database: An open connection to the SQLite file.
        facts: The facts, whose `versions` are replaced.
        table: As in `find_facts`.
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
        f"INSERT OR REPLACE INTO {table} VALUES (0, ?, ?)", (value, zlib.crc32(value.encode()))
    )


def put_entries(
    database: sqlite3.Connection, entries: Iterable[Entry], table: str = "images"
) -> None:
    """Adds entries, and replaces those of the same paths, which keep their ids.

    Args:
        database: An open connection to the SQLite file.
        entries: The entries.
        table: "images", or "pending" for the entries of the journal.
    """
    values = ", ".join("?" * (len(Entry._fields) + 1))
    database.executemany(
        f"INSERT INTO {table} ({COLUMNS}, entry_crc32) VALUES ({values}) {REPLACING}",
        ((*entry, entry.crc32()) for entry in entries),
    )
