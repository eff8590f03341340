"""Small Vision Transformers trained from scratch on CIFAR-10 with different poolings.

They are the end-to-end part of `eval.studies.pooling`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from eval.runs import train_in_study
from ggem_jax.models.vit import used_exponents
from train.batches import eval_batches
from train.build import build_model
from train.classify import train
from train.cli import load_config
from train.config import Config
from train.evaluate import Predictions
from train.images import Images, hold_in_memory
from train.prepare import evenly_spaced, read_packed
from train.step import normalise

# name -> pooling flags
ARMS = {
    "class token": ["--pool.kind", "cls"],
    "average": ["--pool.kind", "avg"],
    "positive average": ["--pool.kind", "relu-avg"],
    "max": ["--pool.kind", "max"],
    "GeM": ["--pool.kind", "gem"],
    "GGeM": ["--pool.kind", "ggem"],
}
FLAGS = [
    "--model.image", "32", "--model.patch", "8", "--model.width", "48", "--model.depth", "3",
    "--model.heads", "4", "--model.mlp-width", "192",
    "--model.gelu", "tanh", "--batch", "256", "--optimizer.lr", "2e-3", "--optimizer.warmup", "40",
    "--augment.crop", "pad", "--augment.flip",
    "--log-every", "50", "--eval-every", "1000000", "--checkpoint-every", "1000000",
]  # fmt: skip


def read_cifar10(packed: Path, count: int) -> tuple[Images, Images]:
    """Returns `count` evenly spaced training images of CIFAR-10 and all its test images.

    Args:
        packed: Folder with the packed data set, as `train.prepare` reads it.
        count: Number of training images.

    Raises:
        Refused: The folder is missing, or its files are damaged.
    """
    classes, splits = read_packed(packed)

    def load_split(split) -> Images:
        return hold_in_memory(
            [load() for load, _ in split],
            np.array([label for _, label in split], np.int32),
            tuple(classes),
        )

    return load_split(evenly_spaced(splits["train"], count)), load_split(splits["test"])


def make_config(arm: str, seed: int, runs: Path, epochs: float) -> Config:
    """Returns the settings of one training.

    Args:
        arm: Name of the pooling, a key of `ARMS`.
        seed: Seed of the training.
        runs: Folder of the runs.
        epochs: Epochs of the training.
    """
    folder = runs / f"{arm.replace(' ', '-').lower()}-{seed}"
    flags = [
        *FLAGS, *ARMS[arm], "--data", "cifar10", "--seed", str(seed), "--epochs", str(epochs),
        "--out", str(folder),
    ]  # fmt: skip
    return load_config(Config, flags, "eval.studies.pooling")


@dataclass(frozen=True)
class Network:
    """One trained network on the test images."""

    predictions: Predictions  # on the test images
    p: np.ndarray  # (exponents,) learned; (0,) where nothing is learned
    params: Any  # trained parameters
    config: Config  # settings of the training


def train_network(
    arm: str, seed: int, data: tuple[Images, Images], runs: Path, epochs: float
) -> Network:
    """Trains a network, or resumes its run.

    Args:
        arm: Name of the pooling, a key of `ARMS`.
        seed: Seed of the training.
        data: Training and test images.
        runs: Folder of the runs.
        epochs: Epochs of the training.

    Returns:
        The trained network with its predictions on the test images.

    Raises:
        Refused: The training is refused.
        KeyboardInterrupt: A signal stopped the training.
    """
    config = make_config(arm, seed, runs, epochs)
    run = train_in_study(train, config, data=data)
    params = jax.tree.map(np.asarray, run.state.evaluated)
    p = (
        np.asarray(used_exponents(params["pool"]["p"]))
        if "p" in params.get("pool", {})
        else np.zeros(0)
    )
    return Network(run.result, p, params, config)


def describe_heads(network: Network, images: Images) -> tuple[np.ndarray, np.ndarray]:
    """Returns the outputs of the last attention's heads and the descriptors, `(n, d)` each.

    The outputs are concatenated head by head, each the mean over the patches.

    Args:
        network: A trained network.
        images: The images to describe.
    """
    config = network.config.model
    model = build_model(network.config, len(images.classes))

    @jax.jit
    def both(images):
        output, kept = model.apply({"params": network.params}, images, mutable=["intermediates"])
        (heads,) = kept["intermediates"][f"blocks_{config.depth - 1}"]["attention"]["heads"]
        patches = heads[:, config.prefix_tokens :].mean(axis=1)
        return patches.reshape(len(images), -1), output.descriptor

    parts = [both(batch) for batch in make_batches(network, images)]
    heads, descriptor = (
        np.concatenate([np.asarray(part[i]) for part in parts])[: len(images)] for i in (0, 1)
    )
    return heads, descriptor


def compute_tokens(network: Network, images: Images) -> np.ndarray:
    """Returns the tokens after the final norm, `(n, tokens, d)` float16, the class token first.

    Args:
        network: A trained network with a class token.
        images: The images to describe.
    """
    model = build_model(network.config, len(images.classes))

    @jax.jit
    def tokens(images):
        output: Any = model.apply({"params": network.params}, images)
        return output.tokens

    return np.concatenate(
        [np.asarray(tokens(batch), np.float16) for batch in make_batches(network, images)]
    )[: len(images)]


def make_batches(network: Network, images: Images) -> Iterator[Float[Array, "b h w 3"]]:
    """Yields the images in batches, normalised as the network takes them.

    The last batch is filled up with black images.

    Args:
        network: A trained network, whose settings have the batch size.
        images: The images, in order.
    """
    for batch in eval_batches(images, network.config):
        yield normalise(jnp.asarray(batch["image"]), network.config.data)
