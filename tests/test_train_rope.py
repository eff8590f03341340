"""Training of ViTs with rotary positions: from scratch, and from a published DINOv3."""

import numpy as np
import pytest
from conftest import TINY
from test_weights_vit import file_of

from ggem_jax import load_vit
from train import classify
from train.log import read_metrics


def test_a_rope_vit_learns_in_bfloat16_with_blocks_recomputed(tmp_path):
    flags = ["--model.position", "rope", "--model.dtype", "bfloat16", "--model.remat"]
    classify.main([*TINY, *flags, "--epochs", "4", "--out", str(tmp_path / "run")])
    lines = read_metrics(tmp_path / "run", "train")
    assert lines[-1]["loss"] < 2 < lines[0]["loss"]
    loaded = load_vit(tmp_path / "run")
    assert (loaded.model.config.position, loaded.model.config.remat) == ("rope", True)
    params = loaded.variables["params"]
    assert "position" not in params
    assert set(params["blocks_0"]["attention"]["key"]) == {"kernel"}
    side = loaded.image
    images = np.random.default_rng(0).normal(size=(1, side, 2 * side, 3)).astype(np.float32)
    assert np.isfinite(loaded.model.apply(loaded.variables, images).logits).all()


@pytest.mark.parametrize("name", ["hf-dinov3", "dinov3-swiglu"])
def test_fine_tuning_starts_from_a_published_dinov3(name, tmp_path):
    path, _ = file_of(name, tmp_path)
    flags = ["--data", "digits", "--init", str(path), "--model.heads", "2", "--pool.kind", "ggem"]
    flags += ["--epochs", "1", "--batch", "128", "--model.image", "16"]
    classify.main([*flags, "--out", str(tmp_path / "run")])
    config = load_vit(tmp_path / "run").model.config
    assert (config.position, config.registers, config.norm_eps) == ("rope", 4, 1e-5)
    assert config.rope_dtype == ("bfloat16" if name == "dinov3-swiglu" else "float32")
