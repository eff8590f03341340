"""Small JPEG files of images, as pages show them. Needs Pillow."""

import io
import os
from collections.abc import Sequence
from typing import IO

from PIL import Image, ImageDraw

from ggem_jax.files.images import MAX_MEGAPIXELS, decode_image

THUMBNAIL = 320  # longer side of a thumbnail, pixels
QUALITY = 80  # JPEG quality, 0 to 100


def make_thumbnail(
    source: str | os.PathLike | bytes | IO[bytes],
    box: Sequence[float] | None = None,
    *,
    longest: int = THUMBNAIL,
    name: str | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> bytes:
    """Returns a small JPEG file of an image, the right way up.

    Args:
        source: Path of an image file, the contents of one, or one that is opened for reading.
        box: The corners x1, y1, x2, y2 in pixels of the image, drawn as a frame; None draws none.
        longest: Most pixels of its longer side. Smaller images keep their size.
        name: How an error names the image; None takes the path, or "the image".
        max_megapixels: Larger images are refused before they are decoded.

    Returns:
        The bytes of the file.

    Raises:
        UnreadableImage: The image cannot be read.
    """

    def fit(height: int, width: int) -> tuple[int, int]:
        zoom = min(longest / max(height, width), 1.0)
        return max(round(height * zoom), 1), max(round(width * zoom), 1)

    found = decode_image(source, name=name, fit=fit, draft=True, max_megapixels=max_megapixels)
    small = Image.fromarray(found.pixels)
    if box is not None:
        zooms = (small.width / found.width, small.height / found.height) * 2
        corners = [
            min(max(each * zoom, 0), length - 1)
            for each, zoom, length in zip(box, zooms, small.size * 2, strict=True)
        ]
        ImageDraw.Draw(small).rectangle(corners, outline=(255, 214, 10), width=3)
    data = io.BytesIO()
    small.save(data, "JPEG", quality=QUALITY)
    return data.getvalue()
