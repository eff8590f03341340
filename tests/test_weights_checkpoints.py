"""ggem_jax/files: the checkpoints that training scripts write are read, and which of their networks
it was is said: arrays.py, networks.py, shards.py, kinds.py and torchscript.py.
"""

import argparse
import collections
import json
import pathlib
import pickle
import shutil
import time
import types

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
