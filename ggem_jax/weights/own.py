"""Our own files of a `ViT`: safetensors whose arrays have the names of its Flax variables.

Such a file is made by

    write_safetensors(path, flax.traverse_util.flatten_dict({"params": params}, sep="/"))

or by `python -m ggem_jax.weights convert FILE OUT.safetensors`, and names its parameters
`params/blocks_0/mlp/in/kernel`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ggem_jax.files.errors import MismatchedWeights
from ggem_jax.files.safetensors_files import read_safetensors
from ggem_jax.models.vit import ViT, ViTConfig, vit_config
from ggem_jax.pooling import avg_pool
from ggem_jax.weights.convert import Parameter, to_variables

OWN_NAME = r"params/(patch_embedding|blocks_\d+|norm)/.*"  # a name that only such files have
_NOT_READ = ("head", "pool", "pooling")


def read_own_vit(path: str | Path, variant: str | None = None) -> tuple[ViT, dict[str, Any]]:
    """Returns a `ViT` without a head, pooled by the mean, and its variables.

    The class token, registers, positions and the size of the training images are found from the
    shapes. Parameters of a pooling or a head are left out.

    Args:
        path: a `.safetensors` file of Flax variables, as the module says.
        variant: the sizes the file must have, such as "S/16"; None finds them from the shapes.
            What no shape says (GELU, epsilon of the norms) is the default of `ViTConfig`.

    Raises:
        UnreadableWeights: the file cannot be read.
        MismatchedWeights: parameters are missing, surplus or of another shape; the message lists
            all of them.
    """
    arrays = {
        name: value
        for name, value in read_safetensors(path).items()
        if name.split("/")[1:2] not in [[name] for name in _NOT_READ]
    }
    sizes = vars(vit_config(variant)) if variant else _sizes(arrays, str(path))
    vit = ViT(_config(arrays, sizes, str(path)), pooling=avg_pool)
    images = jax.ShapeDtypeStruct((1, vit.config.image, vit.config.image, 3), jnp.float32)
    shapes = jax.eval_shape(vit.init, jax.random.key(0), images)
    table = {
        "/".join(names): Parameter(names, leaf.shape)
        for names, leaf in traverse_util.flatten_dict(shapes).items()
    }
    return vit, to_variables(arrays, table, source=str(path))


def _sizes(arrays: Mapping[str, np.ndarray], source: str) -> dict[str, Any]:
    """The sizes that the shapes of the first block and of the patch embedding say."""
    wanted = {
        "params/patch_embedding/kernel": 4,
        "params/blocks_0/attention/query/kernel": 3,
        "params/blocks_0/mlp/in/kernel": 2,
        "params/blocks_0/mlp/out/kernel": 2,
    }
    if odd := [name for name, axes in wanted.items() if np.ndim(arrays.get(name, 0)) != axes]:
        raise MismatchedWeights(
            f"{source} is no ViT by our names: {', '.join(odd)} missing or of an unexpected shape"
        )
    embedding, query, first, second = (arrays[name].shape for name in wanted)
    blocks = {
        int(match[1]) for name in arrays if (match := re.match(r"params/blocks_(\d+)/", name))
    }
    return {
        "patch": embedding[0],
        "width": embedding[-1],
        "depth": len(blocks),
        "heads": query[1],
        "mlp_width": second[0],
        "mlp": "swiglu" if first[1] == 2 * second[0] else "gelu",
        "layer_scale": 1e-5 if "params/blocks_0/layer_scale_1" in arrays else None,
        "patch_bias": "params/patch_embedding/bias" in arrays,
        "pre_norm": "params/norm_pre/scale" in arrays,
        "qkv_bias": "params/blocks_0/attention/query/bias" in arrays,
    }


def _config(arrays: Mapping[str, np.ndarray], sizes: dict[str, Any], source: str) -> ViTConfig:
    """The sizes with what prefix tokens and positions of the file say."""
    position, registers = arrays.get("params/position"), arrays.get("params/registers")
    class_token = "params/class_token" in arrays
    changes: dict[str, Any] = {
        "class_token": class_token,
        "registers": 0 if registers is None else len(registers),
    }
    if position is None:
        changes["position"] = "sincos"
    else:
        side = round((len(position) - class_token) ** 0.5)
        if side < 1 or side * side != len(position) - class_token:
            raise MismatchedWeights(
                f"{source} has {len(position)} positions, which are no square of patches"
            )
        changes["image"] = side * sizes["patch"]
    try:
        return ViTConfig(**sizes | changes)
    except ValueError as error:
        raise MismatchedWeights(f"{source}: {error}") from None
