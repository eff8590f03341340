"""Labelled images from `digits`, `folder:DIR` or `tfds:NAME`, as splits with random access."""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ggem_jax.files.images import EXTENSIONS, RGB, UnreadableImage, read_image
from train.cli import Refused, first_line
from train.config import Data

KNOWN = "digits, folder:DIR, tfds:NAME"
TRAIN_SPLITS = ("train",)
EVAL_SPLITS = ("val", "validation", "test")


class Stored(NamedTuple):
    """An image as its source stores it."""

    name: str  # relative to the source; empty where images have no names
    size: int  # bytes
    read: Callable[[], bytes]  # () -> its contents; raises OSError


@dataclass(frozen=True)
class Images:
    """One split of labelled images."""

    size: int  # number of images
    classes: tuple[str, ...]  # names of the classes, by label
    # i -> image i and its label; raises UnreadableImage where it cannot be decoded
    load: Callable[[int], tuple[RGB, int]]
    labels: Callable[[], np.ndarray]  # () -> labels of all images, without decoding them
    # i -> image i as it is stored; None: the images are in memory
    files: Callable[[int], Stored] | None = None

    def __len__(self) -> int:
        return self.size

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
            lambda i: self.load(int(indices[i])),
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

        def load(i: int) -> tuple[RGB, int]:
            image, label = taken.load(i)
            return image, int(np.searchsorted(kept, label))

        names = tuple(self.classes[i] for i in kept)
        return Images(len(taken), names, load, lambda: own, taken.stored)


def open_data(data: Data) -> tuple[Images, Images]:
    """Returns the training and the evaluation images of a source.

    A source with one split is divided by `hold_out`.

    Args:
        data: The settings of the source.

    Raises:
        Refused: There is no such source, it cannot be read, or its splits have different classes.
    """
    splits = open_splits(data)
    if len(splits) == 2:
        check_classes(splits, data.source)
        return splits["train"], splits["eval"]
    return hold_out(splits["train"], data.holdout)


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
        check_classes(splits, data.source, ", or none in common")
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

    def load(i: int) -> tuple[RGB, int]:
        part, own = place(i)
        return part.load(own)

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
        splits = folder(Path(name).expanduser(), data.eval_split)
    elif kind == "tfds" and name:
        splits = tfds(name, data.data_dir.expanduser(), data.eval_split, download=data.download)
    else:
        raise Refused(f"unknown data source {data.source!r}; known are {KNOWN}")
    return splits


def check_classes(splits: dict[str, Images], source: str, otherwise: str = "") -> None:
    """Raises `Refused` if the two splits have different classes.

    Args:
        splits: The splits "train" and "eval".
        source: The name of their source, for the sentence.
        otherwise: Words after "must have the same classes", such as ", or none in common".

    Raises:
        Refused: The classes differ; the sentence lists those that only one split has.
    """
    if splits["train"].classes != splits["eval"].classes:
        difference = sorted(set(splits["train"].classes) ^ set(splits["eval"].classes))
        raise Refused(
            f"the two splits of {source} must have the same classes{otherwise}; only one has"
            f" {', '.join(difference)}"
        )


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


def hold_in_memory(
    images: Sequence[RGB] | np.ndarray, labels: np.ndarray, classes: tuple[str, ...]
) -> Images:
    """Returns a split of images that are already in memory.

    Args:
        images: Images, `(h, w, 3)` uint8 each.
        labels: Labels of the images, `(n,)` int32.
        classes: Names of the classes.
    """
    return Images(len(images), classes, lambda i: (images[i], int(labels[i])), lambda: labels)


def folder(root: Path, eval_split: str | None = None) -> dict[str, Images]:
    """Returns the splits of a folder of class sub-folders.

    Two forms are read: `root/train/CLASS/*.png` with `root/val` (or validation, test, or
    `eval_split`) beside it, and `root/CLASS/*.png` as one split. Images whose names are all numbers
    are ordered by these numbers, others by their paths.

    Args:
        root: The folder.
        eval_split: The sub-folder to evaluate on; None takes the first of the usual names.

    Raises:
        Refused: The folder, a split or a class is missing, or a class has no images.
    """
    if not root.is_dir():
        raise Refused(f"there is no folder {root}")
    inside = {path.name for path in root.iterdir() if path.is_dir()}
    train_name = next((name for name in TRAIN_SPLITS if name in inside), None)
    eval_name = _eval_name(eval_split, inside, f"{root}")
    if train_name is None and eval_split is None:
        return {"train": _class_folders(root)}
    if train_name is None:
        raise Refused(f"--data.eval-split {eval_split} needs a folder {root}/train beside it")
    splits = {"train": _class_folders(root / train_name)}
    if eval_name is not None:
        splits["eval"] = _class_folders(root / eval_name)
    return splits


def _class_folders(root: Path) -> Images:
    classes = sorted(
        path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if not classes:
        raise Refused(f"{root} holds no class sub-folders")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(
            path
            for path in (root / name).iterdir()
            if path.suffix.lower() in EXTENSIONS and path.is_file() and path.name[0] != "."
        )
        if not found:
            raise Refused(
                f"the class folder {root / name} holds no images ({', '.join(EXTENSIONS)})"
            )
        paths += found
        labels += [label] * len(found)
    if all(re.fullmatch("[0-9]+", path.stem) for path in paths):
        order = np.argsort([int(path.stem) for path in paths], kind="stable")
    else:
        order = np.arange(len(paths))
    paths, label_array = [paths[i] for i in order], np.array(labels, np.int32)[order]
    return Images(
        len(paths),
        tuple(classes),
        lambda i: (read_image(paths[i]), int(label_array[i])),
        lambda: label_array,
        lambda i: stored_file(paths[i], paths[i].relative_to(root).as_posix()),
    )


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


def tfds(
    name: str, data_dir: Path, eval_split: str | None = None, *, download: bool = False
) -> dict[str, Images]:
    """Returns the splits of a prepared TensorFlow Datasets data set.

    It is read through its random-access data source, which needs no TensorFlow.

    Args:
        name: The data set as `name[/config][:version]`; without a version the newest one is taken.
        data_dir: Folder of the prepared data sets.
        eval_split: The split to evaluate on; None takes the first of the usual names.
        download: Whether a data set that is missing may be downloaded and prepared.

    Raises:
        Refused: The data set is missing, cannot be read, or has no images with labels.
    """
    folder_ = _find_prepared(name, data_dir)
    if folder_ is None and download:
        _prepare(name, data_dir)
        folder_ = _find_prepared(name, data_dir)
    if folder_ is None:
        raise Refused(
            f"{name} is not prepared in {data_dir} (there:"
            f" {', '.join(_list_prepared(data_dir)) or 'nothing'}): add --download to let"
            " TensorFlow Datasets fetch it, or convert packed files with python -m train.prepare"
        )
    import tensorflow_datasets

    try:
        builder = tensorflow_datasets.builder_from_directory(folder_)
    except Exception as error:  # of many kinds: files that are missing, cut off or altered
        raise Refused(
            f"{folder_} is not a readable TensorFlow Datasets data set: {first_line(error)}"
        ) from None
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise Refused(
            f"{name} has the features {', '.join(features)}, but image and label are needed"
        )
    if builder.info.file_format.value != "array_record":
        raise Refused(
            f"{folder_} is stored as {builder.info.file_format.value}; random access needs"
            " array_record: prepare it in another --data-dir"
        )
    train_name = next((split for split in TRAIN_SPLITS if split in builder.info.splits), None)
    if train_name is None:
        raise Refused(
            f"{name} has the splits {', '.join(builder.info.splits)}, but none is called train"
        )
    eval_name = _eval_name(eval_split, set(builder.info.splits), name)
    splits = {"train": _tfds_split(builder, train_name)}
    if eval_name is not None:
        splits["eval"] = _tfds_split(builder, eval_name)
    return splits


def _eval_name(asked: str | None, there: set[str], where: str) -> str | None:
    """The split to evaluate on: the one asked for, or the first that exists of the usual names."""
    if asked is not None and asked not in there:
        raise Refused(
            f"--data.eval-split {asked} is not in {where}, which has {', '.join(sorted(there))}"
        )
    return asked or next((name for name in EVAL_SPLITS if name in there), None)


def _tfds_split(builder, split: str) -> Images:
    from tensorflow_datasets import decode

    classes = tuple(builder.info.features["label"].names)
    # as files: our own decoder serves every source
    records = builder.as_data_source(split, decoders={"image": decode.SkipDecoding()})

    def load(i: int) -> tuple[RGB, int]:
        name = f"image {i} of {builder.name}, split {split},"
        try:
            record = records[i]
        except Exception as error:  # of many kinds, from the record reader's up to the parser's
            raise UnreadableImage(f"{name} cannot be read: {first_line(error)}") from None
        if not 0 <= record["label"] < len(classes):
            raise Refused(
                f"{name} has the label {record['label']}, where one of 0 to {len(classes) - 1} is"
                " needed: choose another --data.eval-split"
            )
        return read_image(record["image"], name=name), int(record["label"])

    def column(name: str) -> np.ndarray:
        return np.array([records[i][name] for i in range(len(records))])

    def stored(i: int) -> Stored:
        content = records[i]["image"]
        return Stored("", len(content), lambda: content)

    images = Images(
        len(records),
        classes,
        load,
        functools.cache(lambda: column("label").astype(np.int32)),
        stored,
    )
    if "index" in builder.info.features and not builder.info.disable_shuffling:
        return images.take(np.argsort(column("index"), kind="stable"))
    return images


def _find_prepared(name: str, data_dir: Path) -> Path | None:
    """The folder of the newest prepared version of `name[/config][:version]`."""
    path, _, version = name.partition(":")
    try:
        found = [
            info.parent for info in (data_dir / path).glob(f"{version or '*'}/dataset_info.json")
        ]
    except (NotImplementedError, ValueError):  # the name cannot be a pattern of a path
        return None
    return max(
        found,
        key=lambda folder: [int(part) for part in re.findall("[0-9]+", folder.name)],
        default=None,
    )


def _list_prepared(data_dir: Path) -> list[str]:
    infos = [*data_dir.glob("*/*/dataset_info.json"), *data_dir.glob("*/*/*/dataset_info.json")]
    return sorted({str(info.parent.parent.relative_to(data_dir)) for info in infos})


def _prepare(name: str, data_dir: Path) -> None:
    import tensorflow_datasets

    try:
        tensorflow_datasets.builder(
            name, data_dir=data_dir, file_format="array_record"
        ).download_and_prepare()
    except Exception as error:  # no such data set, no network, no TensorFlow for its generator
        raise Refused(
            f"TensorFlow Datasets could not prepare {name} in {data_dir}: {first_line(error)}"
        ) from None


def hold_out(images: Images, share: float) -> tuple[Images, Images]:
    """Returns the training and the evaluation part of one split, each in the order of the source.

    Args:
        images: The split.
        share: Share of each class that is kept for evaluation, drawn once and for all.

    Raises:
        Refused: One of the two parts would be empty.
    """
    held = draw_held_out(images.labels(), share)
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
