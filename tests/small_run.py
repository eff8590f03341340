"""A training run of random weights, written without training it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from conftest import draw_variables

from ggem_jax.models.embedder import Embedder
from ggem_jax.models.vit import ViT, ViTConfig
from train.build import build_pooling
from train.cli import to_dict
from train.config import Config, Data, Pool
from train.metric import MetricConfig

SMALL = ViTConfig(patch=4, width=16, depth=1, heads=2, mlp_width=32, image=16)
DATA = Data(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), eval_zoom=1.25)


def write_run(
    folder: Path,
    *,
    dim: int = 0,
    classes: Sequence[str] = ("ants", "bees", "cats"),
    several_labels: bool = False,
    seed: int = 0,
    step: int = 5,
    **changes: Any,
) -> Path:
    """Writes a run of `train.metric` with a projection, or for `dim` 0 one of `train.classify`."""
    record = MetricConfig if dim else Config
    config = record(**{"model": SMALL, "data": DATA, "pool": Pool("ggem", groups=4)} | changes)
    vit = ViT(config.model, build_pooling(config.pool), 0 if dim else len(classes))
    images = jnp.ones((1, config.model.image, config.model.image, 3))
    network = Embedder(vit, dim) if dim else vit
    params = draw_variables(network, images, seed=seed)["params"]
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"classes": list(classes)}
    found |= {"several_labels": True} if several_labels else {}
    facts = {"tool": config.tool, "data_found": found}
    (folder / "config.json").write_text(json.dumps(to_dict(config) | facts))
    state = {"step": np.int32(step), "ema": None}
    state["params"] = {"network": params, "proxies": np.ones((3, dim))} if dim else params
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        manager.save(step, args=ocp.args.StandardSave(jax.tree.map(np.asarray, state)))
        manager.wait_until_finished()
    return folder
