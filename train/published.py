"""Starts a training from a published ViT: puts its weights into a fresh state."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ggem_jax.models.config import ViTConfig
from ggem_jax.weights import MismatchedWeights
from ggem_jax.weights.architecture import Given
from ggem_jax.weights.declared import Norms
from ggem_jax.weights.vit import PublishedViT
from train.cli import Refused, published_vit
from train.step import State, Steps


def read_start(path: Path, model: ViTConfig) -> PublishedViT:
    """Returns the network of the file that `--init` names.

    Args:
        path: File of a ViT.
        model: Settings of the ViT, which decide what the file leaves open.

    Raises:
        Refused: The file cannot be read.
    """
    norm: Norms = "post" if model.post_norm else "pre"
    return published_vit(path, Given(model.heads, model.gelu, model.norm_eps, norm))


def start_from(path: Path, model: ViTConfig, state: State, steps: Steps) -> State:
    """Returns the state with the weights of a file in every ViT among its parameters.

    Pooling and head keep their own values. The moving average is filled in the same way.

    Args:
        path: File of a ViT, as `--init` names it.
        model: Settings of the ViT, which decide what the file leaves open.
        state: A fresh state, on the devices.
        steps: The compiled steps of the training, whose shardings the state follows.

    Raises:
        Refused: The file cannot be read or does not fit.
    """
    published = read_start(path, model)

    def fill(params: Any) -> Any:
        if "patch_embedding" in params:
            return published.fill({"params": params})["params"]
        return {
            name: fill(inner) if isinstance(inner, dict) else inner
            for name, inner in params.items()
        }

    def place(leaf, sharding):
        """Puts an array of the file on the devices; the other arrays are there already."""
        return (
            jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
            if isinstance(leaf, np.ndarray)
            else leaf
        )

    try:
        own = {
            name: fill(getattr(state, name))
            for name in ("params", "ema")
            if getattr(state, name) is not None
        }
    except MismatchedWeights as error:
        raise Refused(f"--init {path}: {error}") from None
    return dataclasses.replace(
        state,
        **{
            name: jax.tree.map(place, params, getattr(steps.state_sharding, name))
            for name, params in own.items()
        },
    )
