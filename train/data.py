"""Labelled images from `digits`, `folder:DIR`, `csv:FILE` or `tfds:NAME`, as splits."""

import sys
from pathlib import Path

import numpy as np

from train.cli import Refused
from train.config import Data
from train.folders import folder
from train.images import Images, drop_empty_classes, hold_in_memory, join_splits
from train.labels import read_labels
from train.tfds import tfds

KNOWN = "digits, folder:DIR, tfds:NAME, csv:FILE"


def open_data(data: Data) -> tuple[Images, Images]:
    """Returns the training and the evaluation images of a source.

    A source with one split is divided by `hold_out`. A line on standard error names the classes
    that have no image to evaluate on.

    Args:
        data: The settings of the source.

    Raises:
        Refused: There is no such source, it cannot be read, or an image to evaluate on has a class
            that is not trained on.
    """
    splits = open_splits(data)
    if len(splits) == 1:
        return hold_out(splits["train"], data.holdout)
    train = splits["train"]
    evaluation = join_classes(splits["eval"], train.classes, f"the two splits of {data.source}")
    labels = evaluation.labels()
    shown = set(np.flatnonzero(labels.any(axis=0)) if evaluation.several else labels)
    absent = [name for number, name in enumerate(train.classes) if number not in shown]
    if absent:
        more = ", ..." if len(absent) > 5 else ""
        print(
            f"{len(absent)} of {len(train.classes)} classes have no image to evaluate on:"
            f" {', '.join(absent[:5])}{more}",
            file=sys.stderr,
            flush=True,
        )
    return train, evaluation


def open_disjoint(data: Data, share: float) -> tuple[Images, Images]:
    """Returns training and evaluation images that have no class in common.

    Splits of a source that share no class are taken as they are. Otherwise the images of all splits
    together are divided by class: a share of the classes, drawn once and for all, is trained on.

    Args:
        data: The settings of the source.
        share: Share of the classes that are trained on, between 0 and 1.

    Raises:
        Refused: The source cannot be read, or fewer than 2 classes would be left on either side.
    """
    splits = open_splits(data)
    if any(split.several for split in splits.values()):
        raise Refused(
            f"{data.source} gives an image several labels, and descriptors need one of each image"
        )
    if len(splits) == 2:
        occurring = {name: drop_empty_classes(split) for name, split in splits.items()}
        if not set(occurring["train"].classes) & set(occurring["eval"].classes):
            for name, split in occurring.items():
                if len(split.classes) < 2:
                    raise Refused(
                        f"the split to {name} of {data.source} has the class"
                        f" {', '.join(split.classes)} alone: at least 2 are needed"
                    )
            return occurring["train"], occurring["eval"]
        splits["eval"] = join_classes(
            splits["eval"],
            splits["train"].classes,
            f"the two splits of {data.source}",
            ", or none in common",
        )
    whole = drop_empty_classes(join_splits(list(splits.values())))
    count, labels = len(whole.classes), whole.labels()
    kept = round(share * count)
    if not 2 <= kept <= count - 2:
        raise Refused(
            f"--metric.train-classes {share:g} of {count} classes is {kept}: at least 2 must be"
            " trained on and 2 be left"
        )
    trained_on = np.zeros(count, bool)
    trained_on[np.random.default_rng(0).permutation(count)[:kept]] = True
    return whole.of_classes(np.flatnonzero(trained_on), labels), whole.of_classes(
        np.flatnonzero(~trained_on), labels
    )


def open_splits(data: Data) -> dict[str, Images]:
    """Returns the splits of a source: "train", and "eval" where there is one to evaluate on.

    Args:
        data: The settings of the source.

    Raises:
        Refused: There is no such source, or it cannot be read.
    """
    kind, _, name = data.source.partition(":")
    if kind == "digits" and not name:
        if data.eval_split is not None:
            raise Refused(
                f"--data.eval-split {data.eval_split} is not in digits, of which --data.holdout is"
                " kept"
            )
        splits = {"train": digits()}
    elif kind == "folder" and name:
        splits = folder(Path(name).expanduser(), data.eval_split, corrupt=data.corrupt)
    elif kind == "csv" and name:
        splits = {"train": read_labels(name, data)}
        if data.eval_split is not None:
            splits["eval"] = read_labels(data.eval_split, data)
    elif kind == "tfds" and name:
        splits = tfds(
            name,
            data.data_dir.expanduser(),
            data.eval_split,
            download=data.download,
            label=data.label_key or "label",
        )
    else:
        raise Refused(f"unknown data source {data.source!r}; known are {KNOWN}")
    return splits


def join_classes(
    images: Images, classes: tuple[str, ...], what: str, otherwise: str = ""
) -> Images:
    """Returns evaluation images with the labels of the classes that are trained on.

    Args:
        images: The evaluation images, whose classes may be some of those.
        classes: Names of the classes that are trained on.
        what: What must have the same classes, for the sentence.
        otherwise: Words after "must have the same classes", such as ", or none in common".

    Raises:
        Refused: A class is not among those; the sentence lists all that are not.
    """
    if images.classes == classes:
        return images
    if others := sorted(set(images.classes) - set(classes)):
        listed = ", ".join(others[:10]) + (", ..." if len(others) > 10 else "")
        raise Refused(
            f"{what} must have the same classes{otherwise}; only images to evaluate on are of"
            f" {listed}"
        )
    return images.among(classes)


def digits() -> Images:
    """Returns scikit-learn's 1,797 handwritten digits of 8 x 8 pixels.

    Reference: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI machine
    learning repository, 1998.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.repeat(np.round(found.images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=-1)
    labels = found.target.astype(np.int32)
    return hold_in_memory(images, labels, tuple("0123456789"))


def hold_out(images: Images, share: float) -> tuple[Images, Images]:
    """Returns the training and the evaluation part of one split, each in the order of the source.

    Args:
        images: The split.
        share: Share of each class that is kept for evaluation, drawn once and for all; of all
            images where they may have several labels.

    Raises:
        Refused: One of the two parts would be empty.
    """
    labels = np.zeros(len(images), np.int32) if images.several else images.labels()
    held = draw_held_out(labels, share)
    return images.take(np.flatnonzero(~held)), images.take(np.flatnonzero(held))


def draw_held_out(labels: np.ndarray, share: float) -> np.ndarray:
    """Returns which images `hold_out` keeps for evaluation, `(n,)` bool.

    Args:
        labels: Labels of the images, `(n,)`.
        share: Share of each class that is kept, between 0 and 1.

    Raises:
        Refused: The share is out of range, or one of the two parts would be empty.
    """
    if not 0 < share < 1:
        raise Refused(f"data.holdout must lie between 0 and 1, not at {share}")
    rng = np.random.default_rng(0)
    held = np.zeros(len(labels), bool)
    for label in range(labels.max(initial=-1) + 1):
        members = rng.permutation(np.flatnonzero(labels == label))
        held[members[: round(share * len(members))]] = True
    if held.all() or not held.any():
        raise Refused(
            f"data.holdout {share} leaves one of the two parts of {len(labels)} images empty"
        )
    return held
