"""Predicts the classes of images with a trained run: python -m train.predict RUN IMAGES...

IMAGES are files and folders; folders are searched with all folders below them. RUN is the folder of
a run, or what `train.export --to safetensors` wrote from one. Images are cut as in the evaluations
of the run, and the weights are those of its newest checkpoint that can be read, the moving average
where it has one.

A line for each image gives the most probable classes; where an image may have several of them, or
none, each has a probability of its own. `--json` prints one JSON object instead,
`--csv` a table, and `--descriptors FILE.npz` keeps the unit descriptors. Images that cannot be read
are named on standard error and counted; the exit code is 1 only if no image could be predicted.
"""

import csv
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from tyro.conf import Positional

from ggem_jax.files.images import RGB, UnreadableImage, read_image
from ggem_jax.files.vectors import write_npz
from ggem_jax.processors import count_processors
from ggem_jax.retrieval.index.folder import walk
from ggem_jax.weights.inference import make_infer, require_preprocessing
from ggem_jax.weights.load import LoadedViT, load_vit
from train.cli import Refused, one_sentence, parse, require

TOOL = "train.predict"
WeightsKind = Literal["ema", "raw"]


@dataclass(frozen=True)
class PredictOptions:
    """The classes and descriptors of images, by a trained run."""

    run: Positional[Path]  # folder of a run, or what train.export wrote from one
    images: Positional[tuple[Path, ...]]  # files and folders of images
    top: int = 5  # classes of each image, the most probable first
    json: bool = False  # print one JSON object
    csv: bool = False  # print a table of comma-separated values
    # .npz file for descriptor (n, dim), unit vectors, and path (n,)
    descriptors: Path | None = None
    # the moving average of the weights, or the weights themselves; None: as the run was evaluated
    weights_kind: WeightsKind | None = None
    batch: int = 64  # images that go through the network together

    def __post_init__(self):
        require("top", self.top, "at least 1", self.top >= 1)
        require("batch", self.batch, "at least 1", self.batch >= 1)
        if self.json and self.csv:
            raise ValueError("--json and --csv exclude each other: give one of them")
        if self.descriptors is not None and self.descriptors.suffix != ".npz":
            raise ValueError(f"--descriptors must end in .npz, not {self.descriptors}")
        if not self.images:
            raise ValueError("IMAGES are missing: name files or folders after the run")


@dataclass(frozen=True)
class Predicted:
    """The answers of a network for the images that could be read, in the order of their names."""

    paths: tuple[str, ...]  # (n,)
    descriptor: np.ndarray  # (n, dim) float32, unit vectors
    probability: np.ndarray | None  # (n, classes) float32; None: the network has no head
    classes: tuple[str, ...]  # names of the classes; numbers where the names are not known
    several_labels: bool  # whether an image may have several of the classes, or none
    unreadable: tuple[str, ...]  # a sentence for each image that could not be read
    others: int  # files in the folders that are no images

    def top(self, count: int) -> list[list[tuple[str, float]]]:
        """Returns the most probable classes of each image with their probabilities.

        Args:
            count: Classes of an image; all where there are fewer.

        Raises:
            ValueError: The network has no head.
        """
        if self.probability is None:
            raise ValueError("a network without a head has no classes")
        order = np.argsort(-self.probability, axis=1, kind="stable")[:, :count]
        return [
            [(self.classes[i], float(row[i])) for i in best]
            for row, best in zip(self.probability, order, strict=True)
        ]


def main(argv: list[str] | None = None) -> None:
    """Runs the script."""
    with one_sentence(TOOL):
        options = parse(PredictOptions, argv, TOOL)
        loaded = load_trained(options.run, options.weights_kind)
        if not loaded.model.num_classes and options.descriptors is None:
            raise Refused(
                f"{loaded.source}: it has no classes to predict; its descriptors are written with"
                " --descriptors FILE.npz"
            )
        predicted = predict(loaded, options.images, batch=options.batch)
        if options.descriptors is not None:
            write_descriptors(predicted, options.descriptors)
        show(predicted, options, loaded.source)


def load_trained(run: Path, kind: WeightsKind | None = None) -> LoadedViT:
    """Returns the network of a run, whose preprocessing is known.

    Args:
        run: Folder of a run, or what was written from one.
        kind: "ema" or "raw" weights; None takes those that the run was evaluated with.

    Raises:
        Refused: It cannot be read, does not have these weights, or was not written from a run.
    """
    try:
        loaded = load_vit(run, ema=None if kind is None else kind == "ema")
        require_preprocessing(loaded)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise Refused(str(error)) from None
    return loaded


def predict(loaded: LoadedViT, images: Sequence[Path], *, batch: int = 64) -> Predicted:
    """Returns the answers of a network for image files, and for all images in folders.

    Args:
        loaded: The network, with its preprocessing.
        images: Files and folders.
        batch: Images that go through the network together.

    Raises:
        Refused: There is no image that can be read.
    """
    found, unreadable, others = find_images(images)
    how = require_preprocessing(loaded)
    infer, variables = make_infer(loaded)
    compiled, placed = jax.jit(infer), jax.device_put(variables)

    def read(path: Path) -> RGB | UnreadableImage:
        try:
            return how.square(read_image(path))
        except UnreadableImage as error:
            return error

    paths: list[str] = []
    parts: list[dict[str, np.ndarray]] = []
    with ThreadPoolExecutor(min(count_processors(), 4)) as threads:
        for start in range(0, len(found), batch):
            some = found[start : start + batch]
            read_images = list(zip(some, threads.map(read, some), strict=True))
            unreadable += [shown(str(x)) for _, x in read_images if isinstance(x, UnreadableImage)]
            readable = [(p, x) for p, x in read_images if not isinstance(x, UnreadableImage)]
            if not readable:
                continue
            squares = np.stack([x for _, x in readable])
            # filled up, so that the last batch needs no compilation of its own
            padded = np.zeros((batch, *squares.shape[1:]), np.uint8)
            padded[: len(squares)] = squares
            outputs = jax.device_get(compiled(placed, padded))
            parts.append({name: array[: len(squares)] for name, array in outputs.items()})
            paths += [shown(str(path)) for path, _ in readable]
    if not paths:
        said = f"; the first: {unreadable[0]}" if unreadable else ""
        raise Refused(
            f"no image to predict: {len(unreadable)} could not be read, {others} other files were"
            f" left out{said}"
        )
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    names = loaded.classes or tuple(map(str, range(loaded.model.num_classes)))
    return Predicted(
        tuple(paths),
        whole["descriptor"],
        whole.get("probability"),
        names,
        loaded.several_labels,
        tuple(unreadable),
        others,
    )


def find_images(places: Sequence[Path]) -> tuple[list[Path], list[str], int]:
    """Returns the image files among files and in folders, and what else is there.

    Files that are named are always taken. In folders, images are found by ending or content, as for
    an index (`ggem_jax.retrieval.index.folder.walk`); hidden files and folders are not looked at.

    Args:
        places: Files and folders.

    Returns:
        The files, a sentence for each file or folder that cannot be opened, and the number of files
        in the folders that are no images.
    """
    found, unreadable, others = [], [], 0
    for place in map(Path.expanduser, places):
        if not place.is_dir():
            found.append(place)
            continue
        listing = walk(place, apart=Path(os.devnull))
        found += [place / file.path for file in listing.files]
        unreadable += [f"in {shown(str(place))}: {each.why}" for each in listing.skipped]
        others += listing.others.total() + listing.special
    return found, unreadable, others


def shown(text: str) -> str:
    """Returns text with bytes that are no UTF-8, which names of files may have, as escapes.

    Args:
        text: The text, such as a path.
    """
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def write_descriptors(predicted: Predicted, path: Path) -> None:
    """Writes descriptors as an .npz file, which is never half written.

    The file has `descriptor (n, dim)` in float32 and `path (n,)`.

    Args:
        predicted: The answers of a network.
        path: The file; it is replaced.

    Raises:
        Refused: The file cannot be written.
    """
    try:
        write_npz(path, descriptor=predicted.descriptor, path=np.array(predicted.paths))
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror}") from None


def show(predicted: Predicted, options: PredictOptions, source: str) -> None:
    """Prints the classes on standard output, and what was left out on standard error.

    Args:
        predicted: The answers of a network.
        options: Form of the output, and number of classes of an image.
        source: The network, for people.
    """
    top = None if predicted.probability is None else predicted.top(options.top)
    if options.json:
        print(json.dumps(as_json(predicted, top, source)))
    elif top is not None and options.csv:
        rows = csv.writer(sys.stdout, lineterminator="\n")
        columns = [f"{name}_{i}" for i in range(1, len(top[0]) + 1) for name in _COLUMNS]
        rows.writerow(["path", *columns])
        for path, best in zip(predicted.paths, top, strict=True):
            rows.writerow([path, *(value for pair in best for value in pair)])
    elif top is not None:
        for path, best in zip(predicted.paths, top, strict=True):
            print(path, *(f"{name} {share:.1%}" for name, share in best), sep="  ")
    for sentence in predicted.unreadable:
        print(f"not read: {sentence}", file=sys.stderr)
    said = f"{len(predicted.paths):,} images"
    if predicted.unreadable:
        said += f", {len(predicted.unreadable):,} could not be read"
    if predicted.others:
        said += f", {predicted.others:,} other files left out"
    if predicted.several_labels:
        said += "; an image may have several of the classes, or none"
    if options.descriptors is not None:
        count, dim = predicted.descriptor.shape
        said += f"; {count:,} descriptors of {dim} numbers in {options.descriptors}"
    print(said, file=sys.stderr)


_COLUMNS = ("class", "probability")


def as_json(
    predicted: Predicted, top: list[list[tuple[str, float]]] | None, source: str
) -> dict[str, object]:
    """Returns the object that `--json` prints.

    Args:
        predicted: The answers of a network.
        top: The most probable classes of each image; None: there are no classes.
        source: The network, for people.

    Returns:
        "network"; "several_labels", whether an image may have several of the classes, or none, so
        that their probabilities need not add up to 1; "images", an entry for each image with its
        path and, best first, its classes; "unreadable", a sentence for each image that could not be
        read; and "others", the number of files that are no images.
    """
    images: list[dict[str, object]] = [{"path": path} for path in predicted.paths]
    for entry, best in zip(images, top or [], strict=top is not None):
        entry["top"] = [dict(zip(_COLUMNS, each, strict=True)) for each in best]
    return {
        "network": source,
        "several_labels": predicted.several_labels,
        "images": images,
        "unreadable": list(predicted.unreadable),
        "others": predicted.others,
    }


if __name__ == "__main__":
    main()
