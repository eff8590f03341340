"""Near duplicates in an index: groups of images whose vectors are alike, the best image first."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ggem_jax.retrieval.index.index import Index
from ggem_jax.retrieval.index.reading import reading
from ggem_jax.retrieval.index.store import INDEX, read_facts
from ggem_jax.retrieval.pairs import connected_groups, cosines_to, similar_pairs


class ImageFile(NamedTuple):
    """What an index knows of the file of an image."""

    path: str  # relative to the root
    bytes: int  # size of the file
    width: int  # pixels
    height: int  # pixels


@dataclass(frozen=True)
class Duplicate:
    """An image of a group of near duplicates."""

    id: int  # row of the index
    file: ImageFile
    score: float  # cosine with the first image of the group

    def record(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {"id": self.id, **self.file._asdict(), "score": self.score}


@dataclass(frozen=True)
class Duplicates:
    """The groups of near duplicates of an index.

    A group is connected by pairs, so that two of its images may be less alike than the threshold.
    The image with the most pixels comes first in a group; among those of one size, the largest
    file.
    """

    folder: Path  # folder of the index
    root: Path  # folder of its images
    size: int  # number of images in the index
    threshold: float  # least cosine of a pair
    groups: list[list[Duplicate]]  # at least two images each; the largest group first

    @property
    def surplus(self) -> list[Duplicate]:
        """All images of groups except the first of each."""
        return [each for group in self.groups for each in group[1:]]

    def record(self) -> dict[str, Any]:
        """Returns JSON values: the index, the threshold, and the images of each group."""
        return {
            "index": str(self.folder.absolute()),
            "root": str(self.root),
            "images": self.size,
            "threshold": self.threshold,
            "surplus": len(self.surplus),
            "surplus_bytes": sum(each.file.bytes for each in self.surplus),
            "groups": [[each.record() for each in group] for group in self.groups],
        }


def find_duplicates(path: Path | str, *, threshold: float = 0.95) -> Duplicates:
    """Returns the groups of near duplicates of an index.

    Every vector is compared with every other one, in bounded memory: n² d / 2 products. Neither
    images nor a network are read.

    Args:
        path: Folder of the index.
        threshold: Least cosine of a pair, above 0 and at most 1.

    Returns:
        The groups, each with the best image first.

    Raises:
        IndexRefused: There is no index, or it is damaged.
        ValueError: The threshold is out of range.
    """
    index, files = open_with_files(path)
    vectors = index.vectors()
    pairs = ((a, b) for a, b, _ in similar_pairs(vectors, threshold))
    groups = []
    for ids in connected_groups(len(index), pairs):
        best = min(ids.tolist(), key=lambda i: _quality(files[i]))
        scores = cosines_to(vectors, best, ids).tolist()
        group = [
            Duplicate(i, files[i], score) for i, score in zip(ids.tolist(), scores, strict=True)
        ]
        groups.append(sorted(group, key=lambda each: _quality(each.file)))
    groups.sort(key=lambda group: (-len(group), group[0].file.path))
    return Duplicates(index.folder, index.root, len(index), threshold, groups)


def open_with_files(path: Path | str) -> tuple[Index, list[ImageFile]]:
    """Returns an opened index, and what it knows of the file of each image.

    Args:
        path: Folder of the index.

    Raises:
        IndexRefused: There is no index, or it is damaged.
    """
    while True:  # a writer may replace the index between the two readings
        index = Index.open(path)
        files = read_files(index)
        if [file.path for file in files] == index.paths:
            return index, files


def read_files(index: Index) -> list[ImageFile]:
    """Returns what an index, as it is now, knows of the file of each image.

    Args:
        index: An opened index.

    Returns:
        The files in the order of the ids; of another version if the index has changed since.

    Raises:
        IndexRefused: The index is gone, or damaged.
    """
    with reading(index.folder) as database:
        read_facts(database, index.folder / INDEX)
        rows = database.execute("SELECT path, size, width, height FROM images ORDER BY id")
        files = [ImageFile(os.fsdecode(path), *numbers) for path, *numbers in rows]
        if not all(isinstance(number, int) for file in files for number in file[1:]):
            raise ValueError("its entries have been altered")
        return files


def _quality(file: ImageFile) -> tuple[int, int, str]:
    """Sorts the best image first."""
    return -file.width * file.height, -file.bytes, file.path
