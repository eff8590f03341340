"""The rules of the imports: who may import whom, and what an import must not start or load."""

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

# Inside a package: room -> the rooms that it may import from. A room is a folder, or a module that
# stands alone.
ROOMS = {
    "ggem_jax": {
        "pooling": {"kernels"},
        "models": {"pooling"},
        "losses": {"pooling"},
        "optimizer": set(),
        "files": set(),
        "processors": set(),
        "progress": set(),
        "weights": {"files", "models", "pooling"},
        "descriptors": {"files", "models", "pooling", "weights"},
        "retrieval": {"files", "pooling", "retrieval.tool"},
        "retrieval.index": {"descriptors", "files", "processors", "retrieval", "retrieval.stores"},
        "retrieval.page": {"files", "retrieval", "retrieval.index"},
        "retrieval.stores": {"retrieval"},
        "retrieval.tool": {
            "descriptors",
            "files",
            "progress",
            "retrieval",
            "retrieval.index",
            "retrieval.page",
        },
    },
    "neupims": {
        "files": set(),
        "processors": set(),
        "machine": {"files"},
        "costs": {"machine"},
        "timing": {"costs", "machine"},
        "simulator_runs": {"machine", "timing"},
        "validation": {"machine", "simulator_runs", "timing"},
        "envelope": {"machine"},
        "simulation": {"costs", "envelope", "machine", "timing"},
        "scheduling": {"envelope", "files", "machine", "simulation", "timing"},
        "serving": {"costs", "machine", "processors", "scheduling", "timing"},
        "catalogue": {"costs", "machine", "simulator_runs", "timing"},
        "exploration": {"costs", "envelope", "files", "machine", "serving", "timing"},
        "pages": {
            "envelope",
            "exploration",
            "files",
            "machine",
            "serving",
            "simulation",
            "timing",
        },
        "commands": {
            "catalogue",
            "envelope",
            "exploration",
            "files",
            "machine",
            "pages",
            "processors",
            "scheduling",
            "serving",
            "simulation",
            "timing",
            "validation",
        },
    },
}

FILES = [
    path
    for folder in ARROWS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "ggem_jax/kernels" not in path.as_posix()
]


def imported(path: Path) -> list[ast.alias | ast.ImportFrom]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


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


def room_of(package: str, dotted: str) -> str:
    """The room of a module or of a name in it, "" for the package itself: `retrieval.tool`,
    `pooling`, `optimizer`.
    """
    parts = dotted.split(".")[1:]
    deep = 2 if ".".join(parts[:2]) in ROOMS[package] else 1
    room = ".".join(parts[:deep])
    return room if room in ROOMS[package] or room == "kernels" else ""


INSIDE = [path for path in FILES if path.relative_to(ROOT).parts[0] in ROOMS]


@pytest.mark.parametrize("path", INSIDE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_rooms_import_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    mine = room_of(package, path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."))
    theirs = {
        room_of(package, name) for name in absolute_names(path) if name.partition(".")[0] == package
    } - {mine, ""}
    assert not mine or theirs <= ROOMS[package][mine]


@pytest.mark.parametrize("package", ROOMS)
def test_every_module_stands_in_a_room(package):
    front = {"__init__", "__main__"}
    modules = {
        path.relative_to(ROOT / package).with_suffix("").as_posix()
        for path in INSIDE
        if path.relative_to(ROOT).parts[0] == package
    }
    assert {
        m for m in modules - front if not room_of(package, f"{package}.{m.replace('/', '.')}")
    } == set()
    assert all(
        (ROOT / package / room.replace(".", "/")).is_dir()
        or (ROOT / package / f"{room}.py").is_file()
        for room in ROOMS[package]
    )


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name
)
def test_imports_inside_kernels_are_relative(path):
    assert not any(
        name.partition(".")[0] in ("kernels", "ggem_jax") for name in absolute_names(path)
    )


HEAVY = [
    "safetensors",
    "triton",
    "jax_triton",
    "torch",
    "tensorflow",
    "tensorflow_datasets",
    "orbax",
    "grain",
    "matplotlib",
]


def run_python(code: str) -> subprocess.CompletedProcess:
    """Runs code in a new Python process, from the root, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


LIGHT = [
    "ggem_jax",
    "ggem_jax.pooling",
    "ggem_jax.models.vit",
    "ggem_jax.models.efficientnet_lite",
    "ggem_jax.losses.contrastive",
    "ggem_jax.optimizer",
    "ggem_jax.descriptors.superglobal",
    "ggem_jax.weights",
    "ggem_jax.retrieval",
]


@pytest.mark.parametrize("package", [*LIGHT, "neupims", "neupims.scheduling.schedule_search"])
def test_import_starts_no_device_and_loads_nothing_heavy(package):
    code = f"""import sys, {package}
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized(), [name for name in {HEAVY} if name in sys.modules])"""
    run = run_python(code)
    assert (run.stdout.strip(), run.stderr) == ("False []", "")


def test_the_front_door_starts_no_device_and_loads_nothing_heavy():
    """Not even JAX, until a name is used; then all names are there."""
    code = f"""import sys, ggem_jax
print([name for name in ("jax", "flax", *{HEAVY}) if name in sys.modules], end=" ")
assert set(ggem_jax.__all__) <= set(dir(ggem_jax))
print(all(getattr(ggem_jax, name) is not None for name in ggem_jax.__all__), end=" ")
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized(), [name for name in {HEAVY} if name in sys.modules])"""
    run = run_python(code)
    assert (run.stdout.strip(), run.stderr) == ("[] True False []", "")


def test_the_front_door_tells_type_checkers_the_same_names():
    """The imports under TYPE_CHECKING, `__all__` and the table of modules agree, and no function
    has the name of a module.
    """
    import ggem_jax

    tree = ast.parse((ROOT / "ggem_jax" / "__init__.py").read_text())
    (block,) = (
        node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name)
    )
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    at_run_time = {name: f"ggem_jax.{module}" for name, module in ggem_jax._MODULE_OF.items()}
    modules = {name for name, module in typed.items() if module == "ggem_jax"}
    assert typed == at_run_time | dict.fromkeys(modules, "ggem_jax")
    assert sorted(ggem_jax.__all__) == sorted(typed)
    found = {path.stem for path in (ROOT / "ggem_jax").iterdir() if path.suffix in ("", ".py")}
    assert found & set(typed) == modules
    with pytest.raises(AttributeError, match="has no attribute 'gem_pol'"):
        _ = ggem_jax.gem_pol


def test_a_name_that_needs_an_extra_says_which():
    code = """import sys
sys.modules["PIL"] = None
import ggem_jax
try:
    ggem_jax.Index
except ModuleNotFoundError as error:
    print(error)"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert run.stdout == "ggem_jax.Index needs PIL: pip install 'ggem-jax[retrieval]'\n", run.stderr


def test_the_index_loads_no_jax():
    code = (
        "import sys, ggem_jax.retrieval.index.index; print([name for name in ('jax', 'flax') if"
        " name in sys.modules])"
    )
    run = run_python(code)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


def test_the_readers_of_weights_load_no_model():
    code = (
        "import sys, ggem_jax.weights; print([name for name in ('flax', 'ggem_jax.models.vit') if"
        " name in sys.modules])"
    )
    run = run_python(code)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


def test_an_installed_package_called_kernels_wins_over_our_folder(tmp_path):
    """`kernels/` has no `__init__.py`: from the root, `import kernels` finds the other package
    wherever it stands on the path.
    """
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'theirs'\n")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r}); import kernels, ggem_jax.kernels.launch"
        " as ours; print(kernels.whose, ours.__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert run.stdout.split() == ["theirs", "ggem_jax.kernels.launch"], run.stderr


def test_a_link_that_became_a_text_file_is_named(tmp_path):
    package = tmp_path / "ggem_jax"
    package.mkdir()
    (package / "__init__.py").write_text((ROOT / "ggem_jax" / "__init__.py").read_text())
    (package / "kernels").write_text("../kernels")
    alone = [
        sys.executable,
        "-S",
        "-c",
    ]  # without site-packages, where an editable install may know the real folder
    run = subprocess.run(
        [*alone, "import ggem_jax; import ggem_jax.kernels"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert (
        "ggem_jax/kernels must be a link to ../kernels but is a text file in this checkout"
        in run.stderr.splitlines()[-1]
    )
    assert (
        subprocess.run(
            [*alone, "import ggem_jax"], cwd=tmp_path, timeout=60, check=False
        ).returncode
        == 0
    )
