"""Which PTX Triton writes here and whether JAX assembles it: python -m benchmarks.kernel_versions

Lowers a kernel for every GPU of `--capabilities` and hands it to the launcher in JAX's CUDA plugin,
which runs ptxas before it asks for a GPU: once with Triton as it is, once as `ggem_jax` sets it up.
Needs Triton, jax-triton and that plugin on the path (`make .venv/cuda`), and a machine without a
GPU. Rows go to benchmarks/results/kernel_versions.csv; rows of other versions are the same command
in an environment with those.
"""

import argparse
import contextlib
import ctypes
import importlib.metadata
import platform
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from unittest import mock

import jax
from jaxlib import gpu_triton

from benchmarks.record import append
from ggem_jax.kernels import launch, ptxas
from ggem_jax.pooling import norm_ggem_pool

TOKENS = jax.ShapeDtypeStruct((8, 196, 768), "bfloat16")
CHANNELS, EXPONENTS = (jax.ShapeDtypeStruct((length,), "float32") for length in (768, 12))


def kernels_of(
    function: Callable, *arguments: jax.ShapeDtypeStruct, capability: int
) -> list[bytes]:
    """Returns the kernels of a function lowered for a GPU, each as its launcher gets it.

    Args:
        function: Function that launches kernels.
        *arguments: Shapes and dtypes of its arguments.
        capability: Compute capability of the GPU, such as 90.
    """
    with launch.compiled_for(capability):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return kernels_in(lowered.as_text())


def kernels_in(lowered: str) -> list[bytes]:
    """Returns the kernels in the text of a lowered function, each as its launcher gets it."""
    calls = [line for line in lowered.splitlines() if "@triton_kernel_call" in line]
    texts = [max(re.findall(r'"((?:[^"\\]|\\.)*)"', call), key=len) for call in calls]
    unescaped = r"\\([0-9A-F]{2}|.)"
    return [re.sub(unescaped, _byte, text).encode("latin-1") for text in texts]


def _byte(escape: re.Match) -> str:
    return chr(int(escape[1], 16)) if len(escape[1]) == 2 else escape[1]


def ptx_version(kernel: bytes) -> str:
    """Returns the PTX version that a kernel is written in, such as `8.8`."""
    (version,) = re.findall(rb"\.version (\d+\.\d+)", zlib.decompress(kernel))
    return version.decode()


def in_version(kernel: bytes, version: str) -> bytes:
    """Returns the same kernel with another version, as long as its own, at the top of its PTX."""
    text = re.sub(rb"\.version \d+\.\d+", b".version " + version.encode(), zlib.decompress(kernel))
    return zlib.compress(text)


def assemble(kernel: bytes) -> str | None:
    """Assembles a kernel as JAX does when it first launches it, and returns the error or None.

    The error is that of ptxas, or of JAX where it finds no ptxas.

    Args:
        kernel: The kernel, as `kernels_of` returns it.

    Raises:
        NotImplementedError: The machine has a GPU, where the kernel would run.
        RuntimeError: The launcher reports nothing.
    """
    with contextlib.suppress(RuntimeError):
        gpu_triton.get_compute_capability(0)
        raise NotImplementedError("the kernel would run, on no data: use a machine without a GPU")
    capsule = gpu_triton.get_custom_call()
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    # (stream, buffers, opaque, its length, status), xla/service/custom_call_status.h
    types = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]
    custom_call = ctypes.CFUNCTYPE(None, *types)(pointer_of(capsule, name_of(capsule)))
    buffers, status = (
        (ctypes.c_void_p * 16)(*range(4096, 17 * 4096, 4096)[:16]),
        (ctypes.c_uint64 * 32)(),
    )
    custom_call(None, buffers, kernel, len(kernel), status)
    message = _text(status)
    if "cuStreamIsCapturing" in message:  # the first thing it wants of a GPU, to launch it
        return None
    return message


def _text(status: ctypes.Array) -> str:
    """The C++ string at the start of a status: pointer and length, in some libraries a word on."""
    for pointer, length in (status[0:2], status[1:3]):
        if pointer > 4096 and 0 < length < 100_000:
            return ctypes.string_at(pointer, length).decode(errors="replace")
    raise RuntimeError("the launcher reported nothing")


def one(capability: int, alone: bool) -> str:
    """Returns the PTX version that Triton writes for a GPU, with " refused" if ptxas refuses it.

    Args:
        capability: Compute capability of the GPU, such as 90.
        alone: Whether Triton is left as it is, without the settings of `ggem_jax`.

    Returns:
        Text such as "8.8" or "9.4 refused", or "plain JAX" where no kernel is launched.
    """
    function, arguments = norm_ggem_pool, (TOKENS, CHANNELS, CHANNELS, EXPONENTS)
    untouched = mock.patch.object(ptxas, "fit_triton_to_jax", return_value=None)
    with untouched if alone else contextlib.nullcontext():
        (kernel,) = kernels_of(function, *arguments, capability=capability) or [None]
    if kernel is None:
        return "plain JAX"
    return ptx_version(kernel) + ("" if assemble(kernel) is None else " refused")


def results(capabilities: list[int], *extra: str) -> list[str]:
    """Returns `one` for each GPU, from a process of its own; "crashes" where that process ends.

    Compiled kernels are kept in a process, and LLVM ends it where it does not know the GPU.

    Args:
        capabilities: Compute capabilities of the GPUs.
        *extra: Further flags of the process.
    """
    found: list[str] = []
    while len(found) < len(capabilities):
        rest = map(str, capabilities[len(found) :])
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernel_versions", "--one"]
        run = subprocess.run(
            [*command, *extra, "--capabilities", *rest], capture_output=True, text=True
        )
        found += re.findall(r"^result: (.*)$", run.stdout, flags=re.MULTILINE)
        if run.returncode != 0:
            found.append("crashes")
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90, 100, 120])
    parser.add_argument("--one", action="store_true", help="print results, record nothing")
    parser.add_argument("--alone", action="store_true", help="with --one: Triton as it is")
    options = parser.parse_args(argv)
    if options.one:
        for capability in options.capabilities:
            print(f"result: {one(capability, options.alone)}", flush=True)
        return
    found = ptxas.of_jax()
    alone, ours = results(options.capabilities, "--alone"), results(options.capabilities)
    for capability, *result in zip(options.capabilities, alone, ours, strict=True):
        row = {
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jax_triton": importlib.metadata.version("jax-triton"),
            "triton": importlib.metadata.version("triton"),
            "ptxas_of_jax": "none" if found is None else ".".join(map(str, found.version)),
            "capability": capability,
            "triton_alone": result[0],
            "ggem_jax": result[1],
        }
        append("kernel_versions", row)


if __name__ == "__main__":
    main(sys.argv[1:])
