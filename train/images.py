"""One split of labelled images with random access."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from ggem_jax.files.images import RGB, Choose, take_part
from train.cli import Refused

TRAIN_SPLITS = ("train",)
EVAL_SPLITS = ("val", "validation", "test")


Label = int | np.ndarray  # a class, or for each class whether the image shows it


class Stored(NamedTuple):
    """An image as its source stores it."""

    name: str  # relative to the source; empty where images have no names
    size: int  # bytes
    read: Callable[[], bytes]  # () -> its contents; raises OSError


class Load(Protocol):
    """How an image is read."""

    def __call__(self, i: int, choose: Choose | None = None) -> tuple[RGB, Label]:
        """Returns an image, or the part of it that is chosen, and its label.

        Args:
            i: Number of the image.
            choose: Function from height and width in pixels to the part; None takes the whole.

        Raises:
            UnreadableImage: It cannot be decoded.
        """


@dataclass(frozen=True)
class Images:
    """One split of labelled images."""

    size: int  # number of images
    classes: tuple[str, ...]  # names of the classes, by label
    load: Load
    # () -> labels of all images, without decoding them: (n,) int32, or (n, classes) bool where an
    # image may have several
    labels: Callable[[], np.ndarray]
    # i -> image i as it is stored; None: the images are in memory
    files: Callable[[int], Stored] | None = None

    def __len__(self) -> int:
        return self.size

    @property
    def several(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.labels().ndim == 2

    def stored(self, i: int) -> Stored:
        """Returns an image as it is stored: its file, or its pixels where it is in memory.

        Args:
            i: Number of the image.
        """
        if self.files is not None:
            return self.files(i)
        pixels = self.load(i)[0]
        return Stored("", pixels.nbytes, pixels.tobytes)

    def take(self, indices: np.ndarray) -> "Images":
        """Returns some of the images.

        Args:
            indices: Numbers of the images, `(m,)`; the result has their order.
        """
        return Images(
            len(indices),
            self.classes,
            lambda i, choose=None: self.load(int(indices[i]), choose),
            lambda: self.labels()[indices],
            lambda i: self.stored(int(indices[i])),
        )

    def of_classes(self, kept: np.ndarray, labels: np.ndarray) -> "Images":
        """Returns the images of some classes, whose labels then count from 0.

        Args:
            kept: Labels of the classes, ascending.
            labels: Labels of all images, `(n,)`.
        """
        places = np.flatnonzero(np.isin(labels, kept))
        taken, own = self.take(places), np.searchsorted(kept, labels[places]).astype(np.int32)

        def load(i: int, choose: Choose | None = None) -> tuple[RGB, Label]:
            image, label = taken.load(i, choose)
            return image, int(np.searchsorted(kept, label))

        names = tuple(self.classes[i] for i in kept)
        return Images(len(taken), names, load, lambda: own, taken.stored)

    def among(self, classes: tuple[str, ...]) -> "Images":
        """Returns the same images with the labels that their classes have among others.

        Args:
            classes: Names of classes, of which all classes of the images are some.
        """
        numbers = {name: number for number, name in enumerate(classes)}
        places = np.array([numbers[name] for name in self.classes], np.int32)
        several = self.several

        def convert(labels: np.ndarray) -> np.ndarray:
            if not several:
                return places[labels]
            wide = np.zeros((*labels.shape[:-1], len(classes)), bool)
            wide[..., places] = labels
            return wide

        def load(i: int, choose: Choose | None = None) -> tuple[RGB, Label]:
            image, label = self.load(i, choose)
            return image, convert(label) if several else int(places[label])  # type: ignore[arg-type]

        own = convert(self.labels())
        return Images(len(self), classes, load, lambda: own, self.stored)


def hold_in_memory(
    images: Sequence[RGB] | np.ndarray, labels: np.ndarray, classes: tuple[str, ...]
) -> Images:
    """Returns a split of images that are already in memory.

    Args:
        images: Images, `(h, w, 3)` uint8 each.
        labels: Labels of the images, `(n,)` int32, or `(n, classes)` bool.
        classes: Names of the classes.
    """

    def load(i: int, choose: Choose | None = None) -> tuple[RGB, Label]:
        image = images[i]
        part = image if choose is None else take_part(image, choose(*image.shape[:2]))
        return part, label_of(labels, i)

    return Images(len(images), classes, load, lambda: labels)


def label_of(labels: np.ndarray, i: int) -> Label:
    """Returns the label of an image: a number, or a row where images may have several labels.

    Args:
        labels: Labels of all images, `(n,)` or `(n, classes)`.
        i: Number of the image.
    """
    return int(labels[i]) if labels.ndim == 1 else labels[i]


def stored_file(path: Path, name: str) -> Stored:
    """Returns a file as an image is stored in it.

    Args:
        path: The file.
        name: Its name relative to the source.

    Raises:
        Refused: The file is gone.
    """
    try:
        return Stored(name, path.stat().st_size, path.read_bytes)
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from None


def drop_empty_classes(images: Images) -> Images:
    """Returns the same images without the classes that have none.

    Args:
        images: A split; its labels then count the classes that remain.
    """
    labels = images.labels()
    kept = np.unique(labels)
    return images if len(kept) == len(images.classes) else images.of_classes(kept, labels)


def join_splits(parts: list[Images]) -> Images:
    """Returns the images of several splits, one split after the other.

    Args:
        parts: Splits with the same classes.
    """
    ends = np.cumsum([len(part) for part in parts])

    def place(i: int) -> tuple[Images, int]:
        part = int(np.searchsorted(ends, i, side="right"))
        return parts[part], i - int(ends[part]) + len(parts[part])

    def load(i: int, choose: Choose | None = None) -> tuple[RGB, Label]:
        part, own = place(i)
        return part.load(own, choose)

    def stored(i: int) -> Stored:
        part, own = place(i)
        return part.stored(own)

    return Images(
        int(ends[-1]),
        parts[0].classes,
        load,
        lambda: np.concatenate([part.labels() for part in parts]),
        stored,
    )


def choose_eval_split(asked: str | None, there: set[str], where: str) -> str | None:
    """Returns the split to evaluate on: the one asked for, or the first of the usual names.

    Args:
        asked: The split that the settings name, if any.
        there: The splits that exist.
        where: The source, for the sentence.

    Raises:
        Refused: The split that was asked for does not exist.
    """
    if asked is not None and asked not in there:
        raise Refused(
            f"--data.eval-split {asked} is not in {where}, which has {', '.join(sorted(there))}"
        )
    return asked or next((name for name in EVAL_SPLITS if name in there), None)
