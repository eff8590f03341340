"""Calls of the kernels: through jax-triton on the GPU, or in Triton's interpreter on the CPU.

No other module touches jax-triton, and this one imports it only when a kernel is used. Kernels take
their inputs first and their outputs last. Shapes, strides and options are compile-time constants,
because jax-triton does not tell Triton which integers divide by 16, and 16-byte loads depend on
that. There are no scalar arguments, aliases or zeroed outputs, so the same call works with
jax-triton 0.3 and 0.4.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from . import ptxas

# `jax.jit` includes it in its cache keys, so a trace for one GPU is not reused for another.
_capability = jax.make_user_context(default_value=None)


def call(
    implementation: str,
    kernel: Any,
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    programs: int,
    warps: int,
    **constants: Any,
) -> list[jax.Array]:
    """Returns the outputs of a kernel.

    Args:
        implementation: "triton" runs it on the GPU, "interpret" in Triton's interpreter on the CPU.
        kernel: The kernel; its pointers are those of inputs and outputs, in this order.
        inputs: Its input arrays.
        outputs: Shapes and dtypes of its outputs.
        programs: Number of programs, a grid of one dimension.
        warps: Warps of 32 threads in each program; the interpreter does not use it.
        **constants: Its compile-time constants by name, without FAST.

    Returns:
        The output arrays, in the order of `outputs`.

    Raises:
        NotImplementedError: `implementation` is "triton", and jax-triton or a JAX with CUDA is not
            installed.
    """
    if implementation == "interpret":
        run = functools.partial(_interpret, kernel, outputs, programs, FAST=False, **constants)
        return list(jax.pure_callback(run, tuple(outputs), *inputs, vmap_method="sequential"))
    triton_call = load_jax_triton().triton_call
    accepted = inspect.signature(triton_call).parameters
    options: dict[str, Any] = {"num_warps": warps, "compute_capability": _capability.value}
    options["out_type" if "out_type" in accepted else "out_shape"] = list(outputs)  # 0.4 and 0.3
    # Fuse products and sums: instruction counts assume it, and Triton 3.10 has it off by default.
    if "backend_options" in accepted:  # jax-triton 0.4
        options["backend_options"] = {"enable_fp_fusion": True}
    elif "enable_fp_fusion" in accepted:  # jax-triton 0.3
        options["enable_fp_fusion"] = True
    grid = (programs,)
    return list(triton_call(*inputs, kernel=kernel, grid=grid, FAST=True, **options, **constants))


def capability() -> int | None:
    """Returns the compute capability that `compiled_for` sets, or None for this machine's GPU."""
    return _capability.value


@contextlib.contextmanager
def compiled_for(capability: int | None) -> Iterator[None]:
    """Returns a context in which kernels are compiled for another GPU, which need not be present.

    The cache of `jax.jit` distinguishes capabilities, so one jitted function can be lowered for
    several GPUs in turn.

    Args:
        capability: Compute capability of the GPU, such as 90 for an H100; None for this machine's
            GPU.
    """
    with _capability(capability):
        yield


def describe_code(caller: Path) -> str:
    """Returns a text that changes whenever the same call of a kernel may get other machine code.

    It has a digest of the source files of the kernels and of the caller, the versions of what
    compiles the kernels, and the compute capability of `compiled_for`.

    Args:
        caller: A source file that decides how kernels are called.
    """
    return f"{_digest((caller, *Path(__file__).parent.glob('*.py')))} {_compilers()} {capability()}"


@functools.cache
def _digest(sources: tuple[Path, ...]) -> str:
    found = hashlib.sha256()
    try:
        for path in sorted(sources):
            found.update(path.name.encode() + b"\n" + path.read_bytes())
    except OSError:  # an installation without sources: nothing counts as the same again
        found.update(os.urandom(32))
    return found.hexdigest()


@functools.cache
def _compilers() -> str:
    versions = []
    for name in ("jax", "triton", "jax-triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    assembler = ptxas.of_jax()
    return f"{', '.join(versions)}, ptxas {assembler and assembler.version}"


def available() -> bool:
    """Returns whether kernels can be compiled here, without starting a device.

    They can if jax-triton is installed, finds a JAX with CUDA, and writes PTX that this JAX can
    assemble. If only the last condition fails, one warning says what to install.
    """
    return _available(_capability.value)


@functools.cache
def _available(capability: int | None) -> bool:
    if importlib.util.find_spec("jax_triton") is None:
        return False
    try:
        load_jax_triton()
    except NotImplementedError:
        return False
    misfit = ptxas.fit_triton_to_jax(capability)
    if misfit is not None:
        message = f"plain JAX is used instead of the Triton kernels: {misfit}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return misfit is None


def runs_here() -> bool:
    """Returns whether kernels run on the devices of this process; starts the devices if it must."""
    return available() and jax.default_backend() == "gpu"


def load_jax_triton() -> ModuleType:
    """Returns the module jax_triton.

    Raises:
        NotImplementedError: jax-triton, or a JAX with CUDA, is not installed.
    """
    try:
        import jax_triton
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise NotImplementedError(
            f"Triton kernels need jax-triton and a JAX with CUDA ({reason}): pip install '.[gpu]'"
            " in a checkout on a machine with an NVIDIA GPU, or pass implementation=None"
        ) from error
    # jax-triton 0.3 sets it to "", with which a later triton.compile here finds no cache folder
    if os.environ.get("TRITON_CACHE_DIR") == "":
        del os.environ["TRITON_CACHE_DIR"]
    if ptxas.cuda_plugin() is None:  # jax-triton 0.4 imports without one
        raise NotImplementedError(
            "Triton kernels need a JAX with CUDA, which this one is not: pip install 'jax[cuda12]'"
            " on a machine with an NVIDIA GPU, or pass implementation=None"
        )
    return jax_triton


def check(implementation: str) -> None:
    """Raises unless kernels can run as `implementation` says.

    Args:
        implementation: "triton", "interpret" or "xla"; the last needs no kernels.

    Raises:
        NotImplementedError: They cannot; the message gives the reason and what to do.
    """
    if implementation == "interpret":
        try:
            from triton.runtime.interpreter import InterpretedFunction  # noqa: F401
        except ImportError as error:
            raise NotImplementedError(
                f"implementation='interpret' needs triton ({error}): pip install triton"
            ) from error
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise NotImplementedError(
                "implementation='interpret' needs TRITON_INTERPRET=1 in the environment before"
                " triton is imported"
            )
    elif implementation == "triton":
        load_jax_triton()
        if jax.default_backend() != "gpu" and _capability.value is None:
            raise NotImplementedError(
                "implementation='triton' needs an NVIDIA GPU, and JAX runs on"
                f" {jax.default_backend()} here: pass implementation=None; to lower for a GPU that"
                " is elsewhere, do so inside ggem_jax.kernels.launch.compiled_for(90)"
            )
        misfit = ptxas.fit_triton_to_jax(_capability.value)
        if misfit is not None:
            raise NotImplementedError(f"no Triton kernels: {misfit}, or pass implementation=None")


def _interpret(
    kernel: Any,
    outputs: Sequence[jax.ShapeDtypeStruct],
    programs: int,
    *inputs: jax.Array,
    **constants: Any,
) -> tuple[np.ndarray, ...]:
    """Runs a kernel in the interpreter.

    Outputs start as 0xCD bytes, so that an element that is never written shows.
    """
    results = []
    for output in outputs:
        filled = bytearray(b"\xcd" * (int(np.prod(output.shape)) * output.dtype.itemsize))
        results.append(np.frombuffer(filled, output.dtype).reshape(output.shape))
    arrays = [np.array(array, order="C", copy=True) for array in inputs]
    # Lanes outside the arrays compute too, on arbitrary numbers.
    with _one_at_a_time, np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernel[(programs,)](*map(_HostTensor, arrays), *map(_HostTensor, results), **constants)
    return tuple(results)


# The interpreter patches triton.language while it runs a kernel, and each device calls from its
# own thread.
_one_at_a_time = threading.Lock()

_TRITON_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int8": "i8"}


class _HostTensor:
    """A NumPy array with the methods that Triton's interpreter calls on a tensor."""

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, _TRITON_NAMES[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return self

    def set_(self, *_):
        return self

    def copy_(self, _):
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def element_size(self):
        return self.array.itemsize
