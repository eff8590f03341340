"""Poolings of feature maps `(..., h, w, d)` as SuperGlobal uses them: ReLU-P, regional GeM, GeM+
and Scale GeM.

The result has the dtype of the map; the mathematics is done in float32 (float64 for float64 maps).
`regional_gem`, `superglobal_pool` and `scale_gem` raise `TypeError` for arrays that are not
floating point, and `ValueError` for wrong shapes and settings out of range.

Reference: Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", 2023,
arXiv:2308.06954, and its code: github.com/ShihaoShao-GH/SuperGlobal.
"""

from functools import partial, reduce
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ggem_jax.pooling import fused
from ggem_jax.pooling.dispatch import Implementation, choose_implementation, run_implementation
from ggem_jax.pooling.masks import widen
from ggem_jax.pooling.power_mean import TINY, power_pool
from ggem_jax.pooling.sign_rules import LEAST_EPS, check_rule

_NOTHING = -1e30  # the logarithm of a power of zero: whatever p, it adds nothing to a sum


def relup(x: ArrayLike, *, alpha: float = 0.014) -> Array:
    """Returns ReLU-P, max(x, alpha), which is neither shifted nor zeroed; alpha = 0 is ReLU.

    Args:
        x: Numbers of any shape.
        alpha: The lower end; the default is that of the official code.

    Returns:
        An array of the shape of x.

    Reference: Shao et al., 2023, arXiv:2308.06954, and its code.
    """
    return jnp.maximum(jnp.asarray(x), float(alpha))


def regional_gem(
    feature_map: Float[Array, "*b h w d"], *, p: float = 2.5, window: int = 5
) -> Float[Array, "*b h w d"]:
    """Returns Regional GeM: half the map plus half its power mean over a sliding window.

    The equation is x / 2 + (mean_window x^p)^(1/p) / 2. Borders are reflected. Negative entries
    count as zero, as after a ReLU; the official code gives NaN there. The powers are summed in log
    space, so that p may be large. A window of zeros gives zero, with a zero gradient.

    Args:
        feature_map: The map, `(..., h, w, d)`, with h and w of at least (window + 1) / 2.
        p: The exponent, positive.
        window: Side of the window, odd.

    Returns:
        The map, `(..., h, w, d)`, in its dtype.

    Raises:
        TypeError: The map is not floating point.
        ValueError: The map is too small, or a setting is out of range.

    Reference: Shao et al., 2023, arXiv:2308.06954, and its code:
        github.com/ShihaoShao-GH/SuperGlobal.

    Example:
        >>> feature_map = jnp.zeros((5, 5, 1)).at[2, 2].set(1.0)
        >>> print(f"{regional_gem(feature_map, p=2.0, window=3)[1, 1, 0]:.4f}")
        0.1667
    """
    feature_map = _check_map(feature_map, window)
    _check_exponent(p, "p")
    return _regional(widen(feature_map), p, window).astype(feature_map.dtype)


def superglobal_pool(
    feature_map: Float[Array, "*b h w d"],
    *,
    regional_p: float = 2.5,
    window: int = 5,
    p: float = 4.6,
    eps: float = 1e-8,
    implementation: Implementation | None = None,
) -> Float[Array, "*b d"]:
    """Returns SuperGlobal's descriptor of a feature map: `regional_gem`, then GeM+.

    GeM+ is `gem_pool` over all places of the map with a large fixed exponent. In between everything
    stays in float32. On a GPU one kernel reads the map once; the gradient is that of plain JAX.

    Args:
        feature_map: The map, `(..., h, w, d)`, with h and w of at least (window + 1) / 2.
        regional_p: Exponent of Regional GeM.
        window: Side of its window, odd.
        p: Exponent of GeM+.
        eps: Smallest number that GeM+ raises to p.
        implementation: "xla" for plain JAX, "triton" for the GPU kernel, "interpret" for the kernel
            in Triton's interpreter; None takes the kernel where it can run.

    Returns:
        The descriptors, `(..., d)`, not normalised, in the dtype of the map.

    Raises:
        TypeError: The map is not floating point.
        ValueError: The map is too small, or a setting is out of range.
        NotImplementedError: The implementation that was asked for cannot do this.

    Reference: Shao et al., 2023, arXiv:2308.06954, and its code:
        github.com/ShihaoShao-GH/SuperGlobal.

    Example:
        >>> feature_map = jnp.ones((2, 7, 7, 64))
        >>> superglobal_pool(feature_map).shape
        (2, 64)
    """
    feature_map = _check_map(feature_map, window)
    _check_exponent(regional_p, "regional_p")
    _check_exponent(p, "p")
    check_rule(eps, "clamp")
    refused = partial(fused.superglobal_refusal, feature_map, regional_p, window, p)
    implementation = choose_implementation(implementation, feature_map, refused)
    options: Any = {
        "regional_p": float(regional_p),
        "window": int(window),
        "p": float(p),
        "eps": float(eps),
    }
    kernel, plain = (partial(body, **options) for body in (fused.superglobal, _superglobal))
    (pooled,) = run_implementation(implementation, kernel, plain, feature_map)
    return pooled.astype(feature_map.dtype)


def scale_gem(
    descriptors: Float[Array, "scales *b d"], *, p: float = np.inf
) -> Float[Array, "*b d"]:
    """Returns Scale GeM: one descriptor from those of an image at several scales.

    With p = infinity each descriptor is L2-normalised and the largest of each channel taken, signs
    included. With a finite p nothing is normalised: (mean_s (x_s - m)^p)^(1/p) + m with m the
    minimum over the whole array, which makes a result depend on the other images in it. Both follow
    the official code.

    Args:
        descriptors: The descriptors, `(scales, ..., d)`.
        p: The exponent, positive; infinity is SuperGlobal's choice.

    Returns:
        The descriptors, `(..., d)`, not normalised, in their dtype.

    Raises:
        TypeError: The descriptors are not floating point.
        ValueError: The shape is wrong, or p is not a positive number.

    Reference: Shao et al., 2023, arXiv:2308.06954, and its code:
        github.com/ShihaoShao-GH/SuperGlobal.

    Example:
        >>> descriptors = jnp.array([[3.0, 4.0], [5.0, 0.0]])
        >>> [round(x, 2) for x in scale_gem(descriptors).tolist()]
        [1.0, 0.8]
    """
    descriptors = jnp.asarray(descriptors)
    if not jnp.issubdtype(descriptors.dtype, jnp.floating):
        raise TypeError(f"descriptors must be floating point, not {descriptors.dtype}")
    if descriptors.ndim < 2 or 0 in (descriptors.shape[0], descriptors.shape[-1]):
        raise ValueError(
            "descriptors must be (scales, ..., d) with at least one scale and one channel, not of"
            f" shape {descriptors.shape}"
        )
    x = widen(descriptors)
    if isinstance(p, int | float | np.number) and p == np.inf:
        return jnp.max(l2_normalize(x), axis=0).astype(descriptors.dtype)
    _check_exponent(p, "p")
    lowest = jnp.min(x, initial=jnp.inf)
    above = jnp.moveaxis(x - lowest, 0, -2)
    exponents = jnp.full(x.shape[-1], p, x.dtype)
    pooled = power_pool(above, exponents, None, LEAST_EPS, "clamp", "xla")
    return (pooled + lowest).astype(descriptors.dtype)


def l2_normalize(descriptors: Float[Array, "*b d"], *, eps: float = 1e-12) -> Float[Array, "*b d"]:
    """Returns descriptors of length 1: x / max(|x|, eps), in float32.

    No length overflows or underflows on the way, and the gradient of a zero vector is finite.

    Args:
        descriptors: The descriptors, `(..., d)`.
        eps: The smallest length that is divided by; a zero vector stays zero.

    Returns:
        The descriptors, `(..., d)`, in their dtype.

    Example:
        >>> descriptors = jnp.array([[3.0, 4.0], [0.0, 0.0]])
        >>> [[round(x, 2) for x in row] for row in l2_normalize(descriptors).tolist()]
        [[0.6, 0.8], [0.0, 0.0]]
    """
    descriptors = jnp.asarray(descriptors)
    x = widen(descriptors)
    largest = lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), TINY))
    squares = jnp.sum(jnp.square(x / largest), axis=-1, keepdims=True)
    length = largest * jnp.sqrt(jnp.maximum(squares, TINY))
    return (x / jnp.maximum(length, eps)).astype(descriptors.dtype)


def _superglobal(feature_map, *, regional_p, window, p, eps):
    mixed = _regional(widen(feature_map), regional_p, window)
    places = mixed.reshape(*mixed.shape[:-3], mixed.shape[-3] * mixed.shape[-2], mixed.shape[-1])
    exponents = jnp.full(places.shape[-1], p, places.dtype)
    return (power_pool(places, exponents, None, eps, "clamp", "xla"),)


def _regional(x, p, window):
    """x / 2 + (mean_window x^p)^(1/p) / 2, in log space."""
    x = jnp.where(x < 0, 0, x)  # not maximum, which shares the gradient at 0
    logs = jnp.where(x >= TINY, p * jnp.log(jnp.maximum(x, TINY)), _NOTHING)
    for axis in (-3, -2):
        logs = _windowed_log_sum_exp(logs, axis, window)
    local = jnp.exp((logs - 2 * np.log(window)) / p)
    return 0.5 * jnp.where(local > 2 * TINY, local, 0) + 0.5 * x


def _windowed_log_sum_exp(logs, axis, window):
    """log sum exp over a sliding window along one axis; the borders are reflected and the edge is
    not repeated.
    """
    half, length = window // 2, logs.shape[axis]
    widths = [(half, half) if i == logs.ndim + axis else (0, 0) for i in range(logs.ndim)]
    padded = jnp.pad(logs, widths, mode="reflect")
    shifted = [lax.slice_in_dim(padded, k, k + length, axis=axis) for k in range(window)]
    largest = lax.stop_gradient(reduce(jnp.maximum, shifted))
    return largest + jnp.log(sum(jnp.exp(each - largest) for each in shifted))


def _check_map(feature_map, window):
    feature_map = jnp.asarray(feature_map)
    if not jnp.issubdtype(feature_map.dtype, jnp.floating):
        raise TypeError(f"feature_map must be floating point, not {feature_map.dtype}")
    if (
        not isinstance(window, int | np.integer)
        or isinstance(window, bool)
        or window < 1
        or window % 2 == 0
    ):
        raise ValueError(f"window must be an odd whole number, not {window!r}")
    least = (window + 1) // 2
    if feature_map.ndim < 3 or min(feature_map.shape[-3:-1]) < least or feature_map.shape[-1] == 0:
        raise ValueError(
            f"feature_map must be (..., h, w, d) with h and w of at least {least} for a window of"
            f" {window}, not {feature_map.shape}"
        )
    return feature_map


def _check_exponent(value, name):
    if (
        not isinstance(value, int | float | np.number)
        or isinstance(value, bool)
        or not 0 < value < np.inf
    ):
        raise ValueError(f"{name} must be a positive Python number, not {value!r}")
