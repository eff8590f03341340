"""ggem_jax/files/images.py: every kind of image file becomes RGB, the right way up; errors name
files that are not images.
"""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from ggem_jax.files.crops import Part, centre_size, cut_centre
from ggem_jax.files.fast import decode_jpeg
from ggem_jax.files.images import (
    UnreadableImage,
    centre_crop,
    convert_image,
    read_image,
    resize,
    take_part,
)

GRADIENT = np.arange(6 * 4, dtype=np.uint8).reshape(6, 4) * 10
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)


def encoded(array, form="PNG", mode=None, **options):
    file = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(file, form, **options)
    return file.getvalue()


def test_grey_rgb_palette_and_alpha():
    rgb = np.stack([GRADIENT, GRADIENT // 2, 255 - GRADIENT], axis=-1)
    np.testing.assert_array_equal(
        read_image(encoded(GRADIENT)), np.repeat(GRADIENT[..., None], 3, -1)
    )
    np.testing.assert_array_equal(read_image(encoded(rgb)), rgb)
    np.testing.assert_array_equal(read_image(encoded(rgb, mode="RGBA")), rgb)
    np.testing.assert_array_equal(
        read_image(encoded(GRADIENT, mode="P")), np.repeat(GRADIENT[..., None], 3, -1)
    )


def test_sixteen_bits_keep_their_upper_eight():
    deep = (GRADIENT.astype(np.uint16) * 257)[::-1]
    np.testing.assert_array_equal(
        read_image(encoded(deep)), np.repeat(GRADIENT[::-1, :, None], 3, -1)
    )


def test_cmyk_jpeg():
    red = np.zeros((16, 16, 3), np.uint8) + np.array([200, 10, 10], np.uint8)
    image = read_image(encoded(red, "JPEG", mode="CMYK", quality=95))
    assert image.shape == (16, 16, 3)
    assert np.abs(image.astype(int) - red).max() < 20


@pytest.mark.parametrize("kind", [str, Path])
def test_an_error_names_the_path_of_any_kind(tmp_path, kind):
    path = tmp_path / "no image.png"
    path.write_bytes(b"no")
    with pytest.raises(UnreadableImage, match=f"^{path} is not a readable image"):
        read_image(kind(path))
    with pytest.raises(UnreadableImage, match="photo 3 is not a readable image"):
        read_image(kind(path), name="photo 3")
    with pytest.raises(UnreadableImage, match="the image is not a readable image"):
        read_image(b"no")


def test_exif_rotation_is_applied():
    """Orientation 6: the camera was turned, the image is shown a quarter turn clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = read_image(encoded(np.repeat(GRADIENT[..., None], 3, -1), exif=exif))
    np.testing.assert_array_equal(image[..., 0], np.rot90(GRADIENT, -1))


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", encoded(NOISE)[:2000], encoded(NOISE, "JPEG")[:2000]],
    ids=["empty", "text", "truncated PNG", "truncated JPEG"],
)
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"broken\.png is not a readable image"):
        read_image(path)
    with pytest.raises(UnreadableImage, match="image 7 is not"):
        read_image(content, name="image 7")


def test_centre_crop_cuts_the_middle_square():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 200  # the middle square is white
    assert (centre_crop(image, 40) == 200).all()
    np.testing.assert_array_equal(
        centre_crop(image, 20, zoom=2.0), centre_crop(image, 40)[10:30, 10:30]
    )
    assert centre_crop(np.zeros((1, 500, 3), np.uint8), 8).shape == (8, 8, 3)


def test_sides_are_rounded_and_squares_cut_as_in_torchvision():
    """Its `Resize` takes int(shorter * long / short), its `CenterCrop` round((length - side) / 2)
    from the top and the left.
    """
    assert centre_size(375, 500, 224, zoom=1.143) == (256, 341)  # 341.3
    assert centre_size(31, 20, 16) == (24, 16)  # 24.8
    image = np.arange(11, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 3), np.uint8)
    for side, top in ((8, 2), (9, 1), (10, 0), (11, 0), (4, 4)):  # halves to even: 1.5, 1, 0.5, 3.5
        assert cut_centre(np.repeat(image, 2, 1), side)[0, 0, 0] == top


def test_resizing_to_the_same_size_copies_nothing():
    image = np.zeros((4, 6, 3), np.uint8)
    assert resize(image, 4, 6) is image
    assert resize(image, 3, 2).shape == (3, 2, 3)


def test_32_bits_a_channel_are_refused_not_guessed():
    for array in (np.full((4, 4), 70000, np.int32), np.full((4, 4), 0.5, np.float32)):
        with pytest.raises(UnreadableImage, match="32 bits a channel"):
            read_image(encoded(array, "TIFF"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about the EXIF record
def test_damaged_exif_records_are_unreadable_or_harmless_whatever_byte_is_wrong():
    exif = Image.Exif()
    exif[0x0112] = 6
    good = encoded(GRADIENT[:8, :8], "JPEG", exif=exif)
    for place in range(20, 60):
        for value in (0, 1, 7, 255):
            with contextlib.suppress(UnreadableImage):
                assert (
                    read_image(good[:place] + bytes([value]) + good[place + 1 :]).dtype == np.uint8
                )


def test_a_thin_image_is_cut_before_it_is_resized():
    image = np.zeros((1, 60000, 3), np.uint8)
    image[:, 29990:30010] = 255
    assert (centre_crop(image, 32) == 255).all()


def test_images_of_pillow_are_converted_as_files_are():
    for mode in ("1", "L", "P", "RGBA", "CMYK", "La", "PA", "RGBa", "I;16"):
        found = convert_image(Image.new(mode, (3, 2)))
        assert (found.shape, found.dtype) == ((2, 3, 3), np.uint8)
    closed = Image.new("RGB", (1, 1))
    closed.close()
    with pytest.raises(UnreadableImage, match="the query is not a readable image"):
        convert_image(closed, name="the query")


TURNED = Image.Exif()
TURNED[0x0112] = 6
COLOURS = np.random.default_rng(0).integers(0, 256, (41, 64, 3), dtype=np.uint8)


KINDS = [
    pytest.param(encoded(COLOURS), id="PNG"),
    pytest.param(encoded(COLOURS, "JPEG"), id="JPEG"),
    pytest.param(encoded(COLOURS, "JPEG", exif=TURNED), id="turned JPEG"),
    pytest.param(encoded(NOISE, "JPEG"), id="grey JPEG"),
    pytest.param(encoded(COLOURS, "JPEG", mode="CMYK"), id="CMYK JPEG"),
    pytest.param(encoded(COLOURS, "JPEG", subsampling=0)[:-60], id="truncated JPEG"),
]


@pytest.mark.parametrize("content", KINDS)
def test_a_part_is_cut_and_resized_as_that_of_the_whole_image(content):
    asked = []
    for part in (Part(3, 5, 30, 31, (20, 24)), Part(3, 5, 30, 31, (20, 24), shrink=True)):
        chosen = read_image(content, choose=lambda *size, part=part: asked.append(size) or part)
        whole = read_image(content)
        assert asked[-1] == whole.shape[:2]
        np.testing.assert_array_equal(chosen, take_part(whole, part))


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("progressive", [False, True])
def test_fast_decoding_gives_the_pixels_of_pillow(factor, progressive):
    content = encoded(COLOURS, "JPEG", quality=90, progressive=progressive)
    image = Image.open(io.BytesIO(content))
    image.draft(None, (image.width // factor, image.height // factor))
    expected = np.asarray(image)
    np.testing.assert_array_equal(decode_jpeg(content, *expected.shape[:2]), expected)
    assert decode_jpeg(content[:-200], *expected.shape[:2]) is None, "Pillow mends what it can"
    sides = expected.shape[0] - 1, expected.shape[1] - 1
    assert decode_jpeg(content, *sides) is None, "no other size than that of a factor"


@pytest.mark.parametrize("content", KINDS)
def test_fast_parts_differ_from_those_of_pillow_by_rounding(content):
    for shrink in (False, True):
        part = Part(3, 5, 30, 31, (14, 15), shrink=shrink)
        exact, fast = (
            read_image(content, choose=lambda *_, part=each: part).astype(int)
            for each in (part, part._replace(fast=True))
        )
        assert np.abs(fast - exact).mean() < 0.5


@pytest.mark.parametrize("photo", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize(
    ("part", "factor"),
    [
        (Part(0, 0, 427, 640, (213, 320)), 2), (Part(13, 31, 300, 401, (112, 112)), 2),
        (Part(7, 101, 333, 333, (64, 64)), 4), (Part(0, 0, 427, 640, (50, 50)), 8),
    ],
)  # fmt: skip
def test_a_part_of_a_jpeg_that_is_decoded_smaller_is_close(photo, part, factor):
    """By 4 of 255 levels on average; a part that is one pixel off differs by more than 7."""
    file = Path(sklearn.datasets.__file__).parent / "images" / photo
    part = part._replace(shrink=True)
    assert part.factor == factor
    exact = take_part(read_image(file), part)
    difference = np.abs(read_image(file, choose=lambda *_: part).astype(int) - exact)
    assert 0 < difference.mean() < 4


def test_a_part_of_a_truncated_jpeg_is_close_as_well():
    photo = (Path(sklearn.datasets.__file__).parent / "images" / "china.jpg").read_bytes()
    part = Part(13, 31, 300, 401, (75, 100), shrink=True)
    exact = take_part(read_image(photo), part)
    difference = np.abs(read_image(photo[:-9000], choose=lambda *_: part).astype(int) - exact)
    assert 0 < difference.mean() < 4
