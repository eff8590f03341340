"""Brings an index in line with the images of a folder."""

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ggem_jax.files.images import EXTENSIONS
from ggem_jax.processors import count_processors
from ggem_jax.retrieval.index.damage import find_lost, map_or_refuse, some
from ggem_jax.retrieval.index.extraction import Extraction
from ggem_jax.retrieval.index.folder import File, Listing, walk
from ggem_jax.retrieval.index.journal import Journal
from ggem_jax.retrieval.index.report import Extract, OnProgress, Report, Task
from ggem_jax.retrieval.index.store import INDEX, Facts, IndexRefused, find_facts
from ggem_jax.retrieval.index.transactions import opening
from ggem_jax.retrieval.parts import Part


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
        wanted: Facts of the index, with the root and the exclusions that it shall have; or those of
            a build.
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
    if task.start and (pattern := wanted.exclusions.find_above(task.start)) is not None:
        raise IndexRefused(
            f"{Path(wanted.root) / task.start} is excluded by {pattern}: include that pattern first"
        )
    with opening(folder) as database:
        before = find_facts(database, folder / INDEX)
        listing = _list_images(database, folder, wanted, task)
        lost = find_lost(database, folder, wanted) if task.repair else set[int]()
        for shard in [] if task.repair else wanted.shards:
            map_or_refuse(folder, shard, wanted)
        journal = Journal(folder, database, wanted, lost)
        extraction = _extract_changed(journal, listing.files, extract, task, on_progress)
        report, dropped = _report(journal, listing, extraction, task)
        if before is None and wanted.part is None and not report.added:
            raise IndexRefused(
                f"none of the {len(listing.files)} images in {wanted.root} could be indexed:"
                f" {extraction.skipped[0].why}"
            )
        if (
            before is None
            or any((*journal.count(), dropped, lost, listing.opened))
            or (before.root, before.exclusions) != (wanted.root, wanted.exclusions)
        ):
            journal.publish(dropped, listing.opened)
        else:
            journal.drop()
    return report


def _report(
    journal: Journal, listing: Listing, extraction: Extraction, task: Task
) -> tuple[Report, list[bytes]]:
    """What publishing the journal will do, and the paths of the entries that leave the index."""
    added, updated, _ = journal.count()
    gone, left_out = _find_gone(journal, listing, task.start)
    dropped = left_out + gone if task.prune else left_out
    notes = extraction.notes()
    if left_out:
        names = some(list(map(os.fsdecode, left_out)))
        notes.append(f"entries that are excluded now were dropped: {names}")
    if vanished := sorted(map(os.fsdecode, set(journal.find_lost()).difference(dropped))):
        notes.append(
            "damaged entries whose images could not be read again were dropped: " + some(vanished)
        )
    report = Report(
        added=added,
        updated=updated,
        unchanged=len(listing.files) - added - updated - len(extraction.skipped),
        removed=len(dropped),
        reused=journal.reused,
        skipped=listing.skipped + extraction.skipped,
        notes=tuple(notes),
        files=listing.count(),
        not_images=dict(listing.others),
        excluded=dict(listing.excluded),
        special=listing.special,
        unreachable=[] if task.prune else list(map(os.fsdecode, gone)),
    )
    return report, dropped


def _list_images(database: sqlite3.Connection, folder: Path, wanted: Facts, task: Task) -> Listing:
    """The images under the root; files that the index knows are not opened."""

    def known(file: File) -> bool | None:
        if task.deep:
            return None
        for table, is_one in (("images", True), ("others", False)):
            query = f"SELECT size, mtime_ns, ctime_ns, inode FROM {table} WHERE path = ?"
            if database.execute(query, (os.fsencode(file.path),)).fetchone() == file.stamp:
                return is_one
        return None

    root = Path(wanted.root)
    options: dict[str, Any] = {"apart": folder, "exclusions": wanted.exclusions, "known": known}
    part = Part.parse(wanted.part)
    listing = walk(root, task.start, part=part, **options)
    # a part may be empty where the folder is not
    if not listing.files and not (part and walk(root, task.start, **options).files):
        first = f" ({listing.skipped[0].why})" if listing.skipped else ""
        if excluded := listing.excluded.total():
            first += f" (files that are excluded: {excluded})"
        raise IndexRefused(
            f"there is no image ({' '.join(EXTENSIONS)} and others) in {root / task.start}{first}:"
            " is it the right folder, and is its disk there?"
        )
    return listing


def _is_unchanged(journal: Journal, file: File) -> bool:
    """Whether the index has a usable entry of a file as it is."""
    entry = journal.find(os.fsencode(file.path))
    return entry is not None and entry.stamp == file.stamp


def _extract_changed(
    journal: Journal,
    files: list[File],
    extract: Extract,
    task: Task,
    on_progress: OnProgress | None,
) -> Extraction:
    """Extracts the files that changed, apart from those that an interrupted writer extracted."""
    changed = [
        (place, file)
        for place, file in enumerate(files)
        if task.deep or not _is_unchanged(journal, file)
    ]
    unread = journal.take_extracted(changed)
    known, outdated = journal.contents()

    def tell(done: int) -> None:
        if on_progress is not None:
            on_progress(len(files) - len(unread) + done, len(files))

    extraction, workers = Extraction(journal, known, tell), min(4, count_processors())
    tell(0)
    extraction.run(extract, unread, task.reading(extract, outdated), task.workers or workers)
    tell(len(unread))
    return extraction


def _find_gone(journal: Journal, listing: Listing, start: str) -> tuple[list[bytes], list[bytes]]:
    """The paths of entries whose files are gone, and of those that are excluded.

    Files under folders that could not be read are not gone.
    """
    there = {os.fsencode(file.path) for file in listing.files}
    unread = {os.fsencode(path) for path, _ in listing.skipped}
    prefix, find_above = (
        os.fsencode(f"{start}/") if start else b"",
        journal.facts.exclusions.find_above,
    )
    names = [name for name in journal.paths() if name not in there]
    left_out = [name for name in names if find_above(os.fsdecode(name)) is not None]
    gone = {
        name for name in names if name.startswith(prefix) and not unread & {b"", *_upwards(name)}
    }
    return sorted(gone.difference(left_out)), left_out


def _upwards(name: bytes) -> Iterator[bytes]:
    """`a/b/c` -> `a/b/c`, `a/b`, `a`"""
    while name:
        yield name
        name = name.rpartition(b"/")[0]
