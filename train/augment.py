"""Random changes of a training image, `(height, width, 3)` uint8 to `(side, side, 3)` uint8;
every random number comes from the generator given.
"""

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ggem_jax.files.images import RGB, centre_crop, resize
from train.config import Augment


def augment(image: RGB, side: int, how: Augment, rng: np.random.Generator) -> RGB:
    """Crop, flip, RandAugment, erase: those that are switched on, in this order."""
    match how.crop:
        case "none":
            image = centre_crop(image, side)
        case "pad":
            image = pad_crop(image, side, how.pad, rng)
        case "resized":
            image = resized_crop(image, side, how.min_area, rng)
    if how.flip and rng.random() < 0.5:
        image = image[:, ::-1]
    if how.randaugment_ops:
        image = randaugment(image, how.randaugment_ops, how.randaugment_magnitude, rng)
    if rng.random() < how.erase:
        image = erase(image, rng)
    return np.ascontiguousarray(image)


def pad_crop(image: RGB, side: int, pad: int, rng: np.random.Generator) -> RGB:
    """Reflects `pad` pixels around the image and cuts a square at random."""
    image = np.pad(
        centre_crop(image, side),
        ((pad, pad), (pad, pad), (0, 0)),
        mode="reflect" if pad < side else "edge",
    )
    top, left = rng.integers(0, 2 * pad + 1, 2)
    return image[top : top + side, left : left + side]


def resized_crop(image: RGB, side: int, min_area: float, rng: np.random.Generator) -> RGB:
    """Cuts a rectangle of random area (`min_area` to 1) and shape (3:4 to 4:3) and resizes it:
    Szegedy et al. 2015, arXiv:1409.4842, section 6.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(min_area, 1)
        ratio = math.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return resize(image[top : top + h, left : left + w], side, side)
    return centre_crop(image, side)


def erase(image: RGB, rng: np.random.Generator) -> RGB:
    """Replaces a rectangle of 2 % to 33 % of the image by noise: Zhong et al. 2020,
    arXiv:1708.04896.
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
    """Applies random operations, each with probability 1/2 and a strength around `magnitude` of 10:
    Cubuk et al. 2020, arXiv:1909.13719.

    Strength, probability and the list are those that ViT recipes write as `rand-m9-mstd0.5-inc1`:
    stronger is further from the image for every operation.
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
