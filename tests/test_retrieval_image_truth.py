"""Every kind of image file becomes the pixels that people see, in bounded memory."""

import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ggem_jax import DescriptorSettings, Index, build_index
from ggem_jax.descriptors.extract import fitted_size
from ggem_jax.files import images
from ggem_jax.files.images import (
    UnfitImage,
    UnreadableImage,
    decode_image,
    is_image,
    read_image,
    resize,
)
from ggem_jax.retrieval.__main__ import main
from ggem_jax.retrieval.index import describing, folder
from ggem_jax.retrieval.index.index import add, build, info
from ggem_jax.retrieval.index.search import query_vectors
from ggem_jax.retrieval.index.store import IndexRefused
from ggem_jax.retrieval.tool import commands

SETTINGS = {"model": "mean colour"}
RAMP = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)


def encode(array, form="PNG", mode=None, **options):
    file = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(file, form, **options)
    return file.getvalue()


def photo(height, width, seed=0):
    """A smooth image with edges, as photos are."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), "white")
    return image


def extract(found):
    for image in found:
        mean = image.reshape(-1, 3).mean(axis=0, dtype=np.float64) - 99.5
        yield (mean / np.linalg.norm(mean)).astype(np.float32)


# Transparency


def test_transparent_drawings_lie_on_white():
    alpha = Image.new("L", (40, 40))
    ImageDraw.Draw(alpha).rectangle((10, 10, 20, 20), fill=255)
    drawing = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    drawing.putalpha(alpha)
    expected = np.where(np.asarray(alpha)[..., None] > 0, 0, 255).repeat(3, -1)
    for mode, form in (("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF")):
        options = {"lossless": True} if form == "WEBP" else {}
        found = read_image(encode(drawing, form, mode, **options))
        np.testing.assert_array_equal(found, expected)


def test_half_transparent_pixels_are_mixed_with_white():
    found = read_image(encode(Image.new("RGBA", (2, 2), (0, 100, 200, 51))))
    np.testing.assert_array_equal(found[0, 0], [204, 224, 244])  # 255 + (x - 255) / 5


def test_transparent_palettes():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((0, 0), 0)
    for form in ("PNG", "GIF"):
        found = read_image(encode(image, form, transparency=0))
        assert found[0, 0].tolist() == [255, 255, 255]
        assert found[1, 1].tolist() == [255, 0, 0]


# Ranges of grey


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_is_scaled_by_its_real_range(bits):
    deep = (RAMP.astype(np.uint32) * (2**bits - 1) // 255).astype(np.uint16)
    found = read_image(encode(deep, "TIFF"))[..., 0]
    assert np.abs(found.astype(int) - RAMP).max() <= 1


def test_tags_say_the_range():
    dark = np.full((8, 8), 1000, np.uint16)
    assert read_image(encode(dark, "TIFF"))[0, 0, 0] == 1000 * 255 // 1023
    tagged = encode(dark, "TIFF", tiffinfo={281: 4095})
    assert read_image(tagged)[0, 0, 0] == 1000 * 255 // 4095
    wrong = encode(dark, "TIFF", tiffinfo={281: 500})  # less than the largest value there
    assert read_image(wrong)[0, 0, 0] == 1000 * 255 // 1023


def test_where_zero_is_white_grey_is_inverted():
    deep = RAMP.astype(np.uint16) * 257
    data = encode(deep, "TIFF")
    tag = bytes([0x06, 0x01, 0x03, 0x00, 0x01, 0x00, 0x00, 0x00])  # 262, one number of 16 bits
    at = data.index(tag) + len(tag)
    assert data[at] == 1  # black is zero
    found = read_image(data[:at] + b"\0" + data[at + 1 :])
    np.testing.assert_array_equal(found[..., 0], 255 - RAMP)


def test_sixteen_bits_of_a_pgm():
    data = b"P5 64 64 65535\n" + (RAMP.astype(">u2") * 257).tobytes()
    np.testing.assert_array_equal(read_image(data)[..., 0], RAMP)


# Formats


@pytest.mark.parametrize(
    "form", ["AVIF", "BMP", "DDS", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM",
             "QOI", "SGI", "TGA", "TIFF", "WEBP"]
)  # fmt: skip
def test_what_pillow_reads_is_read(form):
    image = photo(48, 48)
    data = encode(image, form)
    found = read_image(data)
    assert found.shape == (48, 48, 3)
    assert np.abs(found.astype(int) - np.asarray(image)).mean() < 30
    assert is_image(io.BytesIO(data)) == (form != "TGA")  # which has no mark


def test_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    image = photo(480, 640)
    pillow_heif.from_pillow(image).save(tmp_path / "x.heic", quality=90)
    data = (tmp_path / "x.heic").read_bytes()
    assert is_image(io.BytesIO(data))
    assert np.abs(read_image(data).astype(int) - np.asarray(image)).mean() < 10


def test_heic_without_its_reader_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "IMG_1.HEIC").write_bytes(data)
    (tmp_path / "photos" / "no ending").write_bytes(data)
    Image.new("RGB", (4, 4)).save(tmp_path / "photos" / "x.png")
    report = build(tmp_path / "photos", tmp_path / "index", extract, SETTINGS)
    assert [skipped.path for skipped in report.skipped] == ["IMG_1.HEIC", "no ending"]
    assert "HEIC needs the package pillow-heif: pip install" in report.skipped[0].why


@pytest.mark.parametrize(
    "data", [b"", b"BM is how a bitmap begins", b"Python\n", b"#define x_width 3\n", bytes(100),
             b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\0\0\1\xb3 a film",
             b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"P5 is a paper size"]
)  # fmt: skip
def test_other_files_are_no_images(data):
    assert not is_image(io.BytesIO(data))


def test_several_frames(tmp_path):
    (tmp_path / "photos").mkdir()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    for name in ("film.gif", "pages.tif", "film.webp", "film.png"):
        frames[0].save(tmp_path / "photos" / name, save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "photos" / "one.gif")
    report = build(tmp_path / "photos", tmp_path / "index", extract, SETTINGS)
    (note,) = report.notes
    assert note == (
        "the first frame was taken of files with several: 4 images (film.gif, film.png, film.webp,"
        " pages.tif)"
    )
    assert (read_image(tmp_path / "photos" / "pages.tif") == [255, 0, 0]).all()


# Truncated files


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("draft", [False, True])
def test_a_jpeg_without_its_last_bytes_is_read_and_noted(tmp_path, progressive, draft):
    image = photo(480, 640)
    data = encode(image, "JPEG", quality=90, progressive=progressive)
    cut = data[: -len(data) // 20]

    def fit(height, width):
        return height // 4, width // 4

    found = decode_image(cut, fit=fit if draft else None, draft=draft)
    whole = decode_image(data, fit=fit if draft else None, draft=draft)
    assert (found.truncated, whole.truncated) == (True, False)
    assert (found.width, found.height, found.pixels.shape) == (640, 480, whole.pixels.shape)
    upper = slice(0, whole.pixels.shape[0] * 3 // 4)
    difference = np.abs(found.pixels[upper].astype(int) - whole.pixels[upper])
    assert difference.mean() < (2 if progressive else 0.01)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cut.jpg").write_bytes(cut)
    report = build(tmp_path / "photos", tmp_path / "index", extract, SETTINGS)
    assert report.notes == (
        "files that lack their last bytes were read as far as they go: 1 image (cut.jpg)",
    )


def test_half_a_jpeg_is_unreadable():
    data = encode(photo(480, 640), "JPEG", quality=90)
    for end in (len(data) // 2, 700, 20):
        with pytest.raises(UnreadableImage, match=r"truncated|identify|broken"):
            read_image(data[:end])


# Large images


def test_the_limit_is_ours(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own would refuse above 200
    data = encode(photo(100, 100))
    assert read_image(data).shape == (100, 100, 3)
    with pytest.raises(UnreadableImage, match=r"100 x 100 pixels are more than 0\.009 megapixels"):
        read_image(data, max_megapixels=0.009)
    assert read_image(data, max_megapixels=0.01).shape == (100, 100, 3)


def test_the_limit_of_an_index(tmp_path):
    (tmp_path / "photos").mkdir()
    photo(100, 100).save(tmp_path / "photos" / "large.png")
    photo(10, 10).save(tmp_path / "photos" / "small.png")
    report = build(tmp_path / "photos", tmp_path / "index", extract, SETTINGS, max_megapixels=0.009)
    assert (report.added, [each.path for each in report.skipped]) == (1, ["large.png"])
    assert "raise --max-megapixels" in report.skipped[0].why
    assert add(tmp_path / "index", extract, SETTINGS).added == 1


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_images_are_resized_as_the_extractor_resizes_them(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(300, 400), form, exif=exif)
    asked = []

    def fit(height, width):
        asked.append((height, width))
        return (height * 2) // 5, (width * 2) // 5

    whole = read_image(data)
    found = decode_image(data, fit=fit)
    assert asked == [whole.shape[:2]]
    assert (found.height, found.width) == whole.shape[:2]
    np.testing.assert_array_equal(found.pixels, resize(whole, *fit(*whole.shape[:2])))
    drafted = decode_image(data, fit=fit, draft=True)
    if form == "PNG":
        np.testing.assert_array_equal(found.pixels, drafted.pixels)
    else:
        assert drafted.pixels.shape == found.pixels.shape
        assert np.abs(drafted.pixels.astype(int) - found.pixels).mean() < 3


def test_draft_decodes_at_least_twice_the_size(monkeypatch):
    sizes, really = [], images._to_rgb
    monkeypatch.setattr(
        images, "_to_rgb", lambda image: (sizes.append(image.size), really(image))[1]
    )
    data = encode(photo(1200, 1600), "JPEG")
    for longest, expected in ((1600, 1600), (801, 1600), (400, 800), (200, 400), (20, 200)):
        size = (longest * 3 // 4, longest)
        decode_image(data, fit=lambda h, w, size=size: size, draft=True)
        assert sizes.pop() == (expected, expected * 3 // 4)
        decode_image(data, fit=lambda h, w, size=size: size)
        assert sizes.pop() == (1600, 1200)


@pytest.mark.parametrize("sizes", ["buckets", "exact"])
def test_the_size_of_an_image_that_was_resized_is_its_own(sizes):
    settings = DescriptorSettings(sizes=sizes, scales=1, regional=False)
    rng = np.random.default_rng(0)
    for height, width in rng.integers(20, 5000, (300, 2)).tolist():
        if max(height, width) <= 16 * min(height, width):
            size = fitted_size(height, width, settings, 32)
            if max(size) <= 16 * min(size):
                assert fitted_size(*size, settings, 32) == size


def test_an_image_without_a_size_is_skipped(tmp_path):
    def fit(height, width):
        raise UnreadableImage("too thin")

    with pytest.raises(UnfitImage, match=r"^too thin$"):
        decode_image(encode(RAMP), fit=fit)
    reading = folder.Reading(fit=fit)
    Image.fromarray(RAMP).save(tmp_path / "x.png")
    listing = folder.walk(tmp_path, apart=tmp_path / "no")
    found = list(folder.decode(tmp_path, listing.files, (), workers=1, reading=reading))
    assert found == [("x.png", "x.png cannot be described: too thin")]


def test_a_mistake_in_fit_is_no_fault_of_the_image(tmp_path):
    def fit(height, width):
        raise ValueError("the weights are missing")

    Image.fromarray(RAMP).save(tmp_path / "x.png")
    listing = folder.walk(tmp_path, apart=tmp_path / "no")
    reading = folder.Reading(fit=fit)
    with pytest.raises(ValueError, match=r"^the weights are missing$"):
        list(folder.decode(tmp_path, listing.files, (), workers=1, reading=reading))


def test_large_images_wait_for_each_other(tmp_path, monkeypatch):
    for number in range(6):
        photo(100, 100, number).save(tmp_path / f"{number}.png")
    now, most, lock, really = [0], [0], threading.Lock(), images._to_rgb

    def counting(image):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return really(image)

    monkeypatch.setattr(images, "_to_rgb", counting)
    listing = folder.walk(tmp_path, apart=tmp_path / "no")
    assert len(list(folder.decode(tmp_path, listing.files, (), workers=6))) == 6
    assert most[0] > 1
    monkeypatch.setattr(folder, "MEMORY", 6 * 39_999)  # each needs 40,000 bytes
    most[0] = 0
    assert len(list(folder.decode(tmp_path, listing.files, (), workers=6))) == 6
    assert most[0] == 1


# Indexes


class Quarters:
    """Describes an image by its mean colour in a grid of 2 x 2, at 32 x 32 pixels."""

    def __init__(self, settings, batch=None):
        self.sizes = []

    def fit(self, height, width):
        return 32, 32

    def __call__(self, found):
        for image in found:
            small = resize(image, 32, 32).astype(float)
            vector = small.reshape(2, 16, 2, 16, 3).mean((1, 3)).ravel() - 99.5
            yield (vector / np.linalg.norm(vector)).astype(np.float32)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setattr(describing, "make_extractor", Quarters)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        photo(600, 800, number).save(tmp_path / "photos" / f"{number}.jpg", quality=85)
    return tmp_path / "photos"


def test_a_query_is_decoded_as_its_index(photos, tmp_path):
    vectors = {}
    for decoding in ("draft", "full"):
        path = tmp_path / decoding
        settings = DescriptorSettings(decoding=decoding)
        build_index(photos, path, settings, dtype="float32")
        opened = Index.open(path)
        vectors[decoding] = opened.vectors().take(np.arange(3))
        queries = [photos / f"{number}.jpg" for number in range(3)]
        found = query_vectors(opened, queries, [None] * 3, use_stored=False)
        np.testing.assert_array_equal(found, vectors[decoding])
    assert not np.array_equal(vectors["draft"], vectors["full"])
    assert (vectors["draft"] * vectors["full"]).sum(1).min() > 0.999


def test_the_decoding_of_an_index_stays(photos, tmp_path):
    build_index(photos, tmp_path / "new")
    assert info(tmp_path / "new")["settings"]["decoding"] == "draft"
    build_index(photos, tmp_path / "old", DescriptorSettings(decoding="full"))
    assert "decoding" not in info(tmp_path / "old")["settings"]  # as before there was a choice
    assert build_index(photos, tmp_path / "old").unchanged == 3
    with pytest.raises(IndexRefused, match=r'decoding is not set there, "draft" here'):
        build_index(photos, tmp_path / "old", DescriptorSettings(decoding="draft"))


# The tool


def test_the_flags_of_the_tool_are_those_of_the_library(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "keep_compiled_programs", lambda: None)
    photo(100, 100).save(photos / "a & b.png")
    (photos / "notes.txt").write_text("no image")
    (photos / ".hidden").write_text("")
    arguments = ["--exclude", "0*", "--max-megapixels", "0.2", "--deep", "--prune", "--json"]
    assert main(["index", str(photos), "-o", str(tmp_path / "tool"), *arguments]) == 0
    said = json.loads(capsys.readouterr().out)
    report = build_index(
        photos, tmp_path / "own", exclude=["0*"], max_megapixels=0.2, deep=True, prune=True
    )
    assert said == report.record()
    assert (report.added, len(report.skipped)) == (1, 2)
    assert report.excluded == {".*": 1, "0*": 1}
    (photos / "a & b.png").unlink()
    main(["add", str(tmp_path / "tool"), "--include", "0*"])
    assert capsys.readouterr().out == (
        f"{tmp_path / 'tool'}: 3 added, 0 updated, 0 unchanged, 0 reused, 0 removed, 0 skipped\n"
        "not images: 1 files (.txt 1)\n"
        "excluded: 1 files (.* 1)\n"
        "not reachable now: 1 image (a & b.png); kept until --prune\n"
    )
    main(["remove", str(tmp_path / "tool"), "1.jpg"])
    main(["remove", str(tmp_path / "tool"), "2.jpg", "--no-exclude"])
    capsys.readouterr()
    main(["add", str(tmp_path / "tool"), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert (said["added"], said["excluded"]) == (1, {".*": 1, "/1.jpg": 1})
    assert main(["add", str(tmp_path / "tool"), "--max-megapixels", "0"]) == 2
    assert "must be a number above 0" in capsys.readouterr().err
