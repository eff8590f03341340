"""ggem_jax/retrieval/index/index.py: what an index holds, and the folders it is built from."""

import contextlib
import errno
import json
import os
import shutil
import sqlite3

import numpy as np
import pytest
from PIL import Image
from small_index import (
    ODD_NAMES,
    SETTINGS,
    assert_right,
    contents,
    described,
    extract,
    never,
    save,
)

from ggem_jax.files.images import decode_image, read_image
from ggem_jax.retrieval.index import (
    folder,
)
from ggem_jax.retrieval.index.index import Index, add, build, info, remove
from ggem_jax.retrieval.index.report import Report
from ggem_jax.retrieval.index.store import IndexRefused

# What is built, and read


def test_build_and_open(built, photos):
    opened = Index.open(str(built), json.loads(json.dumps(SETTINGS)))
    assert (len(opened), opened.dim, opened.dtype, opened.root, opened.settings) == (
        12,
        3,
        "float16",
        photos,
        SETTINGS,
    )
    assert opened.vectors().shape == (12, 3)
    assert opened.paths[:4] == ["00.png", "03.png", "06.png", "09.png"]
    assert sorted(os.listdir(built)) == ["index.sqlite", "lock", sorted(os.listdir(built))[-1]]
    assert_right(built, photos)
    told = info(built)
    assert (told["images"], told["vectors"], told["unused_vectors"], told["vector_bytes"]) == (
        12,
        12,
        0,
        72,
    )
    assert json.loads(json.dumps(told)) == told


def test_the_shards_are_npy_files(built):
    (shard,) = built.glob("vectors-*.npy")
    array = np.load(shard, mmap_mode="r")
    assert (array.dtype, array.shape, array.offset % 64) == (np.float16, (12, 3), 0)


def test_float32(photos, tmp_path):
    build(photos, tmp_path / "index", extract, SETTINGS, dtype="float32")
    name = Index.open(tmp_path / "index").paths[5]
    np.testing.assert_array_equal(
        contents(tmp_path / "index")[name], described(read_image(photos / name))
    )


@pytest.mark.parametrize("rows", [1, 2, 5, 12, 100])
def test_blocks_and_take_agree(small, photos, tmp_path, rows):
    build(photos, tmp_path / "index", extract, SETTINGS)
    remove(tmp_path / "index", ["a/04.png", "00.png"])
    vectors = Index.open(tmp_path / "index").vectors()
    starts, blocks = zip(*vectors.blocks(rows), strict=True)
    assert list(starts) == list(range(0, 10, rows))
    assert all(len(block) == rows for block in blocks[:-1])
    np.testing.assert_array_equal(np.concatenate(blocks), vectors.take(np.arange(10)))
    backwards = vectors.take(np.array([9, 0, 9, 4]))
    np.testing.assert_array_equal(backwards, np.concatenate(blocks)[[9, 0, 9, 4]])
    assert vectors.take([]).shape == (0, 3)


def test_a_block_that_lies_together_is_not_copied(built):
    ((_, block),) = Index.open(built).vectors().blocks(100)
    assert not block.flags.owndata
    assert not block.flags.writeable


@pytest.mark.parametrize("ids", [[12], [-1], [0.5], [[0]]], ids=str)
def test_take_refuses(built, ids):
    with pytest.raises(IndexRefused, match="ids must be"):
        Index.open(built).vectors().take(np.array(ids))
    with pytest.raises(IndexRefused, match="at least one row"):
        next(Index.open(built).vectors().blocks(0))


def test_the_extractor_may_look_ahead(photos, tmp_path):
    def by_size(images):
        images = list(images)
        vectors = {
            number: described(images[number])
            for number in sorted(range(len(images)), key=lambda number: images[number].size)
        }
        return [vectors[number] for number in range(len(images))]

    calls = []
    build(
        photos,
        tmp_path / "index",
        by_size,
        SETTINGS,
        workers=3,
        on_progress=lambda *counts: calls.append(counts),
    )
    assert_right(tmp_path / "index", photos)
    assert calls[0] == (0, 12)
    assert calls[-1] == (12, 12)
    assert calls == sorted(calls)


# Odd images, odd names, odd folders


def test_every_kind_of_image(photos, tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(np.full((5000, 1, 3), (9, 200, 9), np.uint8)).save(photos / "thin.png")
    Image.fromarray(np.full((6, 4), 51 * 257, np.uint16)).save(photos / "deep.png")
    Image.fromarray(noise).convert("CMYK").save(photos / "print.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(photos / "turned.JPG", exif=exif)
    (photos / "text.jpg").write_text("no image")
    (photos / "notes.txt").write_text("nobody asks for this one")
    (photos / "cut.png").write_bytes((photos / "00.png").read_bytes()[:40])
    os.mkfifo(photos / "pipe.png")
    (photos / "dangling.png").symlink_to("nowhere.png")
    report = build(photos, tmp_path / "index", extract, SETTINGS)
    assert report.added == 16
    assert [path for path, _ in report.skipped] == [
        "dangling.png",
        "pipe.png",
        "cut.png",
        "text.jpg",
    ]
    assert all("\n" not in why and path in why and "0x" not in why for path, why in report.skipped)
    assert "no regular file" in report.skipped[1].why
    with contextlib.closing(sqlite3.connect(tmp_path / "index" / "index.sqlite")) as database:
        sizes = {
            name: size for name, *size in database.execute("SELECT path, width, height FROM images")
        }
    assert sizes[b"thin.png"] == [1, 5000]
    assert sizes[b"turned.JPG"] == [16, 24]
    for name in ("cut.png", "text.jpg", "pipe.png", "dangling.png"):
        (photos / name).unlink()
    assert_right(tmp_path / "index", photos)


def test_a_decoder_that_fails_otherwise_costs_one_image(photos, tmp_path, monkeypatch):
    def decoder(file, *, name, **options):
        if name == "a/04.png":
            raise EOFError("no more\nbytes")
        return decode_image(file, name=name, **options)

    monkeypatch.setattr(folder, "decode_image", decoder)
    report = build(photos, tmp_path / "index", extract, SETTINGS)
    assert (report.added, report.skipped) == (
        11,
        [("a/04.png", "a/04.png is not a readable image: EOFError: no more bytes")],
    )


def test_odd_names(photos, tmp_path):
    for number, name in enumerate(ODD_NAMES):
        save(photos / "plain.png", 100 + number)
        os.rename(photos / "plain.png", os.path.join(os.fsencode(photos), name))
    (photos / os.fsdecode(b"no\npicture\xff.png")).write_text("no")
    odd = tmp_path / os.fsdecode(b"my ?#%20\xff\n.index")
    report = build(photos, odd, extract, SETTINGS)
    assert [why.isprintable() for _, why in report.skipped] == [True]
    (photos / os.fsdecode(b"no\npicture\xff.png")).unlink()
    assert_right(odd, photos)
    names = list(map(os.fsdecode, ODD_NAMES))
    assert remove(odd, names).removed == len(names)
    assert not set(names) & set(Index.open(odd).paths)
    assert add(odd, never, SETTINGS) == Report(unchanged=12)
    assert add(odd, extract, SETTINGS, include=names).added == len(names)


def test_links_hidden_files_and_the_index_itself(photos):
    outside = photos.parent / "outside"
    save(outside / "far.png", 50)
    (outside / "loop").symlink_to(outside)
    (outside / "back").symlink_to(photos)
    (photos / "b" / "up").symlink_to(photos)
    (photos / "Again").symlink_to("a")  # sorts before the real name, which counts all the same
    (photos / "link").symlink_to(outside)
    (photos / "same.png").symlink_to("00.png")
    save(photos / ".hidden.png", 51)
    save(photos / ".trash" / "x.png", 52)
    save(photos / "my.index" / "in the way.png", 53)
    listing = folder.walk(photos, apart=photos / "my.index")
    here = [f"{('', 'a/', 'b/c/')[seed % 3]}{seed:02}.png" for seed in range(12)]
    assert [file.path for file in listing.files] == sorted([*here, "link/far.png", "same.png"])
    shutil.rmtree(photos / "my.index")
    assert build(photos, photos / "my.index", extract, SETTINGS) == Report(added=14, reused=1)
    assert add(photos / "my.index", never, SETTINGS, prune=True) == Report(unchanged=14)


def test_a_folder_that_cannot_be_listed_keeps_its_entries(built, photos, monkeypatch):
    listdir = os.listdir

    def refusing(path="."):
        if str(path).endswith("photos/b"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refusing)
    (photos / "00.png").unlink()
    report = add(built, never, SETTINGS, prune=True)
    assert report == Report(
        unchanged=7, removed=1, skipped=[("b", "b cannot be read: Permission denied")]
    )
    assert len(Index.open(built)) == 11


def test_an_empty_folder_is_refused(built, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        IndexRefused, match=r"there is no image \(\.bmp .*empty: is it the right folder"
    ):
        build(tmp_path / "empty", tmp_path / "new", extract, SETTINGS)
    with pytest.raises(IndexRefused, match="is not a folder"):
        build(tmp_path / "nowhere", tmp_path / "new", extract, SETTINGS)
    (tmp_path / "empty" / "x.png").write_text("no")
    with pytest.raises(IndexRefused, match=r"none of the 1 images .*x\.png is not a readable"):
        build(tmp_path / "empty", tmp_path / "new", extract, SETTINGS)
    assert not (tmp_path / "new").exists()
    shutil.rmtree(photos)
    photos.mkdir()  # as when a disk is not mounted
    with pytest.raises(IndexRefused, match="is its disk there"):
        add(built, extract, SETTINGS, prune=True)
    assert len(Index.open(built)) == 12


def test_what_is_no_index_is_never_overwritten(photos, tmp_path):
    thing = tmp_path / "thing"
    thing.write_text("dear diary")
    for _ in range(2):
        with pytest.raises(IndexRefused, match="exists and is not an index"):
            build(photos, thing, extract, SETTINGS)
        with pytest.raises(IndexRefused, match="holds no index"):
            Index.open(thing)
        if thing.is_file():
            assert thing.read_text() == "dear diary"
            thing.unlink()
            thing.mkdir()
            (thing / "diary").write_text("dear diary")
    assert os.listdir(thing) == ["diary"]
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(IndexRefused, match="link is a link that leads nowhere"):
        build(photos, tmp_path / "link", extract, SETTINGS)
    assert not (tmp_path / "nowhere").exists()
    with contextlib.closing(sqlite3.connect(thing / "index.sqlite")) as database:
        database.execute("CREATE TABLE theirs (a)")
    for call in (
        lambda: build(photos, thing, extract, SETTINGS),
        lambda: Index.open(thing),
        lambda: remove(thing, ["*"]),
    ):
        with pytest.raises(IndexRefused, match="is not an index of ggem_jax"):
            call()
    assert sorted(os.listdir(thing)) == ["diary", "index.sqlite"]
    with pytest.raises(IndexRefused, match="holds no index"):
        add(tmp_path / "nowhere", extract, SETTINGS)
    assert not (tmp_path / "nowhere").exists()


def test_an_empty_folder_may_become_an_index(photos, tmp_path):
    (tmp_path / "index").mkdir()
    build(photos, tmp_path / "index", extract, SETTINGS)
    assert_right(tmp_path / "index", photos)


def test_times_beyond_64_bits(photos, tmp_path):
    os.utime(next(photos.rglob("*.png")), ns=(0, 2**63 + 10**9))
    assert build(photos, tmp_path / "late", extract, SETTINGS).added
    assert build(photos, tmp_path / "late", extract, SETTINGS).added == 0
