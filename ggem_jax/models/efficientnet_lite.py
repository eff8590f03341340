"""EfficientNet-Lite in Flax (linen) for inference: images `(b, h, w, 3)`, already normalised ->
feature map `(b, h / 32, w / 32, 1280)`.

It has inverted residual blocks without squeeze-and-excite, ReLU6 throughout, and a stem and a last
convolution that do not grow with the model. Every convolution pads as TensorFlow's "SAME": n pixels
become ceil(n / stride), and of an odd number of padded rows the larger half comes after the image.
The batch norms use their stored statistics (collection `batch_stats`); there is no training mode.

References: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
2019, arXiv:1905.11946 (stages, table 1; scaling); EfficientNet-Lite, 2020,
github.com/tensorflow/tpu, models/official/efficientnet/lite (what Lite changes; coefficients).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

Precision = Literal["default", "high", "highest"]

LEAST_SIDE = 32  # pixels: one feature of the last map
FEATURES = 1280  # channels of the last map, in every variant
STEM_WIDTH = 32  # channels of the first map, in every variant

_NORM_EPS = 1e-3  # efficientnet_lite_builder.py: batch_norm_epsilon
_WIDTH_DIVISOR = 8  # the same file: depth_divisor


@dataclass(frozen=True)
class EfficientNetLiteConfig:
    """How much wider and deeper than Lite0 a model is.

    Raises:
        ValueError: A field is out of its range. The record is checked when it is made.
    """

    width: float  # multiplies the channels of the stages
    depth: float  # multiplies the blocks of the stages, the first and the last stage excepted
    image: int  # side of the square training images, pixels

    def __post_init__(self):
        for name in ("width", "depth"):
            if not (isinstance(getattr(self, name), int | float) and 0 < getattr(self, name) < 100):
                raise ValueError(
                    f"{name} must be a positive number below 100, not {getattr(self, name)!r}"
                )
        if not isinstance(self.image, int | np.integer) or self.image < LEAST_SIDE:
            raise ValueError(
                f"image must be a whole number of at least {LEAST_SIDE}, not {self.image!r}"
            )


# EfficientNet-Lite, efficientnet_lite_builder.py, efficientnet_lite_params
_VARIANTS = {
    "lite0": EfficientNetLiteConfig(width=1.0, depth=1.0, image=224),
    "lite1": EfficientNetLiteConfig(width=1.0, depth=1.1, image=240),
    "lite2": EfficientNetLiteConfig(width=1.1, depth=1.2, image=260),
    "lite3": EfficientNetLiteConfig(width=1.2, depth=1.4, image=280),
    "lite4": EfficientNetLiteConfig(width=1.4, depth=1.8, image=300),
}


def efficientnet_lite_config(variant: str) -> EfficientNetLiteConfig:
    """Returns the config of a published size.

    Args:
        variant: "lite0", "lite1", "lite2", "lite3" or "lite4".

    Returns:
        The config.

    Raises:
        ValueError: The variant is unknown.

    Reference: EfficientNet-Lite, 2020, github.com/tensorflow/tpu, efficientnet_lite_builder.py.
    """
    if variant not in _VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(_VARIANTS)}, not {variant!r}")
    return _VARIANTS[variant]


@dataclass(frozen=True)
class BlockConfig:
    """The sizes of one inverted residual block."""

    channels_in: int  # channels before the block
    channels_out: int  # channels after it
    expansion: int  # channels inside / channels_in
    kernel: int  # side of the depthwise kernel, pixels
    stride: int  # of the depthwise convolution, pixels


# Blocks, kernel, stride, expansion, channels. EfficientNet, table 1 (arXiv:1905.11946), the strides
# from efficientnet_lite_builder.py.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def block_configs(config: EfficientNetLiteConfig) -> list[BlockConfig]:
    """Returns the sizes of the blocks of a model, in order.

    The first block of a stage strides and changes the number of channels.

    Args:
        config: How wide and deep the model is.

    Returns:
        One record for each block.
    """
    blocks, channels_in = [], STEM_WIDTH
    for stage, (count, kernel, stride, expansion, channels) in enumerate(_STAGES):
        channels_out = _scaled_width(channels, config.width)
        if 0 < stage < len(_STAGES) - 1:
            count = ceil(count * config.depth)
        for i in range(count):
            blocks.append(
                BlockConfig(channels_in, channels_out, expansion, kernel, stride if i == 0 else 1)
            )
            channels_in = channels_out
    return blocks


class EfficientNetLite(nn.Module):
    """Images -> feature map; the method `logits` goes on to the classes.

    Images may have any sides of at least 32 pixels.

    Args:
        config: The size, see `efficientnet_lite_config`.
        num_classes: Channels of the classification head; 0 leaves it out.
        precision: Of the convolutions. "highest" keeps float32 where a device would round factors
            (GPUs to TensorFloat-32, TPUs to bfloat16); "default" lets it.
    """

    config: EfficientNetLiteConfig
    num_classes: int = 1000
    precision: Precision = "highest"

    def setup(self):
        self.stem = ConvNorm(STEM_WIDTH, 3, 2, precision=self.precision)
        self.blocks = [Block(block, self.precision) for block in block_configs(self.config)]
        self.last = ConvNorm(FEATURES, 1, precision=self.precision)
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, precision=self.precision)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b rows columns 1280"]:
        """Returns the feature map of images `(b, h, w, 3)`; raises `ValueError` for another shape
        and `TypeError` for images that are not floating point.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < LEAST_SIDE:
            raise ValueError(
                f"images must be (b, h, w, 3) with h and w of at least {LEAST_SIDE}, not of shape"
                f" {images.shape}"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(f"images must be floating point and normalised, not {images.dtype}")
        features = nn.relu6(self.stem(images))
        for block in self.blocks:
            features = block(features)
        features = nn.relu6(self.last(features))
        if self.is_initializing() and self.num_classes:
            self.head(jnp.mean(features, axis=(1, 2)))  # so that `init` makes the head too
        return features

    def logits(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b classes"]:
        """Returns the class logits of images: the mean over the feature map, then a dense layer.

        It is called as `model.apply(variables, images, method="logits")`.

        Args:
            images: Normalised images, `(b, h, w, 3)`, with h and w of at least 32 pixels.

        Returns:
            The logits, `(b, classes)`.

        Raises:
            ValueError: The model has no classification head, or the images have another shape.
            TypeError: The images are not floating point.
        """
        if not self.num_classes:
            raise ValueError(
                "logits needs a model with a classification head, not one of num_classes=0"
            )
        return self.head(jnp.mean(self(images), axis=(1, 2)))


class Block(nn.Module):
    """Inverted residual block: expand, filter channel by channel, project; then add the input.

    The input is added where the shapes agree.

    Args:
        config: The sizes.
        precision: Of the convolutions.
    """

    config: BlockConfig
    precision: Precision = "highest"

    @nn.compact
    def __call__(self, features: Float[Array, "b h w c"]) -> Float[Array, "b rows columns d"]:
        c = self.config
        hidden = features
        if c.expansion > 1:
            hidden = nn.relu6(
                ConvNorm(c.channels_in * c.expansion, 1, precision=self.precision, name="expand")(
                    hidden
                )
            )
        hidden = nn.relu6(
            ConvNorm(
                c.channels_in * c.expansion, c.kernel, c.stride, depthwise=True, name="depthwise"
            )(hidden)
        )
        hidden = ConvNorm(c.channels_out, 1, precision=self.precision, name="project")(hidden)
        return hidden + features if hidden.shape == features.shape else hidden


class ConvNorm(nn.Module):
    """A convolution without bias and its batch norm.

    Args:
        channels: Channels after it.
        kernel: Side of the kernel, pixels.
        stride: Step of the kernel, pixels.
        depthwise: Whether each channel has a filter of its own; channels then stay as many.
        precision: Of the convolution.
    """

    channels: int
    kernel: int
    stride: int = 1
    depthwise: bool = False
    precision: Precision = "highest"

    @nn.compact
    def __call__(self, features: Float[Array, "b h w c"]) -> Float[Array, "b rows columns d"]:
        side = (self.kernel, self.kernel)
        if self.depthwise:
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (*side, 1, self.channels))
            features = depthwise_conv(features, kernel, stride=self.stride)
        else:
            kernel = self.param(
                "kernel", nn.initializers.lecun_normal(), (*side, features.shape[-1], self.channels)
            )
            features = lax.conv_general_dilated(
                features,
                kernel,
                (self.stride, self.stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=self.precision,
            )
        return nn.BatchNorm(use_running_average=True, epsilon=_NORM_EPS, name="norm")(features)


def depthwise_conv(
    features: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], *, stride: int = 1
) -> Float[Array, "b rows columns c"]:
    """Returns a map with every channel convolved with its own filter, as a sum of shifted maps.

    XLA's convolution with as many groups as channels is 10 to 100 times as slow on a CPU; this sum
    becomes one loop there, on GPUs and on TPUs.

    Args:
        features: The map, `(b, h, w, c)`.
        kernel: The filters, `(k, k, 1, c)`.
        stride: Step of the filters, pixels.

    Returns:
        The map, `(b, ceil(h / stride), ceil(w / stride), c)`, padded as TensorFlow's "SAME".
    """
    reach, sides = kernel.shape[:2], features.shape[1:3]
    features = jnp.pad(
        features, [(0, 0), *lax.padtype_to_pads(sides, reach, (stride, stride), "SAME"), (0, 0)]
    )
    rows, columns = (ceil(side / stride) for side in sides)

    def shifted(i: int, j: int) -> Array:
        return features[
            :, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride
        ]

    products: Sequence[Array] = [
        shifted(i, j) * kernel[i, j, 0] for i in range(reach[0]) for j in range(reach[1])
    ]
    return sum(products[1:], start=products[0])


def _scaled_width(channels: int, width: float) -> int:
    """The nearest multiple of 8, or the next one up where that would lose more than a tenth."""
    exact = channels * width
    rounded = max(
        _WIDTH_DIVISOR, int(exact + _WIDTH_DIVISOR / 2) // _WIDTH_DIVISOR * _WIDTH_DIVISOR
    )
    return rounded + _WIDTH_DIVISOR if rounded < 0.9 * exact else rounded
