"""Joins the parts of a folder that `build` indexed with `shard` into one index.

The result has the entries, the order and the vectors of an index that was built in one run. It is
written in a hidden folder beside its place and moved there when it is complete.
"""

import contextlib
import errno
import json
import os
import shutil
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ggem_jax.retrieval.index.describing import NETWORK, SOURCES
from ggem_jax.retrieval.index.index import Index
from ggem_jax.retrieval.index.locking import lock_folder
from ggem_jax.retrieval.index.migration import bring_up_to_date
from ggem_jax.retrieval.index.publishing import ROWS_COPIED
from ggem_jax.retrieval.index.reading import connect, reading
from ggem_jax.retrieval.index.shards import append_vectors, is_shard, sync
from ggem_jax.retrieval.index.store import (
    COLUMNS,
    INDEX,
    LOCK,
    Damaged,
    Entry,
    Facts,
    IndexRefused,
    put_entries,
    read_facts,
    write_facts,
)
from ggem_jax.retrieval.parts import Part

_LIBRARIES = ("ggem_jax", "jax", "numpy", "pillow")  # other versions may give other vectors


@dataclass(frozen=True)
class Merged:
    """What `merge` wrote."""

    path: str  # folder of the index
    parts: int
    images: int
    vectors: int  # images with the same content share one

    def record(self) -> dict[str, Any]:
        """Returns JSON values."""
        return asdict(self)


class _Opened(NamedTuple):
    """A part: its facts, entries in the order of its ids, and vectors in that order."""

    folder: Path
    facts: Facts
    entries: list[Entry]
    opened: Index
    others: list[tuple]  # files that were opened and are no images


class _Place(NamedTuple):
    """An entry and where it is now."""

    entry: Entry
    part: int  # number in the list of parts, from 0
    id: int  # id in the part


def merge(path: Path | str, parts: Sequence[Path | str]) -> Merged:
    """Joins all parts of a folder into one index, and leaves the parts as they are.

    If it is interrupted there is no index at `path`; the same call starts again.

    Args:
        path: Folder of the new index. Nothing may exist there.
        parts: Folders of the N indexes that were built with the shards 1/N to N/N, in any order.

    Returns:
        The numbers of parts, images and vectors.

    Raises:
        IndexRefused: There is something at `path`, a part is missing, damaged or given twice, parts
            were made with other settings, exclusions, roots or versions, or the index cannot be
            written.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise IndexRefused(f"{path} exists already: choose another path, nothing is overwritten")
    opened = [_open(Path(part)) for part in parts]
    _refuse_other_parts(opened)
    places = sorted(
        (
            _Place(entry, number, row)
            for number, part in enumerate(opened)
            for row, entry in enumerate(part.entries)
        ),
        key=lambda place: os.fsdecode(place.entry.path).split("/"),  # the order of `walk`
    )
    if not places:
        raise IndexRefused(f"the parts hold no images: there is nothing to write to {path}")
    with _making(path) as folder:
        facts, shared = _write_vectors(folder, opened, places)
        _write_entries(
            folder, facts, places, shared, [row for each in opened for row in each.others]
        )
        for name in (SOURCES, NETWORK):
            if (opened[0].folder / name).is_file():
                shutil.copyfile(opened[0].folder / name, folder / name)
                sync(folder / name)
        sync(folder)
        if os.path.lexists(path):  # a rename would replace an empty folder
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(folder, path)
        sync(path.absolute().parent)
    return Merged(str(path), len(opened), len(places), len(shared))


def _open(folder: Path) -> _Opened:
    """A part as it is now, with every entry compared with its checksum."""
    with reading(folder) as database:
        facts = read_facts(database, folder / INDEX)
        rows = database.execute(f"SELECT entry_crc32, {COLUMNS} FROM images ORDER BY id").fetchall()
        others = database.execute("SELECT * FROM others").fetchall()
    entries = [Entry(*values) for _, *values in rows]
    for entry, (crc32, *_) in zip(entries, rows, strict=True):
        if entry.crc32() != crc32:
            raise _damaged(folder)
    index = Index.open(folder)
    if index.paths != [os.fsdecode(entry.path) for entry in entries]:
        raise IndexRefused(f"{folder} is being written: wait until it has finished")
    return _Opened(folder, facts, entries, index, others)


def _damaged(folder: Path) -> Damaged:
    return Damaged(
        f"{folder} is damaged: look at it with verify, and add to it with repair, before it is"
        " merged"
    )


def _refuse_other_parts(opened: Sequence[_Opened]) -> None:
    """Refuses parts that do not make one index together."""
    if not opened:
        raise IndexRefused("name the parts to merge: at least one")
    numbers = dict[int, Path]()
    first, count = opened[0], 0
    for each in opened:
        part = Part.parse(each.facts.part)
        if part is None:
            raise IndexRefused(
                f"{each.folder} is an index of a whole folder: merge joins parts, which index"
                " --shard I/N writes"
            )
        count = count or part.total
        if part.total != count:
            raise IndexRefused(
                f"{each.folder} is part {part} where {first.folder} is part {first.facts.part}:"
                " index all parts with the same N"
            )
        if part.number in numbers:
            raise IndexRefused(
                f"{numbers[part.number]} and {each.folder} are both part {part}: name each part"
                " once"
            )
        numbers[part.number] = each.folder
        here, there = _identity(each.facts), _identity(first.facts)
        if other := [name for name in {**there, **here} if here.get(name) != there.get(name)]:
            told = "; ".join(f"{name} is {there.get(name)}, {here.get(name)}" for name in other)
            raise IndexRefused(
                f"{first.folder} and {each.folder} do not belong together ({told}): index all parts"
                " with the same settings, exclusions, root and versions"
            )
    dims = {each.facts.dim for each in opened if each.facts.dim}
    if len(dims) > 1:
        raise IndexRefused(
            f"the parts have vectors of {' and '.join(map(str, sorted(dims)))} numbers: index all"
            " with the same extractor"
        )
    if missing := [f"{number}/{count}" for number in range(1, count + 1) if number not in numbers]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise IndexRefused(
            f"part {', '.join(missing[:5])}{more} is missing: name all {count} parts, also those"
            " that hold no images"
        )


def _identity(facts: Facts) -> dict[str, str]:
    """All that must be equal in the parts of one index, as JSON by name."""
    values: dict[str, Any] = {f"settings.{name}": value for name, value in facts.settings.items()}
    values |= {f"versions.{name}": facts.versions.get(name) for name in _LIBRARIES}
    values |= {
        name: value
        for name, value in asdict(facts).items()
        if name not in ("settings", "versions", "part", "dim", "count", "shards", "revision")
    }
    return {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}


@contextlib.contextmanager
def _making(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path`, which is removed unless the block moves it to `path`.

    Its lock tells a merge that is running from one that was killed, whose files are removed.
    """
    folder = path.absolute().with_name(f".{path.name}.merging")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        with lock_folder(folder):
            names = set(os.listdir(folder)) - {LOCK}
            if any(
                not (is_shard(name) or name.startswith((INDEX, SOURCES, NETWORK))) for name in names
            ):
                raise IndexRefused(f"{folder} is in the way and holds other files: move it away")
            for name in names:
                (folder / name).unlink()
            try:
                yield folder
            finally:
                if folder.is_dir():
                    shutil.rmtree(folder, ignore_errors=True)
    except (OSError, sqlite3.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise IndexRefused(
            f"{path} could not be written: {reason}; there is no index yet, and the same call"
            " starts again"
        ) from error


def _write_vectors(
    folder: Path, opened: Sequence[_Opened], places: Sequence[_Place]
) -> tuple[Facts, dict[bytes, Entry]]:
    """Writes one vector for each content, in the order of the entries.

    Returns the facts of the new index, and for each content the entry that has its vector's place.
    """
    chosen = dict[bytes, _Place]()
    for place in places:
        chosen.setdefault(place.entry.content, place)  # as in one run, the first one counts
    rows = list(chosen.values())
    given = next(each.facts for each in opened if each.facts.dim)
    facts = replace(given, part=None, count=len(places), shards={})
    shared = dict[bytes, Entry]()
    for start in range(0, len(rows), ROWS_COPIED):
        block = rows[start : start + ROWS_COPIED]
        facts, at = append_vectors(folder, facts, _gather(opened, block))
        for place, (shard, row) in zip(block, at, strict=True):
            shared[place.entry.content] = place.entry._replace(shard=shard, row=row)
    return facts, shared


def _gather(opened: Sequence[_Opened], places: Sequence[_Place]) -> np.ndarray:
    """The vectors of entries, each compared with its checksum."""
    part = np.array([place.part for place in places])
    rows = np.array([place.id for place in places])
    block = np.empty((len(places), opened[part[0]].opened.dim), opened[part[0]].facts.stored())
    for number in np.unique(part):
        here = part == number
        block[here] = opened[number].opened.vectors().take(rows[here])
    for place, vector in zip(places, block, strict=True):
        if zlib.crc32(vector.data) != place.entry.vector_crc32:
            raise _damaged(opened[place.part].folder)
    return block


def _write_entries(
    folder: Path,
    facts: Facts,
    places: Sequence[_Place],
    shared: dict[bytes, Entry],
    others: Sequence[tuple],
) -> None:
    with contextlib.closing(connect(folder / INDEX, "mode=rwc")) as database:
        database.execute("BEGIN")
        bring_up_to_date(database, folder)
        put_entries(database, (_at_place_of(place.entry, shared) for place in places))
        database.executemany("INSERT OR REPLACE INTO others VALUES (?, ?, ?, ?, ?)", others)
        write_facts(database, facts)
        database.execute("COMMIT")
    sync(folder / INDEX)


def _at_place_of(entry: Entry, shared: dict[bytes, Entry]) -> Entry:
    of = shared[entry.content]
    return entry._replace(vector_crc32=of.vector_crc32, shard=of.shard, row=of.row)
