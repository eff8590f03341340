"""The power mean (mean_n x_n^p)^(1/p) over tokens, its closed-form gradient, and the same after a
LayerNorm.

`tokens` are `(..., n, d)`, `p` is `(d,)`, `mask` is `(..., n)` with true = keep. Each operation has
a plain JAX body, which is the specification, and a Triton kernel (`fused`); `dispatch` chooses
between them.
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ggem_jax.pooling import fused
from ggem_jax.pooling.dispatch import chosen, dispatched, varying_alike
from ggem_jax.pooling.fused import EIGHTH

Negatives = Literal["clamp", "abs", "shift", "signed"]

TINY = float(
    jnp.finfo(jnp.float32).tiny
)  # CPUs and GPUs round smaller numbers to zero, whose logarithm is no number
LEAST_EPS = 1e-36  # the smallest that check_rule lets through
_NO_MEAN = 1e-30  # a mean of signed powers this far below the largest of them is rounding


def power_pool(tokens, p, mask, eps, negatives, implementation):
    check_rule(eps, negatives)
    implementation = chosen(implementation, tokens, partial(fused.refusal, tokens))
    return _power_mean(
        *varying_alike(tokens, p, mask), float(eps), negatives, implementation
    ).astype(tokens.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _power_mean(tokens, p, mask, eps, negatives, implementation):
    """The power mean in float32 `(..., d)`; p is `(d,)`. Its gradient is closed-form and keeps only
    tokens, p and the pooled value.
    """
    return _power_mean_forward(tokens, p, mask, eps, negatives, implementation)[0]


def _power_mean_forward(tokens, p, mask, eps, negatives, implementation):
    kernel, plain = (
        partial(body, eps=eps, negatives=negatives) for body in (fused.power_mean, pooled_and_root)
    )
    pooled, y = dispatched(implementation, kernel, plain, tokens, p, mask)
    return pooled, (tokens, p, mask, y)


def _power_mean_backward(eps, negatives, implementation, residuals, cotangent):
    tokens, p, mask, y = residuals
    kernel, plain = (
        partial(body, eps=eps, negatives=negatives)
        for body in (fused.power_mean_gradient, cotangents)
    )
    by_tokens, by_p = dispatched(implementation, kernel, plain, tokens, p, mask, y, cotangent)
    return by_tokens, _summed(by_p, p), None


_power_mean.defvjp(_power_mean_forward, _power_mean_backward)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def norm_power_mean(tokens, scale, bias, p, mask, norm_eps, eps, negatives, implementation):
    """The power mean of the normalised tokens in float32 `(..., d)`; scale, bias and p are
    `(d,)`.
    """
    return _norm_power_mean_forward(
        tokens, scale, bias, p, mask, norm_eps, eps, negatives, implementation
    )[0]


def _norm_power_mean_forward(
    tokens, scale, bias, p, mask, norm_eps, eps, negatives, implementation
):
    options = {"norm_eps": norm_eps, "eps": eps, "negatives": negatives}
    kernel, plain = (
        partial(body, **options) for body in (fused.norm_power_mean, _normed_pooled_and_statistics)
    )
    pooled, statistics = dispatched(implementation, kernel, plain, tokens, scale, bias, p, mask)
    return pooled, (tokens, scale, bias, p, mask, pooled, statistics)


def _norm_power_mean_backward(norm_eps, eps, negatives, implementation, residuals, cotangent):
    tokens, scale, bias, p, mask, pooled, statistics = residuals
    kernel = partial(fused.norm_power_mean_gradient, eps=eps, negatives=negatives)
    plain = partial(_norm_cotangents, norm_eps=norm_eps, eps=eps, negatives=negatives)
    by_tokens, by_rows = dispatched(
        implementation, kernel, plain, tokens, scale, bias, p, mask, pooled, statistics, cotangent
    )
    by_p, by_scale, by_bias = (_summed(by_rows[..., i, :], p) for i in range(3))
    return by_tokens, by_scale, by_bias, by_p, None


norm_power_mean.defvjp(_norm_power_mean_forward, _norm_power_mean_backward)


def _normed_pooled_and_statistics(tokens, scale, bias, p, mask, *, norm_eps, eps, negatives):
    x = widened(keep(tokens, mask, 0))
    mean = jnp.mean(x, axis=-1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + norm_eps)
    z = (x - mean) * inverse * lifted(scale, x) + lifted(bias, x)
    pooled, _ = pooled_and_root(z, p, mask, eps=eps, negatives=negatives)
    return pooled, jnp.stack([mean[..., 0], inverse[..., 0]], axis=-2)


def _norm_cotangents(
    tokens, scale, bias, p, mask, pooled, statistics, cotangent, *, norm_eps, eps, negatives
):
    """With u normalised and s the cotangent of z = u scale + bias: that of x is (s scale - mean_d(s
    scale) - u mean_d(s scale u)) / deviation.
    """
    mean, inverse = (
        jnp.expand_dims(
            statistics[..., i, :] if mask is None else jnp.where(mask, statistics[..., i, :], 0), -1
        )
        for i in range(2)
    )
    u = (widened(keep(tokens, mask, 0)) - mean) * inverse
    z = u * lifted(scale, u) + lifted(bias, u)
    root = (
        pooled_and_root(z, p, mask, eps=eps, negatives=negatives)[1]
        if negatives == "shift"
        else pooled * EIGHTH
    )
    s, by_p = cotangents(z, p, mask, root, cotangent, eps=eps, negatives=negatives)
    g = s * lifted(scale, u)
    by_x = (
        g - jnp.mean(g, axis=-1, keepdims=True) - u * jnp.mean(g * u, axis=-1, keepdims=True)
    ) * inverse
    if negatives == "signed":
        by_x = _finite(by_x, tokens.dtype)
    by_tokens = keep(by_x, mask, 0).astype(tokens.dtype)
    return by_tokens, jnp.stack([by_p, jnp.sum(s * u, axis=-2), jnp.sum(s, axis=-2)], axis=-2)


def _summed(by_rows, p):
    """Sums `(..., d)` over the rows, laid out over devices as p `(d,)` is."""
    return jax.vjp(lambda p: lifted(p, by_rows) + jnp.zeros_like(by_rows), p)[1](by_rows)[0]


def pooled_and_root(tokens, p, mask, *, eps, negatives):
    """(mean x^p)^(1/p) = m (mean (x/m)^p)^(1/p), with m the largest x: no power overflows and the
    largest is 1, whatever p.
    """
    x, offset = _positive_eighths(tokens, mask, eps, negatives)
    largest = jnp.max(x, axis=-2)
    largest = jnp.where(largest > 0, largest, 1)
    powers = jnp.exp(lifted(p, x) * _log(x / largest[..., None, :]))
    mean = jnp.clip(mean_of_kept(_sign(tokens, negatives) * powers, mask), -1, 1)
    mean = jnp.where(jnp.abs(mean) < _NO_MEAN, 0, mean)
    y = jnp.sign(mean) * largest * jnp.exp(_log(jnp.abs(mean)) / lifted(p, mean))
    return where_any(mask, (y + offset) / EIGHTH), y


def cotangents(tokens, p, mask, y, cotangent, *, eps, negatives):
    """With y = (mean x^p)^(1/p): dy/dx_n = (x_n/y)^(p-1) / count and dy/dp = (y/p) mean_n (x_n/y)^p
    log(x_n/y), the latter for each row.
    """
    cotangent = where_any(mask, cotangent / EIGHTH)
    by_y = jnp.where(y == 0, 0, cotangent)
    size = jnp.where(
        y == 0, jnp.inf, jnp.abs(y)
    )  # of a zero mean: all ratios 0, so that none overflows
    (x, _), by_positive = jax.vjp(
        lambda tokens: _positive_eighths(tokens, mask, eps, negatives), tokens
    )
    ratio = x / size[..., None, :]
    slope = _sign(tokens, negatives) * jnp.exp((lifted(p, x) - 1) * _log(ratio))
    by_x = (by_y / count(x, mask))[..., None, :] * slope
    by_p = by_y * (jnp.abs(y) / lifted(p, y) * mean_of_kept(slope * ratio * _log(ratio), mask))
    if (
        negatives == "signed"
    ):  # where positive and negative powers nearly cancel the true slopes can exceed the dtype
        by_x, by_p = _finite(by_x, tokens.dtype), _finite(by_p, by_p.dtype)
    (by_tokens,) = by_positive((by_x, cotangent))
    return by_tokens, by_p


def _positive_eighths(tokens, mask, eps, negatives):
    """The positive numbers that are raised to p, `(..., n, d)`, and what is added after the root,
    `(..., d)`: an eighth of both.
    """
    x, eps = EIGHTH * widened(keep(tokens, mask, 0)), EIGHTH * eps
    nothing = jnp.zeros_like(jnp.max(x, axis=-2))
    match negatives:
        case "clamp":
            return keep(jnp.where(x <= eps, eps, x), mask, 0), nothing
        case "abs":
            size = jnp.abs(x)
            return keep(jnp.where(size <= eps, eps, size), mask, 0), nothing
        case "shift":
            lowest = where_any(mask, jnp.min(keep(x, mask, jnp.inf), axis=-2))
            return keep(x - lowest[..., None, :] + eps, mask, 0), lowest - eps
        case _:
            return (
                jnp.where(x < 0, -x, x),
                nothing,
            )  # not abs, whose gradient is 0 at 0: a signed mean with p = 1 is the mean


def _sign(tokens, negatives):
    return jnp.where(EIGHTH * widened(tokens) < 0, -1.0, 1.0) if negatives == "signed" else 1.0


def _log(x):
    """Logarithm of a number of at least 0; numbers below the normal range, which devices round to
    zero, count as its lower end.
    """
    return jnp.log(jnp.maximum(x, TINY))


def _finite(values, dtype):
    limit = float(jnp.finfo(dtype).max)
    return jnp.clip(values, -limit, limit)


def widened(tokens):
    return tokens.astype(jnp.float64 if tokens.dtype == jnp.float64 else jnp.float32)


def lifted(per_channel, values):
    """`(d,)` with leading axes of length 1, to go with `values` `(..., d)`."""
    return jnp.expand_dims(per_channel, range(values.ndim - 1))


def keep(values, mask, fill):
    return values if mask is None else jnp.where(mask[..., None], values, fill)


def where_any(mask, values, otherwise=0):
    """`values` `(..., d)` in the rows that keep a token, `otherwise` in the rest."""
    return (
        values if mask is None else jnp.where(jnp.any(mask, axis=-1)[..., None], values, otherwise)
    )


def count(values, mask):
    """How many tokens are kept, at least 1: a number, or `(..., 1)` under a mask."""
    return (
        values.shape[-2]
        if mask is None
        else jnp.maximum(jnp.sum(mask, axis=-1), 1)[..., None].astype(values.dtype)
    )


def mean_of_kept(values, mask):
    return jnp.sum(keep(values, mask, 0), axis=-2) / count(values, mask)


def check_rule(eps, negatives):
    if negatives not in get_args(Negatives):
        raise ValueError(
            f"negatives must be one of {', '.join(get_args(Negatives))}, not {negatives!r}"
        )
    if not (isinstance(eps, int | float | np.number) and LEAST_EPS <= eps <= 1e36):
        raise ValueError(f"eps must be a Python number from 1e-36 to 1e36, not {eps!r}")
