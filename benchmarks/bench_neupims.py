"""Measures how many accelerator designs are evaluated in a second.

    python -m benchmarks.bench_neupims

One decode iteration of GPT-3 7B in closed form, with 256 requests of chat-like lengths and all
metrics (cycles of the stages, throughput, utilisations, energy by parts, area). Designs differ in
every knob that affects the number of tiles or their latency: ranks, bank groups, banks, row and
page bytes, products of a command, tFAW, tRCD, arrays and clock. The evaluator of `explore` takes
them in chunks, on all devices (each core of a CPU is one), and copies the results back.

The rows have one schedule for all designs, or another one for each; both fidelities; 10^2 to 10^6
designs (10^7 with --designs), with the largest memory of this process. The comparison calls the
same function, compiled for one design, in a Python loop, and copies each result back. Seconds are
the least of the rounds, because other work on the machine only adds to them. Designs per second of
CPU time are given too, which other work affects less. Rows go to
benchmarks/results/neupims_speed.csv.
"""

import argparse
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bench_search import Watched
from benchmarks.record import append, machine
from neupims.costs.area import area
from neupims.exploration.evaluation import BLOCK, map_blocks
from neupims.exploration.evaluator import Evaluator
from neupims.exploration.sampling import sample
from neupims.exploration.space import make_space
from neupims.machine.config import load_model, load_parallel
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.workload import Batch, make_batch
from neupims.processors import count_processors
from neupims.timing.iteration import simulate

MODEL = "gpt3-7b"
CHANNELS = 32
KNOBS = {
    "hbm.ranks": [1, 2, 4],
    "hbm.bank_groups": {"low": 2, "high": 8},
    "hbm.banks_per_group": {"low": 2, "high": 8},
    "hbm.row_bytes": [1024, 2048],
    "pim.page_bytes": {"low": 512, "high": 1024},
    "pim.macs_per_bank": {"low": 4, "high": 64},
    "hbm.tfaw_cycles": {"low": 12.0, "high": 40.0},
    "hbm.trcd_read_cycles": {"low": 10.0, "high": 20.0},
    "npu.num_arrays": {"low": 2, "high": 16},
    "npu.clock_hz": {"low": 0.7e9, "high": 1.5e9},
}
SPACE = make_space(KNOBS)
MOST_COMPARED = 1_000_000  # designs whose tilings are compared: more would fill the memory


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--designs", type=int, nargs="+", default=[100, 1_000, 10_000, 100_000, 1_000_000]
    )
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=16384, help="designs in one call at most")
    parser.add_argument(
        "--block",
        type=int,
        default=None,
        help="designs side by side on one device (default: 512 on a CPU, all on a GPU)",
    )
    parser.add_argument("--looped", type=int, default=200, help="designs of the Python loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fidelity", nargs="+", default=["simulator", "intended"])
    parser.add_argument("--schedule", nargs="+", default=["one", "each"], choices=("one", "each"))
    options = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", count_processors())
    block = options.block or (BLOCK if jax.default_backend() == "cpu" else options.chunk)
    batch = chat_batch(options.requests)
    for fidelity in options.fidelity:
        for schedule in options.schedule:
            design = metrics_of(batch, schedule, fidelity)
            looped = loop_seconds(design, options.looped, options.rounds) / options.looped
            for count in options.designs:
                found = evaluation_seconds(
                    design, count, min(options.chunk, count), block, options.rounds
                )
                row = {
                    "model": MODEL,
                    "requests": options.requests,
                    "fidelity": fidelity,
                    "schedule": schedule,
                    "designs": count,
                }
                row |= {
                    "different_tilings": found.distinct,
                    "chunk": min(options.chunk, count),
                    "block": block,
                    "seconds": f"{found.seconds:.4f}",
                }
                row |= {
                    "designs_per_second": f"{count / found.seconds:.0f}",
                    "designs_per_cpu_second": f"{count / found.cpu_seconds:.0f}",
                }
                row |= {
                    "loop_designs_per_second": f"{1 / looped:.1f}",
                    "over_loop": f"{looped * count / found.seconds:.0f}",
                }
                append(
                    "neupims_speed",
                    machine() | row | {"peak_anonymous_mib": f"{found.peak / 2**20:.0f}"},
                )


def chat_batch(requests: int) -> Batch:
    """Returns a batch of chat-like lengths: log-normal, mean near 300 tokens, at most 2048.

    The longest come first and are dealt to the channels back and forth.
    """
    lengths = np.random.default_rng(0).lognormal(5.3, 0.9, requests).clip(1, 2048).astype(int)
    lap, place = np.divmod(np.arange(requests), CHANNELS)
    channels = np.where(lap % 2, CHANNELS - 1 - place, place)
    return make_batch(np.sort(lengths)[::-1], channels, (lap + 1) // 2 % 2, num_channels=CHANNELS)


def metrics_of(batch: Batch, schedule: str, fidelity: str):
    """Returns a function from the knobs of one design, and its number, to its metrics.

    Args:
        batch: Requests of the decode iteration.
        schedule: "one" for all designs. With "each", the number of a design sets the order in which
            its requests take the slots of the channels.
        fidelity: Fidelity of the simulation, "simulator" or "intended".
    """
    parts, model, parallel = (
        jax.tree.map(jnp.asarray, batch),
        load_model(MODEL),
        load_parallel(MODEL),
    )
    requests = len(batch.seq_lens)

    def design(knobs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        hardware, mine = Hardware(), parts
        for name, value in knobs.items():
            if name != "number":
                hardware = replace(hardware, name, value)
        if schedule == "each":
            number = knobs["number"]
            slot = (jnp.arange(requests) * (2 * number + 1) + number // 8) % requests
            mine = Batch(parts.seq_lens, slot % CHANNELS, slot // CHANNELS % 2)
        found = simulate(hardware, model, mine, parallel, fidelity=fidelity, most_channels=CHANNELS)  # type: ignore[arg-type]
        kept = (
            "tokens_per_second",
            "iteration_cycles",
            "iteration_seconds",
            "layer_cycles",
            "stage_cycles",
            "energy",
            "energy_joules",
            "flagged",
        )
        utilisations = ("npu_utilization", "pim_utilization", "bandwidth_utilization")
        return {name: getattr(found, name) for name in (*kept, *utilisations)} | {
            "area": area(hardware)
        }

    return design


def columns_of(count: int, start: int = 0) -> dict[str, np.ndarray]:
    """Returns the knobs of designs `start` to `start + count`, and their numbers, as columns."""
    values = sample(SPACE, "random", start, start + count)
    columns = {
        knob.name: column.astype(np.int32 if knob.whole else np.float32)
        for knob, column in zip(SPACE.knobs, values.T, strict=True)
    }
    return columns | {"number": np.arange(start, start + count, dtype=np.int32)}


class Measured(NamedTuple):
    """Time and memory of the evaluation of many designs."""

    seconds: float  # the least of the rounds
    cpu_seconds: float  # CPU time of this process on all cores; the least of the rounds
    peak: int  # largest anonymous memory in any round, in bytes
    # Designs that differ in the knobs that set the number of tiles, of the first MOST_COMPARED.
    distinct: int


def evaluation_seconds(design, count: int, chunk: int, block: int, rounds: int) -> Measured:
    """Returns time and memory of the evaluation of `count` designs.

    Args:
        design: Function of one design, as `metrics_of` returns it.
        count: Number of designs.
        chunk: Designs in one call, at most.
        block: Designs side by side on one device.
        rounds: Rounds that are kept; one chunk, which compiles, comes on top.
    """
    evaluator = Evaluator(SPACE, lambda columns: map_blocks(design, columns, block), chunk)
    seconds, worked, peak = [], [], 0
    for number in range(rounds + 1):
        spent = busy = 0.0
        with Watched() as memory:
            for start in range(0, count if number else 1, evaluator.rows):
                part = columns_of(min(evaluator.rows, count - start), start)
                full = {
                    name: np.pad(each, (0, evaluator.rows - len(each)), mode="edge")
                    for name, each in part.items()
                }
                began, began_work = time.perf_counter(), time.process_time()
                jax.device_get(evaluator.run(jax.device_put(full, evaluator.placed)))
                spent, busy = (
                    spent + time.perf_counter() - began,
                    busy + time.process_time() - began_work,
                )
        seconds.append(spent)
        worked.append(busy)
        peak = max(peak, memory.peak)
    tiling = sample(SPACE, "random", 0, min(count, MOST_COMPARED))
    tiling = tiling[:, : list(KNOBS).index("hbm.tfaw_cycles")]
    distinct = len(np.unique(tiling, axis=0))
    return Measured(min(seconds[1:]), min(worked[1:]), peak, distinct)


def loop_seconds(design, count: int, rounds: int) -> float:
    """Returns the seconds of a Python loop over designs, the least of the rounds."""
    single = jax.jit(design)
    columns = columns_of(count)
    rows = [{name: each[i] for name, each in columns.items()} for i in range(count)]
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        for row in rows:
            jax.device_get(single(row))
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


if __name__ == "__main__":
    main()
