"""The journal of a writer: entries that become part of the index all at once.

Each batch is one transaction. A writer that was killed has lost the last one at most; the next
writer takes the entries whose files are as they were, and publishes them with its own.
"""

import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ggem_jax.retrieval.index.agreement import refuse_other_build
from ggem_jax.retrieval.index.damage import flaws
from ggem_jax.retrieval.index.folder import DecodedImage, File
from ggem_jax.retrieval.index.publishing import change
from ggem_jax.retrieval.index.shards import append_vectors
from ggem_jax.retrieval.index.store import (
    COLUMNS,
    INDEX,
    REPLACING,
    UNKNOWN,
    Entry,
    Facts,
    IndexRefused,
    find_facts,
    put_entries,
    write_facts,
)
from ggem_jax.retrieval.index.transactions import reporting_failures, transaction

# entries of the index that can be used, and those with the entries of the journal
_VIEWS = f"""
    CREATE TEMP TABLE lost (id INTEGER PRIMARY KEY);
    CREATE TEMP VIEW usable AS SELECT * FROM images WHERE id NOT IN (SELECT id FROM lost);
    CREATE TEMP VIEW known AS
        SELECT {COLUMNS} FROM pending UNION ALL SELECT {COLUMNS} FROM usable"""


class Placed(NamedTuple):
    """An image without its pixels, and its place in the listing of the folder."""

    place: int
    image: DecodedImage

    def entry(self, size: tuple[int, int], crc32: int, at: tuple[int, int]) -> Entry:
        """Returns the entry of the image.

        Args:
            size: Width and height, pixels.
            crc32: Checksum of its vector.
            at: Shard and row of its vector.
        """
        file = self.image.file
        return Entry(os.fsencode(file.path), *file.stamp, self.image.content, *size, crc32, *at)


class Journal:
    """The entries of an index, and those that a writer adds.

    Args:
        folder: Folder of the index.
        database: A connection from `opening`.
        facts: Facts of the index, or of the build that is wanted.
        lost: Ids of the entries that cannot be used.

    Raises:
        IndexRefused: A build with other settings was interrupted.
    """

    def __init__(
        self, folder: Path, database: sqlite3.Connection, facts: Facts, lost: Iterable[int]
    ):
        self.folder, self.database, self.facts = folder, database, facts
        self.reused = 0  # copies of images that had a vector
        for statement in _VIEWS.split(";"):
            database.execute(statement)
        database.executemany("INSERT INTO lost VALUES (?)", ((number,) for number in lost))
        there = find_facts(database, folder / INDEX, "journal")
        if there is not None:
            self._resume(there)

    def _resume(self, there: Facts) -> None:
        """Takes over what an interrupted writer left, as far as it can be used."""
        try:
            refuse_other_build(self.folder, there, self.facts)
        except IndexRefused as error:
            if find_facts(self.database, self.folder / INDEX) is None:
                raise IndexRefused(
                    f"an interrupted build is in the way: {error}, or delete the folder"
                ) from None
            self.drop()
            return
        shards = {**self.facts.shards, **there.shards}
        self.facts = replace(self.facts, dim=there.dim or self.facts.dim, shards=shards)
        lost = [(flaw.id,) for flaw in flaws(self.database, self.folder, self.facts, "pending")]
        with reporting_failures(self.folder), transaction(self.database):
            self.database.executemany("DELETE FROM pending WHERE id = ?", lost)
            self.database.execute("UPDATE pending SET place = NULL")

    def take_extracted(self, files: Sequence[tuple[int, File]]) -> list[tuple[int, File]]:
        """Takes the entries that an interrupted writer extracted, and returns the other files.

        Args:
            files: Files and their places in the listing.
        """
        query = "SELECT path, size, mtime_ns, ctime_ns, inode FROM pending"
        there = {name: tuple(stamp) for name, *stamp in self.database.execute(query)}
        if not there:
            return list(files)
        taken = {
            place: name
            for place, file in files
            if there.get(name := os.fsencode(file.path)) == file.stamp
        }
        with reporting_failures(self.folder), transaction(self.database):
            self._place(taken.items())
        return [(place, file) for place, file in files if place not in taken]

    def paths(self) -> Iterator[bytes]:
        """Yields the paths of the entries of the index, by id."""
        return (name for (name,) in self.database.execute("SELECT path FROM images ORDER BY id"))

    def find(self, name: bytes) -> Entry | None:
        """Returns the entry of a path in the index, unless it cannot be used.

        Args:
            name: The path, relative to the root.
        """
        return self._entry(f"SELECT {COLUMNS} FROM usable WHERE path = ?", name)

    def contents(self) -> tuple[set[bytes], set[bytes]]:
        """Returns the contents that have a vector.

        Returns:
            Those that count, and those that only entries of format 1 have, which decoded some
            images differently.
        """
        found = self.database.execute("SELECT content, ctime_ns FROM known").fetchall()
        known = {content for content, ctime_ns in found if ctime_ns != UNKNOWN}
        return known, {content for content, _ in found} - known

    def add(
        self, batch: Sequence[tuple[Placed, np.ndarray]], copies: Sequence[Placed]
    ) -> list[Placed]:
        """Adds images with their vectors, and copies of images whose vector is known.

        The vectors are on the disk before the transaction that names them.

        Args:
            batch: Images and their vectors `(dim,)` in the dtype of the index.
            copies: Images whose content may have a vector by then.

        Returns:
            The copies whose content has none.

        Raises:
            IndexRefused: The folder cannot be written; the journal is as before.
        """
        facts, at = self.facts, list[tuple[int, int]]()
        with reporting_failures(self.folder), transaction(self.database):
            if batch:
                vectors = np.stack([vector for _, vector in batch])
                facts = replace(facts, dim=vectors.shape[1])
                facts, at = append_vectors(self.folder, facts, vectors)
            self._put(
                (placed, placed.entry((placed.image.width, placed.image.height), crc32, where))
                for (placed, vector), where in zip(batch, at, strict=True)
                for crc32 in [zlib.crc32(vector.data)]
            )
            found = [(each, self._of_content(each.image.content)) for each in copies]
            entries = [
                (each, each.entry(of[6:8], of.vector_crc32, of[9:]))
                for each, of in found
                if of is not None
            ]
            self._put(entries)
            write_facts(self.database, facts, "journal")
        self.facts = facts
        before = ((entry, self.find(entry.path)) for _, entry in entries)
        self.reused += sum(old is None or old.content != entry.content for entry, old in before)
        return [each for each, of in found if of is None]

    def count(self) -> tuple[int, int, int]:
        """Returns the numbers of entries that are new, have another content, and the same one."""
        query = """
            SELECT COUNT(*) FILTER (WHERE usable.id IS NULL),
                COUNT(*) FILTER (WHERE usable.content != pending.content),
                COUNT(*) FILTER (WHERE usable.content = pending.content)
            FROM pending LEFT JOIN usable USING (path) WHERE place IS NOT NULL"""
        return self.database.execute(query).fetchone()

    def find_lost(self) -> list[bytes]:
        """Returns the paths of entries that cannot be used and are not replaced."""
        query = """SELECT path FROM images WHERE id IN (SELECT id FROM lost)
            AND path NOT IN (SELECT path FROM pending WHERE place IS NOT NULL)"""
        return [name for (name,) in self.database.execute(query) if isinstance(name, bytes)]

    def publish(self, dropped: Iterable[bytes], others: Iterable[File]) -> None:
        """Makes the entries of the journal part of the index, in the order of the listing.

        Args:
            dropped: Paths of the entries that leave the index.
            others: Files that were opened and are no images.

        Raises:
            IndexRefused: The folder cannot be written; the index is as before.
        """
        with reporting_failures(self.folder), transaction(self.database):
            self.database.execute("DELETE FROM images WHERE id IN (SELECT id FROM lost)")
            self.database.execute(
                f"INSERT INTO images ({COLUMNS}, entry_crc32) SELECT {COLUMNS}, entry_crc32"
                f" FROM pending WHERE place IS NOT NULL ORDER BY place {REPLACING}"
            )
            change(self.database, self.folder, self.facts, dropped=dropped, others=others)
            self._clear()

    def drop(self) -> None:
        """Forgets the entries of the journal."""
        if self.database.execute("SELECT 1 FROM journal").fetchone():
            with reporting_failures(self.folder), transaction(self.database):
                self._clear()

    def _clear(self) -> None:
        self.database.execute("DELETE FROM pending")
        self.database.execute("DELETE FROM journal")

    def _put(self, entries: Iterable[tuple[Placed, Entry]]) -> None:
        placed = list(entries)
        put_entries(self.database, (entry for _, entry in placed), "pending")
        self._place((each.place, entry.path) for each, entry in placed)

    def _place(self, names: Iterable[tuple[int, bytes]]) -> None:
        self.database.executemany("UPDATE pending SET place = ? WHERE path = ?", names)

    def _of_content(self, content: bytes) -> Entry | None:
        return self._entry(f"SELECT {COLUMNS} FROM known WHERE content = ? LIMIT 1", content)

    def _entry(self, query: str, value: bytes) -> Entry | None:
        found = self.database.execute(query, (value,)).fetchone()
        return None if found is None else Entry(*found)
