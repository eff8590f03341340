"""LayerNorm and the power mean over tokens in one pass, and their gradient in one: the tokens are read once, the normalised ones never written.

A row is one `(n, d)`: tokens `(rows, n, d)`, mask `(rows, n)`, root and its cotangent `(rows, d)`; scale, bias and exponents are `(sets, d)`, and
row i uses set i // (rows / sets). A program takes all channels of one of `SPLITS` runs of the tokens of a row. All arithmetic is in float32.
"""

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array
from jax import ShapeDtypeStruct as Shape

from .launch import call
from .powers import LEAST, MOST, absorb, at_least, exp2, joined, log2, magnitude, root_of_mean
from .tiles import NormTile, norm_gradient_tile, norm_pool_tile


def pool(
    tokens: Array, scale: Array, bias: Array, p: Array, mask: Array | None, *, norm_eps: float, eps: float, negatives: str, implementation: str
) -> tuple[Array, Array]:  # fmt: skip
    """root[i, c] = (mean_n z_n^p)^(1/p) of the normalised z, `(rows, d)`, and mean and 1 / deviation of each token, `(rows, 2, n)`; both float32."""
    rows, n, d = tokens.shape
    tile = norm_pool_tile(rows, n, d, tokens.dtype.itemsize)
    count = _count(mask, p)
    pooled, statistics = call(
        implementation, norm_pool_kernel, [tokens, scale, bias, p, *_mask(mask, p), count],
        [Shape((rows, d) if tile.splits == 1 else (rows, tile.splits, 2, d), jnp.float32), Shape((rows, 2, n), jnp.float32)],
        programs=rows * tile.splits, NORM_EPS=norm_eps, **_constants(tokens, p, mask, tile, eps, negatives),
    )  # fmt: skip
    if tile.splits > 1:
        kept = jnp.full((rows,), n, jnp.float32) if mask is None else count
        pooled = joined(pooled, jnp.repeat(p, rows // len(p), axis=0), kept[:, None])
    return pooled, statistics


def gradient(
    tokens: Array, scale: Array, bias: Array, p: Array, mask: Array | None, root: Array, statistics: Array, cotangent: Array,
    *, eps: float, negatives: str, implementation: str,
) -> tuple[Array, Array]:  # fmt: skip
    """Cotangent of the tokens `(rows, n, d)`, in their dtype, and, row by row, those of p, scale and bias, `(rows, 3, d)`."""
    rows, n, d = tokens.shape
    tile = norm_gradient_tile(rows, n, d, tokens.dtype.itemsize)
    by_tokens, by_parameters = call(
        implementation, norm_gradient_kernel, [tokens, scale, bias, p, *_mask(mask, p), _count(mask, p), root, statistics, cotangent],
        [Shape(tokens.shape, tokens.dtype), Shape((rows, tile.splits, 3, d), jnp.float32)],
        programs=rows * tile.splits, LIMIT=float(jnp.finfo(tokens.dtype).max), **_constants(tokens, p, mask, tile, eps, negatives),
    )  # fmt: skip
    return by_tokens, jnp.sum(by_parameters, axis=1)


def _mask(mask, p):
    """A mask that is missing is stood in for by p, which its kernel does not look at."""
    return [p if mask is None else mask.astype(jnp.int8)]


def _count(mask, p):
    return p if mask is None else jnp.maximum(jnp.sum(mask, axis=1), 1).astype(jnp.float32)


def _constants(tokens, p, mask, tile: NormTile, eps, negatives):
    rows, n, d = tokens.shape
    return {
        "warps": tile.warps, "N": n, "D": d, "SET": rows // len(p), "SPLITS": tile.splits, "EPS": eps, "NEGATIVES": negatives,
        "HAS_MASK": mask is not None, "UNROLL": tile.unroll, "ROWS": tile.rows, "CHANNELS": tile.channels,
    }  # fmt: skip


@triton.jit
def norm_pool_kernel(
    tokens, scale, bias, p, mask, count, pooled, statistics,
    N: tl.constexpr, D: tl.constexpr, SET: tl.constexpr, SPLITS: tl.constexpr, NORM_EPS: tl.constexpr, EPS: tl.constexpr, NEGATIVES: tl.constexpr,
    HAS_MASK: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """z = (x - mean) / sqrt(variance + eps) * scale + bias, then running sums of (z / largest)^p as in `ggem.pool_kernel`."""
    STEP: tl.constexpr = UNROLL * ROWS
    RUN: tl.constexpr = tl.cdiv(tl.cdiv(N, SPLITS), STEP) * STEP
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    c = tl.arange(0, CHANNELS)
    in_d = c < D
    gain = tl.load(scale + row // SET * D + c, mask=in_d, other=0.0)[None, None, :]
    shift = tl.load(bias + row // SET * D + c, mask=in_d, other=0.0)[None, None, :]
    exponent = tl.load(p + row // SET * D + c, mask=in_d, other=1.0)[None, :]
    tokens += row * N * D
    mask += row * N
    statistics += row * 2 * N
    largest = tl.full((ROWS, CHANNELS), LEAST, tl.float32)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    step = tl.arange(0, UNROLL)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    for start in range(split * RUN, tl.minimum((split + 1) * RUN, N), STEP):
        n = start + step
        inside = n < N
        x = tl.load(tokens + n[:, :, None] * D + c[None, None, :], mask=inside[:, :, None] & in_d[None, None, :], other=0.0).to(tl.float32)
        mean = tl.sum(x, 2) * (1.0 / D)
        far = x - mean[:, :, None]
        if D != CHANNELS:
            far = tl.where(in_d[None, None, :], far, 0.0)
        deviation = tl.rsqrt(tl.sum(far * far, 2) * (1.0 / D) + NORM_EPS)
        tl.store(statistics + n, mean, mask=inside)
        tl.store(statistics + N + n, deviation, mask=inside)
        keep = inside
        if HAS_MASK:
            keep = keep & (tl.load(mask + n, mask=inside, other=0) != 0)
        z = far * deviation[:, :, None] * gain + shift
        largest, total = absorb(largest, total, z, keep[:, :, None], exponent, EPS, NEGATIVES, True, True, FAST)
    if SPLITS == 1:
        kept = tl.load(count + row) if HAS_MASK else float(N)
        tl.store(pooled + row * D + c, root_of_mean(largest, total, kept, exponent, FAST), mask=in_d)
    else:
        top = tl.max(largest, 0)
        part = tl.sum(total * exp2(exponent * log2(largest / top, FAST), FAST), 0)
        tl.store(pooled + (row * SPLITS + split) * 2 * D + c, top, mask=in_d)
        tl.store(pooled + ((row * SPLITS + split) * 2 + 1) * D + c, part, mask=in_d)


@triton.jit
def norm_gradient_kernel(
    tokens, scale, bias, p, mask, count, root, statistics, cotangent, by_tokens, by_parameters,
    N: tl.constexpr, D: tl.constexpr, SET: tl.constexpr, SPLITS: tl.constexpr, EPS: tl.constexpr, LIMIT: tl.constexpr, NEGATIVES: tl.constexpr,
    HAS_MASK: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """With u normalised, z = u scale + bias and the cotangent of z, s = by_root (z / root)^(p - 1) / count:

    by_x = (s scale - mean_d(s scale) - u mean_d(s scale u)) / deviation, by_scale = sum_n s u, by_bias = sum_n s, and that of p as in `ggem`.
    """
    STEP: tl.constexpr = UNROLL * ROWS
    RUN: tl.constexpr = tl.cdiv(tl.cdiv(N, SPLITS), STEP) * STEP
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    c = tl.arange(0, CHANNELS)
    in_d = c < D
    kept = tl.load(count + row) if HAS_MASK else float(N)
    y = tl.load(root + row * D + c, mask=in_d, other=1.0)
    by_y = tl.where(y == 0, 0.0, tl.load(cotangent + row * D + c, mask=in_d, other=0.0) / kept)
    exponent = tl.load(p + row // SET * D + c, mask=in_d, other=1.0)
    inverse = tl.where(y == 0, 0.0, 1.0 / tl.abs(y))[None, None, :]
    factor = by_y[None, None, :]
    less = exponent[None, None, :] - 1.0
    gain = tl.load(scale + row // SET * D + c, mask=in_d, other=0.0)[None, None, :]
    shift = tl.load(bias + row // SET * D + c, mask=in_d, other=0.0)[None, None, :]
    tokens += row * N * D
    by_tokens += row * N * D
    mask += row * N
    statistics += row * 2 * N
    sums = tl.zeros((ROWS, CHANNELS), tl.float32)
    by_scale = tl.zeros((ROWS, CHANNELS), tl.float32)
    by_bias = tl.zeros((ROWS, CHANNELS), tl.float32)
    step = tl.arange(0, UNROLL)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    for start in range(split * RUN, tl.minimum((split + 1) * RUN, N), STEP):
        n = start + step
        inside = n < N
        i = n[:, :, None] * D + c[None, None, :]
        there = inside[:, :, None] & in_d[None, None, :]
        keep = there
        if HAS_MASK:
            keep = keep & (tl.load(mask + n, mask=inside, other=0) != 0)[:, :, None]
        mean = tl.load(statistics + n, mask=inside, other=0.0)[:, :, None]
        deviation = tl.load(statistics + N + n, mask=inside, other=0.0)[:, :, None]
        x = tl.load(tokens + i, mask=there, other=0.0).to(tl.float32)
        u = (x - mean) * deviation
        if HAS_MASK:
            u = tl.where(keep, u, 0.0)
        z = u * gain + shift
        ratio = at_least(magnitude(z, EPS, NEGATIVES) * inverse, LEAST)
        logarithm = log2(ratio, FAST)
        slope = exp2(less * logarithm, FAST)
        weight = slope * ratio * logarithm
        s = factor * slope
        if NEGATIVES == "signed":
            weight = tl.where(z < 0, -weight, weight)
            s = tl.clamp(s, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)
        elif NEGATIVES == "abs":
            s = tl.where(tl.abs(z) <= EPS, 0.0, tl.where(z < 0, -s, s))
        else:
            s = tl.where(z <= EPS, 0.0, s)
        s = tl.where(keep, s, 0.0)
        sums += tl.sum(tl.where(keep, weight, 0.0), 0)
        by_scale += tl.sum(s * u, 0)
        by_bias += tl.sum(s, 0)
        g = s * gain
        along = (tl.sum(g, 2) * (1.0 / D))[:, :, None]
        along_u = (tl.sum(g * u, 2) * (1.0 / D))[:, :, None]
        by_x = tl.where(keep, (g - along - u * along_u) * deviation, 0.0)
        if NEGATIVES == "signed":
            by_x = tl.clamp(by_x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        tl.store(by_tokens + i, by_x, mask=there)
    by_p = by_y * (tl.abs(y) / exponent) * (tl.sum(sums, 0) * 0.6931471805599453)
    if NEGATIVES == "signed":
        by_p = tl.clamp(by_p, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)
    by_parameters += (row * SPLITS + split) * 3 * D + c
    tl.store(by_parameters, by_p, mask=in_d)
    tl.store(by_parameters + D, tl.sum(by_scale, 0), mask=in_d)
    tl.store(by_parameters + 2 * D, tl.sum(by_bias, 0), mask=in_d)
