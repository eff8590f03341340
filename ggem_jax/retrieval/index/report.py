"""What a writer is asked to do, and what it did."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ggem_jax.files.images import MAX_MEGAPIXELS, RGB, Fit, UnreadableImage
from ggem_jax.retrieval.index.folder import Reading, Skipped
from ggem_jax.retrieval.methods import check_count

# images -> a vector `(dim,)` of each in the same order, or why it has none
Extract = Callable[[Iterator[RGB]], Iterable[np.ndarray | UnreadableImage]]
OnProgress = Callable[[int, int], None]  # images done, images in all


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

    def __post_init__(self):
        if self.workers is not None:
            check_count("workers", self.workers)
        if not self.max_megapixels > 0:
            raise ValueError(f"max_megapixels must be above 0, not {self.max_megapixels!r}")

    def reading(self, extract: Extract, outdated: set[bytes]) -> Reading:
        """Returns how files become pixels.

        Args:
            extract: The extractor; its attributes `fit` and `draft`, if it has them, are those of
                `Reading`.
            outdated: Contents as in `Reading`.
        """
        fit: Fit | None = getattr(extract, "fit", None)
        return Reading(fit, getattr(extract, "draft", False), self.max_megapixels, outdated)
