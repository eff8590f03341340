"""Labelled images from a folder with a sub-folder for each class."""

import os
import re
import sys
from pathlib import Path

import numpy as np

from ggem_jax.files.images import read_image
from ggem_jax.retrieval.index.exclusions import Exclusions
from ggem_jax.retrieval.index.folder import Listing, walk
from train.cli import Refused
from train.images import TRAIN_SPLITS, Images, Stored, choose_eval_split


def folder(
    root: Path, eval_split: str | None = None, *, corrupt: str = "refuse"
) -> dict[str, Images]:
    """Returns the splits of a folder of class sub-folders.

    Two forms are read: `root/train/CLASS/*.png` with `root/val` (or validation, test, or
    `eval_split`) beside it, and `root/CLASS/*.png` as one split. Images are found at any depth
    below their class, by ending or content; hidden files and those of file servers are left out. A
    line on standard error counts what is left out, by reason. Images whose names are all numbers
    are ordered by these numbers, others by their paths.

    Args:
        root: The folder.
        eval_split: The sub-folder to evaluate on; None takes the first of the usual names.
        corrupt: What to do about folders that cannot be read: "refuse", or "skip" them.

    Raises:
        Refused: The folder, a split or a class is missing, or a class to train on has no images.
    """
    if not root.is_dir():
        raise Refused(f"there is no folder {root}")
    inside = {path.name for path in root.iterdir() if path.is_dir()}
    train_name = next((name for name in TRAIN_SPLITS if name in inside), None)
    eval_name = choose_eval_split(eval_split, inside, f"{root}")
    if train_name is None and eval_split is None:
        return {"train": _class_folders(root, corrupt)}
    if train_name is None:
        raise Refused(f"--data.eval-split {eval_split} needs a folder {root}/train beside it")
    splits = {"train": _class_folders(root / train_name, corrupt)}
    if eval_name is not None:
        splits["eval"] = _class_folders(root / eval_name, corrupt, all_classes=False)
    return splits


def _class_folders(root: Path, corrupt: str, *, all_classes: bool = True) -> Images:
    """The images below `root`; classes without images are dropped unless all are needed."""
    exclusions = Exclusions()
    classes = sorted(
        path.name for path in root.iterdir() if path.is_dir() and exclusions.find(path.name) is None
    )
    if not classes:
        raise Refused(f"{root} holds no class sub-folders")
    listing = walk(root, apart=Path(os.devnull), exclusions=exclusions)
    if listing.skipped and corrupt == "refuse":
        raise Refused(f"in {root}: {listing.skipped[0].why} (--data.corrupt skip leaves it out)")
    files = [file for file in listing.files if "/" in file.path]
    of_class = [file.path.partition("/")[0] for file in files]
    empty = sorted(set(classes) - set(of_class))
    if len(empty) == len(classes) or (empty and all_classes):
        raise Refused(f"the class folder {root / empty[0]} holds no images")
    classes = [name for name in classes if name not in empty]
    _say_left_out(root, listing, len(listing.files) - len(files))
    labels = np.searchsorted(classes, of_class).astype(np.int32)
    names = [file.path.rpartition("/")[2].partition(".")[0] for file in files]
    if all(re.fullmatch("[0-9]+", name) for name in names):
        order = np.argsort([int(name) for name in names], kind="stable")
        files, labels = [files[i] for i in order], labels[order]
    return Images(
        len(files),
        tuple(classes),
        lambda i, choose=None: (
            read_image(root / files[i].path, choose=choose),
            int(labels[i]),
        ),
        lambda: labels,
        lambda i: Stored(files[i].path, files[i].size, (root / files[i].path).read_bytes),
    )


def _say_left_out(root: Path, listing: Listing, outside: int) -> None:
    """Counts the files that are not used in one line on standard error."""
    reasons = [
        f"{count:,} {ending or 'without an ending'} that are no images"
        for ending, count in sorted(listing.others.items())
    ]
    reasons += [f"{count:,} that {pattern} names" for pattern, count in listing.excluded.items()]
    reasons += [f"{outside:,} images in no class folder"] * (outside > 0)
    reasons += [f"{listing.special:,} links and special files"] * (listing.special > 0)
    reasons += [each.why for each in listing.skipped]
    if reasons:
        print(f"left out of {root}: {'; '.join(reasons)}", file=sys.stderr, flush=True)
