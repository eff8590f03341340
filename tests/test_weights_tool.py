"""python -m ggem_jax.weights: what a file is, and the same weights under other names."""

import json

import jax
import numpy as np
import pytest
from test_weights_vit import file_of, recorded

from ggem_jax.weights import read_safetensors, write_safetensors
from ggem_jax.weights.__main__ import main
from ggem_jax.weights.vit import read_vit


def test_inspect_says_what_a_file_is_and_what_is_not_used(tmp_path, capsys):
    path, _ = file_of("mae", tmp_path)
    assert main(["inspect", str(path), "--heads", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["family"], found["layout"], found["pooling"], found["classes"]) == ("mae", "timm", "avg", 0)
    assert found["mean"] == [0.485, 0.456, 0.406]
    assert set(found["unused"]) == {"mask_token", "decoder_embed.weight", "decoder_blocks.0.norm1.weight"}
    weights, _ = recorded("mae")
    assert found["parameters"] == sum(array.size for name, array in weights.items() if name not in found["unused"])
    assert main(["inspect", str(path), "--heads", "2"]) == 0
    said = capsys.readouterr().out
    assert "MAE" in said
    assert "decoder_embed.weight" in said
    path, _ = file_of("timm-vit", tmp_path)
    assert main(["inspect", str(path), "--heads", "2"]) == 0
    assert "not known" in capsys.readouterr().out


def test_convert_writes_both_namings(tmp_path, capsys):
    path, _ = file_of("augreg", tmp_path)
    for names in ("flax", "timm"):
        assert main(["convert", str(path), str(tmp_path / f"{names}.safetensors"), "--to", names]) == 0
    assert "arrays written" in capsys.readouterr().out
    published = read_vit(path)
    flax = read_safetensors(tmp_path / "flax.safetensors")
    for where, leaf in jax.tree_util.tree_leaves_with_path(published.variables):
        np.testing.assert_array_equal(flax["/".join(part.key for part in where)], leaf)
    again = read_vit(tmp_path / "timm.safetensors", heads=2)
    for one, other in zip(jax.tree.leaves(again.variables), jax.tree.leaves(published.variables), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("words", [["inspect", "absent.safetensors"], ["inspect", "weights.h5"], ["convert", "GOOD", "out.bin"]])
def test_what_goes_wrong_is_one_sentence(tmp_path, capsys, words):
    write_safetensors(tmp_path / "weights.safetensors", recorded("timm-vit")[0])
    words = [str(tmp_path / "weights.safetensors") if word == "GOOD" else word for word in words]
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("ggem_jax.weights: ")
    assert said.err.count("\n") == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["weights.safetensors"]
