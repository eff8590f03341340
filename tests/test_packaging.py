"""What is installed: the wheel that is built from the sdist."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist of a copy of this tree and the wheel built from it."""
    folder = tmp_path_factory.mktemp("packaging")
    tracked = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if (ROOT / name).exists():
            target = folder / "tree" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "tree")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


def test_wheel_carries_the_packages_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"ggem_jax/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} <= names
    assert {"ggem_jax/pooling.py", "ggem_jax/models/vit.py", "neupims/workload.py"} <= names
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"ggem_jax", "neupims"}


def test_sdist_carries_licence_and_readme(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "setup.cfg", "pyproject.toml"} <= names


def test_installed_wheel_finds_its_kernels(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import ggem_jax.kernels.launch as launch, neupims; print(launch.__file__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert run.stdout.strip() == str(tmp_path / "ggem_jax" / "kernels" / "launch.py"), run.stderr
