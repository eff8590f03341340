"""The power mean (mean_n x_n^p)^(1/p) over tokens, its closed-form gradient, and the same after a
LayerNorm.

`tokens` are `(..., n, d)`, `p` is `(d,)`, `mask` is `(..., n)` with true = keep. Each operation has
a plain JAX body, which is the specification, and a Triton kernel (`fused`); `dispatch` chooses
between them. How tokens that are not positive are handled: `sign_rules`.

All numbers are computed as eighths (`EIGHTH`), so that no sum of two of them overflows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ggem_jax.pooling import fused
from ggem_jax.pooling.dispatch import (
    Implementation,
    choose_implementation,
    run_implementation,
    vary_alike,
)
from ggem_jax.pooling.fused import EIGHTH
from ggem_jax.pooling.masks import Mask, count, keep, lift, mean_of_kept, where_any, widen
from ggem_jax.pooling.sign_rules import RULES, Negatives, check_rule

# devices round smaller numbers to zero, of which there is no logarithm
TINY = float(jnp.finfo(jnp.float32).tiny)
_NO_MEAN = 1e-30  # a mean of signed powers this far below the largest of them is rounding


def power_pool(
    tokens: Float[Array, "*b all d"],
    p: Float[Array, " d"],
    mask: Mask,
    eps: float,
    negatives: Negatives,
    implementation: Implementation | None,
    skip: int = 0,
) -> Float[Array, "*b d"]:
    """Returns the power mean of tokens over n, `(..., d)`, in their dtype.

    Args:
        tokens: The tokens, `(..., skip + n, d)`.
        p: One exponent for each channel, `(d,)`.
        mask: Which tokens to keep, `(..., n)`; None keeps all.
        eps: Smallest number that is raised to p.
        negatives: The sign rule.
        implementation: "xla", "triton", "interpret", or None to choose.
        skip: Number of tokens at the start that are not pooled.

    Returns:
        The pooled tokens, `(..., d)`.

    Raises:
        ValueError: The sign rule, eps or implementation is unknown or out of range.
        NotImplementedError: The implementation that was asked for cannot do this.
    """
    check_rule(eps, negatives)
    refused = RULES[negatives].refusal(negatives)
    implementation = choose_implementation(
        implementation, tokens, lambda: refused or fused.refusal(tokens)
    )
    arrays = vary_alike(tokens, p, mask)
    return _power_mean(*arrays, float(eps), negatives, implementation, skip).astype(tokens.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _power_mean(tokens, p, mask, eps, negatives, implementation, skip):
    """The power mean in float32 `(..., d)`; its gradient is closed-form and keeps only tokens, p
    and the root.
    """
    return _power_mean_forward(tokens, p, mask, eps, negatives, implementation, skip)[0]


def _power_mean_forward(tokens, p, mask, eps, negatives, implementation, skip):
    options = {"skip": skip, "eps": eps, "negatives": negatives}
    kernel, plain = (partial(body, **options) for body in (fused.power_mean, _pooled_and_root))
    pooled, root = run_implementation(implementation, kernel, plain, tokens, p, mask)
    return pooled, (tokens, p, mask, root)


def _power_mean_backward(eps, negatives, implementation, skip, residuals, cotangent):
    tokens, p, mask, root = residuals
    options = {"skip": skip, "eps": eps, "negatives": negatives}
    kernel, plain = (partial(body, **options) for body in (fused.power_mean_gradient, _cotangents))
    by_tokens, by_p = run_implementation(
        implementation, kernel, plain, tokens, p, mask, root, cotangent
    )
    return by_tokens, _sum_rows(by_p, p), None


_power_mean.defvjp(_power_mean_forward, _power_mean_backward)


def _pooled_and_root(tokens, p, mask, *, skip, **options):
    return pooled_and_root(tokens[..., skip:, :], p, mask, **options)


def _cotangents(tokens, p, mask, root, cotangent, *, skip, **options):
    by_rest, by_p = cotangents(tokens[..., skip:, :], p, mask, root, cotangent, **options)
    return _after_zeros(by_rest, skip), by_p


def _after_zeros(by_tokens, skip):
    """Cotangents of all tokens, those of the first `skip` of them zero."""
    return jnp.pad(by_tokens, [(0, 0)] * (by_tokens.ndim - 2) + [(skip, 0), (0, 0)])


def norm_power_pool(
    tokens: Float[Array, "*b all d"],
    scale: Float[Array, " d"],
    bias: Float[Array, " d"],
    p: Float[Array, " d"],
    mask: Mask,
    norm_eps: float,
    eps: float,
    negatives: Negatives,
    implementation: Implementation | None,
    skip: int = 0,
) -> Float[Array, "*b d"]:
    """Returns the power mean of layer-normalised tokens, `(..., d)`, in the dtype of the tokens.

    Args:
        tokens: The tokens, `(..., skip + n, d)`.
        scale: Factor of the normalised tokens, `(d,)`.
        bias: Added to them, `(d,)`.
        p: One exponent for each channel, `(d,)`.
        mask: Which tokens to keep, `(..., n)`; None keeps all.
        norm_eps: Added to the variance.
        eps: Smallest number that is raised to p.
        negatives: The sign rule.
        implementation: "xla", "triton", "interpret", or None to choose.
        skip: Number of tokens at the start that are not pooled.

    Returns:
        The pooled tokens, `(..., d)`.

    Raises:
        ValueError: The sign rule, eps or implementation is unknown or out of range.
        NotImplementedError: The implementation that was asked for cannot do this.
    """
    check_rule(eps, negatives)
    refused = RULES[negatives].refusal(negatives)
    implementation = choose_implementation(
        implementation, tokens, lambda: refused or fused.norm_refusal(tokens, negatives)
    )
    arrays = vary_alike(tokens, scale, bias, p, mask)
    options = (float(norm_eps), float(eps), negatives, implementation, skip)
    return _norm_power_mean(*arrays, *options).astype(tokens.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8, 9))
def _norm_power_mean(tokens, scale, bias, p, mask, norm_eps, eps, negatives, implementation, skip):
    """The power mean of the normalised tokens in float32 `(..., d)`; its gradient keeps the tokens
    and normalises them again.
    """
    return _norm_power_mean_forward(
        tokens, scale, bias, p, mask, norm_eps, eps, negatives, implementation, skip
    )[0]


def _norm_power_mean_forward(
    tokens, scale, bias, p, mask, norm_eps, eps, negatives, implementation, skip
):
    options = {"skip": skip, "norm_eps": norm_eps, "eps": eps, "negatives": negatives}
    bodies = (fused.norm_power_mean, _normalise_and_pool)
    kernel, plain = (partial(body, **options) for body in bodies)
    pooled, statistics = run_implementation(
        implementation, kernel, plain, tokens, scale, bias, p, mask
    )
    return pooled, (tokens, scale, bias, p, mask, pooled, statistics)


def _norm_power_mean_backward(norm_eps, eps, negatives, implementation, skip, residuals, cotangent):
    tokens, scale, bias, p, mask, pooled, statistics = residuals
    options = {"skip": skip, "eps": eps, "negatives": negatives}
    kernel = partial(fused.norm_power_mean_gradient, **options)
    plain = partial(_norm_cotangents, norm_eps=norm_eps, **options)
    by_tokens, by_rows = run_implementation(
        implementation, kernel, plain, tokens, scale, bias, p, mask, pooled, statistics, cotangent
    )
    by_p, by_scale, by_bias = (_sum_rows(by_rows[..., i, :], p) for i in range(3))
    return by_tokens, by_scale, by_bias, by_p, None


_norm_power_mean.defvjp(_norm_power_mean_forward, _norm_power_mean_backward)


def _normalise_and_pool(tokens, scale, bias, p, mask, *, skip, norm_eps, eps, negatives):
    """The pooled value `(..., d)`; mean and 1 / deviation of each token, `(..., 2, n)`."""
    tokens = tokens[..., skip:, :]
    x = widen(keep(tokens, mask, 0))
    mean = jnp.mean(x, axis=-1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + norm_eps)
    x = widen(keep(_read_again(tokens), mask, 0))
    z = (x - mean) * inverse * lift(scale, x) + lift(bias, x)
    pooled, _ = pooled_and_root(z, p, mask, eps=eps, negatives=negatives)
    return pooled, jnp.stack([mean[..., 0], inverse[..., 0]], axis=-2)


def _norm_cotangents(
    tokens, scale, bias, p, mask, pooled, statistics, cotangent, *, skip, norm_eps, eps, negatives
):
    """With u normalised and s the cotangent of z = u scale + bias: that of x is (s scale - mean_d(s
    scale) - u mean_d(s scale u)) / deviation.
    """
    tokens = tokens[..., skip:, :]
    if mask is not None:
        statistics = jnp.where(mask[..., None, :], statistics, 0)
    mean, inverse = (jnp.expand_dims(statistics[..., i, :], -1) for i in range(2))
    options = {"eps": eps, "negatives": negatives}

    def normalised(tokens):
        u = (widen(keep(tokens, mask, 0)) - mean) * inverse
        return u, u * lift(scale, u) + lift(bias, u)

    root = pooled * EIGHTH
    if RULES[negatives].adds_offset:
        root = pooled_and_root(normalised(tokens)[1], p, mask, **options)[1]

    def slopes(tokens):
        u, z = normalised(tokens)
        s = _token_cotangents(z, p, mask, root, cotangent, **options)
        return u, s, s * lift(scale, u)

    u, _, g = slopes(tokens)
    mean_g, mean_gu = (jnp.mean(each, axis=-1, keepdims=True) for each in (g, g * u))
    again = _read_again(tokens)
    u, _, g = slopes(again)
    by_x = (g - mean_g - u * mean_gu) * inverse
    if RULES[negatives].signed:
        by_x = _clip_to(by_x, tokens.dtype)
    by_tokens = _after_zeros(keep(by_x, mask, 0).astype(tokens.dtype), skip)

    u, s, _ = slopes(again)
    by_p = _exponent_cotangent(normalised(again)[1], p, mask, root, cotangent, **options)
    return by_tokens, jnp.stack([by_p, jnp.sum(s * u, axis=-2), jnp.sum(s, axis=-2)], axis=-2)


def _sum_rows(by_rows, p):
    """Sums `(..., d)` over the rows, laid out over devices as p `(d,)` is."""
    return jax.vjp(lambda p: lift(p, by_rows) + jnp.zeros_like(by_rows), p)[1](by_rows)[0]


def pooled_and_root(tokens, p, mask, *, eps, negatives):
    """Returns the power mean over the tokens and an eighth of its root, in plain JAX.

    (mean x^p)^(1/p) = m (mean (x/m)^p)^(1/p), with m the largest x. No power overflows, and the
    largest is 1 for every p.

    Args:
        tokens: The tokens, `(..., n, d)`.
        p: One exponent for each channel, `(d,)`.
        mask: Which tokens to keep, `(..., n)`; None keeps all.
        eps: Smallest number that is raised to p.
        negatives: The sign rule by name.

    Returns:
        The pooled value, `(..., d)`, and an eighth of the root, `(..., d)`, which lacks the offset
        of the rule "shift". Both have the dtype of the mathematics.
    """
    rule, eighths = RULES[negatives], _eighths(tokens, mask)
    x, offset = rule.positive(eighths, mask, EIGHTH * eps)
    largest = jnp.max(x, axis=-2)
    largest = jnp.where(largest > 0, largest, 1)
    powers = jnp.exp(lift(p, x) * _log(x / largest[..., None, :]))
    mean = jnp.clip(mean_of_kept(rule.sign(eighths) * powers, mask), -1, 1)
    mean = jnp.where(jnp.abs(mean) < _NO_MEAN, 0, mean)
    root = jnp.sign(mean) * largest * jnp.exp(_log(jnp.abs(mean)) / lift(p, mean))
    return where_any(mask, (root + offset) / EIGHTH), root


def cotangents(tokens, p, mask, root, cotangent, *, eps, negatives):
    """Returns the cotangents of the tokens and, for each row, of p, in plain JAX.

    With y = (mean x^p)^(1/p): dy/dx_n = (x_n/y)^(p-1) / count and dy/dp = (y/p) mean_n (x_n/y)^p
    log(x_n/y).

    Args:
        tokens: The tokens, `(..., n, d)`.
        p: One exponent for each channel, `(d,)`.
        mask: Which tokens to keep, `(..., n)`; None keeps all.
        root: An eighth of y, from `pooled_and_root`, `(..., d)`.
        cotangent: Cotangent of the pooled value, `(..., d)`.
        eps: Smallest number that is raised to p.
        negatives: The sign rule by name.

    Returns:
        The cotangents of the tokens, `(..., n, d)`, in their dtype, and of p, `(..., d)`.
    """
    rest, options = (p, mask, root, cotangent), {"eps": eps, "negatives": negatives}
    by_tokens = _token_cotangents(tokens, *rest, **options)
    return by_tokens, _exponent_cotangent(_read_again(tokens), *rest, **options)


def _token_cotangents(tokens, p, mask, root, cotangent, *, eps, negatives):
    """Returns the first result of `cotangents`."""
    rule, by_y = RULES[negatives], _by_root(mask, root, cotangent)
    (x, _), by_positive = jax.vjp(lambda tokens: _positive(tokens, mask, eps, rule), tokens)
    slope, _ = _slope_and_ratio(tokens, p, mask, root, eps, rule)
    by_x = (by_y / count(x, mask))[..., None, :] * slope
    if rule.signed:
        # where positive and negative powers nearly cancel, the true slopes can exceed the dtype
        by_x = _clip_to(by_x, tokens.dtype)
    return by_positive((by_x, where_any(mask, cotangent / EIGHTH)))[0]


def _exponent_cotangent(tokens, p, mask, root, cotangent, *, eps, negatives):
    """Returns the second result of `cotangents`."""
    rule = RULES[negatives]
    slope, ratio = _slope_and_ratio(tokens, p, mask, root, eps, rule)
    mean = mean_of_kept(slope * ratio * _log(ratio), mask)
    by_p = _by_root(mask, root, cotangent) * (jnp.abs(root) / lift(p, root) * mean)
    return _clip_to(by_p, by_p.dtype) if rule.signed else by_p


def _by_root(mask, root, cotangent):
    return jnp.where(root == 0, 0, where_any(mask, cotangent / EIGHTH))


def _eighths(tokens, mask):
    return EIGHTH * widen(keep(tokens, mask, 0))


def _positive(tokens, mask, eps, rule):
    return rule.positive(_eighths(tokens, mask), mask, EIGHTH * eps)


def _slope_and_ratio(tokens, p, mask, root, eps, rule):
    """(x / y)^(p - 1) with the sign of the power, and x / y; both 0 where the mean is 0."""
    size = jnp.where(root == 0, jnp.inf, jnp.abs(root))
    ratio = _positive(tokens, mask, eps, rule)[0] / size[..., None, :]
    return rule.sign(_eighths(tokens, mask)) * jnp.exp((lift(p, ratio) - 1) * _log(ratio)), ratio


def _read_again(array):
    """Returns the array for a second use that, on NVIDIA GPUs, shares nothing with the first.

    What two passes over the tokens have in common XLA computes once and writes to memory as
    float32. Computed twice, half as many bytes move (`benchmarks/xla_traffic.py`). On other
    devices this changes nothing.
    """
    return lax.platform_dependent(array, cuda=lax.optimization_barrier, default=lambda same: same)


def _log(x):
    """The logarithm of a number of at least 0; numbers below the normal range count as its lower
    end.
    """
    return jnp.log(jnp.maximum(x, TINY))


def _clip_to(values, dtype):
    limit = float(jnp.finfo(dtype).max)
    return jnp.clip(values, -limit, limit)
