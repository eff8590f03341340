"""Where images come from: `digits`, `folder:DIR` or `tfds:NAME`, each as random-access splits of
labelled images.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ggem_jax.files.images import EXTENSIONS, RGB, UnreadableImage, read_image
from train.cli import Refused
from train.config import Data

KNOWN = "digits, folder:DIR, tfds:NAME"
TRAIN_SPLITS = ("train",)
EVAL_SPLITS = ("val", "validation", "test")


@dataclass(frozen=True)
class Images:
    """One split: `load(i)` gives image i, `(h, w, 3)` uint8, and its label; an image that cannot
    be decoded raises `UnreadableImage`.
    """

    size: int
    classes: tuple[str, ...]
    load: Callable[[int], tuple[RGB, int]]
    labels: Callable[[], np.ndarray]  # of all images: reads what it must

    def __len__(self) -> int:
        return self.size

    def take(self, indices: np.ndarray) -> "Images":
        """The images with these numbers, in this order."""
        return Images(
            len(indices),
            self.classes,
            lambda i: self.load(int(indices[i])),
            lambda: self.labels()[indices],
        )

    def of_classes(self, kept: np.ndarray, labels: np.ndarray) -> "Images":
        """The images of the classes with these numbers, which then count from 0; `labels` are
        those of all images.
        """
        places = np.flatnonzero(np.isin(labels, kept))
        taken, own = self.take(places), np.searchsorted(kept, labels[places]).astype(np.int32)

        def load(i: int) -> tuple[RGB, int]:
            image, label = taken.load(i)
            return image, int(np.searchsorted(kept, label))

        return Images(len(taken), tuple(self.classes[i] for i in kept), load, lambda: own)


def open_data(data: Data) -> tuple[Images, Images]:
    """The training and the evaluation images of a source."""
    splits = open_splits(data)
    if len(splits) == 2:
        check_classes(splits, data.source)
        return splits["train"], splits["eval"]
    return hold_out(splits["train"], data.holdout)


def open_disjoint(data: Data, share: float) -> tuple[Images, Images]:
    """Training and evaluation images that have no class in common.

    Splits of a source that have none are taken as they are. Otherwise all images of all splits
    together are divided by class: `share` of the classes, drawn once and for all, are trained on.
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
    """The same images, with the classes left out that have none."""
    labels = images.labels()
    kept = np.unique(labels)
    return images if len(kept) == len(images.classes) else images.of_classes(kept, labels)


def join_splits(parts: list[Images]) -> Images:
    """The images of several splits with the same classes, one after the other."""
    ends = np.cumsum([len(part) for part in parts])

    def load(i: int) -> tuple[RGB, int]:
        part = int(np.searchsorted(ends, i, side="right"))
        return parts[part].load(i - int(ends[part]) + len(parts[part]))

    return Images(
        int(ends[-1]),
        parts[0].classes,
        load,
        lambda: np.concatenate([part.labels() for part in parts]),
    )


def open_splits(data: Data) -> dict[str, Images]:
    """`train`, and where the source has one to evaluate on, `eval`."""
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
    """Refuses splits that do not have the same classes; `otherwise` says what else they might
    have.
    """
    if splits["train"].classes != splits["eval"].classes:
        difference = sorted(set(splits["train"].classes) ^ set(splits["eval"].classes))
        raise Refused(
            f"the two splits of {source} must have the same classes{otherwise}; only one has"
            f" {', '.join(difference)}"
        )


def digits() -> Images:
    """1,797 handwritten digits of 8 x 8 pixels that scikit-learn carries: Alpaydin and Kaynak, UCI
    machine learning repository, 1998.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.repeat(np.round(found.images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=-1)
    labels = found.target.astype(np.int32)
    return hold_in_memory(images, labels, tuple("0123456789"))


def hold_in_memory(
    images: Sequence[RGB] | np.ndarray, labels: np.ndarray, classes: tuple[str, ...]
) -> Images:
    """Images that are there already."""
    return Images(len(images), classes, lambda i: (images[i], int(labels[i])), lambda: labels)


def folder(root: Path, eval_split: str | None = None) -> dict[str, Images]:
    """`root/train/CLASS/*.png` with `root/val` (or validation, test, or `eval_split`) beside it, or
    `root/CLASS/*.png` as one split.

    Images whose names are all numbers stand in the order of these numbers, otherwise in the order
    of their paths.
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
    )


def tfds(
    name: str, data_dir: Path, eval_split: str | None = None, *, download: bool = False
) -> dict[str, Images]:
    """A prepared TensorFlow Datasets data set, `name[/config][:version]`, read through its
    random-access data source: no TensorFlow needed.
    """
    folder_ = _prepared(name, data_dir)
    if folder_ is None and download:
        _prepare(name, data_dir)
        folder_ = _prepared(name, data_dir)
    if folder_ is None:
        raise Refused(
            f"{name} is not prepared in {data_dir} (there:"
            f" {', '.join(_all_prepared(data_dir)) or 'nothing'}): add --download to let TensorFlow"
            " Datasets fetch it, or make it from files at hand with python -m train.prepare"
        )
    import tensorflow_datasets

    try:
        builder = tensorflow_datasets.builder_from_directory(folder_)
    except Exception as error:  # of many kinds: files that are missing, cut off or altered
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Refused(f"{folder_} is no readable TensorFlow Datasets data set: {reason}") from None
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
    """The split to evaluate on: the one asked for, or the first there is of those that are
    usual.
    """
    if asked is not None and asked not in there:
        raise Refused(
            f"--data.eval-split {asked} is not in {where}, which has {', '.join(sorted(there))}"
        )
    return asked or next((name for name in EVAL_SPLITS if name in there), None)


def _tfds_split(builder, split: str) -> Images:
    from tensorflow_datasets import decode

    classes = tuple(builder.info.features["label"].names)
    records = builder.as_data_source(
        split, decoders={"image": decode.SkipDecoding()}
    )  # as files: our own decoder serves every source

    def load(i: int) -> tuple[RGB, int]:
        name = f"image {i} of {builder.name}, split {split},"
        try:
            record = records[i]
        except Exception as error:  # of many kinds, from the record reader's up to the parser's
            raise UnreadableImage(
                f"{name} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}"
            ) from None
        if not 0 <= record["label"] < len(classes):
            raise Refused(
                f"{name} has the label {record['label']}, where one of 0 to {len(classes) - 1} is"
                " needed: choose another --data.eval-split"
            )
        return read_image(record["image"], name=name), int(record["label"])

    def column(name: str) -> np.ndarray:
        return np.array([records[i][name] for i in range(len(records))])

    images = Images(
        len(records), classes, load, functools.cache(lambda: column("label").astype(np.int32))
    )
    if "index" in builder.info.features and not builder.info.disable_shuffling:
        return images.take(np.argsort(column("index"), kind="stable"))
    return images


def _prepared(name: str, data_dir: Path) -> Path | None:
    """The folder of the newest prepared version of `name[/config][:version]`."""
    path, _, version = name.partition(":")
    try:
        found = [
            info.parent for info in (data_dir / path).glob(f"{version or '*'}/dataset_info.json")
        ]
    except (NotImplementedError, ValueError):  # no pattern that could be a version
        return None
    return max(
        found,
        key=lambda folder: [int(part) for part in re.findall("[0-9]+", folder.name)],
        default=None,
    )


def _all_prepared(data_dir: Path) -> list[str]:
    infos = [*data_dir.glob("*/*/dataset_info.json"), *data_dir.glob("*/*/*/dataset_info.json")]
    return sorted({str(info.parent.parent.relative_to(data_dir)) for info in infos})


def _prepare(name: str, data_dir: Path) -> None:
    import tensorflow_datasets

    try:
        tensorflow_datasets.builder(
            name, data_dir=data_dir, file_format="array_record"
        ).download_and_prepare()
    except (
        Exception
    ) as error:  # of many kinds: no such data set, no network, no TensorFlow for its generator
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refused(
            f"TensorFlow Datasets could not prepare {name} in {data_dir}: {reason}"
        ) from None


def hold_out(images: Images, share: float) -> tuple[Images, Images]:
    """Keeps `share` of each class, drawn once and for all, for evaluation; both parts stay in the
    order of the source.
    """
    held = draw_held_out(images.labels(), share)
    return images.take(np.flatnonzero(~held)), images.take(np.flatnonzero(held))


def draw_held_out(labels: np.ndarray, share: float) -> np.ndarray:
    """Which images `hold_out` keeps, `(n,)` bool."""
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
