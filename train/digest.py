"""Digests of the data and the weights that a run starts from, so that it resumes with no others.

They hold nothing of where the files lie: a run and its data may move.
"""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train.cli import Refused
from train.config import Config
from train.images import Images
from train.published import read_start

SAMPLED = 1024  # images whose contents are read
SAMPLED_VALUES = 1 << 16  # values of an array that are read
_BYTES = 8  # of a digest


def describe_data(config: Config, train: Images, evaluation: Images) -> dict[str, Any]:
    """Returns the facts of a run's data that its folder keeps, as JSON can hold them.

    Args:
        config: The settings of the run.
        train: The training images.
        evaluation: The evaluation images.

    Returns:
        "classes", the numbers of images "train" and "eval", the "digest" of the training images,
        "weights", the digest of those of `--init`, or None without it, and "several_labels" where
        an image may have several.

    Raises:
        Refused: An image or the file of `--init` cannot be read.
    """
    return {
        "classes": list(train.classes),
        "train": len(train),
        "eval": len(evaluation),
        "digest": digest_images(train),
        "weights": None if config.init is None else digest_weights(config.init, config),
    } | ({"several_labels": True} if train.several else {})


def digest_images(images: Images) -> dict[str, str]:
    """Returns digests of names, sizes in bytes, labels and contents of images, in hexadecimal.

    Contents are those of all images, or of `SAMPLED` that are evenly spread over a larger split.

    Args:
        images: A split; the order of its images counts.

    Raises:
        Refused: An image cannot be read from its disk.
    """
    names, sizes, contents = (hashlib.blake2b(digest_size=_BYTES) for _ in range(3))
    sampled = set(np.linspace(0, len(images) - 1, min(len(images), SAMPLED)).astype(int).tolist())
    for i in range(len(images)):
        stored = images.stored(i)
        names.update(stored.name.encode(errors="surrogateescape") + b"\0")
        sizes.update(stored.size.to_bytes(8, "little"))
        if i in sampled:
            try:
                content = stored.read()
            except OSError as error:
                raise Refused(f"{stored.name} cannot be read: {error.strerror or error}") from None
            contents.update(hashlib.blake2b(content, digest_size=_BYTES).digest())
    labels = hashlib.blake2b(images.labels().astype("<i8").tobytes(), digest_size=_BYTES)
    parts = {"names": names, "sizes": sizes, "labels": labels, "contents": contents}
    return {name: part.hexdigest() for name, part in parts.items()}


def digest_weights(path: Path, config: Config) -> str:
    """Returns a digest of the weights in a file, in hexadecimal, whatever the form of the file.

    Args:
        path: File of a ViT, as `--init` names it.
        config: The settings of the run, which decide what the file leaves open.

    Raises:
        Refused: The file cannot be read.
    """
    total = hashlib.blake2b(digest_size=_BYTES)
    for name, leaf in jax.tree.leaves_with_path(read_start(path, config.model).variables):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(name)} {array.dtype} {array.shape}".encode())
        flat = array.reshape(-1)
        total.update(flat[:: max(flat.size // SAMPLED_VALUES, 1)].tobytes())
    return total.hexdigest()
