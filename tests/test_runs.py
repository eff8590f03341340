"""ggem_jax/weights/runs.py, load.py and inference.py: a training run gives what its evaluations
used, directly and through a file that was written from it.
"""

import gc
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_run import write_run

from ggem_jax.files.images import normalise
from ggem_jax.files.preprocessing import Preprocessing
from ggem_jax.weights import MismatchedWeights, UnreadableWeights
from ggem_jax.weights.export import export_vit
from ggem_jax.weights.inference import make_infer
from ggem_jax.weights.load import load_vit
from tests.conftest import TINY, TINY_PAIR
from train import classify, contrastive, metric
from train.cli import Refused, load_config, to_dict
from train.config import Config
from train.contrastive import ContrastiveConfig
from train.data import open_data
from train.loop import make_first_state
from train.metric import MetricConfig
from train.run import read_run
from train.tokenizer import train_tokenizer

SHORT = ["--epochs", "0.2", "--data.mean", "0.1", "0.2", "0.3"]


def infer(loaded, pixels):
    function, variables = make_infer(loaded)
    return jax.device_get(jax.jit(function)(variables, pixels))


def squares(config):
    """The evaluation images as the network sees them."""
    _, images = open_data(config.data)
    how = Preprocessing(config.model.image, config.data.eval_crop, config.data.eval_zoom)
    return np.stack([how.square(images.load(i)[0]) for i in range(40)])


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """A run of train.classify with a moving average and other exponents than at the start."""
    folder = tmp_path_factory.mktemp("runs") / "classify"
    flags = ["--optimizer.ema", "0.5", "--data.eval-zoom", "1.25", "--data.corrupt", "skip"]
    config = load_config(Config, [*TINY, *SHORT, *flags, "--out", str(folder)], "test")
    return folder, config, classify.train(config, quiet=True)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """A run of train.metric with a projection."""
    folder = tmp_path_factory.mktemp("runs") / "metric"
    flags = ["--metric.dim", "8", "--batch", "40", "--out", str(folder)]
    config = load_config(MetricConfig, [*TINY, *SHORT, *flags], "test")
    return folder, config, metric.train(config, quiet=True)


@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_classifier_predicts_as_its_evaluation_did(classified, through_a_file, tmp_path):
    folder, config, trained = classified
    loaded = load_vit(folder)
    if through_a_file:
        export_vit(loaded, tmp_path / "out")
        loaded = load_vit(tmp_path / "out")
    assert loaded.classes == tuple("0123456789")
    assert loaded.preprocessing == Preprocessing(
        8, "centre", 1.25, (0.1, 0.2, 0.3), (0.229, 0.224, 0.225)
    )
    found = infer(loaded, squares(config))
    np.testing.assert_allclose(found["probability"], trained.result.probability[:40], atol=1e-6)
    assert found["descriptor"].shape == (40, 16)


@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_run_of_descriptors_describes_with_its_projection(embedded, through_a_file, tmp_path):
    folder, config, trained = embedded
    loaded = load_vit(folder)
    if through_a_file:
        export_vit(loaded, tmp_path / "out")
        loaded = load_vit(tmp_path / "out")
    assert loaded.projection is not None
    assert loaded.classes is None
    _, images = metric.open_disjoint(config.data, config.metric.train_classes)
    pixels = np.stack([images.load(i)[0] for i in range(40)])
    found = infer(loaded, pixels)
    assert set(found) == {"descriptor"}
    np.testing.assert_allclose(found["descriptor"], trained.result.descriptor[:40], atol=1e-5)
    network, variables = loaded.embedder()
    assert network.dim == 8
    normalised = (pixels.astype(np.float32) / 255 - np.array(loaded.mean)) / np.array(loaded.std)
    np.testing.assert_allclose(
        network.apply(variables, normalised.astype(np.float32)), found["descriptor"], atol=1e-5
    )
    assert load_vit(folder, pooling=loaded.model.pooling).projection is None


def test_the_image_tower_of_a_contrastive_run_has_its_projection(tmp_path):
    flags = ["--out", str(tmp_path / "run"), "--data.mean", "0.5", "0.5", "0.5"]
    config = load_config(ContrastiveConfig, [*TINY_PAIR, *flags], "test")
    tokenizer = train_tokenizer(["the handwritten digit zero"], 320)
    towers = contrastive.make_towers(config, tokenizer)
    params = towers.init(jax.random.key(0))
    tool, facts = {"tool": config.tool}, {"data_found": {"classes": ["zero"]}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(tool | to_dict(config) | facts))
    with ocp.CheckpointManager((tmp_path / "run" / "checkpoints").absolute()) as manager:
        manager.save(3, args=ocp.args.StandardSave({"params": params, "ema": None}))
    loaded = load_vit(tmp_path / "run")
    assert loaded.classes is None
    assert "a run of train.contrastive at step 3" in loaded.source
    pixels = squares(config)
    images = normalise(pixels, mean=config.data.mean, std=config.data.std)
    want = towers.describe_images(params, images)
    np.testing.assert_allclose(infer(loaded, pixels)["descriptor"], want, atol=1e-5)


def test_classes_of_which_an_image_has_several_have_probabilities_of_their_own(tmp_path):
    run = write_run(tmp_path / "run", several_labels=True)
    loaded = load_vit(run)
    export_vit(loaded, tmp_path / "out")
    assert not load_vit(run, num_classes=2).several_labels
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    images = normalise(pixels, mean=loaded.mean, std=loaded.std)
    logits = loaded.model.apply(loaded.variables, images).logits
    for each in (loaded, load_vit(tmp_path / "out")):
        found = infer(each, pixels)["probability"]
        np.testing.assert_allclose(found, jax.nn.sigmoid(logits), atol=1e-6)


def test_a_start_of_another_depth_is_told_in_a_few_names(tmp_path):
    run = write_run(tmp_path / "run")
    flags = ["--data", "digits", "--init", str(run), "--model.depth", "2"]
    config = load_config(MetricConfig, flags, "test")
    steps = metric.make_metric_steps(config, 5, 2)
    with pytest.raises(Refused, match=r"does not fit this network: .*blocks_1.*; and 15 more$"):
        make_first_state(steps, config)


def test_settings_that_are_no_dictionary_are_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(Refused, match="it must hold settings by name, not a list or a number"):
        read_run(tmp_path)


@pytest.mark.parametrize("dim", [0, 6])
def test_another_task_starts_from_a_run(dim, tmp_path):
    run = write_run(tmp_path / "run", dim=dim)
    config = load_config(MetricConfig, ["--data", "digits", "--init", str(run)], "test")
    state = make_first_state(metric.make_metric_steps(config, 5, 2), config)
    want = load_vit(run).variables["params"]
    found = state.params["network"]["vit"]
    for name in ("blocks_0", "norm", "patch_embedding"):
        jax.tree.map(np.testing.assert_array_equal, found[name], want[name])
    assert config.data.mean == (0.1, 0.2, 0.3)
    assert np.ptp(found["pool"]["p"]) == 0  # fresh


def test_the_weights_are_those_that_are_asked_for(classified, embedded):
    folder, _, trained = classified
    for ema, want in ((None, trained.state.ema), (True, trained.state.ema)):
        found = load_vit(folder, ema=ema)
        jax.tree.map(np.testing.assert_array_equal, found.variables["params"], dict(want))
        assert found.source.endswith("ema weights")
    raw = load_vit(folder, ema=False)
    jax.tree.map(np.testing.assert_array_equal, raw.variables["params"], dict(trained.state.params))
    assert "raw weights" in load_vit(embedded[0]).source
    with pytest.raises(UnreadableWeights, match=r"no moving average of its weights: take the raw"):
        load_vit(embedded[0], ema=True)


def test_classes_that_are_not_those_of_the_head_are_refused(classified, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(classified[0] / "checkpoints")
    settings = json.loads((classified[0] / "config.json").read_text())
    settings["data_found"]["classes"] = ["one", "two"]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(MismatchedWeights, match=r"names 2 classes, and the head of .* has 10"):
        load_vit(folder)


def test_nothing_is_guessed_about_a_file_that_does_not_say_how_images_are_cut(classified, tmp_path):
    loaded = load_vit(classified[0])
    export_vit(loaded, tmp_path / "out")
    settings = tmp_path / "out" / "config.json"
    assert json.loads(settings.read_text())["data"]["eval_zoom"] == 1.25
    with pytest.raises(ValueError, match="nothing says how images become its inputs"):
        make_infer(type(loaded)(loaded.model, loaded.variables, loaded.mean, loaded.std, "x.npz"))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    run = write_run(tmp_path / "run", seed=1, step=5)
    want = load_vit(run).variables["params"]
    write_run(run, seed=2, step=7)
    (tmp_path / "run" / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    assert load_vit(run).source.endswith("at step 7, raw weights")
    assert not capsys.readouterr().err
    shutil.rmtree(run / "checkpoints" / "7" / "default" / "ocdbt.process_0")
    loaded = load_vit(run)
    gc.collect()  # what is left of the failed reads says nothing
    assert loaded.source.endswith("at step 5, raw weights")
    jax.tree.map(np.testing.assert_array_equal, loaded.variables["params"], want)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"the checkpoint {run}/checkpoints/7 cannot be read: ")
    assert said.endswith("; that of step 5 is taken in its place")
    with pytest.raises(UnreadableWeights, match="5 has no moving average"):
        load_vit(run, ema=True)
    for file in (run / "checkpoints" / "5" / "default").glob("*METADATA"):
        file.unlink()
    with pytest.raises(UnreadableWeights, match=r"7 cannot be read: .* \(nor those of 5\)$"):
        load_vit(run)
