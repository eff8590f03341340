"""neupims/files.py: a file is complete, or unchanged."""

import os

import pytest

from neupims.files import write_text


def test_a_file_is_replaced_as_a_whole_with_the_rights_of_a_new_one(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    before = os.umask(0o027)
    try:
        write_text(path, "ä\n")
    finally:
        os.umask(before)
    assert path.read_bytes() == "ä\n".encode()
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["page.html"]


def test_what_cannot_be_written_names_its_path_and_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="absent") as caught:
        write_text(tmp_path / "absent" / "page.html", "new")
    assert caught.value.filename == str(tmp_path / "absent" / "page.html")
    path = tmp_path / "page.html"
    path.write_text("old")
    monkeypatch.setattr(
        "pathlib.Path.replace",
        lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(OSError, match="No space") as caught:
        write_text(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]
    if os.path.exists("/dev/full"):
        with pytest.raises(OSError, match="No space") as caught:
            write_text("/dev/full", "new")
        assert caught.value.filename == "/dev/full"
