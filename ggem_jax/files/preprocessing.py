"""From the pixels of an image to the square that a network was trained on.

The steps are those of the evaluations of a training: resize with Pillow's bicubic filter, cut the
centre, and normalise the channels. Only `Preprocessing.square` needs Pillow.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from ggem_jax.files.crops import RGB, centre_size, cut_centre
from ggem_jax.files.normalisation import Channels

Crop = Literal["centre", "squash"]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a network. Wrong values raise `ValueError`.

    Example:
        >>> import numpy as np
        >>> from ggem_jax.files.preprocessing import Preprocessing
        >>> cut = Preprocessing(224, zoom=1.143).square(np.zeros((480, 640, 3), np.uint8))
        >>> cut.shape
        (224, 224, 3)
    """

    side: int  # of the square, pixels
    # centre: resize the shorter side to zoom * side and cut the centre; squash: resize both sides
    crop: Crop = "centre"
    zoom: float = 1.0  # of the centre crop
    mean: Channels = (0.0, 0.0, 0.0)  # of red, green and blue in [0, 1], subtracted
    std: Channels = (1.0, 1.0, 1.0)  # likewise, divided by

    def __post_init__(self):
        if self.crop not in ("centre", "squash"):
            raise ValueError(f"the crop must be centre or squash, not {self.crop!r}")
        if not 1 <= self.zoom < math.inf:
            raise ValueError(f"the zoom must be a number of at least 1, not {self.zoom!r}")
        for name in ("mean", "std"):
            channels = tuple(map(float, getattr(self, name)))
            finite = len(channels) == 3 and all(map(math.isfinite, channels))
            if not finite or (name == "std" and min(channels) <= 0):
                raise ValueError("mean and std must be three numbers each, std above 0")
            object.__setattr__(self, name, channels)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width that an image is resized to, before `cut`.

        Args:
            height, width: Sides of the image, pixels.
        """
        if self.crop == "squash":
            return self.side, self.side
        return centre_size(height, width, self.side, zoom=self.zoom)

    def cut(self, image: RGB) -> RGB:
        """Returns the centre square of a resized image.

        Args:
            image: The image, `(h, w, 3)` uint8, of the size that `size` returns.

        Returns:
            The square, `(side, side, 3)` uint8.
        """
        return cut_centre(image, self.side)

    def square(self, image: RGB) -> RGB:
        """Returns the square that the network sees of an image of any size.

        Args:
            image: The image, `(h, w, 3)` uint8.

        Returns:
            The square, `(side, side, 3)` uint8.
        """
        from ggem_jax.files.images import centre_crop, resize

        if self.crop == "squash":
            return resize(image, self.side, self.side)
        return centre_crop(image, self.side, zoom=self.zoom)

    def record(self) -> dict[str, Any]:
        """Returns the steps as JSON values, for programs that do not use this package."""
        shorter = max(round(self.zoom * self.side), self.side)
        return {
            "side": self.side,
            "crop": self.crop,
            "resize_shorter_side_to": None if self.crop == "squash" else shorter,
            "interpolation": "bicubic",
            "antialias": True,
            "channels": "RGB",
            "scale": 1 / 255,
            "mean": list(self.mean),
            "std": list(self.std),
        }
