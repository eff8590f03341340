"""Regional GeM followed by GeM+ on a feature map: windowed power mean, mixed half and half with the
map, then the power mean over all places.

Maps are `(images, h, w, d)` with channels last; negative entries count as zero. One program takes
one image and one block of channels: it looks up the largest entry of each channel, then walks down
the rows with the horizontal window sums of the last `window` rows in registers. The second walk
reads what the first has left in the cache, so that the map crosses the memory bus once. All
arithmetic is in float32.
"""

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array
from jax import ShapeDtypeStruct as Shape

from .launch import call
from .powers import LEAST, at_least, exp2, log2
from .tiles import regional_tile


def pool(
    feature_map: Array, *, regional_p: float, window: int, p: float, eps: float, implementation: str
) -> Array:
    """Descriptors `(images, d)` in float32."""
    images, h, w, d = feature_map.shape
    tile = regional_tile(images, w, d, feature_map.dtype.itemsize)
    (pooled,) = call(
        implementation, regional_kernel, [feature_map], [Shape((images, d), jnp.float32)],
        programs=images * triton.cdiv(d, tile.channels), warps=tile.warps,
        H=h, W=w, D=d, REGIONAL_P=float(regional_p), HALF=window // 2, P=float(p), EPS=float(eps),
        COLUMNS=tile.rows, CHANNELS=tile.channels,
    )  # fmt: skip
    return pooled


@triton.jit
def _reflected(i, LENGTH: tl.constexpr):
    """Reflection at both ends that does not repeat the edge: -1 -> 1, LENGTH -> LENGTH - 2."""
    i = tl.abs(i)
    return (LENGTH - 1) - tl.abs((LENGTH - 1) - i)


@triton.jit
def _power(x, P: tl.constexpr, FAST: tl.constexpr):
    if P == 2.5:  # the published exponent: one special function instead of two
        return x * x * tl.sqrt(x)
    else:
        return exp2(P * log2(x, FAST), FAST)


@triton.jit
def _row_sum(
    image, i, j, c, in_d, inverse,
    H: tl.constexpr, W: tl.constexpr, D: tl.constexpr, REGIONAL_P: tl.constexpr, HALF: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Sums of (x / largest)^p over the horizontal window around each column of row i, `(columns,
    channels)`.
    """
    row = (
        image + _reflected(tl.minimum(i, 2 * H - 2), H) * W * D + c
    )  # rows and columns beyond the map compute, too
    total = tl.zeros((j.shape[0], c.shape[1]), tl.float32)
    for k in tl.static_range(-HALF, HALF + 1):
        column = _reflected(tl.minimum(j + k, 2 * W - 2), W)
        x = tl.load(row + column * D, mask=in_d & (column >= 0), other=0.0).to(tl.float32)
        total += _power(at_least(x, 0.0) * inverse, REGIONAL_P, FAST)
    return total


@triton.jit
def regional_kernel(
    feature_map, pooled,
    H: tl.constexpr, W: tl.constexpr, D: tl.constexpr, REGIONAL_P: tl.constexpr, HALF: tl.constexpr,
    P: tl.constexpr, EPS: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """pooled[image, c] = (mean max(x', eps)^p)^(1/p) with x' = x / 2 + (mean over the window of
    x^regional_p)^(1/regional_p) / 2.
    """
    block = tl.program_id(0)
    image = (block // tl.cdiv(D, CHANNELS)).to(tl.int64)
    c = ((block % tl.cdiv(D, CHANNELS)) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    j = tl.arange(0, COLUMNS)[:, None]
    in_d = c < D
    inside = (j < W) & in_d
    feature_map += image * H * W * D
    largest = tl.full((COLUMNS, CHANNELS), EPS, tl.float32)
    for i in range(0, H):
        largest = at_least(
            tl.load(feature_map + (i * W + j) * D + c, mask=inside, other=0.0).to(tl.float32),
            largest,
        )
    top = tl.max(largest, 0)[None, :]
    inverse = 1.0 / top
    WINDOW: tl.constexpr = 2 * HALF + 1
    sums = ()
    for k in tl.static_range(
        WINDOW - 1
    ):  # row k - HALF stands in slot k, and every later row in the slot of the one that it replaces
        sums = sums + (
            _row_sum(feature_map, k - HALF, j, c, in_d, inverse, H, W, D, REGIONAL_P, HALF, FAST),
        )
    sums = sums + (tl.zeros((COLUMNS, CHANNELS), tl.float32),)
    total = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for start in range(0, H, WINDOW):
        for k in tl.static_range(WINDOW):
            newest = _row_sum(
                feature_map, start + k + HALF, j, c, in_d, inverse, H, W, D, REGIONAL_P, HALF, FAST
            )
            sums = (
                sums[: (k + WINDOW - 1) % WINDOW]
                + (newest,)
                + sums[(k + WINDOW - 1) % WINDOW + 1 :]
            )
            window = sums[0]
            for other in tl.static_range(1, WINDOW):
                window += sums[other]
            local = exp2(log2(window * (1.0 / (WINDOW * WINDOW)), FAST) * (1.0 / REGIONAL_P), FAST)
            here = inside & (start + k < H)
            x = (
                at_least(
                    tl.load(feature_map + ((start + k) * W + j) * D + c, mask=here, other=0.0).to(
                        tl.float32
                    ),
                    0.0,
                )
                * inverse
            )
            mixed = at_least(0.5 * local + 0.5 * x, EPS * inverse)
            total += tl.where(here, exp2(P * log2(mixed, FAST), FAST), 0.0)
    mean = tl.sum(total, 0) * (1.0 / (H * W))
    root = tl.reshape(top, (CHANNELS,)) * tl.exp2(tl.log2(at_least(mean, LEAST)) * (1.0 / P))
    channel = (block % tl.cdiv(D, CHANNELS)) * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(pooled + image * D + channel, root, mask=channel < D)
