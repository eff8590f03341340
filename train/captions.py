"""Images with captions as records, and captions that are made of class names."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.cli import Refused, require
from train.config import Data
from train.images import Images
from train.tables import read_text
from train.tokenizer import LARGEST_VOCABULARY, SMALLEST_VOCABULARY

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Captions = tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """The text tower of train.contrastive and where its captions come from."""

    # the sizes are those of CLIP's base text tower, arXiv:2103.00020, section 2.4

    width: int = 512  # channels of a token
    depth: int = 12  # blocks
    heads: int = 8  # attention heads
    mlp_width: int = 2048  # channels inside the MLP of a block
    context: int = 77  # ids of a text, start and end included; longer texts lose their last pieces
    vocabulary: int = 8192  # most pieces of a tokenizer that is trained on the captions
    tokenizer: Path | None = None  # a tokenizer.json to use instead
    # captions made of class names; None: "a photo of a {}.", and for digits "the handwritten digit
    # {}"
    templates: tuple[str, ...] | None = None
    # file with other words for the classes: for each a line of its folder, a tab and its words
    names: Path | None = None
    # a control: give each training image the captions of another one, drawn once and for all
    shuffle_captions: bool = False

    def __post_init__(self):
        for name in ("width", "depth", "heads", "mlp_width"):
            require(f"text.{name}", getattr(self, name), "at least 1", getattr(self, name) >= 1)
        require(
            "text.width",
            self.width,
            f"a multiple of its {self.heads} heads",
            self.width % self.heads == 0,
        )
        require(
            "text.context", self.context, "at least 3: start, a piece and end", self.context >= 3
        )
        enough = SMALLEST_VOCABULARY <= self.vocabulary <= LARGEST_VOCABULARY
        wanted = (
            f"at least {SMALLEST_VOCABULARY}: all bytes, start and end, and at most"
            f" {LARGEST_VOCABULARY}"
        )
        require("text.vocabulary", self.vocabulary, wanted, enough)
        named = self.templates is None or (
            bool(self.templates) and all("{}" in template for template in self.templates)
        )
        require(
            "text.templates",
            self.templates,
            "texts with {} where the name of the class goes",
            named,
        )


@dataclass(frozen=True)
class Captioned:
    """One split: images whose labels are their own numbers, with at least one caption each."""

    images: Images
    captions: Sequence[Captions]  # of each image
    classes: tuple[str, ...] = ()  # in words, where captions are made of them

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> "Captioned":
        """Returns some of the images with their captions.

        Args:
            indices: Numbers of the images, `(m,)`; the result has their order.
        """
        return make_captioned(
            self.images.take(indices), [self.captions[i] for i in indices], self.classes
        )

    def shuffled(self, seed: int) -> "Captioned":
        """Returns the images with each other's captions: each image gets those of another one.

        Args:
            seed: Seed of the draw, which is one cycle through all images.

        Raises:
            Refused: There is only one image.
        """
        if len(self) < 2:
            raise Refused("--text.shuffle-captions needs at least 2 images to train on")
        order = np.random.default_rng(seed).permutation(len(self))
        captions: list[Captions] = [()] * len(self)
        for one, other in zip(order, np.roll(order, 1), strict=True):
            captions[one] = self.captions[other]
        return make_captioned(self.images, captions, self.classes)

    def texts(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Returns the distinct captions, and the pairs (image, text), `(m, 2)`."""
        numbers: dict[str, int] = {}
        pairs = [
            (image, numbers.setdefault(caption, len(numbers)))
            for image, each in enumerate(self.captions)
            for caption in each
        ]
        return tuple(numbers), np.array(pairs, np.int64)

    def digest(self) -> int:
        """Returns a checksum of all captions in the order of their images."""
        total = 0
        for each in self.captions:
            total = zlib.crc32(repr(each).encode(), total)
        return total


def make_captioned(
    images: Images,
    captions: Sequence[Captions],
    classes: tuple[str, ...] = (),
) -> Captioned:
    """Returns images with their captions; the images are numbered anew from 0.

    Args:
        images: The images; their labels are dropped.
        captions: Captions of each image, at least one.
        classes: Words of the classes, where captions are made of them.
    """
    numbered = Images(
        len(images),
        ("image",),
        lambda i, choose=None: (images.load(i, choose)[0], i),
        lambda: np.arange(len(images), dtype=np.int32),
        images.stored,
    )
    return Captioned(numbered, captions, classes)


def choose_class_words(classes: tuple[str, ...], data: Data, text: Text) -> tuple[str, ...]:
    """Returns the words for the classes in captions.

    They come from the file `text.names`; without one they are the class names with spaces for
    underscores, and for `digits` the words zero to nine.

    Args:
        classes: Names of the classes.
        data: The source of the classes.
        text: The settings of captions.

    Returns:
        The words of each class, in the order of `classes`.

    Raises:
        Refused: The file cannot be read or lacks a class, or a class name is not in UTF-8.
    """
    if text.names is not None:
        names = read_names(text.names)
        missing = [name for name in classes if name not in names]
        if missing:
            raise Refused(
                f"--text.names {text.names} has no words for"
                f" {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}"
            )
        return tuple(names[name] for name in classes)
    if unprintable := [name for name in classes if name != name.encode(errors="replace").decode()]:
        raise Refused(
            f"the class name {unprintable[0]!r} of {data.source} is not in UTF-8: --text.names FILE"
            " calls it otherwise"
        )
    return (
        DIGITS
        if data.source == "digits"
        else tuple(name.replace("_", " ").strip() for name in classes)
    )


def choose_templates(data: Data, text: Text) -> tuple[str, ...]:
    """Returns the templates of captions: those of the settings, or else those of the source.

    Args:
        data: The source; `digits` has a template of its own.
        text: The settings of captions.

    Returns:
        Texts with {} where the words of the class go.
    """
    return text.templates or (
        ("the handwritten digit {}",) if data.source == "digits" else ("a photo of a {}.",)
    )


def of_classes(images: Images, words: tuple[str, ...], templates: tuple[str, ...]) -> Captioned:
    """Returns images whose captions are the words of their class in every template.

    Args:
        images: Images with a label each.
        words: Words of each class, by label.
        templates: Texts with {} for the words.
    """
    captions = [
        tuple(dict.fromkeys(template.replace("{}", each) for template in templates))
        for each in words
    ]
    return make_captioned(images, [captions[label] for label in images.labels()], words)


def read_names(path: Path) -> dict[str, str]:
    """Returns the words of each class folder, from a file with one line for each class.

    Args:
        path: The file; a line is the name of the folder, a tab and the words. Empty lines are
            skipped.

    Raises:
        Refused: The file cannot be read, a line has another form, or a folder has two lines.
    """
    names: dict[str, str] = {}
    for number, line in enumerate(read_text(path.expanduser(), "--text.names").splitlines(), 1):
        folder, tab, words = line.partition("\t")
        if line.strip() and not (tab and folder.strip() and words.strip()):
            raise Refused(
                f"line {number} of {path} must be a folder name, a tab and words, not {line!r}"
            )
        if folder.strip() in names:
            raise Refused(f"{path} has two lines for {folder.strip()}")
        if line.strip():
            names[folder.strip()] = words.strip()
    return names
