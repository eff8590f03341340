"""Damage of an index is found, named and mended."""

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
    everything,
    extract,
    never,
    save,
)

from ggem_jax.retrieval.index import (
    damage,
)
from ggem_jax.retrieval.index.index import Index, add, build
from ggem_jax.retrieval.index.store import IndexRefused
from ggem_jax.retrieval.index.verification import verify


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
    assert [path for path, _ in report.skipped] == ["00.png"]
    assert report.files == report.added + len(report.skipped)
    assert report.notes == (
        "damaged entries whose images could not be read again were dropped: 1 image (00.png)",
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


def test_every_flipped_bit_of_a_header_is_found(built):
    (shard,) = built.glob("*.npy")
    good = shard.read_bytes()
    for place in range(128 * 8):
        data = bytearray(good)
        data[place // 8] ^= 1 << place % 8
        shard.write_bytes(data)
        with pytest.raises(IndexRefused, match="has an altered header"):
            Index.open(built)
    shard.write_bytes(good)
    assert verify(built) == ([], [])


def test_rows_behind_those_of_the_index_are_ignored_and_overwritten(built, photos):
    """As a writer leaves them that is killed between its vectors and its commit."""
    (shard,) = built.glob("*.npy")
    before, good = contents(built), shard.read_bytes()
    for more in (0, 2):
        rows = len(before)
        header = good[:128].replace(b"(%d, 3)" % rows, b"(%d, 3)" % (rows + more))
        shard.write_bytes(header + good[128:] + bytes(range(15)))
        np.testing.assert_equal(contents(built), before)
        assert verify(built).damage == []
        save(photos / f"{rows}.png", 700 + rows)
        add(built, extract, SETTINGS)
        assert_right(built, photos)
        before, good = contents(built), shard.read_bytes()
        assert len(good) == 128 + 6 * len(before)


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
                    refused = ""
                    try:
                        add(tmp_path / name, extract, SETTINGS, repair=repair)
                        assert not repair or verify(tmp_path / name) == ([], [])
                    except IndexRefused as error:
                        refused = str(error)
                    assert "\n" not in refused
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


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_index_whose_sqlite_file_is_missing_is_not_taken_for_an_unfinished_build(
    small, built, photos, interrupted
):
    def failing(images):
        yield from (described(next(images)) for _ in range(4))
        raise ZeroDivisionError("of the extractor")

    if interrupted:
        for number in range(6):
            save(photos / f"new{number}.png", 400 + number)
        with pytest.raises(ZeroDivisionError):
            add(built, failing, SETTINGS)
    whole = everything(built)
    (built / "index.sqlite").unlink()
    for call in (
        lambda: build(photos, built, failing, SETTINGS),
        lambda: build(photos, built, failing, SETTINGS),
        lambda: Index.open(built),
    ):
        with pytest.raises(
            IndexRefused,
            match=(
                r"^index\.sqlite is missing in .*: put a copy in its place, or delete the folder to"
                r" build it anew$"
            ),
        ):
            call()
        assert everything(built) == {
            name: data for name, data in whole.items() if name != "index.sqlite"
        }
    (built / "index.sqlite").write_bytes(whole["index.sqlite"])
    assert len(Index.open(built)) == 12
    add(built, extract, SETTINGS)
    assert_right(built, photos)


def test_one_line_store_helpers():
    assert damage.some(["b", "a\n"]) == "2 images ('a\\n', b)"
