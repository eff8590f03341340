"""The public functions with `implementation="triton"`, on this CPU: compiled, and run by `Machine`.

with simulated(90):
    ggem_pool(tokens, p, implementation="triton")
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
from ptx.arithmetic import Error, no_error
from ptx.code import Kernel, parse
from ptx.machine import Machine
from ptx.memory import GlobalMemory

from benchmarks.kernel_code import Launch, compile_for, pointers_of
from ggem_jax.kernels import launch
from ggem_jax.pooling.dispatch import over_rows

_MOST_THREADS = 2**13  # that run at once

# Threads of XLA round subnormal numbers to zero, and so do those that they start. This one keeps
# them, as a GPU does.
_thread = ThreadPoolExecutor(1)
_thread.submit(int).result()


@dataclass(frozen=True)
class Run:
    """A kernel call that has run."""

    kernel: str
    capability: int
    programs: int
    instructions: int  # of its longest program


@contextlib.contextmanager
def simulated(
    capability: int,
    *,
    error: Error = no_error,
    edit: Callable[[str], str] = str,
    constants: dict[str, Any] | None = None,
) -> Iterator[list[Run]]:
    """Returns a context in which kernels for a GPU run on the CPU; its value lists the calls.

    Args:
        capability: Compute capability of the GPU, such as 90.
        error: Errors of the approximate instructions.
        edit: Changes the PTX before it runs, to plant a fault.
        constants: Constants of the kernels, by name, that get other values.
    """
    runs: list[Run] = []

    def triton_call(*inputs, kernel, grid, num_warps, out_shape, compute_capability, **given):
        dtypes = pointers_of((*inputs, *out_shape))
        chosen = {name: (constants or {}).get(name, value) for name, value in given.items()}
        text, shared = _compiled(
            kernel, tuple(dtypes), num_warps, tuple(chosen.items()), capability
        )

        def run(*arrays):
            outputs = [np.empty(o.shape, o.dtype) for o in out_shape]
            memory = GlobalMemory([np.asarray(a) for a in arrays], outputs)
            code = _parsed(edit(text))
            step = max(_MOST_THREADS // code.threads, 1)
            instructions = 0
            for first in range(0, math.prod(grid), step):
                programs = np.arange(first, min(first + step, math.prod(grid)))
                machine = Machine(code, memory, programs, shared, error)
                machine.run()
                instructions = max(instructions, machine.executed.total())
            runs.append(Run(code.name, capability, math.prod(grid), instructions))
            return tuple(memory.results())

        return list(
            jax.pure_callback(
                lambda *arrays: _thread.submit(run, *map(np.array, arrays)).result(),
                tuple(jax.ShapeDtypeStruct(o.shape, o.dtype) for o in out_shape),
                *inputs,
                vmap_method="sequential",
            )
        )

    jax.clear_caches()
    with (
        mock.patch.object(
            launch, "load_jax_triton", return_value=SimpleNamespace(triton_call=triton_call)
        ),
        mock.patch.object(launch, "check"),
        # as for Triton's interpreter: JAX keeps no callbacks alive in what the partitioner lowers
        mock.patch(
            "ggem_jax.pooling.fused.over_rows",
            lambda body, arrays, sets=(), spread=False: over_rows(body, arrays, sets, False),
        ),
        launch.compiled_for(capability),
    ):
        yield runs
    jax.clear_caches()


@functools.cache
def _compiled(kernel, dtypes, warps, constants, capability) -> tuple[str, int]:
    """PTX, and bytes of shared memory."""
    one = Launch(kernel, list(dtypes), [], 1, warps, dict(constants))
    done = compile_for(one, capability)
    return done.asm["ptx"], done.metadata.shared


@functools.cache
def _parsed(text: str) -> Kernel:
    return parse(text)
