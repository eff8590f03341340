"""SuperGlobal's global descriptor: a batch of images of one size -> maps at several scales ->
pooled -> head -> one descriptor.

A network is a Flax module from images to feature maps. Methods `pool` (its own learned GeM) and
`describe` (a head), as `ResNet` has them, are used where they exist. Other networks are pooled by
GeM with p = 3 in place of their own, and the pooled vector is the descriptor. JAX compiles the map
once for each network and image size and keeps it, whatever the other choices. Under an outer `jit`
everything becomes one program.

Reference: Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", 2023,
arXiv:2308.06954, and its code: github.com/ShihaoShao-GH/SuperGlobal.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from ggem_jax.descriptors.scales import SCALES, WINDOW, rescale, scaled_size
from ggem_jax.pooling import (
    avg_pool,
    gem_pool,
    l2_normalize,
    max_pool,
    regional_gem,
    scale_gem,
    superglobal_pool,
)

GEM_PLUS_P, GEM_PLUS_EPS = 4.6, 1e-8  # of the official code
# of a network without a GeM of its own: where GeM starts (Radenović et al., 2018, arXiv:1711.02512)
GEM_P, GEM_EPS = 3.0, 1e-6
REDUCTION = 32  # pixels along one side of a place of the map: five strides of 2

Pooling = Literal["average", "max"]


@struct.dataclass
class SuperGlobalOutput:
    """Intermediate and final results on the way from images to unit descriptors."""

    by_scale: Float[Array, "scales b d"]  # after the head, not normalised
    raw: Float[Array, "b d"]  # scales joined, not normalised
    descriptor: Float[Array, "b d"]  # L2-normalised, as an index stores it


def superglobal_descriptors(
    model: Any,
    variables: Any,
    images: Float[Array, "b h w 3"],
    *,
    scales: Sequence[float] = SCALES[3],
    gemp: bool = True,
    rgem: bool = True,
    sgem: bool = True,
    relup: bool = True,
    antialias: bool = False,
    pooling: Pooling | None = None,
) -> SuperGlobalOutput:
    """Returns the descriptors of normalised images.

    Args:
        model: A Flax module from images to maps, as in the module's docstring.
        variables: The variables of the module.
        images: Images, `(b, h, w, 3)`, normalised as the network requires.
        scales: Factors of the images' sides, at least one.
        gemp: Whether to pool by GeM+ (p = 4.6); if not, by GeM with the network's own exponent.
        rgem: Whether to apply Regional GeM before the pooling.
        sgem: Whether to join the scales by Scale GeM (p = infinity); if not, by their mean.
        relup: Whether to use ReLU-P; if not, ReLU, as far as the model's `relup_off` says. Only a
            `ResNet` has it.
        antialias: Whether to use antialiasing where a scale shrinks the images, as today's
            torchvision does by default; off as when the paper was written. See
            `ggem_jax.descriptors.scales`.
        pooling: "average" or "max" in place of GeM and GeM+; None keeps these.

    Returns:
        A record whose `descriptor` is `(b, d)`, of length 1.

    Raises:
        ValueError: The images are too small for the smallest scale, or there is no scale.

    Reference: Shao et al., 2023, arXiv:2308.06954, section 3.
    """
    check_size(images.shape[-3], images.shape[-2], scales, rgem=rgem)
    if not relup and hasattr(model, "config") and hasattr(model.config, "relup"):
        model = model.clone(config=replace(model.config, relup=None))
    by_scale = []
    for scale in scales:
        feature_map = compute_map(model, variables, rescale_compiled(images, scale, antialias))
        by_scale.append(
            describe_map(model, variables, feature_map, gemp=gemp, rgem=rgem, pooling=pooling)
        )
    joined = jnp.stack(by_scale)
    return SuperGlobalOutput(joined, *join_scales(joined, sgem=sgem))


def check_size(height: int, width: int, scales: Sequence[float], *, rgem: bool = True) -> None:
    """Raises `ValueError` for images too small for the smallest scale.

    Regional GeM reflects 2 places at the map's borders, so it requires 3.

    Args:
        height, width: Sides of the images, pixels.
        scales: Factors of both sides, at least one.
        rgem: Whether Regional GeM is used.

    Raises:
        ValueError: The images are too small, or there is no scale.
    """
    if not scales:
        raise ValueError("scales must be at least one number")
    least_pixels = (WINDOW // 2) * REDUCTION + 1 if rgem else 1
    least = min(scales)
    if min(scaled_size(height, width, least)) < least_pixels:
        side = next(
            side
            for side in range(math.floor(least_pixels / least), height + width + 2**16)
            if int(side * least) >= least_pixels
        )
        raise ValueError(
            f"images of {height} x {width} pixels are too small: at the scale {least:g} the shorter"
            f" side must be at least {side}"
        )


@partial(jax.jit, static_argnums=0)
def compute_map(
    model: Any, variables: Any, images: Float[Array, "b h w 3"]
) -> Float[Array, "b h2 w2 d"]:
    """Returns the network's last feature map; compiled once for each model and shape.

    Args:
        model: A Flax module from images to maps; it must be hashable.
        variables: The variables of the module.
        images: Normalised images, `(b, h, w, 3)`.

    Returns:
        The map, `(b, h2, w2, d)`.
    """
    return model.apply(variables, images)


@partial(jax.jit, static_argnums=0, static_argnames=("gemp", "rgem", "pooling"))
def describe_map(
    model: Any,
    variables: Any,
    feature_map: Float[Array, "b h w d"],
    *,
    gemp: bool = True,
    rgem: bool = True,
    pooling: Pooling | None = None,
) -> Float[Array, "b out"]:
    """Returns the vectors of one scale: map -> Regional GeM -> GeM+ -> the head of the model.

    The head, a method `describe`, is left out where the model has none. The vectors are not
    normalised.

    Args:
        model: As in `superglobal_descriptors`.
        variables: As in `superglobal_descriptors`.
        feature_map: The map of one scale, `(b, h, w, d)`.
        gemp: As in `superglobal_descriptors`.
        rgem: As in `superglobal_descriptors`.
        pooling: As in `superglobal_descriptors`.

    Returns:
        The vectors, `(b, out)`.
    """
    pooled = pool_map(model, variables, feature_map, gemp=gemp, rgem=rgem, pooling=pooling)
    return (
        model.apply(variables, pooled, method="describe") if hasattr(model, "describe") else pooled
    )


def pool_map(
    model: Any,
    variables: Any,
    feature_map: Float[Array, "b h w d"],
    *,
    gemp: bool = True,
    rgem: bool = True,
    pooling: Pooling | None = None,
) -> Float[Array, "b d"]:
    """Returns the pooled map that `describe_map` gives to the head.

    Args:
        model: As in `superglobal_descriptors`.
        variables: As in `superglobal_descriptors`.
        feature_map: The map of one scale, `(b, h, w, d)`.
        gemp: As in `superglobal_descriptors`.
        rgem: As in `superglobal_descriptors`.
        pooling: As in `superglobal_descriptors`.

    Returns:
        The pooled map, `(b, d)`.
    """
    if gemp and rgem and pooling is None:
        return superglobal_pool(feature_map, window=WINDOW, p=GEM_PLUS_P, eps=GEM_PLUS_EPS)
    if rgem:
        feature_map = regional_gem(feature_map, window=WINDOW)
    if pooling is None and not gemp and hasattr(model, "pool"):
        return model.apply(variables, feature_map, method="pool")
    places = feature_map.reshape(*feature_map.shape[:-3], -1, feature_map.shape[-1])
    match pooling:
        case "average":
            return avg_pool(places)
        case "max":
            return max_pool(places)
        case _:
            return (
                gem_pool(places, GEM_PLUS_P, eps=GEM_PLUS_EPS)
                if gemp
                else gem_pool(places, GEM_P, eps=GEM_EPS)
            )


@partial(jax.jit, static_argnums=(1, 2))
def rescale_compiled(
    images: Float[Array, "b h w 3"], scale: float, antialias: bool
) -> Float[Array, "b h2 w2 3"]:
    """Returns the result of `rescale`; compiled once for each shape, scale and filter.

    Args:
        images: Images, `(b, h, w, 3)`, floating point.
        scale: Factor of both sides.
        antialias: Whether to use the filter with antialiasing.

    Returns:
        The images, `(b, h2, w2, 3)`.
    """
    return rescale(images, scale, antialias=antialias)


@partial(jax.jit, static_argnames="sgem")
def join_scales(
    by_scale: Float[Array, "scales b d"], *, sgem: bool = True
) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
    """Returns one descriptor from those of all scales: raw, and L2-normalised.

    Args:
        by_scale: Descriptors of the scales, `(scales, b, d)`, not normalised.
        sgem: Whether to join them by Scale GeM; if not, by their mean.

    Returns:
        The joined descriptors before and after the normalisation, `(b, d)` each.
    """
    raw = scale_gem(by_scale) if sgem else jnp.mean(by_scale, axis=0)
    return raw, l2_normalize(raw)
