"""The power mean over tokens, with one exponent per channel, and its gradient.

Both kernels read the tokens once. A row is one image: tokens `(rows, n, d)`, mask `(rows, n)`, root
and its cotangent `(rows, d)`. Exponents are `(sets, d)`; row i uses set i // (rows / sets). One
program takes one row and one block of channels. All arithmetic is in float32.

With `offset` `(rows, d)`, the numbers raised to p are tokens / 8 - offset + eps. The sign rule
"shift" passes an eighth of the lowest token.
"""

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array
from jax import ShapeDtypeStruct as Shape

from .launch import call
from .powers import (
    LEAST,
    MOST,
    absorb,
    clip_slopes,
    join_rows,
    root_of_mean,
    rounding_factor,
    scale_of,
    slopes,
    sum_rows,
)
from .tiles import gradient_tile, pool_tile


def pool(
    tokens: Array,
    p: Array,
    mask: Array | None,
    offset: Array | None,
    *,
    skip: int = 0,
    eps: float,
    negatives: str,
    implementation: str,
) -> Array:
    """Returns the power mean of the kept tokens, root = (mean_n x_n^p)^(1/p).

    Args:
        tokens: Tokens x, `(rows, skip + n, d)`, in float32, bfloat16 or float16.
        p: Exponents, `(sets, d)` in float32.
        mask: Which tokens to keep, `(rows, n)`; None keeps all.
        offset: Subtracted from an eighth of the tokens, `(rows, d)` in float32; None for the sign
            rules that have no offset.
        skip: Number of tokens at the start of each row that are not pooled.
        eps: Smallest number that is raised to p; "signed" does not use it.
        negatives: The sign rule: "clamp", "abs", "signed" or "shift".
        implementation: "triton" (GPU) or "interpret" (CPU).

    Returns:
        The root, `(rows, d)` in float32; 0 where no token is kept.
    """
    rows, n, d = tokens.shape[0], tokens.shape[1] - skip, tokens.shape[2]
    tile = pool_tile(n, d)
    (root,) = call(
        implementation, pool_kernel, [tokens, *_optional(p, mask, offset)],
        [Shape((rows, d), jnp.float32)],
        programs=rows * triton.cdiv(d, tile.channels), warps=tile.warps,
        SKIP=skip, N=n, D=d, SET=rows // len(p), EPS=eps, NEGATIVES=negatives,
        HAS_MASK=mask is not None, HAS_OFFSET=offset is not None,
        UNROLL=tile.unroll, ROWS=tile.rows, CHANNELS=tile.channels,
    )  # fmt: skip
    return root


def gradient(
    tokens: Array,
    p: Array,
    mask: Array | None,
    offset: Array | None,
    root: Array,
    cotangent: Array,
    *,
    skip: int = 0,
    eps: float,
    negatives: str,
    implementation: str,
) -> tuple[Array, Array]:
    """Returns the cotangents of the tokens and, row by row, of p and the offset.

    Args:
        tokens: As in `pool`.
        p: As in `pool`.
        mask: As in `pool`.
        offset: As in `pool`.
        root: Result of `pool`, `(rows, d)` in float32.
        cotangent: Cotangent of the root, `(rows, d)` in float32.
        skip: As in `pool`.
        eps: As in `pool`.
        negatives: As in `pool`.
        implementation: As in `pool`.

    Returns:
        The cotangent of the tokens, `(rows, skip + n, d)` in their dtype, and those of p and, if
        there is one, of the offset, `(rows, 1 or 2, d)` in float32.
    """
    rows, n, d = tokens.shape[0], tokens.shape[1] - skip, tokens.shape[2]
    tile = gradient_tile(n, d)
    by_tokens, by_rest = call(
        implementation, gradient_kernel, [tokens, *_optional(p, mask, offset), root, cotangent],
        [Shape(tokens.shape, tokens.dtype),
         Shape((rows, 1 + (offset is not None), d), jnp.float32)],
        programs=rows * triton.cdiv(d, tile.channels), warps=tile.warps,
        SKIP=skip, N=n, D=d, SET=rows // len(p), EPS=eps,
        LIMIT=float(jnp.finfo(tokens.dtype).max), NEGATIVES=negatives,
        HAS_MASK=mask is not None, HAS_OFFSET=offset is not None,
        SERIES=tokens.dtype == jnp.float32,
        UNROLL=tile.unroll, ROWS=tile.rows, CHANNELS=tile.channels,
    )  # fmt: skip
    return by_tokens, by_rest


def _optional(p, mask, offset):
    """Inputs of both kernels: p `(sets, d)`, mask `(rows, n)`, count `(rows,)`, offset `(rows, d)`.

    p takes the place of an array that is missing; the kernels do not read it there.
    """
    count = p if mask is None else jnp.maximum(jnp.sum(mask, axis=1), 1).astype(jnp.float32)
    return p, p if mask is None else mask.astype(jnp.int8), count, p if offset is None else offset


@triton.jit
def _load(
    tokens, n, mask, c, offset,
    N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_OFFSET: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Tokens `(rows, channels)` in float32, less the offset, and which of them to keep."""
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
    SKIP: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SET: tl.constexpr, EPS: tl.constexpr,
    NEGATIVES: tl.constexpr, HAS_MASK: tl.constexpr, HAS_OFFSET: tl.constexpr,
    UNROLL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Writes root = (mean_n x_n^p)^(1/p) for one row and one block of channels.

    Each thread sums (x / largest)^p over its own tokens, UNROLL at a time, with its own `largest`.
    The threads combine their sums at the end.

    Args:
        tokens: Pointer to the tokens, `(rows, SKIP + N, D)`.
        p: Pointer to the exponents, `(sets, D)` in float32.
        mask: Pointer to the mask, `(rows, N)` in int8; read only with HAS_MASK.
        count: Pointer to the number of kept tokens, at least 1, `(rows,)` in float32; read only
            with HAS_MASK.
        offset: Pointer to the offsets, `(rows, D)` in float32; read only with HAS_OFFSET.
        root: Pointer to the output, `(rows, D)` in float32.
        SKIP: Tokens at the start of a row that are not pooled.
        N, D: Other tokens of a row, and channels of a token.
        SET: Number of rows that share one set of exponents.
        EPS: Smallest number that is raised to p; "signed" does not use it.
        NEGATIVES: The sign rule.
        HAS_MASK, HAS_OFFSET: Whether there is a mask, and whether there is an offset.
        UNROLL, ROWS, CHANNELS: A step reads UNROLL x ROWS tokens of CHANNELS channels.
        FAST: Whether to use the special function unit of the GPU; False in the interpreter.
    """
    block = tl.program_id(0)
    row = (block // tl.cdiv(D, CHANNELS)).to(tl.int64)
    c = (block % tl.cdiv(D, CHANNELS)) * CHANNELS + tl.arange(0, CHANNELS)
    exponent = tl.load(p + row // SET * D + c, mask=c < D, other=1.0)[None, :]
    lowest = tl.load(offset + row * D + c, mask=c < D, other=0.0)[None, :] if HAS_OFFSET else 0.0
    tokens += row * ((SKIP + N) * D) + SKIP * D
    mask += row * N
    largest = tl.full((ROWS, CHANNELS), LEAST, tl.float32)
    level = tl.zeros((ROWS, CHANNELS), tl.float32)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    step = tl.arange(0, ROWS)[:, None]
    WHOLE: tl.constexpr = N // (UNROLL * ROWS) * (UNROLL * ROWS)
    WIDE: tl.constexpr = D % CHANNELS == 0
    for start in range(0, WHOLE, UNROLL * ROWS):
        xs, keeps = (), ()
        for k in tl.static_range(UNROLL):
            x, keep = _load(
                tokens, start + k * ROWS + step, mask, c[None, :], lowest,
                N, D, not WIDE, HAS_MASK, HAS_OFFSET, EPS,
            )  # fmt: skip
            xs, keeps = xs + (x,), keeps + (keep,)
        largest, level, total = absorb(
            largest, level, total, xs, keeps, exponent, EPS, NEGATIVES, HAS_MASK or not WIDE, FAST
        )
    for start in range(WHOLE, N, ROWS):
        x, keep = _load(
            tokens, start + step, mask, c[None, :], lowest, N, D, True, HAS_MASK, HAS_OFFSET, EPS
        )
        largest, level, total = absorb(
            largest, level, total, (x,), (keep,), exponent, EPS, NEGATIVES, True, FAST
        )
    top = tl.max(largest, 0)
    _, place = scale_of(largest)
    _, top_place = scale_of(top)
    _, total = join_rows(level + (place - top_place[None, :]), total, exponent, FAST)
    kept = tl.load(count + row) if HAS_MASK else float(N)
    mean = total * (1.0 / kept)
    tl.store(root + row * D + c, root_of_mean(top, mean, tl.max(exponent, 0), FAST), mask=c < D)


@triton.jit
def _absorb_slopes(
    sums, drift, x, keep, factor, inverse, less,
    EPS: tl.constexpr, LIMIT: tl.constexpr, NEGATIVES: tl.constexpr, MASKED: tl.constexpr,
    HAS_OFFSET: tl.constexpr, SERIES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Adds a tile to the sums of the gradient and returns the cotangent of its tokens.

    All are `(rows, channels)`: `sums` of (x / root)^p log2(x / root), for p, and `drift` of the
    cotangents of x, for the offset.
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
    SKIP: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SET: tl.constexpr, EPS: tl.constexpr,
    LIMIT: tl.constexpr, NEGATIVES: tl.constexpr, HAS_MASK: tl.constexpr, HAS_OFFSET: tl.constexpr,
    SERIES: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Writes the cotangents of one row and one block of channels.

        d root / d x_n = (x_n / root)^(p - 1) / count,
        d root / d p = (root / p) mean_n (x_n / root)^p log(x_n / root).

    Args:
        tokens, p, mask, count, offset: As in `pool_kernel`.
        root: Pointer to the result of `pool_kernel`, `(rows, D)` in float32.
        cotangent: Pointer to the cotangent of the root, `(rows, D)` in float32.
        by_tokens: Pointer to the output for the tokens, `(rows, SKIP + N, D)` in their dtype.
        by_parameters: Pointer to the output for p and, with HAS_OFFSET, for the offset,
            `(rows, 1 or 2, D)` in float32.
        SKIP, N, D, SET, EPS, NEGATIVES, HAS_MASK, HAS_OFFSET: As in `pool_kernel`.
        LIMIT: Largest finite number of the tokens' dtype; "signed" clips the tokens' cotangents to
            +-LIMIT.
        SERIES: Whether logarithms of ratios near 1 come from a series, as for float32 tokens.
        UNROLL, ROWS, CHANNELS, FAST: As in `pool_kernel`.
    """
    block = tl.program_id(0)
    row = (block // tl.cdiv(D, CHANNELS)).to(tl.int64)
    c = (block % tl.cdiv(D, CHANNELS)) * CHANNELS + tl.arange(0, CHANNELS)
    exponent = tl.load(p + row // SET * D + c, mask=c < D, other=1.0)
    lowest = tl.load(offset + row * D + c, mask=c < D, other=0.0)[None, :] if HAS_OFFSET else 0.0
    y = tl.load(root + row * D + c, mask=c < D, other=1.0)
    by_y = tl.where(y == 0, 0.0, tl.load(cotangent + row * D + c, mask=c < D, other=0.0))
    tokens += row * ((SKIP + N) * D) + SKIP * D
    by_tokens += row * ((SKIP + N) * D)
    for k in tl.static_range(SKIP):
        tl.store(by_tokens + k * D + c, tl.zeros_like(y).to(by_tokens.dtype.element_ty), mask=c < D)
    by_tokens += SKIP * D
    mask += row * N
    kept = tl.load(count + row) if HAS_MASK else float(N)
    size = tl.abs(y)
    # Where the root is zero, all ratios become LEAST, so nothing overflows.
    inverse = tl.where(y == 0, 0.0, 1.0 / size)[None, :]
    less = exponent[None, :] - 1.0
    whole = rounding_factor(less, inverse, size[None, :])
    factor = (by_y / kept)[None, :] * whole
    sums = tl.zeros((ROWS, CHANNELS), tl.float32)
    drift = tl.zeros((ROWS, CHANNELS), tl.float32)
    step = tl.arange(0, ROWS)[:, None]
    channel = c[None, :]
    WHOLE: tl.constexpr = N // (UNROLL * ROWS) * (UNROLL * ROWS)
    WIDE: tl.constexpr = D % CHANNELS == 0
    for start in range(0, WHOLE, UNROLL * ROWS):
        xs, keeps = (), ()  # all loads come before the first store, which could overwrite tokens
        for k in tl.static_range(UNROLL):
            x, keep = _load(
                tokens, start + k * ROWS + step, mask, channel, lowest,
                N, D, not WIDE, HAS_MASK, HAS_OFFSET, EPS,
            )  # fmt: skip
            xs, keeps = xs + (x,), keeps + (keep,)
        for k in tl.static_range(UNROLL):
            n = start + k * ROWS + step
            sums, drift, by_x = _absorb_slopes(
                sums, drift, xs[k], keeps[k], factor, inverse, less,
                EPS, LIMIT, NEGATIVES, HAS_MASK, HAS_OFFSET, SERIES, FAST,
            )  # fmt: skip
            if WIDE:
                tl.store(by_tokens + n * D + channel, by_x)
            else:
                tl.store(by_tokens + n * D + channel, by_x, mask=channel < D)
    for start in range(WHOLE, N, ROWS):
        n = start + step
        x, keep = _load(tokens, n, mask, channel, lowest, N, D, True, HAS_MASK, HAS_OFFSET, EPS)
        sums, drift, by_x = _absorb_slopes(
            sums, drift, x, keep, factor, inverse, less,
            EPS, LIMIT, NEGATIVES, True, HAS_OFFSET, SERIES, FAST,
        )  # fmt: skip
        tl.store(by_tokens + n * D + channel, by_x, mask=(n < N) & (channel < D))
    SUMS: tl.constexpr = 2 if HAS_OFFSET else 1
    by_p = by_y * (size / exponent) * (sum_rows(sums * whole, FAST) * (0.6931471805599453 / kept))
    tl.store(by_parameters + row * SUMS * D + c, clip_slopes(by_p, MOST, NEGATIVES), mask=c < D)
    if HAS_OFFSET:
        tl.store(by_parameters + (row * SUMS + 1) * D + c, -sum_rows(drift, FAST), mask=c < D)
