"""ResNet in Flax (linen) as SuperGlobal needs it: image -> feature map, and a head that turns
pooled maps into descriptors.

Images are `(b, height, width, 3)`, RGB and already normalised. Feature maps are `(b, h, w,
channels)` with h and w a thirty-second of the image's, rounded up. The layout is that of pycls:
bottlenecks with the stride on the 3 x 3 convolution, convolutions without bias, and batch norms
that use their stored statistics; there is no training mode. Scale and bias of the norms are in
`params`, mean and variance in `batch_stats`.

References: He et al., "Deep Residual Learning for Image Recognition", 2016, arXiv:1512.03385, table
1 (depths and widths); Lee et al., "Correlation Verification for Image Retrieval", 2022,
arXiv:2204.01458 (CVNet, the weights); Shao et al., "Global Features are All You Need for Image
Retrieval and Reranking", 2023, arXiv:2308.06954 (SuperGlobal), and its code:
github.com/ShihaoShao-GH/SuperGlobal.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from ggem_jax.pooling import gem_pool, l2_normalize, relup

RELUP_ALPHA = 0.014  # of the official code

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ResNetConfig:
    """The sizes and options of a `ResNet`.

    Raises:
        ValueError: A field is out of its range. The record is checked when it is made.
    """

    depths: tuple[int, int, int, int]  # blocks of the four stages
    # channels of the stages' maps; a quarter of them inside a block
    widths: tuple[int, int, int, int] = (256, 512, 1024, 2048)
    stem: int = 64  # channels of the first convolution
    descriptor: int = 2048  # channels after the head
    # max(x, relup) in place of ReLU at the blocks' ends in stages 1 to 3, and inside the blocks of
    # stage 1; None: off
    relup: float | None = RELUP_ALPHA
    # without relup, "code" keeps 0.014 inside stage 1, as the official code does by mistake
    relup_off: Literal["code", "everywhere"] = "code"
    norm_eps: float = 1e-5  # of pycls
    # the head's exponent before training, as in GeM (arXiv:1711.02512, section 5.1)
    gem_init: float = 3.0
    dtype: Dtype = "float32"  # of the computation
    param_dtype: Dtype = "float32"  # of the parameters

    def __post_init__(self):
        for name in ("depths", "widths"):
            value = getattr(self, name)
            if (
                not isinstance(value, tuple)
                or len(value) != 4
                or not all(_is_whole(number, 1) for number in value)
            ):
                raise ValueError(f"{name} must be four whole numbers of at least 1, not {value!r}")
        for name in ("stem", "descriptor"):
            if not _is_whole(getattr(self, name), 1):
                raise ValueError(
                    f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}"
                )
        if any(width % 4 for width in self.widths):
            raise ValueError(f"widths must be multiples of 4, not {self.widths}")
        if self.relup is not None and not 0 <= self.relup < np.inf:
            raise ValueError(f"relup must be None or a number of at least 0, not {self.relup!r}")
        if self.relup_off not in ("code", "everywhere"):
            raise ValueError(f"relup_off must be code or everywhere, not {self.relup_off!r}")
        for name in ("norm_eps", "gem_init"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)!r}")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in get_args(Dtype):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(Dtype))}, not"
                    f" {getattr(self, name)!r}"
                )

    def floors(self, stage: int) -> tuple[float, float]:
        """Returns the lower ends of the activations inside the blocks of a stage and at their ends.

        Args:
            stage: The number of the stage, 1 to 4.

        Returns:
            Two numbers of at least 0; 0 is ReLU.
        """
        by_mistake = RELUP_ALPHA if self.relup_off == "code" else 0.0
        inside = by_mistake if self.relup is None else self.relup
        end = 0.0 if stage == 4 or self.relup is None else self.relup
        return (inside if stage == 1 else 0.0), end


# He et al., table 1. CVNet was published with 50 and 101 layers.
_DEPTHS = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3)}


def resnet_config(variant: str, **changes: Any) -> ResNetConfig:
    """Returns the config of a published depth.

    Args:
        variant: The number of layers, "50" or "101".
        **changes: Fields of `ResNetConfig` that differ from the published network.

    Returns:
        The config.

    Raises:
        ValueError: The variant is unknown, or a change is out of its range.

    Reference: He et al., "Deep Residual Learning for Image Recognition", 2016, arXiv:1512.03385,
        table 1; CVNet was published with these two depths.
    """
    if str(variant) not in _DEPTHS:
        raise ValueError(f"variant must be one of {', '.join(_DEPTHS)}, not {variant!r}")
    return ResNetConfig(**{"depths": _DEPTHS[str(variant)]} | changes)


class ResNet(nn.Module):
    """Image -> feature map; the methods `pool` and `describe` make descriptors from maps.

    `init` makes the parameters of both parts. Convolutions and the head's product are computed in
    full float32, also where the default of a device is less (TF32, bfloat16); `config.dtype`
    chooses a lower precision.

    Args:
        config: The sizes, see `resnet_config`.
    """

    config: ResNetConfig

    def setup(self):
        c = self.config
        self.stem = Stem(c)
        self.s1, self.s2, self.s3, self.s4 = (Stage(c, number) for number in (1, 2, 3, 4))
        self.head = Head(c)

    def __call__(self, images: Float[Array, "b height width 3"]) -> Float[Array, "b h w d"]:
        """Returns the map of the last stage, `(b, h, w, d)`, which is not negative."""
        return self.maps(images)[-1]

    def maps(self, images: Float[Array, "b height width 3"]) -> list[Float[Array, "b h w d"]]:
        """Returns the feature maps of the stem and of the four stages.

        Args:
            images: Normalised images, `(b, height, width, 3)`, floating point.

        Returns:
            Five maps `(b, h, w, channels)`; h and w are those of the images over 4, 4, 8, 16 and
            32, rounded up.

        Raises:
            ValueError: The images have another shape or are not floating point.
        """
        if (
            images.ndim != 4
            or images.shape[-1] != 3
            or 0 in images.shape
            or not jnp.issubdtype(images.dtype, jnp.floating)
        ):
            raise ValueError(
                "images must be floating point (b, height, width, 3) of at least one pixel, not"
                f" {images.dtype} of shape {images.shape}"
            )
        maps = [self.stem(images)]
        for stage in (self.s1, self.s2, self.s3, self.s4):
            maps.append(stage(maps[-1]))
        if self.is_initializing():
            self.head(self.head.pool(maps[-1]))
        return maps

    def describe(self, pooled: Float[Array, "*b d"]) -> Float[Array, "*b out"]:
        """Returns the descriptors of pooled maps: L2-normalised, then through the dense layer.

        Args:
            pooled: Pooled feature maps, `(..., d)`.

        Returns:
            The descriptors, `(..., config.descriptor)`, not normalised.
        """
        return self.head(pooled)

    def pool(self, feature_map: Float[Array, "*b h w d"]) -> Float[Array, "*b d"]:
        """Returns feature maps pooled by the network's own GeM, with its learned exponent.

        Args:
            feature_map: The maps, `(..., h, w, d)`.

        Returns:
            The pooled maps, `(..., d)`.
        """
        return self.head.pool(feature_map)


class Stem(nn.Module):
    """7 x 7 convolution of stride 2, norm, ReLU, and the maximum over 3 x 3 with stride 2."""

    config: ResNetConfig

    @nn.compact
    def __call__(self, images: Float[Array, "b height width 3"]) -> Float[Array, "b h w d"]:
        c = self.config
        x = nn.relu(_norm(c, "norm")(_conv(c, c.stem, 7, 2, "conv")(images)))
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


class Stage(nn.Module):
    """Bottleneck blocks, `b1` and on; the first of them halves the map, except in stage 1."""

    config: ResNetConfig
    number: int

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b h w d"]:
        for i in range(self.config.depths[self.number - 1]):
            x = Bottleneck(
                self.config,
                self.number,
                stride=2 if i == 0 and self.number > 1 else 1,
                name=f"b{i + 1}",
            )(x)
        return x


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (with the stride) and 1 x 1 convolutions, each with its norm, added to the
    input, which is projected where the shape changes.
    """

    config: ResNetConfig
    stage: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b h w d"]:
        c = self.config
        width = c.widths[self.stage - 1]
        inside, end = (partial(relup, alpha=floor) for floor in c.floors(self.stage))
        y = inside(_norm(c, "a_norm")(_conv(c, width // 4, 1, 1, "a")(x)))
        y = inside(_norm(c, "b_norm")(_conv(c, width // 4, 3, self.stride, "b")(y)))
        y = _norm(c, "c_norm")(_conv(c, width, 1, 1, "c")(y))
        if x.shape[-1] != width or self.stride != 1:
            x = _norm(c, "skip_norm")(_conv(c, width, 1, self.stride, "skip")(x))
        return end(x + y)


class Head(nn.Module):
    """The learned exponent `p`, `(1,)`, of the network's own pooling, and the dense layer `fc`."""

    config: ResNetConfig

    def setup(self):
        c = self.config
        self.p = self.param("p", nn.initializers.constant(c.gem_init), (1,), jnp.float32)
        self.fc = nn.Dense(c.descriptor, precision="highest", **_dtypes(c))

    def __call__(self, pooled: Float[Array, "*b d"]) -> Float[Array, "*b out"]:
        return self.fc(l2_normalize(pooled))

    def pool(self, feature_map: Float[Array, "*b h w d"]) -> Float[Array, "*b d"]:
        """Returns feature maps pooled by GeM over all places, with the learned exponent `p`.

        Args:
            feature_map: The maps, `(..., h, w, d)`.

        Returns:
            The pooled maps, `(..., d)`.
        """
        *batch, _, _, channels = feature_map.shape
        return gem_pool(feature_map.reshape(*batch, -1, channels), self.p[0], eps=1e-6)


def _conv(c: ResNetConfig, channels: int, side: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(
        channels,
        (side, side),
        stride,
        padding=side // 2,
        use_bias=False,
        precision="highest",
        name=name,
        **_dtypes(c),
    )


def _norm(c: ResNetConfig, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True, epsilon=c.norm_eps, name=name, **_dtypes(c))


def _dtypes(c: ResNetConfig) -> dict[str, Any]:
    return {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype)}


def _is_whole(value: Any, least: int) -> bool:
    return (
        isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= least)
    )
