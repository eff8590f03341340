"""Poolings of tokens: `(..., n, d)` -> one descriptor `(..., d)`.

Every function is pure and works under `jit`, `grad`, `vmap`, `scan` and on sharded arrays. The
result has the dtype of the tokens; the mathematics is done in float32 (float64 for float64 tokens).
`mask` is `(..., n)`, true = keep. Pooling a padded batch equals pooling the unpadded tokens,
whatever the padding holds, and a row that keeps nothing gives zeros with zero gradients. A kept NaN
gives NaN.

The power means have one real parameter p > 0 per channel: p = 1 is the mean, and a large p
approaches the maximum. Values and gradients are accurate for p from 1 to 1000. Power means need
positive inputs; `negatives` selects how other tokens are handled (`ggem_jax.pooling.sign_rules`).

The gradients of the power means are closed-form: reverse mode, also twice (`grad`, `jacrev`,
`hessian`), while `jvp` and `jacfwd` raise `TypeError`. On a mesh with explicit axis types exponents
must be whole on every device.

Every function raises `TypeError` for tokens that are not floating point, `ValueError` for wrong
shapes and settings out of range, and `NotImplementedError` for an `implementation` that cannot run
the call.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from ggem_jax.pooling.dispatch import Implementation
from ggem_jax.pooling.masks import keep, lift, mean_of_kept, where_any, widen
from ggem_jax.pooling.power_mean import norm_power_pool, power_pool
from ggem_jax.pooling.sign_rules import Negatives, check_rule

Layout = Literal["contiguous", "interleaved"]


def cls_pool(tokens: Float[Array, "*b n d"]) -> Float[Array, "*b d"]:
    """Returns the first token, where a Vision Transformer keeps its class token.

    Args:
        tokens: The tokens, `(..., n, d)`.

    Returns:
        The first of them, `(..., d)`.
    """
    return _check_tokens(tokens)[0][..., 0, :]


def avg_pool(
    tokens: Float[Array, "*b n d"], *, mask: Bool[Array, "*b n"] | None = None
) -> Float[Array, "*b d"]:
    """Returns the mean of the kept tokens.

    Args:
        tokens: The tokens, `(..., n, d)`.
        mask: Which tokens to keep, `(..., n)`; None keeps all.

    Returns:
        The mean over n, `(..., d)`.
    """
    tokens, mask = _check_tokens(tokens, mask)
    return mean_of_kept(widen(keep(tokens, mask, 0)), mask).astype(tokens.dtype)


def max_pool(
    tokens: Float[Array, "*b n d"], *, mask: Bool[Array, "*b n"] | None = None
) -> Float[Array, "*b d"]:
    """Returns the largest of the kept tokens in each channel; equal ones share the gradient.

    Args:
        tokens: The tokens, `(..., n, d)`.
        mask: Which tokens to keep, `(..., n)`; None keeps all.

    Returns:
        The maximum over n, `(..., d)`.
    """
    tokens, mask = _check_tokens(tokens, mask)
    return where_any(mask, jnp.max(keep(tokens, mask, -jnp.inf), axis=-2))


def lse_pool(
    tokens: Float[Array, "*b n d"], r: ArrayLike, *, mask: Bool[Array, "*b n"] | None = None
) -> Float[Array, "*b d"]:
    """Returns the log-sum-exp of tokens, (1/r) log mean_n exp(r x_n), whatever their signs.

    It is the average for r -> 0 and the maximum for r -> infinity.

    Args:
        tokens: The tokens, `(..., n, d)`.
        r: Sharpness, positive: a scalar, or one number for each channel, `(d,)`. timm starts its
            learned one at 10.
        mask: Which tokens to keep, `(..., n)`; None keeps all.

    Returns:
        The pooled tokens, `(..., d)`.

    Reference: Pinheiro and Collobert, "From Image-level to Pixel-level Labeling with Convolutional
        Networks", 2015, arXiv:1411.6228.
    """
    tokens, mask = _check_tokens(tokens, mask)
    sharpness = _per_channel(r, tokens, "r")
    x = widen(keep(tokens, mask, 0))
    # the pivot cancels; it keeps exp in range
    pivot = lax.stop_gradient(where_any(mask, jnp.max(keep(x, mask, -jnp.inf), axis=-2)))
    below = jnp.maximum(x - pivot[..., None, :], float(jnp.finfo(x.dtype).min))
    z = keep(lift(sharpness, x) * below, mask, 0)
    mean = where_any(mask, mean_of_kept(jnp.exp(z), mask), 1)
    less = mean_of_kept(jnp.expm1(z), mask)  # mean - 1 without its rounding, for small r
    log_mean = jnp.where(less > -0.5, jnp.log1p(jnp.maximum(less, -0.5)), jnp.log(mean))
    return where_any(mask, pivot + log_mean / lift(sharpness, pivot)).astype(tokens.dtype)


def gem_pool(
    tokens: Float[Array, "*b n d"],
    p: ArrayLike,
    *,
    mask: Bool[Array, "*b n"] | None = None,
    eps: float = 1e-6,
    negatives: Negatives = "clamp",
    implementation: Implementation | None = None,
) -> Float[Array, "*b d"]:
    """Returns the generalized mean of tokens, (mean_n x_n^p)^(1/p).

    Values and gradients are finite for p from 1 to 1000 in float32, bfloat16 and float16, also in
    channels without a positive token.

    Args:
        tokens: The tokens, `(..., n, d)`.
        p: The exponent, positive: a scalar for all channels, or one for each, `(d,)`.
        mask: Which tokens to keep, `(..., n)`; None keeps all.
        eps: Smallest number that is raised to p, from 1e-36 to 1e36.
        negatives: How tokens that are not positive are handled: "clamp" (the usual choice), "abs",
            "shift" or "signed", see `ggem_jax.pooling.sign_rules`.
        implementation: "xla" for plain JAX, "triton" for the GPU kernel, "interpret" for the kernel
            in Triton's interpreter; None takes the kernel where it can run.

    Returns:
        The descriptors, `(..., d)`, in the dtype of the tokens.

    Raises:
        TypeError: The tokens are not floating point.
        ValueError: A shape or setting is wrong.
        NotImplementedError: The implementation that was asked for cannot do this.

    Reference: Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", 2018,
        arXiv:1711.02512, eq. 3.

    Example:
        >>> tokens = jnp.array([[1.0, -5.0], [3.0, 4.0]])
        >>> [round(x, 3) for x in gem_pool(tokens, 2.0).tolist()]
        [2.236, 2.828]
    """
    tokens, mask = _check_tokens(tokens, mask)
    return power_pool(tokens, _per_channel(p, tokens, "p"), mask, eps, negatives, implementation)


def ggem_pool(
    tokens: Float[Array, "*b n d"],
    p: ArrayLike,
    *,
    mask: Bool[Array, "*b n"] | None = None,
    eps: float = 1e-6,
    layout: Layout = "contiguous",
    negatives: Negatives = "clamp",
    skip: int = 0,
    implementation: Implementation | None = None,
) -> Float[Array, "*b d"]:
    """Returns the group generalized mean of tokens: `gem_pool` with an exponent for each group.

    The d channels are split into equal groups. One group is `gem_pool` with one exponent; d groups
    are `gem_pool` with one exponent for each channel.

    Args:
        tokens: The tokens, `(..., n, d)`.
        p: The exponents, positive, `(groups,)`; groups divides d.
        mask: Which tokens to keep, `(..., n)`; None keeps all.
        eps: Smallest number that is raised to p, from 1e-36 to 1e36.
        layout: The group of channel c: "contiguous" is c // (d / groups), "interleaved" is c mod
            groups. The paper does not say which, and public code differs. Exponents learned in one
            layout mean nothing in the other.
        negatives: How tokens that are not positive are handled: "clamp" (the usual choice), "abs",
            "shift" or "signed", see `ggem_jax.pooling.sign_rules`.
        skip: Number of tokens at the start that are not pooled, such as a class token: the same as
            slicing them off, but a slice would be copied for the kernel. The mask has them, too.
        implementation: "xla" for plain JAX, "triton" for the GPU kernel, "interpret" for the kernel
            in Triton's interpreter; None takes the kernel where it can run.

    Returns:
        The descriptors, `(..., d)`, in the dtype of the tokens.

    Raises:
        TypeError: The tokens are not floating point.
        ValueError: A shape or setting is wrong, such as groups that do not divide d.
        NotImplementedError: The implementation that was asked for cannot do this.

    Reference: Ko et al., "Group Generalized Mean Pooling for Vision Transformer", 2022,
        arXiv:2212.04114.

    Example:
        >>> tokens, p = jnp.array([[1.0, 1.0], [3.0, 3.0]]), jnp.array([1.0, 100.0])
        >>> [round(x, 2) for x in ggem_pool(tokens, p).tolist()]
        [2.0, 2.98]
    """
    tokens, mask = _check_tokens(tokens, mask)
    mask = _without_skipped(tokens, mask, skip)
    exponents = spread_over_channels(_parameter(p, tokens, "p"), tokens.shape[-1], layout=layout)
    return power_pool(tokens, exponents, mask, eps, negatives, implementation, skip)


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
    skip: int = 0,
    implementation: Implementation | None = None,
) -> Float[Array, "*b d"]:
    """Returns `ggem_pool` of layer-normalised tokens, the end of a Vision Transformer, in one step.

    It pools z = (x - mean_d x) / sqrt(var_d x + norm_eps) * scale + bias. The normalised tokens
    stay in float32. The gradient keeps the tokens alone and normalises them again.

    Args:
        tokens: The tokens before the norm, `(..., n, d)`.
        scale: Factor of the norm, `(d,)` or a scalar.
        bias: Bias of the norm, `(d,)` or a scalar.
        p: The exponents, positive, `(groups,)`; groups divides d.
        norm_eps: Added to the variance, from 1e-36 to 1e36.
        mask: Which tokens to keep, `(..., n)`; None keeps all.
        eps: Smallest number that is raised to p, from 1e-36 to 1e36.
        layout: The group of each channel, as in `ggem_pool`.
        negatives: How tokens that are not positive are handled, as in `ggem_pool`.
        skip: Number of tokens at the start that are not pooled, such as a class token: the same as
            slicing them off, but a slice would be copied for the kernel. The mask has them, too.
        implementation: As in `ggem_pool`. The kernel does not have the rule "shift".

    Returns:
        The descriptors, `(..., d)`, in the dtype of the tokens.

    Raises:
        TypeError: The tokens are not floating point.
        ValueError: A shape or setting is wrong.
        NotImplementedError: The implementation that was asked for cannot do this.

    Reference: Ba et al., "Layer Normalization", 2016, arXiv:1607.06450.

    Example:
        >>> tokens, p = jnp.arange(24.0).reshape(1, 6, 4), jnp.ones(2)
        >>> [round(x, 2) for x in norm_ggem_pool(tokens, jnp.ones(4), jnp.zeros(4), p)[0].tolist()]
        [0.0, 0.0, 0.45, 1.34]
    """
    tokens, mask = _check_tokens(tokens, mask)
    mask = _without_skipped(tokens, mask, skip)
    gain = _per_channel(scale, tokens, "scale", positive=False)
    shift = _per_channel(bias, tokens, "bias", positive=False)
    exponents = spread_over_channels(_parameter(p, tokens, "p"), tokens.shape[-1], layout=layout)
    check_rule(eps, negatives)
    if not (isinstance(norm_eps, int | float | np.number) and 1e-36 <= norm_eps <= 1e36):
        raise ValueError(f"norm_eps must be a Python number from 1e-36 to 1e36, not {norm_eps!r}")
    return norm_power_pool(
        tokens, gain, shift, exponents, mask, float(norm_eps), eps, negatives, implementation, skip
    )


def spread_over_channels(
    p: Float[Array, " groups"], channels: int, *, layout: Layout = "contiguous"
) -> Float[Array, " channels"]:
    """Returns the exponent of each channel: that of its group.

    Args:
        p: One exponent for each group, `(groups,)`.
        channels: The number of channels, a multiple of the groups.
        layout: The group of each channel, as in `ggem_pool`.

    Returns:
        The exponents, `(channels,)`.

    Raises:
        ValueError: The layout is unknown, or the groups do not divide the channels.
    """
    p = jnp.asarray(p)
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, not {layout!r}")
    if p.ndim != 1 or p.shape[0] == 0 or channels % p.shape[0]:
        raise ValueError(
            f"p must be (groups,) with groups dividing the {channels} channels, not an array of"
            f" shape {p.shape}"
        )
    each = channels // p.shape[0]
    return jnp.repeat(p, each) if layout == "contiguous" else jnp.tile(p, each)


def _check_tokens(tokens, mask=None):
    """Tokens and mask as arrays, of the right dtypes and shapes."""
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


def _without_skipped(tokens, mask, skip):
    """The mask of the tokens that are not skipped."""
    n = tokens.shape[-2]
    if not (isinstance(skip, int) and 0 <= skip < n):
        raise ValueError(
            f"skip must be a whole number from 0 to {n - 1}, for {n} tokens, not {skip!r}"
        )
    return None if mask is None else mask[..., skip:]


def _parameter(value, tokens, name, positive=True):
    """An exponent or sharpness as an array in the dtype of the mathematics. Numbers in JAX arrays
    are not checked, as they may be unknown yet.
    """
    try:
        array = jnp.asarray(value)
    except TypeError:
        raise ValueError(f"{name} must be a number or an array of numbers, not {value!r}") from None
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise ValueError(f"{name} must be real, not {array.dtype}")
    numbers = int | float | np.generic | np.ndarray
    if positive and all(isinstance(leaf, numbers) for leaf in jax.tree.leaves(value)):
        known = np.asarray(value)
        if not np.all((known > 0) & (known <= np.finfo(np.float32).max)):
            raise ValueError(f"{name} must be positive and finite, not {value}")
    return array.astype(widen(tokens).dtype)


def _per_channel(value, tokens, name, positive=True):
    """A number for all channels or one for each, as `(d,)`."""
    value = _parameter(value, tokens, name, positive)
    channels = tokens.shape[-1]
    if value.shape not in ((), (channels,)):
        raise ValueError(
            f"{name} must be a scalar or ({channels},), one number per channel, not of shape"
            f" {value.shape}"
        )
    return jnp.broadcast_to(value, (channels,))
