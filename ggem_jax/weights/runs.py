"""Folders of training runs (`python -m train.*`): their settings and the ViT of their newest
checkpoint, with what comes before and after it. Where that checkpoint is damaged, the one before it
is read, as training does, and a line on standard error says so. Reading a checkpoint needs orbax
(the extra `train`), but no code of `train`.
"""

import gc
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from ggem_jax.files.errors import MismatchedWeights, UnreadableWeights
from ggem_jax.files.preprocessing import Preprocessing
from ggem_jax.models.config import ViTConfig
from ggem_jax.models.token_pooling import named_pooling
from ggem_jax.models.vit import ViT
from ggem_jax.weights.folders import CHECKPOINTS, checkpoint_steps
from ggem_jax.weights.own import fit_variables
from ggem_jax.weights.own_settings import read_facts

Means = tuple[float, float, float]
Projection = dict[str, np.ndarray]  # "kernel" (width, dim) and "bias" (dim,)


@dataclass(frozen=True)
class Run:
    """A training run at its newest readable checkpoint, as its evaluations use it."""

    tool: str  # the script that made it, such as train.metric
    step: int  # of the checkpoint
    weights: str  # "ema", the moving average, or "raw"
    model: ViT  # with the pooling and head of the run
    variables: dict[str, Any] = field(repr=False)  # of the model, in float32
    projection: Projection | None = field(repr=False)  # of the pooled tokens; None: there is none
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None  # names of the channels of the head; None: there is no head
    several_labels: bool  # whether an image may have several of the classes, or none


def read_run(folder: str | Path, *, ema: bool | None = None) -> Run:
    """Returns a training run with the weights of its newest checkpoint that can be read.

    Args:
        folder: The folder of the run, with `config.json` and `checkpoints/`, or its folder `best`.
        ema: Whether to take the moving average of the weights; None takes it where the run has one,
            as its evaluations do.

    Returns:
        The run. The ViT of a run of `train.metric` or `train.contrastive` has no head, but a
        projection of the pooled tokens into the space of the descriptors.

    Raises:
        UnreadableWeights: The folder is no run and holds no file of weights, has no checkpoint yet,
            cannot be read, or has no moving average where one is asked for.
        MismatchedWeights: The checkpoint does not fit the settings.
        ModuleNotFoundError: orbax is not installed.
    """
    settings = _read_settings(Path(folder))
    checkpoint, params, weights = _read_newest(Path(folder), ema)
    vit, projection = _find_vit(params)
    if vit is None:
        raise MismatchedWeights(f"{checkpoint} holds no ViT")
    head = vit.get("head", {}).get("bias", np.empty(0))
    try:
        pool = dict(settings["pool"])
        pooling = named_pooling(pool.pop("kind"), **pool)
        model = ViT(ViTConfig(**settings["model"]), pooling, len(head))
        data = {"eval_crop": "centre", "eval_zoom": 1.0} | settings["data"]
        facts = read_facts(settings | {"data": data}, model.config)
        preprocessing, classes, several_labels = facts
        assert preprocessing is not None  # its crop is stated
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableWeights(
            f"{folder}/config.json does not hold the settings of a training run: {error!r}"
        ) from None
    if len(head) and classes is not None and len(classes) != len(head):
        raise MismatchedWeights(
            f"{folder}/config.json names {len(classes)} classes, and the head of {checkpoint} has"
            f" {len(head)}"
        )
    arrays = traverse_util.flatten_dict({"params": vit}, sep="/")
    return Run(
        tool=str(settings.get("tool", "train.classify")),
        step=int(checkpoint.name),
        weights=weights,
        model=model,
        variables=fit_variables(model, arrays, source=str(checkpoint)),
        projection=projection,
        preprocessing=preprocessing,
        classes=classes if len(head) else None,
        several_labels=several_labels,
    )


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    lacks = (
        f"{folder} holds none of {', '.join(CHECKPOINTS)}, and is not the folder of a training run"
    )
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise UnreadableWeights(f"{lacks}: it has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableWeights(f"{path} is not readable JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UnreadableWeights(f"{path} must hold settings by name, not a list or a number")
    if not (folder / "checkpoints").is_dir() and not {"model", "pool"} <= set(settings):
        raise UnreadableWeights(
            f"{lacks}: its config.json has no model and pool, and there is no folder checkpoints"
        )
    return settings


def _read_newest(folder: Path, ema: bool | None) -> tuple[Path, Any, str]:
    """The newest checkpoint that can be read, its parameters or their average, and which."""
    steps = checkpoint_steps(folder)
    if not steps:
        raise UnreadableWeights(f"{folder} has no checkpoint yet: train it for longer")
    damaged: list[str] = []
    for step in steps:
        checkpoint = folder / "checkpoints" / str(step)
        try:
            params, weights = _read_weights(checkpoint, ema)
        except _Damaged as error:
            damaged.append(f"the checkpoint {checkpoint} cannot be read: {error}")
        else:
            for sentence in damaged:
                print(f"{sentence}; that of step {step} is taken in its place", file=sys.stderr)
            return checkpoint, params, weights
        _forget_failed_reads()
    older = f" (nor those of {', '.join(map(str, steps[1:]))})" if steps[1:] else ""
    raise UnreadableWeights(damaged[0] + older)


def _forget_failed_reads() -> None:
    """Frees the reads that orbax gave up, which would print tracebacks about its event loop."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = before


class _Damaged(Exception):
    """A checkpoint cannot be read; the reason is the message."""


def _read_weights(checkpoint: Path, ema: bool | None) -> tuple[Any, str]:
    """The parameters, or their moving average, as NumPy arrays; nothing else is read."""
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise ModuleNotFoundError(
            "reading a training run needs the package orbax-checkpoint: pip install"
            " 'ggem-jax[train]'"
        ) from None
    folder = (checkpoint / "default").absolute()
    try:
        reader = ocp.PyTreeCheckpointHandler()
        tree = reader.metadata(folder).tree
        averaged = tree.get("ema") is not None
        name = "ema" if averaged and ema is not False else "params"
        wanted = {name: tree[name]}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        how = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
        found = reader.restore(folder, args=how)[name]
    except Exception as error:  # of many kinds, from the operating system's up to orbax's own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise _Damaged(reason) from None
    if ema and not averaged:
        raise UnreadableWeights(
            f"{checkpoint} has no moving average of its weights: take the raw weights, or train"
            " with --optimizer.ema"
        )
    return found, "ema" if name == "ema" else "raw"


def _find_vit(params: Any) -> tuple[Mapping[str, Any] | None, Projection | None]:
    """The parameters of the ViT among those of a training, and of the projection beside it."""
    if not isinstance(params, Mapping):
        return None, None
    if "patch_embedding" in params:
        return params, None
    for inner in params.values():
        vit, projection = _find_vit(inner)
        if vit is not None:
            # of `Embedder`, and of the image tower of train.contrastive, which has no bias
            beside = params.get("projection") or params.get("image_head")
            return vit, projection if beside is None else _as_projection(beside)
    return None, None


def _as_projection(params: Mapping[str, Any]) -> Projection:
    kernel = np.asarray(params["kernel"], np.float32)
    bias = params.get("bias", np.zeros(kernel.shape[1]))
    return {"kernel": kernel, "bias": np.asarray(bias, np.float32)}
