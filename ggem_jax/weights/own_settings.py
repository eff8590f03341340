"""The settings of a file of our own: what the names and shapes of Flax variables do not tell.

They are in the header of the safetensors file, so that they stay with the weights, and in a
`config.json` beside it, for people. Both have the form of a training run's settings:
`model` holds the fields of `ViTConfig`, `pool` the arguments of `named_pooling`, and `data` the
mean and deviation of the images.
"""

import dataclasses
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ggem_jax.files.errors import MismatchedWeights, UnreadableWeights
from ggem_jax.files.normalisation import Normalisation
from ggem_jax.files.safetensors_files import read_metadata
from ggem_jax.models.config import ViTConfig
from ggem_jax.models.token_pooling import MAP, GGeM, Pooling, named_pooling
from ggem_jax.models.vit import ViT
from ggem_jax.pooling import avg_pool, cls_pool, gem_pool, lse_pool, max_pool

HEADER = "ggem_jax"  # name of the settings in the header of a safetensors file
# fields that names and shapes tell
_SHAPED = (
    *("patch", "width", "depth", "heads", "mlp_width", "class_token", "registers", "position"),
    *("mlp", "patch_bias", "pre_norm", "qkv_bias"),
)


class OwnSettings(NamedTuple):
    """The network of a file of our own, except for its weights."""

    config: ViTConfig
    pooling: Pooling
    normalised: Normalisation | None  # mean and deviation of red, green and blue in [0, 1]


def read_settings(path: str | Path) -> OwnSettings | None:
    """Returns the settings of a file of Flax variables, or None where it has none.

    Args:
        path: The file. Its own header comes first, then the `config.json` beside it. A
            `config.json` of another form, such as a publisher's, counts for none.

    Returns:
        The config, the pooling, and the mean and deviation of the images.

    Raises:
        UnreadableWeights: The settings have our form, and values that no network can have.
    """
    path = Path(path)
    own = read_metadata(path).get(HEADER) if path.suffix == ".safetensors" else None
    file = path if own is not None else path.with_name("config.json")
    try:
        found = json.loads(file.read_text(encoding="utf-8") if own is None else own)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not (
        isinstance(found.get("model"), dict) and isinstance(found.get("pool"), dict)
    ):
        return None
    try:
        declared = ViTConfig(**found["model"])
        pool = dict(found["pool"])
        pooling = named_pooling(pool.pop("kind"), **pool)
        normalised = _normalisation(found.get("data"))
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableWeights(
            f"{file} does not hold the settings of a ViT of ours: {error!r}"
        ) from None
    return OwnSettings(declared, pooling, normalised)


def describe_settings(model: ViT, normalised: Normalisation | None) -> dict[str, Any]:
    """Returns the contents of the `config.json` of a network.

    Args:
        model: The network.
        normalised: Mean and deviation of red, green and blue in [0, 1]; None: not known.

    Returns:
        Settings that JSON can hold and `read_settings` reads.

    Raises:
        MismatchedWeights: The pooling has no name, or options beside those that have one.
    """
    return {
        "model": dataclasses.asdict(model.config),
        "pool": _describe_pooling(model.pooling),
        "data": {} if normalised is None else {"mean": normalised[0], "std": normalised[1]},
    }


def _describe_pooling(pooling: Pooling) -> dict[str, Any]:
    """The arguments of `named_pooling` for a pooling."""
    options = dict(getattr(pooling, "keywords", {}))
    function = inspect.unwrap(getattr(pooling, "func", pooling))
    if isinstance(pooling, MAP):
        return {"kind": "map"}
    if isinstance(pooling, GGeM) and (pooling.p_range, pooling.eps) == (GGeM.p_range, GGeM.eps):
        options = {name: getattr(pooling, name) for name in ("groups", "layout", "negatives")}
        return {"kind": "ggem", "p": pooling.p_init, **options}
    for name, known in (("cls", cls_pool), ("avg", avg_pool), ("max", max_pool)):
        if function is inspect.unwrap(known) and not options:
            return {"kind": name}
    if function is inspect.unwrap(lse_pool) and set(options) == {"r"}:
        return {"kind": "lse", **options}
    relu_avg = set(options) == {"p", "negatives"} and options["p"] == 1.0
    if function is inspect.unwrap(gem_pool) and relu_avg:
        return {"kind": "relu-avg", "negatives": options["negatives"]}
    raise MismatchedWeights(
        f"config.json has no name for the pooling {pooling!r}: those of"
        " ggem_jax.models.token_pooling.named_pooling have one"
    )


def _normalisation(data: Any) -> Normalisation | None:
    if not isinstance(data, Mapping) or "mean" not in data:
        return None
    mean, std = (tuple(map(float, data[name])) for name in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3 or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
        raise ValueError("data.mean and data.std must be three numbers each, std above 0")
    return mean, std


def fits(declared: ViTConfig, shaped: ViTConfig) -> bool:
    """Returns whether settings are those of the network whose variables these are.

    Args:
        declared: The config in the settings.
        shaped: The config by the names and shapes of the variables.

    Returns:
        True where they agree on all that names and shapes tell.
    """
    return (
        all(getattr(declared, name) == getattr(shaped, name) for name in _SHAPED)
        and (declared.layer_scale is None) == (shaped.layer_scale is None)
        and (declared.image == shaped.image or shaped.position != "learned")
    )
