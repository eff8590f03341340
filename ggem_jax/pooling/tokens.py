"""Poolings: tokens `(..., n, d)` -> one descriptor `(..., d)`.

Every function is pure and works under `jit`, `grad`, `vmap`, `scan` and on sharded arrays. The
result has the dtype of the tokens; the mathematics is done in float32 (float64 for float64 tokens).
`mask` is `(..., n)`, true = keep: pooling a padded batch equals pooling the unpadded tokens,
whatever the padding holds, and a row with nothing to keep gives zeros with zero gradients. A kept
NaN gives NaN.

The power means have one real parameter p > 0 per channel: p = 1 is the mean, a large p approaches
the maximum; values and gradients are accurate for p from 1 to 1000. They need positive numbers,
which tokens are not. `negatives` names what is done about it, with m the minimum over the kept
tokens of a channel:

- `"clamp"`   (mean_n max(x_n, eps)^p)^(1/p): a negative token becomes eps, as in a ReLU. The usual choice.
- `"abs"`     (mean_n max(|x_n|, eps)^p)^(1/p)
- `"shift"`   (mean_n (x_n - m + eps)^p)^(1/p) + m - eps
- `"signed"`  sign(s) |s|^(1/p) with s = mean_n sign(x_n) |x_n|^p. Where s is zero (within 1e-30 of
  the largest |x_n|^p) so is the gradient.

The gradients of the power means are closed-form: reverse mode, also twice (`grad`, `jacrev`,
`hessian`), while `jvp` and `jacfwd` raise `TypeError`. On a mesh with explicit axis types exponents
must be whole on every device.

Errors: `TypeError` for tokens that are not floating point, `ValueError` for every other mistake of
the caller, `NotImplementedError` for an `implementation` that cannot do what was asked.
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from ggem_jax.pooling import fused
from ggem_jax.pooling.dispatch import Implementation, chosen, varying_alike
from ggem_jax.pooling.power_mean import (
    Negatives,
    check_rule,
    keep,
    lifted,
    mean_of_kept,
    norm_power_mean,
    power_pool,
    where_any,
    widened,
)

Layout = Literal["contiguous", "interleaved"]


def cls_pool(tokens: Float[Array, "*b n d"]) -> Float[Array, "*b d"]:
    """Takes the first token, where a Vision Transformer keeps its class token."""
    return _checked(tokens)[0][..., 0, :]


def avg_pool(
    tokens: Float[Array, "*b n d"], *, mask: Bool[Array, "*b n"] | None = None
) -> Float[Array, "*b d"]:
    """Averages the kept tokens."""
    tokens, mask = _checked(tokens, mask)
    return mean_of_kept(widened(keep(tokens, mask, 0)), mask).astype(tokens.dtype)


def max_pool(
    tokens: Float[Array, "*b n d"], *, mask: Bool[Array, "*b n"] | None = None
) -> Float[Array, "*b d"]:
    """Takes the largest of the kept tokens in each channel; equal ones share the gradient."""
    tokens, mask = _checked(tokens, mask)
    return where_any(mask, jnp.max(keep(tokens, mask, -jnp.inf), axis=-2))


def lse_pool(
    tokens: Float[Array, "*b n d"], r: ArrayLike, *, mask: Bool[Array, "*b n"] | None = None
) -> Float[Array, "*b d"]:
    """Pools by log-sum-exp, (1/r) log mean_n exp(r x_n): the average for r -> 0, the maximum for r
    -> infinity, whatever the signs.

    `r > 0` is a scalar or one number per channel, `(d,)`; timm starts its learnable one at 10.
    Reference: Pinheiro and Collobert, "From Image-level to Pixel-level Labeling with Convolutional
        Networks", 2015, arXiv:1411.6228.
    """
    tokens, mask = _checked(tokens, mask)
    sharpness = _per_channel(r, tokens, "r")
    x = widened(keep(tokens, mask, 0))
    pivot = lax.stop_gradient(
        where_any(mask, jnp.max(keep(x, mask, -jnp.inf), axis=-2))
    )  # cancels; keeps exp in range
    below = jnp.maximum(x - pivot[..., None, :], float(jnp.finfo(x.dtype).min))
    z = keep(lifted(sharpness, x) * below, mask, 0)
    mean, less = (
        where_any(mask, mean_of_kept(jnp.exp(z), mask), 1),
        mean_of_kept(jnp.expm1(z), mask),
    )  # less: mean - 1 without its rounding, for small r
    log_mean = jnp.where(less > -0.5, jnp.log1p(jnp.maximum(less, -0.5)), jnp.log(mean))
    return where_any(mask, pivot + log_mean / lifted(sharpness, pivot)).astype(tokens.dtype)


def gem_pool(
    tokens: Float[Array, "*b n d"],
    p: ArrayLike,
    *,
    mask: Bool[Array, "*b n"] | None = None,
    eps: float = 1e-6,
    negatives: Negatives = "clamp",
    implementation: Implementation | None = None,
) -> Float[Array, "*b d"]:
    """Pools by the generalized mean (mean_n x_n^p)^(1/p): one exponent for all channels, `p: ()`,
    or one for each, `p: (d,)`.

    Values and gradients are finite for p from 1 to 1000 in float32, bfloat16 and float16, also in
    channels without a positive token.
    Reference: Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", 2018,
        arXiv:1711.02512, eq. 3.
    """
    tokens, mask = _checked(tokens, mask)
    return power_pool(tokens, _per_channel(p, tokens, "p"), mask, eps, negatives, implementation)


def ggem_pool(
    tokens: Float[Array, "*b n d"],
    p: ArrayLike,
    *,
    mask: Bool[Array, "*b n"] | None = None,
    eps: float = 1e-6,
    layout: Layout = "contiguous",
    negatives: Negatives = "clamp",
    implementation: Implementation | None = None,
) -> Float[Array, "*b d"]:
    """Pools by the group generalized mean: the d channels are split into equal groups, and `p:
    (groups,)` holds one exponent for each.

    `layout` says to which group channel c belongs: `"contiguous"` c // (d / groups),
    `"interleaved"` c mod groups. The paper's text leaves this open and the public
    re-implementations differ. The two are one fixed permutation of the channels apart, so exponents
    learned in one layout mean nothing in the other. One group is `gem_pool` with one exponent, d
    groups are `gem_pool` with one for each channel.

    Reference: Ko et al., "Group Generalized Mean Pooling for Vision Transformer", 2022,
        arXiv:2212.04114.
    """
    tokens, mask = _checked(tokens, mask)
    exponents = spread_over_channels(_parameter(p, tokens, "p"), tokens.shape[-1], layout=layout)
    return power_pool(tokens, exponents, mask, eps, negatives, implementation)


def norm_ggem_pool(
    tokens: Float[Array, "*b n d"],
    scale: ArrayLike,
    bias: ArrayLike,
    p: ArrayLike,
    *,
    norm_eps: float = 1e-6,
    mask: Bool[Array, "*b n"] | None = None,
    eps: float = 1e-6,
    layout: Layout = "contiguous",
    negatives: Negatives = "clamp",
    implementation: Implementation | None = None,
) -> Float[Array, "*b d"]:
    """`ggem_pool` of layer-normalised tokens, the end of a ViT: z = (x - mean_d x) / sqrt(var_d x +
    norm_eps) * scale + bias, then the pooling of z.

    `scale` and `bias` are `(d,)`. The normalised tokens stay in float32. The gradient keeps the
    tokens alone and normalises again.
    Reference: Ba et al., "Layer Normalization", 2016, arXiv:1607.06450.
    """
    tokens, mask = _checked(tokens, mask)
    gain = _per_channel(scale, tokens, "scale", positive=False)
    shift = _per_channel(bias, tokens, "bias", positive=False)
    exponents = spread_over_channels(_parameter(p, tokens, "p"), tokens.shape[-1], layout=layout)
    check_rule(eps, negatives)
    if not (isinstance(norm_eps, int | float | np.number) and 1e-36 <= norm_eps <= 1e36):
        raise ValueError(f"norm_eps must be a Python number from 1e-36 to 1e36, not {norm_eps!r}")
    implementation = chosen(implementation, tokens, partial(fused.norm_refusal, tokens, negatives))
    arrays = varying_alike(tokens, gain, shift, exponents, mask)
    return norm_power_mean(*arrays, float(norm_eps), float(eps), negatives, implementation).astype(
        tokens.dtype
    )


def spread_over_channels(
    p: Float[Array, " groups"], channels: int, *, layout: Layout = "contiguous"
) -> Float[Array, " channels"]:
    """Gives each channel the exponent of its group, `(groups,)` -> `(channels,)`; the layouts are
    those of `ggem_pool`.
    """
    p = jnp.asarray(p)
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, not {layout!r}")
    if p.ndim != 1 or p.shape[0] == 0 or channels % p.shape[0]:
        raise ValueError(
            f"p must be (groups,) with groups dividing the {channels} channels, not an array of"
            f" shape {p.shape}"
        )
    channels_per_group = channels // p.shape[0]
    return (
        jnp.repeat(p, channels_per_group)
        if layout == "contiguous"
        else jnp.tile(p, channels_per_group)
    )


def _checked(tokens, mask=None):
    tokens, mask = jnp.asarray(tokens), None if mask is None else jnp.asarray(mask)
    if not jnp.issubdtype(tokens.dtype, jnp.floating):
        raise TypeError(f"tokens must be floating point, not {tokens.dtype}")
    if tokens.ndim < 2 or 0 in tokens.shape[-2:]:
        raise ValueError(
            "tokens must be (..., n, d) with at least one token and one channel, not of shape"
            f" {tokens.shape}"
        )
    if mask is not None and (mask.dtype != bool or mask.shape != tokens.shape[:-1]):
        raise ValueError(
            f"mask must be bool of shape {tokens.shape[:-1]}, true = keep, not {mask.dtype} of"
            f" shape {mask.shape}"
        )
    return tokens, mask


def _parameter(value, tokens, name, positive=True):
    """An exponent or sharpness as an array of the dtype that the mathematics is done in; the
    numbers in JAX arrays are not looked at.
    """
    try:
        array = jnp.asarray(value)
    except TypeError:
        raise ValueError(f"{name} must be a number or an array of numbers, not {value!r}") from None
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise ValueError(f"{name} must be real, not {array.dtype}")
    known = all(
        isinstance(leaf, int | float | np.generic | np.ndarray) for leaf in jax.tree.leaves(value)
    )
    if (
        positive
        and known
        and not np.all((np.asarray(value) > 0) & (np.asarray(value) <= np.finfo(np.float32).max))
    ):
        raise ValueError(f"{name} must be positive and finite, not {value}")
    return array.astype(widened(tokens).dtype)


def _per_channel(value, tokens, name, positive=True):
    value = _parameter(value, tokens, name, positive)
    channels = tokens.shape[-1]
    if value.shape not in ((), (channels,)):
        raise ValueError(
            f"{name} must be a scalar or ({channels},), one number per channel, not of shape"
            f" {value.shape}"
        )
    return jnp.broadcast_to(value, (channels,))
