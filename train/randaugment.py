"""RandAugment and random erasing of batches on the accelerator.

Operations, strengths and probabilities are those of `train.augment`, which the host applies: the
list `rand-m9-mstd0.5-inc1` of ViT recipes. Each operation gives the pixels of Pillow up to rounding
(tested one by one). Images are uint8 in RGB. The random numbers of an image depend on the seed of
the run, the step and the place of the image in the batch, so a run resumes exactly.

Operations differ from image to image, and an accelerator computes all of them for each. So they are
gathered into four: a table of new values for each channel, an affine map, and two blends.

Reference: Cubuk et al., "RandAugment", 2020, arXiv:1909.13719.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from train.config import Augment

Scalar = Float[Array, ""]
Image = UInt8[Array, "h w 3"]

# by number, in the order of train.augment
OPERATIONS = (
    "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add",
    "color", "contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x",
    "translate_y",
)  # fmt: skip
GREY = 128.0  # of places outside the image
AT_ONCE = 64  # images that a device changes together, which bounds its memory
STREAM = 0x61756758  # tells the random numbers of this module from those of the steps


def augments_on_device(how: Augment) -> bool:
    """Returns whether a part of the augmentation runs on the accelerator.

    Args:
        how: The settings of the augmentation.
    """
    return how.on_device and (how.randaugment_ops > 0 or how.erase > 0)


@functools.partial(jax.jit, static_argnames=("how", "sharding"))
def augment_on_device(
    images: UInt8[Array, "b h w 3"],
    seed: Int[Array, ""],
    step: Int[Array, ""],
    *,
    how: Augment,
    sharding: NamedSharding,
) -> UInt8[Array, "b h w 3"]:
    """Returns the images of a batch after RandAugment and erasing.

    Args:
        images: The batch, `(b, h, w, 3)` uint8.
        seed: Seed of the run.
        step: The step that the batch is for, from 0.
        how: The settings of the augmentation.
        sharding: Layout of the batch over the devices, which the result has as well.

    Returns:
        The images, `(b, h, w, 3)` uint8.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAM), step)

    @functools.partial(
        jax.shard_map, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec
    )
    def augment_rows(images, keys):
        return jax.lax.map(
            lambda row: _augment(row[0], row[1], how),
            (images, keys),
            batch_size=min(AT_ONCE, len(images)),
        )

    return augment_rows(images, jax.random.split(key, len(images)))


def _augment(image: Image, key: PRNGKeyArray, how: Augment) -> Image:
    erase_key, *keys = jax.random.split(key, how.randaugment_ops + 1)
    if keys:
        magnitude = how.randaugment_magnitude
        image, _ = jax.lax.scan(
            lambda image, key: (_apply_random(image, key, magnitude), None), image, jnp.stack(keys)
        )
    return erase(image, erase_key, how.erase) if how.erase else image


def _apply_random(image: Image, key: PRNGKeyArray, magnitude: float) -> Image:
    """The image after a random operation, which is applied with probability 1/2."""
    which, coin, spread, side = jax.random.split(key, 4)
    kind = jax.random.randint(which, (), 0, len(OPERATIONS))
    strength = jnp.clip(magnitude + 0.5 * jax.random.normal(spread), 0, 10) / 10
    sign = jnp.where(jax.random.bernoulli(side), 1.0, -1.0)
    return jnp.where(jax.random.bernoulli(coin), operate(image, kind, strength, sign), image)


def operate(image: Image, kind: Int[Array, ""], strength: Scalar, sign: Scalar) -> Image:
    """Returns the image after one operation.

    Args:
        image: The image, `(h, w, 3)` uint8.
        kind: Number of the operation in `OPERATIONS`.
        strength: From 0 to 1.
        sign: 1 or -1, for operations that have a direction.

    Returns:
        The image, `(h, w, 3)` uint8.
    """
    factor = jnp.maximum(0.1, 1 + 0.9 * strength * sign)
    table = _table(image, kind, strength, factor)
    by_table = jnp.take_along_axis(table.T, image.reshape(-1, 3).astype(jnp.int32), 0)
    return jnp.select(
        [_is(kind, "color"), _is(kind, "sharpness"), _is(kind, *_MOVES)],
        [
            _blend(_grey(image)[..., None], image, factor),
            _blend(_smooth(image), image, factor),
            _warp(image, *_matrix(kind, strength * sign, *image.shape[:2])),
        ],
        by_table.reshape(image.shape),
    ).astype(jnp.uint8)


_MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def _is(kind: Int[Array, ""], *names: str) -> Bool[Array, ""]:
    return jnp.any(kind == jnp.array([OPERATIONS.index(name) for name in names]))


def _table(image: Image, kind, strength: Scalar, factor: Scalar) -> Int[Array, "3 256"]:
    """The new value of each value of each channel, for operations that work value by value."""
    values = jnp.arange(256)
    bits = 4 - jnp.floor(4 * strength).astype(jnp.int32)
    bits = jnp.where(bits == 0, 1, bits)
    darkest = 256 - jnp.floor(256 * strength).astype(jnp.int32)
    added = jnp.minimum(values + jnp.floor(110 * strength).astype(jnp.int32), 255)
    tables: dict[str, Any] = {
        "autocontrast": jax.vmap(_spread_table, 2)(image),
        "equalize": jax.vmap(_equalize_table, 2)(image),
        "invert": 255 - values,
        "posterize": values & ~(2 ** (8 - bits) - 1),
        "solarize": jnp.where(values < darkest, values, 255 - values),
        "solarize_add": jnp.where(values < 128, added, values),
        "contrast": _blend(mean_grey(image), values, factor),
        "brightness": _blend(0, values, factor),
    }
    return jnp.select(
        [_is(kind, name) for name in tables],
        [jnp.broadcast_to(table, (3, 256)).astype(jnp.int32) for table in tables.values()],
    )


def _spread_table(channel: UInt8[Array, "h w"]) -> Int[Array, "256"]:
    """The values that occur are stretched to 0 ... 255."""
    low, high = channel.min().astype(jnp.int32), channel.max().astype(jnp.int32)
    values = jnp.arange(256)
    spread = (values - low) * 255 // jnp.maximum(high - low, 1)
    return jnp.where(high > low, jnp.clip(spread, 0, 255), values)


def _equalize_table(channel: UInt8[Array, "h w"]) -> Int[Array, "256"]:
    """Values are replaced by their rank, so that all occur about equally often."""
    values = jnp.arange(256)
    counts = jnp.zeros(256, jnp.int32).at[channel.reshape(-1)].add(1)
    highest = counts[channel.max().astype(jnp.int32)]
    step = (channel.size - highest) // 255
    below = jnp.cumsum(counts) - counts
    ranks = (step // 2 + below) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.minimum(ranks, 255), values)


def _grey(image: Image) -> Int[Array, "h w"]:
    """Luma of ITU-R 601 in fixed point, as Pillow's mode L."""
    weights = jnp.array([19595, 38470, 7471])
    return ((image.astype(jnp.int32) * weights).sum(-1) + (1 << 15)) >> 16


def mean_grey(image: Image) -> Int[Array, ""]:
    """Returns the mean luma of all pixels, half of a level rounded up.

    Their sum may have more than 32 bits, so it is divided row by row: it is w (h a + b) + c.

    Args:
        image: The image, `(h, w, 3)` uint8, of less than 2^30 pixels.
    """
    grey = _grey(image)
    height, width = grey.shape
    of_rows, rests = jnp.divmod(grey.sum(1), width)
    a, b = jnp.divmod(of_rows.sum(), height)
    more, rest = jnp.divmod(width * b + rests.sum(), grey.size)
    return a + more + (rest >= grey.size - rest)


def _blend(start, end, factor: Scalar) -> Int[Array, "..."]:
    """start + factor (end - start), cut to whole numbers from 0 to 255."""
    start, end = jnp.float32(start), jnp.float32(end)
    return jnp.clip(jnp.floor(start + factor * (end - start)), 0, 255).astype(jnp.int32)


def _smooth(image: Image) -> Int[Array, "h w 3"]:
    """Means of 3 x 3 pixels, of which the middle one counts five times; the border stays."""
    whole = image.astype(jnp.int32)
    height, width = image.shape[:2]
    if min(height, width) < 3:
        return whole
    total = 4 * whole[1:-1, 1:-1]
    for y in range(3):
        for x in range(3):
            total = total + whole[y : height - 2 + y, x : width - 2 + x]
    return whole.at[1:-1, 1:-1].set((2 * total + 13) // 26)


def _matrix(kind, amount: Scalar, height: int, width: int) -> tuple[Scalar, ...]:
    """(a, b, c, d, e, f): pixel (x, y) of the result comes from (ax + by + c, dx + ey + f)."""
    one, zero = jnp.ones(()), jnp.zeros(())
    angle = -math.radians(30) * amount
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2, height / 2  # rotations leave the centre where it is
    matrices = {
        "rotate": (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y),
        "shear_x": (one, 0.3 * amount, zero, zero, one, zero),
        "shear_y": (one, zero, zero, 0.3 * amount, one, zero),
        "translate_x": (one, zero, 0.45 * amount * width, zero, one, zero),
        "translate_y": (one, zero, zero, zero, one, 0.45 * amount * height),
    }
    chosen = [_is(kind, name) for name in matrices]
    return tuple(jnp.select(chosen, list(each)) for each in zip(*matrices.values(), strict=True))


def _warp(image: Image, a, b, c, d, e, f) -> Int[Array, "h w 3"]:
    """The image under an affine map, bilinear, with grey where the map leaves the image."""
    height, width = image.shape[:2]
    row, column = jnp.arange(height)[:, None] + 0.5, jnp.arange(width) + 0.5
    x, y = a * column + b * row + c, d * column + e * row + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x - 0.5, y - 0.5
    left, top = jnp.floor(x).astype(jnp.int32), jnp.floor(y).astype(jnp.int32)
    right_share, lower_share = (x - left)[..., None], (y - top)[..., None]

    def at(rows, columns) -> Float[Array, "h w 3"]:
        rows, columns = jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
        return image[rows, columns].astype(jnp.float32)

    def along_row(rows) -> Float[Array, "h w 3"]:
        first = at(rows, left)
        return first + right_share * (at(rows, left + 1) - first)

    upper = along_row(top)
    found = upper + lower_share * (along_row(top + 1) - upper)
    return jnp.where(inside[..., None], found, GREY).astype(jnp.int32)


def erase(image: Image, key: PRNGKeyArray, probability: float) -> Image:
    """Returns the image, with some probability with a rectangle replaced by noise.

    Area, ratio and place are drawn as in `train.augment.erase`.

    Args:
        image: The image, `(h, w, 3)` uint8.
        key: Source of the random numbers.
        probability: Probability that a rectangle is replaced.

    Returns:
        The image, `(h, w, 3)` uint8.
    """
    coin, area_key, ratio_key, place, noise_key = jax.random.split(key, 5)
    height, width = image.shape[:2]
    area = height * width * jax.random.uniform(area_key, minval=0.02, maxval=1 / 3)
    limit = -math.log(0.3)
    ratio = jnp.exp(jax.random.uniform(ratio_key, minval=-limit, maxval=limit))
    h = jnp.minimum(jnp.round(jnp.sqrt(area * ratio)), height)
    w = jnp.minimum(jnp.round(jnp.sqrt(area / ratio)), width)
    y, x = jax.random.uniform(place, (2,))
    top, left = jnp.floor(y * (height - h + 1)), jnp.floor(x * (width - w + 1))
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (row >= top) & (row < top + h) & (column >= left) & (column < left + w)
    inside &= jax.random.bernoulli(coin, probability)
    return jnp.where(inside[..., None], jax.random.bits(noise_key, image.shape, jnp.uint8), image)
