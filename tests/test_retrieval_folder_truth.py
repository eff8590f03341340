"""Nothing of a folder is lost, stale or uncounted: changed files, exclusions, old formats."""

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ggem_jax.retrieval.index import folder
from ggem_jax.retrieval.index.exclusions import DEFAULTS, Exclusions
from ggem_jax.retrieval.index.folder import File
from ggem_jax.retrieval.index.index import Index, add, build, info, remove
from ggem_jax.retrieval.index.report import Report
from ggem_jax.retrieval.index.store import IndexRefused
from ggem_jax.retrieval.index.verification import verify

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"model": "mean colour"}


def extract(images):
    for image in images:
        mean = image.reshape(-1, 3).mean(axis=0, dtype=np.float64) - 99.5
        yield (mean / np.linalg.norm(mean)).astype(np.float32)


def never(images):
    for image in images:
        raise AssertionError(f"an image of {image.shape} was extracted")
    return iter(())


def save(path, seed, form=None, **options):
    colour = np.random.default_rng(seed).integers(0, 256, 3, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), colour)).save(path, form, **options)


def stays(path):
    """Sets the times of a file back to a fixed moment, as tar and rsync do."""
    os.utime(path, ns=(10**18, 10**18))


@pytest.fixture
def photos(tmp_path):
    for seed in range(6):
        save(tmp_path / "photos" / ("", "a", "b/c")[seed % 3] / f"{seed}.bmp", seed)
    return tmp_path / "photos"


@pytest.fixture
def built(photos, tmp_path):
    build(photos, tmp_path / "index", extract, SETTINGS)
    return tmp_path / "index"


def contents(path):
    opened = Index.open(path)
    return dict(zip(opened.paths, opened.vectors().take(np.arange(len(opened))), strict=True))


def total(report):
    counted = report.added + report.updated + report.unchanged + len(report.skipped)
    counted += sum(report.not_images.values()) + sum(report.excluded.values())
    return counted + report.special


def count_entries(root):
    """Everything in a tree that is no folder, counted by `find`, apart from long paths."""
    found = subprocess.run(
        ["find", root, "!", "-type", "d", "-printf", "x"], capture_output=True, check=True
    )
    return len(found.stdout)


# Changed files


def test_files_that_swap_places_with_equal_sizes_and_times(photos, tmp_path):
    for name in ("0.bmp", "3.bmp"):
        stays(photos / name)
    build(photos, tmp_path / "index", extract, SETTINGS)
    before = contents(tmp_path / "index")
    os.rename(photos / "0.bmp", tmp_path / "x")
    os.rename(photos / "3.bmp", photos / "0.bmp")
    os.rename(tmp_path / "x", photos / "3.bmp")
    assert build(photos, tmp_path / "index", never, SETTINGS).updated == 2
    after = contents(tmp_path / "index")
    np.testing.assert_equal(after["0.bmp"], before["3.bmp"])
    np.testing.assert_equal(after["3.bmp"], before["0.bmp"])


def test_a_byte_changed_in_place_with_the_time_kept(photos, built):
    """As `exiftool -P -n -Orientation=6` does: equal size, mtime and inode; ctime tells."""
    file = photos / "0.bmp"
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-2] ^= 0xFF
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    now = file.stat()
    assert (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert now.st_ino == before.st_ino
    assert add(built, extract, SETTINGS).updated == 1


def test_deep_finds_what_no_number_tells(photos, built, monkeypatch):
    """A file system without ctime, or a clock that was set back: only the content differs."""
    stamps = {path.name: File.of("", path.stat()) for path in photos.rglob("*.bmp")}
    save(photos / "0.bmp", 77)
    as_before = classmethod(
        lambda cls, path, status: (
            stamps[os.path.basename(path)]._replace(path=path)
            if os.path.basename(path) in stamps
            else cls(path, 0, 0, 0, 0)
        )
    )
    monkeypatch.setattr(File, "of", as_before)
    assert add(built, never, SETTINGS) == Report(unchanged=6)
    (note,) = verify(built, deep=True).notes
    assert "1 image (0.bmp)" in note
    assert "add with deep" in note
    assert add(built, extract, SETTINGS, deep=True) == Report(updated=1, unchanged=5)
    assert verify(built, deep=True) == ([], [])


def test_a_file_that_changes_while_it_is_read_is_no_entry(photos, tmp_path, monkeypatch):
    really = folder.decode_image

    def meanwhile(file, *, name, **options):
        if name == "0.bmp":
            with open(photos / name, "ab") as handle:
                handle.write(b"more")
        return really(file, name=name, **options)

    monkeypatch.setattr(folder, "decode_image", meanwhile)
    report = build(photos, tmp_path / "index", extract, SETTINGS)
    assert report.skipped == [("0.bmp", "0.bmp changed while it was read: run again")]
    monkeypatch.undo()
    assert build(photos, tmp_path / "index", extract, SETTINGS) == Report(added=1, unchanged=5)


# What cannot be reached


@pytest.mark.parametrize("how", ["empty", "gone"])
def test_a_part_that_is_not_mounted_keeps_its_entries(photos, built, tmp_path, how):
    before = contents(built)
    os.rename(photos / "b", tmp_path / "away")
    if how == "empty":
        (photos / "b").mkdir()
    for report in (build(photos, built, never, SETTINGS), add(built, never, SETTINGS)):
        assert report == Report(unchanged=4)
        assert report.unreachable == ["b/c/2.bmp", "b/c/5.bmp"]
    np.testing.assert_equal(contents(built), before)
    if how == "empty":
        (photos / "b").rmdir()
    os.rename(tmp_path / "away", photos / "b")
    report = add(built, never, SETTINGS)
    assert (report, report.unreachable) == (Report(unchanged=6), [])
    shutil.rmtree(photos / "b")
    report = build(photos, built, never, SETTINGS, prune=True)
    assert (report, report.unreachable) == (Report(unchanged=4, removed=2), [])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to become another user")
def test_folders_and_files_without_rights_are_skipped_and_named(photos):
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o755)
        _test_rights(Path(shutil.copytree(photos, Path(open_to_all) / "photos")))


def _test_rights(photos):
    save(photos / "listed" / "x.bmp", 20)
    save(photos / "closed" / "x.bmp", 21)
    (photos / "secret.txt").write_text("secret")
    os.chmod(photos / "listed", 0o744)  # its names may be read, and nothing in it
    os.chmod(photos / "closed", 0o700)
    os.chmod(photos / "0.bmp", 0o600)
    os.chmod(photos / "secret.txt", 0o600)
    code = f"""
        import os, sys, numpy as np
        from PIL import Image
        Image.init()
        from ggem_jax.retrieval.index import folder
        os.setgid(65534)
        os.setuid(65534)
        listing = folder.walk(folder.Path({str(photos)!r}), apart=folder.Path("/nowhere"))
        found = folder.decode(folder.Path({str(photos)!r}), listing.files, (), workers=2)
        skipped = listing.skipped + [each for each in found if isinstance(each, folder.Skipped)]
        print(sorted(skipped), listing.count())
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.stderr == ""
    expected = [
        (name, f"{name} cannot be read: Permission denied")
        for name in ("0.bmp", "closed", "listed/x.bmp", "secret.txt")
    ]
    assert run.stdout == f"{[folder.Skipped(*each) for each in expected]} 9\n"


def test_a_path_that_is_too_long_is_skipped_and_named(photos, tmp_path):
    at = os.open(photos, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=at)
        deeper = os.open("d" * 250, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = deeper
    os.close(at)
    report = build(photos, tmp_path / "index", extract, SETTINGS)
    assert report.added == 6
    ((path, why),) = report.skipped
    assert path.startswith("dddd")
    assert why.endswith("cannot be read: File name too long")
    assert total(report) == report.files


def test_a_file_that_cannot_be_opened_for_its_kind_is_skipped(photos, tmp_path, monkeypatch):
    (photos / "unknown").write_bytes(b"?")

    def failing(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folder, "is_image", failing)
    report = build(photos, tmp_path / "index", extract, SETTINGS)
    assert report.skipped == [("unknown", "unknown cannot be read: Input/output error")]


# What is left out


def test_thumbnails_bins_and_hidden_folders_are_left_out_and_counted(photos, tmp_path):
    for number, name in enumerate(
        ("@eaDir/0.bmp/XL.bmp", "#recycle/x.bmp", ".thumbnails/x.bmp", "node_modules/x/y.bmp",
         "a/@eaDir/z.bmp", ".x.bmp")
    ):  # fmt: skip
        save(photos / name, 40 + number)
    report = build(photos, tmp_path / "index", extract, SETTINGS)
    assert (report.added, report.files) == (6, 12)
    assert report.excluded == {"@eaDir": 2, "#recycle": 1, ".*": 2, "node_modules": 1}
    assert add(tmp_path / "index", extract, SETTINGS, include=["@eaDir"]).added == 2
    assert info(tmp_path / "index")["exclude"] == [each for each in DEFAULTS if each != "@eaDir"]
    report = add(tmp_path / "index", never, SETTINGS, exclude=["@eaDir"])
    assert (report.removed, report.unchanged, report.unreachable) == (2, 6, [])
    assert report.notes == (
        "entries that are excluded now were dropped: 2 images (@eaDir/0.bmp/XL.bmp,"
        " a/@eaDir/z.bmp)",
    )


def test_exclusions_are_kept_and_lifted(photos, built):
    assert build(photos, built, never, SETTINGS, exclude=["a", "b/c/2*"]).removed == 3
    report = add(built, never, SETTINGS)
    assert (report, report.excluded) == (Report(unchanged=3), {"a": 2, "b/c/2*": 1})
    assert sorted(Index.open(built).paths) == ["0.bmp", "3.bmp", "b/c/5.bmp"]
    with pytest.raises(IndexRefused, match="a is excluded by a: include that pattern first"):
        add(built, extract, SETTINGS, folder=photos / "a")
    assert add(built, extract, SETTINGS, include=[str(photos / "b/c/2*")]).added == 1
    assert add(built, extract, SETTINGS, include=["a/1.bmp"]).added == 0  # `a` is not walked
    assert add(built, extract, SETTINGS, include=["a"]).added == 2
    for pattern in ("/", str(photos), ".", "./"):
        with pytest.raises(IndexRefused, match="would be the whole folder"):
            add(built, never, SETTINGS, exclude=[pattern])
    for pattern in ("..", "../a", "a/.", "a/../b"):
        with pytest.raises(IndexRefused, match="would match nothing"):
            add(built, never, SETTINGS, exclude=[pattern])
    with pytest.raises(
        IndexRefused, match=r"there is no image .* \(files that are excluded: 6\): is it"
    ):
        add(built, never, SETTINGS, exclude=["*"])
    assert add(built, never, SETTINGS, exclude=["./a"]).removed == 2
    assert info(built)["exclude"][-1] == "/a"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 0}, "workers must be a whole number of at least 1, not 0"),
        ({"workers": -1}, "workers must be a whole number of at least 1, not -1"),
        ({"workers": 1.5}, "workers must be a whole number of at least 1, not 1.5"),
        ({"max_megapixels": float("nan")}, "max_megapixels must be above 0, not nan"),
        ({"max_megapixels": 0}, "max_megapixels must be above 0, not 0"),
    ],
)
def test_options_out_of_range_are_refused(photos, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        build(photos, tmp_path / "new", never, SETTINGS, **options)
    assert not (tmp_path / "new").exists()


def test_remove_leaves_images_out_until_they_are_included(photos, built):
    remove(built, ["a", "0.bmp", "b/*5*"])
    assert info(built)["exclude"][len(DEFAULTS) :] == ["/a", "/0.bmp", "/b/*5*"]
    save(photos / "a" / "new.bmp", 60)
    save(photos / "deeper" / "a" / "other.bmp", 61)
    assert build(photos, built, extract, SETTINGS).added == 1  # only the path a is left out
    assert add(built, extract, SETTINGS, include=["a"]).added == 3
    assert add(built, extract, SETTINGS, include=["0.bmp", "b/*5*"]).added == 2


def test_a_name_with_glob_characters_is_removed_alone(photos, built):
    save(photos / "[0-9].bmp", 62)
    add(built, extract, SETTINGS)
    remove(built, ["[0-9].bmp"])
    assert add(built, never, SETTINGS) == Report(unchanged=6)


@pytest.mark.parametrize(
    ("patterns", "path", "found"),
    [
        (["x"], "x", True), (["x"], "a/x", True), (["x"], "a/xy", False), (["/x"], "a/x", False),
        (["/x"], "x", True), (["a/*"], "a/b/c", True), (["*/x"], "x", False), ([".*"], ".x", True),
        ([".*"], "a/.x", True), ([".*"], "a.b/x", False), (["x/"], "b/x", True),
        (["*.lrdata"], "a/Previews.lrdata", True), (["X"], "x", False),
    ],
)  # fmt: skip
def test_patterns(patterns, path, found):
    assert (Exclusions(tuple(patterns)).find(path) is not None) == found


# All oddities at once


def make_odd_tree(root, count=200):
    """A tree with every oddity at once."""
    for number in range(count):
        save(root / f"d{number % 7}" / f"{number:05}.png", number)
    save(root / "no ending", 1000, "JPEG")
    save(root / "photo.data", 1001, "WEBP")
    save(root / "x.jfif", 1002, "JPEG")
    save(root / "UPPER.PNG", 1003)
    shutil.copy(root / "UPPER.PNG", root / "copy.png")
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (root / "text.png").write_text("no image")
    (root / "empty.gif").write_bytes(b"")
    (root / "notes.txt").write_text("Pillow, PNG and BM are words of this text")
    (root / "BMW.txt").write_text("BM is how a bitmap begins")
    (root / "x.h").write_text("#define x_width 3\n")
    (root / "film.mp4").write_bytes(bytes(100_000))
    (root / "no ending 2").write_bytes(b"")
    (root / "odd.an\nending").write_bytes(b"x")
    (root / os.fsdecode(b"latin-\xe9.txt")).write_text("x")
    os.mkfifo(root / "pipe")
    os.mkfifo(root / "pipe.jpg")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as made:
        here = os.getcwd()
        os.chdir(root)
        made.bind("socket")
        os.chdir(here)
    (root / "dangling").symlink_to("nowhere")
    (root / "dangling.jpg").symlink_to("nowhere.jpg")
    (root / "self").symlink_to("self")
    (root / "again").symlink_to("d1")
    (root / "up").symlink_to(".")
    (root / "same.png").symlink_to("UPPER.PNG")
    os.link(root / "UPPER.PNG", root / "hard.png")
    save(root / "folder.jpg" / "inside.png", 1004)
    for name in (".hidden/a/x.png", "@eaDir/y.png", ".DS_Store", "node_modules/z/readme.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "@eaDir" / "link").symlink_to("..")


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_file_of_an_odd_tree_is_accounted_for(tmp_path, count):
    root, path = tmp_path / "tree", tmp_path / "tree" / "my.index"
    make_odd_tree(root, count)
    before = count_entries(root)
    report = build(root, path, extract, SETTINGS)
    # the walk sees the lock and the pending files of the index itself
    assert report.excluded.pop("the index") >= 1
    assert total(report) == before
    assert report.not_images == {".txt": 3, ".h": 1, ".mp4": 1, "": 1, "other": 1}
    assert report.excluded == {".*": 2, "@eaDir": 2, "node_modules": 1}
    assert report.special == 6  # two links to folders, two to nowhere, a pipe and a socket
    assert sorted(skipped.path for skipped in report.skipped) == [
        "broken.jpg", "dangling.jpg", "empty.gif", "pipe.jpg", "text.png",
    ]  # fmt: skip
    assert report.added == count + 8
    assert {"no ending", "photo.data", "x.jfif", "folder.jpg/inside.png"} <= set(
        Index.open(path).paths
    )
    again = build(root, path, never, SETTINGS)
    assert (again.unchanged, total(again)) == (count + 8, again.files)


def test_files_that_are_no_images_are_not_opened_again(photos, tmp_path, monkeypatch):
    (photos / "film.mp4").write_bytes(bytes(1000))
    (photos / "photo.data").write_bytes((photos / "0.bmp").read_bytes())
    opened, really = [], folder.is_image

    def opening(file):
        opened.append(file.name)
        return really(file)

    monkeypatch.setattr(folder, "is_image", opening)
    assert build(photos, tmp_path / "index", extract, SETTINGS).added == 7
    assert [os.path.basename(name) for name in opened] == ["film.mp4", "photo.data"]
    opened.clear()
    assert build(photos, tmp_path / "index", never, SETTINGS).not_images == {".mp4": 1}
    assert opened == []
    assert add(tmp_path / "index", never, SETTINGS, deep=True).unchanged == 7
    assert len(opened) == 2
    save(photos / "film.mp4", 3, "PNG")
    assert add(tmp_path / "index", extract, SETTINGS).added == 1
