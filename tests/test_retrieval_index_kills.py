"""Writers that are interrupted or killed: nothing is lost or half-written."""

import contextlib
import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from interruptions import around_commits
from small_index import (
    EXTRACT,
    ROOT,
    SETTINGS,
    assert_right,
    contents,
    described,
    extract,
    never,
    save,
)

from ggem_jax.files.images import read_image
from ggem_jax.retrieval.index import shards
from ggem_jax.retrieval.index.index import Index, add, build, remove
from ggem_jax.retrieval.index.reading import is_built
from ggem_jax.retrieval.index.report import Report
from ggem_jax.retrieval.index.store import IndexRefused
from ggem_jax.retrieval.index.transactions import opening
from ggem_jax.retrieval.index.verification import verify

# Interruptions


@pytest.mark.parametrize("at", range(5))
def test_a_build_killed_before_its_first_commit_is_tidied_in_any_number_of_calls(
    photos, tmp_path, monkeypatch, at
):
    """A killed build leaves an SQLite file without images and a shard that nothing names; removing
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
    assert (path / "index.sqlite").exists()
    with pytest.raises(IndexRefused, match="holds no finished build"):
        Index.open(path)
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


def test_a_damaged_entry_of_the_journal_is_extracted_again(small, built, photos):
    """One entry and one vector of six that an interrupted writer extracted are altered."""
    for number in range(7):
        save(photos / f"new{number}.png", 400 + number)

    def broken(images):
        yield from (described(next(images)) for _ in range(6))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        add(built, broken, SETTINGS)
    with contextlib.closing(sqlite3.connect(built / "index.sqlite")) as database:
        database.execute("UPDATE pending SET width = 99 WHERE id = 2")
        query = "SELECT shard, row FROM pending WHERE id = 5"
        shard, row = database.execute(query).fetchone()
        database.commit()
    with (built / f"vectors-{shard:012x}.npy").open("r+b") as file:
        file.seek(128 + 6 * row)
        file.write(b"\1\2")
    seen = []
    add(
        built,
        lambda images: map(described, (seen.append(0) or image for image in images)),
        SETTINGS,
    )
    assert len(seen) == 1 + 2
    assert_right(built, photos)


def test_vectors_are_on_the_disk_before_the_commit_that_names_them(small, photos, tmp_path):
    """What a power failure needs and a kill cannot show: the order of the flushes."""
    events = []
    fsync, write = os.fsync, shards._write

    def writing(folder, shard, rows, vectors, facts):
        events.append("vectors")
        write(folder, shard, rows, vectors, facts)

    def flushing(handle):
        events.append("flush")
        fsync(handle)

    with pytest.MonkeyPatch.context() as patched, around_commits(lambda: events.append("commit")):
        patched.setattr(shards, "_write", writing)
        patched.setattr(os, "fsync", flushing)
        build(photos, tmp_path / "index", extract, SETTINGS)
    batches = [n for n, event in enumerate(events) if event == "vectors"]
    assert len(batches) == 6
    for at in batches:  # vectors, their header, and the folder where the file is new
        following = events[at + 1 : events.index("commit", at)]
        assert following in (["flush"] * 2, ["flush"] * 3)
    with opening(tmp_path / "index") as database:
        assert database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


KILLS = (
    EXTRACT
    + """
extraction.COMMIT_ROWS, shards.SHARD_BYTES = 10, 48
photos, before, out = sys.argv[1:4]
sys.path.insert(0, "tests")
from interruptions import around_commits, before_writes, death
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
    dying = death(dies_at)
    try:
        with before_writes(dying, also=["listdir"], every=12), around_commits(dying):
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
    assert sum(killed.values()) > 100
    after = contents(tmp_path / "out" / "buildwhole")
    removed = {name: vector for name, vector in before.items() if "/" not in name}
    outcomes = {"build": after, "add": after, "remove": removed}
    seen = {"build": [0, 0], "add": [0, 0], "remove": [0, 0]}
    for name in killed:
        path, call = tmp_path / "out" / name, name.rstrip("0123456789")
        if call == "build" and not is_built(path):
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
