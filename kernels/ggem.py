"""The power mean over tokens, one exponent per channel, and its gradient: each reads the tokens
once.

A row is one `(n, d)`: tokens `(rows, n, d)`, mask `(rows, n)`, root and its cotangent `(rows, d)`.
Exponents are `(sets, d)`; row i uses set i // (rows / sets). One program takes one row and one
block of channels. All arithmetic is in float32.

With `offset` `(rows, d)` the numbers that are raised to p are tokens / 8 - offset + eps: the sign
rule "shift", with an eighth of the lowest token.
"""

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array
from jax import ShapeDtypeStruct as Shape

from .launch import call
from .powers import LEAST, MOST, absorb, clip_slopes, root_of_mean, rounded_off, slopes
from .tiles import gradient_tile, pool_tile


def pool(
    tokens: Array,
    p: Array,
    mask: Array | None,
    offset: Array | None,
    *,
    eps: float,
    negatives: str,
    implementation: str,
) -> Array:
    """root[i, c] = (mean_n x_n^p)^(1/p) over the kept tokens x, `(rows, d)` in float32; 0 where
    none is kept.
    """
    rows, n, d = tokens.shape
    tile = pool_tile(n, d, tokens.dtype.itemsize)
    (root,) = call(
        implementation, pool_kernel, [tokens, *_optional(p, mask, offset)], [Shape((rows, d),
        jnp.float32)],
        programs=rows * triton.cdiv(d, tile.channels), warps=tile.warps,
        N=n, D=d, SET=rows // len(p), EPS=eps, NEGATIVES=negatives, HAS_MASK=mask is not None,
        HAS_OFFSET=offset is not None,
        UNROLL=tile.unroll, ROWS=tile.rows, CHANNELS=tile.channels,
    )  # fmt: skip
    return root


def gradient(
    tokens: Array, p: Array, mask: Array | None, offset: Array | None, root: Array,
    cotangent: Array,
    *, eps: float, negatives: str, implementation: str,
) -> tuple[Array, Array]:  # fmt: skip
    """Cotangent of the tokens `(rows, n, d)`, in their dtype, and, row by row, that of p and of the
    offset if there is one, `(rows, 1 or 2, d)`.
    """
    rows, n, d = tokens.shape
    tile = gradient_tile(n, d, tokens.dtype.itemsize)
    by_tokens, by_rest = call(
        implementation, gradient_kernel, [tokens, *_optional(p, mask, offset), root, cotangent],
        [Shape(tokens.shape, tokens.dtype), Shape((rows, 1 + (offset is not None), d),
        jnp.float32)],
        programs=rows * triton.cdiv(d, tile.channels), warps=tile.warps,
        N=n, D=d, SET=rows // len(p), EPS=eps, LIMIT=float(jnp.finfo(tokens.dtype).max),
        NEGATIVES=negatives, HAS_MASK=mask is not None,
        HAS_OFFSET=offset is not None, SERIES=tokens.dtype == jnp.float32, UNROLL=tile.unroll,
        ROWS=tile.rows, CHANNELS=tile.channels,
    )  # fmt: skip
    return by_tokens, by_rest


def _optional(p, mask, offset):
    """The arrays that may be missing, and how many tokens each row keeps; p stands in for one that
    is, and its kernel does not look at it.
    """
    count = p if mask is None else jnp.maximum(jnp.sum(mask, axis=1), 1).astype(jnp.float32)
    return p, p if mask is None else mask.astype(jnp.int8), count, p if offset is None else offset


@triton.jit
def _load(
    tokens, n, mask, c, offset,
    N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_OFFSET: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Tokens `(rows, channels)` in float32 and which of them are kept; with an offset as the module
    says.
    """
    keep = (n < N) & (c < D)
    if HAS_MASK:
        keep = keep & (tl.load(mask + n, mask=n < N, other=0) != 0)
    if MASKED:
        x = tl.load(tokens + n * D + c, mask=(n < N) & (c < D), other=0.0).to(tl.float32)
    else:
        x = tl.load(tokens + n * D + c).to(tl.float32)
    if HAS_OFFSET:
        x = (0.125 * x - offset) + EPS
    return x, keep


@triton.jit
def pool_kernel(
    tokens, p, mask, count, offset, root,
    N: tl.constexpr, D: tl.constexpr, SET: tl.constexpr, EPS: tl.constexpr, NEGATIVES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_OFFSET: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Each thread sums (x / largest)^p over its own tokens, UNROLL of them at a time, with a
    `largest` of its own: threads meet at the end.
    """
    block = tl.program_id(0)
    row = (block // tl.cdiv(D, CHANNELS)).to(tl.int64)
    c = (block % tl.cdiv(D, CHANNELS)) * CHANNELS + tl.arange(0, CHANNELS)
    exponent = tl.load(p + row // SET * D + c, mask=c < D, other=1.0)[None, :]
    lowest = tl.load(offset + row * D + c, mask=c < D, other=0.0)[None, :] if HAS_OFFSET else 0.0
    tokens += row * N * D
    mask += row * N
    largest = tl.full((ROWS, CHANNELS), LEAST, tl.float32)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    step = tl.arange(0, ROWS)[:, None]
    WHOLE: tl.constexpr = N // (UNROLL * ROWS) * (UNROLL * ROWS)
    WIDE: tl.constexpr = D % CHANNELS == 0
    for start in range(0, WHOLE, UNROLL * ROWS):
        xs, keeps = (), ()
        for k in tl.static_range(UNROLL):
            x, keep = _load(
                tokens,
                start + k * ROWS + step,
                mask,
                c[None, :],
                lowest,
                N,
                D,
                not WIDE,
                HAS_MASK,
                HAS_OFFSET,
                EPS,
            )
            xs, keeps = xs + (x,), keeps + (keep,)
        largest, total = absorb(
            largest, total, xs, keeps, exponent, EPS, NEGATIVES, HAS_MASK or not WIDE, False, FAST
        )
    for start in range(WHOLE, N, ROWS):
        x, keep = _load(
            tokens, start + step, mask, c[None, :], lowest, N, D, True, HAS_MASK, HAS_OFFSET, EPS
        )
        largest, total = absorb(
            largest, total, (x,), (keep,), exponent, EPS, NEGATIVES, True, False, FAST
        )
    kept = tl.load(count + row) if HAS_MASK else float(N)
    tl.store(root + row * D + c, root_of_mean(largest, total, kept, exponent, FAST), mask=c < D)


@triton.jit
def _slopes(
    sums, drift, x, keep, factor, inverse, less,
    EPS: tl.constexpr, LIMIT: tl.constexpr, NEGATIVES: tl.constexpr, MASKED: tl.constexpr,
    HAS_OFFSET: tl.constexpr, SERIES: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Cotangent of x `(rows, channels)`: factor (x / root)^(p - 1), added to `drift`; adds (x /
    root)^p log2(x / root) to `sums`.
    """
    weight, by_x = slopes(x, inverse, less, factor, EPS, LIMIT, NEGATIVES, SERIES, FAST)
    if MASKED:
        weight = tl.where(keep, weight, 0.0)
        by_x = tl.where(keep, by_x, 0.0)
    if HAS_OFFSET:
        drift += by_x
        by_x *= 0.125
    return sums + weight, drift, by_x


@triton.jit
def gradient_kernel(
    tokens, p, mask, count, offset, root, cotangent, by_tokens, by_parameters,
    N: tl.constexpr, D: tl.constexpr, SET: tl.constexpr, EPS: tl.constexpr, LIMIT: tl.constexpr,
    NEGATIVES: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_OFFSET: tl.constexpr, SERIES: tl.constexpr, UNROLL: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """d root / d x_n = (x_n / root)^(p - 1) / count and d root / d p = (root / p) mean_n (x_n /
    root)^p log(x_n / root).
    """
    block = tl.program_id(0)
    row = (block // tl.cdiv(D, CHANNELS)).to(tl.int64)
    c = (block % tl.cdiv(D, CHANNELS)) * CHANNELS + tl.arange(0, CHANNELS)
    exponent = tl.load(p + row // SET * D + c, mask=c < D, other=1.0)
    lowest = tl.load(offset + row * D + c, mask=c < D, other=0.0)[None, :] if HAS_OFFSET else 0.0
    y = tl.load(root + row * D + c, mask=c < D, other=1.0)
    by_y = tl.where(y == 0, 0.0, tl.load(cotangent + row * D + c, mask=c < D, other=0.0))
    tokens += row * N * D
    by_tokens += row * N * D
    mask += row * N
    kept = tl.load(count + row) if HAS_MASK else float(N)
    size = tl.abs(y)
    inverse = tl.where(y == 0, 0.0, 1.0 / size)[
        None, :
    ]  # of a zero root: all ratios the least, so that nothing overflows
    less = exponent[None, :] - 1.0
    whole = rounded_off(less, inverse, size[None, :])
    factor = (by_y / kept)[None, :] * whole
    sums = tl.zeros((ROWS, CHANNELS), tl.float32)
    drift = tl.zeros((ROWS, CHANNELS), tl.float32)
    step = tl.arange(0, ROWS)[:, None]
    channel = c[None, :]
    WHOLE: tl.constexpr = N // (UNROLL * ROWS) * (UNROLL * ROWS)
    WIDE: tl.constexpr = D % CHANNELS == 0
    for start in range(0, WHOLE, UNROLL * ROWS):
        xs, keeps = (), ()  # all loads before the first store, which could change what they read
        for k in tl.static_range(UNROLL):
            x, keep = _load(
                tokens,
                start + k * ROWS + step,
                mask,
                channel,
                lowest,
                N,
                D,
                not WIDE,
                HAS_MASK,
                HAS_OFFSET,
                EPS,
            )
            xs, keeps = xs + (x,), keeps + (keep,)
        for k in tl.static_range(UNROLL):
            n = start + k * ROWS + step
            sums, drift, by_x = _slopes(
                sums,
                drift,
                xs[k],
                keeps[k],
                factor,
                inverse,
                less,
                EPS,
                LIMIT,
                NEGATIVES,
                HAS_MASK,
                HAS_OFFSET,
                SERIES,
                FAST,
            )
            if WIDE:
                tl.store(by_tokens + n * D + channel, by_x)
            else:
                tl.store(by_tokens + n * D + channel, by_x, mask=channel < D)
    for start in range(WHOLE, N, ROWS):
        n = start + step
        x, keep = _load(tokens, n, mask, channel, lowest, N, D, True, HAS_MASK, HAS_OFFSET, EPS)
        sums, drift, by_x = _slopes(
            sums,
            drift,
            x,
            keep,
            factor,
            inverse,
            less,
            EPS,
            LIMIT,
            NEGATIVES,
            True,
            HAS_OFFSET,
            SERIES,
            FAST,
        )
        tl.store(by_tokens + n * D + channel, by_x, mask=(n < N) & (channel < D))
    SUMS: tl.constexpr = 2 if HAS_OFFSET else 1
    by_p = by_y * (size / exponent) * (tl.sum(sums * whole, 0) * (0.6931471805599453 / kept))
    tl.store(by_parameters + row * SUMS * D + c, clip_slopes(by_p, MOST, NEGATIVES), mask=c < D)
    if HAS_OFFSET:
        tl.store(by_parameters + (row * SUMS + 1) * D + c, -tl.sum(drift, 0), mask=c < D)
