"""train/metric.py and eval/metric.py: classes apart, balanced batches, a run that learns, exact
resuming, comparison, every mistake in one line.
"""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import one_line
from PIL import Image

from eval import metric as eval_metric
from eval.studies import metric as metric_study
from ggem_jax.files.images import UnreadableImage
from train import metric
from train.batches import train_batches
from train.cli import Refused, configs_of, known_configs, load_config
from train.config import Data
from train.data import open_disjoint
from train.images import Images, hold_in_memory
from train.log import read_metrics
from train.metric import Metric, MetricConfig
from train.samplers import draw_balanced

TINY = [
    "--config", "digits", "--model.width", "16", "--model.depth", "1", "--model.heads", "2",
    "--model.mlp-width", "32", "--metric.dim", "8",
    "--batch", "40", "--checkpoint-every", "9", "--eval-every", "9", "--optimizer.warmup", "10",
]  # fmt: skip


def config_of(*flags):
    return load_config(MetricConfig, [*TINY, *map(str, flags)], "test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One finished run with each of two poolings."""
    root = tmp_path_factory.mktemp("runs")
    for pool, epochs in (("ggem", "5"), ("avg", "1")):
        metric.main([*TINY, "--epochs", epochs, "--pool.kind", pool, "--out", str(root / pool)])
    return root


def test_a_run_learns_descriptors_of_classes_it_has_not_seen(trained):
    lines = read_metrics(trained / "ggem", "eval")
    steps = metric.make_metric_steps(config_of(), 5, 10)
    _, unseen = open_disjoint(Data(), 0.5)
    start = metric.retrieve(steps, steps.init(0).params, unseen, config_of()).scores().means()
    assert lines[-1]["map@r"] > start["map@r"] + 0.01
    assert lines[-1]["images"] == len(unseen) == 896
    assert len(lines[-1]["p"]["network/vit/pool/p"]) == 2
    facts = json.loads((trained / "ggem" / "config.json").read_text())["data_found"]
    assert not set(facts["classes"]) & set(facts["eval_classes"])
    assert len(facts["classes"]) == len(facts["eval_classes"]) == 5
    assert (trained / "ggem" / "curves.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["arcface", "proxy-anchor"])
def test_every_loss_lowers_itself(loss, tmp_path):
    metric.train(
        config_of(
            "--metric.loss", loss, "--epochs", 1.5, "--log-every", 1, "--out", tmp_path / "run"
        ),
        quiet=True,
    )
    losses = [line["loss"] for line in read_metrics(tmp_path / "run", "train")]
    assert np.mean(losses[-6:]) < 0.95 * np.mean(losses[:6])


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path):
    flags = ["--epochs", 0.5, "--optimizer.ema", "0.9"]
    whole = metric.train(config_of(*flags, "--out", tmp_path / "whole"), quiet=True)
    assert not metric.train(
        config_of(*flags, "--out", tmp_path / "parts", "--stop-after", 7), quiet=True
    ).finished
    parts = metric.train(config_of(*flags, "--out", tmp_path / "parts"), quiet=True)
    jax.tree.map(np.testing.assert_array_equal, parts.state, whole.state)
    np.testing.assert_array_equal(parts.result.descriptor, whole.result.descriptor)


@pytest.mark.slow
def test_eight_devices_with_split_weights_take_the_same_steps_as_the_whole():
    """One step of the same batch: proxies and weights split over eight devices, and over none."""
    states = []
    for fsdp in (1, 8):
        config = config_of("--fsdp", fsdp, "--metric.loss", "proxy-anchor", "--metric.dim", 16)
        steps = metric.make_metric_steps(config, 8, 100)
        rng = np.random.default_rng(0)
        batch = {
            "image": rng.integers(0, 256, (40, 8, 8, 3), np.uint8),
            "label": np.arange(40, dtype=np.int32) % 8,
        }
        state = steps.init(0)
        for _ in range(2):
            state, _ = steps.train(state, jax.device_put(batch, steps.batch_sharding), 0)
        states.append(jax.tree.map(np.asarray, state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *states)


@pytest.mark.slow
def test_proxies_learn_faster_than_weights_by_their_factor():
    """Adam's first step after the warm-up is the learning rate, whatever the gradient."""
    moved = {}
    for factor in (1.0, 50.0):
        steps = metric.make_metric_steps(
            config_of(
                "--metric.proxy-lr", factor, "--optimizer.warmup", 1, "--optimizer.clip", "None"
            ),
            5,
            1000,
        )
        batch = {
            "image": np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8),
            "label": np.arange(40, dtype=np.int32) % 5,
        }
        before = steps.init(0)
        kept = jax.tree.map(np.asarray, before.params)
        state = before
        for _ in range(2):
            state, _ = steps.train(state, jax.device_put(batch, steps.batch_sharding), 0)
        moved[factor] = jax.tree.map(
            lambda a, b: float(np.abs(np.asarray(a) - b).max()), state.params, kept
        )
    assert moved[50.0]["proxies"] == pytest.approx(50 * moved[1.0]["proxies"], rel=0.2)
    assert moved[50.0]["network"]["projection"]["kernel"] == pytest.approx(
        moved[1.0]["network"]["projection"]["kernel"], rel=0.2
    )


def test_balanced_batches_hold_so_many_of_each_class_and_depend_on_the_step_only():
    labels = np.array([0] * 9 + [1] * 2 + [2] * 5 + [3] * 5)
    draw = draw_balanced(labels, 9, 3, seed=1)
    seen = []
    for step in (0, 5, 1):
        indices = draw(step)
        assert len(indices) == 9
        found, counts = np.unique(labels[indices], return_counts=True)
        assert counts.tolist() == [3, 3, 3]
        for label in found:
            own = indices[labels[indices] == label]
            assert len(set(own)) == (
                3 if label != 1 else len(set(own))
            )  # the class of two repeats one
        seen.append(indices)
    np.testing.assert_array_equal(draw_balanced(labels, 9, 3, seed=1)(5), seen[1])
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(draw_balanced(labels, 9, 3, seed=2)(5), seen[1])


def test_balanced_streams_can_be_entered_anywhere_and_shared_by_processes():
    images = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    labels = np.arange(20, dtype=np.int32) % 5
    numbered = hold_in_memory(images, labels, tuple("abcde"))
    config = dataclasses.replace(config_of(), batch=8)
    draw = draw_balanced(labels, 8, 2, seed=0)
    whole = train_batches(numbered, config, start=0, draw=draw)
    batches = [next(whole) for _ in range(4)]
    for k, batch in enumerate(batches):
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], draw(k))
    later = next(train_batches(numbered, config, start=3, draw=draw))
    np.testing.assert_array_equal(later["image"], batches[3]["image"])
    shares = [
        next(train_batches(numbered, config, start=2, process=i, processes=2, draw=draw))
        for i in range(2)
    ]
    np.testing.assert_array_equal(
        np.concatenate([share["label"] for share in shares]), batches[2]["label"]
    )


def numbered_images(labels, unreadable):
    """Images of 8 x 8 pixels that all have their number as colour."""

    def load(i, choose=None):
        if i in unreadable:
            raise UnreadableImage(f"image {i} is not a readable image")
        return np.full((8, 8, 3), i, np.uint8), int(labels[i])

    return Images(len(labels), tuple("abcde"), load, lambda: labels)


def test_a_skipped_image_is_replaced_by_another_of_its_class_that_the_batch_lacks(capsys):
    labels = np.repeat(np.arange(5, dtype=np.int32), 4)
    images = numbered_images(labels, unreadable=(3, 4, 19))
    config = dataclasses.replace(config_of("--data.corrupt", "skip"), batch=8)
    draw = draw_balanced(labels, 8, 2, seed=0)
    batches = train_batches(images, config, start=0, draw=draw)
    replaced = 0
    for step in range(12):
        batch, drawn = next(batches), draw(step)
        np.testing.assert_array_equal(batch["label"], labels[drawn])
        found = batch["image"][:, 0, 0, 0]
        assert len(set(found)) == 8
        replaced += np.sum(found != drawn)
        np.testing.assert_array_equal(
            found[~np.isin(drawn, (3, 4, 19))], drawn[~np.isin(drawn, (3, 4, 19))]
        )
    assert replaced > 5
    assert capsys.readouterr().err.count("skipped: image 3 is not") == 1

    nothing_of_a = numbered_images(labels, unreadable=range(4))
    stream = train_batches(nothing_of_a, config, start=0, draw=draw)
    with pytest.raises(Refused, match="no image of a of the training split can be read"):
        list(itertools.islice(stream, 12))


def test_disjoint_classes_are_those_of_the_source_or_drawn_once(class_folders):
    """If train and test have the same classes, all images are divided by class. If the classes
    differ, they are taken as they are.
    """
    for name in ("dogs", "eels"):  # two more, so that two can be kept
        for split in ("train", "test"):
            shutil.copytree(class_folders / split / "ants", class_folders / split / name)
    train, unseen = open_disjoint(Data(source=f"folder:{class_folders}"), 0.6)
    assert (len(train.classes), len(unseen.classes)) == (3, 2)
    assert sorted(train.classes + unseen.classes) == ["ants", "bees", "cows", "dogs", "eels"]
    assert (len(train), len(unseen)) == (42, 28)  # 14 images of each
    for part in (train, unseen):
        labels = part.labels()
        assert [part.load(i)[1] for i in range(len(part))] == labels.tolist()
        assert set(labels) == set(range(len(part.classes)))
    grey = {"ants": 60, "bees": 120, "cows": 180, "dogs": 60, "eels": 60}
    for i in range(len(train)):
        image, label = train.load(i)
        assert abs(image.mean() - grey[train.classes[label]]) < 15
    for name in ("ants", "bees", "cows"):
        shutil.rmtree(class_folders / "test" / name)
    for name in ("dogs", "eels"):
        shutil.rmtree(class_folders / "train" / name)
    train, unseen = open_disjoint(Data(source=f"folder:{class_folders}"), 0.5)
    assert (train.classes, unseen.classes) == (("ants", "bees", "cows"), ("dogs", "eels"))


@pytest.mark.parametrize("name", known_configs(MetricConfig))
def test_every_config_loads_and_says_its_command_and_what_to_expect(name):
    assert load_config(MetricConfig, ["--config", name], "test").tool == "train.metric"
    header = (configs_of(MetricConfig) / f"{name}.toml").read_text()
    assert f"python -m train.metric --config {name}" in header
    assert "Expect" in header


def test_evaluation_gives_intervals_differences_and_descriptors(trained, capsys, tmp_path):
    eval_metric.main(
        [str(trained / "ggem"), str(trained / "avg"), "--json", "--export", str(tmp_path / "d.npz")]
    )
    found = json.loads(capsys.readouterr().out)
    run, other = found["runs"]
    assert run["recall@1"]["value"] == pytest.approx(
        read_metrics(trained / "ggem", "eval")[-1]["recall@1"]
    )
    assert run["mAP@R"]["low"] < run["mAP@R"]["value"] < run["mAP@R"]["high"]
    assert found["paired"]["mAP@R"]["value"] == pytest.approx(
        run["mAP@R"]["value"] - other["mAP@R"]["value"], abs=1e-9
    )
    with np.load(tmp_path / "d.npz") as file:
        assert file["descriptor"].shape == (896, 8)
        np.testing.assert_allclose(np.linalg.norm(file["descriptor"], axis=1), 1, atol=1e-5)
        scores = metric.score_descriptors(file["descriptor"], file["label"])
    assert scores.means()["map@r"] == pytest.approx(run["mAP@R"]["value"])
    eval_metric.main([str(trained / "ggem")])
    assert "R-precision" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--metric.per-class", "7"], "cannot hold --metric.per-class 7 of each class"),
        (["--metric.per-class", "4"], "at most 20 with 5 classes"),
        (
            ["--metric.train-classes", "0.1"],
            "0.1 of 10 classes is 1: at least 2 must be trained on",
        ),
        (["--metric.train-classes", "1"], "between 0 and 1"),
        (["--augment.mixup", "0.2"], "the labels of descriptors are not mixed"),
        (["--metric.loss", "proxy-anchor", "--optimizer.accumulate", "2"], "1 with proxy-anchor"),
        (["--metric.loss", "triplet"], "triplet"),
        (["--metric.scale", "0"], "positive or None"),
        (["--metric.scale", "20"], "None with normalised-softmax"),
        (["--metric.loss", "arcface", "--metric.temperature", "0.1"], "0.05 with arcface"),
        (["--config", "nothing"], "--config must be one of"),
    ],
    ids=[
        "indivisible",
        "few-classes",
        "one-class",
        "all-classes",
        "mixup",
        "parts",
        "loss",
        "scale",
        "unused-scale",
        "unused-temperature",
        "config",
    ],
)
def test_mistakes_are_told_in_one_line(flags, sentence, capsys, tmp_path):
    assert sentence in one_line(capsys, metric.main, *TINY, "--out", tmp_path / "run", *flags)


def test_mistakes_of_an_evaluation_are_told_in_one_line(trained, capsys, tmp_path):
    assert "is not a run of train.metric: it has no config.json" in one_line(
        capsys, eval_metric.main, tmp_path
    )
    assert "must end in .npz" in one_line(
        capsys, eval_metric.main, trained / "ggem", "--export", tmp_path / "x.txt"
    )
    said = one_line(
        capsys, eval_metric.main, trained / "ggem", "--export", tmp_path / "no" / "x.npz"
    )
    assert "cannot be written: No such file or directory" in said
    shutil.copytree(trained / "ggem", tmp_path / "run")
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    values["data_found"]["classes"][0] = values["data_found"]["eval_classes"][0]
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))
    assert "which digits has among the classes to evaluate on" in one_line(
        capsys, eval_metric.main, tmp_path / "run"
    )
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    values["data_found"]["classes"] = ["others"] * 5
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))
    assert "has no checkpoint yet" in one_line(capsys, eval_metric.main, tmp_path / "run")


def test_margins_and_scales_that_are_not_given_stay_as_published():
    assert Metric(loss="arcface").options() == {}
    assert Metric(loss="proxy-anchor", scale=16).options() == {"scale": 16}
    assert Metric(temperature=0.1).options() == {"temperature": 0.1}


@pytest.fixture
def packed_sets(tmp_path):
    """Omniglot and the corridor in small, in the layout of their zip files: four characters by
    three drawers, and 30 frames in two runs.
    """
    import zipfile

    rng = np.random.default_rng(0)

    def png(image):
        import io

        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        return file.getvalue()

    (tmp_path / "omniglot-small").mkdir()
    with zipfile.ZipFile(tmp_path / "omniglot-small" / "images_background_small1.zip", "w") as file:
        for character in range(8):
            base = rng.integers(0, 256, (20, 20), np.uint8)
            for drawer in range(1, 6):
                noisy = np.clip(base + rng.normal(0, 20, base.shape), 0, 255).astype(np.uint8)
                file.writestr(
                    f"images/alphabet/character{character}/{character:02}_{drawer:02}.png",
                    png(noisy),
                )
    (tmp_path / "corridor-vpr").mkdir()
    walk = np.cumsum(rng.normal(0, 12, (30, 24, 32)), axis=0)
    with zipfile.ZipFile(tmp_path / "corridor-vpr" / "corridor.zip", "w") as file:
        for kind in ("query", "ref"):
            for i in range(30):
                noisy = np.clip(128 + walk[i] + rng.normal(0, 5, walk[i].shape), 0, 255).astype(
                    np.uint8
                )
                file.writestr(f"corridor/{kind}/{i:07}.png", png(noisy))
        file.writestr(
            "corridor/ground_truth.json",
            json.dumps([[j for j in range(i - 2, i + 3) if 0 <= j < 30] for i in range(30)]),
        )
    return tmp_path


def test_the_study_keeps_what_is_searched_apart_from_what_is_trained_on(packed_sets):
    omniglot = metric_study.APART["omniglot"](
        metric_study.SETS["omniglot"](packed_sets, metric_study.Study())
    )
    assert not set(omniglot.train.classes) & set(omniglot.test.classes)
    assert (len(omniglot.train), len(omniglot.test)) == (20, 20)
    recall, _ = omniglot.score(omniglot.pixels)
    assert recall.mean() == 1.0  # noise of 20 on characters apart by 70
    corridor = metric_study.APART["corridor"](
        metric_study.SETS["corridor"](packed_sets, metric_study.Study())
    )
    assert corridor.train.classes == ("place 0", "place 1", "place 2")
    assert np.bincount(corridor.train.labels()).tolist() == [6, 6, 6]  # three frames of each run
    assert len(corridor.test) == 2 * (30 - 15 - 2 * metric_study.GAP)
    recall, precision = corridor.score(corridor.pixels)
    assert len(recall) == 11
    assert recall.mean() > 0.9
    assert 0.5 < precision.mean() <= 1.0
    shuffled = corridor.pixels[np.random.default_rng(0).permutation(len(corridor.pixels))]
    assert corridor.score(shuffled)[0].mean() < 0.7


@pytest.mark.slow
def test_the_study_writes_its_table(packed_sets, tmp_path, capsys):
    flags = [
        "--data",
        packed_sets,
        "--seeds",
        2,
        "--epochs",
        1,
        "--runs",
        tmp_path / "runs",
        "--out",
        tmp_path / "rows.csv",
        "--sets",
        "corridor",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            metric_study.FLAGS,
            "corridor",
            [
                "--model.image",
                "16",
                "--model.patch",
                "8",
                "--batch",
                "8",
                "--metric.per-class",
                "4",
            ],
        )
        metric_study.main(list(map(str, flags)))
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert len(lines) == 1 + 1 + 4 + len(metric_study.ARMS)
    assert "| GGeM, Proxy-Anchor |" in capsys.readouterr().out


def test_a_study_of_unknown_sets_or_one_seed_is_refused(capsys, monkeypatch):
    assert "--sets must be among omniglot, corridor" in one_line(
        capsys, metric_study.main, "--sets", "cars"
    )
    said = one_line(capsys, metric_study.main, "--seeds", 1)
    assert said.endswith("--seeds must be at least 2, it is 1")
    monkeypatch.delenv("GGEM_SHARED", raising=False)
    with pytest.raises(Refused, match="GGEM_SHARED"):
        metric_study.find_data(None)


def test_mistakes_that_would_show_late_are_told_at_once(class_folders, tmp_path, capsys):
    for folder in (class_folders / "train", class_folders / "test"):
        shutil.rmtree(folder / "cows")
    for name in ("ants", "bees"):  # classes of the test split of their own, with one image each
        for image in list((class_folders / "test" / name).iterdir())[1:]:
            image.unlink()
        (class_folders / "test" / name).rename(class_folders / "test" / f"other {name}")
    said = one_line(
        capsys,
        metric.main,
        *TINY,
        "--data",
        f"folder:{class_folders}",
        "--batch",
        8,
        "--out",
        tmp_path / "run",
    )
    assert "no class to evaluate on has two images" in said
    assert not (tmp_path / "run").exists()
    assert "from 1e-6 to 1e9" in one_line(
        capsys, metric.main, *TINY, "--epochs", "1e308", "--out", tmp_path / "run"
    )
    assert "home directory" in one_line(
        capsys, metric.main, *TINY, "--data", "folder:~nosuchuser/x", "--out", tmp_path / "run"
    )


def test_a_run_of_another_tool_is_named(trained, tmp_path, capsys):
    shutil.copytree(trained / "avg", tmp_path / "run")
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    assert values["tool"] == "train.metric"
    (tmp_path / "run" / "config.json").write_text(json.dumps(values | {"tool": "train.classify"}))
    assert "is not that of a run of train.metric: it is one of train.classify" in one_line(
        capsys, eval_metric.main, tmp_path / "run"
    )
