"""Files of our own: the Flax variables of a `ViT`, named by their paths, such as
`params/blocks_0/mlp/in/kernel`.

`export_vit` writes such a file with its settings in the header, and a `config.json` beside it.
`write_safetensors(path, flax.traverse_util.flatten_dict(variables, sep="/"))` writes one without
settings.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ggem_jax.files.arrays import read_arrays
from ggem_jax.files.errors import MismatchedWeights
from ggem_jax.files.normalisation import IMAGENET
from ggem_jax.models.config import ViTConfig, vit_config
from ggem_jax.models.token_pooling import MAP, GGeM, Pooling
from ggem_jax.models.vit import ViT
from ggem_jax.pooling import avg_pool
from ggem_jax.weights.convert import Parameter, to_variables
from ggem_jax.weights.own_settings import (
    Facts,
    OwnSettings,
    misfits,
    read_settings,
    settings_file,
    states_in_header,
)

Arrays = Mapping[str, np.ndarray]

OWN_NAME = r"params/(patch_embedding|blocks_\d+|norm)/.*"  # a name that only such files have

AFTER_TOKENS = ("head", "pool", "pooling", "projection")  # parts of a network beside its tokens

# fields of `ViTConfig` that change nothing in a network with its parameters
_OF_TRAINING = ("layer_scale", "drop_path", "dropout", "remat")


def read_own_vit(
    path: str | Path,
    variant: str | None = None,
    *,
    position: Literal["sincos", "rope"] | None = None,
    network: Mapping[str, Any] | None = None,
) -> tuple[ViT, dict[str, Any]]:
    """Returns the ViT and the variables of a file of Flax variables, without pooling and head.

    Args:
        path: The file, `.safetensors` or `.npz`.
        variant: The size that the file must have, such as "S/16" (see `vit_config`); None reads the
            sizes from the shapes. Everything else, such as the class token, the registers and the
            size of the training images, is always read from the shapes.
        position: How places are told apart where the file has no table of positions. None: "rope"
            where queries have a bias and keys have none, "sincos" where both have one.
        network: Fields of `ViTConfig` that take the place of a `config.json` beside the file, which
            is not read then (see `settings_beside`).

    Returns:
        The model, with `avg_pool` and no head, and its variables, NumPy arrays in float32. What
        shapes do not tell (the GELU, the epsilon of the norms, their order with the pooling, the
        base of a rope) comes from the header of the file or the `config.json` beside it
        (`own_settings`); without either, these are the defaults of `ViTConfig`.

    Raises:
        UnreadableWeights: The file cannot be read.
        MismatchedWeights: It does not hold a ViT of ours, or one of another size; the message lists
            every parameter that does not fit. Or nothing tells how places are told apart.
    """
    arrays = {
        name: value
        for name, value in read_arrays(path).items()
        if name.split("/")[1:2] not in ([part] for part in AFTER_TOKENS)
    }
    settings = own_settings(arrays, path, variant, position=position, network=network)
    model = ViT(settings.config, avg_pool)
    return model, fit_variables(model, arrays, source=str(path))


def holds_own_vit(arrays: Arrays) -> bool:
    """Returns whether parameters are named as in a file of our own.

    Args:
        arrays: The arrays of a file by their names.
    """
    return any(re.fullmatch(OWN_NAME, name) for name in arrays)


def own_config(
    arrays: Arrays,
    variant: str | None = None,
    *,
    position: Literal["sincos", "rope"] | None = None,
    source: str,
) -> ViTConfig:
    """Returns the config of the ViT whose variables these are, by their names and shapes.

    Args:
        arrays: The variables by their paths.
        variant: The size, such as "S/16"; None reads it from the shapes.
        position: As in `read_own_vit`.
        source: The file, for messages.

    Returns:
        The config, with the defaults of `ViTConfig` for what shapes do not tell.

    Raises:
        MismatchedWeights: The names or shapes are not those of a ViT of ours, or nothing tells how
            places are told apart.
    """
    config = _sizes_of(arrays, source) if variant is None else vit_config(variant)
    table, registers = (arrays.get(f"params/{name}") for name in ("position", "registers"))
    class_token = "params/class_token" in arrays
    found: dict[str, Any] = {
        "class_token": class_token,
        "registers": 0 if registers is None else next(iter(registers.shape), 0),
        "position": "learned" if table is not None else position or _position_of(arrays, source),
        "layer_scale": 1e-5 if "params/blocks_0/layer_scale_1" in arrays else None,
        "patch_bias": "params/patch_embedding/bias" in arrays,
        "pre_norm": "params/norm_pre/scale" in arrays,
        "qkv_bias": "params/blocks_0/attention/query/bias" in arrays,
    }
    if table is not None:
        places = next(iter(np.shape(table)), 0)
        side = math.isqrt(max(places - class_token, 0))
        if not side or side * side != places - class_token:
            raise MismatchedWeights(
                f"{source} has {places} positions, which are no square of patches"
            )
        found["image"] = side * config.patch
    try:
        return dataclasses.replace(config, **found)
    except ValueError as error:
        raise MismatchedWeights(f"{source}: {error}") from None


def own_pooling(arrays: Arrays) -> Pooling:
    """Returns the pooling whose parameters are among the variables, `avg_pool` if there are none.

    Exponents are taken for those of a contiguous `GGeM`: their shape does not say the layout.

    Args:
        arrays: The variables by their paths, such as `params/pool/p`.
    """
    if (p := arrays.get("params/pool/p")) is not None:
        return GGeM(groups=next(iter(p.shape), 1))
    return MAP() if "params/pool/query" in arrays else avg_pool


def own_settings(
    arrays: Arrays,
    path: str | Path,
    variant: str | None = None,
    *,
    position: Literal["sincos", "rope"] | None = None,
    network: Mapping[str, Any] | None = None,
) -> OwnSettings:
    """Returns the network of a file of our own, except for its weights.

    Args:
        arrays: The variables by their paths.
        path: The file. The settings in its header, or else those of a `config.json` beside it,
            decide what names and shapes leave open. Their sizes must be those of the variables.
        variant: The size, such as "S/16"; None reads it from the shapes.
        position: As in `read_own_vit`; None: by the settings as well.
        network: As in `read_own_vit`.

    Returns:
        The config, the pooling, and the mean and deviation of the images. Without settings, these
        are the defaults of `ViTConfig`, the pooling of `own_pooling`, and ImageNet's.

    Raises:
        MismatchedWeights: As `own_config`, or the settings are of another network.
        UnreadableWeights: As `read_settings`.
    """
    if network is None or states_in_header(path):
        declared = declared_settings(arrays, path, variant, position=position)
        if declared is not None:
            return declared
    fields = dict(network or {})
    hint = position or fields.get("position")
    config = own_config(arrays, variant, position=hint, source=str(path))
    try:
        config = dataclasses.replace(config, **fields)
    except (TypeError, ValueError) as error:
        raise MismatchedWeights(f"{path} is not of the network that is recorded: {error}") from None
    return OwnSettings(config, own_pooling(arrays), IMAGENET, Facts())


def declared_settings(
    arrays: Arrays,
    path: str | Path,
    variant: str | None = None,
    *,
    position: Literal["sincos", "rope"] | None = None,
) -> OwnSettings | None:
    """Returns the settings that a file of our own, or a `config.json` beside it, states.

    Args:
        arrays: The variables by their paths.
        path: The file.
        variant: As in `own_settings`.
        position: As in `own_settings`.

    Returns:
        The settings; None where there are none.

    Raises:
        MismatchedWeights: As `own_config`, or the settings are of another network.
        UnreadableWeights: As `read_settings`.
    """
    declared = read_settings(path)
    if declared is None:
        return None
    hint = position or declared.config.position
    shaped = own_config(
        arrays, variant, position=None if hint == "learned" else hint, source=str(path)
    )
    if wrong := misfits(declared.config, shaped):
        if states_in_header(path):
            raise MismatchedWeights(
                f"the settings in the header of {path} are of another network: {', '.join(wrong)};"
                " write the file again from where it came (python -m ggem_jax.weights convert)"
            )
        raise MismatchedWeights(
            f"{settings_file(Path(path))} is of another network than {path}: {', '.join(wrong)};"
            " move one of them into another folder, as nothing else says the settings"
        )
    return declared


def settings_beside(arrays: Arrays, path: str | Path, variant: str | None = None) -> dict[str, Any]:
    """Returns what a `config.json` beside a file of our own says of its network.

    Args:
        arrays: The variables by their paths.
        path: The file.
        variant: As in `own_settings`.

    Returns:
        The fields of `ViTConfig` in which the network is not the one that would be read without
        that `config.json`, as JSON values; none where the file has settings in its header.

    Raises:
        MismatchedWeights: As `own_settings`.
        UnreadableWeights: As `own_settings`.
    """
    declared = None if states_in_header(path) else declared_settings(arrays, path, variant)
    if declared is None:
        return {}
    stated = dataclasses.asdict(declared.config)
    try:
        alone = dataclasses.asdict(own_config(arrays, variant, source=str(path)))
    except MismatchedWeights:  # nothing but the settings tells how places are told apart
        hint: Any = declared.config.position
        alone = dataclasses.asdict(own_config(arrays, variant, position=hint, source=str(path)))
        alone["position"] = None
    names = [name for name in stated if name not in _OF_TRAINING]
    return {name: stated[name] for name in names if stated[name] != alone[name]}


def fit_variables(model: ViT, arrays: Arrays, *, source: str) -> dict[str, Any]:
    """Returns the variables of a model from arrays by their paths, in float32.

    Args:
        model: The model.
        arrays: Its variables, such as `{"params/norm/scale": ...}`.
        source: Where they come from, for messages.

    Returns:
        The variables as `model.apply` takes them.

    Raises:
        MismatchedWeights: Names and shapes are not exactly those of the model; all are listed.
    """
    side = model.config.image
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    try:
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    except (TypeError, ValueError) as error:  # of a pooling that does not fit the channels
        raise MismatchedWeights(f"{source} holds a ViT that cannot be: {error}") from None
    table = {
        "/".join(path): Parameter(path, leaf.shape)
        for path, leaf in traverse_util.flatten_dict(shapes).items()
    }
    return to_variables(arrays, table, source=source)


def _position_of(arrays: Arrays, source: str) -> str:
    """How places are told apart without a table: keys have a bias, but not with a rope."""
    query, key = (f"params/blocks_0/attention/{part}/bias" in arrays for part in ("query", "key"))
    if not query:
        raise MismatchedWeights(
            f"{source} has neither a table of positions nor biases of queries and keys, so that"
            " sincos and rope positions cannot be told apart: read it with"
            " read_own_vit(path, position='sincos') or position='rope'"
        )
    return "sincos" if key else "rope"


def _sizes_of(arrays: Arrays, source: str) -> ViTConfig:
    """The sizes that the shapes of the patch embedding and of the first block tell."""
    axes = {
        "params/patch_embedding/kernel": 4,
        "params/blocks_0/attention/query/kernel": 3,
        "params/blocks_0/mlp/in/kernel": 2,
        "params/blocks_0/mlp/out/kernel": 2,
    }
    if odd := [name for name in axes if np.ndim(arrays.get(name, 0)) != axes[name]]:
        raise MismatchedWeights(
            f"{source} is no ViT by our names: {', '.join(odd)} missing or of an unexpected shape"
        )
    embedding, query, hidden, out = (arrays[name].shape for name in axes)
    blocks = {match[1] for name in arrays if (match := re.match(r"params/blocks_(\d+)/", name))}
    try:
        return ViTConfig(
            patch=embedding[0],
            width=embedding[-1],
            depth=len(blocks),
            heads=query[1],
            mlp_width=out[0],
            # without a table, where images of every size can be read: the usual size
            image=max(224 // max(embedding[0], 1), 1) * embedding[0],
            mlp="swiglu" if hidden[1] == 2 * out[0] else "gelu",
        )
    except ValueError as error:
        raise MismatchedWeights(f"{source}: {error}") from None
