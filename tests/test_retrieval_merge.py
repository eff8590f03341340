"""ggem_jax/retrieval/index/merging.py: parts of a folder make the index of one run."""

import collections
import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_index import ODD_NAMES, SETTINGS, described, extract, never, save

from ggem_jax.files.images import UnreadableImage
from ggem_jax.retrieval.index import extraction, folder, merging, shards, store
from ggem_jax.retrieval.index.describing import SOURCES
from ggem_jax.retrieval.index.index import Index, add, build, info, remove
from ggem_jax.retrieval.index.merging import Merged, merge
from ggem_jax.retrieval.index.store import IndexRefused
from ggem_jax.retrieval.index.verification import verify
from ggem_jax.retrieval.parts import Part

ROOT = Path(__file__).resolve().parent.parent
N = 3


@pytest.fixture
def photos(tmp_path):
    """Images in nested folders, some of them copies of others, and names that are no UTF-8."""
    for seed in range(24):
        save(tmp_path / "photos" / ("", "a", "a.b", "a/b c")[seed % 4] / f"{seed:02}.png", seed)
    for number, name in enumerate(ODD_NAMES):
        save(tmp_path / "photos" / "plain.png", 100 + number)
        os.rename(
            tmp_path / "photos" / "plain.png",
            os.path.join(os.fsencode(tmp_path / "photos"), name),
        )
    for seed in range(0, 12, 4):
        shutil.copy(tmp_path / "photos" / f"{seed:02}.png", tmp_path / "photos" / f"z{seed}.png")
        shutil.copy(tmp_path / "photos" / f"{seed:02}.png", tmp_path / "photos" / f"0{seed}.a.png")
    return tmp_path / "photos"


@pytest.fixture
def parts(photos, tmp_path):
    return [make_part(photos, tmp_path, number) for number in range(1, N + 1)]


def make_part(photos, tmp_path, number, count=N, settings=SETTINGS, **options):
    path = tmp_path / f"part{number}of{count}"
    build(photos, path, extract, settings, shard=f"{number}/{count}", **options)
    return path


def entries(path):
    """All columns of all entries but the number of the file of vectors, which is random."""
    names = [name for name in store.COLUMNS.split(", ") if name != "shard"]
    with contextlib.closing(sqlite3.connect(path / "index.sqlite")) as database:
        columns = ", ".join(["id", "entry_crc32", *names])
        return database.execute(f"SELECT {columns} FROM images ORDER BY id").fetchall()


def vectors_of(path):
    opened = Index.open(path)
    return opened.vectors().take(np.arange(len(opened)))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_merged_parts_are_the_index_of_one_run(photos, tmp_path, dtype):
    build(photos, tmp_path / "one", extract, SETTINGS, dtype=dtype)
    made = [make_part(photos, tmp_path, number, dtype=dtype) for number in (3, 1, 2)]
    assert merge(tmp_path / "out", made) == Merged(str(tmp_path / "out"), 3, 38, 32)
    assert entries(tmp_path / "out") == entries(tmp_path / "one")
    one, out = Index.open(tmp_path / "one"), Index.open(tmp_path / "out", SETTINGS)
    assert (out.paths, out.root, out.dtype, out.dim) == (one.paths, one.root, dtype, 3)
    np.testing.assert_array_equal(vectors_of(tmp_path / "out"), vectors_of(tmp_path / "one"))
    files = [b"".join(each.read_bytes() for each in p.folder.glob("vectors-*")) for p in (one, out)]
    assert files[0] == files[1]
    queries = np.stack([described(np.full((1, 1, 3), 10 * i, np.uint8)) for i in range(5)])
    for rerank in (None, "superglobal"):
        first, second = (each.search(queries, k=38, rerank=rerank) for each in (one, out))
        np.testing.assert_array_equal(first.ids, second.ids)
        np.testing.assert_array_equal(first.scores, second.scores)
    assert verify(tmp_path / "out", deep=True) == ([], [])
    assert info(tmp_path / "out") | {"path": "", "versions": {}} == info(tmp_path / "one") | {
        "path": "",
        "versions": {},
    }
    assert add(tmp_path / "out", never, SETTINGS, prune=True).unchanged == 38
    assert not list(tmp_path.glob(".*"))


def test_several_files_of_vectors(photos, parts, tmp_path, monkeypatch):
    build(photos, tmp_path / "one", extract, SETTINGS)
    monkeypatch.setattr(shards, "SHARD_BYTES", 6 * 5)
    monkeypatch.setattr(merging, "ROWS_COPIED", 3)
    merge(tmp_path / "out", parts)
    assert info(tmp_path / "out")["shards"] == 7
    np.testing.assert_array_equal(vectors_of(tmp_path / "out"), vectors_of(tmp_path / "one"))
    assert verify(tmp_path / "out", deep=True) == ([], [])


def test_each_file_is_in_one_part_and_stays_there(photos, parts, tmp_path):
    found = collections.Counter(path for part in parts for path in Index.open(part).paths)
    assert set(found.values()) == {1}
    assert sorted(found) == [
        file.path for file in sorted(folder.walk(photos, apart=parts[0]).files)
    ]
    assert [info(part)["shard"] for part in parts] == ["1/3", "2/3", "3/3"]
    names = ["a/1.jpg", "é.png", os.fsdecode(b"\xff.png")]
    own = [[n for n in range(1, 1001) if Part(n, 1000).holds(name)] for name in names]
    assert own == [[201], [721], [996]]  # on every machine
    counts = [sum(Part(n, 4).holds(f"{i}.jpg") for i in range(4000)) for n in range(1, 5)]
    assert sum(counts) == 4000
    assert min(counts) > 900


def test_every_file_is_counted_in_one_part(photos, tmp_path):
    """Images, other files, excluded folders and links that lead nowhere."""
    for name in ("notes.txt", "a/b", "film.mov", "@eaDir/1.png", "@eaDir/2.png", ".hidden/1.png"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_text(name)
    (photos / "nowhere").symlink_to(photos / "gone")
    save(tmp_path / "photo.png", 400)
    os.rename(tmp_path / "photo.png", photos / "a photo without an ending")
    one = build(photos, tmp_path / "one", extract, SETTINGS)
    made = [tmp_path / f"p{number}" for number in range(1, 5)]
    reports = [
        build(photos, path, extract, SETTINGS, shard=f"{number}/4")
        for number, path in enumerate(made, 1)
    ]
    for name in ("added", "files", "special"):
        assert sum(getattr(report, name) for report in reports) == getattr(one, name), name
    for name in ("not_images", "excluded"):
        counts = sum(
            (collections.Counter(getattr(r, name)) for r in reports), collections.Counter()
        )
        assert dict(counts) == getattr(one, name), name
    assert one.files == 46
    merge(tmp_path / "out", made)
    assert entries(tmp_path / "out") == entries(tmp_path / "one")
    assert others(tmp_path / "out") == others(tmp_path / "one")
    assert len(others(tmp_path / "one")) == 3


def others(path):
    with contextlib.closing(sqlite3.connect(path / "index.sqlite")) as database:
        return sorted(database.execute("SELECT * FROM others"))


def test_add_and_prune_keep_to_the_part(photos, parts, tmp_path):
    for number in range(40, 60):
        save(photos / "new" / f"{number}.png", number)
    (photos / "a" / "01.png").unlink()
    for part in parts:
        add(part, extract, SETTINGS, prune=True)
    build(photos, tmp_path / "one", extract, SETTINGS)
    merge(tmp_path / "out", parts)
    assert entries(tmp_path / "out") == entries(tmp_path / "one")
    assert build(photos, parts[0], never, SETTINGS, shard="1/3").unchanged


def test_a_part_may_be_empty(tmp_path):
    save(tmp_path / "photos" / "only.png", 1)
    (tmp_path / "photos" / "broken.png").write_text("no")
    parts = [make_part(tmp_path / "photos", tmp_path, number, 5) for number in range(1, 6)]
    assert sorted(info(part)["images"] for part in parts) == [0, 0, 0, 0, 1]
    assert merge(tmp_path / "out", parts).images == 1
    assert Index.open(tmp_path / "out").paths == ["only.png"]
    (tmp_path / "photos" / "only.png").unlink()
    (tmp_path / "photos" / "broken.png").unlink()
    for part in parts:  # as when a disk is not mounted
        with pytest.raises(IndexRefused, match="is its disk there"):
            add(part, extract, SETTINGS, prune=True)


def test_parts_without_an_image_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.png").write_text("no")
    parts = [make_part(tmp_path / "photos", tmp_path, number, 2) for number in (1, 2)]
    with pytest.raises(IndexRefused, match="the parts hold no images"):
        merge(tmp_path / "out", parts)
    assert not (tmp_path / "out").exists()


def test_a_stopped_part_resumes(photos, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "COMMIT_ROWS", 2)
    seen = []

    def stopping(images):
        for image in images:
            if len(seen) == 5:
                raise KeyboardInterrupt
            seen.append(image)
            yield described(image)

    path = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        build(photos, path, stopping, SETTINGS, shard="1/3")
    with pytest.raises(IndexRefused, match="holds no finished build"):
        Index.open(path)
    with pytest.raises(IndexRefused, match=r'interrupted build.*shard is "1/3" there, "2/3" here'):
        build(photos, path, extract, SETTINGS, shard="2/3")
    with pytest.raises(IndexRefused, match="no finished build"):
        merge(tmp_path / "out", [path, *parts[1:]])
    again = []
    build(
        photos,
        path,
        lambda images: map(described, (again.append(0) or image for image in images)),
        SETTINGS,
        shard="1/3",
    )
    assert len(seen) + len(again) == info(parts[0])["vectors"]
    merge(tmp_path / "out", [path, *parts[1:]])
    merge(tmp_path / "whole", parts)
    assert entries(tmp_path / "out") == entries(tmp_path / "whole")
    np.testing.assert_array_equal(vectors_of(tmp_path / "out"), vectors_of(tmp_path / "whole"))


def test_what_does_not_belong_together_is_refused(photos, parts, tmp_path, monkeypatch):
    def refused(words, *paths):
        with pytest.raises(IndexRefused, match=words) as caught:
            merge(tmp_path / "out", paths)
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == before

    other = tmp_path / "other"
    other.mkdir()
    build(photos, other / "whole", extract, SETTINGS)
    settings = make_part(photos, other, 3, settings={**SETTINGS, "model": "another"})
    wide = other / "wide"
    wide.mkdir()
    wide = make_part(photos, wide, 3, dtype="float32")
    shutil.copytree(photos, other / "photos")
    moved = other / "moved"
    moved.mkdir()
    moved = make_part(other / "photos", moved, 3)
    of_two = make_part(photos, other, 1, 2)
    old = other / "old"
    with monkeypatch.context() as patched:
        patched.setattr(store.np, "__version__", "1.0")
        old.mkdir()
        old = make_part(photos, old, 3)
    before = sorted(path.name for path in tmp_path.iterdir())
    refused("at least one")
    refused(r"part 3/3 is missing: name all 3 parts", *parts[:2])
    refused("are both part 2/3: name each part once", *parts, parts[1])
    refused("whole is an index of a whole folder: merge joins parts", *parts[:2], other / "whole")
    refused("is part 1/2 where .* is part 1/3: index all parts with the same N", *parts, of_two)
    refused(r'settings.model is "mean colour", "another"\)', *parts[:2], settings)
    refused(r'dtype is "float16", "float32"\)', *parts[:2], wide)
    refused(r'root is ".*photos", ".*other/photos"\)', *parts[:2], moved)
    refused(r'versions.numpy is "[\d.]+", "1.0"\): index all parts with the same', *parts[:2], old)
    refused("holds no index", *parts[:2], tmp_path / "nowhere")
    (tmp_path / "out").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    refused("out exists already: choose another path, nothing is overwritten", *parts)


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "1/0", "-1/3", "1/3/5", "1/65537", "a/b", ""])
def test_a_shard_is_i_of_n(photos, tmp_path, shard):
    with pytest.raises(ValueError, match=r"a shard must be I/N with I from 1 to N"):
        build(photos, tmp_path / "index", extract, SETTINGS, shard=shard)
    assert not (tmp_path / "index").exists()


def test_damage_is_found_before_it_is_merged(photos, parts, tmp_path):
    (shard,) = parts[1].glob("vectors-*.npy")
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(IndexRefused, match="part2of3 is damaged: look at it with verify"):
        merge(tmp_path / "out", parts)
    shard.write_bytes(sound[:-1])
    with pytest.raises(IndexRefused, match="is truncated"):
        merge(tmp_path / "out", parts)
    shard.write_bytes(sound)
    with contextlib.closing(sqlite3.connect(parts[1] / "index.sqlite")) as database:
        database.execute("UPDATE images SET width = 77 WHERE id = 1")
        database.commit()
    with pytest.raises(IndexRefused, match="part2of3 is damaged: look at it with verify"):
        merge(tmp_path / "out", parts)
    assert not list(tmp_path.glob("*out*"))
    add(parts[1], extract, SETTINGS, repair=True)
    merge(tmp_path / "out", parts)
    assert verify(tmp_path / "out", deep=True) == ([], [])


def test_copies_share_the_vector_of_the_first(photos, tmp_path):
    """Also where two hosts describe the same content differently in the last bits."""
    made = [tmp_path / f"p{number}" for number in range(1, N + 1)]
    for number, path in enumerate(made, 1):

        def noisy(images, number=number):
            return (described(image) + np.float32(number / 64) for image in images)

        build(photos, path, noisy, SETTINGS, shard=f"{number}/{N}")
    merge(tmp_path / "out", made)
    opened = Index.open(tmp_path / "out")
    vectors = dict(zip(opened.paths, vectors_of(tmp_path / "out"), strict=True))
    seen = 0
    for seed in (0, 4, 8):
        names = sorted([f"{seed:02}.png", f"z{seed}.png", f"0{seed}.a.png"])
        own = [next(n for n in range(1, N + 1) if Part(n, N).holds(name)) for name in names]
        seen += len(set(own)) > 1
        first = Index.open(made[own[0] - 1])
        expected = first.vectors().take([first.paths.index(names[0])])[0]
        for name in names:
            np.testing.assert_array_equal(vectors[name], expected)
    assert seen > 0
    assert verify(tmp_path / "out") == ([], [])


def test_the_files_of_weights_are_remembered(parts, tmp_path):
    (parts[0] / SOURCES).write_text('{"weights": "/w", "whitening": null}')
    merge(tmp_path / "out", parts)
    assert (tmp_path / "out" / SOURCES).read_text() == (parts[0] / SOURCES).read_text()


def test_removed_images_stay_away(parts, tmp_path):
    gone, again = Index.open(parts[0]).paths[:2]
    remove(parts[0], [again], exclude=False)
    assert merge(tmp_path / "before", parts).images == 37
    remove(parts[0], [gone])
    with pytest.raises(IndexRefused, match=r"exclusions is .*: index all parts with the same sett"):
        merge(tmp_path / "out", parts)
    for part in parts[1:]:
        add(part, never, SETTINGS, exclude=info(parts[0])["exclude"])
    assert merge(tmp_path / "out", parts).images == 36
    assert gone not in Index.open(tmp_path / "out").paths
    assert add(tmp_path / "out", extract, SETTINGS).added == 1
    assert sorted(Index.open(tmp_path / "before").paths) == sorted(
        {*Index.open(tmp_path / "out").paths, gone} - {again}
    )


def test_two_merges_and_strange_files(parts, tmp_path):
    making = tmp_path / ".out.merging"
    making.mkdir()
    (making / "diary").write_text("dear diary")
    with pytest.raises(IndexRefused, match="is in the way and holds other files"):
        merge(tmp_path / "out", parts)
    assert (making / "diary").read_text() == "dear diary"
    (making / "diary").unlink()
    with (
        merging.lock_folder(making),
        pytest.raises(IndexRefused, match="another process is writing"),
    ):
        merge(tmp_path / "out", parts)
    merge(tmp_path / "out", parts)


def test_a_full_disk_leaves_nothing(parts, tmp_path, monkeypatch):
    fsync, left = os.fsync, [1]

    def full(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, os.strerror(28))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    words = "out could not be written: No space left on device; there is no index yet"
    with pytest.raises(IndexRefused, match=words):
        merge(tmp_path / "out", parts)
    assert not list(tmp_path.glob("*out*"))
    monkeypatch.undo()
    merge(tmp_path / "out", parts)


KILLS = """
import json, random, sys, time
sys.path.insert(0, "tests")
from interruptions import around_commits, before_writes, killed
from ggem_jax.retrieval.index import merging, shards
out, parts = sys.argv[1], sys.argv[2:]
shards.SHARD_BYTES, merging.ROWS_COPIED = 30, 3
def fork(path, **when):
    def work(dying):
        with before_writes(dying, also=["listdir"], every=4), around_commits(dying):
            merging.merge(path, parts)
    return killed(work, **when)
found, rng = {}, random.Random(0)
start = time.monotonic()
fork(f"{out}/whole")
whole = time.monotonic() - start
for number in range(8):
    found[f"{out}/random{number}"] = fork(f"{out}/random{number}", wait=rng.uniform(0, whole))
number, dead = 0, True
while dead:
    dead = found[f"{out}/call{number}"] = fork(f"{out}/call{number}", number=number)
    number += 1
print(json.dumps(found))
"""


def test_kills(parts, tmp_path):
    """Eight kills at random moments and one before each call that writes: there is no index or a
    complete one, and the same call completes.
    """
    out = tmp_path / "many"
    out.mkdir()
    command = [sys.executable, "-c", KILLS, str(out), *map(str, parts)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.stderr == ""
    killed = json.loads(run.stdout)
    expected = entries(out / "whole")
    seen = collections.Counter()
    for path, dead in killed.items():
        complete = Path(path).exists()
        seen["complete" if complete else "absent"] += dead
        assert dead or complete
        if complete:
            with pytest.raises(IndexRefused, match="exists already"):
                merge(path, parts)
        else:
            merge(path, parts)
        # files of vectors are of other sizes, so that rows differ
        assert [row[:-1] for row in entries(Path(path))] == [row[:-1] for row in expected]
        np.testing.assert_array_equal(vectors_of(path), vectors_of(out / "whole"))
        assert verify(path) == ([], [])
    assert seen["absent"] > 15
    assert seen["complete"] >= 1
    assert not list(out.glob(".*"))


def test_an_image_that_is_skipped_in_a_part(photos, tmp_path):
    def picky(images):
        for image in images:
            yield UnreadableImage("too red") if image[0, 0, 0] > 200 else described(image)

    build(photos, tmp_path / "one", picky, SETTINGS)
    made = []
    for number in range(1, 5):
        made.append(tmp_path / f"p{number}")
        build(photos, made[-1], picky, SETTINGS, shard=f"{number}/4")
    merge(tmp_path / "out", made)
    assert entries(tmp_path / "out") == entries(tmp_path / "one")
    assert len(Index.open(tmp_path / "out")) < 38


def test_the_tool(tmp_path, monkeypatch, capsys, nine_photos):
    """`index --shard`, `merge` and `--json`: the record is the library's."""
    from ggem_jax.retrieval.__main__ import main

    for number in (1, 2):
        assert main(["index", "photos", "-o", f"p{number}", "--shard", f"{number}/2"]) == 0
    assert main(["index", "photos", "-o", "one"]) == 0
    capsys.readouterr()
    assert main(["merge", "out", "p2", "p1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == Merged("out", 2, 9, 9).record()
    assert entries(Path("out")) == entries(Path("one"))
    assert main(["merge", "again", "p1", "p2"]) == 0
    assert capsys.readouterr().out == "again: 9 images of 2 parts\n"
    assert main(["merge", "out", "p1", "p2"]) == 1
    assert "out exists already" in capsys.readouterr().err
    assert main(["index", "photos", "-o", "p3", "--shard", "3/2"]) == 2
    assert "a shard must be I/N" in capsys.readouterr().err
