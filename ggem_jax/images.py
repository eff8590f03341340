"""Pictures: files -> `(height, width, 3)` uint8 arrays in RGB. Needs Pillow (the extra `train`)."""

import io
import struct
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# What Pillow raises over damaged files, the last five over damaged EXIF records.
_UNREADABLE = (
    OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError,
    struct.error, TypeError, KeyError, IndexError, ArithmeticError,
)  # fmt: skip

RGB = UInt8[np.ndarray, "h w 3"]


class UnreadableImage(ValueError):
    """A file that should be a picture and cannot be decoded; the message names it and the reason."""


def read_image(source: Path | bytes, *, name: str | None = None) -> RGB:
    """Decodes a picture the right way up: EXIF rotation applied, grey, palette, CMYK and 16-bit pictures turned into 8-bit RGB, alpha dropped.

    `name` is what an error calls the picture; a path names itself. Raises `UnreadableImage`, also for 32 bits a channel, whose range no file tells.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode in ("I", "F"):
                raise ValueError(f"it has 32 bits a channel (mode {picture.mode}) where 8 or 16 are needed")
            if picture.mode.startswith("I;16"):  # 16 bits a pixel: Pillow's own conversion would clip at 255
                return np.repeat((np.asarray(picture, np.uint32) // 257).astype(np.uint8)[..., None], 3, axis=-1)
            return np.asarray(picture.convert("RGB"))
    except _UNREADABLE as error:
        raise UnreadableImage(f"{name or (source if isinstance(source, Path) else 'the image')} is not a readable picture: {error}") from None


def resize(image: RGB, height: int, width: int) -> RGB:
    """Resizes with Pillow's bicubic filter, which averages over the source pixels when it shrinks."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def centre_crop(image: RGB, side: int, *, zoom: float = 1.0) -> RGB:
    """Resizes the shorter side to `zoom * side` and cuts the square in the middle."""
    reach = 8 * min(image.shape[:2])  # of a thin picture only the middle is resized
    top, left = (max(length - reach, 0) // 2 for length in image.shape[:2])
    image = image[top : top + reach, left : left + reach]
    height, width = image.shape[:2]
    scale = max(round(zoom * side), side) / min(height, width)
    image = resize(image, max(round(height * scale), side), max(round(width * scale), side))
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]
