"""What the kernels share: the fast logarithm, what is raised to p, and a power mean that grows as
tokens arrive.

`FAST` takes the logarithm of the GPU's special function unit, whose error is 2^-22 near 1 and 2^-22
of the result elsewhere (PTX manual, lg2.approx). It is only used on x / largest or x / pooled,
numbers near 1 where it matters, so that the error of x^p is p 2^-22. The interpreter has no such
unit.
"""

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array

LEAST = tl.constexpr(
    2.0**-125
    # twice the smallest normal number: what is below is rounded to zero, whose logarithm is no
    # number
)
MOST = tl.constexpr(3.4028234663852886e38)  # the largest float32


@triton.jit
def log2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def ratio_and_log2(x, inverse, SERIES: tl.constexpr, FAST: tl.constexpr):
    """x / root and its logarithm, `inverse` being 1 / root. A gradient raises it to p - 1: at p =
    1000 an error of 2^-22 would be one of 2e-4.

    SERIES, for float32: near 1, where alone large powers count, the logarithm is the series of x
    inverse - 1, a fused multiply-add that does not round the product. What is written in bfloat16
    or float16 is rounded more than that.
    """
    ratio = at_least(x * inverse, LEAST)
    if not SERIES:
        return ratio, log2(ratio, FAST)
    far = tl.fma(x, inverse + tl.zeros_like(x), tl.full(x.shape, -1.0, tl.float32))
    high = 0.4808983469629878 + far * (
        -0.36067376022224085 + far * (0.28853900817779268 - far * 0.24044917348149390)
    )
    series = far * (
        1.4426950408889634 + far * (-0.7213475204444817 + far * high)
    )  # log2(1 + far), 2^-26 of itself off at most
    return ratio, tl.where(tl.abs(far) < 1 / 16, series, log2(ratio, FAST))


@triton.jit
def rounded_off(less, inverse, size):
    """What (x inverse)^less lacks because `inverse` is 1 / size rounded: 1 + less (1 - size
    inverse).
    """
    return 1.0 + less * tl.fma(-inverse, size, tl.full(inverse.shape, 1.0, tl.float32))


@triton.jit
def exp2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def at_least(x, least):
    """max(x, least) that keeps a NaN."""
    return tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def magnitude(x, eps, NEGATIVES: tl.constexpr):
    """The number that is raised to p; under "shift" the offset is in x already."""
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
    """The signed (x / root)^p log2(x / root), and the cotangent of x, factor (x / root)^(p - 1),
    within LIMIT.
    """
    ratio, logarithm = ratio_and_log2(magnitude(x, EPS, NEGATIVES), inverse, SERIES, FAST)
    slope = exp2(less * logarithm, FAST)
    weight = slope * ratio * logarithm
    by_x = factor * slope
    if NEGATIVES == "signed":
        weight = slope * (x * inverse) * logarithm
    elif NEGATIVES == "abs":
        by_x = tl.where(tl.abs(x) <= EPS, 0.0, tl.where(x < 0, -by_x, by_x))
    elif NEGATIVES == "clamp":
        by_x = tl.where(x <= EPS, 0.0, by_x)
    return weight, clip_slopes(by_x, LIMIT, NEGATIVES)


@triton.jit
def clip_slopes(slope, LIMIT: tl.constexpr, NEGATIVES: tl.constexpr):
    """Where signed powers nearly cancel, the true slope can exceed every dtype."""
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
    """Adds a tuple of x `(rows, channels)` to total = sum (x / largest)^p, of the same shape, and
    rescales it where `largest` grows.

    BOUNDED promises |x| < 2^126, whose reciprocal is one instruction.
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
    total *= tl.where(
        grown > largest, exp2(p * log2(largest * inverse, FAST), FAST), 1.0
    )  # or errors of 2^-22 would add up step by step
    for k in tl.static_range(len(xs)):
        power = exp2(p * log2(sizes[k] * inverse, FAST), FAST)
        if NEGATIVES == "signed":
            power = tl.where(xs[k] < 0, -power, power)
        total += power
    return grown, total


@triton.jit
def root_of_mean(largest, total, count, p, FAST: tl.constexpr):
    """Joins `(rows, channels)` partial sums to the power mean `(channels,)`; zero where nothing was
    kept or signed powers cancel.
    """
    top = tl.max(largest, 0)
    mean = tl.sum(total * exp2(p * log2(largest / top, FAST), FAST), 0) / count
    size = tl.minimum(tl.abs(mean), 1.0, propagate_nan=tl.PropagateNan.ALL)
    root = top * tl.exp2(tl.log2(at_least(size, LEAST)) / tl.max(p, 0))
    return tl.where(size < 1e-30, 0.0, tl.where(mean < 0, -root, root))


def joined(partial: Array, p: Array, count: Array) -> Array:
    """`root_of_mean` outside a kernel: from largest and sum of each split, `(rows, splits, 2, d)`,
    to `(rows, d)`.
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
