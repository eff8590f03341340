"""Trainings that start from a published ViT: its weights in a fresh state."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ggem_jax.weights import MismatchedWeights
from train.cli import Refused, published_vit
from train.step import State, Steps


def started_from(path: Path, state: State, steps: Steps) -> State:
    """The state with the file's weights in every ViT among its parameters, but for pooling and
    head, and in the moving average likewise.
    """
    published = published_vit(path)

    def filled(params: Any) -> Any:
        if "patch_embedding" in params:
            return published.fill({"params": params})["params"]
        return {
            name: filled(inner) if isinstance(inner, dict) else inner
            for name, inner in params.items()
        }

    def placed(leaf, sharding):
        """On the devices; what the file does not have is there already."""
        return (
            jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
            if isinstance(leaf, np.ndarray)
            else leaf
        )

    try:
        own = {
            name: filled(getattr(state, name))
            for name in ("params", "ema")
            if getattr(state, name) is not None
        }
    except MismatchedWeights as error:
        raise Refused(f"--init {path}: {error}") from None
    return dataclasses.replace(
        state,
        **{
            name: jax.tree.map(placed, params, getattr(steps.state_sharding, name))
            for name, params in own.items()
        },
    )
