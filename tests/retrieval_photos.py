"""Small images and a descriptor of them that needs no network, for tests of the retrieval tool."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ggem_jax.descriptors.settings import DescriptorSettings
from ggem_jax.files.images import UnreadableImage
from ggem_jax.retrieval.__main__ import main
from ggem_jax.retrieval.index import describing
from ggem_jax.retrieval.tool import commands


class Colours:
    """Describes an image by its mean colour in a grid of 2 x 2, without a network."""

    def __init__(self, settings, batch=None):
        assert settings == DescriptorSettings(
            **{name: getattr(settings, name) for name in settings.record()}
        )

    def fit(self, height, width):
        return None

    def __call__(self, images):
        for image in images:
            if min(image.shape[:2]) < 2:
                yield UnreadableImage("too thin")
                continue
            rows, columns = image.shape[0] // 2, image.shape[1] // 2
            parts = [
                image[i * rows :][:rows, j * columns :][:, :columns].mean((0, 1))
                for i in (0, 1)
                for j in (0, 1)
            ]
            vector = np.concatenate(parts) - 99.5
            yield (vector / np.linalg.norm(vector)).astype(np.float32)


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setattr(describing, "make_extractor", Colours)
    monkeypatch.setattr(commands, "keep_compiled_programs", lambda: None)


def pattern(seed, size=(24, 32)):
    rng = np.random.default_rng(seed)
    return np.kron(
        rng.integers(0, 256, (2, 2, 3), np.uint8),
        np.ones((size[0] // 2, size[1] // 2, 1), np.uint8),
    )


@pytest.fixture
def twelve_photos(tmp_path, monkeypatch):
    """Twelve images, with names that HTML and terminals have to escape; the folder above is the
    current one.
    """
    monkeypatch.chdir(tmp_path)
    for seed in range(12):
        path = tmp_path / "photos" / ("", "<b>&amp;", 'quote"s')[seed % 3] / f"{seed:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pattern(seed)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def nine_photos(colours, tmp_path, monkeypatch):
    """The folder `photos` of nine images in the working directory and no network."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("photos").mkdir()
    for number in range(9):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(f"photos/{number}.png")


@pytest.fixture
def run(capsys):
    """Runs a command in this process: its exit code, output and errors."""

    def started(*arguments):
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return started


@pytest.fixture
def indexed(colours, twelve_photos, run):
    assert run("index", twelve_photos, "-o", "my.index") == (
        0,
        "my.index: 12 added, 0 updated, 0 unchanged, 0 reused, 0 removed, 0 skipped\n",
        "",
    )
    return twelve_photos


def json_of(run, *arguments):
    code, said, _ = run(*arguments, "--json")
    return code, json.loads(said)


def unit(rng, *shape):
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
