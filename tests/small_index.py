"""What the tests of an index share: images of one colour, whose descriptor is the mean colour."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ggem_jax.files.images import read_image
from ggem_jax.retrieval.index import extraction, folder, shards
from ggem_jax.retrieval.index.index import Index, build
from ggem_jax.retrieval.index.verification import verify

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"model": "mean colour", "pooling": {"name": "avg", "p": 1.0}}
ODD_NAMES = [
    b"line\nbreak.png",
    b"caf\xc3\xa9.png",
    b"cafe\xcc\x81.png",
    b"latin1-\xe9.png",
    b" %41?#.png",
    b"'quoted\".png",
    "図.png".encode(),
    b"a[1].png",
]


def described(image):
    mean = image.reshape(-1, 3).mean(axis=0, dtype=np.float64) - 99.5
    return (mean / np.linalg.norm(mean)).astype(np.float32)


def extract(images):
    return map(described, images)


def never(images):
    for image in images:
        raise AssertionError(f"an image of {image.shape} was extracted")
    return iter(())


def save(path, seed):
    """An image of one colour, which differs from seed to seed, and a size of its own."""
    rng = np.random.default_rng(seed)
    colour, size = rng.integers(0, 256, 3, np.uint8), rng.integers(1, 9, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), colour)).save(path)


@pytest.fixture
def photos(tmp_path):
    """Twelve images in a folder and two below."""
    for seed in range(12):
        save(tmp_path / "photos" / ("", "a", "b/c")[seed % 3] / f"{seed:02}.png", seed)
    return tmp_path / "photos"


@pytest.fixture
def built(photos, tmp_path):
    build(photos, tmp_path / "my.index", extract, SETTINGS)
    return tmp_path / "my.index"


@pytest.fixture
def small(monkeypatch):
    """Batches and shards so small that twelve images make several."""
    monkeypatch.setattr(extraction, "COMMIT_ROWS", 2)
    monkeypatch.setattr(shards, "SHARD_BYTES", 4 * 6)


def contents(path):
    """Returns the vectors of an index by path."""
    opened = Index.open(path)
    return dict(zip(opened.paths, opened.vectors().take(np.arange(len(opened))), strict=True))


def assert_right(path, photos):
    """Every image of the folder is there, and is the nearest neighbour of itself."""
    opened = Index.open(path, SETTINGS)
    assert sorted(opened.paths) == sorted(
        file.path for file in folder.walk(photos, apart=path).files
    )
    vectors = np.concatenate([block for _, block in opened.vectors().blocks(5)]).astype(np.float32)
    queries = np.stack([described(read_image(photos / name)) for name in opened.paths])
    assert (
        np.argmin(np.linalg.norm(queries[:, None] - vectors, axis=-1), axis=1)
        == np.arange(len(opened))
    ).all()
    np.testing.assert_allclose(vectors, queries, atol=1e-3)
    assert verify(path, deep=True) == ([], [])
    assert_at_rest(path)


def assert_at_rest(path):
    """There is one SQLite file, in rollback mode, which read-only media require."""
    assert [name for name in os.listdir(path) if "sqlite" in name] == ["index.sqlite"]
    assert (path / "index.sqlite").read_bytes()[18:20] == b"\1\1"


def everything(path):
    return {name: (path / name).read_bytes() for name in os.listdir(path)}


def child(code, *, file_blocks=None, **options):
    """Runs code in a process of its own, with files of at most `file_blocks` x 512 bytes."""
    command = [sys.executable, "-c", "import os, sys\n" + textwrap.dedent(code)]
    if file_blocks is not None:
        command = ["sh", "-c", 'ulimit -f "$0"; exec "$@"', str(file_blocks), *command]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


# What a child needs of this file, without pytest and JAX.
EXTRACT = """
import random, signal, time, shutil, json
import numpy as np
from ggem_jax.retrieval.index import extraction, index, shards, store
from ggem_jax.retrieval.index.index import *
from ggem_jax.retrieval.index.verification import verify
SETTINGS = {"model": "mean colour", "pooling": {"name": "avg", "p": 1.0}}
def extract(images):
    for image in images:
        mean = image.reshape(-1, 3).mean(axis=0, dtype=np.float64) - 99.5
        yield (mean / np.linalg.norm(mean)).astype(np.float32)
"""
