"""Labelled images from a table: `csv:FILE`."""

import os
from pathlib import Path

import numpy as np

from ggem_jax.files.images import read_image
from train.cli import Refused
from train.config import Data
from train.images import Images, label_of, stored_file
from train.tables import IMAGE_KEYS, check_complete, read_table

LABEL_KEYS = ("label", "labels", "class")  # names of columns that are known


def read_labels(name: str, data: Data) -> Images:
    """Returns the images of a table with a row for each, in its order.

    Args:
        name: Path of the file; paths of images are relative to its folder.
        data: The settings of its columns. With `label_separator` a row has several labels or none,
            and rows of the same image are joined. `corrupt` says what to do about rows without an
            image or a label: "refuse", or "skip" them with a line on standard error.

    Returns:
        The images; their classes are the labels that occur, sorted as numbers where all are.

    Raises:
        Refused: The file cannot be read or has other columns, an image has two labels where one is
            needed, or nothing is left.
    """
    path = Path(name).expanduser()
    table = read_table(path, data, "the labels")
    paths = table.column(data.image_key, IMAGE_KEYS, "--image-key", "paths of images")
    cells = table.column(data.label_key, LABEL_KEYS, "--label-key", "labels")
    several = data.label_separator is not None
    labels: dict[str, list[str]] = {}
    lacking: dict[str, str] = {}
    for number, (image, cell) in enumerate(zip(paths, cells, strict=True), 1):
        image = os.path.normpath(image) if image else ""
        values = cell.split(data.label_separator) if several else [cell]
        values = [value.strip() for value in values if value.strip()]
        if not image or not os.path.isfile(path.parent / image):
            lacking[image or f"row {number}"] = "no image"
        elif not values and not several:
            lacking[image] = "no label"
        elif not several and labels.setdefault(image, values) != values:
            raise Refused(
                f"{path} gives {image} the labels {labels[image][0]} and {values[0]}: write all"
                " labels of an image in one row, and name what separates them by --label-separator"
            )
        elif several:
            labels.setdefault(image, []).extend(values)
    check_complete(lacking, f"rows of {path}", data.corrupt)
    occurring = {value for values in labels.values() for value in values}
    if not occurring:
        raise Refused(f"{path} holds no image with a label")
    numeric = all(value.isascii() and value.isdecimal() for value in occurring)
    # 1 and 01 are two classes, whose order must be the same in every process
    classes = sorted(occurring, key=lambda value: (int(value) if numeric else 0, value))
    numbers = {value: i for i, value in enumerate(classes)}
    own = np.zeros((len(labels), len(classes)), bool)
    for row, values in zip(own, labels.values(), strict=True):
        row[[numbers[value] for value in values]] = True
    found = own if several else own.argmax(axis=1).astype(np.int32)
    files = [path.parent / image for image in labels]
    names = [os.path.relpath(file, path.parent) for file in files]
    return Images(
        len(files),
        tuple(classes),
        lambda i, choose=None: (read_image(files[i], choose=choose), label_of(found, i)),
        lambda: found,
        lambda i: stored_file(files[i], names[i]),
    )
