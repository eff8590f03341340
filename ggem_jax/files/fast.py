"""Decoding and resizing with libraries that are faster than Pillow, of the extra `fast`.

simplejpeg decodes with libjpeg-turbo, as Pillow does, and gives the same pixels. cykooz-resizer
resizes with SIMD; the pixels differ from Pillow's by rounding.
"""

import threading
from typing import Any

import numpy as np

from ggem_jax.files.crops import RGB


def require_fast() -> None:
    """Raises `ModuleNotFoundError` if a library is missing.

    Raises:
        ModuleNotFoundError: It is; the sentence says how to install it.
    """
    try:
        import cykooz_resizer  # noqa: F401
        import simplejpeg  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the package {(error.name or '').replace('_', '-')} is missing:"
            " pip install 'ggem-jax[fast]'"
        ) from None


def decode_jpeg(content: bytes, height: int, width: int) -> RGB | None:
    """Returns the pixels of a JPEG, or None where Pillow must decode it.

    Args:
        content: The file, of a colour image.
        height, width: Sides of the result, pixels: those of the file over 1, 2, 4 or 8, rounded up.

    Returns:
        The image, `(height, width, 3)` uint8; None where the file is damaged in any way.
    """
    import simplejpeg

    try:
        image = simplejpeg.decode_jpeg(content, min_height=height, min_width=width)
    except ValueError:
        return None
    return image if image.shape == (height, width, 3) else None


def resize_fast(
    image: RGB, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> RGB:
    """Returns an image resized with the bicubic filter of Pillow, which averages when it shrinks.

    Args:
        image: The image, `(h, w, 3)` uint8.
        size: Height and width of the result, pixels.
        box: The part that is resized, (x1, y1, x2, y2) in pixels; None: the whole image.

    Returns:
        The image, `(*size, 3)` uint8, read-only.
    """
    from cykooz_resizer import CropBox, ImageData, PixelType

    resizer, options = _of_thread()
    x1, y1, x2, y2 = box or (0, 0, image.shape[1], image.shape[0])
    options.crop_box = CropBox(x1, y1, x2 - x1, y2 - y1)
    source = ImageData(image.shape[1], image.shape[0], PixelType.U8x3, image.tobytes())
    target = ImageData(size[1], size[0], PixelType.U8x3)
    resizer.resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(*size, 3)


_THREAD = threading.local()


def _of_thread() -> tuple[Any, Any]:
    """The resizer of this thread and its options: a resizer keeps buffers between calls."""
    if not hasattr(_THREAD, "resizer"):
        from cykooz_resizer import FilterType, ResizeAlg, ResizeOptions, Resizer

        options = ResizeOptions()
        options.resize_alg = ResizeAlg.convolution(FilterType.catmull_rom)  # a = -0.5, as in Pillow
        _THREAD.resizer, _THREAD.options = Resizer(), options
    return _THREAD.resizer, _THREAD.options
