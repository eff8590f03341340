"""LayerNorm and the power mean over tokens in one pass, and their gradient in another.

Each pass reads the tokens once, and the normalised tokens are never written. A row is one image:
tokens `(rows, n, d)`, mask `(rows, n)`, root and its cotangent `(rows, d)`. Scale, bias and
exponents are `(sets, d)`; row i uses set i // (rows / sets). The tokens of a row are divided into
`SPLITS` runs, and a program takes all channels of one run. All arithmetic is in float32.
"""

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array
from jax import ShapeDtypeStruct as Shape

from .launch import call
from .powers import (
    MOST,
    absorb_near,
    clip_slopes,
    join_rows,
    join_splits,
    largest_of,
    reference,
    root_of_mean,
    rounded_product,
    rounding_factor,
    slopes,
    sum_channels,
    sum_rows,
)
from .tiles import NormTile, norm_gradient_tile, norm_pool_tile


def pool(
    tokens: Array,
    scale: Array,
    bias: Array,
    p: Array,
    mask: Array | None,
    *,
    skip: int = 0,
    norm_eps: float,
    eps: float,
    negatives: str,
    implementation: str,
) -> tuple[Array, Array]:
    """Returns the power mean of normalised tokens, and the statistics of the norm.

    z = (x - mean) / sqrt(variance + norm_eps) * scale + bias and root = (mean_n z_n^p)^(1/p).

    Args:
        tokens: Tokens x, `(rows, skip + n, d)`, in float32, bfloat16 or float16.
        scale: Factor of the normalised tokens, `(sets, d)` in float32.
        bias: Added to the scaled tokens, `(sets, d)` in float32.
        p: Exponents, `(sets, d)` in float32.
        mask: Which tokens to keep, `(rows, n)`; None keeps all.
        skip: Number of tokens at the start of each row that are not pooled.
        norm_eps: Added to the variance.
        eps: Smallest number that is raised to p; "signed" does not use it.
        negatives: The sign rule: "clamp", "abs" or "signed".
        implementation: "triton" (GPU) or "interpret" (CPU).

    Returns:
        The root, `(rows, d)`, 0 where no token is kept; and mean and 1 / deviation of each token,
        `(rows, 2, n)`; both in float32.
    """
    rows, n, d = tokens.shape[0], tokens.shape[1] - skip, tokens.shape[2]
    tile = norm_pool_tile(rows, n, d, tokens.dtype.itemsize)
    count = _count(mask, p)
    pooled, statistics = call(
        implementation, norm_pool_kernel, [tokens, scale, bias, p, _mask(mask, p), count],
        [Shape((rows, d) if tile.splits == 1 else (rows, tile.splits, 2, d), jnp.float32),
         Shape((rows, 2, n), jnp.float32)],
        programs=rows * tile.splits, NORM_EPS=norm_eps,
        **_constants(tokens, p, mask, tile, skip, eps, negatives),
    )  # fmt: skip
    if tile.splits > 1:
        kept = jnp.full((rows,), n, jnp.float32) if mask is None else count
        pooled = join_splits(pooled, jnp.repeat(p, rows // len(p), axis=0), kept[:, None])
    return pooled, statistics


def gradient(
    tokens: Array,
    scale: Array,
    bias: Array,
    p: Array,
    mask: Array | None,
    root: Array,
    statistics: Array,
    cotangent: Array,
    *,
    skip: int = 0,
    eps: float,
    negatives: str,
    implementation: str,
) -> tuple[Array, Array]:
    """Returns the cotangents of the tokens and, row by row, of p, scale and bias.

    Args:
        tokens: As in `pool`.
        scale: As in `pool`.
        bias: As in `pool`.
        p: As in `pool`.
        mask: As in `pool`.
        root: First result of `pool`, `(rows, d)` in float32.
        statistics: Second result of `pool`, `(rows, 2, n)` in float32.
        cotangent: Cotangent of the root, `(rows, d)` in float32.
        skip: As in `pool`.
        eps: As in `pool`.
        negatives: As in `pool`.
        implementation: As in `pool`.

    Returns:
        The cotangent of the tokens, `(rows, skip + n, d)` in their dtype, and those of p, scale and
        bias, `(rows, 3, d)` in float32.
    """
    rows, n, d = tokens.shape[0], tokens.shape[1] - skip, tokens.shape[2]
    tile = norm_gradient_tile(rows, n, d, tokens.dtype.itemsize)
    by_tokens, by_parameters = call(
        implementation, norm_gradient_kernel,
        [tokens, scale, bias, p, _mask(mask, p), _count(mask, p), root, statistics, cotangent],
        [Shape(tokens.shape, tokens.dtype), Shape((rows, tile.splits, 3, d), jnp.float32)],
        programs=rows * tile.splits, LIMIT=float(jnp.finfo(tokens.dtype).max),
        SERIES=tokens.dtype == jnp.float32,
        **_constants(tokens, p, mask, tile, skip, eps, negatives),
    )  # fmt: skip
    return by_tokens, jnp.sum(by_parameters, axis=1)


def _mask(mask, p):
    """The mask `(rows, n)` for a kernel; if there is none, p, which the kernel does not read."""
    return p if mask is None else mask.astype(jnp.int8)


def _count(mask, p):
    """How many tokens each row keeps, `(rows,)`; without a mask p, which is not read."""
    return p if mask is None else jnp.maximum(jnp.sum(mask, axis=1), 1).astype(jnp.float32)


def _constants(tokens, p, mask, tile: NormTile, skip, eps, negatives):
    rows, n, d = tokens.shape
    return {
        "warps": tile.warps, "SKIP": skip, "N": n - skip, "D": d, "SET": rows // len(p),
        "SPLITS": tile.splits, "EPS": eps, "NEGATIVES": negatives,
        "HAS_MASK": mask is not None, "UNROLL": tile.unroll, "ROWS": tile.rows,
        "CHANNELS": tile.channels, "PIECES": tile.pieces,
    }  # fmt: skip


@triton.jit
def _per_channel(
    values, c, D: tl.constexpr, CHANNELS: tl.constexpr, PIECES: tl.constexpr, OTHER: tl.constexpr
):
    """The PIECES pieces `(1, channels)` of a vector `(D,)`, as a tuple."""
    pieces = ()
    for q in tl.static_range(PIECES):
        pieces = pieces + (
            tl.load(values + q * CHANNELS + c, mask=q * CHANNELS + c < D, other=OTHER),
        )
    return pieces


@triton.jit
def _fill(VALUE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, PIECES: tl.constexpr):
    """PIECES tiles `(rows, channels)` of one value, as a tuple."""
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
    """Which elements of piece q of the tokens n are inside the array."""
    here = (n < N) if TAIL else (n >= 0)
    return here if EXACT else here & (q * CHANNELS + c < D)


@triton.jit
def _pool_step(
    level, total, start, tokens, mask, statistics, gains, shifts, floors, exponents, c,
    N: tl.constexpr, D: tl.constexpr, NORM_EPS: tl.constexpr,
    NEGATIVES: tl.constexpr, HAS_MASK: tl.constexpr,
    UNROLL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, PIECES: tl.constexpr,
    TAIL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Normalises UNROLL x ROWS tokens and adds them to the running sums, tuples of PIECES tiles.

    With TAIL there may be fewer tokens. Writes mean and 1 / deviation of each token to `statistics`
    `(2, N)`.
    """
    EXACT: tl.constexpr = D == CHANNELS * PIECES
    step = tl.arange(0, ROWS)
    xs, sums = (), ()
    for k in tl.static_range(UNROLL):
        n = (start + k * ROWS + step)[:, None]
        for q in tl.static_range(PIECES):
            if EXACT and not TAIL:
                x = tl.load(tokens + n * D + (q * CHANNELS + c)).to(tl.float32)
            else:
                there = _inside(n, c, q, N, D, CHANNELS, EXACT, TAIL)
                x = tl.load(tokens + n * D + (q * CHANNELS + c), mask=there, other=0.0).to(
                    tl.float32
                )
            xs = xs + (x,)
        sum = xs[k * PIECES]
        for q in tl.static_range(1, PIECES):
            sum += xs[k * PIECES + q]
        sums = sums + (sum,)
    totals = sum_channels(sums, FAST)
    means, fars, squares = (), (), ()
    for k in tl.static_range(UNROLL):
        # Rounded, because the gradient reads it from `statistics`.
        mean = rounded_product(totals[k], tl.full((ROWS,), 1.0 / D, tl.float32), FAST)
        square = tl.zeros((ROWS, CHANNELS), tl.float32)
        for q in tl.static_range(PIECES):
            far = xs[k * PIECES + q] - mean[:, None]
            if not EXACT:
                far = tl.where(q * CHANNELS + c < D, far, 0.0)
            square += far * far
            fars = fars + (far,)
        means, squares = means + (mean,), squares + (square,)
    variances = sum_channels(squares, FAST)
    zs, keeps = (), ()
    for k in tl.static_range(UNROLL):
        n = start + k * ROWS + step
        deviation = tl.rsqrt(variances[k] * (1.0 / D) + NORM_EPS)
        tl.store(statistics + n, means[k], mask=n < N)
        tl.store(statistics + N + n, deviation, mask=n < N)
        keep = n < N
        if HAS_MASK:
            keep = keep & (tl.load(mask + n, mask=n < N, other=0) != 0)
        keeps = keeps + (keep[:, None],)
        for q in tl.static_range(PIECES):
            zs = zs + (fars[k * PIECES + q] * deviation[:, None] * gains[q] + shifts[q],)
    for q in tl.static_range(PIECES):
        risen, more = absorb_near(
            level[q], total[q], zs[q::PIECES], keeps, exponents[q], floors[q],
            NEGATIVES, TAIL or HAS_MASK, FAST,
        )  # fmt: skip
        level = level[:q] + (risen,) + level[q + 1 :]
        total = total[:q] + (more,) + total[q + 1 :]
    return level, total


@triton.jit
def norm_pool_kernel(
    tokens, scale, bias, p, mask, count, pooled, statistics,
    SKIP: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SET: tl.constexpr, SPLITS: tl.constexpr,
    NORM_EPS: tl.constexpr, EPS: tl.constexpr, NEGATIVES: tl.constexpr,
    HAS_MASK: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    PIECES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Writes the power mean of z = (x - mean) / sqrt(variance + NORM_EPS) * scale + bias.

    A program takes one run of the tokens of a row and sums (z / largest)^p as in
    `ggem.pool_kernel`.

    Args:
        tokens: Pointer to the tokens, `(rows, SKIP + N, D)`.
        scale, bias, p: Pointers to the parameters, `(sets, D)` in float32.
        mask, count: As in `ggem.pool_kernel`.
        pooled: Pointer to the output in float32: the root `(rows, D)`, or with several SPLITS the
            largest number and the sum of powers of each run, `(rows, SPLITS, 2, D)`.
        statistics: Pointer to the output for mean and 1 / deviation of each token, `(rows, 2, N)`
            in float32.
        SKIP, N, D, SET, EPS, NEGATIVES, HAS_MASK, FAST: As in `ggem.pool_kernel`.
        SPLITS: Number of runs into which the tokens of a row are divided, one for each program.
        NORM_EPS: Added to the variance.
        UNROLL, ROWS: A step reads UNROLL x ROWS tokens.
        CHANNELS, PIECES: All channels of a token are read in PIECES pieces of CHANNELS channels.
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
    tokens += row * ((SKIP + N) * D) + SKIP * D
    mask += row * N
    statistics += row * 2 * N
    # Pooled are z / reference, so that logarithms are near 0. Powers of two round nothing.
    references, floors = (), ()
    for q in tl.static_range(PIECES):
        inverse, floor = reference(gains[q], shifts[q], EPS, NEGATIVES)
        gains = gains[:q] + (gains[q] * inverse,) + gains[q + 1 :]
        shifts = shifts[:q] + (shifts[q] * inverse,) + shifts[q + 1 :]
        references, floors = references + (inverse,), floors + (floor,)
    level = _fill(-125.0, ROWS, CHANNELS, PIECES)  # log2(LEAST)
    total = _fill(0.0, ROWS, CHANNELS, PIECES)
    for start in range(split * RUN, tl.minimum((split + 1) * RUN, WHOLE), STEP):
        level, total = _pool_step(
            level, total, start, tokens, mask, statistics, gains, shifts, floors, exponents, c,
            N, D, NORM_EPS, NEGATIVES, HAS_MASK, UNROLL, ROWS, CHANNELS, PIECES, False, FAST,
        )  # fmt: skip
    if WHOLE < N:
        for start in range(tl.maximum(split * RUN, WHOLE), tl.minimum((split + 1) * RUN, N), STEP):
            level, total = _pool_step(
                level, total, start, tokens, mask, statistics, gains, shifts, floors, exponents, c,
                N, D, NORM_EPS, NEGATIVES, HAS_MASK, UNROLL, ROWS, CHANNELS, PIECES, True, FAST,
            )  # fmt: skip
    kept = tl.load(count + row) if HAS_MASK else float(N)
    for q in tl.static_range(PIECES):
        channel = q * CHANNELS + tl.arange(0, CHANNELS)
        top, sum = join_rows(level[q], total[q], exponents[q], FAST)
        largest = largest_of(top, tl.max(references[q], 0), tl.max(floors[q], 0), EPS, FAST)
        if SPLITS == 1:
            root = root_of_mean(largest, sum * (1.0 / kept), tl.max(exponents[q], 0), FAST)
            tl.store(pooled + row * D + channel, root, mask=channel < D)
        else:
            part = pooled + (row * SPLITS + split) * 2 * D + channel
            tl.store(part, largest, mask=channel < D)
            tl.store(part + D, sum, mask=channel < D)


@triton.jit
def _gradient_step(
    sums, by_scale, by_bias, start, tokens, mask, statistics, by_tokens, gains, shifts, lesses,
    inverses, factors, c,
    N: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, LIMIT: tl.constexpr,
    NEGATIVES: tl.constexpr, HAS_MASK: tl.constexpr, SERIES: tl.constexpr,
    UNROLL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, PIECES: tl.constexpr,
    TAIL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Writes the cotangents of UNROLL x ROWS tokens and adds to the sums for p, scale and bias.

    The sums are tuples of PIECES tiles `(rows, channels)`. A token that is not kept is read as
    zero, with a 1 / deviation of zero.
    """
    EXACT: tl.constexpr = D == CHANNELS * PIECES
    MASKED: tl.constexpr = TAIL or HAS_MASK
    step = tl.arange(0, ROWS)[:, None]
    xs, keeps = (), ()  # all loads come before the first store, which could overwrite tokens
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
    means, deviations = (), ()
    for k in tl.static_range(UNROLL):
        n = start + k * ROWS + step
        means = means + (tl.load(statistics + n, mask=keeps[k], other=0.0),)
        deviations = deviations + (tl.load(statistics + N + n, mask=keeps[k], other=0.0),)
    us, gs, parts = (), (), ()
    for k in tl.static_range(UNROLL):
        along = tl.zeros((ROWS, CHANNELS), tl.float32)
        along_u = tl.zeros((ROWS, CHANNELS), tl.float32)
        for q in tl.static_range(PIECES):
            u = (xs[k * PIECES + q] - means[k]) * deviations[k]
            z = u * gains[q] + shifts[q]
            weight, s = slopes(
                z, inverses[q], lesses[q], factors[q], EPS, MOST, NEGATIVES, SERIES, FAST
            )
            if MASKED:
                weight = tl.where(keeps[k], weight, 0.0)
                s = tl.where(keeps[k], s, 0.0)
            sums = sums[:q] + (sums[q] + weight,) + sums[q + 1 :]
            by_scale = by_scale[:q] + (by_scale[q] + s * u,) + by_scale[q + 1 :]
            by_bias = by_bias[:q] + (by_bias[q] + s,) + by_bias[q + 1 :]
            g = s * gains[q]
            along += g
            along_u += g * u
            us, gs = us + (u,), gs + (g,)
        parts = parts + (along, along_u)
    totals = sum_channels(parts, FAST)
    for k in tl.static_range(UNROLL):
        n = start + k * ROWS + step
        mean_g = (totals[2 * k] * (1.0 / D))[:, None] * deviations[k]
        mean_gu = (totals[2 * k + 1] * (1.0 / D))[:, None] * deviations[k]
        for q in tl.static_range(PIECES):
            g, u = gs[k * PIECES + q], us[k * PIECES + q]
            by_x = (g * deviations[k] - mean_g) - u * mean_gu
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
    SKIP: tl.constexpr, N: tl.constexpr, D: tl.constexpr, SET: tl.constexpr,
    SPLITS: tl.constexpr, EPS: tl.constexpr, LIMIT: tl.constexpr, NEGATIVES: tl.constexpr,
    HAS_MASK: tl.constexpr, SERIES: tl.constexpr,
    UNROLL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, PIECES: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Writes the cotangents of one run of the tokens of a row.

    With u = (x - mean) / deviation, z = u * scale + bias and the cotangent s of z:

        s = cotangent (z / root)^(p - 1) / count,
        by_x = (s scale - mean_d(s scale) - u mean_d(s scale u)) / deviation,
        by_scale = sum_n s u,  by_bias = sum_n s.

    The cotangent of p is that of `ggem.gradient_kernel`.

    Args:
        tokens, scale, bias, p, mask, count: As in `norm_pool_kernel`.
        root: Pointer to the power means, `(rows, D)` in float32.
        statistics: Pointer to the statistics that `norm_pool_kernel` writes, `(rows, 2, N)`.
        cotangent: Pointer to the cotangent of the root, `(rows, D)` in float32.
        by_tokens: Pointer to the output for the tokens, `(rows, SKIP + N, D)` in their
            dtype.
        by_parameters: Pointer to the output for p, scale and bias, summed over the tokens of each
            run, `(rows, SPLITS, 3, D)` in float32.
        SKIP, N, D, SET, SPLITS, EPS, NEGATIVES, HAS_MASK: As in `norm_pool_kernel`.
        LIMIT, SERIES: As in `ggem.gradient_kernel`.
        UNROLL, ROWS, CHANNELS, PIECES, FAST: As in `norm_pool_kernel`.
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
    # Where the root is zero, there is no cotangent, and all ratios become LEAST: nothing overflows.
    for q in tl.static_range(PIECES):
        lesses = lesses + (exponents[q] - 1.0,)
        inverses = inverses + (tl.where(roots[q] == 0, 0.0, 1.0 / tl.abs(roots[q])),)
        whole = rounding_factor(lesses[q], inverses[q], tl.abs(roots[q]))
        factors = factors + (tl.where(roots[q] == 0, 0.0, cotangents[q] / kept * whole),)
    tokens += row * ((SKIP + N) * D) + SKIP * D
    by_tokens += row * ((SKIP + N) * D)
    for k in tl.static_range(SKIP):
        for q in tl.static_range(PIECES):
            zeros = tl.zeros((1, CHANNELS), by_tokens.dtype.element_ty)
            channel = q * CHANNELS + c
            tl.store(by_tokens + k * D + channel, zeros, mask=channel + split * D < D)  # once
    by_tokens += SKIP * D
    mask += row * N
    statistics += row * 2 * N
    sums = _fill(0.0, ROWS, CHANNELS, PIECES)
    by_scale = _fill(0.0, ROWS, CHANNELS, PIECES)
    by_bias = _fill(0.0, ROWS, CHANNELS, PIECES)
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
        by_p = sum_rows(sums[q] * (factors[q] * (tl.abs(roots[q]) / exponents[q])), FAST)
        by_p *= 0.6931471805599453  # log(2)
        by_p = clip_slopes(by_p, MOST, NEGATIVES)
        tl.store(by_parameters + channel, by_p, mask=channel < D)
        tl.store(by_parameters + D + channel, sum_rows(by_scale[q], FAST), mask=channel < D)
        tl.store(by_parameters + 2 * D + channel, sum_rows(by_bias[q], FAST), mask=channel < D)
