"""The accelerator model from a batch to a page: python -m eval.studies.accelerator [--out DIR]

Draws a batch of 256 requests with lengths like ShareGPT's, runs one decode step of GPT-3 7B on
three systems, searches a better schedule, explores a small space of machines, and writes
`accelerator.html`, one page that needs no other file. It calls the library, and prints the command
line of each call.
"""

import argparse
import shlex
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from neupims import (
    Batch,
    Hardware,
    Parallel,
    explore,
    export_trace,
    load_model,
    make_batch,
    make_case,
    search_schedule,
    simulate_case,
)
from neupims.exploration.pareto import in_plane
from neupims.exploration.space import parse_knob
from neupims.pages.report import write_report
from neupims.scheduling.policies import estimate_cycles, pack_longest_first

MODEL = "gpt3-7b"
REQUESTS, CHANNELS, LONGEST = 256, 32, 2048
# Medians of ShareGPT's prompts and answers in the public simulator's
# trace-generator/share-gpt2/stats.tsv, with a spread that gives similar means.
PROMPT_MEDIAN, PROMPT_SIGMA, ANSWER_MEDIAN, ANSWER_SIGMA = 17, 1.75, 261, 0.5
SYSTEMS = {"NeuPIMs": "neupims", "NPU and PIM in turns": "npu-pim", "NPU only": "npu-only"}
KNOBS = [
    "hbm.num_channels=16,32,48,64",
    "npu.num_arrays=2:16",
    "hbm.tfaw_cycles=12:40",
    "pim.macs_per_bank=8,16,32",
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--budget", type=int, default=4096, help="schedules that the search evaluates"
    )
    parser.add_argument(
        "--points", type=int, default=2048, help="machines that the exploration evaluates"
    )
    options = parser.parse_args(argv)
    began = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    trace, searched = options.out / "sharegpt-like.csv", options.out / "searched.csv"
    export_trace(trace, draw(), num_channels=CHANNELS)
    workload = ("--model", MODEL, "--trace", str(trace))
    steps = {}
    for name, system in SYSTEMS.items():
        announce("simulate", *workload, "--system", system)
        steps[name] = simulate_case(make_case(MODEL, trace, system=system)).to_dict()
    announce(
        *("search", *workload, "--realisable", "--budget", str(options.budget)),
        *("--export-trace", str(searched)),
    )
    found = search_schedule(
        make_case(MODEL, trace), realisable=True, budget=options.budget, export=searched
    ).to_dict()
    knobs = [word for knob in KNOBS for word in ("--knob", knob)]
    announce("explore", "--trace", str(trace), *knobs, "--points", str(options.points))
    front = explore(
        Hardware(), MODEL, trace, dict(map(parse_knob, KNOBS)), points=options.points
    ).to_dict()
    write_report(
        options.out / "accelerator.html",
        sections(steps, found, front),
        title="A decode step of GPT-3 7B beside computing memory",
        facts={
            "batch": f"{REQUESTS} requests, lengths like ShareGPT's",
            "commands": f"in {time.perf_counter() - began:.0f} s",
        },
    )
    print(f"{time.perf_counter() - began:.0f} s. Report: {options.out / 'accelerator.html'}")


def draw() -> Batch:
    """Returns a batch with lengths like ShareGPT's, on the channels of the paper's packing."""
    rng = np.random.default_rng(0)
    prompts = rng.lognormal(np.log(PROMPT_MEDIAN), PROMPT_SIGMA, REQUESTS)
    answered = rng.lognormal(np.log(ANSWER_MEDIAN), ANSWER_SIGMA, REQUESTS) * rng.random(REQUESTS)
    lengths = np.clip(np.ceil(prompts + answered), 1, LONGEST).astype(np.int32)
    work = estimate_cycles(Hardware(), load_model(MODEL), jnp.asarray(lengths), Parallel(4, 1))
    return make_batch(
        lengths, np.asarray(pack_longest_first(work, CHANNELS)), num_channels=CHANNELS
    )


def announce(*words: str) -> None:
    """Prints the command line that does the same as the next call of the library.

    Args:
        *words: Words of the command after `neupims`.
    """
    print(f"neupims {shlex.join(words)}")


def sections(
    steps: dict[str, dict[str, Any]], found: dict[str, Any], front: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns the sections of the page: systems, stages of the first one, search, exploration.

    Args:
        steps: The simulated step of each system by name, as its `to_dict` returns it.
        found: The schedule search, as its `to_dict` returns it.
        front: The exploration, as its `to_dict` returns it.
    """
    first = next(iter(steps.values()))
    columns = (
        "system",
        "tokens/s",
        "layer, cycles",
        "NPU busy",
        "PIM busy",
        "memory bus",
        "J of a device",
    )
    keys = ("npu_utilization", "pim_utilization", "bandwidth_utilization")
    rows = [
        (
            name,
            f"{step['tokens_per_second']:,.0f}",
            f"{step['layer_cycles']:,.0f}",
            *(f"{step[key]:.0%}" for key in keys),
            f"{step['energy_joules']:.3g}",
        )
        for name, step in steps.items()
    ]
    best = found["best"]
    curves = [
        {
            "name": name,
            "x": each["curve"]["evaluations"],
            "y": each["curve"]["best"],
            "low": each["curve"]["low"],
            "high": each["curve"]["high"],
        }
        for name, each in found["strategies"].items()
    ]
    lines = [
        {"name": "as published", "value": found["published"]},
        {"name": "lower bound", "value": found["lower_bound"]},
    ]
    together = {
        when: np.sum(loads, axis=0).tolist() for when, loads in found["channel_cycles"].items()
    }
    square, speed = (
        np.array([each["metrics"][name] for each in front["front"]])
        for name in ("area_mm2", "tokens_per_second")
    )
    leading = in_plane(square, speed, most_x=False, most_y=True)
    points = [
        {"x": x, "y": y, "front": chosen, "name": f"{y:,.0f} tokens/s"}
        for x, y, chosen in zip(square.tolist(), speed.tolist(), leading.tolist(), strict=True)
    ]
    return [
        {"kind": "table", "title": "Three systems", "columns": columns, "rows": rows},
        {
            "kind": "gantt",
            "title": "Stages of NeuPIMs",
            "ops": first["ops"],
            "stage_cycles": first["stage_cycles"],
        },
        {
            "kind": "curves",
            "title": "Search for a schedule",
            "text": (
                f"The best one, {best['found_by']}, takes {best['gain']:.1%} less than the paper's"
                f" greedy packing, and {best['gap_to_bound']:.1%} more than what no schedule can"
                " beat."
            ),
            "series": curves,
            "x_name": "schedules evaluated",
            "y_name": "cycles of a layer",
            "log_x": False,
            "lines": lines,
        },
        {
            "kind": "channels",
            "title": "Channels",
            "loads": [
                {"name": f"{when} the search", "cycles": loads} for when, loads in together.items()
            ],
        },
        {
            "kind": "pareto",
            "title": "Machines",
            "text": (
                "Those that no other beats in throughput, energy and area together; joined, those"
                " that none beats in throughput and area."
            ),
            "points": points,
            "x_name": "mm2",
            "y_name": "tokens per second",
            "log_x": True,
            "log_y": True,
        },
    ]


if __name__ == "__main__":
    main()
