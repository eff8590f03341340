"""Models the time of every kernel on GPUs that are not there, beside the time of a copy.

    python -m benchmarks.model_kernels

It needs triton and no GPU. Each kernel is compiled for each GPU, and its machine code goes through
a timing model of one multiprocessor (`benchmarks.multiprocessor`), which has what data sheets say
(`benchmarks.gpus`) and a few assumptions: nine tenths of the published clock and bandwidth are
reached, a load from memory takes 720 cycles, and a microsecond lies between two kernels. **Nothing
here is measured.** Rows are appended to benchmarks/results/kernel_model.csv.
"""

import argparse
import csv
import importlib.metadata
import math
import re
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import jax

from benchmarks import multiprocessor, sass
from benchmarks.gpus import GPU, GPUS
from benchmarks.kernel_code import KERNELS, Code, Launch, compile_kernel, record_launches
from benchmarks.record import RESULTS, append

MODELS = {"B/16 at 224 px": (196, 768), "L/16 at 224 px": (196, 1024)}  # tokens, channels
IMAGES = 256, 300  # 300 fills the last wave of programs badly
FUNCTIONS = ("ggem", "norm_ggem")
# How the first of 197 tokens can be left out of the pooling: by its place, or by a mask.
CLASS_TOKEN = {"class token skipped": "skip", "class token masked": "masked"}
_SHARED = ("scale", "bias", "p")  # parameters that all programs read: they come from the L2 cache


def model(launch: Launch, code: Code, gpu: GPU) -> dict[str, Any]:
    """Returns what the model says about one kernel call.

    Args:
        launch: The call, of a kernel of `ggem` or `norm_ggem`.
        code: Its machine code for the GPU.
        gpu: The GPU.

    Returns:
        Bytes, resources and times by column of the results.
    """
    instructions = sass.parse(code.sass)
    kinds = _programs(launch, instructions, gpu.capability)
    resident = multiprocessor.resident_programs(
        gpu, code.registers, launch.warps, code.shared_bytes
    )
    timing = multiprocessor.simulate(
        gpu, lambda i: kinds[i % len(kinds)], launch.programs, launch.warps, resident
    )
    moved = sum(launch.sizes[k] for k in _used(instructions, gpu.capability))
    copy = multiprocessor.copy_seconds(gpu, moved)
    elements = launch.sizes[0] // _ITEMSIZE[launch.dtypes[0]]
    counts = [
        sass.count_by_pipe(instructions[i] for i in kind.path) for kind in kinds
    ]  # of one warp

    def per_element(*pipes: str) -> float:
        total = sum(count.get(pipe, 0) for count in counts for pipe in pipes) / len(counts)
        return 32 * launch.warps * launch.programs * total / elements

    return {
        "MB": f"{moved / 1e6:.1f}",
        "programs": launch.programs,
        "threads": 32 * launch.warps,
        "registers": code.registers,
        "shared_bytes": code.shared_bytes,
        "resident": resident,
        "bytes_in_flight": resident * _step_bytes(launch),
        "waves": f"{launch.programs / (resident * gpu.multiprocessors):.2f}",
        **{f"{name}_per_element": f"{per_element(*pipes):.2f}" for name, pipes in _COLUMNS.items()},
        **{f"{name}_busy": f"{share:.2f}" for name, share in timing.busy.items()},
        "copy_us": f"{1e6 * copy:.1f}",
        "modelled_us": f"{1e6 * timing.seconds:.1f}",
        "fraction_of_copy": f"{copy / timing.seconds:.2f}",
    }


def _step_bytes(launch: Launch) -> int:
    """Bytes of the tokens that a program loads before it computes."""
    c = launch.constants
    channels = min(c["CHANNELS"] * c.get("PIECES", 1), c["D"])
    return c["UNROLL"] * c["ROWS"] * channels * _ITEMSIZE[launch.dtypes[0]]


_ITEMSIZE = {"*bf16": 2, "*fp16": 2, "*fp32": 4}
_COLUMNS = {
    "alu": ("alu",),
    "fma": ("fma", "fma heavy"),
    "special": ("special",),
    "load_store": ("load/store",),
    "all": ("alu", "fma", "fma heavy", "special", "load/store", "control", "uniform"),
}


def _programs(
    launch: Launch, code: list[sass.Instruction], capability: int
) -> list[multiprocessor.Program]:
    """What the programs of a row execute: one kind for each run of its tokens."""
    paths = [sass.path(code, *trips) for trips in _trips(launch, len(sass.loops(code)))]
    parameters = sass.pointers(code, capability)
    names = [parameter.name for parameter in launch.kernel.params]
    accesses: dict[int, float] = {}  # of all warps, by parameter
    for path in paths:
        for i in path:
            if i in parameters:
                warps = launch.programs * launch.warps / len(paths)
                accesses[parameters[i]] = accesses.get(parameters[i], 0) + warps
    moved = {
        i: 0.0 if names[k] in _SHARED else launch.sizes[k] / accesses[k]
        for i, k in parameters.items()
        if k in accesses
    }
    return [multiprocessor.Program(code, path, moved) for path in paths]


def _used(code: list[sass.Instruction], capability: int) -> set[int]:
    return set(sass.pointers(code, capability).values())


def _trips(launch: Launch, loops: int) -> Iterator[tuple[list[int], bool]]:
    """For each run of tokens: how often its loops are executed, and whether a tail follows."""
    c = launch.constants
    n, step, splits = c["N"], c["UNROLL"] * c["ROWS"], c.get("SPLITS", 1)
    whole = n // step * step
    run = math.ceil(math.ceil(n / splits) / step) * step
    tail_step = c["ROWS"] if "SPLITS" not in c else step
    for split in range(splits):
        first, end = split * run, (split + 1) * run
        main = max(0, math.ceil((min(end, whole) - first) / step))
        tail = max(0, math.ceil((min(end, n) - max(first, whole)) / tail_step))
        yield [main, tail][:loops], tail > 0


@cache
def _launches(function: str, shape: tuple[int, ...], capability: int) -> list[Launch]:
    tokens = jax.ShapeDtypeStruct(shape, "bfloat16")
    return record_launches(KERNELS[function], tokens, capability=capability)


def cases() -> Iterator[tuple[str, str, tuple[int, int, int]]]:
    """Yields what is modelled: the name, the function of `KERNELS`, and the shape of its tokens."""
    for name, (tokens, channels) in MODELS.items():
        for images in IMAGES:
            for function in FUNCTIONS:
                yield name, function, (images, tokens, channels)
    for words, option in CLASS_TOKEN.items():
        for function in FUNCTIONS:
            yield f"{words}, B/16 at 224 px", f"{function} {option}", (256, 197, 768)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=[gpu.name for gpu in GPUS], help="all by default")
    chosen = parser.parse_args().gpu
    for gpu in GPUS:
        if chosen in (None, gpu.name):
            for row in rows(gpu):
                append("kernel_model", row)


def rows(gpu: GPU) -> Iterator[dict[str, Any]]:
    """Yields the rows of a GPU: the kernels of all `cases`."""
    for name, function, shape in cases():
        for launch in _launches(function, shape, gpu.capability):
            code = compile_kernel(launch, gpu.capability)
            yield {
                "date": time.strftime("%Y-%m-%d"),
                "triton": importlib.metadata.version("triton"),
                "modelled_for": gpu.name,
                "model": name,
                "images": shape[0],
                "kernel": launch.name,
                "code": code.digest,
            } | model(launch, code, gpu)


KERNELS_OF = {
    ("ggem", "forward"): ["pool_kernel"],
    ("ggem", "backward"): ["gradient_kernel"],
    ("norm_ggem", "forward"): ["norm_pool_kernel"],
    ("norm_ggem", "backward"): ["norm_gradient_kernel"],
}  # by operation and stage, as `benchmarks.bench_kernels` names them


def modelled_us(
    device: str, name: str, images: int, dtype: str, operation: str, stage: str
) -> float | None:
    """Returns the modelled time of an operation, from the last of the committed rows.

    Args:
        device: A name that contains that of one of `GPUS`, such as "NVIDIA H200".
        name: A key of `MODELS`.
        images: Number of images.
        dtype: Of the tokens; bfloat16 alone is modelled.
        operation: "ggem" or "norm_ggem".
        stage: "forward", "backward" or "both".

    Returns:
        Microseconds, or None where there are no rows.
    """
    if stage == "both":
        parts = [
            modelled_us(device, name, images, dtype, operation, part)
            for part in ("forward", "backward")
        ]
        return None if None in parts else sum(parts)
    last = {
        row["kernel"]: float(row["modelled_us"])
        for row in _committed()
        if (row["model"], row["images"]) == (name, str(images))
        and re.search(rf"\b{re.escape(row['modelled_for'])}\b", device)
    }
    kernels = KERNELS_OF.get((operation, stage), [])
    if dtype != "bfloat16" or not kernels or not last.keys() >= set(kernels):
        return None
    return sum(last[kernel] for kernel in kernels)


@cache
def _committed() -> list[dict[str, str]]:
    with (RESULTS / "kernel_model.csv").open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
