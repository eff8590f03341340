"""train/folders.py, labels.py, tfds.py: nested folders, tables of labels, other labels of TFDS."""

import io
import json
from typing import ClassVar

import numpy as np
import pytest
from conftest import TINY, one_line
from PIL import Image

from eval import classify as eval_classify
from train import classify
from train.batches import eval_batches, train_batches
from train.cli import Refused, load_config
from train.config import Config, Data
from train.data import open_data, open_disjoint
from train.evaluate import Predictions
from train.folders import folder
from train.labels import read_labels
from train.step import make_steps


def save(path, level=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level,) * 3).save(path, **options)


def test_images_of_any_depth_and_ending_are_found_and_the_rest_is_counted(class_folders, capsys):
    train = class_folders / "train"
    save(train / "ants" / "2021" / "may" / "deep.png")
    for ending in ("jfif", "ppm", "tga", "jp2", "avif"):
        save(train / "bees" / f"one.{ending}")
    save(train / "cows" / "noending", format="PNG")
    save(train / "stray.png")
    save(train / "cows" / "@eaDir" / "thumbnail.png")
    (train / "cows" / ".DS_Store").write_bytes(b"")
    (train / "cows" / "notes.txt").write_text("no image")
    (train / "cows" / "gone.link").symlink_to("nowhere")
    images = folder(class_folders)["train"]
    assert np.bincount(images.labels()).tolist() == [11, 15, 11]
    assert {images.load(i)[0].shape[2] for i in range(len(images))} == {3}
    assert capsys.readouterr().err.splitlines() == [
        f"left out of {train}: 1 .txt that are no images; 1 that .* names; 1 that @eaDir names;"
        " 1 images in no class folder; 1 links and special files"
    ]


def test_images_keep_the_order_that_runs_before_had(class_folders):
    """By class and name, or by number where all names are numbers."""
    images = folder(class_folders)["train"]
    names = [images.stored(i).name for i in range(len(images))]
    assert names == sorted(names)
    for number, name in enumerate(("10", "9", "100")):
        save(class_folders / "numbers" / "ab"[number % 2] / f"{name}.png", number)
    images = folder(class_folders / "numbers")["train"]
    assert [images.stored(i).name for i in range(3)] == ["b/9.png", "a/10.png", "a/100.png"]
    assert [images.load(i)[1] for i in range(3)] == [1, 0, 0]


def test_classes_that_are_not_evaluated_on_are_a_note(class_folders, capsys):
    for path in (class_folders / "test" / "bees").iterdir():
        path.unlink()
    train, evaluation = open_data(Data(source=f"folder:{class_folders}"))
    assert train.classes == evaluation.classes == ("ants", "bees", "cows")
    assert (
        sorted(set(evaluation.labels()))
        == [0, 2]
        == sorted({evaluation.load(i)[1] for i in (0, 7)})
    )
    note = "1 of 3 classes have no image to evaluate on: bees\n"
    assert capsys.readouterr().err == note
    (class_folders / "test" / "bees").rmdir()
    assert len(open_data(Data(source=f"folder:{class_folders}"))[1]) == 8
    assert capsys.readouterr().err == note


@pytest.fixture
def table(tmp_path):
    """24 images that are light or dark, red or not: four sets of labels."""
    rng, rows = np.random.default_rng(0), ["file_name,colours"]
    for i in range(24):
        pixels = rng.integers(0, 60, (8, 8, 3), np.uint8) + np.uint8(120 * (i % 2))
        pixels[..., 0] += np.uint8(70 * (i // 2 % 2))
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        labels = ["light"] * (i % 2) + ["red"] * (i // 2 % 2)
        rows.append(f"images/{i}.png,{';'.join(labels)}")
    (tmp_path / "several.csv").write_text("\n".join(rows))
    return tmp_path


def test_a_table_gives_one_label_of_each_image(table):
    rows = [f"images/{i}.png\t{(10, 9)[i % 2]}\t{'ab'[i % 2]}" for i in range(24)]
    (table / "one.tsv").write_text("image\tlabel\tletter\n" + "\n".join([*rows, rows[3]]))
    images = read_labels(f"{table}/one.tsv", Data())
    assert images.classes == ("9", "10")
    assert images.labels().tolist() == [1, 0] * 12
    assert images.load(1)[1] == 0
    assert images.load(1)[0].mean() > 100
    data = Data(source=f"csv:{table}/one.tsv", label_key="letter", holdout=0.25)
    train, held = open_data(data)
    assert (len(train), len(held), train.classes) == (18, 6, ("a", "b"))
    (table / "wrong.tsv").write_text("image\tlabel\n" + "images/0.png\ta\nimages/0.png\tb\n")
    with pytest.raises(
        Refused, match=r"gives images/0.png the labels a and b: .*--label-separator"
    ):
        read_labels(f"{table}/wrong.tsv", Data())
    (table / "wrong.tsv").write_text("image\tlabel\n" + "images/0.png\t\nno.png\tb\n")
    with pytest.raises(Refused, match=r"images/0.png \(no label\), no.png \(no image\)"):
        read_labels(f"{table}/wrong.tsv", Data())
    (table / "wrong.tsv").write_text("image\tlabel\n" + "x" * 5000 + "\ta\n")
    with pytest.raises(Refused, match=r"^1 of the rows of .* are not complete: x+ \(no image"):
        read_labels(f"{table}/wrong.tsv", Data())
    with pytest.raises(
        Refused, match=r"no column colour with the labels; .*: choose with --label-"
    ):
        read_labels(f"{table}/one.tsv", Data(label_key="colour"))


SEVERAL = ["--label-key", "colours", "--label-separator", ";", "--batch", "8"]


def test_several_labels_train_with_a_sigmoid_and_are_measured_by_map(table, tmp_path, capsys):
    run, source = tmp_path / "run", f"csv:{table}/several.csv"
    flags = [*TINY, "--data", source, *SEVERAL, "--epochs", "20", "--optimizer.lr", "0.01"]
    flags += ["--eval-every", "20", "--data.holdout", "0.34", "--out", str(run)]
    trained = classify.train(load_config(Config, flags, "test"), quiet=True)
    predictions = trained.result
    assert predictions.label.shape == predictions.probability.shape == (8, 2)
    assert predictions.measures()["map"] > 0.9
    capsys.readouterr()
    eval_classify.main([str(run), "--json"])
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert found["map"] == pytest.approx(predictions.measures()["map"])
    assert [each["name"] for each in found["by_class"]] == ["light", "red"]
    eval_classify.main([str(run)])
    assert f"mAP {found['map']:.2%}" in capsys.readouterr().out
    assert "evaluate one at a time" in one_line(capsys, eval_classify.main, run, run)
    with pytest.raises(Refused, match="descriptors need one of each image"):
        open_disjoint(Data(source=source, label_key="colours", label_separator=";"), 0.5)


def test_numbers_that_are_written_in_two_ways_are_classes_in_a_fixed_order(table):
    labels = ["10", "1", "001", "01"]
    rows = [f"images/{i}.png,{label}" for i, label in enumerate(labels)]
    (table / "numbers.csv").write_text("\n".join(["image,label", *rows]))
    assert read_labels(f"{table}/numbers.csv", Data()).classes == ("001", "01", "1", "10")


def test_a_classifier_of_one_class_is_refused(table, tmp_path, capsys):
    rows = [f"images/{i}.png,a" for i in range(24)]
    (table / "one_class.csv").write_text("\n".join(["image,label", *rows]))
    flags = ["--data", f"csv:{table}/one_class.csv", "--batch", "8", "--out", tmp_path / "run"]
    said = one_line(capsys, classify.main, *TINY, *flags)
    assert "holds one class, a: a classifier needs two or more" in said
    assert not (tmp_path / "run").exists()


def test_rows_without_a_label_show_no_class_where_several_are_allowed(table):
    data = load_config(Config, [*TINY, "--data", f"csv:{table}/several.csv", *SEVERAL], "test")
    images = read_labels(f"{table}/several.csv", data.data)
    assert images.labels()[:4].tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    batch = next(train_batches(images, data, start=0))
    assert batch["label"].shape == (8, 2)
    (*_, last) = eval_batches(images.take(np.arange(3)), data)
    assert last["label"].tolist() == [[0, 0], [1, 0], [0, 1]] + [[0, 0]] * 5


def test_the_loss_of_several_labels_is_the_mean_binary_cross_entropy(table):
    config = load_config(
        Config, [*TINY, "--batch", "8", "--augment.label-smoothing", "0.2"], "test"
    )
    steps = make_steps(config, 3, 10, several=True)
    rng, state = np.random.default_rng(0), steps.init(0)
    images = rng.integers(0, 256, (8, config.model.image, config.model.image, 3), np.uint8)
    label = rng.integers(0, 2, (8, 3), np.int32)
    batch = {"image": images, "label": label}
    probability = np.asarray(steps.evaluate(state.params, batch)["probability"])
    targets = 0.8 * label + 0.1
    want = -(targets * np.log(probability) + (1 - targets) * np.log(1 - probability)).mean()
    _, metrics = steps.train(state, batch, 0)
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)


def test_average_precision_by_hand():
    """Class 0 is found at ranks 1 and 3: (1/1 + 2/3) / 2. Class 1 has no image."""
    predictions = Predictions(
        np.arange(4),
        np.array([[1, 0], [0, 0], [1, 0], [0, 0]]),
        np.zeros(4),
        np.array([[0.9, 0.1], [0.8, 0.1], [0.7, 0.1], [0.2, 0.1]]),
    )
    np.testing.assert_allclose(predictions.precisions(), [5 / 6, np.nan])
    np.testing.assert_allclose(predictions.measures()["map"], 5 / 6)


@pytest.fixture
def prepared(tmp_path):
    """Writes a small data set with labels of any kind."""
    import tensorflow_datasets as tfds

    def write(name, feature, labels, numbered=False):
        class Built(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION: ClassVar = tfds.core.Version("1.0.0")

            def _info(self):
                image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
                index = {"index": tfds.features.Scalar(np.int64)} if numbered else {}
                features = tfds.features.FeaturesDict({"image": image, "what": feature} | index)
                return tfds.core.DatasetInfo(
                    builder=self, features=features, disable_shuffling=not numbered
                )

            def _split_generators(self, dl_manager):
                return {
                    "train": self._generate_examples(labels),
                    "test": self._generate_examples(labels[:2]),
                }

            def _generate_examples(self, found):
                for i, label in enumerate(found):
                    file = io.BytesIO()
                    Image.new("RGB", (8, 8), (i,) * 3).save(file, "PNG")
                    example = {"image": io.BytesIO(file.getvalue()), "what": label}
                    yield i, example | ({"index": i} if numbered else {})

        Built.name = name
        tfds.disable_progress_bar()
        Built(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
        return Data(source=f"tfds:{name}", data_dir=tmp_path, label_key="what")

    return write


def test_other_labels_of_tfds_are_classes_too(prepared, capsys):
    from tensorflow_datasets import features

    names = features.ClassLabel(names=["b", "a"])
    for name, feature, labels, classes, found in (
        ("plain", names, [1, 0, 1], ("b", "a"), [1, 0, 1]),
        ("whole", features.Scalar(np.int64), [30, 4, 30], ("4", "30"), [1, 0, 1]),
        ("words", features.Text(), ["owl", "ant", "owl"], ("ant", "owl"), [1, 0, 1]),
        (
            "lists",
            features.Sequence(names),
            [[1, 0], [], [1]],
            ("b", "a"),
            [[1, 1], [0, 0], [0, 1]],
        ),
    ):
        train, evaluation = open_data(prepared(name, feature, labels))
        assert train.classes == evaluation.classes == classes
        assert train.labels().tolist() == found
        for i in range(3):
            image, label = train.load(i)
            np.testing.assert_array_equal(label, found[i])
            assert image[0, 0, 0] == i
        assert train.several == (name == "lists")
    with pytest.raises(
        Refused,
        match=r"the feature what of real is Scalar of shape \(\) and float32: labels are a Class",
    ):
        open_data(prepared("real", features.Scalar(np.float32), [0.5, 1.5]))


def test_a_set_that_was_shuffled_is_read_in_the_order_of_its_index(prepared):
    from tensorflow_datasets import features

    labels = [0, 1, 1, 0, 0, 0, 1, 0]
    train, _ = open_data(
        prepared("numbered", features.ClassLabel(names=["b", "a"]), labels, numbered=True)
    )
    assert [int(train.load(i)[0][0, 0, 0]) for i in range(8)] == list(range(8))
    assert train.labels().tolist() == labels
