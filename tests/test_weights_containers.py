"""Files of weights by what is in them: endings, numbers, TorchScript and NumPy."""

import io
import subprocess
import sys
import time
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from conftest import assert_same
from test_weights_checkpoints import KINDS, assert_network, in_order, network
from test_weights_files import Raw, called, named, pickled, stored, tensor, zip_file
from test_weights_vit import recorded

from ggem_jax.files.arrays import read_arrays, read_checkpoint
from ggem_jax.weights import (
    MismatchedWeights,
    UnreadableWeights,
    write_safetensors,
    write_torch,
)
from ggem_jax.weights.vit import read_vit
from ggem_jax.weights.vit_layouts import to_names_of_timm

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
