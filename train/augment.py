"""Random changes of training images.

An image is `(height, width, 3)` uint8 in RGB. Every random number comes from the generator that is
passed in; the functions are otherwise deterministic.
"""

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ggem_jax.files.crops import RGB, Part, centre_part, cut_centre
from ggem_jax.files.images import centre_crop
from train.config import Augment


def choose_part(height: int, width: int, side: int, how: Augment, rng: np.random.Generator) -> Part:
    """Returns the part of an image that `augment` needs.

    Args:
        height, width: Sides of the image, pixels.
        side: Side of the augmented image, pixels.
        how: Which changes are made, and how strong they are.
        rng: Source of all random numbers.
    """
    part = None
    if how.crop == "resized":
        part = random_rectangle(height, width, side, how.min_area, rng)
    return part or centre_part(height, width, side)


def augment(image: RGB, side: int, how: Augment, rng: np.random.Generator) -> RGB:
    """Returns an augmented image: crop, flip, RandAugment and erase, where switched on.

    RandAugment and erase are left to `train.randaugment` where they run on the accelerator.

    Args:
        image: The part of the image that `choose_part` returned, resized, `(height, width, 3)`
            uint8.
        side: Side of the result, pixels.
        how: Which changes are made, and how strong they are.
        rng: Source of all random numbers.

    Returns:
        The image, `(side, side, 3)` uint8.
    """
    image = cut_centre(image, side)
    if how.crop == "pad":
        image = pad_crop(image, side, how.pad, rng)
    if how.flip and rng.random() < 0.5:
        image = flip(image)
    if how.on_device:
        return np.ascontiguousarray(image)
    if how.randaugment_ops:
        image = randaugment(image, how.randaugment_ops, how.randaugment_magnitude, rng)
    if rng.random() < how.erase:
        image = erase(image, rng)
    return np.ascontiguousarray(image)


def pad_crop(image: RGB, side: int, pad: int, rng: np.random.Generator) -> RGB:
    """Returns a random square of the image after its border is extended by reflection.

    Args:
        image: The image, `(height, width, 3)`, of which the centre square is taken first.
        side: Side of the square, pixels.
        pad: Pixels that are added on each side; from `side` on, the border is repeated instead of
            reflected.
        rng: Source of the place of the square.

    Returns:
        The square, `(side, side, 3)`.
    """
    image = np.pad(
        centre_crop(image, side),
        ((pad, pad), (pad, pad), (0, 0)),
        mode="reflect" if pad < side else "edge",
    )
    top, left = rng.integers(0, 2 * pad + 1, 2)
    return image[top : top + side, left : left + side]


def random_rectangle(
    height: int, width: int, side: int, min_area: float, rng: np.random.Generator
) -> Part | None:
    """Returns a random rectangle of an image, to be resized to a square.

    Args:
        height, width: Sides of the image, pixels.
        side: Side of the square, pixels.
        min_area: Smallest share of the image. The share is uniform from here to 1, and the ratio of
            the sides log-uniform from 3:4 to 4:3.
        rng: Source of area, ratio and place.

    Returns:
        The rectangle, or None after ten that do not fit into the image.

    Reference: Szegedy et al., "Going Deeper with Convolutions", 2015, arXiv:1409.4842, section 6.
    """
    for _ in range(10):
        area = height * width * rng.uniform(min_area, 1)
        ratio = math.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return Part(int(top), int(left), h, w, (side, side))
    return None


def flip(image: RGB) -> RGB:
    """Returns the image mirrored left to right, as a contiguous array.

    Args:
        image: The image, `(height, width, 3)` uint8.
    """
    mirrored = np.empty_like(image, order="C")
    for channel in range(3):  # five times as fast as all at once
        mirrored[..., channel] = image[:, ::-1, channel]
    return mirrored


def erase(image: RGB, rng: np.random.Generator) -> RGB:
    """Returns the image with a rectangle of 2 % to 33 % of its area replaced by noise.

    The ratio of its sides is log-uniform from 0.3 to 1 / 0.3; it is cut to the image.

    Args:
        image: The image, `(height, width, 3)` uint8.
        rng: Source of area, ratio, place and noise.

    Reference: Zhong et al., "Random Erasing Data Augmentation", 2020, arXiv:1708.04896.
    """
    height, width = image.shape[:2]
    area = height * width * rng.uniform(0.02, 1 / 3)
    ratio = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
    h, w = min(round(math.sqrt(area * ratio)), height), min(round(math.sqrt(area / ratio)), width)
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    image = image.copy()
    image[top : top + h, left : left + w] = rng.integers(0, 256, (h, w, 3))
    return image


def randaugment(image: RGB, ops: int, magnitude: float, rng: np.random.Generator) -> RGB:
    """Returns the image after random operations, each applied with probability 1/2.

    The list of operations, their strengths and the probability are those that ViT recipes write as
    `rand-m9-mstd0.5-inc1`: a larger strength takes every operation further from the image.

    Args:
        image: The image, `(height, width, 3)` uint8.
        ops: Number of operations that are drawn, with replacement.
        magnitude: Mean strength, from 0 to 10; the standard deviation is 0.5.
        rng: Source of operations, strengths and signs.

    Reference: Cubuk et al., "RandAugment", 2020, arXiv:1909.13719.
    """
    pil = Image.fromarray(np.ascontiguousarray(image))
    for operation in rng.integers(0, len(_OPERATIONS), ops):
        if rng.random() < 0.5:
            strength = float(np.clip(rng.normal(magnitude, 0.5), 0, 10)) / 10
            pil = _OPERATIONS[operation](pil, strength, 1 if rng.random() < 0.5 else -1)
    return np.asarray(pil)


def _affine(image, matrix):
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.BILINEAR,
        fillcolor=(128, 128, 128),
    )


def _enhance(kind):
    return lambda image, strength, sign: kind(image).enhance(max(0.1, 1 + 0.9 * strength * sign))


# Each takes (image, strength in [0, 1], sign).
_OPERATIONS = (
    lambda image, strength, sign: ImageOps.autocontrast(image),
    lambda image, strength, sign: ImageOps.equalize(image),
    lambda image, strength, sign: ImageOps.invert(image),
    lambda image, strength, sign: image.rotate(
        30 * strength * sign, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
    ),
    lambda image, strength, sign: ImageOps.posterize(image, 4 - int(4 * strength) or 1),
    lambda image, strength, sign: ImageOps.solarize(image, 256 - int(256 * strength)),
    lambda image, strength, sign: image.point(
        [min(255, v + int(110 * strength)) if v < 128 else v for v in range(256)] * 3
    ),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    lambda image, strength, sign: _affine(image, (1, 0.3 * strength * sign, 0, 0, 1, 0)),
    lambda image, strength, sign: _affine(image, (1, 0, 0, 0.3 * strength * sign, 1, 0)),
    lambda image, strength, sign: _affine(
        image, (1, 0, 0.45 * strength * sign * image.width, 0, 1, 0)
    ),
    lambda image, strength, sign: _affine(
        image, (1, 0, 0, 0, 1, 0.45 * strength * sign * image.height)
    ),
)
