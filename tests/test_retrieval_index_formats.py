"""Indexes of earlier formats are read, and become the present one when they are written."""

import contextlib
import sqlite3
import zlib

import numpy as np
import pytest
from PIL import Image
from small_index import SETTINGS, assert_right, contents, described, extract, never, save

from ggem_jax.retrieval.index import store
from ggem_jax.retrieval.index.index import Index, add, build, info, remove
from ggem_jax.retrieval.index.report import Report
from ggem_jax.retrieval.index.store import IndexRefused
from ggem_jax.retrieval.index.verification import verify

FORMAT_2 = """
    CREATE TABLE facts (
        id INTEGER PRIMARY KEY CHECK (id = 0), value TEXT NOT NULL, crc32 INTEGER NOT NULL);
    CREATE TABLE images (
        id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE, size INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL, content BLOB NOT NULL, width INTEGER NOT NULL,
        height INTEGER NOT NULL, vector_crc32 INTEGER NOT NULL, entry_crc32 INTEGER NOT NULL,
        shard INTEGER NOT NULL, row INTEGER NOT NULL);
    CREATE INDEX contents ON images (content);
    ALTER TABLE images ADD COLUMN ctime_ns INTEGER NOT NULL DEFAULT -1;
    ALTER TABLE images ADD COLUMN inode INTEGER NOT NULL DEFAULT -1;
    CREATE TABLE others (
        path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
        ctime_ns INTEGER NOT NULL, inode INTEGER NOT NULL);
    PRAGMA application_id = 1734829421;
    PRAGMA user_version = 2;
"""


def make_format_2(path):
    """Turns an index into one of format 2, and its journal into `pending.sqlite`."""
    made = {}
    with contextlib.closing(sqlite3.connect(path / "index.sqlite")) as data:
        for facts, images, name in (
            ("facts", "images", "index.sqlite"),
            ("journal", "pending", "pending.sqlite"),
        ):
            (found,) = data.execute(f"SELECT value FROM {facts}").fetchone() or (None,)
            if found is None:
                continue
            entries = data.execute(
                f"SELECT entry_crc32, {store.COLUMNS} FROM {images} ORDER BY id"
            ).fetchall()
            made[name] = found[: found.index(', "revision"')] + "}", entries
        others = data.execute("SELECT * FROM others").fetchall()
    (path / "index.sqlite").unlink()
    for name, (value, entries) in made.items():
        with contextlib.closing(sqlite3.connect(path / name)) as data:
            data.executescript(FORMAT_2)
            data.execute("INSERT INTO facts VALUES (0, ?, ?)", (value, zlib.crc32(value.encode())))
            data.executemany(
                f"INSERT INTO images (entry_crc32, {store.COLUMNS}) VALUES ({','.join(12 * '?')})",
                entries,
            )
            data.executemany("INSERT INTO others VALUES (?, ?, ?, ?, ?)", others)
            data.commit()


def counting(seen):
    return lambda images: map(described, (seen.append(0) or image for image in images))


def stopping(count):
    def extract_some(images):
        yield from (described(next(images)) for _ in range(count))
        raise KeyboardInterrupt

    return extract_some


def test_an_index_of_format_2_is_read_and_then_brought_up_to_date(built, photos):
    before = contents(built)
    make_format_2(built)
    whole = (built / "index.sqlite").read_bytes()
    np.testing.assert_equal(contents(built), before)
    assert verify(built, deep=True) == ([], [])
    assert (built / "index.sqlite").read_bytes() == whole
    save(photos / "new.png", 99)
    assert add(built, extract, SETTINGS) == Report(added=1, unchanged=12)
    assert format_of(built) == store.FORMAT
    assert_right(built, photos)


def test_an_interrupted_build_of_format_2_goes_on(small, photos, tmp_path):
    path, seen = tmp_path / "index", []
    with pytest.raises(KeyboardInterrupt):
        build(photos, path, stopping(7), SETTINGS)
    make_format_2(path)
    with pytest.raises(IndexRefused, match="holds no finished build"):
        Index.open(path)
    with pytest.raises(IndexRefused, match="an interrupted build is in the way"):
        build(photos, path, never, {"model": "another"})
    build(photos, path, counting(seen), SETTINGS)
    assert len(seen) == 5
    assert_right(path, photos)


def test_an_interrupted_add_of_format_2_goes_on(small, built, photos):
    seen = []
    for number in range(6):
        save(photos / f"new{number}.png", 400 + number)
    with pytest.raises(KeyboardInterrupt):
        add(built, stopping(4), SETTINGS)
    make_format_2(built)
    assert len(Index.open(built)) == 12
    assert "interrupted (pending.sqlite)" in verify(built).notes[0]
    remove(built, ["00.png"], exclude=False)
    add(built, counting(seen), SETTINGS)
    assert len(seen) == 3
    assert_right(built, photos)


def test_a_damaged_pending_file_costs_its_work_only(small, built, photos):
    save(photos / "new.png", 99)
    make_format_2(built)
    (built / "pending.sqlite").write_bytes(b"SQLite format 3\0" + bytes(5000))
    assert add(built, extract, SETTINGS).added == 1
    assert_right(built, photos)


@pytest.mark.parametrize("damaged", [False, True])
def test_an_index_of_format_2_that_is_missing_is_not_taken_for_an_unfinished_build(
    small, built, photos, damaged
):
    for number in range(6):
        save(photos / f"new{number}.png", 400 + number)
    with pytest.raises(KeyboardInterrupt):
        add(built, stopping(4), SETTINGS)
    make_format_2(built)
    if damaged:
        (built / "pending.sqlite").write_bytes(b"SQLite format 3\0" + bytes(5000))
    shards, whole = sorted(built.glob("*.npy")), (built / "index.sqlite").read_bytes()
    (built / "index.sqlite").unlink()
    with pytest.raises(IndexRefused, match=r"^index\.sqlite is missing"):
        build(photos, built, never, SETTINGS)
    assert sorted(built.glob("*.npy")) == shards
    (built / "index.sqlite").write_bytes(whole)
    add(built, extract, SETTINGS)
    assert_right(built, photos)


def format_of(path):
    with contextlib.closing(sqlite3.connect(path / "index.sqlite")) as data:
        return data.execute("PRAGMA user_version").fetchone()[0]


def make_format_1(path):
    """Turns an index into one of format 1: no ctime, no inode, no exclusions, no other files."""
    make_format_2(path)
    with contextlib.closing(sqlite3.connect(path / "index.sqlite", isolation_level=None)) as data:
        value = data.execute("SELECT value FROM facts").fetchone()[0]
        value = value[: value.index(', "exclusions"')] + "}"
        data.execute("UPDATE facts SET value = ?, crc32 = ?", (value, zlib.crc32(value.encode())))
        rows = data.execute(
            "SELECT path, size, mtime_ns, content, width, height, vector_crc32, id FROM images"
        ).fetchall()
        data.execute("DROP TABLE others")
        data.execute("ALTER TABLE images DROP COLUMN ctime_ns")
        data.execute("ALTER TABLE images DROP COLUMN inode")
        data.executemany(
            "UPDATE images SET entry_crc32 = ? WHERE id = ?",
            ((zlib.crc32(repr(row[:7]).encode()), row[7]) for row in rows),
        )
        data.execute("PRAGMA user_version = 1")


def test_an_index_of_format_1_is_read_and_then_brought_up_to_date(photos, built):
    before = contents(built)
    make_format_1(built)
    np.testing.assert_equal(contents(built), before)
    assert verify(built, deep=True) == ([], [])
    assert info(built)["images"] == 12
    assert format_of(built) == 1
    assert add(built, never, SETTINGS) == Report(unchanged=12)  # all contents are compared
    assert format_of(built) == store.FORMAT
    np.testing.assert_equal(contents(built), before)
    assert verify(built, deep=True) == ([], [])


def test_an_index_of_format_1_may_be_removed_from(photos, built):
    make_format_1(built)
    assert remove(built, ["a"]).removed == 4
    assert verify(built) == ([], [])
    assert add(built, never, SETTINGS) == Report(unchanged=8)


def test_damage_of_format_1_is_found(built):
    make_format_1(built)
    with contextlib.closing(sqlite3.connect(built / "index.sqlite", isolation_level=None)) as data:
        data.execute("UPDATE images SET size = size + 1 WHERE id = 2")
    assert "holds altered entries: 1 image" in verify(built).damage[0]


def test_images_that_format_1_read_otherwise_are_described_again(photos, built):
    """Alpha was dropped: the vector of a transparent drawing was that of its hidden colours."""
    drawing = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    drawing.save(photos / "drawing.png")
    add(built, lambda images: (np.float32([1, 0, 0]) for _ in images), SETTINGS)
    make_format_1(built)
    seen = []

    def seeing(images):
        return extract(seen.append(image.max()) or image for image in images)

    report = add(built, seeing, SETTINGS)
    assert (seen, report.unchanged) == ([255], 13)
    np.testing.assert_allclose(contents(built)["drawing.png"], np.full(3, 3**-0.5), atol=1e-3)
