"""Images: files -> `(height, width, 3)` uint8 arrays in RGB.

A file is recognised by its content. What Pillow's plugins read is read, except formats that are
programs or videos (`_NOT_READ`); HEIC needs the package `pillow-heif`. Needs Pillow, of the extras
`retrieval` and `train`.
"""

import contextlib
import io
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8, UInt16
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ggem_jax.files.crops import RGB, Part, centre_part, cut_centre
from ggem_jax.files.fast import decode_jpeg, resize_fast
from ggem_jax.files.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalise_pixels

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MAX_MEGAPIXELS = 300.0  # largest image that is decoded, unless a call says otherwise
LEAST_PART = 0.75  # least part of the rows of a truncated JPEG that is taken for the image

# Pillow runs a program for EPS, and only names videos, fields of weather and Windows metafiles.
_NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_MARGIN = 2  # sides of a JPEG after `draft`, over those of `fit`: as in Pillow's `thumbnail`
_DEPTHS = (8, 10, 12, 14, 16)  # bits of cameras, in images with 16 bits a channel
# tags of TIFF and EXIF; the photometric interpretation is 0 where 0 is white
_PHOTOMETRIC, _BITS, _MAX_SAMPLE, _ORIENTATION = 262, 258, 281, 274

# Errors of Pillow over damaged files, the last five over damaged EXIF records.
_UNREADABLE = (
    OSError, SyntaxError, ValueError, MemoryError, Image.DecompressionBombError,
    struct.error, TypeError, KeyError, IndexError, ArithmeticError,
)  # fmt: skip

Fit = Callable[[int, int], "tuple[int, int] | None"]  # height, width -> those to resize to
Choose = Callable[[int, int], Part]  # height, width -> the part that is wanted


class UnreadableImage(ValueError):
    """A file that should be an image and cannot be decoded; the message names it and the reason."""


class UnfitImage(UnreadableImage):
    """An image for which `fit` has no size."""


class Decoded(NamedTuple):
    """An image as it was read, and its size in the file."""

    pixels: RGB  # (height, width, 3) uint8, or smaller where it was shrunk
    width: int  # pixels, the right way up
    height: int  # pixels
    frames: bool  # whether the file holds more frames or pages, of which this is the first
    truncated: bool  # whether the file lacks its last bytes


# bytes of memory that decoding needs, and the decoding, which it calls
Run = Callable[[int, Callable[[], Decoded]], Decoded]


def is_image(file: IO[bytes]) -> bool:
    """Returns whether a file begins as an image does; its pixels are not read.

    Formats without a mark at their beginning, such as TGA, are not recognised.

    Args:
        file: The file, opened for reading bytes.

    Raises:
        OSError: The file cannot be read.
    """
    try:
        return _open(file, marked=True) is not None
    except ModuleNotFoundError:
        return True  # HEIC, which is an image for those who install its reader
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of Pillow
        return False


def decode_image(
    source: str | os.PathLike | bytes | IO[bytes],
    *,
    name: str | None = None,
    fit: Fit | None = None,
    draft: bool = False,
    choose: Choose | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    run: Run = lambda size, decode: decode(),
) -> Decoded:
    """Returns an image the right way up, with the facts of its file.

    The EXIF rotation is applied; grey, palette, CMYK and 16-bit images become 8-bit RGB.
    Transparent pixels are laid over white. The largest value of grey with 16 bits decides whether
    its range is that of 8, 10, 12, 14 or 16 bits, unless tags of TIFF state it. The first frame of
    several is taken. A JPEG that lacks less than a quarter of its rows is read.

    Args:
        source: Path of an image file, the contents of one, or one that is opened for reading.
        name: How an error names the image; None takes the path, or "the image".
        fit: Function from height and width in pixels to those that the image is resized to (bicubic
            filter); None, or a result of None, keeps the size.
        draft: Whether a JPEG is decoded at a half, a quarter or an eighth of its size if that is at
            least twice the size of `fit`, which is faster and changes the pixels a little.
        choose: Function from height and width in pixels to the part that is returned instead of the
            whole image; None returns the whole. `fit` and `draft` are then not used.
        max_megapixels: Larger images are refused before they are decoded.
        run: Function that is given the memory that decoding needs, in bytes, and the decoding, and
            calls it where and when there is room.

    Returns:
        The pixels, the size of the image in its file, and whether it has more frames or is
        truncated.

    Raises:
        UnreadableImage: The image cannot be decoded, is too large, or has 32 bits a channel, whose
            range no file states.
        UnfitImage: `fit` raises `UnreadableImage`.
    """
    try:
        if isinstance(source, str | os.PathLike):
            with open(source, "rb") as opened:
                return _decode(opened, fit, draft, choose, max_megapixels, run)
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        return _decode(file, fit, draft, choose, max_megapixels, run)
    except UnfitImage:
        raise
    except (*_UNREADABLE, ModuleNotFoundError) as error:
        path = os.fspath(source) if isinstance(source, str | os.PathLike) else "the image"
        raise UnreadableImage(f"{name or path} is not a readable image: {error}") from None


def read_image(
    source: str | os.PathLike | bytes,
    *,
    name: str | None = None,
    choose: Choose | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> RGB:
    """Returns the pixels of an image the right way up, as `decode_image` decodes it.

    Args:
        source: Path of an image file, or the contents of one.
        name: How an error names the image; None takes the path, or "the image" for bytes.
        choose: Function from height and width in pixels to the part that is returned instead of the
            whole image.
        max_megapixels: Larger images are refused before they are decoded.

    Returns:
        The image, `(height, width, 3)` uint8.

    Raises:
        UnreadableImage: The image cannot be decoded, is too large, or has 32 bits a channel, whose
            range no file states.
    """
    return decode_image(source, name=name, choose=choose, max_megapixels=max_megapixels).pixels


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
        return np.asarray(_to_rgb(image))
    except _UNREADABLE as error:
        raise UnreadableImage(f"{name} is not a readable image: {error}") from None


def is_read_otherwise(file: IO[bytes]) -> bool:
    """Returns whether earlier versions decoded an image differently: transparency, 16-bit grey.

    Args:
        file: The file, opened for reading bytes.
    """
    try:
        image = _open(file)
        return image.mode.startswith("I") or image.has_transparency_data
    except (*_UNREADABLE, ModuleNotFoundError):
        return False


@lru_cache(1)
def _formats() -> tuple[list[str], list[str]]:
    """Names of the formats that begin with a mark, and of those that do not."""
    Image.init()
    read = [name for name in Image.ID if name not in _NOT_READ]
    marked = [name for name in read if Image.OPEN[name][1] is not None]
    return marked, [name for name in read if name not in marked]


def _open(file: IO[bytes], *, marked: bool = False) -> ImageFile.ImageFile:
    """`Image.open` without its limit of pixels, which is one for the whole process."""
    file.seek(0)
    prefix = file.read(16)
    if not prefix:
        raise UnidentifiedImageError("cannot identify image file: it is empty")
    with_mark, without = _formats()
    for name in with_mark if marked else with_mark + without:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(prefix) is True:
            with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
                file.seek(0)
                return factory(file, "")
    if prefix[4:8] == b"ftyp" and prefix[8:12] in _HEIF_BRANDS:
        file.seek(0)
        return _heif_reader()(file)
    raise UnidentifiedImageError("cannot identify image file")


def _heif_reader() -> Callable[[IO[bytes]], ImageFile.ImageFile]:
    try:
        from pillow_heif import HeifImageFile
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "HEIC needs the package pillow-heif: pip install 'ggem-jax[retrieval]'"
        ) from None
    return HeifImageFile


def _decode(
    file: IO[bytes],
    fit: Fit | None,
    draft: bool,
    choose: Choose | None,
    max_megapixels: float,
    run: Run,
) -> Decoded:
    image = _open(file)
    width, height = image.size
    if width * height > max_megapixels * 1e6:
        raise ValueError(
            f"its {width} x {height} pixels are more than {max_megapixels:g} megapixels: raise"
            " --max-megapixels to read it"
        )
    orientation = image.getexif().get(_ORIENTATION, 1)
    turned = orientation in (5, 6, 7, 8)
    if turned:
        width, height = height, width
    try:
        part = None if choose is None else choose(height, width)
        size = None if fit is None or part is not None else fit(height, width)
    except UnreadableImage as error:
        raise UnfitImage(str(error)) from None
    frames = image.format != "MPO" and getattr(image, "is_animated", False)
    jpeg = image.format in ("JPEG", "MPO")
    if draft and size is not None and jpeg:
        across, down = size if turned else size[::-1]
        image.draft(None, (_MARGIN * across, _MARGIN * down))
    elif part is not None and jpeg and part.factor > 1:
        image.draft(None, (image.width // part.factor, image.height // part.factor))

    plain = jpeg and image.mode == "RGB" and orientation == 1

    def decode() -> Decoded:
        if part is not None and part.fast and plain:
            file.seek(0)
            if (pixels := decode_jpeg(file.read(), image.height, image.width)) is not None:
                return Decoded(_take(pixels, part, (height, width)), width, height, frames, False)
        loaded, truncated = (_load_jpeg if jpeg else _load)(image, file)
        rgb = _to_rgb(loaded)
        if part is not None:
            return Decoded(_take(rgb, part, (height, width)), width, height, frames, truncated)
        if size is not None and rgb.size != size[::-1]:
            rgb = rgb.resize(size[::-1], Image.Resampling.BICUBIC)
        return Decoded(np.asarray(rgb), width, height, frames, truncated)

    return run(_working_bytes(image, width * height), decode)


def _take(image: Image.Image | RGB, part: Part, whole: tuple[int, int]) -> RGB:
    """A part of an image of height and width `whole` that was decoded at 1 / 1, 2, 4 or 8 of it."""
    shape = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
    factor = next(
        each
        for each in (1, 2, 4, 8)
        if shape == (math.ceil(whole[0] / each), math.ceil(whole[1] / each))
    )
    left, top = part.left // factor, part.top // factor
    right = math.ceil((part.left + part.width) / factor)
    bottom = math.ceil((part.top + part.height) / factor)
    x, y = part.left / factor - left, part.top / factor - top
    box = (x, y, x + part.width / factor, y + part.height / factor)
    if isinstance(image, np.ndarray):
        return resize_fast(image[top:bottom, left:right], part.size, box)
    image = image.crop((left, top, right, bottom))
    if part.fast:
        return resize_fast(np.asarray(image), part.size, box)
    return np.asarray(image.resize(part.size[::-1], Image.Resampling.BICUBIC, box))


def _working_bytes(image: ImageFile.ImageFile, pixels: int) -> int:
    """The memory that decoding needs: a progressive JPEG holds its coefficients at full size."""
    decoded = image.width * image.height * (4 if image.mode == "RGB" else 16)
    return decoded + (6 * pixels if image.info.get("progressive") else 0)


def _load(image: ImageFile.ImageFile, _: IO[bytes]) -> tuple[Image.Image, bool]:
    image.load()
    return image, False


def _load_jpeg(image: ImageFile.ImageFile, file: IO[bytes]) -> tuple[Image.Image, bool]:
    """Loads a JPEG, also a truncated one: with a marker of its end, the missing rows become flat.

    Rows that were not decoded are black, which tells how many were. Each scan of a progressive file
    refines the whole image, so that two of them are enough.
    """
    try:
        image.load()
        return image, False
    except OSError as error:
        if "truncated" not in str(error):
            raise
        file.seek(0)
        data = file.read()
        if image.info.get("progressive"):
            enough = data.count(b"\xff\xda") > 1
        else:
            box = image.im.getbbox()
            enough = box is not None and box[3] >= LEAST_PART * image.height
        if not enough:
            raise
    shrunk = image.size
    image = _open(io.BytesIO(data + b"\xff\xd9"))
    if image.size != shrunk:
        image.draft(None, shrunk)
    image.load()
    return image, True


def _to_rgb(image: Image.Image) -> Image.Image:
    tags = dict(getattr(image, "tag_v2", {})) if image.mode.startswith("I;16") else {}
    spread = image.mode == "I" and image.format == "PPM"  # 16 bits, which Pillow spreads to 65535
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") and not spread:
        raise ValueError(f"it has 32 bits a channel (mode {image.mode}) where 8 or 16 are needed")
    if spread or image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        return _to_eight_bits(np.asarray(image).astype(np.uint16), tags)
    if image.has_transparency_data:
        if image.mode in ("La", "PA"):  # Pillow converts them by way of other modes only
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_eight_bits(grey: UInt16[np.ndarray, "h w"], tags: Mapping[int, Any]) -> Image.Image:
    """Grey from 0 to its largest possible value, by tags of TIFF or by the largest value there."""
    highest = int(grey.max())
    stated = [_first(tags.get(_MAX_SAMPLE)), 2 ** _first(tags.get(_BITS)) - 1]
    depth = next(each for each in _DEPTHS if highest < 2**each)
    most = next((each for each in stated if highest <= each and 255 <= each < 65535), 2**depth - 1)
    scaled = (grey.astype(np.uint32) * 255 // most).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:
        scaled = 255 - scaled
    return Image.fromarray(scaled).convert("RGB")


def _first(tag: Any) -> int:
    """The first number of a tag, 0 where there is none."""
    value = tag[0] if isinstance(tag, tuple) and tag else tag
    return int(value) if isinstance(value, int) and 0 <= value < 65536 else 0


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
    return normalise_pixels(image, mean, std)


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
    height, width = image.shape[:2]
    return cut_centre(take_part(image, centre_part(height, width, side, zoom=zoom)), side)


def take_part(image: RGB, part: Part) -> RGB:
    """Returns a part of an image, resized.

    Args:
        image: The image, `(h, w, 3)` uint8.
        part: The rectangle, and the size that it is resized to.

    Returns:
        The part, of height and width `part.size`; a view of the image where that is its own size.
    """
    top, left, height, width = part[:4]
    return resize(image[top : top + height, left : left + width], *part.size)
