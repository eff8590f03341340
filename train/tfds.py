"""Labelled images from prepared data sets of TensorFlow Datasets, read without TensorFlow."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ggem_jax.files.images import RGB, Choose, UnreadableImage, read_image
from train.cli import Refused, first_line
from train.images import TRAIN_SPLITS, Images, Label, Stored, choose_eval_split


def tfds(
    name: str,
    data_dir: Path,
    eval_split: str | None = None,
    *,
    download: bool = False,
    label: str = "label",
) -> dict[str, Images]:
    """Returns the splits of a prepared TensorFlow Datasets data set.

    It is read through its random-access data source, which needs no TensorFlow. Labels are those
    of a `ClassLabel`, or a sequence of them: then an image may have several. Whole numbers and
    texts are labels as well, whose classes are the values that occur in the split.

    Args:
        name: The data set as `name[/config][:version]`; without a version the newest one is taken.
        data_dir: Folder of the prepared data sets.
        eval_split: The split to evaluate on; None takes the first of the usual names.
        download: Whether a data set that is missing may be downloaded and prepared.
        label: Name of the feature with the labels.

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
    if not {"image", label} <= set(features):
        raise Refused(
            f"{name} has the features {', '.join(features)}, but image and {label} are needed"
            " (--label-key names another one for the labels)"
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
    eval_name = choose_eval_split(eval_split, set(builder.info.splits), name)
    splits = {"train": _read_split(builder, train_name, label)}
    if eval_name is not None:
        splits["eval"] = _read_split(builder, eval_name, label)
    return splits


def _read_split(builder, split: str, label: str) -> Images:
    from tensorflow_datasets import decode

    # as files: our own decoder serves every source
    records = builder.as_data_source(split, decoders={"image": decode.SkipDecoding()})

    def column(name: str) -> list[Any]:
        return [records[i][name] for i in range(len(records))]

    classes, number = _labelling(builder, label, lambda: column(label))

    def load(i: int, choose: Choose | None = None) -> tuple[RGB, Label]:
        name = f"image {i} of {builder.name}, split {split},"
        try:
            record = records[i]
        except Exception as error:  # of many kinds, from the record reader's up to the parser's
            raise UnreadableImage(f"{name} cannot be read: {first_line(error)}") from None
        found = number(record[label])
        if found is None:
            raise Refused(
                f"{name} has the label {record[label]}, where one of 0 to {len(classes) - 1} is"
                " needed: choose another --data.eval-split"
            )
        return read_image(record["image"], name=name, choose=choose), found

    def stored(i: int) -> Stored:
        content = records[i]["image"]
        return Stored("", len(content), lambda: content)

    @functools.cache
    def labels() -> np.ndarray:
        found = [number(value) for value in column(label)]
        rows = [each for each in found if isinstance(each, np.ndarray)]
        if rows:
            nothing = np.zeros(len(classes), bool)
            return np.stack([each if isinstance(each, np.ndarray) else nothing for each in found])
        return np.array([-1 if each is None else each for each in found], np.int32)

    images = Images(len(records), classes, load, labels, stored)
    if "index" in builder.info.features and not builder.info.disable_shuffling:
        return images.take(np.argsort(column("index"), kind="stable"))
    return images


def _labelling(
    builder, label: str, values: Callable[[], list[Any]]
) -> tuple[tuple[str, ...], Callable[[Any], Label | None]]:
    """The names of the classes, and a function from a stored label to ours, None for no class."""
    feature: Any = builder.info.features[label]
    inner: Any = getattr(feature, "feature", None)  # of a sequence

    def one(value: Any) -> int | None:
        return int(value) if 0 <= value < count else None

    def several(value: Any) -> np.ndarray | None:
        found = [one(each) for each in np.asarray(value).reshape(-1)]
        row = np.zeros(count, bool)
        row[[each for each in found if each is not None]] = True
        return None if None in found else row

    if getattr(feature, "names", None) is not None and feature.shape == ():
        count = len(feature.names)
        return tuple(feature.names), one
    if getattr(inner, "names", None) is not None and inner.shape == ():
        count = len(inner.names)
        return tuple(inner.names), several
    text = feature.np_dtype == np.dtype(object) or feature.np_dtype.kind in "SU"
    if feature.shape != () or not (text or np.issubdtype(feature.np_dtype, np.integer)):
        raise Refused(
            f"the feature {label} of {builder.name} is {type(feature).__name__} of shape"
            f" {feature.shape} and {feature.np_dtype}: labels are a ClassLabel, a sequence of"
            " them, a whole number or a text (--label-key names another feature)"
        )

    def plain(value: Any) -> Any:
        return value.decode() if isinstance(value, bytes) else value if text else int(value)

    found = sorted({plain(value) for value in values()})
    numbers = {value: i for i, value in enumerate(found)}
    return tuple(map(str, found)), lambda value: numbers[plain(value)]


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
