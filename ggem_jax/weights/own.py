"""Files of our own: the Flax variables of a `ViT`, named by their paths, such as
`params/blocks_0/mlp/in/kernel`.

`write_safetensors(path, flax.traverse_util.flatten_dict(variables, sep="/"))` makes such a file.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ggem_jax.files.arrays import read_arrays
from ggem_jax.files.errors import MismatchedWeights
from ggem_jax.models.config import ViTConfig, vit_config
from ggem_jax.models.token_pooling import MAP, GGeM, Pooling
from ggem_jax.models.vit import ViT
from ggem_jax.pooling import avg_pool
from ggem_jax.weights.convert import Parameter, to_variables

Arrays = Mapping[str, np.ndarray]

_PATCHES = "params/patch_embedding/kernel"


def read_own_vit(path: str | Path, variant: str | None = None) -> tuple[ViT, dict[str, Any]]:
    """Returns the ViT and the variables of a file of Flax variables, without pooling and head.

    Args:
        path: The file, `.safetensors` or `.npz`.
        variant: The size that the file must have, such as "S/16" (see `vit_config`); None reads the
            sizes from the shapes. Everything else, such as the class token, the registers and the
            size of the training images, is always read from the shapes.

    Returns:
        The model, with `avg_pool` and no head, and its variables, NumPy arrays in float32. What
        shapes do not tell (the GELU, the epsilon of the norms, their order with the pooling) are
        the defaults of `ViTConfig`.

    Raises:
        UnreadableWeights: The file cannot be read.
        MismatchedWeights: It does not hold a ViT of ours, or one of another size; the message lists
            every parameter that does not fit.
    """
    arrays = {
        name: value
        for name, value in read_arrays(path).items()
        if name.split("/")[1:2] not in (["head"], ["pool"], ["pooling"])
    }
    model = ViT(own_config(arrays, variant, source=str(path)), avg_pool)
    return model, fit_variables(model, arrays, source=str(path))


def holds_own_vit(arrays: Arrays) -> bool:
    """Returns whether parameters are named as in a file of our own."""
    return _PATCHES in arrays


def own_config(arrays: Arrays, variant: str | None = None, *, source: str) -> ViTConfig:
    """Returns the config of the ViT whose variables these are, by their names and shapes.

    Args:
        arrays: The variables by their paths.
        variant: The size, such as "S/16"; None reads it from the shapes.
        source: The file, for messages.

    Returns:
        The config, with the defaults of `ViTConfig` for what shapes do not tell.

    Raises:
        MismatchedWeights: The names or shapes are not those of a ViT of ours.
    """
    registers = arrays.get("params/registers")
    try:
        config = _sizes_of(arrays) if variant is None else vit_config(variant)
        found = {
            "class_token": "params/class_token" in arrays,
            "registers": 0 if registers is None else len(registers),
            "position": "learned" if "params/position" in arrays else "sincos",
            "layer_scale": 1e-5 if "params/blocks_0/layer_scale_1" in arrays else None,
            "patch_bias": "params/patch_embedding/bias" in arrays,
            "pre_norm": "params/norm_pre/scale" in arrays,
            "qkv_bias": "params/blocks_0/attention/query/bias" in arrays,
        }
        if "params/position" in arrays:
            patches = len(arrays["params/position"]) - int(found["class_token"])
            found["image"] = _side_of(patches) * config.patch
        return dataclasses.replace(config, **found)
    except KeyError as error:
        raise MismatchedWeights(f"{source} holds no ViT of ours: it has no {error}") from None
    except (ValueError, TypeError) as error:
        raise MismatchedWeights(f"{source} holds no ViT of ours: {error}") from None


def own_pooling(arrays: Arrays) -> Pooling:
    """Returns the pooling whose parameters are among the variables, `avg_pool` if there are none.

    Exponents are those of a contiguous `GGeM`, which is not to be told from another layout.
    """
    if (p := arrays.get("params/pool/p")) is not None:
        return GGeM(groups=len(p))
    return MAP() if "params/pool/query" in arrays else avg_pool


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
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    table = {
        "/".join(path): Parameter(path, leaf.shape)
        for path, leaf in traverse_util.flatten_dict(shapes).items()
    }
    return to_variables(arrays, table, source=source)


def _sizes_of(arrays: Arrays) -> ViTConfig:
    """The sizes that the shapes of the kernels tell."""
    block = "params/blocks_0"
    patch, _, _, width = arrays[_PATCHES].shape
    _, heads, _ = arrays[f"{block}/attention/query/kernel"].shape
    hidden = arrays[f"{block}/mlp/in/kernel"].shape[-1]
    mlp_width = arrays[f"{block}/mlp/out/kernel"].shape[0]
    numbers = (re.fullmatch("params/blocks_([0-9]{1,4})/.*", name) for name in arrays)
    return ViTConfig(
        patch=patch,
        width=width,
        depth=1 + max(int(number[1]) for number in numbers if number),
        heads=heads,
        mlp_width=mlp_width,
        # for a sincos position, which every size of images can have, the usual size
        image=max(224 // patch, 1) * patch,
        mlp="swiglu" if hidden == 2 * mlp_width else "gelu",
    )


def _side_of(patches: int) -> int:
    side = math.isqrt(max(patches, 0))
    if not side or side * side != patches:
        raise ValueError(f"{patches} positions of patches are not the square of a whole number")
    return side
