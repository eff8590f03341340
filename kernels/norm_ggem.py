"""LayerNorm and the power mean over tokens in one pass, and their gradient in one: the tokens are
read once, the normalised ones never written.

A row is one `(n, d)`: tokens `(rows, n, d)`, mask `(rows, n)`, root and its cotangent `(rows, d)`;
scale, bias and exponents are `(sets, d)`, and row i uses set i // (rows / sets). A program takes
all channels of one of `SPLITS` runs of the tokens of a row. All arithmetic is in float32.
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
    exp2,
    joined,
    log2,
    root_of_mean,
    rounded_off,
    slopes,
)
from .tiles import NormTile, norm_gradient_tile, norm_pool_tile


def pool(
    tokens: Array, scale: Array, bias: Array, p: Array, mask: Array | None, *, norm_eps: float,
    eps: float, negatives: str, implementation: str
) -> tuple[Array, Array]:  # fmt: skip
    """root[i, c] = (mean_n z_n^p)^(1/p) of the normalised z, `(rows, d)`, and mean and 1 /
    deviation of each token, `(rows, 2, n)`; both float32.
    """
    rows, n, d = tokens.shape
    tile = norm_pool_tile(rows, n, d, tokens.dtype.itemsize)
    count = _count(mask, p)
    pooled, statistics = call(
        implementation, norm_pool_kernel, [tokens, scale, bias, p, *_mask(mask, p), count],
        [Shape((rows, d) if tile.splits == 1 else (rows, tile.splits, 2, d), jnp.float32),
        Shape((rows, 2, n), jnp.float32)],
        programs=rows * tile.splits, NORM_EPS=norm_eps, **_constants(tokens, p, mask, tile, eps,
        negatives),
    )  # fmt: skip
    if tile.splits > 1:
        kept = jnp.full((rows,), n, jnp.float32) if mask is None else count
        pooled = joined(pooled, jnp.repeat(p, rows // len(p), axis=0), kept[:, None])
    return pooled, statistics


def gradient(
    tokens: Array, scale: Array, bias: Array, p: Array, mask: Array | None, root: Array,
    statistics: Array, cotangent: Array,
    *, eps: float, negatives: str, implementation: str,
) -> tuple[Array, Array]:  # fmt: skip
    """Cotangent of the tokens `(rows, n, d)`, in their dtype, and, row by row, those of p, scale
    and bias, `(rows, 3, d)`.
    """
    rows, n, d = tokens.shape
    tile = norm_gradient_tile(rows, n, d, tokens.dtype.itemsize)
    by_tokens, by_parameters = call(
        implementation, norm_gradient_kernel, [tokens, scale, bias, p, *_mask(mask, p), _count(mask,
        p), root, statistics, cotangent],
        [Shape(tokens.shape, tokens.dtype), Shape((rows, tile.splits, 3, d), jnp.float32)],
        programs=rows * tile.splits, LIMIT=float(jnp.finfo(tokens.dtype).max),
        SERIES=tokens.dtype == jnp.float32,
        **_constants(tokens, p, mask, tile, eps, negatives),
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
        "warps": tile.warps, "N": n, "D": d, "SET": rows // len(p), "SPLITS": tile.splits,
        "EPS": eps, "NEGATIVES": negatives,
        "HAS_MASK": mask is not None, "UNROLL": tile.unroll, "ROWS": tile.rows,
        "CHANNELS": tile.channels, "PIECES": tile.pieces,
    }  # fmt: skip


@triton.jit
def _per_channel(
    values, c, D: tl.constexpr, CHANNELS: tl.constexpr, PIECES: tl.constexpr, OTHER: tl.constexpr
):
    """A tuple of PIECES times `(1, channels)` from `(d,)`."""
    pieces = ()
    for q in tl.static_range(PIECES):
        pieces = pieces + (
            tl.load(values + q * CHANNELS + c, mask=q * CHANNELS + c < D, other=OTHER),
        )
    return pieces


@triton.jit
def _filled(VALUE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, PIECES: tl.constexpr):
    """A tuple of PIECES times `(rows, channels)`."""
    pieces = ()
    for _ in tl.static_range(PIECES):
        pieces = pieces + (tl.full((ROWS, CHANNELS), VALUE, tl.float32),)
    return pieces


@triton.jit
def _inside(
    n,
    c,
    q: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    EXACT: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Where piece q of tokens n lies in the array."""
    here = (n < N) if TAIL else (n >= 0)
    return here if EXACT else here & (q * CHANNELS + c < D)


@triton.jit
def _pool_step(
    largest, total, start, tokens, mask, statistics, gains, shifts, exponents, c,
    N: tl.constexpr, D: tl.constexpr, NORM_EPS: tl.constexpr, EPS: tl.constexpr,
    NEGATIVES: tl.constexpr, HAS_MASK: tl.constexpr,
    UNROLL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, PIECES: tl.constexpr,
    TAIL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Takes UNROLL x ROWS tokens into the running sums. TAIL: there may be fewer."""
    EXACT: tl.constexpr = D == CHANNELS * PIECES
    step = tl.arange(0, ROWS)
    xs, sums = (), ()
    for k in tl.static_range(UNROLL):
        n = (start + k * ROWS + step)[:, None]
        sum = tl.zeros((ROWS, CHANNELS), tl.float32)
        for q in tl.static_range(PIECES):
            if EXACT and not TAIL:
                x = tl.load(tokens + n * D + (q * CHANNELS + c)).to(tl.float32)
            else:
                there = _inside(n, c, q, N, D, CHANNELS, EXACT, TAIL)
                x = tl.load(tokens + n * D + (q * CHANNELS + c), mask=there, other=0.0).to(
                    tl.float32
                )
            sum += x
            xs = xs + (x,)
        sums = sums + (sum,)
    zs, keeps = (), ()
    for k in tl.static_range(UNROLL):
        n = start + k * ROWS + step
        mean = tl.sum(sums[k], 1) * (1.0 / D)
        square = tl.zeros((ROWS, CHANNELS), tl.float32)
        fars = ()
        for q in tl.static_range(PIECES):
            far = xs[k * PIECES + q] - mean[:, None]
            if not EXACT:
                far = tl.where(q * CHANNELS + c < D, far, 0.0)
            square += far * far
            fars = fars + (far,)
        deviation = tl.rsqrt(tl.sum(square, 1) * (1.0 / D) + NORM_EPS)
        tl.store(statistics + n, mean, mask=n < N)
        tl.store(statistics + N + n, deviation, mask=n < N)
        keep = n < N
        if HAS_MASK:
            keep = keep & (tl.load(mask + n, mask=n < N, other=0) != 0)
        keeps = keeps + (keep[:, None],)
        for q in tl.static_range(PIECES):
            zs = zs + (fars[q] * deviation[:, None] * gains[q] + shifts[q],)
    for q in tl.static_range(PIECES):
        grown, more = absorb(
            largest[q],
            total[q],
            zs[q::PIECES],
            keeps,
            exponents[q],
            EPS,
            NEGATIVES,
            TAIL or HAS_MASK,
            True,
            FAST,
        )
        largest = largest[:q] + (grown,) + largest[q + 1 :]
        total = total[:q] + (more,) + total[q + 1 :]
    return largest, total


@triton.jit
def norm_pool_kernel(
    tokens, scale, bias, p, mask, count, pooled, statistics,
    N: tl.constexpr, D: tl.constexpr, SET: tl.constexpr, SPLITS: tl.constexpr,
    NORM_EPS: tl.constexpr, EPS: tl.constexpr, NEGATIVES: tl.constexpr,
    HAS_MASK: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    PIECES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """z = (x - mean) / sqrt(variance + eps) * scale + bias, then running sums of (z / largest)^p as
    in `ggem.pool_kernel`.
    """
    STEP: tl.constexpr = UNROLL * ROWS
    RUN: tl.constexpr = tl.cdiv(tl.cdiv(N, SPLITS), STEP) * STEP
    WHOLE: tl.constexpr = N // STEP * STEP
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    c = tl.arange(0, CHANNELS)[None, :]
    gains = _per_channel(scale + row // SET * D, c, D, CHANNELS, PIECES, 0.0)
    shifts = _per_channel(bias + row // SET * D, c, D, CHANNELS, PIECES, 0.0)
    exponents = _per_channel(p + row // SET * D, c, D, CHANNELS, PIECES, 1.0)
    tokens += row * N * D
    mask += row * N
    statistics += row * 2 * N
    largest = _filled(LEAST, ROWS, CHANNELS, PIECES)
    total = _filled(0.0, ROWS, CHANNELS, PIECES)
    for start in range(split * RUN, tl.minimum((split + 1) * RUN, WHOLE), STEP):
        largest, total = _pool_step(
            largest, total, start, tokens, mask, statistics, gains, shifts, exponents, c,
            N, D, NORM_EPS, EPS, NEGATIVES, HAS_MASK, UNROLL, ROWS, CHANNELS, PIECES, False, FAST,
        )  # fmt: skip
    if WHOLE < N:
        for start in range(tl.maximum(split * RUN, WHOLE), tl.minimum((split + 1) * RUN, N), STEP):
            largest, total = _pool_step(
                largest, total, start, tokens, mask, statistics, gains, shifts, exponents, c,
                N, D, NORM_EPS, EPS, NEGATIVES, HAS_MASK, UNROLL, ROWS, CHANNELS, PIECES, True,
                FAST,
            )  # fmt: skip
    kept = tl.load(count + row) if HAS_MASK else float(N)
    for q in tl.static_range(PIECES):
        channel = q * CHANNELS + tl.arange(0, CHANNELS)
        if SPLITS == 1:
            tl.store(
                pooled + row * D + channel,
                root_of_mean(largest[q], total[q], kept, exponents[q], FAST),
                mask=channel < D,
            )
        else:
            top = tl.max(largest[q], 0)
            part = tl.sum(total[q] * exp2(exponents[q] * log2(largest[q] / top, FAST), FAST), 0)
            tl.store(pooled + (row * SPLITS + split) * 2 * D + channel, top, mask=channel < D)
            tl.store(
                pooled + ((row * SPLITS + split) * 2 + 1) * D + channel, part, mask=channel < D
            )


@triton.jit
def _gradient_step(
    sums, by_scale, by_bias, start, tokens, mask, statistics, by_tokens, gains, shifts, lesses,
    inverses, factors, c,
    N: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, LIMIT: tl.constexpr,
    NEGATIVES: tl.constexpr, HAS_MASK: tl.constexpr, SERIES: tl.constexpr,
    UNROLL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, PIECES: tl.constexpr,
    TAIL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Writes the cotangent of UNROLL x ROWS tokens and adds to the sums. A token that is not kept
    is read as zero and has no deviation.
    """
    EXACT: tl.constexpr = D == CHANNELS * PIECES
    MASKED: tl.constexpr = TAIL or HAS_MASK
    step = tl.arange(0, ROWS)[:, None]
    xs, keeps = (), ()  # all loads before the first store, which could change what they read
    for k in tl.static_range(UNROLL):
        n = start + k * ROWS + step
        keep = n < N
        if HAS_MASK:
            keep = keep & (tl.load(mask + n, mask=keep, other=0) != 0)
        keeps = keeps + (keep,)
        for q in tl.static_range(PIECES):
            if EXACT and not MASKED:
                x = tl.load(tokens + n * D + (q * CHANNELS + c))
            else:
                x = tl.load(
                    tokens + n * D + (q * CHANNELS + c),
                    mask=_inside(n, c, q, N, D, CHANNELS, EXACT, TAIL) & keep,
                    other=0.0,
                )
            xs = xs + (x.to(tl.float32),)
    for k in tl.static_range(UNROLL):
        n = start + k * ROWS + step
        keep = keeps[k]
        mean = tl.load(statistics + n, mask=keep, other=0.0)
        deviation = tl.load(statistics + N + n, mask=keep, other=0.0)
        along = tl.zeros((ROWS, CHANNELS), tl.float32)
        along_u = tl.zeros((ROWS, CHANNELS), tl.float32)
        us, gs = (), ()
        for q in tl.static_range(PIECES):
            u = (xs[k * PIECES + q] - mean) * deviation
            z = u * gains[q] + shifts[q]
            weight, s = slopes(
                z, inverses[q], lesses[q], factors[q], EPS, MOST, NEGATIVES, SERIES, FAST
            )
            if MASKED:
                weight = tl.where(keep, weight, 0.0)
                s = tl.where(keep, s, 0.0)
            sums = sums[:q] + (sums[q] + weight,) + sums[q + 1 :]
            by_scale = by_scale[:q] + (by_scale[q] + s * u,) + by_scale[q + 1 :]
            by_bias = by_bias[:q] + (by_bias[q] + s,) + by_bias[q + 1 :]
            g = s * gains[q]
            along += g
            along_u += g * u
            us, gs = us + (u,), gs + (g,)
        mean_g = (tl.sum(along, 1) * (1.0 / D))[:, None]
        mean_gu = (tl.sum(along_u, 1) * (1.0 / D))[:, None]
        for q in tl.static_range(PIECES):
            by_x = (gs[q] - mean_g - us[q] * mean_gu) * deviation
            by_x = clip_slopes(by_x, LIMIT, NEGATIVES)
            if EXACT and not TAIL:
                tl.store(by_tokens + n * D + (q * CHANNELS + c), by_x)
            else:
                tl.store(
                    by_tokens + n * D + (q * CHANNELS + c),
                    by_x,
                    mask=_inside(n, c, q, N, D, CHANNELS, EXACT, TAIL),
                )
    return sums, by_scale, by_bias


@triton.jit
def norm_gradient_kernel(
    tokens, scale, bias, p, mask, count, root, statistics, cotangent, by_tokens, by_parameters,
    N: tl.constexpr, D: tl.constexpr, SET: tl.constexpr, SPLITS: tl.constexpr, EPS: tl.constexpr,
    LIMIT: tl.constexpr, NEGATIVES: tl.constexpr,
    HAS_MASK: tl.constexpr, SERIES: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr, PIECES: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """With u normalised, z = u scale + bias and the cotangent of z, s = by_root (z / root)^(p - 1)
    / count:

    by_x = (s scale - mean_d(s scale) - u mean_d(s scale u)) / deviation, by_scale = sum_n s u,
    by_bias = sum_n s, and that of p as in `ggem`.
    """
    STEP: tl.constexpr = UNROLL * ROWS
    RUN: tl.constexpr = tl.cdiv(tl.cdiv(N, SPLITS), STEP) * STEP
    WHOLE: tl.constexpr = N // STEP * STEP
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    c = tl.arange(0, CHANNELS)[None, :]
    kept = tl.load(count + row) if HAS_MASK else float(N)
    gains = _per_channel(scale + row // SET * D, c, D, CHANNELS, PIECES, 0.0)
    shifts = _per_channel(bias + row // SET * D, c, D, CHANNELS, PIECES, 0.0)
    exponents = _per_channel(p + row // SET * D, c, D, CHANNELS, PIECES, 1.0)
    roots = _per_channel(root + row * D, c, D, CHANNELS, PIECES, 1.0)
    cotangents = _per_channel(cotangent + row * D, c, D, CHANNELS, PIECES, 0.0)
    lesses, inverses, factors = (), (), ()
    for q in tl.static_range(
        PIECES
    ):  # of a zero root: no cotangent, and ratios the least, so that nothing overflows
        lesses = lesses + (exponents[q] - 1.0,)
        inverses = inverses + (tl.where(roots[q] == 0, 0.0, 1.0 / tl.abs(roots[q])),)
        whole = rounded_off(lesses[q], inverses[q], tl.abs(roots[q]))
        factors = factors + (tl.where(roots[q] == 0, 0.0, cotangents[q] / kept * whole),)
    tokens += row * N * D
    by_tokens += row * N * D
    mask += row * N
    statistics += row * 2 * N
    sums = _filled(0.0, ROWS, CHANNELS, PIECES)
    by_scale = _filled(0.0, ROWS, CHANNELS, PIECES)
    by_bias = _filled(0.0, ROWS, CHANNELS, PIECES)
    for start in range(split * RUN, tl.minimum((split + 1) * RUN, WHOLE), STEP):
        sums, by_scale, by_bias = _gradient_step(
            sums, by_scale, by_bias, start, tokens, mask, statistics, by_tokens, gains, shifts,
            lesses, inverses, factors, c,
            N, D, EPS, LIMIT, NEGATIVES, HAS_MASK, SERIES, UNROLL, ROWS, CHANNELS, PIECES, False,
            FAST,
        )  # fmt: skip
    if WHOLE < N:
        for start in range(tl.maximum(split * RUN, WHOLE), tl.minimum((split + 1) * RUN, N), STEP):
            sums, by_scale, by_bias = _gradient_step(
                sums, by_scale, by_bias, start, tokens, mask, statistics, by_tokens, gains, shifts,
                lesses, inverses, factors, c,
                N, D, EPS, LIMIT, NEGATIVES, HAS_MASK, SERIES, UNROLL, ROWS, CHANNELS, PIECES, True,
                FAST,
            )  # fmt: skip
    by_parameters += (row * SPLITS + split) * 3 * D
    for q in tl.static_range(PIECES):
        channel = q * CHANNELS + tl.arange(0, CHANNELS)
        by_p = (
            tl.sum(sums[q] * (factors[q] * (tl.abs(roots[q]) / exponents[q])), 0)
            * 0.6931471805599453
        )
        by_p = clip_slopes(by_p, MOST, NEGATIVES)
        tl.store(by_parameters + channel, by_p, mask=channel < D)
        tl.store(by_parameters + D + channel, tl.sum(by_scale[q], 0), mask=channel < D)
        tl.store(by_parameters + 2 * D + channel, tl.sum(by_bias[q], 0), mask=channel < D)
