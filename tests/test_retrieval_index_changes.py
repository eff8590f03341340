"""ggem_jax/retrieval/index/index.py: adding, changing, moving and removing; other settings."""

import contextlib
import os
import shutil
import sqlite3

import numpy as np
import pytest
from small_index import (
    SETTINGS,
    assert_right,
    contents,
    described,
    extract,
    never,
    save,
)

from ggem_jax.files.images import UnreadableImage
from ggem_jax.retrieval.index.index import Index, add, build, info, remove
from ggem_jax.retrieval.index.report import Report
from ggem_jax.retrieval.index.store import INDEX, IndexRefused
from ggem_jax.retrieval.index.verification import verify

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
    with pytest.raises(IndexRefused, match=r"photos, .* is not a folder now: .* with --root"):
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


def test_the_database_shrinks_when_most_of_it_is_unused(tmp_path):
    """A file keeps its unused pages up to a quarter of all, so that small changes cost little."""
    for seed in range(60):
        save(tmp_path / "photos" / f"{seed:02}{'x' * 200}.png", seed)
    build(tmp_path / "photos", tmp_path / "index", extract, SETTINGS)
    sizes = []
    for pattern in ("0*", "[1-5]*"):
        remove(tmp_path / "index", [pattern])
        with contextlib.closing(sqlite3.connect(tmp_path / "index" / INDEX)) as database:
            pages, unused = (
                database.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_count", "freelist_count")
            )
        assert unused <= pages / 4
        sizes.append(pages)
    assert sizes[1] < sizes[0]


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


def test_vectors_are_appended_to_the_last_shard(built, photos):
    (shard,) = built.glob("*.npy")
    first = shard.read_bytes()
    for number in range(11):
        save(photos / f"new{number}.png", 200 + number)
        add(built, extract, SETTINGS)
        assert list(built.glob("*.npy")) == [shard]
        assert np.load(shard).shape == (13 + number, 3)
    assert shard.read_bytes()[128:].startswith(first[128:])
    assert_right(built, photos)


def test_shards_are_bounded(small, photos, tmp_path):
    build(photos, tmp_path / "index", extract, SETTINGS)
    assert [np.load(shard).shape[0] for shard in (tmp_path / "index").glob("*.npy")] == [4] * 3
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
        database.execute("PRAGMA user_version = 4")
    for call in (
        Index.open,
        verify,
        info,
        lambda path: add(path, never, SETTINGS),
        lambda path: build(photos, path, never, SETTINGS),
    ):
        with pytest.raises(
            IndexRefused, match="has format 4 where this version of ggem_jax reads format 3: update"
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


def test_an_empty_pattern_removes_nothing(built):
    with pytest.raises(IndexRefused, match="must not be empty"):
        remove(built, [""])
