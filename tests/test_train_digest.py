"""train/digest.py, run.py: a run resumes with its own data and weights, wherever they lie."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import TINY

from train import classify
from train.cli import Refused, load_config
from train.config import Config
from train.digest import SAMPLED, digest_images
from train.folders import folder
from train.images import hold_in_memory


def train(*flags, data=None):
    config = load_config(Config, [*TINY, "--batch", "8", *map(str, flags)], "test")
    return classify.train(config, data=data, quiet=True)


def drawn(count, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % 3
    return hold_in_memory(rng.integers(0, 256, (count, 8, 8, 3), np.uint8), labels, tuple("abc"))


def changed(one, other):
    return {name for name in one if one[name] != other[name]}


def test_each_part_of_a_digest_is_of_what_its_name_says(class_folders):
    root = class_folders / "train"

    def digest():
        return digest_images(folder(root)["train"])

    first = digest()
    shutil.copytree(root, class_folders / "elsewhere")
    assert digest_images(folder(class_folders / "elsewhere")["train"]) == first
    image = root / "bees" / "bees3.png"
    content = image.read_bytes()
    image.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    assert changed(first, digest()) == {"contents"}
    image.write_bytes(content + b"\0")
    assert changed(first, digest()) == {"contents", "sizes"}
    image.write_bytes(content)
    assert digest() == first
    image.rename(root / "bees" / "bees33.png")
    assert changed(first, digest()) == {"names"}
    images = drawn(30)
    other = hold_in_memory([images.load(i)[0] for i in range(30)], images.labels()[::-1], "abc")
    assert changed(digest_images(images), digest_images(other)) == {"labels"}
    assert changed(digest_images(images), digest_images(drawn(30, seed=1))) == {"contents"}
    assert "contents" in changed(
        digest_images(images), digest_images(images.take(np.roll(np.arange(30), 3)))
    )


def test_contents_of_large_splits_are_sampled_to_the_end():
    count, read = 3 * SAMPLED, []
    images = drawn(count)
    counted = type(images)(
        count, images.classes, lambda i, choose=None: (read.append(i), images.load(i))[1],
        images.labels,
        lambda i: images.stored(i)._replace(read=lambda: read.append(i) or b"x"),
    )  # fmt: skip
    digest_images(counted)
    assert len(read) == SAMPLED
    assert (min(read), max(read)) == (0, count - 1)
    assert max(np.diff(read)) <= 4


@pytest.mark.parametrize("part", ["contents", "labels", "names"])
def test_other_data_with_equal_counts_are_refused(part, class_folders, tmp_path):
    run, root = tmp_path / "run", class_folders / "train"
    flags = ["--data", f"folder:{class_folders}", "--epochs", "4", "--out", run]
    images, evaluation = (folder(class_folders)[name] for name in ("train", "eval"))
    assert not train(*flags, "--stop-after", 3, data=(images, evaluation)).finished
    if part == "contents":
        image = root / "bees" / "bees3.png"
        content = image.read_bytes()
        image.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    elif part == "names":
        (root / "bees" / "bees3.png").rename(root / "bees" / "bees33.png")
    else:
        labels = np.roll(images.labels(), 1)
        images = type(images)(
            len(images), images.classes, images.load, lambda: labels, images.files
        )
    if part != "labels":
        images = folder(class_folders)["train"]
    sentence = rf"run on other training images, by their {part}: give the run its own images again"
    with pytest.raises(Refused, match=sentence):
        train(*flags, data=(images, evaluation))


def test_a_run_its_data_and_its_weights_may_move(class_folders, tmp_path):
    def flags(data, start, out):
        return [
            "--data", f"folder:{data}", "--init", start, "--model.dropout", "0.1", "--batch", "8",
            "--augment.crop", "pad", "--augment.pad", "1", "--epochs", "3", "--log-every", "1",
            "--out", out,
        ]  # fmt: skip

    def run(*more):
        return classify.train(load_config(Config, list(map(str, more)), "test"), quiet=True)

    start = tmp_path / "start"
    train("--data", f"folder:{class_folders}", "--stop-after", 1, "--out", start)
    whole = run(*flags(class_folders, start, tmp_path / "whole"))
    assert not run(*flags(class_folders, start, tmp_path / "run"), "--stop-after", 4).finished
    (tmp_path / "there").mkdir()
    new = [
        old.rename(tmp_path / "there" / name)
        for old, name in ((class_folders, "photos"), (start, "first"), (tmp_path / "run", "second"))
    ]
    # other weights under another name are another start
    with pytest.raises(Refused, match=r"other settings .init .*start there, .*whole now"):
        run(*flags(new[0], tmp_path / "whole", new[2]))
    resumed = run(*flags(*new))
    assert resumed.finished
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(a, b)
    kept = (new[2] / "config.json").read_text()
    assert json.loads(kept)["data"]["source"] == f"folder:{new[0]}"
    assert str(class_folders) not in kept


def test_a_run_that_decoded_images_whole_is_not_resumed_otherwise(tmp_path, class_folders):
    """Of an earlier version."""
    flags = ["--data", f"folder:{class_folders}", "--epochs", "4", "--out", tmp_path / "run"]
    assert not train(*flags, "--stop-after", 3, "--data.no-shrink").finished
    file = tmp_path / "run" / "config.json"
    kept = json.loads(file.read_text())
    assert kept["data"].pop("shrink") is False
    file.write_text(json.dumps(kept))
    with pytest.raises(Refused, match=r"data\.shrink False there, True now"):
        train(*flags)
    assert train(*flags, "--data.no-shrink").finished


def test_a_run_without_a_digest_resumes_where_its_data_lay_before(tmp_path, class_folders):
    """Of an earlier version."""
    flags = ["--data", f"folder:{class_folders}", "--epochs", "4", "--out", tmp_path / "run"]
    assert not train(*flags, "--stop-after", 3).finished
    file = tmp_path / "run" / "config.json"
    kept = json.loads(file.read_text())
    del kept["data_found"]["digest"], kept["data_found"]["weights"]
    file.write_text(json.dumps(kept))
    moved = class_folders.rename(tmp_path / "moved")
    with pytest.raises(Refused, match=r"other settings .data.source"):
        train(*["--data", f"folder:{moved}"], *flags[2:])
    moved.rename(class_folders)
    assert train(*flags).finished
