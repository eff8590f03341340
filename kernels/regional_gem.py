"""Regional GeM followed by GeM+ on a feature map, in one kernel.

Regional GeM is a power mean over a window around each position, mixed half and half with the map;
GeM+ is the power mean over all positions. Maps are `(images, h, w, d)`; negative entries count as
zero. One program takes one image and one block of channels. It finds the largest entry of each
channel, then goes down the rows with the horizontal window sums of the last `window` rows in
registers. The second pass finds the map in the cache, so the map is read from memory once. All
arithmetic is in float32.
"""

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import Array
from jax import ShapeDtypeStruct as Shape

from .launch import call
from .powers import LEAST, at_least, exp2, log2, sum_rows
from .tiles import regional_tile


def pool(
    feature_map: Array, *, regional_p: float, window: int, p: float, eps: float, implementation: str
) -> Array:
    """Returns the descriptors of feature maps: regional GeM, then GeM+ over all positions.

    Args:
        feature_map: Maps, `(images, h, w, d)`, in float32, bfloat16 or float16.
        regional_p: Exponent over the window, up to 4.
        window: Odd side of the window, up to 7 positions.
        p: Exponent over all positions, up to 90.
        eps: Smallest number that is raised to p.
        implementation: "triton" (GPU) or "interpret" (CPU).

    Returns:
        The descriptors, `(images, d)` in float32.
    """
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
def _reflect(i, LENGTH: tl.constexpr):
    """Index i reflected at both ends without repeating the edge: -1 -> 1, LENGTH -> LENGTH - 2."""
    i = tl.abs(i)
    return (LENGTH - 1) - tl.abs((LENGTH - 1) - i)


@triton.jit
def _power(x, P: tl.constexpr, FAST: tl.constexpr):
    """x^P."""
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
    """Sums of (x / largest)^REGIONAL_P over the horizontal window around each position of row i.

    They are `(columns, channels)`; `inverse` is 1 / largest, `(1, channels)`.
    """
    # Rows and columns beyond the map are computed too, from indices inside it.
    row = image + _reflect(tl.minimum(i, 2 * H - 2), H) * W * D + c
    total = tl.zeros((j.shape[0], c.shape[1]), tl.float32)
    for k in tl.static_range(-HALF, HALF + 1):
        column = _reflect(tl.minimum(j + k, 2 * W - 2), W)
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
    """Writes (mean_x max(y, EPS)^P)^(1/P) over all positions, for one image and block of channels.

    y = x / 2 + (mean over the window of x^REGIONAL_P)^(1/REGIONAL_P) / 2, with negative x set to 0.

    Args:
        feature_map: Pointer to the maps, `(images, H, W, D)`.
        pooled: Pointer to the output, `(images, D)` in float32.
        H, W, D: Rows, columns and channels of a map.
        REGIONAL_P: Exponent over the window.
        HALF: Half of the window: its side is 2 HALF + 1.
        P: Exponent over all positions.
        EPS: Smallest number that is raised to P.
        COLUMNS: Columns of a tile, a power of two that is at least W.
        CHANNELS: Channels of a program.
        FAST: Whether to use the special function unit of the GPU; False in the interpreter.
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
        x = tl.load(feature_map + (i * W + j) * D + c, mask=inside, other=0.0)
        largest = at_least(x.to(tl.float32), largest)
    top = tl.max(largest, 0)[None, :]
    inverse = 1.0 / top
    WINDOW: tl.constexpr = 2 * HALF + 1
    sums = ()
    # row k - HALF is in slot k, and every later row takes the slot of the row that it replaces
    for k in tl.static_range(WINDOW - 1):
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
            before = sums[: (k + WINDOW - 1) % WINDOW]
            sums = before + (newest,) + sums[(k + WINDOW - 1) % WINDOW + 1 :]
            window = sums[0]
            for other in tl.static_range(1, WINDOW):
                window += sums[other]
            local = exp2(log2(window * (1.0 / (WINDOW * WINDOW)), FAST) * (1.0 / REGIONAL_P), FAST)
            here = inside & (start + k < H)
            x = tl.load(feature_map + ((start + k) * W + j) * D + c, mask=here, other=0.0)
            x = at_least(x.to(tl.float32), 0.0) * inverse
            mixed = at_least(0.5 * local + 0.5 * x, EPS * inverse)
            total += tl.where(here, exp2(P * log2(mixed, FAST), FAST), 0.0)
    mean = sum_rows(total, FAST) * (1.0 / (H * W))
    root = tl.reshape(top, (CHANNELS,)) * tl.exp2(tl.log2(at_least(mean, LEAST)) * (1.0 / P))
    channel = (block % tl.cdiv(D, CHANNELS)) * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(pooled + image * D + channel, root, mask=channel < D)
