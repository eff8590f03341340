"""Images: files -> `(height, width, 3)` uint8 arrays in RGB.

Needs Pillow, of the extras `retrieval` and `train`.
"""

import io
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from ggem_jax.files.normalisation import IMAGENET_MEAN, IMAGENET_STD

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# Errors of Pillow over damaged files, the last five over damaged EXIF records.
_UNREADABLE = (
    OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError,
    struct.error, TypeError, KeyError, IndexError, ArithmeticError,
)  # fmt: skip

RGB = UInt8[np.ndarray, "_ _ 3"]


class UnreadableImage(ValueError):
    """A file that should be an image and cannot be decoded; the message names it and the reason."""


def read_image(source: Path | bytes, *, name: str | None = None) -> RGB:
    """Returns a decoded image the right way up.

    The EXIF rotation is applied; grey, palette, CMYK and 16-bit images become 8-bit RGB; alpha is
    dropped.

    Args:
        source: Path of an image file, or the contents of one.
        name: How an error names the image; None takes the path, or "the image" for bytes.

    Returns:
        The image, `(height, width, 3)` uint8.

    Raises:
        UnreadableImage: The image cannot be decoded, or has 32 bits a channel, whose range no file
            states.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            return _to_rgb(file)
    except _UNREADABLE as error:
        raise UnreadableImage(
            f"{name or (source if isinstance(source, Path) else 'the image')} is not a readable"
            f" image: {error}"
        ) from None


def convert_image(image: Image.Image, *, name: str = "the image") -> RGB:
    """Returns an image of Pillow as `read_image` returns that of a file.

    Args:
        image: An image in any mode of 8 or 16 bits a channel.
        name: How an error names the image.

    Returns:
        The image, `(height, width, 3)` uint8.

    Raises:
        UnreadableImage: The image cannot be decoded, is closed, or has 32 bits a channel.
    """
    try:
        return _to_rgb(image)
    except _UNREADABLE as error:
        raise UnreadableImage(f"{name} is not a readable image: {error}") from None


def _to_rgb(image: Image.Image) -> RGB:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"it has 32 bits a channel (mode {image.mode}) where 8 or 16 are needed")
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        grey = (np.asarray(image, np.uint32) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.mode in ("La", "PA"):  # Pillow converts them by way of other modes only
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return np.asarray(image.convert("RGB"))


def crop(image: RGB, box: Sequence[float]) -> RGB:
    """Returns the part of an image inside a box.

    Args:
        image: The image, `(height, width, 3)` uint8.
        box: (x1, y1, x2, y2) in pixels; coordinates are cut to whole numbers and to the image.

    Returns:
        The part, `(y2 - y1, x2 - x1, 3)`, a view of the image.

    Raises:
        ValueError: The box is not four finite numbers, or no pixel of the image is inside it.
    """
    if len(box) != 4 or not all(math.isfinite(coordinate) for coordinate in box):
        raise ValueError(f"a box must be four numbers, x1, y1, x2, y2, not {box!r}")
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (
        min(max(int(coordinate), 0), length)
        for coordinate, length in zip(box, (width, height) * 2, strict=True)
    )
    if x1 >= x2 or y1 >= y2:
        raise ValueError(
            f"nothing of the image of {width} x {height} pixels is inside the box"
            f" {', '.join(f'{float(each):g}' for each in box)}"
        )
    return image[y1:y2, x1:x2]


def normalise(
    image: UInt8[np.ndarray, "*b h w 3"],
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Float32[np.ndarray, "*b h w 3"]:
    """Returns (pixel / 255 - mean) / std of each channel, as networks take images.

    Args:
        image: One image or several, `(..., h, w, 3)` uint8.
        mean: Mean of red, green and blue in [0, 1]; the default is ImageNet's.
        std: Standard deviation of red, green and blue; the default is ImageNet's.

    Returns:
        The images, `(..., h, w, 3)` float32.

    Raises:
        ValueError: The image has another dtype or shape.
    """
    if image.dtype != np.uint8 or image.shape[-1:] != (3,):
        raise ValueError(
            f"image must be uint8 (..., h, w, 3), not {image.dtype} of shape {image.shape}"
        )
    return (image.astype(np.float32) / np.float32(255) - np.asarray(mean, np.float32)) / np.asarray(
        std, np.float32
    )


def resize(image: RGB, height: int, width: int) -> RGB:
    """Returns the image resized with Pillow's bicubic filter, which averages when it shrinks.

    Args:
        image: The image, `(h, w, 3)` uint8.
        height: Height of the result, pixels.
        width: Width of the result, pixels.

    Returns:
        The image, `(height, width, 3)` uint8; the same array where the size is the same.
    """
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def centre_crop(image: RGB, side: int, *, zoom: float = 1.0) -> RGB:
    """Returns the centre square after the shorter side is resized to `zoom * side`.

    Args:
        image: The image, `(h, w, 3)` uint8.
        side: Side of the square, pixels.
        zoom: A number of at least 1; 1.143 resizes the shorter side to 256 pixels for a square of
            224.

    Returns:
        The square, `(side, side, 3)` uint8.
    """
    reach = 8 * min(image.shape[:2])  # of a thin image only the middle is resized
    top, left = (max(length - reach, 0) // 2 for length in image.shape[:2])
    image = image[top : top + reach, left : left + reach]
    height, width = image.shape[:2]
    scale = max(round(zoom * side), side) / min(height, width)
    image = resize(image, max(round(height * scale), side), max(round(width * scale), side))
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]
