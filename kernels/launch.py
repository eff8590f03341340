"""The one place that touches jax-triton, which is imported when a kernel is asked for and not
before.

Kernels take their inputs first and their outputs last; shapes, strides and options are compile-time
constants, because jax-triton does not tell Triton which integers divide by 16, and loads of 16
bytes need to know. No scalar arguments, aliases or zeroed outputs: so the same call works with
jax-triton 0.3 and 0.4.
"""

import contextlib
import functools
import importlib.util
import inspect
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np

from . import ptxas

# A context that `jax.jit` looks traced functions up by: none that was traced for one GPU is found
# for another.
_capability = jax.make_user_context(default_value=None)


def call(
    implementation: str, kernel: Any, inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *, programs: int, warps: int, **constants: Any,
) -> list[jax.Array]:  # fmt: skip
    """Runs `programs` programs of a kernel: `implementation` is "triton", on the GPU, or
    "interpret", in Triton's interpreter on the CPU.
    """
    if implementation == "interpret":
        run = functools.partial(_interpret, kernel, outputs, programs, FAST=False, **constants)
        return list(jax.pure_callback(run, tuple(outputs), *inputs, vmap_method="sequential"))
    triton_call = load_jax_triton().triton_call
    accepted = inspect.signature(triton_call).parameters
    options: dict[str, Any] = {"num_warps": warps, "compute_capability": _capability.value}
    options["out_type" if "out_type" in accepted else "out_shape"] = list(outputs)  # 0.4 and 0.3
    # Products and sums are fused, as they were counted; Triton 3.10 would not do so by itself.
    if "backend_options" in accepted:  # jax-triton 0.4
        options["backend_options"] = {"enable_fp_fusion": True}
    elif "enable_fp_fusion" in accepted:  # jax-triton 0.3
        options["enable_fp_fusion"] = True
    grid = (programs,)
    return list(triton_call(*inputs, kernel=kernel, grid=grid, FAST=True, **options, **constants))


def capability() -> int | None:
    """Returns the compute capability of `compiled_for`, or None outside: that of this machine."""
    return _capability.value


@contextlib.contextmanager
def compiled_for(capability: int | None) -> Iterator[None]:
    """Kernels that are lowered inside are compiled for this compute capability, such as 90, whether
    a GPU is there or not.
    """
    with _capability(capability):
        yield


def available() -> bool:
    """Returns whether kernels can be compiled here: jax-triton is installed, finds a JAX with CUDA,
    and writes what that JAX can assemble. Where only the last fails, a warning says once what to
    install. Starts no device.
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
    """Whether kernels run on the devices of this process. Starts the devices."""
    return available() and jax.default_backend() == "gpu"


def load_jax_triton() -> ModuleType:
    """Imports jax-triton; `NotImplementedError` says what is missing and what to do where it cannot
    be had.
    """
    try:
        import jax_triton
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise NotImplementedError(
            f"Triton kernels need jax-triton and a JAX with CUDA ({reason}): pip install '.[gpu]'"
            " in a checkout on a machine with an NVIDIA GPU, or pass implementation=None"
        ) from error
    if (
        os.environ.get("TRITON_CACHE_DIR") == ""
    ):  # set so by jax-triton 0.3; a later triton.compile in this process would find no folder
        del os.environ["TRITON_CACHE_DIR"]
    if ptxas.cuda_plugin() is None:  # jax-triton 0.4 is content without
        raise NotImplementedError(
            "Triton kernels need a JAX with CUDA, which this one is not: pip install 'jax[cuda12]'"
            " on a machine with an NVIDIA GPU, or pass implementation=None"
        )
    return jax_triton


def check(implementation: str) -> None:
    """`NotImplementedError` where kernels cannot run as `implementation` says, with the reason and
    what to do.
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
    """Outputs start as 0xCD bytes, so that an element that is never written shows."""
    results = [
        np.frombuffer(
            bytearray(b"\xcd" * (int(np.prod(o.shape)) * o.dtype.itemsize)), o.dtype
        ).reshape(o.shape)
        for o in outputs
    ]
    arrays = [np.array(array, order="C", copy=True) for array in inputs]
    with (
        _one_at_a_time,
        np.errstate(all="ignore"),
        warnings.catch_warnings(),
    ):  # lanes outside the arrays compute too
        warnings.simplefilter("ignore")
        kernel[(programs,)](*map(_HostTensor, arrays), *map(_HostTensor, results), **constants)
    return tuple(results)


# the interpreter patches the language while it runs a kernel; devices call from threads of their
# own
_one_at_a_time = threading.Lock()

_TRITON_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int8": "i8"}


class _HostTensor:
    """A NumPy array with what Triton's interpreter asks of a tensor."""

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
