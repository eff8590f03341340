"""Looks for damage in an index: SQLite's structure, entries, vectors, and images that changed."""

import os
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from ggem_jax.retrieval.index.damage import describe_damage, flaws, some
from ggem_jax.retrieval.index.folder import hash_file
from ggem_jax.retrieval.index.reading import NEXT, PENDING, facts_of, reading
from ggem_jax.retrieval.index.shards import is_shard, shard_file
from ggem_jax.retrieval.index.store import FORMAT, INDEX, Damaged, Facts, check_format, read_facts


class Verdict(NamedTuple):
    """The findings of `verify`, in sentences."""

    damage: list[str]  # needs repair
    notes: list[str]  # harmless

    def record(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {"sound": not self.damage, **self._asdict()}


def verify(path: Path | str, *, deep: bool = False) -> Verdict:
    """Returns the damage of an index: SQLite's structure, entries and vectors are checked.

    Other processes may read and write the index meanwhile.

    Args:
        path: Folder of an index, as `build` or `build_index` writes it.
        deep: Whether every image is read too and its content compared; changes are notes.

    Raises:
        IndexRefused: There is no index, or it is of a newer version.
    """
    folder = Path(path)
    try:
        while True:
            before = facts_of(folder)
            damage, facts, found = _damage(folder)
            # if the facts differ, a writer may have removed the files that seem damaged
            if not damage or facts_of(folder) == before:
                break
    except Damaged as error:
        return Verdict([str(error)], [])
    return Verdict(
        damage, _notes(folder, facts, found if deep else None) if facts is not None else []
    )


def _damage(folder: Path) -> tuple[list[str], Facts | None, list[tuple[str, bytes]]]:
    """The damage, and the facts, paths and contents; no facts where SQLite's file is damaged."""
    damage = list[str]()
    try:
        with reading(folder, copy=True) as database:
            facts = read_facts(database, folder / INDEX)
            problems = [
                line for (line,) in database.execute("PRAGMA integrity_check(1)") if line != "ok"
            ]
            if problems:
                raise ValueError(" ".join(problems[0].split()))
            flawed = sorted(flaws(database, folder, facts), key=lambda flaw: flaw[2:])
            for (file, what), group in groupby(flawed, key=lambda flaw: flaw[2:]):
                damage.append(describe_damage(folder, file, what, [flaw.path for flaw in group]))
            found = [
                (os.fsdecode(name), content)
                for name, content in database.execute(
                    "SELECT path, content FROM images ORDER BY id"
                )
            ]
            if len(found) != facts.count:
                raise ValueError(f"it has {len(found)} entries where {facts.count} are expected")
    except Damaged as error:
        return [*damage, str(error)], None, []
    return damage, facts, found


def _notes(folder: Path, facts: Facts, found: list[tuple[str, bytes]] | None) -> list[str]:
    notes, used = [], {shard_file(folder, shard).name for shard in facts.shards}
    if extracted := _count_pending(folder):
        notes.append(
            f"{folder} holds {extracted} images of a writer that is at work or was interrupted:"
            " they are not part of the index yet, and the next writer takes them over"
        )
    elif ours := sorted(
        name
        for name in os.listdir(folder)
        if name.startswith((f"{INDEX}-", PENDING, NEXT)) or (is_shard(name) and name not in used)
    ):
        notes.append(
            f"{folder} holds {len(ours)} files of a writer that is at work or was interrupted"
            f" ({ours[0]}): the next one uses or removes them"
        )
    return notes + (_changed_images(Path(facts.root), found) if found is not None else [])


def _count_pending(folder: Path) -> int:
    with reading(folder) as database:
        if check_format(database, folder / INDEX) < FORMAT:
            return 0
        return database.execute("SELECT COUNT(*) FROM pending").fetchone()[0]


def _changed_images(root: Path, found: list[tuple[str, bytes]]) -> list[str]:
    gone, other = [], []
    for name, content in found:
        try:
            if hash_file(root / name) != content:
                other.append(name)
        except OSError:
            gone.append(name)
    notes = (
        [
            f"{some(other)} under {root} changed after they were indexed: add with deep brings the"
            " index up to date, also where size and times are as before"
        ]
        if other
        else []
    )
    return notes + (
        [f"{some(gone)} cannot be read under {root}: add with prune drops images that are gone"]
        if gone
        else []
    )
