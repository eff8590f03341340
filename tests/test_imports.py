"""The picture of the imports: who may import whom, and what an import must not start or load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# folder -> the folders of ours that it may import from
ARROWS = {
    "kernels": set(),
    "ggem_jax": {"ggem_jax"},
    "neupims": {"neupims"},
    "train": {"train", "ggem_jax"},
    "eval": {"eval", "train", "ggem_jax", "neupims"},
    "benchmarks": {"benchmarks", "eval", "train", "ggem_jax", "neupims"},
}

# inside ggem_jax: module -> the modules of ggem_jax that it may import
INSIDE_GGEM_JAX = {
    "pooling": {"fused", "dispatch"},
    "fused": {"dispatch", "kernels"},
    "dispatch": {"kernels"},
    "models.transformer": set(),
    "models.vit": {"models.transformer", "pooling"},
    "models.text": {"models.transformer"},
    "models.embedder": {"models.vit", "pooling"},
    "metric": {"pooling"},
    "models.resnet": {"pooling"},
    "scales": set(),
    "superglobal": {"pooling", "scales"},
    "models.efficientnet_lite": set(),
    "weights.efficientnet_lite": {"models.efficientnet_lite", "weights.convert", "weights.errors", "weights.torch_files"},
    "diagnostics": set(),
    "contrastive": set(),
    "optimizer": set(),
    "images": set(),
    "retrieval.vectors": set(),
    "retrieval.exact_search": {"retrieval.vectors", "dispatch"},
    "retrieval.rerank": {"retrieval.vectors", "retrieval.exact_search"},
    "retrieval.expansion": {"retrieval.vectors", "retrieval.exact_search"},
    "retrieval.metrics": set(),
    "retrieval.truth": {"retrieval.metrics"},
    "retrieval.settings": set(),
    "retrieval.networks": {"images", "models", "pooling", "weights"},
    "retrieval.whitening": {"weights.files"},
    "retrieval.descriptors": {"images", "scales", "superglobal", "retrieval.networks", "retrieval.settings", "retrieval.whitening"},
    "retrieval.folder": {"images"},
    "retrieval.store": {"retrieval.folder"},
    "retrieval.writing": {"images", "retrieval.folder", "retrieval.store"},
    "retrieval.index": {"retrieval.folder", "retrieval.store", "retrieval.writing"},
    "retrieval.compilation": set(),
    "retrieval.methods": {"retrieval"},
    "retrieval.flags": {"retrieval.methods", "retrieval.settings"},
    "retrieval.progress": {"retrieval.writing"},
    "retrieval.arrays": {"weights.files"},
    "retrieval.sheet": {"images", "retrieval.folder", "weights.files"},
    "retrieval.commands": {"images", "retrieval", "weights.files"},
    "retrieval.__main__": {"retrieval.commands", "retrieval.flags"},
    "weights.errors": set(),
    "weights.files": set(),
    "weights.pickles": {"weights.errors"},
    "weights.torch_files": {"weights.errors", "weights.files", "weights.pickles"},
    "weights.safetensors_files": {"weights.errors", "weights.files"},
    "weights.convert": {"weights.errors"},
    "weights.arrays": {"weights.errors", "weights.safetensors_files", "weights.torch_files"},
    "weights.vit_layouts": {"weights.errors"},
    "weights.vit": {"models.transformer", "models.vit", "pooling", "weights.arrays", "weights.convert", "weights.errors", "weights.vit_layouts"},
    "weights.text": {"models.text", "models.transformer", "weights.arrays", "weights.convert", "weights.errors", "weights.vit_layouts"},
    "weights.__main__": {"weights.safetensors_files", "weights.text", "weights.vit"},
    "weights.cvnet": {"weights.convert", "weights.errors", "weights.safetensors_files", "weights.torch_files"},
}

FILES = [path for folder in ARROWS for path in sorted((ROOT / folder).rglob("*.py")) if "ggem_jax/kernels" not in path.as_posix()]


def imported(path: Path) -> list[ast.alias | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


def absolute_names(path: Path) -> set[str]:
    names = set()
    for node in imported(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path):
    folder = path.relative_to(ROOT).parts[0]
    ours = {name.partition(".")[0] for name in absolute_names(path)} & (set(ARROWS) | {"tests"})
    assert ours <= ARROWS[folder]


@pytest.mark.parametrize("module", INSIDE_GGEM_JAX)
def test_modules_of_ggem_jax_stand_in_layers(module):
    names = absolute_names(ROOT / "ggem_jax" / f"{module.replace('.', '/')}.py")
    ours = {name.removeprefix("ggem_jax.") for name in names if name.startswith("ggem_jax.")}
    assert all(any(name == allowed or name.startswith(f"{allowed}.") for allowed in INSIDE_GGEM_JAX[module]) for name in ours)


def test_every_module_of_ggem_jax_has_its_layer():
    modules = {path.relative_to(ROOT / "ggem_jax").with_suffix("").as_posix().replace("/", ".") for path in FILES if "ggem_jax" in path.parts}
    assert {name for name in modules if not name.endswith("__init__")} == set(INSIDE_GGEM_JAX)


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_imports_inside_kernels_are_relative(path):
    assert not any(name.partition(".")[0] in ("kernels", "ggem_jax") for name in absolute_names(path))


HEAVY = ["safetensors", "triton", "jax_triton", "torch", "tensorflow", "tensorflow_datasets", "orbax", "grain", "matplotlib"]


LIGHT = [
    "ggem_jax",
    "ggem_jax.pooling",
    "ggem_jax.models.vit",
    "ggem_jax.models.efficientnet_lite",
    "ggem_jax.contrastive",
    "ggem_jax.optimizer",
    "ggem_jax.superglobal",
    "ggem_jax.weights",
    "ggem_jax.retrieval",
]


@pytest.mark.parametrize("package", [*LIGHT, "neupims", "neupims.workload"])
def test_import_starts_no_device_and_loads_nothing_heavy(package):
    code = f"""import sys, {package}
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized(), [name for name in {HEAVY} if name in sys.modules])"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (run.stdout.strip(), run.stderr) == ("False []", "")


def test_the_index_loads_no_jax():
    code = "import sys, ggem_jax.retrieval.index; print([name for name in ('jax', 'flax') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


def test_the_readers_of_weights_load_no_model():
    code = "import sys, ggem_jax.weights; print([name for name in ('flax', 'ggem_jax.models.vit') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


def test_an_installed_package_called_kernels_wins_over_our_folder(tmp_path):
    """`kernels/` has no `__init__.py`: from the root, `import kernels` finds the other package wherever it stands on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'theirs'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels, ggem_jax.kernels.launch as ours; print(kernels.whose, ours.__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert run.stdout.split() == ["theirs", "ggem_jax.kernels.launch"], run.stderr


def test_a_link_that_became_a_text_file_is_named(tmp_path):
    package = tmp_path / "ggem_jax"
    package.mkdir()
    (package / "__init__.py").write_text((ROOT / "ggem_jax" / "__init__.py").read_text())
    (package / "kernels").write_text("../kernels")
    alone = [sys.executable, "-S", "-c"]  # without site-packages, where an editable install may know the real folder
    run = subprocess.run([*alone, "import ggem_jax; import ggem_jax.kernels"], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert "ggem_jax/kernels must be a link to ../kernels but is a text file in this checkout" in run.stderr.splitlines()[-1]
    assert subprocess.run([*alone, "import ggem_jax"], cwd=tmp_path, timeout=60, check=False).returncode == 0
