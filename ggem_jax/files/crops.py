"""Parts of images and the size that each is resized to; centre squares. Needs no Pillow."""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

RGB = UInt8[np.ndarray, "_ _ 3"]


class Part(NamedTuple):
    """A rectangle of an image, the right way up, and the size that it is resized to."""

    top: int  # pixels, as the next three
    left: int
    height: int
    width: int
    size: tuple[int, int]  # height and width after the resize, pixels
    # whether a JPEG may be decoded at a half, a quarter or an eighth of its size, where that is no
    # less than `size`: faster, with slightly other pixels
    shrink: bool = False
    # whether the libraries of `ggem_jax.files.fast` decode and resize an image file
    fast: bool = False

    @property
    def factor(self) -> int:
        """How many times smaller than its file the image may be decoded: 1, 2, 4 or 8."""
        most = min(self.height // self.size[0], self.width // self.size[1]) if self.shrink else 1
        return max((each for each in (2, 4, 8) if each <= most), default=1)


def centre_part(height: int, width: int, side: int, *, zoom: float = 1.0) -> Part:
    """Returns the part of an image that a centre crop resizes before it cuts the square.

    Args:
        height, width: Sides of the image, pixels.
        side: Side of the square, pixels.
        zoom: As in `ggem_jax.files.images.centre_crop`.
    """
    reach = 8 * min(height, width)  # of a thin image only the middle is resized
    top, left = max(height - reach, 0) // 2, max(width - reach, 0) // 2
    height, width = min(height, reach), min(width, reach)
    return Part(top, left, height, width, centre_size(height, width, side, zoom=zoom))


def centre_size(height: int, width: int, side: int, *, zoom: float = 1.0) -> tuple[int, int]:
    """Returns the height and width that a centre crop resizes an image to.

    The longer side is rounded down, as torchvision's `Resize` does.

    Args:
        height, width: Sides of the image, pixels.
        side: Side of the square, pixels.
        zoom: As in `ggem_jax.files.images.centre_crop`.
    """
    shorter = max(round(zoom * side), side)
    return shorter * height // min(height, width), shorter * width // min(height, width)


def cut_centre(image: RGB, side: int) -> RGB:
    """Returns the centre square of an image, a view, cut where torchvision's `CenterCrop` cuts.

    Args:
        image: The image, `(h, w, 3)` uint8, with sides of at least `side` pixels.
        side: Side of the square, pixels.

    Returns:
        The square, `(side, side, 3)` uint8.
    """
    top, left = (round((length - side) / 2) for length in image.shape[:2])
    return image[top : top + side, left : left + side]
