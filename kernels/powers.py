"""Shared code of the kernels: fast logarithms, the sign rules, and a running power mean.

With `FAST` the logarithm comes from the special function unit of the GPU. Its error is 2^-22 near
1, and 2^-22 of the result elsewhere (PTX manual, lg2.approx). It is used only on x / root and on x
times a power of two that brings the largest near 1, so the error of x^p is p 2^-22 for numbers that
matter. Triton's interpreter has no such unit and runs with `FAST=False`.

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
def _add(x, y):
    """x + y, which no compiler fuses with a product.

    Of two threads that exchange products, each would keep its own unrounded, and their sums differ.
    """
    return tl.inline_asm_elementwise(
        "add.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _add_2(a, b, c, d):
    return _add(a, c), _add(b, d)


@triton.jit
def _add_4(a0, a1, a2, a3, b0, b1, b2, b3):
    return _add(a0, b0), _add(a1, b1), _add(a2, b2), _add(a3, b3)


@triton.jit
def sum_rows(tile, FAST: tl.constexpr):
    """Returns the sum over the rows, `(channels,)`, of which all threads get the same bits.

    Args:
        tile: Tile `(rows, channels)` in float32.
        FAST: Whether the code runs on a GPU.
    """
    if FAST:
        return tl.reduce(tile, 0, _add)
    else:
        return tl.sum(tile, 0)


@triton.jit
def sum_channels(tiles, FAST: tl.constexpr):
    """Returns the sum of each tile over its channels, as a tuple of `(rows,)`.

    All threads get the same bits. On a GPU, pairs or fours of tiles are reduced together, so that
    their exchanges between threads overlap and share barriers. Triton's interpreter would take an
    element at a time for that.

    Args:
        tiles: Tuple of tiles `(rows, channels)` in float32.
        FAST: Whether the code runs on a GPU.
    """
    if FAST and len(tiles) % 4 == 0:
        sums = ()
        for k in tl.static_range(0, len(tiles), 4):
            sums = sums + tl.reduce((tiles[k], tiles[k + 1], tiles[k + 2], tiles[k + 3]), 1, _add_4)
        return sums
    elif FAST and len(tiles) == 2:
        return tl.reduce((tiles[0], tiles[1]), 1, _add_2)
    else:
        sums = ()
        for k in tl.static_range(len(tiles)):
            sums = sums + (tl.reduce(tiles[k], 1, _add) if FAST else tl.sum(tiles[k], 1),)
        return sums


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
def scale_of(largest):
    """Returns 2^-e for numbers from 2^e to 2^(e + 1), and the number e + 127.

    Products with 2^-e are exact, and neither the scale nor a product near 1 leaves the normal
    range. Numbers from 2^127 on share the scale of those from 2^126 on.

    Args:
        largest: Tile of numbers in float32, at least LEAST.
    """
    place = tl.minimum(largest.to(tl.int32, bitcast=True), 0x7EFFFFFF) & 0x7F800000
    return (0x7F000000 - place).to(tl.float32, bitcast=True), (place >> 23).to(tl.float32)


@triton.jit
def absorb(
    largest,
    level,
    total,
    xs,
    kept,
    p,
    eps,
    NEGATIVES: tl.constexpr,
    MASKED: tl.constexpr,
    FAST: tl.constexpr,
):
    """Returns running sums of powers with further tiles added, total = sum (x / largest)^p.

    Logarithms are taken of x 2^-e, with 2^e near the largest, where the fast logarithm is exact to
    2^-22 for the numbers that matter.

    Args:
        largest: Largest magnitude so far, `(rows, channels)`.
        level: Its logarithm on its own scale, log2(largest 2^-e), `(rows, channels)`.
        total: Sum so far, `(rows, channels)`.
        xs: Tuple of tiles of tokens, each `(rows, channels)`.
        kept: Tuple of masks of these tiles; read only with MASKED.
        p: Exponents, `(1, channels)`.
        eps: Smallest number that is raised to p.
        NEGATIVES: The sign rule.
        MASKED: Whether some tokens may not be kept.
        FAST: Whether to use the special function unit.

    Returns:
        The new `largest`, `level` and `total`.
    """
    grown = largest
    sizes = ()
    for k in tl.static_range(len(xs)):
        size = magnitude(xs[k], eps, NEGATIVES)
        if MASKED:
            size = tl.where(kept[k], size, 0.0)
        sizes = sizes + (size,)
        grown = at_least(size, grown)
    _, place = scale_of(largest)
    scale, new_place = scale_of(grown)
    logs = ()
    for k in tl.static_range(len(xs)):
        logs = logs + (log2(sizes[k] * scale, FAST),)
    level, total = add_powers(level + (place - new_place), total, logs, xs, p, NEGATIVES, FAST)
    return grown, level, total


@triton.jit
def add_powers(level, total, logs, xs, p, NEGATIVES: tl.constexpr, FAST: tl.constexpr):
    """Returns the largest logarithm so far, and total = sum 2^(p (log - level)) with more added.

    Args:
        level: Largest logarithm so far, `(rows, channels)`.
        total: Sum so far, `(rows, channels)`.
        logs: Tuple of base-2 logarithms, each `(rows, channels)`; -inf adds nothing.
        xs: Tuple of the numbers themselves, whose signs "signed" gives to the powers.
        p: Exponents, `(1, channels)`.
        NEGATIVES: The sign rule.
        FAST: Whether to use the special function unit.
    """
    risen = level
    for k in tl.static_range(len(logs)):
        risen = at_least(logs[k], risen)
    shift = p * risen
    total *= exp2(p * (level - risen), FAST)  # exactly 1 where the level stays
    for k in tl.static_range(len(logs)):
        power = exp2(p * logs[k] - shift, FAST)
        if NEGATIVES == "signed":
            power = tl.where(xs[k] < 0, -power, power)
        total += power
    return risen, total


@triton.jit
def reference(gain, shift, EPS: tl.constexpr, NEGATIVES: tl.constexpr):
    """Returns 1 / reference and EPS / reference, for a power of two near the largest of a channel.

    Args:
        gain: Factor of the normalised tokens, `(1, channels)`.
        shift: Added to them, `(1, channels)`.
        EPS: Smallest number that is raised to p; "signed" does not use it.
        NEGATIVES: The sign rule.
    """
    least = LEAST if NEGATIVES == "signed" else EPS
    scale, _ = scale_of(at_least(at_least(tl.abs(gain), tl.abs(shift)), least))
    return scale, EPS * scale


@triton.jit
def largest_of(level, scale, floor, EPS: tl.constexpr, FAST: tl.constexpr):
    """Returns the largest number of a channel from its logarithm; exactly EPS where all are EPS.

    Args:
        level: Largest logarithm of numbers times `scale`, `(channels,)`.
        scale: First result of `reference`, `(channels,)`.
        floor: Second result of `reference`, `(channels,)`.
        EPS: As in `reference`.
        FAST: Whether to use the special function unit.
    """
    back, _ = scale_of(scale)
    return tl.where(level == log2(floor, FAST), EPS, exp2(level, FAST) * back)


@triton.jit
def absorb_near(
    level, total, xs, kept, p, eps,
    NEGATIVES: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Returns `level` and `total` of `absorb` for numbers that need no other scale.

    Args:
        level: Largest logarithm so far, `(rows, channels)`.
        total: Sum of 2^(p (log2(x) - level)) so far, `(rows, channels)`.
        xs: Tuple of tiles of numbers, each `(rows, channels)`, of which the largest are near 1.
        kept: As in `absorb`.
        p: As in `absorb`.
        eps: Smallest number that is raised to p, `(1, channels)`; "signed" does not use it.
        NEGATIVES: The sign rule.
        MASKED: As in `absorb`.
        FAST: As in `absorb`.
    """
    logs = ()
    for k in tl.static_range(len(xs)):
        size = magnitude(xs[k], eps, NEGATIVES)
        if MASKED:
            size = tl.where(kept[k], size, 0.0)
        logs = logs + (log2(size, FAST),)
    return add_powers(level, total, logs, xs, p, NEGATIVES, FAST)


@triton.jit
def join_rows(level, total, p, FAST: tl.constexpr):
    """Returns the largest level, and the sum on this level, `(channels,)` each.

    Args:
        level: Largest logarithm of each partial sum, `(rows, channels)`.
        total: Partial sums of 2^(p (log - level)), `(rows, channels)`.
        p: Exponents, `(1, channels)`.
        FAST: Whether to use the special function unit.
    """
    top = tl.max(level, 0)
    return top, sum_rows(total * exp2(p * (level - top[None, :]), FAST), FAST)


@triton.jit
def root_of_mean(largest, mean, p, FAST: tl.constexpr):
    """Returns the power mean, largest mean^(1/p), `(channels,)`.

    It is zero where no token is kept or where signed powers cancel.

    Args:
        largest: Largest magnitude, `(channels,)`.
        mean: Mean of (x / largest)^p, `(channels,)`.
        p: Exponents, `(channels,)`.
        FAST: Whether to use the special function unit.
    """
    size = tl.minimum(tl.abs(mean), 1.0, propagate_nan=tl.PropagateNan.ALL)
    scale, place = scale_of(at_least(size, LEAST))
    logarithm = (place - 127.0) + log2(size * scale, FAST)
    root = largest * exp2(logarithm * reciprocal(p, FAST), FAST)
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
