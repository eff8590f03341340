"""The networks that descriptors are made with, by name: parameters from files, and what their
pictures must look like.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

from ggem_jax.files.images import IMAGENET_MEAN, IMAGENET_STD
from ggem_jax.models.resnet import ResNet, ResNetConfig, resnet_config
from ggem_jax.models.vit import ViT, vit_config
from ggem_jax.pooling import avg_pool
from ggem_jax.weights import MismatchedWeights, read_cvnet, read_safetensors
from ggem_jax.weights.convert import Parameter, to_variables
from ggem_jax.weights.efficientnet_lite import LITE0_PREPROCESSING, load_pretrained


@dataclass(frozen=True)
class Network:
    """A network with its parameters."""

    # images (b, h, w, 3) -> map (b, rows, columns, channels), with the methods that
    # `ggem_jax.descriptors.superglobal` tells of
    model: Any
    variables: Any
    mean: tuple[float, float, float]  # of red, green and blue in [0, 1]: subtracted,
    std: tuple[float, float, float]  # and divided by
    stride: int  # pixels along one side of a place of the map
    pads: bool = (
        True  # whether less than a stride at the border makes a place too; otherwise it is cut off
    )


@dataclass(frozen=True)
class PatchMap:
    """A ViT as a network of maps: its patch tokens after the final norm, row by row; what is less
    than a patch at the right and below is cut off.
    """

    vit: ViT

    def apply(
        self, variables: Any, images: Float[Array, "b h w 3"]
    ) -> Float[Array, "b rows columns d"]:
        config = self.vit.config
        rows, columns = (length // config.patch for length in images.shape[1:3])
        output: Any = self.vit.apply(
            variables, images[:, : rows * config.patch, : columns * config.patch]
        )
        return output.tokens[:, config.prefix_tokens :].reshape(
            len(images), rows, columns, config.width
        )


def load_network(backbone: str, weights: str | Path | None = None) -> Network:
    """A network by its name in `ggem_jax.descriptors.settings`, with its parameters on the default
    device.

    Weights: for a ResNet a checkpoint of CVNet, `.pth` or `.safetensors`; for a ViT a safetensors
    file of Flax variables, see `read_vit`. Raises `ValueError` for a file that cannot be read or
    does not fit, and `ModuleNotFoundError` where the weights of EfficientNet-Lite0 are not
    installed.
    """
    if backbone == "efficientnet-lite0":
        lite, variables = load_pretrained()
        network = Network(
            lite.clone(num_classes=0),
            _without_head(variables),
            LITE0_PREPROCESSING.mean,
            LITE0_PREPROCESSING.std,
            32,
        )
    elif weights is None:
        raise ValueError(f"{backbone} needs a file of weights")
    elif backbone.startswith("resnet"):
        depths, variables = read_cvnet(
            weights, depths=resnet_config(backbone.removeprefix("resnet")).depths
        )
        network = Network(ResNet(ResNetConfig(depths)), variables, IMAGENET_MEAN, IMAGENET_STD, 32)
    else:
        vit, variables = read_vit(weights, backbone.removeprefix("vit-"))
        network = Network(
            PatchMap(vit), variables, IMAGENET_MEAN, IMAGENET_STD, vit.config.patch, pads=False
        )
    return replace(network, variables=jax.device_put(network.variables))


def read_vit(path: str | Path, variant: str) -> tuple[ViT, dict[str, Any]]:
    """A ViT of `ggem_jax.models.vit` from a safetensors file of its parameters, named as Flax does:
    `params/blocks_0/mlp/in/kernel`.

    Such a file is made by `write_safetensors(path, flax.traverse_util.flatten_dict({"params":
    params}, sep="/"))`; parameters of a pooling or a head are left out. Class token, registers and
    the size of the training images are found by the shapes. `MismatchedWeights` lists all that does
    not fit.
    """
    arrays = {
        name: value
        for name, value in read_safetensors(path).items()
        if name.split("/")[1:2] not in (["head"], ["pool"], ["pooling"])
    }
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
                f"{path} has {len(position)} positions, which are no square of patches"
            )
        changes["image"] = side * vit_config(variant).patch
    vit = ViT(vit_config(variant, **changes), pooling=avg_pool)
    shapes = jax.eval_shape(
        vit.init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, vit.config.image, vit.config.image, 3), jnp.float32),
    )
    table = {
        "/".join(names): Parameter(names, leaf.shape)
        for names, leaf in traverse_util.flatten_dict(shapes).items()
    }
    return vit, to_variables(arrays, table, source=str(path))


def _without_head(variables: dict[str, Any]) -> dict[str, Any]:
    return {
        kind: {name: value for name, value in own.items() if name != "head"}
        for kind, own in variables.items()
    }
