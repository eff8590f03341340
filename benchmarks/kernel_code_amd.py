"""Compiles every kernel for AMD GPUs, with Triton's own compiler, and counts registers and spills.

    python -m benchmarks.kernel_code_amd

It needs triton, and no GPU, no ROCm. Nothing here runs: the kernels are used on NVIDIA GPUs only.
They are compiled with FAST=False, without inline assembly. Rows are appended to
benchmarks/results/kernel_code_amd.csv.
"""

import argparse
import dataclasses
import importlib.metadata
import re
import time
from dataclasses import dataclass

import jax

from benchmarks.kernel_code import CASES, KERNELS, Launch, record_launches, source_of
from benchmarks.record import append

# Architecture -> threads of a wave: MI300X, and Radeon RX 7900.
WAVES = {"gfx942": 64, "gfx1100": 32}


@dataclass(frozen=True)
class AmdCode:
    """Machine code of one kernel for an AMD GPU."""

    vector_registers: int  # of a thread
    scalar_registers: int  # of a wave
    vector_spills: int  # vector registers that are kept in memory
    scalar_spills: int
    shared_bytes: int
    assembly: str


def compile_for_amd(launch_: Launch, architecture: str) -> AmdCode:
    """Returns the machine code of a kernel call.

    Args:
        launch_: The call of the kernel.
        architecture: One of `WAVES`, such as "gfx942".
    """
    import triton
    from triton.backends.compiler import GPUTarget

    wave = WAVES[architecture]
    portable = dataclasses.replace(launch_, constants=launch_.constants | {"FAST": False})
    done = triton.compile(
        source_of(portable),
        target=GPUTarget("hip", architecture, wave),
        options={"num_warps": max(launch_.warps * 32 // wave, 1), "enable_fp_fusion": True},
    )
    text = done.asm["amdgcn"]
    counts = (
        int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
        for name in ("vgpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    )
    return AmdCode(*counts, done.metadata.shared, text)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "triton": importlib.metadata.version("triton"),
    }
    for function, name, shape, dtype in CASES:
        for one in record_launches(KERNELS[function], jax.ShapeDtypeStruct(shape, dtype)):
            for architecture in WAVES:
                code = dataclasses.asdict(compile_for_amd(one, architecture))
                del code["assembly"]
                row = {"architecture": architecture, "function": function, "kernel": one.name}
                append("kernel_code_amd", about | row | {"shape": name, "dtype": dtype} | code)


if __name__ == "__main__":
    main()
