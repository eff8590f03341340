"""Centre squares of images: their size before the cut, and the cut. Needs no Pillow."""

import numpy as np
from jaxtyping import UInt8

RGB = UInt8[np.ndarray, "_ _ 3"]


def centre_size(height: int, width: int, side: int, *, zoom: float = 1.0) -> tuple[int, int]:
    """Returns the height and width that a centre crop resizes an image to.

    Args:
        height, width: Sides of the image, pixels.
        side: Side of the square, pixels.
        zoom: As in `ggem_jax.files.images.centre_crop`.
    """
    scale = max(round(zoom * side), side) / min(height, width)
    return max(round(height * scale), side), max(round(width * scale), side)


def cut_centre(image: RGB, side: int) -> RGB:
    """Returns the centre square of an image, a view.

    Args:
        image: The image, `(h, w, 3)` uint8, with sides of at least `side` pixels.
        side: Side of the square, pixels.

    Returns:
        The square, `(side, side, 3)` uint8.
    """
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]
