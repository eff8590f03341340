"""ggem_jax/files: the checkpoints that training scripts write are read, and which of their networks
it was is said: arrays.py, networks.py, shards.py, kinds.py and torchscript.py.
"""

import argparse
import collections
import io
import json
import pathlib
import pickle
import shutil
import subprocess
import sys
import time
import tracemalloc
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
from conftest import assert_same
from test_weights_files import Raw, called, named, pickled, stored, tensor, zip_file
from test_weights_text import recorded as recorded_text
from test_weights_vit import empty_network, recorded

from ggem_jax.files.arrays import read_arrays, read_checkpoint
from ggem_jax.files.errors import AmbiguousWeights
from ggem_jax.weights import (
    MismatchedWeights,
    UnreadableWeights,
    UnsafePickle,
    read_pickle,
    write_safetensors,
    write_torch,
)
from ggem_jax.weights.__main__ import main
from ggem_jax.weights.architecture import Given
from ggem_jax.weights.text import from_published_names, read_text, to_published_names
from ggem_jax.weights.vit import read_vit
from ggem_jax.weights.vit_layouts import find_layout, to_names_of_timm

KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}
ADAM = {
    "state": {0: {"step": 5, "exp_avg": np.ones(4, np.float32)}},
    "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}],
}


def write_checkpoint(path, value, **entries):
    """A checkpoint of PyTorch with nested dictionaries and arrays for tensors."""
    storages = {}

    def operations(value):
        if isinstance(value, np.ndarray):
            key = str(len(storages))
            storages[key] = np.array(value, order="C")
            strides = tuple(step // value.itemsize for step in storages[key].strides)
            return tensor(stored(KINDS[value.dtype.name], key, value.size), 0, value.shape, strides)
        if isinstance(value, dict):
            return {name: operations(item) for name, item in value.items()}
        if isinstance(value, argparse.Namespace | types.SimpleNamespace | pathlib.PurePath):
            return Raw(pickle.dumps(value, 2)[2:-1])
        return value

    path.write_bytes(zip_file(operations(value), storages, **entries))


def in_order(arrays):
    return dict(sorted(arrays.items()))


def network():
    return recorded("timm-vit")[0]


def assert_network(path, want, **given):
    """That `read_vit` finds the parameters of a network of timm's names."""
    found = read_vit(path, heads=2, **given)
    np.testing.assert_array_equal(
        found.variables["params"]["blocks_1"]["mlp"]["in"]["kernel"],
        want["blocks.1.mlp.fc1.weight"].T,
    )
    return found


# Folders before the names


FOLDERS = (
    "module.", "_orig_mod.", "model.", "backbone.", "encoder.", "_orig_mod.module.",
    "module._orig_mod.", "model._orig_mod.encoder.", "student.backbone.",
    "teacher.module.backbone.", "model.module.base_encoder.", "anything.else.",
)  # fmt: skip
LAYOUTS_OF = {
    "timm-vit": "timm", "hf-vit": "hf-vit", "hf-dinov2": "hf-dinov2", "hf-clip": "hf-clip",
    "openai-clip": "clip", "hf-siglip": "hf-clip", "timm-siglip": "timm",
}  # fmt: skip


@pytest.mark.parametrize("folders", FOLDERS)
@pytest.mark.parametrize("name", LAYOUTS_OF)
def test_folders_before_the_names_are_left_out_of_every_layout(name, folders):
    weights, _ = recorded(name)
    layout, want, unused, _ = to_names_of_timm(weights, source="")
    again, found, rest, _ = to_names_of_timm(
        {folders + key: value for key, value in weights.items()}, source=""
    )
    assert (again, set(rest)) == (layout, {folders + key for key in unused})
    assert layout == LAYOUTS_OF[name]
    assert_same(found, want)


def test_the_folders_are_returned():
    names = {f"_orig_mod.module.base_encoder.{name}": 0 for name in network()}
    assert find_layout(names) == ("timm", "module.base_encoder.")


def test_a_text_tower_beside_is_not_taken_for_the_images():
    weights = {f"model.{name}": value for name, value in recorded("hf-clip")[0].items()}
    both = weights | {name.replace("vision_model", "text_model"): v for name, v in weights.items()}
    assert find_layout(both) == ("hf-clip", "model.vision_model.")
    _, found, unused, _ = to_names_of_timm(both, source="")
    assert_same(found, to_names_of_timm(weights, source="")[1])
    assert {name for name in both if ".text_model." in name} <= set(unused)


def test_wrappers_stand_anywhere_in_a_name():
    weights = {
        name.replace("blocks.1.", "blocks.1._orig_mod._fsdp_wrapped_module."): value
        for name, value in network().items()
    }
    assert_same(to_names_of_timm(weights, source="")[1], to_names_of_timm(network(), source="")[1])
    with pytest.raises(MismatchedWeights, match=r"1 names .* no place for: _orig_mod\.norm\.bias"):
        to_names_of_timm(network() | {"_orig_mod.norm.bias": network()["norm.bias"]}, source="")


def test_a_head_outside_the_backbone_is_its_head():
    weights = {f"model.backbone.{n}": v for n, v in network().items() if "head" not in n}
    weights["model.head.weight"] = np.ones((5, 16), np.float32)
    assert to_names_of_timm(weights, source="")[1]["head.weight"].shape == (5, 16)


def test_names_of_another_network_are_listed():
    weights = network() | {"predictor_of_tokens.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(MismatchedWeights, match=r"no place for: predictor_of_tokens\.weight"):
        to_names_of_timm(weights, source="file")


def test_blocks_in_chunks_are_those_of_dinov2():
    weights, _ = recorded("timm-dinov2-registers")
    chunked = {
        f"teacher.backbone.{name.replace('blocks.', f'blocks.{chunk}.')}": value
        for name, value in weights.items()
        for chunk in (0 if "blocks.0." in name else 1,)
    }
    heads = dict.fromkeys(
        ("dino_head.mlp.0.weight", "ibot_head.last_layer.weight_g"), np.ones((2, 2), np.float32)
    )
    chunked |= {f"teacher.{name}": value for name, value in heads.items()}
    layout, found, unused, _ = to_names_of_timm(chunked, source="")
    assert_same(found, to_names_of_timm(weights, source="")[1])
    assert (layout, set(unused)) == ("timm", {f"teacher.{name}" for name in heads})


@pytest.mark.parametrize("folders", ["module.", "_orig_mod.model.", "teacher.clip."])
@pytest.mark.parametrize("name", ["text-hf-clip", "text-open_clip", "text-big_vision"])
def test_text_towers_have_folders_too_and_go_back_to_them(tmp_path, name, folders):
    weights, _ = recorded_text(name)
    path = tmp_path / "text.safetensors"
    write_safetensors(path, {folders + key: value for key, value in weights.items()})
    text = read_text(path, heads=2, gelu="quick")
    write_safetensors(path, weights)
    plain = read_text(path, heads=2, gelu="quick")
    assert_same(text.variables, plain.variables)
    own = folders.replace("_orig_mod.", "")
    want = {own + key: value for key, value in to_published_names(plain).items()}
    assert_same(to_published_names(text), want)
    assert set(text.unused) == {folders + key for key in plain.unused}


def test_states_of_optimizers_are_no_text_towers_and_two_names_are_not_one_parameter():
    weights, _ = recorded_text("text-big_vision")
    states = {f"opt/0/mu/{name}": value for name, value in weights.items()}
    text = from_published_names(weights | states, given=Given(2))
    assert_same(text.variables, from_published_names(weights, given=Given(2)).variables)
    assert set(states) <= set(text.unused)
    weights, _ = recorded_text("text-open_clip")
    with pytest.raises(MismatchedWeights, match="two names of one parameter, one of them ln_final"):
        from_published_names(weights | {"_orig_mod.ln_final.bias": np.zeros(16)})


# Several networks in a file


def training_files():
    weights = network()
    average = {name: value + 1 for name, value in weights.items()}
    args = argparse.Namespace(lr=1e-3, output=pathlib.PurePosixPath("/runs/1"))
    old = types.SimpleNamespace(epochs=3)
    head = {"head.mlp.0.weight": np.ones((8, 16), np.float32)}
    head["head.last_layer.weight_g"] = np.ones((8, 1), np.float32)
    teacher = {f"backbone.{name}": value for name, value in average.items()} | head
    student = {f"module.backbone.{name}": value for name, value in weights.items()}
    loss = {"center": np.ones((1, 8), np.float32)}
    both = {f"student.backbone.{name}": value for name, value in weights.items()}
    both |= {f"teacher.backbone.{name}": value for name, value in average.items()}
    both |= {
        "teacher.dino_head.mlp.0.weight": head["head.mlp.0.weight"],
        "dino_loss.center": loss["center"],
    }
    moco = {f"module.base_encoder.{name}": value for name, value in weights.items()}
    moco |= {f"module.momentum_encoder.{name}": value for name, value in average.items()}
    moco |= {"module.base_encoder.head.0.weight": np.ones((2, 2), np.float32)}
    moco |= {"module.predictor.0.weight": np.ones((2, 2), np.float32)}
    chosen = {
        "timm": (
            {
                "epoch": 5,
                "state_dict": weights,
                "optimizer": ADAM,
                "args": args,
                "state_dict_ema": average,
            },
            "state_dict",
            {"model": "state_dict", "ema": "state_dict_ema", "state_dict_ema": "state_dict_ema"},
        ),
        "deit": (
            {"model": weights, "model_ema": average, "optimizer": ADAM, "args": old, "scaler": {}},
            "model",
            {"model": "model", "ema": "model_ema"},
        ),
        "dino": (
            {
                "student": student,
                "teacher": teacher,
                "optimizer": ADAM,
                "args": args,
                "dino_loss": loss,
            },
            "teacher",
            {"student": "student", "teacher": "teacher"},
        ),
        "dinov2": (
            {"model": both, "iteration": 9},
            None,
            {"student": "model.student", "teacher": "model.teacher"},
        ),
        "moco": (
            {"state_dict": moco, "arch": "vit"},
            None,
            {
                "base_encoder": "state_dict.module.base_encoder",
                "momentum_encoder": "state_dict.module.momentum_encoder",
            },
        ),
        "jepa": (
            {
                "encoder": {f"module.{n}": v for n, v in weights.items()},
                "target_encoder": {f"module.{n}": v for n, v in average.items()},
                "predictor": {"module.predictor_blocks.0.norm1.weight": np.ones(2, np.float32)},
            },
            None,
            {"encoder": "encoder", "target_encoder": "target_encoder"},
        ),
        "lightning": (
            {
                "state_dict": {f"model.{n}": v for n, v in weights.items()}
                | {f"model_ema.{n}": v for n, v in average.items()}
            },
            None,
            {"model": "state_dict.model", "ema": "state_dict.model_ema"},
        ),
    }
    return weights, average, chosen


TRAINING = ("timm", "deit", "dino", "dinov2", "moco", "jepa", "lightning")
AVERAGES = {"ema", "state_dict_ema", "teacher", "momentum_encoder", "target_encoder"}


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_file_has_a_usual_network_or_asks_for_one(tmp_path, name):
    weights, average, files = training_files()
    contents, usual, choices = files[name]
    path = tmp_path / "checkpoint.pth.tar"
    write_checkpoint(path, contents)
    if usual is None:
        with pytest.raises(MismatchedWeights, match=r"several networks.*--which") as caught:
            read_vit(path, heads=2)
        assert str(path) in str(caught.value)
    else:
        assert read_checkpoint(path).chosen == usual
        assert_network(path, average if usual == "teacher" else weights)
    for which, place in choices.items():
        checkpoint = read_checkpoint(path, which)
        assert checkpoint.chosen == place
        assert place not in checkpoint.others
        assert "dino_loss" not in checkpoint.others
        assert {each for each in choices.values() if each != place} <= {
            *checkpoint.others,
            *(f"{place.rpartition('.')[0]}.{each}" for each in checkpoint.others),
            *(f"state_dict.{each}" for each in checkpoint.others),
        }
        assert_network(path, average if which in AVERAGES else weights, which=which)
    with pytest.raises(MismatchedWeights, match=r"no network called nowhere: it has \w+"):
        read_checkpoint(path, "nowhere")
    if name in ("timm", "deit"):
        with pytest.raises(MismatchedWeights, match=r"no network called student: it has .*ema"):
            read_vit(path, heads=2, which="student")


def test_heads_of_a_small_moco_are_asked_for(tmp_path):
    """Of 384 channels it has 12, and all others 6."""
    weights = empty_network(384)
    for folders, heads in (("module.base_encoder.", None), ("module.encoder.", 6)):
        write_checkpoint(
            tmp_path / "net.pth.tar",
            {"state_dict": {folders + name: value for name, value in weights.items()}},
        )
        if heads is None:
            with pytest.raises(AmbiguousWeights, match="12 in MoCo v3"):
                read_vit(tmp_path / "net.pth.tar")
            assert read_vit(tmp_path / "net.pth.tar", heads=12).config.heads == 12
        else:
            assert read_vit(tmp_path / "net.pth.tar").config.heads == heads


def test_states_of_optimizers_and_losses_are_no_networks(tmp_path):
    contents = training_files()[2]["dino"][0]
    write_checkpoint(tmp_path / "dino.pth", contents)
    checkpoint = read_checkpoint(tmp_path / "dino.pth")
    assert (checkpoint.chosen, checkpoint.others) == ("teacher", ("student",))
    assert "head.last_layer.weight_g" in read_vit(tmp_path / "dino.pth", heads=2).unused


def test_the_tool_says_and_takes_which(tmp_path, capsys):
    weights, average, files = training_files()
    path = tmp_path / "model_best.pth.tar"
    write_checkpoint(path, files["timm"][0])
    assert main(["inspect", str(path), "--heads", "2"]) == 0
    said = capsys.readouterr().out
    assert "read from: state_dict\n" in said
    assert "also in the file: state_dict_ema (--which)" in said
    assert main(["inspect", str(path), "--heads", "2", "--which", "ema", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["which"], found["others"], found["file"]) == (
        "state_dict_ema",
        ["state_dict"],
        [],
    )
    out = str(tmp_path / "out.safetensors")
    command = ["convert", str(path), out, "--to", "timm", "--heads", "2"]
    assert main([*command, "--which", "ema"]) == 0
    assert_same(read_arrays(out)["norm.bias"], average["norm.bias"])
    assert main(command) == 0
    assert_same(read_arrays(out)["norm.bias"], weights["norm.bias"])
    assert main([*command, "--which", "teacher"]) == 1
    assert "no network called teacher: it has" in capsys.readouterr().err


def test_many_dictionaries_in_each_other_are_gone_through_once(tmp_path):
    """Ten thousand places for each of ten thousand places: 10^16 ways down."""
    inner = Raw(b"}q\x09(X\x01\x00\x00\x00aK\x01u")
    level = inner
    for _ in range(3):
        items = b"".join(pickled(str(i)) + b"h\x09" for i in range(10_000))
        level = Raw(level + b"0}(" + items + b"uq\x09")
    path = tmp_path / "net.pth"
    path.write_bytes(zip_file(level, {}))
    began = time.process_time()
    assert read_arrays(path) == {}
    assert time.process_time() - began < 5


def test_long_names_in_many_places_take_no_time_and_no_memory(tmp_path):
    """A name of 60 kB stands in each of 20,000 dictionaries, and before each of them."""
    long = pickle.dumps("x" * 60_000, 2)[2:-3] + b"q\x09"
    array = b"h\x09" + tensor(stored("FloatStorage", "0", 1), 0, (1,), (1,))
    inner = [b"}" + array + b"s", b"}h\x09}X\x03\x00\x00\x00a.b" + array[2:] + b"ss"]
    path = tmp_path / "net.pth"
    for value in inner:
        items = b"".join(pickle.dumps(str(i), 2)[2:-3] + value for i in range(10_000))
        path.write_bytes(zip_file(Raw(long + b"0}(" + items + b"u"), {"0": np.ones(1, np.float32)}))
        began = time.process_time()
        assert read_arrays(path) == {}
        assert time.process_time() - began < 5
    assert to_names_of_timm(network(), source="")[1]
    for name in ("x." * 30_000 + "blocks.0.norm1.weight", f"blocks.{'9' * 5000}.norm1.weight"):
        with pytest.raises(MismatchedWeights, match=r"no place for: (x\.x|blocks\.999)"):
            to_names_of_timm(network() | {name: np.ones(16, np.float32)}, source="file")


# Plain bags of values


def test_bags_of_values_become_dictionaries():
    inner = types.SimpleNamespace(rate=np.float32(0.5), names={"a"})
    args = argparse.Namespace(lr=1e-3, data=pathlib.PurePosixPath("/data/x"), inner=inner, kind=int)
    args.windows = pathlib.PureWindowsPath("C:/x")
    args.counts = collections.Counter("aab")
    args.lists = collections.defaultdict(list, {"x": [1]})
    args.itself = args
    for protocol in (2, 3, 4, 5):
        found = read_pickle(pickle.dumps(args, protocol))
        assert found.pop("itself") is found
        assert_same(
            found,
            {
                "lr": 1e-3,
                "data": "/data/x",
                "inner": {"rate": np.float32(0.5), "names": {"a"}},
                "kind": "int",
                "windows": "C:\\x",
                "counts": {"a": 2, "b": 1},
                "lists": {"x": [1]},
            },
        )


class Config(dict):
    """As `omegaconf` and `yacs` have them: no plain data."""


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"args": called("argparse", "Namespace", {"a": 1})}, "makes no sense|TypeError"),
        ({"args": called("argparse", "ArgumentParser")}, "asks for 'argparse.ArgumentParser'"),
        ({"args": Raw(b"cargparse\nNamespace\n)\x81K\x01b")}, "that do not come by name"),
        ({"args": Raw(b"cargparse\nNamespace\n)\x81}K\x01K\x02sb")}, "do not come by name"),
        ({"args": Raw(b"cargparse\nNamespace\n(K\x01t\x81")}, r"\(NEWOBJ\)"),
        ({"args": named("argparse", "Namespace")}, "holds the function 'argparse.Namespace'"),
        ({"cfg": Raw(pickle.dumps(Config(), 2)[2:-1])}, "'test_weights_checkpoints.Config'"),
        ({"cfg": named("omegaconf.dictconfig", "DictConfig")}, "asks for 'omegaconf.dictconfig"),
        ({"x": called("collections", "defaultdict", named("torch", "Size"))}, "made by a function"),
        ({"x": called("pathlib", "PosixPath", 3)}, "a path of something else than text"),
        ({"x": called("builtins", "int", "1")}, "calls TypeName"),
    ],
)  # fmt: skip
def test_other_objects_are_refused_by_name(tmp_path, value, sentence):
    path = tmp_path / "net.pth"
    path.write_bytes(zip_file(value, {}))
    with pytest.raises(UnreadableWeights, match=sentence) as caught:
        read_arrays(path)
    assert str(caught.value).startswith(str(path))
    if isinstance(caught.value, UnsafePickle):
        assert "save nothing but the weights, torch.save(model.state_dict(), FILE)" in str(
            caught.value
        )


def colliding_tuples(count):
    """Different tuples of one hash: -1 and -2 have the same."""
    for i in range(count):
        yield tuple(-1 - (i >> bit & 1) for bit in range(16))


def test_keys_that_collide_are_refused_and_others_are_read_in_linear_time():
    assert len({hash(key) for key in colliding_tuples(1000)}) == 1
    few = dict.fromkeys(colliding_tuples(64), 1)
    assert read_pickle(pickle.dumps(few)) == few
    many = list(colliding_tuples(40_000))
    one = b"".join(pickle.dumps(key, 2)[2:-1] + b"K\x01s" for key in many)  # one after the other
    longs = np.longdouble(1) + np.arange(1000) * np.finfo(np.longdouble).eps
    for data in (
        pickle.dumps(dict.fromkeys(colliding_tuples(100))),
        pickle.dumps(set(colliding_tuples(100))),
        pickle.dumps(frozenset(colliding_tuples(100)), 2),
        b"\x80\x02}" + one + b".",
        *([pickle.dumps(dict.fromkeys(longs))] if len({hash(x) for x in longs}) < 10 else []),
    ):
        began = time.process_time()
        with pytest.raises(UnreadableWeights, match="keys have been chosen to take for ever"):
            read_pickle(data)
        assert time.process_time() - began < 1
    plain = {(i, -i, f"x{i}"): i for i in range(20_000)} | {i / 7: i for i in range(20_000)}
    assert read_pickle(pickle.dumps(plain)) == plain


# Shards


def write_shards(folder, weights, ending="safetensors", stem="model"):
    names = list(weights)
    files = {}
    for number in (1, 2, 3):
        part = names[number - 1 :: 3]
        file = f"{stem}-0000{number}-of-00003.{ending}"
        write = write_safetensors if ending == "safetensors" else write_torch
        write(folder / file, {name: weights[name] for name in part})
        files |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return index


@pytest.mark.parametrize(("ending", "stem"), [("safetensors", "model"), ("bin", "pytorch_model")])
def test_shards_are_read_by_their_index_or_any_one(tmp_path, ending, stem):
    weights = network()
    index = write_shards(tmp_path, weights, ending, stem)
    for path in (index, tmp_path / f"{stem}-00002-of-00003.{ending}"):
        assert_network(path, weights)
        assert read_checkpoint(path).about == ("3 shards",)
        assert_same(in_order(read_arrays(path)), in_order(weights))
    index.unlink()
    found = read_arrays(tmp_path / f"{stem}-00001-of-00003.{ending}")
    assert_same(in_order(found), in_order(weights))


def test_missing_and_foreign_shards_are_named(tmp_path):
    index = write_shards(tmp_path, network())
    (tmp_path / "model-00003-of-00003.safetensors").rename(tmp_path / "kept")
    for path in (index, tmp_path / "model-00001-of-00003.safetensors"):
        with pytest.raises(UnreadableWeights, match=r"3 files, of which model-00003-of-00003\.saf"):
            read_arrays(path)
    shutil.copy(
        tmp_path / "model-00001-of-00003.safetensors", tmp_path / "model-00003-of-00003.safetensors"
    )
    with pytest.raises(UnreadableWeights, match="which another shard holds too"):
        read_arrays(index)
    (tmp_path / "kept").rename(tmp_path / "model-00003-of-00003.safetensors")
    names = json.loads(index.read_text())["weight_map"]
    for found, words in (
        (names | {"more": "model-00001-of-00003.safetensors"}, "names more, which no shard holds"),
        ({"a": "../model.safetensors"}, r"beside it, not '\.\./model\.safetensors'"),
        ({"a": "/etc/passwd"}, "beside it, not '/etc/passwd'"),
        ({"a": 3}, "beside it, not '3'"),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": found}))
        with pytest.raises(UnreadableWeights, match=words):
            read_arrays(index)
    for text in ("{", "[]", "[" * 100_000, "\xff"):
        index.write_text(text, "latin-1")
        with pytest.raises(UnreadableWeights, match=r"index\.json"):
            read_arrays(index)


# Endings, contents and numbers


@pytest.mark.parametrize("ending", ["pth.tar", "ckpt", "bin", "pt", "pyth", "weights", ""])
def test_a_checkpoint_is_known_whatever_it_is_called(tmp_path, ending):
    weights = network()
    path = tmp_path / f"model{ending and '.'}{ending}"
    write_torch(path, weights)
    assert_network(path, weights)
    if ending in ("weights", ""):
        write_safetensors(path, weights)
        assert_network(path, weights)
        with open(path, "wb") as file:
            np.savez(file, **weights)
        assert_network(path, weights)
        path.write_bytes(b"\x80\x02}.")
        with pytest.raises(UnreadableWeights, match="not a checkpoint of PyTorch"):
            read_arrays(path)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"GGUF\x03", "GGUF"),
        (b"<!doctype html>", "a web page"),
        (b"\x93NUMPY\x01", "single NumPy array"),
        (b"\x1f\x8b\x08", "gzip"),
    ],
)
def test_files_that_are_no_weights_say_what_they_are(tmp_path, start, words):
    for name in ("model.safetensors", "model.pth", "model.tar", "model"):
        (tmp_path / name).write_bytes(start)
        with pytest.raises(UnreadableWeights, match=words):
            read_arrays(tmp_path / name)


def test_files_of_no_known_kind_and_folders_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("weights")
    with pytest.raises(UnreadableWeights, match=r"notes\.txt is of no known kind"):
        read_arrays(tmp_path / "notes.txt")
    with pytest.raises(UnreadableWeights, match="cannot be read"):
        read_arrays(tmp_path / "absent.tar")
    for name in ("run", "run.safetensors", "run.pth"):
        (tmp_path / name).mkdir()
        with pytest.raises(UnreadableWeights, match="is a folder: give a file in it"):
            read_arrays(tmp_path / name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_halves_are_read_and_quarters_are_refused(tmp_path, dtype):
    short = {
        name: value.astype(getattr(ml_dtypes, dtype, dtype)) for name, value in network().items()
    }
    path = tmp_path / "net.safetensors"
    write_safetensors(path, short)
    if "float8" in dtype:
        with pytest.raises(
            UnreadableWeights, match=r"holds \S+ in F8_\w+, .* bring the weights in"
        ):
            read_vit(path, heads=2)
        size = short["norm.bias"].size
        eight = called("torch._utils", "_rebuild_tensor_v3", stored("UntypedStorage", "0", size), 0,
                       (size,), (1,), False, {}, named("torch", dtype))  # fmt: skip
        path.with_suffix(".pth").write_bytes(
            zip_file({"norm.bias": eight}, {"0": short["norm.bias"].tobytes()})
        )
        with pytest.raises(UnreadableWeights, match=rf"holds norm\.bias in {dtype}, .* bring the"):
            read_arrays(path.with_suffix(".pth"))
    else:
        write_torch(path.with_suffix(".pth"), short)
        for each in (path, path.with_suffix(".pth")):
            assert_network(each, {n: v.astype(np.float32) for n, v in short.items()})
            assert read_checkpoint(each).about == (dtype,)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, number):
    weights = network()
    weights["blocks.1.norm1.bias"] = weights["blocks.1.norm1.bias"].copy()
    weights["blocks.1.norm1.bias"][3] = number
    write_safetensors(tmp_path / "net.safetensors", weights)
    words = r"NaN or infinite numbers .* in 1 parameters.*: blocks\.1\.norm1\.bias"
    with pytest.raises(MismatchedWeights, match=words):
        read_vit(tmp_path / "net.safetensors", heads=2)
    wide = {name: value.astype(np.float64) for name, value in network().items()}
    wide["norm.bias"] = np.full(16, 1e300)
    write_safetensors(tmp_path / "net.safetensors", wide)
    with pytest.raises(MismatchedWeights, match=r"in float32 in 1 parameters.*: norm\.bias"):
        read_vit(tmp_path / "net.safetensors", heads=2)


def test_the_decoder_of_mae_is_not_used():
    weights, _ = recorded("hf-vit")
    weights = {
        f"vit.{n.removeprefix('vit.')}": v for n, v in weights.items() if "classifier" not in n
    }
    decoder = {
        "decoder.mask_token": np.ones((1, 1, 8), np.float32),
        "decoder.decoder_layers.0.layernorm_before.weight": np.ones(8, np.float32),
    }
    unused = to_names_of_timm(weights | decoder, source="")[2]
    assert set(decoder) <= set(unused)


def test_a_file_of_mae_is_pooled_by_average(tmp_path):
    weights, _ = recorded("hf-vit")
    weights = {n: v for n, v in weights.items() if "classifier" not in n and "pooler" not in n}
    weights["decoder.decoder_pred.weight"] = np.ones((48, 8), np.float32)
    write_safetensors(tmp_path / "mae.safetensors", weights)
    found = read_vit(tmp_path / "mae.safetensors", heads=2)
    assert (found.family, found.pooling, found.layout) == ("mae", "avg", "hf-vit")
    assert found.normalised == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert found.unused == ("decoder.decoder_pred.weight",)


# TorchScript


def script(weights):
    """Operations of the modules of an archive, by the names of their parameters."""
    tree: dict = {}
    for name, value in weights.items():
        *folders, last = name.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    storages = {}

    def module(tree):
        attributes = {"training": False, "_is_full_backward_hook": None}
        for name, value in tree.items():
            if isinstance(value, dict):
                attributes[name] = module(value)
            else:
                key = str(len(storages))
                storages[key] = np.array(value, order="C")
                strides = tuple(step // value.itemsize for step in storages[key].strides)
                kind = KINDS[value.dtype.name]
                attributes[name] = tensor(stored(kind, key, value.size), 0, value.shape, strides)
        attributes["sizes"] = called("torch.jit._pickle", "build_intlist", [1, 2])
        start = f"c__torch__.model.___torch_mangle_{len(tree)}\nM\n)\x81".encode("latin-1")
        return Raw(start + pickled(attributes) + b"b")

    return module(tree), storages


def write_script(path, weights, code=b"raise SystemExit"):
    value, storages = script(weights)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02" + pickled(value) + b".")
        for key, array in storages.items():
            archive.writestr(f"model/data/{key}", array.tobytes())
        archive.writestr("model/constants.pkl", b"\x80\x02).")
        archive.writestr("model/version", b"3\n")
        archive.writestr("model/code/__torch__/model.py", code * 100, zipfile.ZIP_DEFLATED)


def test_the_tensors_of_a_torchscript_archive_are_read(tmp_path):
    weights, _ = recorded("openai-clip")
    names = ("input_resolution", "context_length", "vocab_size")
    facts = {name: np.array(7, np.int64) for name in names}
    path = tmp_path / "ViT-B-32.pt"
    write_script(path, weights | facts)
    assert_same(in_order(read_arrays(path)), in_order(weights | facts))
    assert read_checkpoint(path).about == ("TorchScript",)
    found = read_vit(path, heads=2)
    assert (found.family, found.layout, found.config.gelu) == ("clip", "clip", "quick")
    assert set(facts) <= set(found.unused)


def test_other_torchscript_archives_are_refused(tmp_path):
    path = tmp_path / "net.pt"
    write_script(path, {})
    with pytest.raises(UnreadableWeights, match="TorchScript program without parameters by name"):
        read_arrays(path)
    nested = Raw(b"c__torch__\nM\n)\x81q\x01}X\x01\x00\x00\x00ah\x01sb")  # holds itself
    laughs = b"c__torch__\nM\n)\x81q\x01"
    for _ in range(60):  # each holds the one before twice: 2^60 names
        laughs += b"0c__torch__\nM\n)\x81}(X\x01\x00\x00\x00ah\x01X\x01\x00\x00\x00bh\x01ubq\x01"
    for value, words in (
        (nested, "RecursionError|many times the size"),
        (Raw(laughs), "many times the size"),
        (called("torch.jit._pickle", "build_intlist", 3), "a list of TorchScript that is a int"),
        (called("posix", "system", "true"), "asks for 'posix.system'"),
        (named("__torch__", "M"), "holds the function '__torch__'"),
    ):
        path.write_bytes(zip_file(value, {}, **{"constants.pkl": b""}))
        began = time.process_time()
        with pytest.raises(UnreadableWeights, match=words):
            read_arrays(path)
        assert time.process_time() - began < 5


@pytest.mark.slow
def test_archives_of_pytorch_itself(tmp_path):
    """In an environment of its own: what `torch.jit.save` writes of traced and scripted modules."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True, timeout=120)
    python = tmp_path / "env" / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "torch==2.13.0", "numpy"]
    subprocess.run(command, check=True, timeout=1800)
    code = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 2).half().float()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
        self.register_buffer("input_resolution", torch.tensor(8))
        self.floats, self.words = [1.5], {"a": [1, 2]}
    def forward(self, images):
        return self.layers(self.conv(images).mean((2, 3)) * self.floats[0])
net = Net().eval()
torch.jit.save(torch.jit.script(net), "scripted.pt")
torch.jit.save(torch.jit.trace(net, torch.ones(1, 3, 8, 8)), "traced.pt")
torch.jit.save(torch.jit.freeze(torch.jit.script(net)), "frozen.pt")
torch.save(net.state_dict(), "state.pth")
"""
    (tmp_path / "net.py").write_text(code)  # whose source `torch.jit.script` wants
    subprocess.run([python, "net.py"], check=True, cwd=tmp_path, timeout=600)
    for name in ("scripted.pt", "traced.pt"):
        assert_same(read_arrays(tmp_path / name), read_arrays(tmp_path / "state.pth"))
    with pytest.raises(UnreadableWeights, match="without parameters by name"):
        read_arrays(tmp_path / "frozen.pt")


# Files of NumPy


def npz_with(header, data=b"", compress=zipfile.ZIP_STORED, version=b"\x01\x00"):
    """An archive with one member `a`, whose header is text."""
    text = header.encode() + b"\n"
    size = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY" + version + size + text + data, compress)
    return file.getvalue()


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npz_with(HEADER % 2**33, b"1234"), r"a\.npy ends before its array does"),
        (npz_with(HEADER % 2, b"1234"), "expected 8 bytes got 4"),
        (npz_with(HEADER % 2**22, bytes(2**24), zipfile.ZIP_DEFLATED), "more than 100 times as la"),
        (npz_with("{'descr': '<f4', (", b"1234"), r"net\.npz"),
        (npz_with(HEADER % 1, b"1234", version=b"\x03\x00"), r"a\.npy is an array of records"),
        (npz_with(HEADER % 1, b"1234", version=b"\x09\x00"), r"net\.npz"),
    ],
)
def test_an_npz_file_does_not_take_more_than_it_has(tmp_path, content, words):
    path = tmp_path / "net.npz"
    path.write_bytes(npz_with(HEADER % 1, b"1234"))
    assert read_arrays(path)["a"].shape == (1,)
    path.write_bytes(npz_with(HEADER % "1L", b"1234"))  # of Python 2
    assert read_arrays(path)["a"].shape == (1,)
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UnreadableWeights, match=words):
        read_arrays(path)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()
