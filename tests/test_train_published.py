"""--init of the training scripts: a published network's sizes become the settings, its weights the
first state.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import draw_variables
from flax import traverse_util

from ggem_jax.models.vit import ViT, ViTConfig, resample_position
from ggem_jax.pooling import cls_pool
from ggem_jax.weights import MismatchedWeights, write_safetensors
from ggem_jax.weights.export import export_vit
from ggem_jax.weights.load import load_vit
from ggem_jax.weights.vit import read_vit
from train import classify
from train.cli import Refused, load_config
from train.config import Config
from train.loop import make_first_state
from train.step import make_steps

RECORDED = Path(__file__).parent / "data" / "vit"


@pytest.fixture
def weights(tmp_path):
    """A small published network, 16 px in patches of 4, as a file of timm's."""
    with np.load(RECORDED / "timm-deit-distilled.npz") as file:
        arrays = {
            key.removeprefix("weights/"): file[key].astype(np.float32)
            for key in file.files
            if key.startswith("weights/")
        }
    write_safetensors(tmp_path / "deit.safetensors", arrays)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    return tmp_path / "deit.safetensors"


def first(flags):
    config = load_config(Config, flags, "test")
    return config, make_first_state(make_steps(config, 10, 100), config)


@pytest.mark.parametrize(
    "extra", [[], ["--fsdp", "8", "--optimizer.ema", "0.9"]], ids=["plain", "fsdp and ema"]
)
def test_a_run_starts_from_the_file_with_another_pooling_and_a_new_head(weights, extra):
    config, state = first(
        [
            "--data",
            "digits",
            "--init",
            str(weights),
            "--model.heads",
            "2",
            "--pool.kind",
            "ggem",
            *extra,
        ]
    )
    published = read_vit(weights)
    assert (config.model, config.data.mean) == (
        dataclasses.replace(published.config, heads=2),
        published.normalised[0],
    )
    for params in (state.params, *([state.ema] if "--optimizer.ema" in extra else [])):
        host = jax.tree.map(np.asarray, params)
        np.testing.assert_array_equal(host["pool"]["p"], np.full(2, 3.0))
        assert not host["head"]["kernel"].any()
        theirs = published.variables["params"]
        for name in ("blocks_1", "registers", "position", "patch_embedding", "norm"):
            jax.tree.map(
                lambda own, file: np.testing.assert_array_equal(own, file.reshape(own.shape)),
                host[name],
                theirs[name],
            )
    shardings = jax.tree.map(lambda leaf: leaf.sharding.spec, state.params)
    assert ("fsdp" in str(shardings)) == (extra[:1] == ["--fsdp"])


def test_flags_hold_over_what_the_file_brings_and_positions_are_resampled(weights):
    config, state = first(
        [
            "--data",
            "digits",
            "--init",
            str(weights),
            "--model.image",
            "24",
            "--model.drop-path",
            "0.1",
            "--data.mean",
            "0",
            "0",
            "0",
        ]
    )
    assert (config.model.image, config.model.drop_path, config.model.patch, config.data.mean) == (
        24,
        0.1,
        4,
        (0, 0, 0),
    )
    table = read_vit(weights).variables["params"]["position"]
    np.testing.assert_array_equal(np.asarray(state.params["position"])[0], table[0])
    expected = resample_position(table[1:], (4, 4), (6, 6), antialias=True)
    np.testing.assert_allclose(np.asarray(state.params["position"])[1:], expected, atol=1e-6)


def test_pooling_and_head_of_the_file_are_never_taken_and_what_it_has_more_is_refused(weights):
    published = read_vit(weights)
    theirs = published.variables["params"]["head"]
    same = ViT(published.config, cls_pool, published.num_classes)
    images = np.zeros((1, 16, 16, 3), np.float32)
    head = published.fill(jax.jit(same.init)(jax.random.key(0), images))["params"]["head"]
    assert head["kernel"].shape == theirs["kernel"].shape
    assert not np.asarray(head["kernel"]).any()
    smaller = ViT(dataclasses.replace(published.config, depth=1, registers=0), cls_pool)
    with pytest.raises(MismatchedWeights, match=r"blocks_1.*which the network has not.*registers"):
        published.fill(draw_variables(smaller, images))


def test_a_run_starts_from_a_file_of_our_own_names(tmp_path):
    own = ViTConfig(patch=4, width=24, depth=2, heads=3, mlp_width=40, image=16)
    params = draw_variables(ViT(own, cls_pool, 5), np.zeros((1, 16, 16, 3)))["params"]
    path = tmp_path / "own.safetensors"
    write_safetensors(path, traverse_util.flatten_dict({"params": params}, sep="/"))
    config, state = first(["--data", "digits", "--init", str(path), "--pool.kind", "ggem"])
    assert config.model == own
    for name in ("patch_embedding", "position", "blocks_1", "norm"):
        jax.tree.map(np.testing.assert_array_equal, state.params[name], params[name])


def test_a_run_from_a_file_trains_and_goes_on(weights, tmp_path):
    flags = [
        "--data",
        "digits",
        "--init",
        str(weights),
        "--batch",
        "32",
        "--epochs",
        "0.5",
        "--out",
        str(tmp_path / "run"),
    ]
    assert not classify.train(
        load_config(Config, [*flags, "--stop-after", "9"], "test"), quiet=True
    ).finished
    assert classify.train(load_config(Config, flags, "test"), quiet=True).finished


def test_another_architecture_and_a_broken_file_are_refused(weights, tmp_path):
    with pytest.raises(
        Refused, match=r"--init .*deit.safetensors: the file does not fit this network: .*blocks_0"
    ):
        first(["--data", "digits", "--init", str(weights), "--model.mlp-width", "32"])
    with pytest.raises(Refused, match=r"--init: .*nothing.safetensors"):
        load_config(Config, ["--init", str(tmp_path / "nothing.safetensors")], "test")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Refused, match=r"--init: .*cut\.safetensors"):
        load_config(Config, ["--init", str(tmp_path / "cut.safetensors")], "test")


def test_a_run_starts_from_another_run_and_from_a_file_that_it_was_exported_to(tmp_path):
    """With its normalisation; the head and the pooling are new."""
    flags = ["--data", "digits", "--model.depth", "1", "--model.width", "32", "--model.heads", "2"]
    flags += ["--model.mlp-width", "32", "--model.gelu", "tanh", "--epochs", "0.2"]
    mean = ["--data.mean", "0.25", "0.5", "0.5"]
    classify.main([*flags, *mean, "--out", str(tmp_path / "run")])
    loaded = load_vit(tmp_path / "run")
    export_vit(loaded, tmp_path / "out")
    for start in (tmp_path / "run", tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        config, state = first(["--data", "digits", "--init", str(start)])
        assert (config.model, config.data.mean) == (loaded.model.config, (0.25, 0.5, 0.5))
        np.testing.assert_array_equal(
            state.params["blocks_0"]["mlp"]["in"]["kernel"],
            loaded.variables["params"]["blocks_0"]["mlp"]["in"]["kernel"],
        )
        assert not np.asarray(state.params["head"]["kernel"]).any()
    with pytest.raises(Refused, match=r"--init: .* is not the folder of a training run"):
        first(["--data", "digits", "--init", str(tmp_path)])
