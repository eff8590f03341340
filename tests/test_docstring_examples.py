"""The examples in the docstrings of ggem_jax: each prints what it shows, with the names of the
front door.
"""

import doctest
import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ggem_jax
from ggem_jax.weights import write_safetensors

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in sorted((ROOT / "ggem_jax").rglob("*.py"))
    if ">>>" in path.read_text()
]
# what a user meets first; each shows how it is used
FIRST = (
    "ggem_pool", "gem_pool", "norm_ggem_pool", "superglobal_pool", "regional_gem", "scale_gem",
    "l2_normalize", "GGeM", "ViT", "vit_config", "load_vit", "arcface_loss", "proxy_anchor_loss",
    "normalised_softmax_loss", "clip_loss", "siglip_loss",
)  # fmt: skip


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What examples may use: the front door, jax, jnp, np, and `vit_file`, a small file in timm's
    names."""
    folder = tmp_path_factory.mktemp("examples")
    recorded = Path(__file__).parent / "data" / "vit" / "timm-vit.npz"
    with np.load(recorded) as file:
        weights = {key: file[key] for key in file.files if key.startswith("weights/")}
    arrays = {key[8:]: value.astype(np.float32) for key, value in weights.items()}
    write_safetensors(folder / "vit.safetensors", arrays)
    (folder / "config.json").write_text('{"num_attention_heads": 2}')  # no published size
    front = {name: getattr(ggem_jax, name) for name in ggem_jax.__all__}
    return front | {"jax": jax, "jnp": jnp, "np": np, "vit_file": folder / "vit.safetensors"}


@pytest.mark.parametrize("module", MODULES)
def test_examples_give_what_they_show(module, names):
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    loaded = importlib.import_module(module)
    for test in finder.find(loaded, module, extraglobs={}, globs={}):
        test.globs = dict(names)
        report: list[str] = []
        assert runner.run(test, out=report.append).failed == 0, "".join(report)
    assert runner.summarize(verbose=False).attempted > 0


@pytest.mark.parametrize("name", FIRST)
def test_first_met_names_have_an_example(name):
    doc = getattr(ggem_jax, name).__doc__
    assert re.search(r"\n *Example:\n +>>> ", doc), doc
    assert re.search(r"\n *Args:\n", doc) or name == "ViTConfig"
