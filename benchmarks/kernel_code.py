"""Counts registers, spills and instructions per element of every kernel, compiled ahead of time.

    python -m benchmarks.kernel_code

It needs triton and no GPU. Instructions are all those of the busiest loop, divided by the elements
of the tokens that a thread takes in one iteration; lanes beyond the channels are not elements. Rows
go to benchmarks/results/kernel_code.csv.
"""

import argparse
import importlib.metadata
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.record import append
from ggem_jax.kernels import launch
from ggem_jax.pooling import ggem_pool, norm_ggem_pool, superglobal_pool

_POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int8": "*i8"}


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, as jax-triton would get it."""

    kernel: Any
    dtypes: list[str]
    programs: int
    warps: int
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Code:
    """Machine code of one kernel."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    sass: str
    ttir: str  # Triton's own intermediate form

    @property
    def opcodes(self) -> list[str]:
        return [m[2] for m in _INSTRUCTION.finditer(self.sass)]

    def busiest_loop(self) -> list[str]:
        """Returns the opcodes of the loop with the most special-function instructions."""
        lines = [(int(m[1], 16), m[2], m[3]) for m in _INSTRUCTION.finditer(self.sass)]
        loops = [
            [op for where, op, _ in lines if target <= where <= address]
            for address, op, operands in lines
            if op.startswith("BRA")
            and (found := re.search(r"0x([0-9a-f]+)", operands))
            and (target := int(found[1], 16)) < address
        ]
        return max(loops, key=lambda ops: sum(op.startswith("MUFU") for op in ops), default=[])


def _differentiated(pool: Callable, per_channel: int) -> Callable:
    """Returns a function that computes value and gradient of a pooling of tokens `(b, n, d)`.

    The pooling takes `per_channel` arrays `(d,)` and exponents.
    """

    def launch_all(tokens):
        channels = [jnp.ones(tokens.shape[-1])] * per_channel
        arrays = (tokens, *channels, jnp.full(12 if tokens.shape[-1] % 12 == 0 else 1, 3.0))
        value, pull = jax.vjp(pool, *arrays)
        return pull(value)

    return launch_all


def _masked(pool: Callable) -> Callable:
    return lambda tokens, *parameters: pool(
        tokens, *parameters, mask=jnp.ones(tokens.shape[:2], bool)
    )


_ggem, _norm_ggem, _superglobal = (
    partial(pool, implementation="triton") for pool in (ggem_pool, norm_ggem_pool, superglobal_pool)
)

# What to compile, by name: functions of one array that launch the kernels.
KERNELS: dict[str, Callable] = {
    "ggem": _differentiated(_ggem, 0),
    "ggem masked": _differentiated(_masked(_ggem), 0),
    "ggem shift": _differentiated(partial(_ggem, negatives="shift"), 0),
    "ggem signed": _differentiated(partial(_ggem, negatives="signed"), 0),
    "norm_ggem": _differentiated(_norm_ggem, 2),
    "norm_ggem masked": _differentiated(_masked(_norm_ggem), 2),
    "norm_ggem signed": _differentiated(partial(_norm_ggem, negatives="signed"), 2),
    "superglobal": _superglobal,
}

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Records the kernel calls that are traced inside, instead of lowering them."""
    launches: list[Launch] = []

    def triton_call(*inputs, kernel, grid, num_warps, compute_capability, out_shape, **constants):
        dtypes = [_POINTERS[a.dtype.name] for a in (*inputs, *out_shape)]
        launches.append(Launch(kernel, dtypes, grid[0], num_warps, constants))
        return [jnp.zeros(o.shape, o.dtype) for o in out_shape]

    jax.clear_caches()  # what is traced here is not to be found again outside, nor the reverse
    with (
        mock.patch.object(
            launch, "load_jax_triton", return_value=SimpleNamespace(triton_call=triton_call)
        ),
        mock.patch.object(launch, "check"),
        launch.compiled_for(90),
    ):
        yield launches
    jax.clear_caches()


def launches_of(function: Callable, *shapes: jax.ShapeDtypeStruct) -> list[Launch]:
    """Returns what `function` would launch for arguments of these shapes.

    The function itself sets `implementation="triton"`.
    """
    with recorded() as launches:
        jax.eval_shape(
            lambda *arguments: function(*arguments), *shapes
        )  # a new function, which no cache knows
    return [
        one for i, one in enumerate(launches) if one not in launches[:i]
    ]  # shapes may be traced more than once


def compiled(launch_: Launch, capability: int) -> Code:
    """Compiles to machine code and reads the output of ptxas.

    The ptxas is that of JAX, or Triton's own where JAX has no CUDA plugin.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch.available()  # gives Triton the ptxas of JAX
    names = [parameter.name for parameter in launch_.kernel.params]
    signature = dict(zip(names, launch_.dtypes, strict=False)) | dict.fromkeys(
        launch_.constants, "constexpr"
    )
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(launch_.dtypes))}
    source = ASTSource(
        fn=launch_.kernel, signature=signature, constexprs=launch_.constants, attrs=attributes
    )
    done = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch_.warps, "enable_fp_fusion": True},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack, shared, local = (
        int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "SHARED", "LOCAL")
    )
    return Code(registers, stack + local, shared, sass, done.asm["ttir"])


SHAPES = {
    "S/16 at 224 px": (256, 196, 384),
    "B/16 at 224 px": (256, 196, 768),
    "L/16 at 224 px": (256, 196, 1024),
    "L/14 at 518 px": (64, 1369, 1024),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--capability", type=int, default=90, choices=(80, 90, 100), help="compute capability"
    )
    capability = parser.parse_args().capability
    rows = [
        ("bfloat16", name, shape, function)
        for name, shape in SHAPES.items()
        for function in ("ggem", "norm_ggem")
    ]
    rows += [
        ("float32", "B/16 at 224 px", SHAPES["B/16 at 224 px"], function)
        for function in ("ggem", "norm_ggem")
    ]
    rows += [
        ("bfloat16", "B/16 at 224 px, class token masked", (256, 197, 768), "norm_ggem masked")
    ]
    rows += [
        (dtype, "map 32 x 22", (1, 32, 22, 2048), "superglobal")
        for dtype in ("bfloat16", "float32")
    ]
    for dtype, name, shape, function in rows:
        for one in launches_of(KERNELS[function], jax.ShapeDtypeStruct(shape, dtype)):
            about = {
                "date": time.strftime("%Y-%m-%d"),
                "triton": importlib.metadata.version("triton"),
                "capability": capability,
            }
            append(
                "kernel_code",
                about | {"shape": name, "dtype": dtype} | describe(one, shape, capability),
            )


def describe(one: Launch, shape: tuple[int, ...], capability: int) -> dict[str, Any]:
    """Returns a row: the output of ptxas, and instructions of the busiest loop per token element.

    Idle lanes are included.
    """
    code, constants = compiled(one, capability), one.constants
    loop = code.busiest_loop()
    places = (
        shape[-2] * (2 * constants["HALF"] + 1)
        if one.name == "regional_kernel"
        else constants["UNROLL"] * constants["ROWS"]
    )
    per_thread = (
        places
        * min(constants["CHANNELS"] * constants.get("PIECES", 1), shape[-1])
        / (32 * one.warps)
    )
    special = sum(op.startswith("MUFU") for op in loop)
    return {
        "kernel": one.name, "programs": one.programs, "threads": 32 * one.warps,
        "registers": code.registers, "spilled_bytes": code.spilled_bytes,
        "shared_bytes": code.shared_bytes,
        "instructions_per_element": f"{len(loop) / per_thread:.1f}",
        "special_functions_per_element": f"{special / per_thread:.2f}",
    }  # fmt: skip


if __name__ == "__main__":
    main()
