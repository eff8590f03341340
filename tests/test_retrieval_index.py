"""ggem_jax/retrieval/index/index.py: the contents of an index, and that they survive failures."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ggem_jax.files.images import UnreadableImage, decode_image, read_image
from ggem_jax.retrieval.index import (
    folder,
    index,
    locking,
    publishing,
    store,
    verification,
    writing,
)
from ggem_jax.retrieval.index.index import Index, add, build, info, remove
from ggem_jax.retrieval.index.store import IndexRefused
from ggem_jax.retrieval.index.verification import verify
from ggem_jax.retrieval.index.writing import Report

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"model": "mean colour", "pooling": {"name": "avg", "p": 1.0}}


def described(image):
    mean = image.reshape(-1, 3).mean(axis=0, dtype=np.float64) - 99.5
    return (mean / np.linalg.norm(mean)).astype(np.float32)


def extract(images):
    return map(described, images)


def never(images):
    for image in images:
        raise AssertionError(f"an image of {image.shape} was extracted")
    return iter(())


def save(path, seed):
    """An image of one colour, which differs from seed to seed, and a size of its own."""
    rng = np.random.default_rng(seed)
    colour, size = rng.integers(0, 256, 3, np.uint8), rng.integers(1, 9, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), colour)).save(path)


@pytest.fixture
def photos(tmp_path):
    """Twelve images in a folder and two below."""
    for seed in range(12):
        save(tmp_path / "photos" / ("", "a", "b/c")[seed % 3] / f"{seed:02}.png", seed)
    return tmp_path / "photos"


@pytest.fixture
def built(photos, tmp_path):
    build(photos, tmp_path / "my.index", extract, SETTINGS)
    return tmp_path / "my.index"


@pytest.fixture
def small(monkeypatch):
    """Batches and shards so small that twelve images make several."""
    monkeypatch.setattr(writing, "COMMIT_ROWS", 2)
    monkeypatch.setattr(publishing, "SHARD_BYTES", 4 * 6)
    monkeypatch.setattr(publishing, "SMALL_SHARDS", 2)


def contents(path):
    """Returns the vectors of an index by path."""
    opened = Index.open(path)
    return dict(zip(opened.paths, opened.vectors().take(np.arange(len(opened))), strict=True))


def assert_right(path, photos):
    """Every image of the folder is there, and is the nearest neighbour of itself."""
    opened = Index.open(path, SETTINGS)
    assert sorted(opened.paths) == sorted(
        file.path for file in folder.walk(photos, apart=path).files
    )
    vectors = np.concatenate([block for _, block in opened.vectors().blocks(5)]).astype(np.float32)
    queries = np.stack([described(read_image(photos / name)) for name in opened.paths])
    assert (
        np.argmin(np.linalg.norm(queries[:, None] - vectors, axis=-1), axis=1)
        == np.arange(len(opened))
    ).all()
    np.testing.assert_allclose(vectors, queries, atol=1e-3)
    assert verify(path, deep=True) == ([], [])


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


ODD_NAMES = [
    b"line\nbreak.png",
    b"caf\xc3\xa9.png",
    b"cafe\xcc\x81.png",
    b"latin1-\xe9.png",
    b" %41?#.png",
    b"'quoted\".png",
    "図.png".encode(),
    b"a[1].png",
]


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


# Adding, changing, moving, removing


def test_add_extracts_only_what_is_new_or_changed(built, photos):
    assert add(built, never, SETTINGS) == Report(unchanged=12)
    os.utime(photos / "00.png", ns=(1, 1))
    assert add(built, never, SETTINGS) == Report(unchanged=12)
    ids = Index.open(built).paths
    save(photos / "03.png", 70)
    save(photos / "new.png", 71)
    (photos / "a" / "01.png").unlink()
    seen = []
    assert add(
        built,
        lambda images: map(described, (seen.append(0) or image for image in images)),
        SETTINGS,
    ) == Report(added=1, updated=1, unchanged=10)
    assert len(seen) == 2
    assert Index.open(built).paths == [*ids, "new.png"]
    assert add(built, never, SETTINGS, prune=True) == Report(unchanged=12, removed=1)
    assert_right(built, photos)


def test_moved_and_copied_images_are_not_extracted_again(built, photos):
    os.rename(photos / "a", photos / "moved")
    shutil.copy(photos / "00.png", photos / "copy.png")
    os.replace(photos / "03.png", photos / "06.png")
    assert add(built, never, SETTINGS, prune=True) == Report(
        added=5, updated=1, unchanged=6, removed=5, reused=6
    )
    (photos / "copy.png").unlink()
    add(built, never, SETTINGS, prune=True)
    assert_right(built, photos)
    assert info(built)["unused_vectors"] == 1


def test_copies_in_one_build_are_extracted_once(photos, tmp_path):
    for number in range(5):
        shutil.copy(photos / "00.png", photos / f"copy{number}.png")
    seen = []
    assert (
        build(
            photos,
            tmp_path / "index",
            lambda images: map(described, (seen.append(0) or p for p in images)),
            SETTINGS,
        ).reused
        == 5
    )
    assert (
        len(seen),
        len(Index.open(tmp_path / "index")),
        info(tmp_path / "index")["vectors"],
    ) == (12, 17, 12)


def test_a_image_that_became_unreadable_keeps_its_entry(built, photos):
    before = contents(built)
    (photos / "00.png").write_text("half copied")
    report = add(built, never, SETTINGS, prune=True)
    assert [path for path, _ in report.skipped] == ["00.png"]
    np.testing.assert_equal(contents(built), before)
    (note,) = verify(built, deep=True).notes
    assert "1 image (00.png)" in note


def test_the_root_may_move_and_a_part_be_added(built, photos, tmp_path):
    os.rename(photos, tmp_path / "elsewhere")
    with pytest.raises(IndexRefused, match="photos is not a folder"):
        add(built, never, SETTINGS)
    assert add(built, never, SETTINGS, root=tmp_path / "elsewhere") == Report(unchanged=12)
    assert Index.open(built).root == tmp_path / "elsewhere"
    save(tmp_path / "elsewhere" / "a" / "new.png", 80)
    save(tmp_path / "elsewhere" / "b" / "new.png", 81)
    (tmp_path / "elsewhere" / "b" / "c" / "02.png").unlink()
    assert add(built, extract, SETTINGS, folder=tmp_path / "elsewhere" / "a", prune=True) == Report(
        added=1, unchanged=4
    )
    with pytest.raises(IndexRefused, match="is not inside"):
        add(built, extract, SETTINGS, folder=tmp_path)


def test_remove(built, photos):
    before = contents(built)
    for pattern in ("nothing", "../photos/00.png", str(photos.parent / "x")):
        with pytest.raises(IndexRefused, match=r"matches no image|is not inside"):
            remove(built, ["00.png", pattern])
    assert len(Index.open(built)) == 12
    assert remove(built, ["00.png", "b/*1*", str(photos / "a")]) == Report(removed=6, unchanged=6)
    after = contents(built)
    assert sorted(after) == ["03.png", "06.png", "09.png", "b/c/02.png", "b/c/05.png", "b/c/08.png"]
    np.testing.assert_equal(after, {name: before[name] for name in after})
    assert verify(built) == ([], [])
    assert remove(built, ["*"]).removed == 6
    assert (len(Index.open(built)), Index.open(built).vectors().shape, verify(built)) == (
        0,
        (0, 3),
        ([], []),
    )
    assert list(Index.open(built).vectors().blocks(5)) == []
    assert not list(built.glob("*.npy"))
    assert add(built, extract, SETTINGS).added == 6
    assert add(built, extract, SETTINGS, include=["00.png", "b/*1*", "a"]).added == 6
    assert_right(built, photos)
    remove(built, ["a", "00.png"], exclude=False)
    assert add(built, extract, SETTINGS).added == 5
    assert_right(built, photos)


def test_unused_rows_are_dropped_when_they_are_the_majority(built):
    before = contents(built)
    remove(built, ["a"])
    assert (info(built)["vectors"], info(built)["unused_vectors"]) == (12, 4)
    remove(built, ["b/c/02.png", "b/c/05.png"])
    assert (info(built)["vectors"], info(built)["unused_vectors"]) == (12, 6)
    remove(built, ["b/c/11.png"])
    assert (info(built)["vectors"], info(built)["unused_vectors"], verify(built)) == (
        5,
        0,
        ([], []),
    )
    after = contents(built)
    np.testing.assert_equal(after, {name: before[name] for name in after})


def test_many_small_shards_are_put_together(built, photos):
    for number in range(publishing.SMALL_SHARDS + 3):
        save(photos / f"new{number}.png", 200 + number)
        add(built, extract, SETTINGS)
        assert info(built)["shards"] <= publishing.SMALL_SHARDS
    assert_right(built, photos)


def test_shards_are_bounded(small, photos, tmp_path):
    build(photos, tmp_path / "index", extract, SETTINGS)
    assert sorted(np.load(shard).shape[0] for shard in (tmp_path / "index").glob("*.npy")) in (
        [2] * 6,
        [4] * 3,
    )
    assert_right(tmp_path / "index", photos)


# Other settings


def test_other_settings_are_refused(built, photos):
    other = {"model": "another", "pooling": {"name": "avg", "p": 3.0, "eps": 1e-6}}
    sentence = (
        r"model is \"mean colour\" there, \"another\" here; pooling\.p is 1\.0 there, 3\.0 here;"
        r" pooling\.eps is not set there, 1e-06 here"
    )
    for call in (
        lambda: Index.open(built, other),
        lambda: add(built, never, other),
        lambda: build(photos, built, never, other),
    ):
        with pytest.raises(IndexRefused, match=sentence):
            call()
    with pytest.raises(IndexRefused, match='dtype is "float16" there, "float32" here'):
        build(photos, built, never, SETTINGS, dtype="float32")
    with pytest.raises(IndexRefused, match="folder is "):
        build(photos / "a", built, never, SETTINGS)
    with pytest.raises(IndexRefused, match="dtype must be one of float16, float32"):
        build(photos, built, never, SETTINGS, dtype="int8")
    with pytest.raises(IndexRefused, match="JSON"):
        build(photos, built, never, {"model": object()})


def test_a_newer_format_is_refused(built, photos):
    with contextlib.closing(sqlite3.connect(built / "index.sqlite")) as database:
        database.execute("PRAGMA user_version = 3")
    for call in (
        Index.open,
        verify,
        info,
        lambda path: add(path, never, SETTINGS),
        lambda path: build(photos, path, never, SETTINGS),
    ):
        with pytest.raises(
            IndexRefused, match="has format 3 where this version of ggem_jax reads format 2: update"
        ):
            call(built)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda images: [described(image) for image in images][:-1], "stopped 1 short"),
        (lambda images: [described(next(images))], "stopped"),
        (
            lambda images: [*map(described, images), np.zeros(3, np.float32)],
            "more than it took",
        ),
        (
            lambda images: (np.zeros((1, 3), np.float32) for _ in images),
            r"vectors \(dim,\).* shape \(1, 3\)",
        ),
        (
            lambda images: (np.ones(3 + (p.shape[0] > 4), np.float32) for p in images),
            r"vectors \([34],\).* shape \([34],\)",
        ),
        (lambda images: (np.zeros(3, complex) for _ in images), "complex128"),
    ],
)
def test_a_wrong_extractor_is_refused(photos, tmp_path, wrong, match):
    with pytest.raises(IndexRefused, match=match):
        build(photos, tmp_path / "index", wrong, SETTINGS)
    with pytest.raises(IndexRefused, match="holds no"):
        Index.open(tmp_path / "index")


def test_images_that_cannot_be_described_are_skipped(photos, tmp_path):
    shutil.copy(photos / "00.png", photos / "copy.png")
    odd = iter([UnreadableImage("too\nthin"), np.full(3, np.nan), np.full(3, 1e6)])
    report = build(
        photos,
        tmp_path / "index",
        lambda images: (next(odd, None) if n < 3 else described(p) for n, p in enumerate(images)),
        SETTINGS,
    )
    assert report.added == 9
    assert [why for _, why in report.skipped] == [
        "00.png cannot be described: too thin",
        "03.png has a descriptor that is not finite in float16",
        "06.png has a descriptor that is not finite in float16",
        "copy.png has the content of an image that was skipped",
    ]
    assert add(tmp_path / "index", extract, SETTINGS) == Report(added=4, unchanged=9, reused=1)
    (photos / "copy.png").unlink()
    add(tmp_path / "index", never, SETTINGS, prune=True)
    assert_right(tmp_path / "index", photos)


# Damage


def test_a_truncated_shard(built, photos):
    before = contents(built)
    (shard,) = built.glob("*.npy")
    os.truncate(shard, shard.stat().st_size - 1)
    for call in (Index.open, lambda path: add(path, never, SETTINGS)):
        with pytest.raises(
            IndexRefused,
            match=(
                rf"{shard.name} is truncated \(199 bytes where 200 are expected\); .*add with"
                r" repair"
            ),
        ):
            call(built)
    (sentence,) = verify(built).damage
    assert f"{shard.name} is truncated" in sentence
    assert "12 images (00.png, 03.png, 06.png, 09.png, a/01.png and 7 more)" in sentence
    (photos / "00.png").write_text("gone bad")
    report = add(built, extract, SETTINGS, repair=True)
    assert (report.added, report.updated, report.unchanged) == (11, 0, 0)
    assert report.skipped[1] == (
        "00.png",
        "the entry of 00.png was damaged, its image could not be read, and it was dropped",
    )
    np.testing.assert_equal(
        contents(built), {name: before[name] for name in before if name != "00.png"}
    )
    assert verify(built) == ([], [])


def test_a_missing_shard(built, photos):
    (shard,) = built.glob("*.npy")
    shard.unlink()
    for call in (Index.open, lambda path: add(path, never, SETTINGS)):
        with pytest.raises(IndexRefused, match=f"{shard.name} is missing"):
            call(built)
    assert "is missing: 12 images" in verify(built).damage[0]
    assert add(built, extract, SETTINGS, repair=True).added == 12
    assert_right(built, photos)


def test_a_flipped_byte_in_a_shard(built, photos):
    (shard,) = built.glob("*.npy")
    good, vectors = shard.read_bytes(), 200 - 72
    for place in (3, 40, vectors + 6 * 5 + 3):
        data = bytearray(good)
        data[place] ^= 0x10
        shard.write_bytes(data)
        (sentence,) = verify(built).damage
        if place < vectors:
            assert "has an altered header: 12 images" in sentence
        else:
            assert f"{shard.name} holds altered vectors: 1 image (a/04.png)" in sentence
    assert add(built, extract, SETTINGS, repair=True).added == 1
    assert_right(built, photos)


def test_every_flipped_byte_of_sqlite_is_found_or_harmless(built, tmp_path):
    expected, good = contents(built), (built / "index.sqlite").read_bytes()
    rng, found = np.random.default_rng(0), 0
    with contextlib.closing(sqlite3.connect(built / "index.sqlite")) as database:
        page = database.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'images'"
        ).fetchone()[0]
        size = database.execute("PRAGMA page_size").fetchone()[0]
    of_images = rng.integers((page - 1) * size, page * size, 150)
    for place in [*of_images, *rng.integers(0, len(good), 150), *range(100)]:
        data = bytearray(good)
        data[place] ^= 1 << rng.integers(8)
        (built / "index.sqlite").write_bytes(data)
        try:
            damage = verify(built).damage
        except IndexRefused:
            damage = ["refused"]
        assert all("\n" not in sentence for sentence in damage)
        found += bool(damage)
        if not damage:
            np.testing.assert_equal(contents(built), expected)
        else:
            with contextlib.suppress(IndexRefused):
                contents(built)
            if found % 10 == 0:
                for name, repair in (("plain", False), ("repaired", True)):
                    shutil.copytree(built, tmp_path / name)
                    with contextlib.suppress(IndexRefused):
                        add(tmp_path / name, extract, SETTINGS, repair=repair)
                        assert not repair or verify(tmp_path / name) == ([], [])
                    shutil.rmtree(tmp_path / name)
    assert found > 40


def test_an_altered_entry_is_named_and_mended(built, photos):
    with contextlib.closing(
        sqlite3.connect(built / "index.sqlite", isolation_level=None)
    ) as database:
        database.execute(
            "UPDATE images SET path = CAST('07.png' AS BLOB) WHERE path = CAST('a/07.png' AS BLOB)"
        )
        database.execute("UPDATE images SET row = 99 WHERE path = CAST('a/04.png' AS BLOB)")
    damage = verify(built).damage
    assert len(damage) == 2
    assert any(
        "index.sqlite holds altered entries: 1 image (07.png)" in sentence for sentence in damage
    )
    assert any(
        "names vectors that are not there: 1 image (a/04.png)" in sentence for sentence in damage
    )
    with pytest.raises(IndexRefused, match="entries have been altered"):
        Index.open(built)
    add(built, extract, SETTINGS, repair=True)
    assert_right(built, photos)


def test_an_entry_that_is_gone_is_missed(built):
    with contextlib.closing(
        sqlite3.connect(built / "index.sqlite", isolation_level=None)
    ) as database:
        database.execute("DELETE FROM images WHERE path = CAST('a/07.png' AS BLOB)")
    assert "11 entries where 12 are expected" in verify(built).damage[0]
    with pytest.raises(IndexRefused, match="entries have been altered"):
        Index.open(built)


def test_files_that_nobody_uses_are_a_note(built):
    (built / "vectors-000000000abc.npy").write_bytes(b"half")
    (built / "next.sqlite").write_bytes(b"half")
    damage, (note,) = verify(built)
    assert damage == []
    assert "holds 2 files of a writer that is at work or was interrupted" in note
    add(built, never, SETTINGS)
    assert verify(built) == ([], [])


def everything(path):
    return {name: (path / name).read_bytes() for name in os.listdir(path)}


@pytest.mark.parametrize(
    "pending", ["no", "of an add", "of an add before its first commit", "damaged"]
)
def test_an_index_whose_sqlite_file_is_missing_is_not_taken_for_an_unfinished_build(
    small, built, photos, tmp_path, pending
):
    def failing(images):
        if pending == "of an add":
            yield from (described(next(images)) for _ in range(4))
        elif pending != "no":
            shutil.copytree(built, tmp_path / "killed")
        raise ZeroDivisionError("of the extractor")

    if pending != "no":
        for number in range(6):
            save(photos / f"new{number}.png", 400 + number)
        with pytest.raises(ZeroDivisionError):
            add(built, failing, SETTINGS)
    path = tmp_path / "killed" if (tmp_path / "killed").exists() else built
    assert (path / "pending.sqlite").exists() == (pending != "no")
    if pending == "damaged":
        (path / "pending.sqlite").write_bytes(b"SQLite format 3\0" + bytes(5000))
    whole = everything(path)
    (path / "index.sqlite").unlink()
    for _ in range(2):
        with pytest.raises(
            IndexRefused,
            match=(
                r"^index\.sqlite is missing in .*: put a copy in its place, or delete the folder to"
                r" build it anew$"
            ),
        ):
            build(photos, path, failing, SETTINGS)
        assert everything(path) == {
            name: data for name, data in whole.items() if name != "index.sqlite"
        }
    with pytest.raises(
        IndexRefused,
        match=r"^index\.sqlite is missing" if pending == "no" else "holds no finished build",
    ):
        Index.open(path)
    (path / "index.sqlite").write_bytes(whole["index.sqlite"])
    assert len(Index.open(path)) == 12
    add(path, extract, SETTINGS)
    assert_right(path, photos)


# Full disks and locked ones


@pytest.mark.parametrize("at", range(12))
def test_a_disk_that_fills_at_any_write(small, photos, tmp_path, monkeypatch, at):
    path, fsync, left = tmp_path / "index", os.fsync, [at]

    def full(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IndexRefused, match="index could not be written: No space left on device"):
        build(photos, path, extract, SETTINGS)
    if at < 2:
        assert not path.exists()
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(IndexRefused, match="holds no"):
        Index.open(path)
    build(photos, path, extract, SETTINGS)
    assert_right(path, photos)
    before = contents(path)
    save(photos / "new.png", 90)
    left[0] = 1
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IndexRefused, match="No space left"):
        add(path, extract, SETTINGS)
    with pytest.raises(IndexRefused, match="No space left"):
        remove(path, ["a"])
    np.testing.assert_equal(contents(path), before)
    assert verify(path).damage == []


def child(code, *, file_blocks=None, **options):
    """Runs code in a process of its own, with files of at most `file_blocks` x 512 bytes."""
    command = [sys.executable, "-c", "import os, sys\n" + textwrap.dedent(code)]
    if file_blocks is not None:
        command = ["sh", "-c", 'ulimit -f "$0"; exec "$@"', str(file_blocks), *command]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


# What a child needs of this file, without pytest and JAX.
EXTRACT = """
import random, signal, time, shutil, json
import numpy as np
from ggem_jax.retrieval.index import index, publishing, store, writing
from ggem_jax.retrieval.index.index import *
from ggem_jax.retrieval.index.verification import verify
SETTINGS = {"model": "mean colour", "pooling": {"name": "avg", "p": 1.0}}
def extract(images):
    for image in images:
        mean = image.reshape(-1, 3).mean(axis=0, dtype=np.float64) - 99.5
        yield (mean / np.linalg.norm(mean)).astype(np.float32)
"""


def test_a_file_that_may_not_grow(built, photos):
    """A real failure of the operating system, in SQLite's writes too: 12 KiB for files."""
    before = contents(built)
    for number in range(150):
        save(photos / f"new{number}.png", 300 + number)
    run = child(
        EXTRACT
        + f"try:\n    add({str(built)!r}, extract, SETTINGS)\nexcept ValueError as error:\n   "
        " print(error)",
        file_blocks=24,
    )
    output, _ = run.communicate(timeout=60)
    assert "could not be written: " in output
    assert output.count("\n") == 1
    np.testing.assert_equal(contents(built), before)
    assert verify(built).damage == []
    add(built, extract, SETTINGS)
    assert_right(built, photos)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to become another user")
def test_a_read_only_folder_is_read_and_not_written_by_another_user(photos):
    with tempfile.TemporaryDirectory() as open_to_all:
        shutil.copytree(photos, Path(open_to_all) / "photos")
        path = Path(open_to_all) / "my.index"
        build(path.parent / "photos", path, extract, SETTINGS)
        path.parent.chmod(0o755)
        code = f"""
        from PIL import Image
        Image.init()  # loads the decoders while it may
        os.setgid(65534)
        os.setuid(65534)
        path, photos = {str(path)!r}, {str(path.parent / "photos")!r}
        print(len(Index.open(path, SETTINGS)), verify(path, deep=True))
        removes = lambda *arguments: remove(path, ["a"])
        builds = lambda *arguments: build(photos, path + "2", *arguments[1:])
        for call in (add, removes, builds):
            try:
                call(path, extract, SETTINGS)
            except ValueError as error:
                print(error)
        """
        output, _ = child(EXTRACT + textwrap.dedent(code)).communicate(timeout=60)
        first, *refusals = output.splitlines()
        assert first == "12 Verdict(damage=[], notes=[])", output
        assert len(refusals) == 3
        assert all("could not be written: Permission denied" in line for line in refusals)
        assert_right(path, path.parent / "photos")


# Writers and readers at once


def test_a_second_writer_is_refused_and_readers_go_on(built, photos):
    save(photos / "new.png", 95)
    opened = Index.open(built)
    refused = []

    def slow(images):
        for image in images:
            for call in (
                lambda: add(built, never, SETTINGS),
                lambda: remove(built, ["a"]),
                lambda: build(photos, built, never, SETTINGS),
            ):
                with pytest.raises(IndexRefused, match="another process is writing"):
                    call()
                refused.append(len(Index.open(built)))
            assert verify(built).damage == []
            yield described(image)

    assert add(built, slow, SETTINGS).added == 1
    assert refused == [12, 12, 12]
    assert (len(opened), len(Index.open(built))) == (12, 13)
    held = child(
        EXTRACT + f"with index.locking(index.Path({str(built)!r})):\n    print('held', flush=True);"
        " sys.stdin.read()"
    )
    assert held.stdout.readline() == "held\n"
    with pytest.raises(IndexRefused, match="another process is writing"):
        add(built, never, SETTINGS)
    held.send_signal(signal.SIGKILL)
    held.communicate()
    assert add(built, never, SETTINGS) == Report(unchanged=13)


def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(built, monkeypatch):
    """The writer before fails to build, and removes its lock file after we opened it and before we
    lock it.
    """
    flock, calls = fcntl.flock, []

    def late(handle, how):
        if not calls:
            (built / "lock").unlink()
        calls.append(how)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    add(built, never, SETTINGS)
    assert calls.count(fcntl.LOCK_EX | fcntl.LOCK_NB) == 2


def test_a_full_disk_does_not_cost_what_was_extracted(small, photos, tmp_path, monkeypatch):
    def broken(images):
        yield from (described(next(images)) for _ in range(4))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(photos, tmp_path / "index", broken, SETTINGS)
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL

    def failing(pending, path):
        raise full

    with monkeypatch.context() as patched:
        patched.setattr(locking, "_usable_shards", failing)
        with pytest.raises(IndexRefused, match="could not be written: database or disk is full"):
            build(photos, tmp_path / "index", extract, SETTINGS)
    seen = []
    build(
        photos,
        tmp_path / "index",
        lambda images: map(described, (seen.append(0) or image for image in images)),
        SETTINGS,
    )
    assert len(seen) == 8
    assert_right(tmp_path / "index", photos)


def test_a_reader_keeps_what_it_opened(built, photos):
    before, opened = contents(built), Index.open(built)
    remove(built, ["a", "b/c/02.png", "b/c/05.png", "b/c/08.png"])
    assert info(built)["vectors"] == 5
    save(photos / "00.png", 96)
    add(built, extract, SETTINGS)
    np.testing.assert_equal(
        dict(zip(opened.paths, opened.vectors().take(np.arange(12)), strict=True)), before
    )


def test_a_reader_that_comes_between_opens_the_new_index(built, monkeypatch):
    """The writer drops the old shard after the reader has read the old SQLite file and before it
    opens the shards.
    """
    really, calls = index.map_or_refuse, []

    def late(*arguments):
        if not calls:
            calls.append(0)
            remove(built, ["a", "b"])
        return really(*arguments)

    monkeypatch.setattr(index, "map_or_refuse", late)
    assert len(Index.open(built)) == 4


def test_verify_beside_a_writer_that_drops_a_shard_finds_no_damage(built, monkeypatch):
    really, calls = verification.flaws, []

    def late(*arguments):
        if not calls:
            remove(built, ["a", "b"])
        calls.append(0)
        return really(*arguments)

    monkeypatch.setattr(verification, "flaws", late)
    assert verify(built) == ([], [])
    assert len(calls) == 2
    (shard,) = built.glob("*.npy")
    shard.unlink()
    assert "is missing: 4 images" in verify(built).damage[0]
    assert len(calls) == 3


# Interruptions


@pytest.mark.parametrize("at", range(4))
def test_a_build_killed_before_its_first_commit_is_tidied_in_any_number_of_calls(
    photos, tmp_path, monkeypatch, at
):
    """A killed build leaves a pending file without images and a shard that nothing names; removing
    them fails at the `at`-th file.
    """
    path, unlink, left = tmp_path / "killed", os.unlink, [at]

    def copying(images):
        shutil.copytree(tmp_path / "index", path)
        return extract(images)

    def failing(name, **options):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "Input/output error")
        unlink(name, **options)

    build(photos, tmp_path / "index", copying, SETTINGS)
    (path / "vectors-000000000abc.npy").write_bytes(b"half")
    assert (path / "pending.sqlite").exists()
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", failing)
        with contextlib.suppress(IndexRefused):
            build(photos, path, extract, SETTINGS)
    assert left[0] < 0
    build(photos, path, extract, SETTINGS)
    assert_right(path, photos)


def test_an_interrupted_build_goes_on_where_it_was(small, photos, tmp_path):
    def broken(images):
        for number, image in enumerate(images):
            if number == 7:
                raise KeyboardInterrupt
            yield described(image)

    path = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt):
        build(photos, path, broken, SETTINGS)
    with pytest.raises(IndexRefused, match="holds no finished build"):
        Index.open(path)
    with pytest.raises(IndexRefused, match=r"an interrupted build is in the way: .*model is"):
        build(photos, path, never, {"model": "another"})
    (photos / "00.png").unlink()
    seen = []
    report = build(
        photos,
        path,
        lambda images: map(described, (seen.append(0) or image for image in images)),
        SETTINGS,
    )
    assert (report, len(seen)) == (Report(added=11), 5)
    assert_right(path, photos)


def test_an_interrupted_add_survives_a_remove(small, built, photos):
    for number in range(6):
        save(photos / f"new{number}.png", 400 + number)

    def broken(images):
        yield from (described(next(images)) for _ in range(4))
        raise ZeroDivisionError("of the extractor")

    with pytest.raises(ZeroDivisionError, match="of the extractor"):
        add(built, broken, SETTINGS)
    assert len(Index.open(built)) == 12
    assert "interrupted" in verify(built).notes[0]
    remove(built, ["*0*"], exclude=False)
    assert not any(name.startswith("new") for name in Index.open(built).paths)
    seen = []
    add(
        built,
        lambda images: map(described, (seen.append(0) or image for image in images)),
        SETTINGS,
    )
    assert len(seen) == 2 + 11  # 11.png is the one without a 0
    assert_right(built, photos)


def test_a_damaged_pending_file_costs_its_work_only(small, built, photos):
    save(photos / "new.png", 99)
    (built / "pending.sqlite").write_bytes(b"SQLite format 3\0" + bytes(5000))
    assert add(built, extract, SETTINGS).added == 1
    assert_right(built, photos)


KILLS = (
    EXTRACT
    + """
writing.COMMIT_ROWS, publishing.SHARD_BYTES, publishing.SMALL_SHARDS = 10, 48, 2
photos, before, out = sys.argv[1:4]
def slow(images):
    for vector in extract(images):
        time.sleep(0.001)
        yield vector
CALLS = {
    "build": lambda path: build(photos, path, slow, SETTINGS),
    "add": lambda path: add(path, slow, SETTINGS, prune=True),
    "remove": lambda path: remove(path, ["a", "b/c/*"]),
}
def fork(call, path, dies_at=None):
    # returns when the call begins, with a pipe that says whether it ends
    news, tell = os.pipe()
    process = os.fork()
    if process:
        os.close(tell)
        os.read(news, 1)
        return process, news
    left = [dies_at]
    def dying(name):
        really = getattr(os, name)
        def called(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return really(*arguments, **options)
        setattr(os, name, called)
    if dies_at is not None:
        for name in ("fsync", "replace", "unlink", "listdir"):
            dying(name)
    try:
        os.write(tell, b"s")
        CALLS[call](path)
        os.write(tell, b"ended")
    finally:
        os._exit(0)
def was_killed(process, news):
    # waits for its end; whether the call was still running
    with open(news, "rb") as pipe:
        ended = pipe.read() != b""
    return os.waitpid(process, 0)[1] == signal.SIGKILL and not ended
def prepared(call, number):
    path = f"{out}/{call}{number}"
    if call != "build":
        shutil.copytree(before, path)
    return path
rng, killed = random.Random(0), {}
for call in CALLS:
    process = fork(call, prepared(call, "whole"))
    start = time.monotonic()
    was_killed(*process)
    whole = time.monotonic() - start
    for number in range(5):
        for again in range(100):  # where the kill came too late
            process = fork(call, prepared(call, number))
            time.sleep(rng.uniform(0, whole))
            os.kill(process[0], signal.SIGKILL)
            killed[f"{call}{number}"] = was_killed(*process)
            if killed[f"{call}{number}"]:
                break
            shutil.rmtree(f"{out}/{call}{number}")
    number, dead = 100, True
    while dead:
        dead = was_killed(*fork(call, prepared(call, number), number - 100))
        killed[f"{call}{number}"] = dead
        number += 1
print(json.dumps(killed))
"""
)


def test_kills(photos, built, tmp_path):
    """Fifteen kills at random moments, and one before every call that changes the folder: the index
    is as before or as after, and the same call completes.
    """
    (tmp_path / "out").mkdir()
    before = contents(built)
    for seed in range(20):
        save(photos / f"new{seed}.png", 500 + seed)
    save(photos / "00.png", 600)
    (photos / "a" / "01.png").unlink()
    arguments = [
        sys.executable,
        "-c",
        "import os, sys\n" + KILLS,
        str(photos),
        str(built),
        str(tmp_path / "out"),
    ]
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.stderr == ""
    killed = json.loads(run.stdout)
    assert (
        sum(killed[f"{call}{number}"] for call in ("build", "add", "remove") for number in range(5))
        == 15
    )
    assert sum(killed.values()) > 50
    after = contents(tmp_path / "out" / "buildwhole")
    removed = {name: vector for name, vector in before.items() if "/" not in name}
    outcomes = {"build": after, "add": after, "remove": removed}
    seen = {"build": [0, 0], "add": [0, 0], "remove": [0, 0]}
    for name in killed:
        path, call = tmp_path / "out" / name, name.rstrip("0123456789")
        if not (path / "index.sqlite").exists():
            assert call == "build"
            with pytest.raises(IndexRefused, match="holds no"):
                Index.open(path)
            now = None
        else:
            now = contents(path)
            assert verify(path).damage == []
            vectors = Index.open(path).vectors().take(np.arange(len(now))).astype(np.float32)
            assert (
                list(now)[
                    np.argmin(
                        np.linalg.norm(vectors - described(read_image(photos / "06.png")), axis=1)
                    )
                ]
                == "06.png"
            )
        is_after = now is not None and now.keys() == outcomes[call].keys()
        np.testing.assert_equal(
            now, outcomes[call] if is_after else (None if call == "build" else before)
        )
        seen[call][is_after] += 1
        if call == "build":
            build(photos, path, extract, SETTINGS)
        elif call == "add":
            add(path, extract, SETTINGS, prune=True)
        else:
            with contextlib.suppress(IndexRefused):
                remove(path, ["a", "b/c/*"])
        np.testing.assert_equal(contents(path), outcomes[call])
        assert verify(path) == ([], [])
    assert all(min(counts) > 0 for counts in seen.values()), seen


def test_one_line_store_helpers():
    assert store.some(["b", "a\n"]) == "2 images ('a\\n', b)"


def test_times_beyond_64_bits(photos, tmp_path):
    os.utime(next(photos.rglob("*.png")), ns=(0, 2**63 + 10**9))
    assert build(photos, tmp_path / "late", extract, SETTINGS).added
    assert build(photos, tmp_path / "late", extract, SETTINGS).added == 0


def test_an_empty_pattern_removes_nothing(built):
    with pytest.raises(IndexRefused, match="must not be empty"):
        remove(built, [""])
