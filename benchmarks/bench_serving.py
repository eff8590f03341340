"""Measures how long a trace takes to serve: one decode step at a time, several, and many machines.

    python -m benchmarks.bench_serving azure_conv.csv

Each system serves the trace twice with each kind of loop, and the second time counts, so compiling
does not. The kinds are `neupims.serving.loop` with one iteration a step, and with several decode
steps at once (`neupims.serving.ahead`), which `neupims serve` uses; their results are compared.
Then --machines machines that differ in arrays, clock and tFAW serve the first --few requests as
lanes (`neupims.serving.lanes`). CPU time is that of this process, which other work on the machine
affects less than wall time. Rows go to benchmarks/results/serving_speed.csv.
"""

import argparse
import os
import time

import jax
import numpy as np

from benchmarks.record import append, machine
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace_all
from neupims.serving.ahead import look_ahead
from neupims.serving.lanes import run_lanes
from neupims.serving.loop import run_to_end
from neupims.serving.policy import first_come
from neupims.serving.requests import Arrivals, read_arrivals
from neupims.serving.results import sum_up
from neupims.serving.server import (
    Server,
    check_lengths,
    make_memory,
    make_requests,
    make_server,
    most_tokens,
    round_length,
    together,
)
from neupims.serving.tables import make_tables

SYSTEMS = (
    ("neupims", "on"),
    ("neupims", "off"),
    ("neupims", "chosen"),
    ("npu-pim", "on"),
    ("npu-only", "on"),
    ("gpu", "on"),
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", help="a file with arrivals")
    parser.add_argument("--model", default="llama3-8b")
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--requests", type=int, default=None, help="of the trace (default: all)")
    parser.add_argument("--few", type=int, default=1000, help="requests of the lanes")
    parser.add_argument("--machines", type=int, nargs="*", default=[1, 8, 64])
    options = parser.parse_args(argv)
    row = {"trace": os.path.basename(options.trace), "model": options.model, "tp": options.tp}
    requests = read_arrivals(options.trace, first=options.requests)
    for system, interleaving in SYSTEMS:
        _, server = make_server(
            options.model, tp=options.tp, system=system, interleaving=interleaving
        )
        fitting, _ = check_lengths(server, requests, "whole", True)
        one, several = (serve_seconds(server, fitting, ahead=each) for each in (False, True))
        if not np.allclose(one[0], several[0], rtol=0, atol=1e3):  # nanoseconds
            raise ValueError("several decode steps at once give other times")
        named = row | {"system": system, "interleaving": interleaving, "machines": 1}
        for kind, (_, iterations, cpu, wall) in (("one", one), ("several", several)):
            report(named | {"steps": kind}, len(fitting.inputs), iterations, cpu, wall)
    _, server = make_server(options.model, tp=options.tp)
    few, _ = check_lengths(server, read_arrivals(options.trace, first=options.few), "whole", True)
    for count in options.machines:
        named = row | {"system": "neupims", "interleaving": "on", "machines": count}
        report(named | {"steps": "several"}, len(few.inputs), *lane_seconds(server, few, count))


def report(row: dict, requests: int, iterations: int, cpu: float, wall: float) -> None:
    """Writes a row.

    Args:
        row: What was measured.
        requests: The requests of a machine.
        iterations: Those of all machines.
        cpu: Seconds of CPU time.
        wall: Seconds.
    """
    measured = {"requests": requests, "iterations": iterations, "cpu_seconds": f"{cpu:.2f}"}
    measured |= {"seconds": f"{wall:.2f}", "cpu_us_per_iteration": f"{cpu / iterations * 1e6:.1f}"}
    append("serving_speed", machine() | row | measured)


def serve_seconds(
    server: Server, requests: Arrivals, *, ahead: bool
) -> tuple[np.ndarray, int, float, float]:
    """Returns when requests end (words of nanoseconds), iterations, CPU seconds and seconds.

    Args:
        server: The machine.
        requests: The requests, which fit it.
        ahead: Whether several decode steps are computed at once.
    """
    rules = look_ahead(server.rules) if ahead else server.rules
    length, tokens = round_length(requests), together(server, requests, "whole")
    memory = make_memory(server, server.hardware, length, tokens)
    tables = make_tables(server.setting, server.hardware, most_tokens(rules), length)
    given, _ = make_requests(requests, first_come, rules.window, None)
    served, iterations, cpu, wall = None, 0.0, 0.0, 0.0
    for _ in range(2):
        cpu, wall, iterations = time.process_time(), time.perf_counter(), 0.0
        for state, step in run_to_end(rules, tables, memory, given):
            iterations += float(sum_up(jax.tree.map(np.asarray, step)).iterations)
            served = state.served
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    words = np.asarray(served, np.float64)
    return words[:, 4] * 2**30 + words[:, 5], int(iterations), cpu, wall


def lane_seconds(server: Server, requests: Arrivals, count: int) -> tuple[int, float, float]:
    """Returns the iterations of all machines, CPU seconds and seconds.

    Args:
        server: The rules and the model.
        requests: The requests of each machine.
        count: The number of machines.
    """
    random = np.random.default_rng(0)

    def draw() -> Hardware:
        npu = {"npu.num_arrays": int(random.integers(4, 17))}
        npu |= {"npu.clock_hz": float(random.choice([0.8e9, 1e9, 1.2e9]))}
        return replace_all(server.hardware, npu | {"hbm.tfaw_cycles": int(random.integers(16, 40))})

    machines = [draw() for _ in range(count)]
    for _ in range(2):
        cpu, wall = time.process_time(), time.perf_counter()
        lanes = run_lanes(server, machines, [requests])
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return int(sum(float(lane.totals.iterations) for lane in lanes)), cpu, wall


if __name__ == "__main__":
    main()
