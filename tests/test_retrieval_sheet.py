"""The contact sheet of a search, lines of progress and the cache of compiled programs."""

import base64
import io
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ggem_jax.retrieval.tool import compilation, progress

# The sheet


class Page(HTMLParser):
    """Reads a page: its images and text, and that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.tags, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        assert not {"href", "srcset", "onclick", "style"} & set(values)
        if tag == "img":
            self.images.append((values["alt"], values["src"]))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_sheet_holds_everything_it_shows(indexed, run):
    (indexed / "06.png").unlink()
    (indexed / "09.png").write_bytes(b"no image any more")
    queries = ["photos/03.png", "photos/<b>&amp;/01.png"]
    options = [
        "--rerank",
        "superglobal",
        "--candidates",
        "9",
        "--neighbors",
        "2",
        "--html",
        "sheet.html",
    ]
    code, said, told = run(
        "search", "my.index", *queries, "--box", "0,0,30,20", "--box", "1,1,32,24", *options
    )
    assert (code, told) == (0, "")
    assert said.count("the first 12") == 2
    text = Path("sheet.html").read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "b>&amp;"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert len(page.images) == 2 + 2 * 10
    for _, source in page.images:
        kind, data = source.split(",", 1)
        assert kind == "data:image/jpeg;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) <= 320
    whole = "".join(page.texts)
    assert page.texts.count("<b>&amp;/01.png") == 2
    assert (
        page.texts.count("this image is no longer there")
        == page.texts.count("this image cannot be read")
        == 2
    )
    assert all(
        fact in whole
        for fact in (
            str(indexed),
            "superglobal (candidates 9, neighbors 2",
            "backbone efficientnet-lite0",
            "box 1, 1, 32, 24",
        )
    )
    moves = [each for each in page.texts if each[:1] in "▲▼=" and len(each) < 6 and each.strip()]
    assert len(moves) == 24
    assert [path.name for path in Path().glob("*.part")] == []


def test_the_box_of_the_query_is_drawn(twelve_photos):
    from ggem_jax.retrieval.tool.sheet import make_thumbnail

    first = twelve_photos / "00.png"
    plain, drawn = (
        np.asarray(Image.open(io.BytesIO(make_thumbnail(first, box)))).astype(int)
        for box in (None, (8, 4, 28, 20))
    )
    assert np.abs(drawn - plain)[4:7, 10:26].max() > 60
    assert np.abs(drawn - plain)[10:13, 14:20].mean() < 20


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1)])
def test_thumbnails_of_odd_images(tmp_path, size):
    from ggem_jax.retrieval.tool.sheet import make_thumbnail

    Image.new("RGB", size).save(tmp_path / "odd.png")
    assert (
        max(Image.open(io.BytesIO(make_thumbnail(tmp_path / "odd.png", (0, 0, 1, 1)))).size) <= 320
    )


# Progress and the cache


def test_lines_of_progress_tell_the_time_that_is_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines = progress.Lines()
    for now[0], done in ((0.0, 100), (10.0, 110), (31.0, 131), (40.0, 140), (70.0, 170)):
        lines(done, 1000)
    assert (
        capsys.readouterr().err
        == "131 of 1000 images, 14 min left\n170 of 1000 images, 14 min left\n"
    )
    assert [progress.format_seconds(seconds) for seconds in (3, 89, 600, 12000)] == [
        "3 s",
        "89 s",
        "10 min",
        "3 h 20 min",
    ]


def test_the_oldest_programs_are_dropped(tmp_path):
    for age, name in enumerate(("new", "older", "oldest")):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    compilation.drop_oldest(tmp_path, 25)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "older"}


@pytest.mark.parametrize(
    ("base", "inside"),
    [
        ("/somewhere", "/somewhere/ggem-jax/"),
        ("", "/home/me/.cache/ggem-jax/"),
        ("relative", "/home/me/.cache/ggem-jax/"),
    ],
)
def test_the_cache_is_the_users_own(monkeypatch, base, inside):
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setenv("HOME", "/home/me")
    assert str(compilation.cache_folder()).startswith(f"{inside}compiled-")
