"""Shared code of the kernels: fast logarithms, the sign rules, and a running power mean.

With `FAST` the logarithm comes from the special function unit of the GPU. Its error is 2^-22 near
1, and 2^-22 of the result elsewhere (PTX manual, lg2.approx). It is used only on x / largest
and x / root, where numbers near 1 matter most, so the error of x^p is p 2^-22. Triton's interpreter
has no such unit and runs with `FAST=False`.

Only this file compares the name of a sign rule (`NEGATIVES`) in a kernel. Tiles of tokens are
`(rows, channels)` in float32. Values of a channel, such as p, are `(1, channels)`.
"""

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

# Twice the smallest normal number. Devices round smaller numbers to zero, which has no logarithm.
LEAST = tl.constexpr(2.0**-125)
MOST = tl.constexpr(3.4028234663852886e38)  # the largest float32


@triton.jit
def log2(x, FAST: tl.constexpr):
    """Returns log2(x).

    Args:
        x: Tile of non-negative numbers in float32.
        FAST: Whether to use the special function unit (lg2.approx).
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def ratio_and_log2(x, inverse, SERIES: tl.constexpr, FAST: tl.constexpr):
    """Returns x / root, at least LEAST, and its base-2 logarithm.

    Gradients raise the ratio to p - 1. At p = 1000, an error of 2^-22 in the logarithm becomes an
    error of 2e-4. With SERIES, the logarithm of a ratio near 1 therefore comes from a series in
    x * inverse - 1, computed by a fused multiply-add that does not round the product. Only ratios
    near 1 have large powers. Gradients in bfloat16 and float16 are rounded more coarsely than that
    anyway.

    Args:
        x: Magnitudes of the tokens, `(rows, channels)`.
        inverse: 1 / |root|, `(1, channels)`; 0 where the root is 0.
        SERIES: Whether to use the series near 1, as for float32 tokens.
        FAST: Whether to use the special function unit.
    """
    ratio = at_least(x * inverse, LEAST)
    if not SERIES:
        return ratio, log2(ratio, FAST)
    far = tl.fma(x, inverse + tl.zeros_like(x), tl.full(x.shape, -1.0, tl.float32))
    high = 0.4808983469629878 + far * (
        -0.36067376022224085 + far * (0.28853900817779268 - far * 0.24044917348149390)
    )
    # log2(1 + far), with a relative error of at most 2^-26
    series = far * (1.4426950408889634 + far * (-0.7213475204444817 + far * high))
    return ratio, tl.where(tl.abs(far) < 1 / 16, series, log2(ratio, FAST))


@triton.jit
def rounding_factor(less, inverse, size):
    """Returns 1 + less (1 - size inverse), which corrects (x inverse)^less for rounding of inverse.

    Args:
        less: Exponents p - 1, `(channels,)` or `(1, channels)`, as the others.
        inverse: 1 / size, rounded to float32; 0 where the root is 0.
        size: Absolute value of the root.
    """
    return 1.0 + less * tl.fma(-inverse, size, tl.full(inverse.shape, 1.0, tl.float32))


@triton.jit
def exp2(x, FAST: tl.constexpr):
    """Returns 2^x.

    Args:
        x: Tile of numbers in float32.
        FAST: Whether to use the special function unit (ex2.approx).
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """Returns 1 / x.

    Args:
        x: Tile of numbers in float32; with FAST, below 2^126 in absolute value.
        FAST: Whether to use the special function unit (rcp.approx).
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def rounded_product(x, y, FAST: tl.constexpr):
    """Returns x y, rounded to float32: no compiler may fuse it with a sum that follows.

    A fused multiply-add keeps the product unrounded, so that two places that use the same product
    can get two numbers. Triton's interpreter fuses nothing.

    Args:
        x: Tile of numbers in float32.
        y: Tile of the same shape, in float32.
        FAST: Whether the code runs on a GPU (mul.rn).
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return x * y


@triton.jit
def at_least(x, least):
    """Returns max(x, least); a NaN stays a NaN.

    Args:
        x: Tile of numbers in float32.
        least: Lower bound, a number or a tile that broadcasts.
    """
    return tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def magnitude(x, eps, NEGATIVES: tl.constexpr):
    """Returns the non-negative number that the sign rule raises to p.

    Args:
        x: Tile of tokens in float32; for "shift", after the offset.
        eps: Smallest result; "signed" does not use it.
        NEGATIVES: The sign rule.
    """
    if NEGATIVES == "abs":
        return at_least(tl.abs(x), eps)
    elif NEGATIVES == "signed":
        return tl.abs(x)
    else:
        tl.static_assert(NEGATIVES == "clamp" or NEGATIVES == "shift", "no such sign rule")
        return at_least(x, eps)


@triton.jit
def slopes(
    x, inverse, less, factor, EPS: tl.constexpr, LIMIT: tl.constexpr, NEGATIVES: tl.constexpr,
    SERIES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Returns the summands of the cotangent of p, and the cotangent of x, both `(rows, channels)`.

    A summand is +-(x / root)^p log2(x / root), with the sign of the power. The cotangent of x is
    factor (x / root)^(p - 1), clipped to +-LIMIT for "signed".

    Args:
        x: Tile of tokens, `(rows, channels)`; for "shift", after the offset.
        inverse: 1 / |root|, `(1, channels)`; 0 where the root is 0.
        less: Exponents p - 1, `(1, channels)`.
        factor: Cotangent of the root / count, times `rounding_factor`, `(1, channels)`.
        EPS: Smallest number that is raised to p.
        LIMIT: Largest absolute cotangent of x.
        NEGATIVES: The sign rule.
        SERIES, FAST: As in `ratio_and_log2`.
    """
    ratio, logarithm = ratio_and_log2(magnitude(x, EPS, NEGATIVES), inverse, SERIES, FAST)
    slope = exp2(less * logarithm, FAST)
    weight = slope * ratio * logarithm
    by_x = factor * slope
    if NEGATIVES == "signed":
        weight = slope * (x * inverse) * logarithm  # the ratio with the sign of x
    elif NEGATIVES == "abs":
        by_x = tl.where(tl.abs(x) <= EPS, 0.0, tl.where(x < 0, -by_x, by_x))
    elif NEGATIVES == "clamp":
        by_x = tl.where(x <= EPS, 0.0, by_x)
    return weight, clip_slopes(by_x, LIMIT, NEGATIVES)


@triton.jit
def clip_slopes(slope, LIMIT: tl.constexpr, NEGATIVES: tl.constexpr):
    """Returns slopes, clipped to +-LIMIT for the sign rule "signed".

    Where signed powers nearly cancel, the true slopes exceed the range of every dtype.

    Args:
        slope: Tile of slopes in float32.
        LIMIT: Largest absolute value, such as that of the tokens' dtype.
        NEGATIVES: The sign rule; other rules return the slopes unchanged.
    """
    if NEGATIVES == "signed":
        slope = tl.clamp(slope, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return slope


@triton.jit
def absorb(
    largest,
    total,
    xs,
    kept,
    p,
    eps,
    NEGATIVES: tl.constexpr,
    MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
    FAST: tl.constexpr,
):
    """Returns running sums of powers with further tiles added, total = sum (x / largest)^p.

    The old sum is rescaled where `largest` grows.

    Args:
        largest: Largest magnitude so far, `(rows, channels)`.
        total: Sum so far, `(rows, channels)`.
        xs: Tuple of tiles of tokens, each `(rows, channels)`.
        kept: Tuple of masks of these tiles; read only with MASKED.
        p: Exponents, `(1, channels)`.
        eps: Smallest number that is raised to p.
        NEGATIVES: The sign rule.
        MASKED: Whether some tokens may not be kept.
        BOUNDED: Whether all |x| are below 2^126, for which a reciprocal is one instruction.
        FAST: Whether to use the special function unit.

    Returns:
        The new `largest` and `total`.
    """
    grown = largest
    sizes = ()
    for k in tl.static_range(len(xs)):
        size = magnitude(xs[k], eps, NEGATIVES)
        if MASKED:
            size = tl.where(kept[k], size, 0.0)
        sizes = sizes + (size,)
        grown = at_least(size, grown)
    inverse = reciprocal(grown, FAST and BOUNDED)
    # exactly 1 where `largest` stays: otherwise errors of 2^-22 would add up step by step
    total *= tl.where(grown > largest, exp2(p * log2(largest * inverse, FAST), FAST), 1.0)
    for k in tl.static_range(len(xs)):
        power = exp2(p * log2(sizes[k] * inverse, FAST), FAST)
        if NEGATIVES == "signed":
            power = tl.where(xs[k] < 0, -power, power)
        total += power
    return grown, total


@triton.jit
def root_of_mean(largest, total, count, p, FAST: tl.constexpr):
    """Returns the power mean `(channels,)` from partial sums `(rows, channels)`.

    It is zero where no token is kept or where signed powers cancel.

    Args:
        largest: Largest magnitude of each partial sum, `(rows, channels)`.
        total: Partial sums of (x / largest)^p, `(rows, channels)`.
        count: Number of kept tokens, a scalar.
        p: Exponents, `(1, channels)`.
        FAST: Whether to use the special function unit.
    """
    top = tl.max(largest, 0)
    mean = tl.sum(total * exp2(p * log2(largest / top, FAST), FAST), 0) / count
    size = tl.minimum(tl.abs(mean), 1.0, propagate_nan=tl.PropagateNan.ALL)
    root = top * tl.exp2(tl.log2(at_least(size, LEAST)) / tl.max(p, 0))
    return tl.where(size < 1e-30, 0.0, tl.where(mean < 0, -root, root))


def join_splits(partial: Array, p: Array, count: Array) -> Array:
    """Returns the power mean from the partial sums of several programs, in plain JAX.

    Args:
        partial: Largest number and sum of powers of each split, `(rows, splits, 2, d)`.
        p: Exponents, `(rows, d)`.
        count: Number of kept tokens of each row, `(rows, 1)`.

    Returns:
        The power means, `(rows, d)`; zero where no token was kept or signed powers cancel.
    """
    largest, total = partial[:, :, 0], partial[:, :, 1]
    top = jnp.max(largest, axis=1)
    rescale = jnp.exp2(p[:, None] * jnp.log2(largest / top[:, None]))
    mean = jnp.sum(total * rescale, axis=1) / count
    size = jnp.minimum(jnp.abs(mean), 1)
    return jnp.where(
        size < 1e-30,
        0,
        jnp.sign(mean) * top * jnp.exp2(jnp.log2(jnp.maximum(size, LEAST.value)) / p),
    )
