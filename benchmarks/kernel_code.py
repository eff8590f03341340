"""Counts registers, spills and instructions per element of every kernel, compiled ahead of time.

    python -m benchmarks.kernel_code

It needs triton and no GPU. Instructions are all those of the busiest loop, divided by the elements
of the tokens that a thread takes in one iteration; lanes beyond the channels do not count as
elements. Rows are appended to benchmarks/results/kernel_code.csv.
"""

import argparse
import importlib.metadata
import re
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
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
    dtypes: list[str]  # of its pointers, as Triton writes them: inputs, then outputs
    sizes: list[int]  # bytes of the arrays to which they point
    programs: int
    warps: int
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the kernel function."""
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
    def digest(self) -> str:
        """A few digits that tell this machine code from other."""
        return f"{zlib.crc32(self.sass.encode()):08x}"

    @property
    def opcodes(self) -> list[str]:
        """All instructions in order, without their operands."""
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


def _value_and_gradient(pool: Callable, per_channel: int) -> Callable:
    """Returns a function of tokens `(b, n, d)` that computes the value and gradient of a pooling.

    The pooling takes `per_channel` arrays `(d,)` between tokens and exponents.
    """

    def launch_all(tokens):
        channels = [jnp.ones(tokens.shape[-1])] * per_channel
        arrays = (tokens, *channels, jnp.full(12 if tokens.shape[-1] % 12 == 0 else 1, 3.0))
        value, pull = jax.vjp(pool, *arrays)
        return pull(value)

    return launch_all


def _with_mask(pool: Callable) -> Callable:
    return lambda tokens, *parameters: pool(
        tokens, *parameters, mask=jnp.ones(tokens.shape[:2], bool)
    )


_ggem, _norm_ggem, _superglobal = (
    partial(pool, implementation="triton") for pool in (ggem_pool, norm_ggem_pool, superglobal_pool)
)

# What to compile, by name: functions of one array that launch the kernels.
KERNELS: dict[str, Callable] = {
    "ggem": _value_and_gradient(_ggem, 0),
    "ggem skip": _value_and_gradient(partial(_ggem, skip=1), 0),
    "ggem masked": _value_and_gradient(_with_mask(_ggem), 0),
    "ggem shift": _value_and_gradient(partial(_ggem, negatives="shift"), 0),
    "ggem signed": _value_and_gradient(partial(_ggem, negatives="signed"), 0),
    "norm_ggem": _value_and_gradient(_norm_ggem, 2),
    "norm_ggem skip": _value_and_gradient(partial(_norm_ggem, skip=1), 2),
    "norm_ggem masked": _value_and_gradient(_with_mask(_norm_ggem), 2),
    "norm_ggem signed": _value_and_gradient(partial(_norm_ggem, negatives="signed"), 2),
    "superglobal": _superglobal,
}

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


def pointers_of(arrays: Sequence[Any]) -> list[str]:
    """Returns the types of pointers to arrays, as Triton writes them."""
    return [_POINTERS[array.dtype.name] for array in arrays]


def record_launches(
    function: Callable, *shapes: jax.ShapeDtypeStruct, capability: int = 90
) -> list[Launch]:
    """Returns the kernel calls that a function traces, without compiling or running them.

    Args:
        function: Function of arrays, one that passes `implementation="triton"` itself.
        *shapes: Shapes and dtypes of its arguments.
        capability: Compute capability of the GPU for which tiles are chosen.

    Returns:
        Each different call once, in order: the forward kernel first.
    """
    launches: list[Launch] = []

    def triton_call(*inputs, kernel, grid, num_warps, compute_capability, out_shape, **constants):
        dtypes = pointers_of((*inputs, *out_shape))
        sizes = [a.size * a.dtype.itemsize for a in (*inputs, *out_shape)]
        launch_ = Launch(kernel, dtypes, sizes, grid[0], num_warps, constants)
        if launch_ not in launches:  # JAX may trace a shape more than once
            launches.append(launch_)
        return [jnp.zeros(o.shape, o.dtype) for o in out_shape]

    jax_triton = SimpleNamespace(triton_call=triton_call)
    jax.clear_caches()  # so that nothing traced outside is found here, nor the reverse
    with (
        mock.patch.object(launch, "load_jax_triton", return_value=jax_triton),
        mock.patch.object(launch, "check"),
        launch.compiled_for(capability),
    ):
        jax.eval_shape(lambda *arguments: function(*arguments), *shapes)
    jax.clear_caches()
    return launches


def source_of(launch_: Launch) -> Any:
    """Returns a kernel call as Triton's compiler takes it: an `ASTSource`."""
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in launch_.kernel.params]
    pointers = dict(zip(names, launch_.dtypes, strict=False))
    return ASTSource(
        fn=launch_.kernel,
        signature=pointers | dict.fromkeys(launch_.constants, "constexpr"),
        constexprs=launch_.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
    )


def compile_for(launch_: Launch, capability: int) -> Any:
    """Returns what Triton makes of a kernel call: `asm` by kind of text, and `metadata`.

    It is assembled by the older one of Triton's ptxas and that of JAX.

    Args:
        launch_: The call of the kernel.
        capability: Compute capability, such as 90.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    launch.available()  # gives Triton the ptxas of JAX
    return triton.compile(
        source_of(launch_),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch_.warps, "enable_fp_fusion": True},
    )


def compile_kernel(launch_: Launch, capability: int) -> Code:
    """Returns the machine code of a kernel call, as `compile_for` compiles it.

    Args:
        launch_: The call of the kernel.
        capability: Compute capability, such as 90.

    Returns:
        The code, with what ptxas reports about it.
    """
    import triton

    asm = compile_for(launch_, capability).asm
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
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
    return Code(registers, stack + local, shared, sass, asm["ttir"])


SHAPES = {
    "S/16 at 224 px": (256, 196, 384),
    "B/16 at 224 px": (256, 196, 768),
    "L/16 at 224 px": (256, 196, 1024),
    "L/14 at 518 px": (64, 1369, 1024),
}


_B16 = "B/16 at 224 px"
CASES = [  # (function, name of the shape, shape, dtype)
    *((f, name, SHAPES[name], "bfloat16") for name in SHAPES for f in ("ggem", "norm_ggem")),
    *((f, _B16, SHAPES[_B16], "float32") for f in ("ggem", "norm_ggem")),
    *((f"ggem {rule}", _B16, SHAPES[_B16], "bfloat16") for rule in ("shift", "signed")),
    ("norm_ggem signed", _B16, SHAPES[_B16], "bfloat16"),
    ("norm_ggem masked", f"{_B16} with a class token", (256, 197, 768), "bfloat16"),
    *(("superglobal", "map 32 x 22", (1, 32, 22, 2048), t) for t in ("bfloat16", "float32")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--capability", type=int, default=90, choices=(80, 90, 100), help="compute capability"
    )
    capability = parser.parse_args().capability
    from triton.backends.nvidia.compiler import get_ptxas

    launch.available()  # gives Triton the ptxas of JAX where its own is newer
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "triton": importlib.metadata.version("triton"),
        "ptxas": get_ptxas(capability).version,
        "capability": capability,
    }
    for function, name, shape, dtype in CASES:
        about |= {"function": function, "shape": name, "dtype": dtype}
        for one in record_launches(
            KERNELS[function], jax.ShapeDtypeStruct(shape, dtype), capability=capability
        ):
            append("kernel_code", about | describe(one, shape, capability))


def describe(launch_: Launch, shape: tuple[int, ...], capability: int) -> dict[str, Any]:
    """Returns a row of the results: what ptxas reports, and instructions per element.

    Args:
        launch_: The call of the kernel.
        shape: Shape of the tokens `(b, n, d)` or of the map `(b, h, w, d)`.
        capability: Compute capability, such as 90.

    Returns:
        The cells of the row by column. Instructions are those of the busiest loop.
    """
    code, constants = compile_kernel(launch_, capability), launch_.constants
    loop = code.busiest_loop()
    if launch_.name == "regional_kernel":  # the loop takes 2 HALF + 1 rows of the map
        places = shape[-2] * (2 * constants["HALF"] + 1)
    else:
        places = constants["UNROLL"] * constants["ROWS"]
    channels = min(constants["CHANNELS"] * constants.get("PIECES", 1), shape[-1])
    per_thread = places * channels / (32 * launch_.warps)
    special = sum(op.startswith("MUFU") for op in loop)
    return {
        "kernel": launch_.name,
        "programs": launch_.programs,
        "threads": 32 * launch_.warps,
        "registers": code.registers,
        "spilled_bytes": code.spilled_bytes,
        "shared_bytes": code.shared_bytes,
        "instructions_per_element": f"{len(loop) / per_thread:.1f}",
        "special_functions_per_element": f"{special / per_thread:.2f}",
    }


if __name__ == "__main__":
    main()
