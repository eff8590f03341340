"""ggem_jax/weights/load.py, own.py and runs.py: every source gives back the network that was
written.
"""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict

from ggem_jax.descriptors.backbones import read_any_vit
from ggem_jax.files.arrays import read_arrays
from ggem_jax.models.vit import MAP, GGeM, ViT, ViTConfig
from ggem_jax.pooling import avg_pool
from ggem_jax.weights import (
    MismatchedWeights,
    UnreadableWeights,
    write_safetensors,
    write_torch,
)
from ggem_jax.weights.__main__ import main
from ggem_jax.weights.load import load_vit
from ggem_jax.weights.own import read_own_vit
from ggem_jax.weights.vit import read_vit
from tests.conftest import TINY
from train import classify
from train.cli import load_config
from train.config import Config

RECORDED = Path(__file__).parent / "data" / "vit"
RNG = np.random.default_rng(0)
SMALL = ViTConfig(patch=4, width=16, depth=2, heads=2, mlp_width=24, image=8)


def logits(loaded, images):
    return loaded.model.apply(loaded.variables, images).logits


def randomized(model):
    """Variables without the zeros of fresh ones, which would hide losses."""
    side = model.config.image
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, side, side, 3)))
    return jax.tree.map(lambda x: 1 + RNG.normal(size=x.shape).astype(np.float32) / 4, shapes)


def write_own(path, variables):
    write_safetensors(path, flatten_dict(variables, sep="/"))
    return path


def timm_file(folder):
    with np.load(RECORDED / "timm-deit-distilled.npz") as file:
        arrays = {
            key.removeprefix("weights/"): file[key].astype(np.float32)
            for key in file.files
            if key.startswith("weights/")
        }
    write_safetensors(folder / "deit.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    return folder / "deit.safetensors"


def test_a_published_file_gives_the_published_network(tmp_path):
    path = timm_file(tmp_path)
    loaded, published = load_vit(str(path)), read_vit(path)
    assert (loaded.mean, loaded.std) == published.normalised
    assert loaded.image == published.config.image
    assert "DeiT" in loaded.source
    images = RNG.normal(size=(2, loaded.image, loaded.image, 3)).astype(np.float32)
    want = published.model().apply(published.variables, images).logits
    np.testing.assert_array_equal(logits(loaded, images), want)


def test_pooling_and_head_are_replaced_and_the_rest_is_kept(tmp_path):
    path = timm_file(tmp_path)
    before = load_vit(path)
    after = load_vit(path, pooling=GGeM(groups=4), num_classes=7)
    images = jnp.ones((1, after.image, after.image, 3))
    output = after.model.apply(after.variables, images)
    np.testing.assert_array_equal(
        output.tokens, before.model.apply(before.variables, images).tokens
    )
    assert output.logits.shape == (1, 7)
    assert after.variables["params"]["pool"]["p"].tolist() == [3.0] * 4
    other = load_vit(path, pooling=MAP(), key=jax.random.key(1)).variables["params"]
    assert "head" in other
    assert not np.allclose(
        other["pool"]["query"], load_vit(path, pooling=MAP()).variables["params"]["pool"]["query"]
    )
    assert load_vit(path, num_classes=0).model.apply(before.variables, images).logits is None
    assert "head" not in load_vit(path, num_classes=0).variables["params"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_token": False, "registers": 3, "position": "sincos", "image": 224},
        {"layer_scale": 1e-5, "mlp": "swiglu", "qkv_bias": False, "patch_bias": False},
        {"pre_norm": True, "heads": 4, "image": 12},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_the_shapes_of_our_own_file_are_its_config(tmp_path, changes):
    config = ViTConfig(**{**vars(SMALL), **changes})
    model = ViT(config, GGeM(groups=4), 5)
    variables = randomized(model)
    path = write_own(tmp_path / "own.safetensors", variables)
    loaded = load_vit(path)
    assert (loaded.model.config, loaded.model.pooling.groups) == (config, 4)
    images = RNG.normal(size=(1, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(logits(loaded, images), model.apply(variables, images).logits)
    bare, of_file = read_own_vit(path)
    assert (bare.config, bare.pooling, bare.num_classes) == (config, avg_pool, 0)
    assert set(of_file["params"]) == set(variables["params"]) - {"pool", "head"}


def test_our_own_file_with_attention_pooling(tmp_path):
    path = write_own(tmp_path / "own.safetensors", randomized(ViT(SMALL, MAP())))
    assert isinstance(load_vit(path).model.pooling, MAP)


def test_a_variant_is_checked(tmp_path):
    path = write_own(tmp_path / "own.safetensors", randomized(ViT(SMALL, avg_pool)))
    with pytest.raises(MismatchedWeights, match=r"own\.safetensors does not fit.*blocks_11/"):
        read_own_vit(path, "S/16")


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        (
            "params/blocks_0/attention/query/kernel",
            None,
            "our names: params/blocks_0/attention/query",
        ),
        ("params/blocks_1/norm_1/bias", None, "1 missing: params/blocks_1/norm_1/bias"),
        ("params/blocks_0/attention/out/bias", np.ones(3), "wrongly shaped"),
        ("params/patch_embedding/kernel", np.ones((4, 4)), "no ViT by our names: params/patch_emb"),
        ("params/position", np.ones((4, 16)), "has 4 positions, which are no square"),
    ],
)
def test_what_is_wrong_with_our_own_file_is_named(tmp_path, name, value, what):
    arrays = flatten_dict(randomized(ViT(SMALL, avg_pool)), sep="/")
    arrays |= {name: value}
    if value is None:
        del arrays[name]
    write_safetensors(tmp_path / "own.safetensors", arrays)
    with pytest.raises(MismatchedWeights, match=what) as caught:
        load_vit(tmp_path / "own.safetensors")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a moving average, and its last state."""
    folder = tmp_path_factory.mktemp("load") / "run"
    flags = ["--epochs", "0.1", "--optimizer.ema", "0.5", "--pool.layout", "interleaved"]
    flags += ["--data.mean", "0.1", "0.2", "0.3", "--out", str(folder)]
    config = load_config(Config, [*TINY, *flags], "test")
    return folder, classify.train(config, quiet=True).state


@pytest.mark.parametrize("ema", [True, False])
def test_a_run_gives_its_network_and_weights(trained, ema):
    folder, state = trained
    loaded = load_vit(folder, ema=ema)
    want = state.ema if ema else state.params
    jax.tree.map(np.testing.assert_array_equal, loaded.variables["params"], dict(want))
    assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (0.229, 0.224, 0.225))
    assert loaded.model.pooling == GGeM(layout="interleaved")
    assert logits(loaded, jnp.ones((1, 8, 8, 3))).shape == (1, 10)


def other_run(trained, folder, params, **settings):
    """A run with the settings of `trained` except for the given ones, and a checkpoint of other
    parameters.
    """
    folder.mkdir()
    values = json.loads((trained[0] / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(values))
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        state = {"step": np.int32(3), "params": params, "ema": None}
        manager.save(3, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    return folder


def test_the_vit_is_found_inside_a_larger_network(trained, tmp_path):
    vit = {name: value for name, value in trained[1].params.items() if name != "head"}
    vit = jax.tree.map(np.asarray, vit)
    run = other_run(trained, tmp_path / "run", {"network": {"vit": vit}, "proxies": np.ones(2)})
    loaded = load_vit(run)
    assert loaded.model.num_classes == 0
    jax.tree.map(np.testing.assert_array_equal, loaded.variables["params"], vit)


def test_what_is_wrong_with_a_run_is_said_in_one_sentence(trained, tmp_path):
    settings = json.loads((trained[0] / "config.json").read_text())
    with pytest.raises(UnreadableWeights, match="it has no config"):
        load_vit(tmp_path)
    for wrong, what in {"[": "is not readable JSON", "[1]": "must hold settings by name"}.items():
        (tmp_path / "config.json").write_text(wrong)
        with pytest.raises(UnreadableWeights, match=what):
            load_vit(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UnreadableWeights, match="has no checkpoint yet"):
        load_vit(tmp_path)
    vit = jax.tree.map(np.asarray, dict(trained[1].params))
    cases = [
        (vit, {"model": settings["model"] | {"depths": 3}}, "does not hold the settings"),
        (vit, {"pool": settings["pool"] | {"kind": "sum"}}, "pooling must be one of cls, avg"),
        (vit, {"model": settings["model"] | {"width": 32}}, "does not fit the network"),
        ({"text": np.ones(3)}, {}, "holds no ViT"),
    ]
    for i, (params, changes, what) in enumerate(cases):
        with pytest.raises(ValueError, match=what) as caught:
            load_vit(other_run(trained, tmp_path / str(i), params, **changes))
        assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_one_sentence(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    for path in run.glob("checkpoints/*/default/d/*"):
        path.write_bytes(b"")
    with pytest.raises(UnreadableWeights, match=re.escape(f"the checkpoint {run}")) as caught:
        load_vit(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_classes": -1}, "num_classes must be a whole number of at least 0, not -1"),
        ({"num_classes": 1.5}, "num_classes must be a whole number of at least 0, not 1.5"),
        ({"num_classes": True}, "num_classes must be a whole number of at least 0, not True"),
        ({"pooling": "ggem"}, "pooling must be a function or a module .*, not 'ggem'"),
        ({"pooling": GGeM}, "pooling must be a function or a module"),  # the class, not a module
    ],
)
def test_what_replaces_must_be_a_pooling_and_a_number_of_classes(tmp_path, options, sentence):
    path = write_own(tmp_path / "own.safetensors", randomized(ViT(SMALL, avg_pool, 5)))
    with pytest.raises(ValueError, match=sentence):
        load_vit(path, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("params/head/kernel", np.float32(1)),
        ("params/pool/p", np.float32(1)),
        ("params/pool/p", np.ones(3, np.float32)),  # does not divide the width
        ("params/registers", np.float32(1)),
        ("params/position", np.float32(1)),
    ],
)
def test_our_own_file_with_an_odd_shape_is_refused_by_its_name(tmp_path, name, value):
    arrays = flatten_dict(randomized(ViT(SMALL, GGeM(groups=2), 5)), sep="/")
    write_safetensors(tmp_path / "odd.safetensors", {**arrays, name: value})
    with pytest.raises(MismatchedWeights, match=re.escape(str(tmp_path / "odd.safetensors"))):
        load_vit(tmp_path / "odd.safetensors")


def test_the_home_of_an_unknown_user_is_refused():
    with pytest.raises(UnreadableWeights, match=r"~nobody-here/vit\.npz begins with the home"):
        load_vit("~nobody-here/vit.npz")


@pytest.mark.parametrize(
    "data",
    [
        {"mean": [0.5], "std": [1, 1, 1]},
        {"mean": [0, 0, 0], "std": [0, 1, 1]},
        {"mean": [float("nan")] * 3, "std": [1, 1, 1]},
    ],
)
def test_a_run_with_an_impossible_normalisation_is_refused(trained, tmp_path, data):
    vit = jax.tree.map(np.asarray, dict(trained[1].params))
    with pytest.raises(UnreadableWeights, match="must be three numbers each, std above 0"):
        load_vit(other_run(trained, tmp_path / "run", vit, data=data))


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [False, True])
def test_the_folder_of_every_kind_of_checkpoint_is_read(tmp_path, ending, shards, capsys):
    (tmp_path / "one").mkdir()
    path = timm_file(tmp_path / "one")
    arrays = read_arrays(path)
    write = write_safetensors if ending == "safetensors" else write_torch
    stem = "model" if ending == "safetensors" else "pytorch_model"
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(path.with_name("config.json"), folder)
    if shards:
        names = [f"{stem}-0000{i}-of-00002.{ending}" for i in (1, 2)]
        held = {name: names[i % 2] for i, name in enumerate(arrays)}
        for each in names:
            write(folder / each, {name: arrays[name] for name in held if held[name] == each})
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": held}))
    else:
        write(folder / f"{stem}.{ending}", arrays)
    expected = load_vit(path)
    found = load_vit(folder)
    assert found.model == expected.model
    jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)
    assert read_any_vit(folder).config == expected.model.config
    assert main(["inspect", str(folder)]) == 0
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    capsys.readouterr()


def test_a_folder_of_nothing_says_what_was_looked_for(tmp_path, capsys):
    (tmp_path / "README.md").write_text("")
    for settings in (None, '{"model_type": "vit"}'):
        if settings is not None:
            (tmp_path / "config.json").write_text(settings)
        for call in (load_vit, read_any_vit):
            with pytest.raises(
                UnreadableWeights, match=r"model\.safetensors.*_model\.bin"
            ) as caught:
                call(tmp_path)
            assert "\n" not in str(caught.value)
            assert "longer" not in str(caught.value)
        assert main(["inspect", str(tmp_path)]) == 1
        assert "holds none of model.safetensors" in capsys.readouterr().err
