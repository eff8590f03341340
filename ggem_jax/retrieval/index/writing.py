"""Writes an index: vectors gather in new shards and in `pending.sqlite`, batch by batch.

`ggem_jax.retrieval.index.publishing` then makes all of them visible at once.
"""

import contextlib
import os
import secrets
import sqlite3
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ggem_jax.files.images import EXTENSIONS, MAX_MEGAPIXELS, RGB, Fit, UnreadableImage
from ggem_jax.retrieval.index.folder import (
    DecodedImage,
    File,
    Listing,
    Reading,
    Skipped,
    decode,
    shown,
    walk,
)
from ggem_jax.retrieval.index.locking import drop_pending, reporting_failures
from ggem_jax.retrieval.index.publishing import publish
from ggem_jax.retrieval.index.store import (
    COLUMNS,
    INDEX,
    PENDING,
    PUT,
    UNKNOWN,
    Damaged,
    Entry,
    Facts,
    IndexRefused,
    connect,
    flaws,
    map_or_refuse,
    mend,
    read_facts,
    refuse_other_build,
    shard_file,
    some,
    sync,
    writable,
    write_facts,
    write_shard,
)
from ggem_jax.retrieval.parts import Part

# images -> a vector `(dim,)` of each in the same order, or why it has none
Extract = Callable[[Iterator[RGB]], Iterable[np.ndarray | UnreadableImage]]
OnProgress = Callable[[int, int], None]  # images done, images in all

# images and seconds after which vectors are written: a killed writer loses no more than that
COMMIT_ROWS, COMMIT_SECONDS = 1024, 30.0


@dataclass(frozen=True)
class Report:
    """The numbers of images that a writer handled, and notes for the user.

    `files` is the sum of `added`, `updated`, `unchanged`, `special`, the skipped files, and the
    numbers in `not_images` and `excluded`. Reports are equal if what was done is; the fields below
    `notes`, which describe the folder, are not compared.
    """

    added: int = 0  # new entries
    updated: int = 0  # entries whose image has another content now
    unchanged: int = 0  # entries that stay as they were
    removed: int = 0  # entries that were dropped
    reused: int = 0  # added and updated ones that were moved or copied: their vector was known
    skipped: list[Skipped] = field(default_factory=list)  # files that could not be used
    notes: tuple[str, ...] = ()  # what the user should know about the settings and the files
    files: int = field(default=0, compare=False)  # all files of the folder
    not_images: dict[str, int] = field(default_factory=dict, compare=False)  # ending -> files
    excluded: dict[str, int] = field(default_factory=dict, compare=False)  # pattern -> files
    # links to nowhere, or to a folder that is listed elsewhere; pipes, sockets and devices
    special: int = field(default=0, compare=False)
    # paths of entries whose files are not there now; prune drops them
    unreachable: list[str] = field(default_factory=list, compare=False)

    def record(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {
            **{name: getattr(self, name) for name in COUNTS},
            "skipped": [skipped._asdict() for skipped in self.skipped],
            "notes": list(self.notes),
            "files": self.files,
            "not_images": dict(self.not_images),
            "excluded": dict(self.excluded),
            "special": self.special,
            "unreachable": list(self.unreachable),
        }


COUNTS = ("added", "updated", "unchanged", "reused", "removed")


@dataclass(frozen=True)
class Task:
    """What a writer does besides adding what is new."""

    start: str = ""  # folder below the root, relative to it; empty for the root itself
    prune: bool = False  # whether entries whose files are gone are dropped
    repair: bool = False  # whether damaged entries are replaced; if not, a missing shard raises
    deep: bool = False  # whether files whose size, times and inode are as before are read too
    max_megapixels: float = MAX_MEGAPIXELS  # larger images are skipped
    workers: int | None = None  # threads that read images; None: one for each core, at most 4

    def reading(self, extract: Extract, outdated: set[bytes]) -> Reading:
        """Returns how files become pixels.

        Args:
            extract: The extractor; its attributes `fit` and `draft`, if it has them, are those of
                `Reading`.
            outdated: Contents as in `Reading`.
        """
        fit: Fit | None = getattr(extract, "fit", None)
        return Reading(fit, getattr(extract, "draft", False), self.max_megapixels, outdated)


def update(
    folder: Path,
    wanted: Facts,
    extract: Extract,
    task: Task,
    on_progress: OnProgress | None = None,
) -> Report:
    """Brings the index in line with the images under the root; requires the lock.

    Entries of files that are excluded are dropped. Entries of files that are not there are kept
    and reported, unless `task.prune`.

    Args:
        folder: Folder of the index.
        wanted: Settings, dtype, root and exclusions. If there is an index, only the last two are
            used.
        extract: Function from images to vectors, as in `ggem_jax.retrieval.index.index`.
        task: What else to do.
        on_progress: Function that is called with the numbers of images done and of all images.

    Returns:
        Numbers of images and of all files, and the files that were skipped.

    Raises:
        IndexRefused: There is no usable image, the extractor's vectors do not fit, an interrupted
            build has other settings, or the folder cannot be written.
        Damaged: A file of the index is damaged or missing.
    """
    new = not (folder / INDEX).exists()
    if task.start and (pattern := wanted.exclusions.find_above(task.start)) is not None:
        raise IndexRefused(
            f"{Path(wanted.root) / task.start} is excluded by {pattern}: include that pattern first"
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(_reporting_damage(folder))
        committed, lost = None, set[int]()
        if not new:
            committed = stack.enter_context(
                contextlib.closing(connect(folder / INDEX, "mode=ro&immutable=1"))
            )
            there = read_facts(committed, folder / INDEX)
            wanted = replace(there, root=wanted.root, exclusions=wanted.exclusions)
        listing = _list_images(folder, wanted, task, committed)
        if committed is not None and task.repair:
            lost = _lost(committed, folder, wanted)
        elif committed is not None:
            _refuse_lost_shards(folder, wanted)
        with reporting_failures(folder):
            _refuse_other_pending(folder, wanted, new=new)
            pending = stack.enter_context(contextlib.closing(writable(folder / PENDING)))
            if not pending.execute("SELECT 1 FROM facts").fetchone():
                # before the first shard: these facts tell whether a build or an index owns it
                write_facts(pending, wanted)
        work = _Work(folder, wanted, committed, pending, lost)
        report = work.run(listing, extract, task, on_progress)
        if new and not work.chosen and wanted.part is None:
            raise IndexRefused(
                f"none of the {len(listing.files)} images in {wanted.root} could be indexed:"
                f" {report.skipped[0].why}"
            )
        gone, left_out = work.find_gone(listing, task.start)
        dropped = left_out + gone if task.prune else left_out
        report = replace(
            report,
            removed=len(dropped),
            skipped=report.skipped + work.find_dropped(dropped),
            notes=report.notes + _notes_on(left_out),
            unreachable=[] if task.prune else list(map(os.fsdecode, gone)),
        )
        changes = new or bool(work.chosen or dropped or lost or listing.opened)
        changes = changes or (there.root, there.exclusions) != (wanted.root, wanted.exclusions)
    with reporting_failures(folder):
        if changes:
            chosen = [path for _, path in sorted(work.chosen)]
            publish(folder, work.facts, chosen, dropped, lost, listing.opened)
        drop_pending(folder)
    return report


def _list_images(
    folder: Path, wanted: Facts, task: Task, committed: sqlite3.Connection | None
) -> Listing:
    """The images under the root; files that the index knows are not opened."""

    def known(file: File) -> bool | None:
        if committed is None or task.deep:
            return None
        for table, is_one in (("images", True), ("others", False)):
            query = f"SELECT size, mtime_ns, ctime_ns, inode FROM {table} WHERE path = ?"
            if committed.execute(query, (os.fsencode(file.path),)).fetchone() == file.stamp:
                return is_one
        return None

    root = Path(wanted.root)
    options: dict[str, Any] = {"apart": folder, "exclusions": wanted.exclusions, "known": known}
    part = Part.parse(wanted.part)
    listing = walk(root, task.start, part=part, **options)
    # a part may be empty where the folder is not
    if not listing.files and not (part and walk(root, task.start, **options).files):
        first = f" ({listing.skipped[0].why})" if listing.skipped else ""
        raise IndexRefused(
            f"there is no image ({' '.join(EXTENSIONS)} and others) in {root / task.start}{first}:"
            " is it the right folder, and is its disk there?"
        )
    return listing


def _notes_on(left_out: list[bytes]) -> tuple[str, ...]:
    if not left_out:
        return ()
    return (
        f"entries that are excluded now were dropped: {some(list(map(os.fsdecode, left_out)))}",
    )


@contextlib.contextmanager
def _reporting_damage(folder: Path) -> Iterator[None]:
    """Turns errors of SQLite into one sentence; errors of the extractor pass."""
    try:
        yield
    except sqlite3.Error as error:
        raise Damaged(
            f"{folder / INDEX} is damaged ({error}): put a copy in its place, or build the index"
            " again in another folder"
        ) from error


def _lost(committed: sqlite3.Connection, folder: Path, facts: Facts) -> set[int]:
    """The ids of entries that cannot be used. Raises if SQLite's own structure is broken."""
    problem = committed.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if problem != "ok":
        raise Damaged(
            f"{folder / INDEX} is damaged ({problem}) beyond repair: put a copy in its place, or"
            " build the index again in another folder"
        )
    return {flaw.id for flaw in flaws(committed, folder, facts)}


def _refuse_lost_shards(folder: Path, facts: Facts) -> None:
    for shard in facts.shards:
        try:
            map_or_refuse(folder, shard, facts)
        except FileNotFoundError:
            raise Damaged(mend(folder, shard_file(folder, shard).name, "is missing")) from None


def _refuse_other_pending(folder: Path, wanted: Facts, *, new: bool) -> None:
    """Refuses an interrupted build with other settings; drops an interrupted `add` with others."""
    if (folder / PENDING).exists():
        with contextlib.closing(writable(folder / PENDING)) as database:
            facts = read_facts(database, folder / PENDING)
        try:
            refuse_other_build(folder, facts, wanted)
        except IndexRefused as error:
            if new:
                raise IndexRefused(
                    f"an interrupted build is in the way: {error}, or delete the folder"
                ) from None
            drop_pending(folder)


class _Place(NamedTuple):
    """An image and its place in the listing."""

    number: int
    image: DecodedImage


class _Work:
    """The state of one update.

    `chosen` are the entries that `pending` holds for the index, by place in the listing and path.
    """

    def __init__(
        self,
        folder: Path,
        facts: Facts,
        committed: sqlite3.Connection | None,
        pending: sqlite3.Connection,
        lost: set[int],
    ):
        self.folder, self.committed, self.pending, self.lost = folder, committed, pending, lost
        self.facts = facts
        if pending.execute("SELECT 1 FROM facts").fetchone():
            there = read_facts(pending, folder / PENDING)
            used = {shard for (shard,) in pending.execute("SELECT DISTINCT shard FROM images")}
            self.facts = replace(
                facts,
                dim=there.dim,
                shards={
                    **{shard: there.shards[shard] for shard in there.shards if shard in used},
                    **facts.shards,
                },
            )
        contents = [
            row
            for database in self._databases()
            for row in self._usable(database, "SELECT id, content, ctime_ns FROM images")
        ]
        self.known = {content for _, content, ctime_ns in contents if ctime_ns != UNKNOWN}
        # those that only entries of format 1 have, which decoded some images differently
        self.outdated = {content for _, content, _ in contents} - self.known
        self.chosen: list[tuple[int, bytes]] = []
        self.waiting: deque[_Place] = deque()  # images that the extractor has
        self.copies: list[_Place] = []  # copies of images that are known or being extracted
        self.batch: list[tuple[_Place, np.ndarray]] = []
        self.skipped: list[Skipped] = []
        self.of_frames: list[str] = []  # paths of images with several frames
        self.truncated: list[str] = []
        self.exhausted, self.reused, self.last_commit = False, 0, time.monotonic()

    def run(
        self, listing: Listing, extract: Extract, task: Task, on_progress: OnProgress | None
    ) -> Report:
        unchanged, unread = 0, []
        self.skipped += listing.skipped
        for number, file in enumerate(listing.files):
            name = os.fsencode(file.path)
            before, extracted = self._entry(self.committed, name), self._entry(self.pending, name)
            if before is not None and before.stamp == file.stamp and not task.deep:
                unchanged += 1
            elif extracted is not None and extracted.stamp == file.stamp:
                self.chosen.append((number, name))
            else:
                unread.append((number, file))
        self.settled, total = len(listing.files) - len(unread), len(listing.files)
        workers = task.workers or min(4, os.cpu_count() or 1)
        reading = task.reading(extract, self.outdated)
        stream = self._images(Path(self.facts.root), unread, workers, reading)
        try:
            _tell(on_progress, self.settled, total)
            for vector in extract(stream):
                self._take(vector)
                _tell(on_progress, self.settled, total)
            if self.waiting or not self.exhausted:
                raise IndexRefused(
                    "the extractor must give a vector for each image, and stopped"
                    f" {len(self.waiting)} short of what it took"
                )
        except BaseException:
            with contextlib.suppress(IndexRefused):
                self._flush()
            raise
        finally:
            stream.close()
        self._flush()
        self.skipped += [
            Skipped(
                copy.image.file.path,
                f"{shown(copy.image.file.path)} has the content of an image that was skipped",
            )
            for copy in self.copies
        ]
        _tell(on_progress, total, total)
        return replace(
            self._report(unchanged),
            notes=self._notes(),
            files=listing.count(),
            not_images=dict(listing.others),
            excluded=dict(listing.excluded),
            special=listing.special,
        )

    def find_gone(self, listing: Listing, start: str) -> tuple[list[bytes], list[bytes]]:
        """The entries whose files are gone, and those that are excluded.

        Files under folders that could not be read are not gone.
        """
        there = {os.fsencode(file.path) for file in listing.files}
        kept = {os.fsencode(path) for path, _ in listing.skipped}
        prefix = os.fsencode(f"{start}/") if start else b""
        names = (
            [name for (name,) in self.committed.execute("SELECT path FROM images ORDER BY id")]
            if self.committed
            else []
        )
        names = [name for name in names if name not in there]
        left_out = [
            name
            for name in names
            if self.facts.exclusions.find_above(os.fsdecode(name)) is not None
        ]
        gone = [
            name for name in names if name.startswith(prefix) and not kept & {b"", *_upwards(name)}
        ]
        return sorted(set(gone) - set(left_out)), left_out

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self.of_frames:
            taken = some(self.of_frames)
            notes.append(f"the first frame was taken of files with several: {taken}")
        if self.truncated:
            read = some(self.truncated)
            notes.append(f"files that lack their last bytes were read as far as they go: {read}")
        return tuple(notes)

    def find_dropped(self, gone: list[bytes]) -> list[Skipped]:
        """The damaged entries that could not be described again."""
        replaced = {name for _, name in self.chosen} | set(gone)
        names = (
            [
                self.committed.execute(
                    "SELECT path FROM images WHERE id = ?", (number,)
                ).fetchone()[0]
                for number in self.lost
            ]
            if self.committed
            else []
        )
        paths = [
            os.fsdecode(name) for name in names if isinstance(name, bytes) and name not in replaced
        ]
        return [
            Skipped(
                path,
                f"the entry of {shown(path)} was damaged, its image could not be read, and it was"
                " dropped",
            )
            for path in sorted(paths)
        ]

    def _images(
        self, root: Path, unread: list[tuple[int, File]], workers: int, reading: Reading
    ) -> Generator[RGB, None, None]:
        """The images that the extractor reads. No other thread uses the connections to SQLite."""
        numbers, files = iter(unread), (file for _, file in unread)
        for found in decode(root, files, self.known, workers=workers, reading=reading):
            number = next(numbers)[0]
            if isinstance(found, Skipped):
                self._skip(found)
            elif found.pixels is None or found.content in self.known:
                self.copies.append(_Place(number, found._replace(pixels=None)))
                self.settled += 1
            else:
                self.known.add(found.content)
                self.waiting.append(_Place(number, found._replace(pixels=None)))
                self.of_frames += [found.file.path] * found.frames
                self.truncated += [found.file.path] * found.truncated
                yield found.pixels
        self.exhausted = True

    def _skip(self, skipped: Skipped) -> None:
        self.skipped.append(skipped)
        self.settled += 1

    def _take(self, vector: np.ndarray | UnreadableImage) -> None:
        if not self.waiting:
            raise IndexRefused(
                "the extractor must give a vector for each image, and gave more than it took images"
            )
        place = self.waiting.popleft()
        path = place.image.file.path
        if isinstance(vector, UnreadableImage):
            return self._skip(
                Skipped(path, f"{shown(path)} cannot be described: {' '.join(str(vector).split())}")
            )
        dim = self.facts.dim or (len(self.batch[0][1]) if self.batch else 0)
        vector = np.asarray(vector)
        if (
            vector.ndim != 1
            or not vector.size
            or (dim and vector.size != dim)
            or not np.issubdtype(vector.dtype, np.floating)
        ):
            expected = f"({dim},)" if dim else "(dim,)"
            raise IndexRefused(
                f"the extractor must give vectors {expected} of real numbers, and gave"
                f" {vector.dtype} of shape {vector.shape} for {shown(path)}"
            )
        with np.errstate(over="ignore"):
            stored = vector.astype(self.facts.stored())
        if not np.isfinite(stored).all():
            return self._skip(
                Skipped(
                    path, f"{shown(path)} has a descriptor that is not finite in {self.facts.dtype}"
                )
            )
        self.batch.append((place, stored))
        self.settled += 1
        if len(self.batch) >= COMMIT_ROWS or time.monotonic() - self.last_commit >= COMMIT_SECONDS:
            self._flush()
        return None

    def _flush(self) -> None:
        """Writes the batch as a shard, and its entries and those of known contents as pending."""
        facts, shard = self.facts, secrets.randbits(47)
        entries = []
        with reporting_failures(self.folder):
            try:
                if self.batch:
                    rows = np.stack([vector for _, vector in self.batch])
                    facts = replace(
                        facts, dim=rows.shape[1], shards={**facts.shards, shard: len(rows)}
                    )
                    write_shard(shard_file(self.folder, shard), [rows], len(rows), facts)
                    sync(self.folder)
                    entries = [
                        (
                            place,
                            Entry(
                                *_named(place), *_size(place), zlib.crc32(vector.data), shard, row
                            ),
                        )
                        for row, (place, vector) in enumerate(self.batch)
                    ]
                self.pending.execute("BEGIN IMMEDIATE")
                self._put(entries)
                copies, left = self._place_copies()
                self._put(copies)
                write_facts(self.pending, facts)
                self.pending.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self.pending.execute("ROLLBACK")
                shard_file(self.folder, shard).unlink(missing_ok=True)
                raise
        self.facts, self.batch, self.copies, self.last_commit = facts, [], left, time.monotonic()
        self.reused += sum(self._content(entry.path) != entry.content for _, entry in copies)
        self.chosen += [(place.number, entry.path) for place, entry in entries + copies]

    def _put(self, entries: list[tuple[_Place, Entry]]) -> None:
        self.pending.executemany(PUT, [(*entry, entry.crc32()) for _, entry in entries])

    def _place_copies(self) -> tuple[list[tuple[_Place, Entry]], list[_Place]]:
        """The entries for images whose content has a vector by now, and the rest."""
        copies, left = [], []
        for place in self.copies:
            entry = self._of_content(place.image.content)
            if entry is None:
                left.append(place)
            else:
                copies.append((place, Entry(*_named(place), *entry[6:])))
        return copies, left

    def _of_content(self, content: bytes) -> Entry | None:
        for database in self._databases():
            for values in self._usable(
                database, f"SELECT id, {COLUMNS} FROM images WHERE content = ?", content
            ):
                return Entry(*values[1:])
        return None

    def _entry(self, database: sqlite3.Connection | None, name: bytes) -> Entry | None:
        found = (
            list(self._usable(database, f"SELECT id, {COLUMNS} FROM images WHERE path = ?", name))
            if database is not None
            else []
        )
        return Entry(*found[0][1:]) if found else None

    def _content(self, name: bytes) -> bytes | None:
        entry = self._entry(self.committed, name)
        return None if entry is None else entry.content

    def _databases(self) -> list[sqlite3.Connection]:
        return [self.pending] if self.committed is None else [self.pending, self.committed]

    def _usable(self, database: sqlite3.Connection, query: str, *values: bytes) -> Iterator[tuple]:
        """Rows that begin with an id, without the entries that are lost."""
        return (
            row
            for row in database.execute(query, values)
            if database is self.pending or row[0] not in self.lost
        )

    def _report(self, unchanged: int) -> Report:
        added = updated = 0
        for _, name in self.chosen:
            there, extracted = self._content(name), self._entry(self.pending, name)
            added += there is None
            updated += there is not None and extracted is not None and there != extracted.content
        touched = len(self.chosen) - added - updated
        return Report(
            added=added,
            updated=updated,
            unchanged=unchanged + touched,
            reused=self.reused,
            skipped=self.skipped,
        )


def _tell(on_progress: OnProgress | None, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(done, total)


def _named(place: _Place) -> tuple[bytes, int, int, int, int, bytes]:
    file = place.image.file
    return os.fsencode(file.path), *file.stamp, place.image.content


def _size(place: _Place) -> tuple[int, int]:
    return place.image.width, place.image.height


def _upwards(name: bytes) -> Iterator[bytes]:
    """`a/b/c` -> `a/b/c`, `a/b`, `a`"""
    while name:
        yield name
        name = name.rpartition(b"/")[0]
