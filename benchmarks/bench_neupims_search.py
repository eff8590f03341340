"""Compares schedules found by search with the published ones.

    python -m benchmarks.bench_neupims_search

There are three studies. Each writes a row for each case into benchmarks/results.

neupims_search.csv: the twenty traces published with the simulator (512 requests), and fresh draws
of ShareGPT, Alpaca, Azure-conversation and Azure-code lengths (256 requests, clipped to 2,048, put
on channels by the simulator's greedy packing, listed as drawn), for every GPT-3 model. "published"
is the trace as it is, halved by the simulator's rule, two sub-batches. "best" is the best
realisable schedule of an evolution that starts from the baselines. Gains are predicted; their error
is that of the model (`python -m neupims validate`). The gap is to the lower bound. The whole batch
may also be served at once, on the best of the baselines: `one_batch_gain` is the gain of the better
of the two.

neupims_search_small.csv: small cases whose optimum is enumerated. It counts how often each search
and each heuristic reaches the optimum with a tenth of the points.

neupims_search_speed.csv: the CPU time of one schedule of a search, for every strategy, without
compilation (`--published 0 --draws 0 --small 0` makes these rows alone).

All requests are equally likely, and each is at a uniform point of its output: its length is its
input and a share of its output.
"""

import argparse
import csv
import os
import time
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import RESULTS, append, machine
from neupims.machine.config import load_model, load_parallel, names
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.traces import read_trace
from neupims.machine.workload import Decoder, Parallel, halves, make_batch
from neupims.scheduling.baselines import baselines
from neupims.scheduling.decision import Choices, decide, decision_batch, export_trace, make_genome
from neupims.scheduling.objective import Layer, Problem, make_problem
from neupims.scheduling.oracle import exhaustive, gap, lower_bound
from neupims.scheduling.policies import estimate_cycles, pack_longest_first
from neupims.scheduling.search import Found, search
from neupims.scheduling.strategies import STRATEGIES

SHARED = Path(os.environ.get("GGEM_SHARED", "../shared"))
LENGTHS = {
    "share-gpt": "sharegpt_lengths.csv",
    "alpaca": "alpaca_lengths.csv",
    "azure-conversation": "azure_conv.csv",
    "azure-code": "azure_code.csv",
}
REQUESTS, LONGEST, CHANNELS = 256, 2048, 32
POINTS = {4**6: (2, 6), 4**7: (2, 7), 6**6: (3, 6)}  # points of a small case: channels and requests
SMALL_POPULATION = 8  # 51 rounds with the 409 evaluations of the smallest cases
SPEED_CHOICES = {
    "any": Choices(CHANNELS),
    "realisable, two sub-batches": Choices(CHANNELS, realisable=True, sub_batches=(2,)),
}
REACHED = 1e-6  # of the optimum: float32 sums differ in the last digit with their order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=10, help="of each distribution of lengths")
    parser.add_argument(
        "--published", type=int, default=20, help="how many of the published traces"
    )
    parser.add_argument(
        "--models", default=",".join(name for name in names("models") if name.startswith("gpt3"))
    )
    parser.add_argument(
        "--budget", type=int, default=12288, help="schedules evaluated for each seed"
    )
    parser.add_argument("--population", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--small", type=int, default=200, help="small cases")
    parser.add_argument(
        "--traces",
        type=Path,
        help="write the best schedules into this folder, as traces of the simulator",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args()
    began = time.perf_counter()
    large_cases(options)
    small_cases(options)
    speeds(options)
    print(f"{time.perf_counter() - began:.0f} s in all")


def large_cases(options: argparse.Namespace) -> None:
    """Appends a row for each trace and model, and prints a summary of each group of traces."""
    gains: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for group, name, lengths, channels in traces(options.published, options.draws):
        for model_name in options.models.split(","):
            row = improve(model_name, lengths, channels, options, name)
            gains.setdefault((group, model_name), []).append((row["gain"], row["gap"]))
            shown = {
                key: f"{value:.5g}" if isinstance(value, float) else value
                for key, value in row.items()
            }
            append(
                "neupims_search",
                machine() | {"group": group, "trace": name, "model": model_name} | shown,
                options.results,
            )
    for (group, model_name), pairs in gains.items():
        gain, above = np.array(pairs).T
        spread = (
            f"gain {gain.mean():.2%} ({gain.min():.2%} to {gain.max():.2%}), above the bound"
            f" {above.mean():.2%}"
        )
        print(f"{group} {model_name}, {len(pairs)} traces: {spread}")


def traces(published: int, draws: int):
    """Yields group, name, lengths and channels of each trace.

    The channels are None where the greedy packing of the model gives them.

    Raises:
        SystemExit: There are fewer published traces than asked for.
    """
    files = sorted((SHARED / "golden" / "neupims" / "traces").glob("share-gpt2-bs512-*.csv"))[
        :published
    ]
    if len(files) < published:
        raise SystemExit(
            f"{published} published traces expected in {SHARED}, {len(files)} found: set"
            " GGEM_SHARED"
        )
    for file in files:
        batch = read_trace(file)
        yield (
            ("published-clb" if "-clb-" in file.name else "published-rr"),
            file.stem,
            batch.seq_lens,
            batch.channels,
        )
    for name in LENGTHS:
        rng = np.random.default_rng(0)
        for draw in range(draws):
            yield name, f"{name}-{draw}", draw_lengths(name, rng), None


def draw_lengths(name: str, rng: np.random.Generator) -> np.ndarray:
    """Returns the lengths of `REQUESTS` requests of a serving batch, in tokens, int32."""
    pairs = pairs_of(name)
    chosen = pairs[rng.integers(0, len(pairs), REQUESTS)]
    return np.clip(chosen[:, 0] + np.floor(rng.random(REQUESTS) * chosen[:, 1]), 1, LONGEST).astype(
        np.int32
    )


@cache
def pairs_of(name: str) -> np.ndarray:
    """Returns input and output tokens `(n, 2)` of the requests that have any output."""
    with open(SHARED / "data" / "llm-traces" / LENGTHS[name], newline="") as file:
        rows = [
            (int(row["input_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(file)
        ]
    return np.array([row for row in rows if row[1] > 0])


def improve(model_name: str, lengths, channels, options: argparse.Namespace, name: str) -> dict:
    """Returns the row of a batch: its published schedule, the best one found, and the bound.

    Args:
        model_name: Name of the model.
        lengths: Length of each request, in tokens.
        channels: Channel of each request in the published schedule. None takes the greedy packing.
        options: Flags of the search, and the folder of the traces.
        name: Name of the batch, for its traces.
    """
    hardware, model, parallel = Hardware(), load_model(model_name), load_parallel(model_name)
    if channels is None:
        channels = np.asarray(
            pack_longest_first(
                estimate_cycles(hardware, model, jnp.asarray(lengths), parallel), CHANNELS
            )
        )
    problem = make_problem(hardware, model, parallel, lengths)
    choices = Choices(CHANNELS, realisable=True, sub_batches=(2,))
    published = make_genome(choices, channels, halves(channels, CHANNELS))
    known = {"published": published} | baselines(choices, problem)
    starts = stack(known)
    costs = dict(zip(known, costs_of(choices, problem, starts).tolist(), strict=True))
    done = search_best(choices, problem, starts, options)
    first = int(np.argmin(done.cost.objective))
    best = float(done.cost.objective[first])
    bound = float(lower_bound(choices, problem))
    alone = Choices(CHANNELS, realisable=True, sub_batches=(1,))
    one_batch = float(costs_of(alone, problem, starts).min())
    if options.traces:
        options.traces.mkdir(parents=True, exist_ok=True)
        batch = decision_batch(
            lengths, decide(choices, jax.tree.map(lambda leaf: leaf[first], done.genome))
        )
        export_trace(options.traces / f"{name}-{model_name}.csv", batch)
        export_trace(
            options.traces / f"{name}-{model_name}-published.csv", make_batch(lengths, channels)
        )
    before, simple = (
        costs["published"],
        min(cost for key, cost in costs.items() if key != "published"),
    )
    return {
        "requests": len(lengths),
        "evaluations": done.evaluations * options.seeds,
        "published_cycles": before,
        "best_heuristic_cycles": simple,
        "best_cycles": best,
        "bound_cycles": bound,
        "gain": 1 - best / before,
        "heuristic_gain": 1 - simple / before,
        "gap": gap(best, bound),
        "published_gap": gap(before, bound),
        "one_batch_gain": 1 - min(one_batch, best) / before,
    }


def search_best(choices: Choices, problem: Problem, starts, options: argparse.Namespace) -> Found:
    """Returns the outcome of an evolution for each seed, from the given starts."""
    budget = {"budget": options.budget, "population": options.population, "seeds": options.seeds}
    return search(
        "evolution", Layer(choices), choices, problem, jax.random.key(0), starts=starts, **budget
    )


def stack(genomes: dict):
    """Returns genomes as one tree of arrays with a leading axis."""
    return jax.tree.map(lambda *parts: jnp.stack(parts), *genomes.values())


@partial(jax.jit, static_argnums=0)
def costs_of(choices: Choices, problem: Problem, genomes):
    """Returns the predicted cycles of a layer for each of the stacked genomes, `(n,)`."""
    return jax.vmap(lambda genome: Layer(choices)(problem, decide(choices, genome)).objective)(
        genomes
    )


def small_cases(options: argparse.Namespace) -> None:
    """Appends a row for each size: how many of its cases each strategy and heuristic solves."""
    for index, (points, (channels, requests)) in enumerate(POINTS.items()):
        choices = Choices(channels, sub_batches=(2,))
        cases = options.small // len(POINTS) + (index < options.small % len(POINTS))
        reached: dict[str, list[bool]] = {}
        excess: dict[str, list[float]] = {}
        for case in range(cases):
            problem = small_case(np.random.default_rng([points, case]), channels, requests)
            proof = exhaustive(Layer(choices), choices, problem)
            known = baselines(choices, problem)
            starts = stack(known)
            costs = dict(zip(known, costs_of(choices, problem, starts).tolist(), strict=True))
            for strategy in STRATEGIES:
                budget = {"budget": points // 10, "population": SMALL_POPULATION}
                done = search(
                    strategy,
                    Layer(choices),
                    choices,
                    problem,
                    jax.random.key(case),
                    starts=starts,
                    **budget,
                )
                costs[strategy] = float(done.cost.objective[0])
            for name, cost in costs.items():
                reached.setdefault(name, []).append(cost <= proof.cost * (1 + REACHED))
                excess.setdefault(name, []).append(gap(cost, proof.cost))
        for name in reached:
            row = {
                "points": points,
                "channels": channels,
                "requests": requests,
                "cases": cases,
                "name": name,
            }
            row |= {
                "evaluations": (
                    points // 10 // SMALL_POPULATION * SMALL_POPULATION if name in STRATEGIES else 1
                )
            }
            row |= {
                "reached": f"{np.mean(reached[name]):.4f}",
                "mean_excess": f"{np.mean(excess[name]):.3g}",
                "most_excess": f"{np.max(excess[name]):.3g}",
            }
            append("neupims_search_small", machine() | row, options.results)


def speeds(options: argparse.Namespace) -> None:
    """Appends a row for each strategy: the CPU time of a schedule, the least of three searches."""
    lengths = draw_lengths("share-gpt", np.random.default_rng(0))
    problem = make_problem(Hardware(), load_model("gpt3-7b"), load_parallel("gpt3-7b"), lengths)
    budget = {"budget": options.budget, "population": options.population, "seeds": options.seeds}
    for kind, choices in SPEED_CHOICES.items():
        starts = stack(baselines(choices, problem))
        for strategy in STRATEGIES:
            run = partial(search, strategy, Layer(choices), choices, problem, starts=starts)
            seconds = []
            for seed in (0, 0, 1, 2):  # the first one compiles
                began = time.process_time()
                done = jax.block_until_ready(run(jax.random.key(seed), **budget))
                seconds.append(time.process_time() - began)
            row = {
                "choices": kind,
                "strategy": strategy,
                "requests": len(lengths),
                "population": options.population,
                "seeds": options.seeds,
                "microseconds": f"{min(seconds[1:]) / done.evaluations / options.seeds * 1e6:.2f}",
            }
            append("neupims_search_speed", machine() | row, options.results)


def small_case(rng: np.random.Generator, channels: int, requests: int) -> Problem:
    """Returns a random problem of a few requests on a machine of a few channels.

    The model is so narrow and the requests are so long that PIM and the NPU take about as long.
    """
    width = int(rng.choice([512, 1024, 2048]))
    model = Decoder(
        layers=1, width=width, heads=width // 128, kv_heads=width // 128, mlp_width=4 * width
    )
    lengths = np.clip(rng.lognormal(7, 1, requests), 16, 8192).astype(np.int32)
    return make_problem(
        replace(Hardware(), "hbm.num_channels", channels), model, Parallel(1, 1), lengths
    )


if __name__ == "__main__":
    main()
