"""Poolings: tokens `(..., n, d)` -> one descriptor `(..., d)`.

Every function is pure and works under `jit`, `grad`, `vmap`, `scan` and on sharded arrays. The result has the dtype of the tokens; the mathematics is
done in float32 (float64 for float64 tokens). `mask` is `(..., n)`, true = keep: pooling a padded batch equals pooling the unpadded tokens, whatever
the padding holds, and a row with nothing to keep gives zeros with zero gradients. A kept NaN gives NaN.

The power means have one real parameter p > 0 per channel: p = 1 is the mean, a large p approaches the maximum; values and gradients are accurate for
p from 1 to 1000. They need positive numbers, which tokens are not. `negatives` names what is done about it, with m the minimum over the kept tokens
of a channel:

- `"clamp"`   (mean_n max(x_n, eps)^p)^(1/p): a negative token becomes eps, as in a ReLU. The usual choice.
- `"abs"`     (mean_n max(|x_n|, eps)^p)^(1/p)
- `"shift"`   (mean_n (x_n - m + eps)^p)^(1/p) + m - eps
- `"signed"`  sign(s) |s|^(1/p) with s = mean_n sign(x_n) |x_n|^p. Where s is zero (within 1e-30 of the largest |x_n|^p) so is the gradient.

The gradients of the power means are closed-form: reverse mode, also twice (`grad`, `jacrev`, `hessian`), while `jvp` and `jacfwd` raise `TypeError`.
On a mesh with explicit axis types exponents must be whole on every device.

Errors: `TypeError` for tokens that are not floating point, `ValueError` for every other mistake of the caller, `NotImplementedError` for an
`implementation` that cannot do what was asked.
"""

from functools import partial, reduce
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from ggem_jax import fused
from ggem_jax.dispatch import Implementation, chosen, dispatched, varying_alike
from ggem_jax.fused import EIGHTH as _EIGHTH

Negatives = Literal["clamp", "abs", "shift", "signed"]
Layout = Literal["contiguous", "interleaved"]

_TINY = float(jnp.finfo(jnp.float32).tiny)  # CPUs and GPUs round smaller numbers to zero, whose logarithm is no number
_LEAST_EPS = 1e-36  # the smallest that _check_rule lets through
_NOTHING = -1e30  # the logarithm of a power of zero: whatever p, it adds nothing to a sum
_NO_MEAN = 1e-30  # a mean of signed powers this far below the largest of them is rounding


def cls_pool(tokens: Float[Array, "*b n d"]) -> Float[Array, "*b d"]:
    """Takes the first token, where a Vision Transformer keeps its class token."""
    return _checked(tokens)[0][..., 0, :]


def avg_pool(tokens: Float[Array, "*b n d"], *, mask: Bool[Array, "*b n"] | None = None) -> Float[Array, "*b d"]:
    """Averages the kept tokens."""
    tokens, mask = _checked(tokens, mask)
    return _mean(_widened(_kept(tokens, mask, 0)), mask).astype(tokens.dtype)


def max_pool(tokens: Float[Array, "*b n d"], *, mask: Bool[Array, "*b n"] | None = None) -> Float[Array, "*b d"]:
    """Takes the largest of the kept tokens in each channel; equal ones share the gradient."""
    tokens, mask = _checked(tokens, mask)
    return _where_any(mask, jnp.max(_kept(tokens, mask, -jnp.inf), axis=-2))


def lse_pool(tokens: Float[Array, "*b n d"], r: ArrayLike, *, mask: Bool[Array, "*b n"] | None = None) -> Float[Array, "*b d"]:
    """Pools by log-sum-exp, (1/r) log mean_n exp(r x_n): the average for r -> 0, the maximum for r -> infinity, whatever the signs.

    `r > 0` is a scalar or one number per channel, `(d,)`; timm starts its learnable one at 10.
    Reference: Pinheiro and Collobert, "From Image-level to Pixel-level Labeling with Convolutional Networks", 2015, arXiv:1411.6228.
    """
    tokens, mask = _checked(tokens, mask)
    sharpness = _per_channel(r, tokens, "r")
    x = _widened(_kept(tokens, mask, 0))
    pivot = lax.stop_gradient(_where_any(mask, jnp.max(_kept(x, mask, -jnp.inf), axis=-2)))  # cancels; keeps exp in range
    below = jnp.maximum(x - pivot[..., None, :], float(jnp.finfo(x.dtype).min))
    z = _kept(_lifted(sharpness, x) * below, mask, 0)
    mean, less = _where_any(mask, _mean(jnp.exp(z), mask), 1), _mean(jnp.expm1(z), mask)  # less: mean - 1 without its rounding, for small r
    log_mean = jnp.where(less > -0.5, jnp.log1p(jnp.maximum(less, -0.5)), jnp.log(mean))
    return _where_any(mask, pivot + log_mean / _lifted(sharpness, pivot)).astype(tokens.dtype)


def gem_pool(
    tokens: Float[Array, "*b n d"],
    p: ArrayLike,
    *,
    mask: Bool[Array, "*b n"] | None = None,
    eps: float = 1e-6,
    negatives: Negatives = "clamp",
    implementation: Implementation | None = None,
) -> Float[Array, "*b d"]:
    """Pools by the generalized mean (mean_n x_n^p)^(1/p): one exponent for all channels, `p: ()`, or one for each, `p: (d,)`.

    Values and gradients are finite for p from 1 to 1000 in float32, bfloat16 and float16, also in channels without a positive token.
    Reference: Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", 2018, arXiv:1711.02512, eq. 3.
    """
    tokens, mask = _checked(tokens, mask)
    return _power_pool(tokens, _per_channel(p, tokens, "p"), mask, eps, negatives, implementation)


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
    """Pools by the group generalized mean: the d channels are split into equal groups, and `p: (groups,)` holds one exponent for each.

    `layout` says to which group channel c belongs: `"contiguous"` c // (d / groups), `"interleaved"` c mod groups. The paper's text leaves this
    open and the public re-implementations differ. The two are one fixed permutation of the channels apart, so exponents learned in one layout mean
    nothing in the other. One group is `gem_pool` with one exponent, d groups are `gem_pool` with one for each channel.

    Reference: Ko et al., "Group Generalized Mean Pooling for Vision Transformer", 2022, arXiv:2212.04114.
    """
    tokens, mask = _checked(tokens, mask)
    exponents = spread_over_channels(_parameter(p, tokens, "p"), tokens.shape[-1], layout=layout)
    return _power_pool(tokens, exponents, mask, eps, negatives, implementation)


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
    """`ggem_pool` of layer-normalised tokens, the end of a ViT: z = (x - mean_d x) / sqrt(var_d x + norm_eps) * scale + bias, then the pooling of z.

    `scale` and `bias` are `(d,)`. The normalised tokens stay in float32. The gradient keeps the tokens alone and normalises again.
    Reference: Ba et al., "Layer Normalization", 2016, arXiv:1607.06450.
    """
    tokens, mask = _checked(tokens, mask)
    gain = _per_channel(scale, tokens, "scale", positive=False)
    shift = _per_channel(bias, tokens, "bias", positive=False)
    exponents = spread_over_channels(_parameter(p, tokens, "p"), tokens.shape[-1], layout=layout)
    _check_rule(eps, negatives)
    if not (isinstance(norm_eps, int | float | np.number) and 1e-36 <= norm_eps <= 1e36):
        raise ValueError(f"norm_eps must be a Python number from 1e-36 to 1e36, not {norm_eps!r}")
    implementation = chosen(implementation, tokens, partial(fused.norm_refusal, tokens, negatives))
    arrays = varying_alike(tokens, gain, shift, exponents, mask)
    return _norm_power_mean(*arrays, float(norm_eps), float(eps), negatives, implementation).astype(tokens.dtype)


def relup(x: ArrayLike, *, alpha: float = 0.014) -> Array:
    """ReLU-P: max(x, alpha), neither shifted nor zeroed; alpha = 0 is ReLU. Any shape.

    Reference: Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", 2023, arXiv:2308.06954, and its code.
    """
    return jnp.maximum(jnp.asarray(x), float(alpha))


def regional_gem(feature_map: Float[Array, "*b h w d"], *, p: float = 2.5, window: int = 5) -> Float[Array, "*b h w d"]:
    """Regional GeM: half the map plus half its power mean over a sliding window, x / 2 + (mean_window x^p)^(1/p) / 2, with reflected borders.

    `window` is odd, and h and w are at least `(window + 1) / 2`. Negative entries count as zero, as after a ReLU; the official code gives NaN there.
    The powers are summed in log space, so that `p` may be large. A window of zeros gives zero, with a zero gradient.
    Reference: Shao et al., 2023, arXiv:2308.06954, and its code: github.com/ShihaoShao-GH/SuperGlobal.
    """
    feature_map = _checked_map(feature_map, window)
    _check_exponent(p, "p")
    return _regional(_widened(feature_map), p, window).astype(feature_map.dtype)


def superglobal_pool(
    feature_map: Float[Array, "*b h w d"],
    *,
    regional_p: float = 2.5,
    window: int = 5,
    p: float = 4.6,
    eps: float = 1e-8,
    implementation: Implementation | None = None,
) -> Float[Array, "*b d"]:
    """SuperGlobal's pooling of a feature map: `regional_gem`, then GeM+, which is `gem_pool` over all places with a fixed large exponent.

    In between everything stays in float32. On a GPU one kernel reads the map once; the gradient is that of plain JAX.
    Reference: Shao et al., 2023, arXiv:2308.06954, and its code: github.com/ShihaoShao-GH/SuperGlobal.
    """
    feature_map = _checked_map(feature_map, window)
    _check_exponent(regional_p, "regional_p")
    _check_exponent(p, "p")
    _check_rule(eps, "clamp")
    implementation = chosen(implementation, feature_map, partial(fused.superglobal_refusal, feature_map, regional_p, window, p))
    options: Any = {"regional_p": float(regional_p), "window": int(window), "p": float(p), "eps": float(eps)}
    (pooled,) = dispatched(implementation, partial(fused.superglobal, **options), partial(_superglobal, **options), feature_map)
    return pooled.astype(feature_map.dtype)


def scale_gem(descriptors: Float[Array, "scales *b d"], *, p: float = np.inf) -> Float[Array, "*b d"]:
    """Scale GeM: joins the descriptors of one image at several scales, the scales along the first axis.

    With p = infinity each descriptor is L2-normalised and the largest of each channel taken, signs included. With a finite p nothing is normalised:
    (mean_s (x_s - m)^p)^(1/p) + m with m the minimum over the whole array, which makes a result depend on the other images in it. Both as in
    the official code. The result is not normalised.

    Reference: Shao et al., 2023, arXiv:2308.06954, and its code: github.com/ShihaoShao-GH/SuperGlobal.
    """
    descriptors = jnp.asarray(descriptors)
    if not jnp.issubdtype(descriptors.dtype, jnp.floating):
        raise TypeError(f"descriptors must be floating point, not {descriptors.dtype}")
    if descriptors.ndim < 2 or 0 in (descriptors.shape[0], descriptors.shape[-1]):
        raise ValueError(f"descriptors must be (scales, ..., d) with at least one scale and one channel, not of shape {descriptors.shape}")
    x = _widened(descriptors)
    if isinstance(p, int | float | np.number) and p == np.inf:
        return jnp.max(l2_normalize(x), axis=0).astype(descriptors.dtype)
    _check_exponent(p, "p")
    lowest = jnp.min(x, initial=jnp.inf)
    above = jnp.moveaxis(x - lowest, 0, -2)
    powers = jnp.full(x.shape[-1], p, x.dtype)
    return (_power_pool(above, powers, None, _LEAST_EPS, "clamp", "xla") + lowest).astype(descriptors.dtype)


def l2_normalize(descriptors: Float[Array, "*b d"], *, eps: float = 1e-12) -> Float[Array, "*b d"]:
    """x / max(|x|, eps), in float32; no length overflows or underflows on the way, and the gradient of a zero vector is finite."""
    descriptors = jnp.asarray(descriptors)
    x = _widened(descriptors)
    largest = lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), _TINY))
    squares = jnp.sum(jnp.square(x / largest), axis=-1, keepdims=True)
    length = largest * jnp.sqrt(jnp.maximum(squares, _TINY))
    return (x / jnp.maximum(length, eps)).astype(descriptors.dtype)


def spread_over_channels(p: Float[Array, " groups"], channels: int, *, layout: Layout = "contiguous") -> Float[Array, " channels"]:
    """Gives each channel the exponent of its group, `(groups,)` -> `(channels,)`; the layouts are those of `ggem_pool`."""
    p = jnp.asarray(p)
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, not {layout!r}")
    if p.ndim != 1 or p.shape[0] == 0 or channels % p.shape[0]:
        raise ValueError(f"p must be (groups,) with groups dividing the {channels} channels, not an array of shape {p.shape}")
    channels_per_group = channels // p.shape[0]
    return jnp.repeat(p, channels_per_group) if layout == "contiguous" else jnp.tile(p, channels_per_group)


def _power_pool(tokens, p, mask, eps, negatives, implementation):
    _check_rule(eps, negatives)
    implementation = chosen(implementation, tokens, partial(fused.refusal, tokens))
    return _power_mean(*varying_alike(tokens, p, mask), float(eps), negatives, implementation).astype(tokens.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _power_mean(tokens, p, mask, eps, negatives, implementation):
    """The power mean in float32 `(..., d)`; p is `(d,)`. Its gradient is closed-form and keeps only tokens, p and the pooled value."""
    return _power_mean_forward(tokens, p, mask, eps, negatives, implementation)[0]


def _power_mean_forward(tokens, p, mask, eps, negatives, implementation):
    kernel, plain = (partial(body, eps=eps, negatives=negatives) for body in (fused.power_mean, _pooled_and_root))
    pooled, y = dispatched(implementation, kernel, plain, tokens, p, mask)
    return pooled, (tokens, p, mask, y)


def _power_mean_backward(eps, negatives, implementation, residuals, cotangent):
    tokens, p, mask, y = residuals
    kernel, plain = (partial(body, eps=eps, negatives=negatives) for body in (fused.power_mean_gradient, _cotangents))
    by_tokens, by_p = dispatched(implementation, kernel, plain, tokens, p, mask, y, cotangent)
    return by_tokens, _summed(by_p, p), None


_power_mean.defvjp(_power_mean_forward, _power_mean_backward)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _norm_power_mean(tokens, scale, bias, p, mask, norm_eps, eps, negatives, implementation):
    """The power mean of the normalised tokens in float32 `(..., d)`; scale, bias and p are `(d,)`."""
    return _norm_power_mean_forward(tokens, scale, bias, p, mask, norm_eps, eps, negatives, implementation)[0]


def _norm_power_mean_forward(tokens, scale, bias, p, mask, norm_eps, eps, negatives, implementation):
    options = {"norm_eps": norm_eps, "eps": eps, "negatives": negatives}
    kernel, plain = (partial(body, **options) for body in (fused.norm_power_mean, _normed_pooled_and_statistics))
    pooled, statistics = dispatched(implementation, kernel, plain, tokens, scale, bias, p, mask)
    return pooled, (tokens, scale, bias, p, mask, pooled, statistics)


def _norm_power_mean_backward(norm_eps, eps, negatives, implementation, residuals, cotangent):
    tokens, scale, bias, p, mask, pooled, statistics = residuals
    kernel = partial(fused.norm_power_mean_gradient, eps=eps, negatives=negatives)
    plain = partial(_norm_cotangents, norm_eps=norm_eps, eps=eps, negatives=negatives)
    by_tokens, by_rows = dispatched(implementation, kernel, plain, tokens, scale, bias, p, mask, pooled, statistics, cotangent)
    by_p, by_scale, by_bias = (_summed(by_rows[..., i, :], p) for i in range(3))
    return by_tokens, by_scale, by_bias, by_p, None


_norm_power_mean.defvjp(_norm_power_mean_forward, _norm_power_mean_backward)


def _normed_pooled_and_statistics(tokens, scale, bias, p, mask, *, norm_eps, eps, negatives):
    x = _widened(_kept(tokens, mask, 0))
    mean = jnp.mean(x, axis=-1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + norm_eps)
    z = (x - mean) * inverse * _lifted(scale, x) + _lifted(bias, x)
    pooled, _ = _pooled_and_root(z, p, mask, eps=eps, negatives=negatives)
    return pooled, jnp.stack([mean[..., 0], inverse[..., 0]], axis=-2)


def _norm_cotangents(tokens, scale, bias, p, mask, pooled, statistics, cotangent, *, norm_eps, eps, negatives):
    """With u normalised and s the cotangent of z = u scale + bias: that of x is (s scale - mean_d(s scale) - u mean_d(s scale u)) / deviation."""
    mean, inverse = (jnp.expand_dims(statistics[..., i, :] if mask is None else jnp.where(mask, statistics[..., i, :], 0), -1) for i in range(2))
    u = (_widened(_kept(tokens, mask, 0)) - mean) * inverse
    z = u * _lifted(scale, u) + _lifted(bias, u)
    root = _pooled_and_root(z, p, mask, eps=eps, negatives=negatives)[1] if negatives == "shift" else pooled * _EIGHTH
    s, by_p = _cotangents(z, p, mask, root, cotangent, eps=eps, negatives=negatives)
    g = s * _lifted(scale, u)
    by_x = (g - jnp.mean(g, axis=-1, keepdims=True) - u * jnp.mean(g * u, axis=-1, keepdims=True)) * inverse
    if negatives == "signed":
        by_x = _finite(by_x, tokens.dtype)
    by_tokens = _kept(by_x, mask, 0).astype(tokens.dtype)
    return by_tokens, jnp.stack([by_p, jnp.sum(s * u, axis=-2), jnp.sum(s, axis=-2)], axis=-2)


def _superglobal(feature_map, *, regional_p, window, p, eps):
    mixed = _regional(_widened(feature_map), regional_p, window)
    places = mixed.reshape(*mixed.shape[:-3], mixed.shape[-3] * mixed.shape[-2], mixed.shape[-1])
    return (_power_pool(places, jnp.full(places.shape[-1], p, places.dtype), None, eps, "clamp", "xla"),)


def _regional(x, p, window):
    x = jnp.where(x < 0, 0, x)  # and not maximum, which shares the gradient at 0
    logs = jnp.where(x >= _TINY, p * jnp.log(jnp.maximum(x, _TINY)), _NOTHING)
    for axis in (-3, -2):
        logs = _windowed_log_sum_exp(logs, axis, window)
    local = jnp.exp((logs - 2 * np.log(window)) / p)
    return 0.5 * jnp.where(local > 2 * _TINY, local, 0) + 0.5 * x


def _windowed_log_sum_exp(logs, axis, window):
    """log sum exp over a sliding window along one axis, the borders reflected without repeating the edge."""
    half, length = window // 2, logs.shape[axis]
    widths = [(half, half) if i == logs.ndim + axis else (0, 0) for i in range(logs.ndim)]
    padded = jnp.pad(logs, widths, mode="reflect")
    shifted = [lax.slice_in_dim(padded, k, k + length, axis=axis) for k in range(window)]
    largest = lax.stop_gradient(reduce(jnp.maximum, shifted))
    return largest + jnp.log(sum(jnp.exp(each - largest) for each in shifted))


def _summed(by_rows, p):
    """Sums `(..., d)` over the rows, laid out over devices as p `(d,)` is."""
    return jax.vjp(lambda p: _lifted(p, by_rows) + jnp.zeros_like(by_rows), p)[1](by_rows)[0]


def _pooled_and_root(tokens, p, mask, *, eps, negatives):
    """(mean x^p)^(1/p) = m (mean (x/m)^p)^(1/p), with m the largest x: no power overflows and the largest is 1, whatever p."""
    x, offset = _positive_eighths(tokens, mask, eps, negatives)
    largest = jnp.max(x, axis=-2)
    largest = jnp.where(largest > 0, largest, 1)
    powers = jnp.exp(_lifted(p, x) * _log(x / largest[..., None, :]))
    mean = jnp.clip(_mean(_sign(tokens, negatives) * powers, mask), -1, 1)
    mean = jnp.where(jnp.abs(mean) < _NO_MEAN, 0, mean)
    y = jnp.sign(mean) * largest * jnp.exp(_log(jnp.abs(mean)) / _lifted(p, mean))
    return _where_any(mask, (y + offset) / _EIGHTH), y


def _cotangents(tokens, p, mask, y, cotangent, *, eps, negatives):
    """With y = (mean x^p)^(1/p): dy/dx_n = (x_n/y)^(p-1) / count and dy/dp = (y/p) mean_n (x_n/y)^p log(x_n/y), the latter for each row."""
    cotangent = _where_any(mask, cotangent / _EIGHTH)
    by_y = jnp.where(y == 0, 0, cotangent)
    size = jnp.where(y == 0, jnp.inf, jnp.abs(y))  # of a zero mean: all ratios 0, so that none overflows
    (x, _), by_positive = jax.vjp(lambda tokens: _positive_eighths(tokens, mask, eps, negatives), tokens)
    ratio = x / size[..., None, :]
    slope = _sign(tokens, negatives) * jnp.exp((_lifted(p, x) - 1) * _log(ratio))
    by_x = (by_y / _count(x, mask))[..., None, :] * slope
    by_p = by_y * (jnp.abs(y) / _lifted(p, y) * _mean(slope * ratio * _log(ratio), mask))
    if negatives == "signed":  # where positive and negative powers nearly cancel the true slopes can exceed the dtype
        by_x, by_p = _finite(by_x, tokens.dtype), _finite(by_p, by_p.dtype)
    (by_tokens,) = by_positive((by_x, cotangent))
    return by_tokens, by_p


def _positive_eighths(tokens, mask, eps, negatives):
    """The positive numbers that are raised to p, `(..., n, d)`, and what is added after the root, `(..., d)`: an eighth of both."""
    x, eps = _EIGHTH * _widened(_kept(tokens, mask, 0)), _EIGHTH * eps
    nothing = jnp.zeros_like(jnp.max(x, axis=-2))
    match negatives:
        case "clamp":
            return _kept(jnp.where(x <= eps, eps, x), mask, 0), nothing
        case "abs":
            size = jnp.abs(x)
            return _kept(jnp.where(size <= eps, eps, size), mask, 0), nothing
        case "shift":
            lowest = _where_any(mask, jnp.min(_kept(x, mask, jnp.inf), axis=-2))
            return _kept(x - lowest[..., None, :] + eps, mask, 0), lowest - eps
        case _:
            return jnp.where(x < 0, -x, x), nothing  # not abs, whose gradient is 0 at 0: a signed mean with p = 1 is the mean


def _sign(tokens, negatives):
    return jnp.where(_EIGHTH * _widened(tokens) < 0, -1.0, 1.0) if negatives == "signed" else 1.0


def _log(x):
    """Logarithm of a number of at least 0; numbers below the normal range, which devices round to zero, count as its lower end."""
    return jnp.log(jnp.maximum(x, _TINY))


def _finite(values, dtype):
    limit = float(jnp.finfo(dtype).max)
    return jnp.clip(values, -limit, limit)


def _widened(tokens):
    return tokens.astype(jnp.float64 if tokens.dtype == jnp.float64 else jnp.float32)


def _lifted(per_channel, values):
    """`(d,)` with leading axes of length 1, to go with `values` `(..., d)`."""
    return jnp.expand_dims(per_channel, range(values.ndim - 1))


def _kept(values, mask, fill):
    return values if mask is None else jnp.where(mask[..., None], values, fill)


def _where_any(mask, values, otherwise=0):
    """`values` `(..., d)` in the rows that keep a token, `otherwise` in the rest."""
    return values if mask is None else jnp.where(jnp.any(mask, axis=-1)[..., None], values, otherwise)


def _count(values, mask):
    """How many tokens are kept, at least 1: a number, or `(..., 1)` under a mask."""
    return values.shape[-2] if mask is None else jnp.maximum(jnp.sum(mask, axis=-1), 1)[..., None].astype(values.dtype)


def _mean(values, mask):
    return jnp.sum(_kept(values, mask, 0), axis=-2) / _count(values, mask)


def _checked(tokens, mask=None):
    tokens, mask = jnp.asarray(tokens), None if mask is None else jnp.asarray(mask)
    if not jnp.issubdtype(tokens.dtype, jnp.floating):
        raise TypeError(f"tokens must be floating point, not {tokens.dtype}")
    if tokens.ndim < 2 or 0 in tokens.shape[-2:]:
        raise ValueError(f"tokens must be (..., n, d) with at least one token and one channel, not of shape {tokens.shape}")
    if mask is not None and (mask.dtype != bool or mask.shape != tokens.shape[:-1]):
        raise ValueError(f"mask must be bool of shape {tokens.shape[:-1]}, true = keep, not {mask.dtype} of shape {mask.shape}")
    return tokens, mask


def _checked_map(feature_map, window):
    feature_map = jnp.asarray(feature_map)
    if not jnp.issubdtype(feature_map.dtype, jnp.floating):
        raise TypeError(f"feature_map must be floating point, not {feature_map.dtype}")
    if not isinstance(window, int | np.integer) or isinstance(window, bool) or window < 1 or window % 2 == 0:
        raise ValueError(f"window must be an odd whole number, not {window!r}")
    least = (window + 1) // 2
    if feature_map.ndim < 3 or min(feature_map.shape[-3:-1]) < least or feature_map.shape[-1] == 0:
        raise ValueError(f"feature_map must be (..., h, w, d) with h and w of at least {least} for a window of {window}, not {feature_map.shape}")
    return feature_map


def _check_rule(eps, negatives):
    if negatives not in get_args(Negatives):
        raise ValueError(f"negatives must be one of {', '.join(get_args(Negatives))}, not {negatives!r}")
    if not (isinstance(eps, int | float | np.number) and _LEAST_EPS <= eps <= 1e36):
        raise ValueError(f"eps must be a Python number from 1e-36 to 1e36, not {eps!r}")


def _check_exponent(value, name):
    if not isinstance(value, int | float | np.number) or isinstance(value, bool) or not 0 < value < np.inf:
        raise ValueError(f"{name} must be a positive Python number, not {value!r}")


def _parameter(value, tokens, name, positive=True):
    """An exponent or sharpness as an array of the dtype that the mathematics is done in; the numbers in JAX arrays are not looked at."""
    try:
        array = jnp.asarray(value)
    except TypeError:
        raise ValueError(f"{name} must be a number or an array of numbers, not {value!r}") from None
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise ValueError(f"{name} must be real, not {array.dtype}")
    known = all(isinstance(leaf, int | float | np.generic | np.ndarray) for leaf in jax.tree.leaves(value))
    if positive and known and not np.all((np.asarray(value) > 0) & (np.asarray(value) <= np.finfo(np.float32).max)):
        raise ValueError(f"{name} must be positive and finite, not {value}")
    return array.astype(_widened(tokens).dtype)


def _per_channel(value, tokens, name, positive=True):
    value = _parameter(value, tokens, name, positive)
    channels = tokens.shape[-1]
    if value.shape not in ((), (channels,)):
        raise ValueError(f"{name} must be a scalar or ({channels},), one number per channel, not of shape {value.shape}")
    return jnp.broadcast_to(value, (channels,))
