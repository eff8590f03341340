"""train/predict.py: from images to answers, and what is said about files that are no images."""

import csv
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from small_run import write_run

from ggem_jax.files.images import normalise, read_image
from ggem_jax.weights.export import export_vit
from ggem_jax.weights.load import load_vit
from tests.conftest import TINY, one_line
from train import classify, predict
from train.cli import load_config
from train.config import Config
from train.data import open_data
from train.images import Images


def write_digits(folder: Path, images: Images, count: int) -> list[Path]:
    """The first images of a split as files, in the order of their names."""
    folder.mkdir()
    paths = [folder / f"{i:03}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(images.load(i)[0]).save(path)
    return paths


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict") / "run"
    config = load_config(Config, [*TINY, "--epochs", "0.3", "--out", str(folder)], "test")
    return folder, config, classify.train(config, quiet=True).result


def test_files_are_predicted_as_the_evaluation_predicted_them(run, tmp_path, capsys):
    folder, config, result = run
    paths = write_digits(tmp_path / "digits", open_data(config.data)[1], 40)
    out = tmp_path / "out.npz"
    predict.main([str(folder), str(tmp_path / "digits"), "--json", "--descriptors", str(out)])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [Path(entry["path"]) for entry in found["images"]] == paths
    best = [int(entry["top"][0]["class"]) for entry in found["images"]]
    np.testing.assert_array_equal(best, result.probability[:40].argmax(1))
    shares = [entry["top"][0]["probability"] for entry in found["images"]]
    np.testing.assert_allclose(shares, result.probability[:40].max(1), atol=1e-6)
    assert all(len(entry["top"]) == 5 for entry in found["images"])
    assert printed.err == f"40 images; 40 descriptors of 16 numbers in {out}\n"
    with np.load(out) as file:
        assert file["path"].tolist() == [str(path) for path in paths]
        np.testing.assert_allclose(np.linalg.norm(file["descriptor"], axis=1), 1, atol=1e-5)


def test_what_was_written_from_a_run_predicts_the_same(run, tmp_path, capsys):
    folder, config, _ = run
    (path, *_) = write_digits(tmp_path / "digits", open_data(config.data)[1], 3)
    export_vit(load_vit(folder), tmp_path / "out")
    lines = []
    for network in (folder, tmp_path / "out"):
        predict.main([str(network), str(path), "--csv", "--top", "2", "--batch", "2"])
        lines.append(list(csv.DictReader(io.StringIO(capsys.readouterr().out))))
    assert lines[0] == lines[1]
    assert list(lines[0][0]) == ["path", "class_1", "probability_1", "class_2", "probability_2"]


def test_unreadable_images_are_named_and_other_files_are_left_out(run, tmp_path, capsys):
    folder, config, _ = run
    good, damaged, _ = write_digits(tmp_path / "digits", open_data(config.data)[1], 3)
    damaged.write_bytes(damaged.read_bytes()[:60])
    (tmp_path / "digits" / "notes.txt").write_text("no image")
    (tmp_path / "digits" / ".hidden").mkdir()
    (tmp_path / "digits" / ".hidden" / "notes.txt").write_text("no image")
    predict.main([str(folder), str(tmp_path / "digits"), str(tmp_path / "absent.png")])
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].startswith(f"{good}  ")
    assert len(printed.out.splitlines()) == 2
    lines = printed.err.splitlines()
    assert lines[0].startswith(f"not read: {damaged} is not a readable image")
    assert lines[1].startswith(f"not read: {tmp_path / 'absent.png'} is not a readable image")
    assert lines[2] == "2 images, 2 could not be read, 1 other files left out"
    said = one_line(capsys, predict.main, folder, damaged, tmp_path / "absent.png")
    assert said.startswith("train.predict: no image to predict: 2 could not be read, 0 other")


def test_a_folder_is_searched_as_for_an_index(tmp_path):
    """A file that ends as images do is one, so that damage is named and not passed over."""
    folder = tmp_path / "photos"
    for name in ("a/1.jpg", "b.heic", "notes.txt", "@eaDir/1.jpg", ".hidden/2.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("no image")
    (folder / "pipe.png").symlink_to("nowhere")
    Image.new("RGB", (2, 2)).save(folder / "c", format="PNG")
    found, unreadable, others = predict.find_images([folder, folder / "notes.txt"])
    assert found == [folder / "a/1.jpg", folder / "b.heic", folder / "c", folder / "notes.txt"]
    assert unreadable == [f"in {folder}: pipe.png cannot be read: No such file or directory"]
    assert others == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "IMAGES are missing: name files or folders after the run"),
        (("x.png", "--json", "--csv"), "--json and --csv exclude each other"),
        (("x.png", "--descriptors", "out.txt"), "--descriptors must end in .npz, not out.txt"),
        (("x.png", "--top", "0"), "--top must be at least 1, it is 0"),
        (("x.png", "--weights-kind", "ema"), "has no moving average of its weights"),
    ],
)
def test_mistakes_are_one_sentence(run, flags, sentence, capsys):
    assert sentence in one_line(capsys, predict.main, run[0], *flags)


def test_what_is_no_run_is_one_sentence(run, tmp_path, capsys):
    assert "not the folder of a training run" in one_line(capsys, predict.main, tmp_path, "x.png")
    headless = load_vit(run[0], num_classes=0)
    export_vit(headless, tmp_path / "out")
    said = one_line(capsys, predict.main, tmp_path / "out", "x.png")
    assert "has no classes to predict; its descriptors are written with --descriptors" in said


def test_several_labels_have_probabilities_of_their_own(tmp_path, capsys):
    run = write_run(tmp_path / "run", several_labels=True)
    image = tmp_path / "image.png"
    Image.fromarray(np.full((20, 30, 3), (200, 30, 90), np.uint8)).save(image)
    predict.main([str(run), str(image), "--json"])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["several_labels"] is True
    loaded = load_vit(run)
    how = loaded.preprocessing
    pixels = normalise(how.square(read_image(image))[None], mean=how.mean, std=how.std)
    logits = loaded.model.apply(loaded.variables, pixels).logits[0]
    by_class = {each["class"]: each["probability"] for each in found["images"][0]["top"]}
    want = dict(zip(loaded.classes, jax.nn.sigmoid(logits).tolist(), strict=True))
    assert by_class == pytest.approx(want, abs=1e-6)
    assert printed.err == "1 images; an image may have several of the classes, or none\n"
