"""Images at several scales: bilinear resizing as PyTorch's.

Pixel centres lie at half-integers, and sizes are truncated, not rounded. The two conventions, with
and without `antialias`, differ only where an image shrinks. Without it, two pixels of each row and
column are mixed however much the image shrinks, as in torchvision up to 0.16 (the published figures
of SuperGlobal). With it, all pixels that a new pixel covers are mixed, as from 0.17 on.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", 2023,
# arXiv:2308.06954: by the number of scales.
SCALES: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    3: (0.7071, 1.0, 1.4142),
    5: (0.5, 0.7071, 1.0, 1.4142, 2.0),
}
WINDOW = 5  # places along one side of Regional GeM's window, of SuperGlobal's official code


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Returns the sides after `rescale`, in pixels: those of the image times the scale, truncated.

    Args:
        height, width: Sides of the image, pixels.
        scale: Factor of both sides.

    Raises:
        ValueError: The scale is not a positive number.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be a positive number, not {scale!r}")
    return int(height * scale), int(width * scale)


def rescale(
    images: Float[Array, "*b h w c"], scale: float, *, antialias: bool = False
) -> Float[Array, "*b h2 w2 c"]:
    """Returns the images resized to `scaled_size`, bilinear, computed in float32.

    The step between the samples is the ratio of the sizes, not the scale.

    Args:
        images: Images, `(..., h, w, c)`, floating point.
        scale: Factor of both sides; 1 changes nothing.
        antialias: Whether to use the filter with antialiasing where the images shrink, as the
            module says.

    Returns:
        The images, `(..., h2, w2, c)`, in their dtype.

    Raises:
        ValueError: The images are not floating point, or no pixel is left of them.
    """
    images = jnp.asarray(images)
    if images.ndim < 3 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floating point (..., h, w, c), not {images.dtype} of shape"
            f" {images.shape}"
        )
    height, width = images.shape[-3:-1]
    size = scaled_size(height, width, scale)
    if 0 in size:
        raise ValueError(
            f"nothing is left of images of {height} x {width} pixels at a scale of {scale}"
        )
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    for axis, new in ((-2, size[1]), (-3, size[0])):
        x = _resample(x, axis, new, antialias)
    return x.astype(images.dtype)


def _resample(x, axis, new, antialias):
    old = x.shape[axis]
    if old == new:
        return x
    places, weights = _taps(old, new, antialias)
    along = [-1 if i == x.ndim + axis else 1 for i in range(x.ndim)]
    taps = zip(places.T, weights.T.astype(x.dtype), strict=True)
    return sum(jnp.take(x, place, axis=axis) * weight.reshape(along) for place, weight in taps)


def _taps(
    old: int, new: int, antialias: bool
) -> tuple[Int[np.ndarray, "new taps"], Float[np.ndarray, "new taps"]]:
    """The old pixels that each new pixel is mixed from, and their weights, which sum to 1.

    The weights are a triangle of half-width `reach` around the new pixel's centre. Places are
    rounded to float32 where PyTorch does so: among hundreds of pixels this moves a sample by 1e-5
    of a pixel, more than all other rounding.
    """
    step = np.float64(np.float32(old) / np.float32(new))
    middle = step * (np.arange(new) + 0.5)
    if antialias:
        reach, centre = max(step, 1.0), middle.astype(np.float32).astype(np.float64) - 0.5
    else:  # the border is repeated, where a wider triangle is cut off at it
        reach, centre = 1.0, np.maximum((middle - 0.5).astype(np.float32).astype(np.float64), 0)
    places = np.ceil(centre[:, None] - reach).astype(int) + np.arange(math.ceil(2 * reach) + 1)
    inside = np.clip(places, 0, old - 1)
    weights = np.maximum(1 - np.abs(places - centre[:, None]) / reach, 0)
    if antialias:
        weights = np.where(places == inside, weights, 0)
    return inside, weights / weights.sum(axis=1, keepdims=True)
