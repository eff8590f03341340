"""Folders of training runs (`python -m train.*`): their settings and the ViT of their newest
checkpoint. Reading a checkpoint needs orbax (the extra `train`), but no code of `train`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from ggem_jax.files.errors import MismatchedWeights, UnreadableWeights
from ggem_jax.models.config import ViTConfig
from ggem_jax.models.token_pooling import named_pooling
from ggem_jax.models.vit import ViT
from ggem_jax.weights.folders import CHECKPOINTS
from ggem_jax.weights.own import fit_variables

Means = tuple[float, float, float]


def read_run(
    folder: str | Path, *, ema: bool = True
) -> tuple[ViT, dict[str, Any], tuple[Means, Means]]:
    """Returns the ViT of a training run with the weights of its newest checkpoint.

    Args:
        folder: The folder of the run, with `config.json` and `checkpoints/`.
        ema: Whether to take the moving average of the weights, where the run has one; evaluations
            use it, too.

    Returns:
        The model with the run's pooling and head, its variables in float32, and the mean and
        deviation of the images, `(3,)` each in [0, 1]. Of a run of `train.metric` or
        `train.contrastive` it is the image ViT, without the projection after it.

    Raises:
        UnreadableWeights: The folder is no run and holds no file of weights, has no checkpoint yet,
            or cannot be read.
        MismatchedWeights: The checkpoint does not fit the settings.
        ModuleNotFoundError: orbax is not installed.
    """
    settings = _read_settings(Path(folder))
    checkpoint = _newest_checkpoint(Path(folder))
    params = _find_vit(_read_weights(checkpoint, ema))
    if params is None:
        raise MismatchedWeights(f"{checkpoint} holds no ViT")
    head = params.get("head", {}).get("bias", np.empty(0))
    try:
        pool = dict(settings["pool"])
        pooling = named_pooling(pool.pop("kind"), **pool)
        model = ViT(ViTConfig(**settings["model"]), pooling, len(head))
        mean, std = (tuple(map(float, settings["data"][name])) for name in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3 or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
            raise ValueError("data.mean and data.std must be three numbers each, std above 0")
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableWeights(
            f"{folder}/config.json does not hold the settings of a training run: {error!r}"
        ) from None
    arrays = traverse_util.flatten_dict({"params": params}, sep="/")
    return model, fit_variables(model, arrays, source=str(checkpoint)), (mean, std)


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


def _newest_checkpoint(folder: Path) -> Path:
    """The complete checkpoint of the latest step; unfinished ones have other names."""
    steps = [path for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()]
    if not steps:
        raise UnreadableWeights(f"{folder} has no checkpoint yet: train it for longer")
    return max(steps, key=lambda path: int(path.name))


def _read_weights(checkpoint: Path, ema: bool) -> Any:
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
        name = "ema" if ema and tree.get("ema") is not None else "params"
        wanted = {name: tree[name]}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        how = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
        return reader.restore(folder, args=how)[name]
    except Exception as error:  # of many kinds, from the operating system's up to orbax's own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UnreadableWeights(f"the checkpoint {checkpoint} cannot be read: {reason}") from None


def _find_vit(params: Any) -> Mapping[str, Any] | None:
    """The parameters of the ViT among those of a training."""
    if not isinstance(params, Mapping):
        return None
    if "patch_embedding" in params:
        return params
    return next((found for inner in params.values() if (found := _find_vit(inner))), None)
