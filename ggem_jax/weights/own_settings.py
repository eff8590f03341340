"""The settings of a file of our own: what the names and shapes of Flax variables do not tell.

They are in the header of the safetensors file, so that they stay with the weights, and in a
`config.json` beside it, for people. Both have the form of a training run's settings:
`model` holds the fields of `ViTConfig`, `pool` the arguments of `named_pooling`, `data` the mean
and deviation of the images and how they are cut, and `data_found` the names of the classes.
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
from ggem_jax.files.preprocessing import Preprocessing
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
    facts: "Facts"  # of the training


class Facts(NamedTuple):
    """What the settings of a training say beside its network; None: they do not say it."""

    preprocessing: Preprocessing | None = None  # how an image of any size becomes an input
    classes: tuple[str, ...] | None = None  # names of the channels of the head
    several_labels: bool = False  # whether an image may have several of the classes, or none


def read_settings(path: str | Path) -> OwnSettings | None:
    """Returns the settings of a file of Flax variables, or None where it has none.

    Args:
        path: The file. Its own header comes first, then the `config.json` beside it. A
            `config.json` of another form, such as a publisher's, counts for none.

    Returns:
        The config, the pooling, and the mean and deviation of the images.

    Raises:
        UnreadableWeights: The header is damaged, the `config.json` is no JSON, or the settings have
            our form, and values that no network can have.
    """
    path = Path(path)
    own = read_metadata(path).get(HEADER) if path.suffix == ".safetensors" else None
    file = settings_file(path) if own is None else path
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8") if own is None else own)
    except (OSError, ValueError, RecursionError) as error:
        what = f"{file} is not readable JSON" if own is None else f"{_header_of(path)} is damaged"
        advice = "remove it, or put the right one there" if own is None else _WRITE_AGAIN
        reason = str(error).partition(chr(10))[0][:200]
        raise UnreadableWeights(f"{what}, and holds the settings ({reason}): {advice}") from None
    if not isinstance(found, dict) or not (
        isinstance(found.get("model"), dict) and isinstance(found.get("pool"), dict)
    ):
        if own is None:
            return None
        raise UnreadableWeights(
            f"{_header_of(path)} lacks settings: it must hold model and pool; {_WRITE_AGAIN}"
        )
    try:
        declared = ViTConfig(**found["model"])
        pool = dict(found["pool"])
        pooling = named_pooling(pool.pop("kind"), **pool)
        normalised = _normalisation(found.get("data"))
        facts = read_facts(found, declared)
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableWeights(
            f"{file} does not hold the settings of a ViT of ours: {error!r}"
        ) from None
    return OwnSettings(declared, pooling, normalised, facts)


_WRITE_AGAIN = "write the file again from where it came (python -m ggem_jax.weights convert)"


def settings_file(path: Path) -> Path:
    """Returns the `config.json` beside a file of weights.

    Args:
        path: The file of weights.
    """
    return path.with_name("config.json")


def states_in_header(path: str | Path) -> bool:
    """Returns whether a file of our own has settings in its header.

    Args:
        path: The file.

    Raises:
        UnreadableWeights: The file cannot be read.
    """
    return Path(path).suffix == ".safetensors" and HEADER in read_metadata(path)


def _header_of(path: Path) -> str:
    return f"the header of {path}, {HEADER},"


def read_facts(settings: Mapping[str, Any], config: ViTConfig) -> Facts:
    """Returns what settings say of a training beside its network.

    Args:
        settings: Settings in the form of a training run's.
        config: The network, whose size the images are cut to.

    Raises:
        KeyError, TypeError, ValueError: A value is of another form, or impossible.
    """
    data, found = settings.get("data") or {}, settings.get("data_found") or {}
    preprocessing = None
    if "eval_crop" in data:
        cut = (data["eval_crop"], float(data["eval_zoom"]), data["mean"], data["std"])
        preprocessing = Preprocessing(config.image, *cut)
    names = found.get("classes")
    classes = None if names is None else tuple(map(str, names))
    return Facts(preprocessing, classes, bool(found.get("several_labels")))


def describe_settings(
    model: ViT,
    normalised: Normalisation | None,
    facts: Facts = Facts(),  # noqa: B008, a constant
) -> dict[str, Any]:
    """Returns the contents of the `config.json` of a network.

    Args:
        model: The network.
        normalised: Mean and deviation of red, green and blue in [0, 1]; None: not known.
        facts: What is known of its training.

    Returns:
        Settings that JSON can hold and `read_settings` reads.

    Raises:
        MismatchedWeights: The pooling has no name, or options beside those that have one.
    """
    data: dict[str, Any] = {}
    if normalised is not None:
        data |= {"mean": normalised[0], "std": normalised[1]}
    if (how := facts.preprocessing) is not None:
        data |= {"eval_crop": how.crop, "eval_zoom": how.zoom}
    settings = {
        "model": dataclasses.asdict(model.config),
        "pool": _describe_pooling(model.pooling),
        "data": data,
    }
    if facts.classes is None:
        return settings
    found = {"classes": list(facts.classes)}
    several = {"several_labels": True} if facts.several_labels else {}
    return settings | {"data_found": found | several}


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


def misfits(declared: ViTConfig, shaped: ViTConfig) -> list[str]:
    """Returns in what settings are not those of the network whose variables these are.

    Args:
        declared: The config in the settings.
        shaped: The config by the names and shapes of the variables.

    Returns:
        Each field in which they contradict what names and shapes tell, with both values.
    """
    names = [name for name in _SHAPED if getattr(declared, name) != getattr(shaped, name)]
    if (declared.layer_scale is None) != (shaped.layer_scale is None):
        names.append("layer_scale")
    if declared.image != shaped.image and shaped.position == "learned":
        names.append("image")
    return [
        f"{name} {getattr(declared, name)} where the weights have {getattr(shaped, name)}"
        for name in names
    ]
