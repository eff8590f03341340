"""One ptxas for Triton and JAX.

Triton writes PTX, NVIDIA's portable assembly, in the newest version that the ptxas in its wheel
knows. JAX assembles it when the kernel is first launched, with a ptxas that it finds by itself. An
older ptxas rejects the PTX ("Unsupported .version 9.4; current version is '8.8'"). Where Triton's
ptxas is the newer of the two, this module tells Triton to use JAX's.
"""

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxlib import gpu_triton

INSTALL = "pip install nvidia-cuda-nvcc-cu12, or nvidia-cuda-nvcc for CUDA 13"

# jaxlib skips these versions: FindPtxAsExecutable in
# xla/stream_executor/cuda/subprocess_compilation.cc.
_OLDEST = (11, 8, 0)
_FAULTY = (12, 3, 103)
# Blackwell: B200, B300, RTX 50, DGX Spark. A ptxas that knows these knows every GPU, so the GPU is
# not queried.
_NEWEST_TARGETS = {"sm_100a", "sm_103a", "sm_120a", "sm_121a"}
# Package of JAX's CUDA plugin -> folder under nvidia/ where its ptxas is installed.
_WHEELS = {"jax_cuda12_plugin": "cuda_nvcc", "jax_cuda13_plugin": "cu13"}


@dataclass(frozen=True)
class Ptxas:
    """A ptxas that runs on this machine."""

    path: Path  # of the program
    version: tuple[int, int, int]  # major, minor, patch
    targets: frozenset[str]  # GPUs that it assembles for, such as "sm_90a"

    def __str__(self) -> str:
        return f"ptxas {'.'.join(map(str, self.version))} ({self.path})"


@functools.cache
def fit_triton_to_jax(capability: int | None) -> str | None:
    """Returns why JAX cannot assemble Triton's PTX and what to install, or None if it can.

    Where Triton's ptxas is newer than JAX's, sets `TRITON_PTXAS_PATH` or
    `TRITON_PTXAS_BLACKWELL_PATH` to JAX's. A variable that is already set stays, and the returned
    clause says to unset it.

    Args:
        capability: Compute capability of the GPU, such as 90; None for the first GPU of this
            machine.

    Returns:
        One clause that names the cause and the remedy, or None.
    """
    found = of_jax()
    if found is None:
        return f"JAX finds no ptxas to assemble them with: {INSTALL}"
    if capability is None and not found.targets >= _NEWEST_TARGETS:
        capability = _capability_here()
    target = None if capability is None else f"sm_{capability}{'a' if capability >= 90 else ''}"
    if target is not None and target not in found.targets:
        return (
            f"JAX assembles them with {found}, which does not know the GPU ({target}): {INSTALL},"
            " and put its folder first on PATH"
        )
    for variable, version in _versions_of_triton().items():
        if version <= found.version[:2]:
            continue
        if os.environ.get(variable):
            return (
                f"JAX assembles them with {found}, and {variable} makes Triton write for"
                f" {'.'.join(map(str, version))}: unset it"
            )
        os.environ[variable] = str(found.path)
    return None


def of_jax() -> Ptxas | None:
    """Returns the ptxas with which JAX assembles Triton kernels, or None if it finds none."""
    tools = (read((folder / "ptxas").absolute()) for folder in _folders())
    return next((t for t in tools if t and t.version >= _OLDEST and t.version != _FAULTY), None)


def _folders() -> Iterator[Path]:
    """The folders where jaxlib looks for ptxas, in its order.

    Reference:
        `FindCudaExecutable` in the file named above, and `CandidateCudaRoots` in
        xla/tsl/platform/default/cuda_root_path.cc.
    """
    yield Path("bin")
    yield from map(Path, os.environ.get("PATH", "").split(os.pathsep))
    yield from (Path("/usr/local/cuda/bin"), Path("/opt/cuda/bin"))
    plugin = cuda_plugin()
    if plugin is not None:
        wheel = Path("nvidia", _WHEELS.get(plugin.name, "cuda_nvcc"), "bin")
        yield from (plugin.parent / wheel, plugin.parent.parent / wheel, plugin / "cuda" / "bin")


def cuda_plugin() -> Path | None:
    """Returns the folder of the CUDA plugin whose kernel launcher JAX uses, or None without one."""
    launcher = getattr(gpu_triton, "TritonKernel", None)
    if launcher is None or "cuda" not in launcher.__module__:
        return None
    return Path(sys.modules[launcher.__module__].__file__ or "").parent


@functools.cache
def read(path: Path) -> Ptxas | None:
    """Returns version and targets of the ptxas at a path, or None if there is none or it fails.

    Args:
        path: Absolute path of the program; results are cached by path.
    """
    try:
        version, targets = (
            subprocess.run([path, flag], capture_output=True, text=True, check=True)
            for flag in ("--version", "--help")
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    number = re.search(r"\bV(\d+)\.(\d+)\.(\d+)\b", version.stdout)
    if number is None:
        return None
    major, minor, patch = map(int, number.groups())
    names = frozenset(re.findall(r"'(sm_\d+[a-z]?)'", targets.stdout))
    return Ptxas(path, (major, minor, patch), names)


def _versions_of_triton() -> dict[str, tuple[int, ...]]:
    """The version of each ptxas that Triton uses, by the variable that replaces it."""
    from triton import knobs

    tools = {
        "TRITON_PTXAS_PATH": knobs.nvidia.ptxas,
        "TRITON_PTXAS_BLACKWELL_PATH": knobs.nvidia.ptxas_blackwell,
    }
    return {name: tuple(map(int, tool.version.split("."))) for name, tool in tools.items()}


def _capability_here() -> int | None:
    """The compute capability of the first GPU, the one that jax-triton compiles for, or None."""
    try:
        return gpu_triton.get_compute_capability(0)
    except RuntimeError:  # no GPU, or no driver
        return None
