"""python -m ggem_jax.weights: identifies a file, and writes the same weights under other names."""

import dataclasses
import json
import zipfile

import jax
import numpy as np
import pytest
from flax import traverse_util
from test_weights_vit import file_of, recorded

from ggem_jax.models.config import ViTConfig
from ggem_jax.models.vit import ViT
from ggem_jax.pooling import avg_pool
from ggem_jax.weights import read_safetensors, write_safetensors
from ggem_jax.weights.__main__ import main
from ggem_jax.weights.text import read_text
from ggem_jax.weights.vit import read_vit


def test_inspect_says_what_a_file_is_and_what_is_not_used(tmp_path, capsys):
    path, _ = file_of("mae", tmp_path)
    assert main(["inspect", str(path), "--heads", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["family"], found["layout"], found["pooling"], found["classes"]) == (
        "mae",
        "timm",
        "avg",
        0,
    )
    assert found["mean"] == [0.485, 0.456, 0.406]
    assert set(found["unused"]) == {
        "mask_token",
        "decoder_embed.weight",
        "decoder_blocks.0.norm1.weight",
    }
    weights, _ = recorded("mae")
    assert found["parameters"] == sum(
        array.size for name, array in weights.items() if name not in found["unused"]
    )
    assert main(["inspect", str(path), "--heads", "2"]) == 0
    said = capsys.readouterr().out
    assert "MAE" in said
    assert "decoder_embed.weight" in said
    path, _ = file_of("timm-vit", tmp_path)
    assert main(["inspect", str(path), "--heads", "2"]) == 0
    said = capsys.readouterr().out
    assert "not known" in said
    assert "2 heads" in said
    assert "GELU exact" in said
    assert main(["inspect", str(path), "--heads", "4", "--gelu", "tanh"]) == 0
    said = capsys.readouterr().out
    assert "4 heads" in said
    assert "GELU tanh" in said


def test_convert_writes_both_namings(tmp_path, capsys):
    path, _ = file_of("augreg", tmp_path)
    for names in ("flax", "timm"):
        (tmp_path / names).mkdir()
        out = str(tmp_path / names / "weights.safetensors")
        assert main(["convert", str(path), out, "--to", names]) == 0
    assert "arrays written" in capsys.readouterr().out
    published = read_vit(path)
    flax = read_safetensors(tmp_path / "flax" / "weights.safetensors")
    for where, leaf in jax.tree_util.tree_leaves_with_path(published.variables):
        np.testing.assert_array_equal(flax["/".join(part.key for part in where)], leaf)
    again = read_vit(tmp_path / "timm" / "weights.safetensors", heads=2)
    for one, other in zip(
        jax.tree.leaves(again.variables), jax.tree.leaves(published.variables), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_inspect_says_that_a_text_tower_is_there_and_what_it_is(tmp_path, capsys):
    path, _ = file_of("text-open_clip", tmp_path)
    assert main(["inspect", str(path), "--heads", "2"]) == 0
    said = capsys.readouterr().out
    assert "the image tower of CLIP" in said
    assert said.count("a text tower is in the file too: --tower text\n") == 1
    assert said.count("resblocks.*.attn.in_proj_weight") == 1
    assert main(["inspect", str(path), "--heads", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text_tower"] is True
    assert main(["inspect", str(path), "--heads", "2", "--tower", "text"]) == 0
    said = capsys.readouterr().out
    for words in (
        "the text tower of CLIP",
        "GELU quick",
        "30 ids, texts of up to 8",
        "sees what is before it",
        "5 outputs",
        "bias None",
    ):
        assert words in said
    path, _ = file_of("text-hf-siglip", tmp_path)
    assert main(["inspect", str(path), "--heads", "2", "--tower", "text", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    weights, _ = recorded("text-hf-siglip")
    assert (found["family"], found["tower"], found["outputs"]) == ("siglip", "text", 5)
    assert found["logit_bias"] == float(weights["logit_bias"].item())
    assert all(name.startswith("vision_model.") for name in found["unused"])
    for name, has in (("mae", False), ("timm-swiglu", False)):
        path, _ = file_of(name, tmp_path)
        assert main(["inspect", str(path), "--heads", "2"]) == 0
        said = capsys.readouterr().out
        assert ("text tower" in said) is has
    assert "SwiGLU" in said
    assert "GELU exact" not in said


def test_convert_writes_a_text_tower_under_both_names(tmp_path, capsys):
    path, _ = file_of("text-open_clip", tmp_path)
    for names in ("flax", "published"):
        out = str(tmp_path / f"{names}.safetensors")
        assert (
            main(["convert", str(path), out, "--tower", "text", "--to", names, "--heads", "2"]) == 0
        )
    published = read_text(path, heads=2)
    flax = read_safetensors(tmp_path / "flax.safetensors")
    for where, leaf in jax.tree_util.tree_leaves_with_path(published.variables):
        np.testing.assert_array_equal(flax["/".join(part.key for part in where)], leaf)
    again = read_safetensors(tmp_path / "published.safetensors")
    assert set(again) == set(read_safetensors(path)) - set(published.unused)
    for name, array in again.items():
        np.testing.assert_array_equal(array, read_safetensors(path)[name])


WRONG = {
    "absent": (["inspect", "absent.safetensors"], "absent.safetensors"),
    "ending": (["inspect", "weights.h5"], ".safetensors, .npz"),
    "output": (["convert", "GOOD", "out.bin"], "out.bin"),
    "no text": (["inspect", "GOOD", "--tower", "text"], "no text tower of a known layout"),
    "text to timm": (
        ["convert", "GOOD", "out.safetensors", "--tower", "text", "--to", "timm"],
        "may be flax or published, not timm",
    ),
    "head of a text tower": (
        ["convert", "GOOD", "out.safetensors", "--tower", "text", "--no-head"],
        "--no-head and --overwrite are of image towers",
    ),
    "image to its own": (
        ["convert", "GOOD", "out.safetensors", "--to", "published"],
        "may be flax or timm or hf, not published",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_goes_wrong_is_one_sentence(tmp_path, capsys, monkeypatch, case):
    words, cause = WRONG[case]
    monkeypatch.chdir(tmp_path)
    write_safetensors(tmp_path / "weights.safetensors", recorded("timm-vit")[0])
    words = [str(tmp_path / "weights.safetensors") if word == "GOOD" else word for word in words]
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("ggem_jax.weights: ")
    assert said.err.count("\n") == 1
    assert cause in said.err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["weights.safetensors"]


def test_inspect_says_that_a_file_is_our_own(tmp_path, capsys):
    config = ViTConfig(patch=4, width=16, depth=2, heads=2, mlp_width=24, image=8)
    variables = ViT(config, avg_pool, 5).init(jax.random.key(0), np.zeros((1, 8, 8, 3)))
    path = tmp_path / "own.safetensors"
    write_safetensors(path, traverse_util.flatten_dict(variables, sep="/"))
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("a ViT of our own, which load_vit and --init read")
    assert "width 16, 2 blocks, 2 heads, MLP 24; patches of 4 in images of 8; GELU exact" in said
    assert "pooled by avg, 5 outputs of the head" in said
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"] == dataclasses.asdict(config)
    assert found["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(variables))
    for flags, words in (("--heads 7", "leave out --heads"), ("--tower text", "no text tower")):
        assert main(["inspect", str(path), *flags.split()]) == 1
        assert words in capsys.readouterr().err


def written(path, kind):
    """A small published network with one thing wrong."""
    arrays, _ = recorded("timm-vit")
    if kind == "far block":
        arrays["blocks.99999999.norm1.weight"] = arrays["blocks.0.norm1.weight"]
    elif kind == "no axes":
        arrays["pos_embed"] = np.float32(1).reshape(())
    elif kind == "whole numbers":
        arrays["pos_embed"] = arrays["pos_embed"].astype(np.int8)
    write_safetensors(path, arrays)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("far block", "block 99999999"),
        ("no axes", "pos_embed"),
        ("whole numbers", "no arrays of real numbers: pos_embed int8"),
    ],
)
def test_odd_parameters_are_named(kind, sentence, tmp_path, capsys):
    written(tmp_path / "w.safetensors", kind)
    assert main(["inspect", str(tmp_path / "w.safetensors")]) == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("kind", ["member", "deflate"])
def test_zip_files_that_are_no_npz_are_refused(kind, tmp_path, capsys):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("readme.txt" if kind == "member" else "a.npy", b"x" * 500)
    if kind == "deflate":
        np.savez_compressed(path, a=np.zeros((400, 40)))
        content = bytearray(path.read_bytes())
        content[60:90] = bytes(30)
        path.write_bytes(content)
    assert main(["inspect", str(path)]) == 1
    assert "is not a readable npz file" in capsys.readouterr().err


def test_a_file_is_not_converted_onto_itself(tmp_path, capsys):
    path, _ = file_of("mae", tmp_path)
    before = path.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(path)
    for out in (path, tmp_path / "link.safetensors"):
        assert main(["convert", str(path), str(out), "--heads", "2"]) == 1
        assert "is the file that is converted: give another name" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_file_of_another_kind_named_npz_gets_no_advice_to_unpickle(tmp_path, capsys):
    path = tmp_path / "vit.npz"
    path.write_bytes(b"no zip file")
    assert main(["inspect", str(path)]) == 1
    said = capsys.readouterr().err
    assert "is not a readable npz file: it holds pickled objects, or is a file of another" in said
    assert "allow_pickle" not in said
