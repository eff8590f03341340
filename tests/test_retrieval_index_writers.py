"""Full disks, read-only folders, and readers and writers at once."""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import sqlite3
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from interruptions import before_writes
from small_index import (
    EXTRACT,
    SETTINGS,
    assert_at_rest,
    assert_right,
    child,
    contents,
    described,
    extract,
    never,
    save,
)

from ggem_jax.retrieval.index import (
    index,
    transactions,
    verification,
)
from ggem_jax.retrieval.index import reading as reading_module
from ggem_jax.retrieval.index.index import Index, add, build, info, remove
from ggem_jax.retrieval.index.reading import reading
from ggem_jax.retrieval.index.report import Report
from ggem_jax.retrieval.index.store import IndexRefused
from ggem_jax.retrieval.index.verification import verify

# Full disks and locked ones


def full_after(writes):
    """A disk that takes a number of writes and is full then, for those of SQLite too."""
    left = [writes]

    def hook():
        left[0] -= 1
        return errno.ENOSPC if left[0] < 0 else 0

    return before_writes(hook), lambda: left[0] < 0


def test_a_disk_that_fills_at_any_write(small, photos, tmp_path):
    """Each call is refused in one sentence or complete; the same call completes later."""
    ends = {"build": [0, 0], "add": [0, 0], "remove": [0, 0]}
    build(photos, tmp_path / "before", extract, SETTINGS)
    before = contents(tmp_path / "before")
    save(photos / "new.png", 90)
    build(photos, tmp_path / "after", extract, SETTINGS)
    after = contents(tmp_path / "after")
    calls = {
        "build": (lambda path: build(photos, path, extract, SETTINGS), None, after),
        "add": (lambda path: add(path, extract, SETTINGS), before, after),
        "remove": (
            lambda path: remove(path, ["a", "b"]),
            before,
            {name: vector for name, vector in before.items() if "/" not in name},
        ),
    }
    for name, (call, old, new) in calls.items():
        for writes in range(0, 1000, 5):
            path = tmp_path / f"{name}{writes}"
            if old is not None:
                shutil.copytree(tmp_path / "before", path)
            disk, is_full = full_after(writes)
            with disk:
                try:
                    call(path)
                    refused = ""
                except IndexRefused as error:
                    refused = str(error)
            assert not refused or "could not be written: " in refused
            assert "\n" not in refused
            if not is_full():
                break
            ends[name][not refused] += 1
            if old is None and refused:
                with pytest.raises(IndexRefused, match="holds no"):
                    Index.open(path)
            else:
                np.testing.assert_equal(contents(path), old if refused else new)
            with contextlib.suppress(IndexRefused):
                call(path)
            np.testing.assert_equal(contents(path), new)
            assert verify(path) == ([], [])
        assert ends[name][0] > 4
        assert_at_rest(path)


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


def test_an_index_is_read_on_a_full_disk_after_a_writer_that_failed_there(built):
    """The writer leaves WAL mode, and its index of the WAL finds no room (12 KiB for files)."""
    run = child(
        EXTRACT
        + f"path = {str(built)!r}\n"
        + "try:\n    remove(path, ['a'])\nexcept ValueError as error:\n    print(error)\n"
        + "there = os.path.exists(f'{path}/index.sqlite-shm')\n"
        + "print(there, len(Index.open(path)), verify(path).damage)",
        file_blocks=24,
    )
    output, _ = run.communicate(timeout=60)
    refused, state = output.splitlines()
    assert "could not be written: No space left on device; nothing is lost" in refused
    assert state == "True 12 []"
    remove(built, ["a"])
    assert len(Index.open(built)) == 8
    assert_at_rest(built)


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


def copy_of_a_killed_writer(path, photos, small_copy):
    """What is in the folder of an index while a writer has committed two batches of a third."""
    for number in range(6):
        save(photos / f"new{number}.png", 400 + number)

    def copying(images):
        for number, image in enumerate(images):
            if number == 5:
                shutil.copytree(path, small_copy)
            yield described(image)

    add(path, copying, SETTINGS)
    assert {"index.sqlite-wal", "index.sqlite-shm"} <= set(os.listdir(small_copy))
    return small_copy


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to become another user")
@pytest.mark.parametrize("missing", [[], ["-shm"], ["-wal", "-shm"]], ids=str)
def test_what_a_killed_writer_leaves_is_read_where_nothing_may_be_written(
    small, built, photos, tmp_path, missing
):
    """Without the WAL the file is what the last checkpoint made it: complete, in WAL mode."""
    expected = contents(built)
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o755)
        path = copy_of_a_killed_writer(built, photos, Path(open_to_all) / "killed")
        for ending in missing:
            (path / f"index.sqlite{ending}").unlink()
        assert (path / "index.sqlite").read_bytes()[18:20] == b"\2\2"
        code = f"""
        import mmap  # while it may
        os.setgid(65534)
        os.setuid(65534)
        try:
            print(sorted(Index.open({str(path)!r}).paths) == {sorted(expected)!r})
            print(verify({str(path)!r}).damage)
        except ValueError as error:
            print(error)
        """
        output, _ = child(EXTRACT + textwrap.dedent(code)).communicate(timeout=60)
        if missing == ["-shm"]:
            assert "index.sqlite-wal holds what an interrupted writer wrote" in output
            assert output.count("\n") == 1
        else:
            assert output == "True\n[]\n"
        add(path, extract, SETTINGS)  # by one who may write
        assert_right(path, photos)


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


def test_readers_see_the_last_version_while_a_writer_commits_batches(small, built, photos):
    before, seen = contents(built), []
    for number in range(6):
        save(photos / f"new{number}.png", 400 + number)

    def reading(images):
        for image in images:
            np.testing.assert_equal(contents(built), before)
            assert verify(built).damage == []
            seen.append(verify(built).notes)
            yield described(image)

    assert add(built, reading, SETTINGS).added == 6
    assert [len(notes) for notes in seen] == [0, 0, 1, 1, 1, 1]
    assert "holds 4 images of a writer that is at work or was interrupted" in seen[-1][0]
    assert_right(built, photos)


def test_a_file_that_stays_locked_is_not_called_damaged(built, monkeypatch):
    """As by a program of another kind, such as a backup."""
    monkeypatch.setattr(reading_module, "_WAIT_SECONDS", 0.1)
    with contextlib.closing(sqlite3.connect(built / "index.sqlite")) as other:
        other.execute("BEGIN EXCLUSIVE")
        for call in (Index.open, verify, lambda path: add(path, never, SETTINGS)):
            with pytest.raises(IndexRefused, match=r"index\.sqlite cannot be read: .* is locked$"):
                call(built)
    assert len(Index.open(built)) == 12


def test_a_reader_in_the_middle_holds_no_writer_up_and_the_next_one_tidies(built, photos):
    save(photos / "new.png", 90)
    with reading(built, copy=True):
        assert add(built, extract, SETTINGS).added == 1
        assert_at_rest(built)
    database = transactions.connect(built / "index.sqlite", "mode=ro")
    save(photos / "newer.png", 91)

    def meanwhile(images):
        for image in images:
            yield described(image)
        database.execute("SELECT 1 FROM images").fetchall()  # stays open, in WAL mode

    with contextlib.closing(database), pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading_module, "_WAIT_SECONDS", 0.1)
        assert add(built, meanwhile, SETTINGS).added == 1
    assert len(Index.open(built)) == 14
    assert add(built, never, SETTINGS) == Report(unchanged=14)
    assert_right(built, photos)


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
    disk, _ = full_after(0)
    with disk, pytest.raises(IndexRefused, match="could not be written: "):
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
