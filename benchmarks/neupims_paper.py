"""Compares the published figures of NeuPIMs with the model's, with and without simulator quirks.

    python -m benchmarks.neupims_paper

Published: Heo et al., "NeuPIMs", ASPLOS 2024, arXiv:2403.00579, abstract and section 8. Batches are
drawn as the public trace generator draws them (trace-generator/get_distributions.py of the
simulator), from its lengths of ShareGPT and Alpaca (GGEM_SHARED, by default ../shared), with a
fixed seed; one batch serves all models. A speed-up is a ratio of tokens per second. `neupims`
without a number is the better of one and two sub-batches for each batch. Rows go to
benchmarks/results/neupims_paper.csv: mean, least and greatest over the points (model, dataset,
batch size) of the row, each point the mean of its draws.
"""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import append, machine
from neupims.machine.config import load_model, load_parallel
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.workload import Batch, halves
from neupims.scheduling.policies import GWRITE_ESTIMATE, TILE_ESTIMATE
from neupims.simulator_runs import case_of, pad_case, read_runs
from neupims.timing.capacity import find_overflow
from neupims.timing.iteration import Iteration, simulate
from neupims.timing.stages import NPU_ATTENTION, operations
from neupims.validation import KINDS, predict

DATASETS = {"sharegpt": "sharegpt_lengths.csv", "alpaca": "alpaca_lengths.csv"}
MODELS = ("gpt3-7b", "gpt3-13b", "gpt3-30b", "gpt3-175b")
BATCHES = (64, 128, 256, 384, 512)
CHANNELS, LONGEST = 32, 2048
# tokens that all requests generate before finished ones are replaced, as in the generator
STEP_TOKENS = 10
SETTLING_STEPS = 200
# Systems of the model -> system, sub-batches, row buffers, channels of the requests.
SYSTEMS = {
    "neupims-1": ("neupims", 1, 2, "greedy"),
    "neupims-2": ("neupims", 2, 2, "greedy"),
    "neupims-1-rr": ("neupims", 1, 2, "round robin"),
    "one row buffer": ("neupims", 1, 1, "round robin"),
    "npu-pim": ("npu-pim", 1, 1, "round robin"),
    "npu-only": ("npu-only", 1, 2, "greedy"),
    "gpu": ("gpu", 1, 2, "greedy"),
}
# Published averages, abstract and section 8.2. Of the GPU and the NPU, the paper only says that
# they differ marginally.
SPEED_UPS = {
    ("neupims", "npu-pim"): "1.6 (1.13 to 3)",
    ("neupims", "npu-only"): "2.4",
    ("neupims", "gpu"): "3",
    ("npu-pim", "npu-only"): "1.5",
    ("npu-only", "gpu"): "marginal",
    ("neupims-1", "npu-pim"): "",
    ("neupims-2", "npu-pim"): "",
}
ATTENTION = [operation.name for operation in operations("npu-only", 1)].index(NPU_ATTENTION.name)
STEPS = {  # of the ablation, figure 13
    "dual row buffers": ("neupims-1-rr", "npu-pim", "1.697"),
    "greedy packing": ("neupims-1", "neupims-1-rr", "always helps"),
    "two sub-batches": ("neupims-2", "neupims-1", "best from batch 256 on"),
}


class Draws(NamedTuple):
    """Batches of all datasets, sizes and draws, `(datasets, sizes, draws, requests)`.

    Smaller batches are padded with requests of length 0.
    """

    greedy: Batch
    round_robin: Batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument(
        "--measured",
        action="store_true",
        help="only the simulator's own runs, beside the model on their traces",
    )
    options = parser.parse_args()
    drawn = None if options.measured else draw(options.draws)
    said = machine()

    def write(
        figure: str, variant: str, dataset: str, model: str, batch, values, published: str = ""
    ) -> None:
        row = {
            "figure": figure,
            "variant": variant,
            "dataset": dataset,
            "model": model,
            "batch": batch,
        }
        spread = {
            "mean": f"{values.mean():.3f}",
            "least": f"{values.min():.3f}",
            "greatest": f"{values.max():.3f}",
        }
        append(
            "neupims_paper",
            said
            | row
            | {"draws": 1 if options.measured else options.draws}
            | spread
            | {"published": published},
        )

    if drawn is None:
        for figure, ratios in compare_speed_ups().items():
            for variant, values in zip(
                ("measured by the simulator", "simulator, the same traces"),
                np.transpose(ratios),
                strict=True,
            ):
                write(
                    figure,
                    variant,
                    "all",
                    "all",
                    "all",
                    values,
                    SPEED_UPS[tuple(figure.split(" over "))],
                )
            write(
                f"{figure}, error in percent",
                "simulator, the same traces",
                "all",
                "all",
                "all",
                np.array([100 * abs(p / m - 1) for m, p in ratios]),
            )
        for system, pair in compare_schedules().items():
            for variant, gain in zip(
                ("measured by the simulator", "simulator, the same traces"), pair, strict=True
            ):
                write(
                    f"gain of greedy packing over round robin, {system}, %",
                    variant,
                    "sharegpt",
                    "gpt3-7b",
                    256,
                    np.array([100 * gain]),
                )
        for system, differences in compare_utilizations().items():
            for unit, values in differences.items():
                write(
                    f"{unit} utilisation, model less simulator, points",
                    system,
                    "all",
                    "all",
                    "all",
                    np.array(values),
                )
                write(
                    f"{unit} utilisation, absolute difference, points",
                    system,
                    "all",
                    "all",
                    "all",
                    np.abs(values),
                )
        return
    lengths = np.asarray(drawn.greedy.seq_lens)
    for index, dataset in enumerate(DATASETS):
        write(
            "mean length",
            "",
            dataset,
            "",
            "all",
            lengths[index].sum(-1) / (lengths[index] > 0).sum(-1),
        )
    results = {fidelity: run(drawn, fidelity) for fidelity in ("simulator", "intended")}
    speeds = {
        name: {system: np.asarray(one.tokens_per_second) for system, one in result.items()}
        for name, result in results.items()
    }

    for variant, of in variants(speeds, results).items():
        for (fast, slow), published in SPEED_UPS.items():
            figure, ratio = f"{fast} over {slow}", (of[fast] / of[slow]).mean(axis=-1)
            write(figure, variant, "all", "all", "all", ratio, published)
            for index, model in enumerate(MODELS):
                write(figure, variant, "all", model, "all", ratio[index])
            for index, dataset in enumerate(DATASETS):
                for place, size in enumerate(BATCHES):
                    write(figure, variant, dataset, "all", size, ratio[:, index, place])
        if variant.startswith("npu-only"):
            continue  # the ablation has no such system
        for step, (after, before, published) in STEPS.items():
            ratio = (of[after] / of[before])[
                MODELS.index("gpt3-7b"), list(DATASETS).index("sharegpt")
            ].mean(axis=-1)
            write(f"ablation: {step}", variant, "sharegpt", "gpt3-7b", "all", ratio, published)
            for place, size in enumerate(BATCHES):
                write(
                    f"ablation: {step}",
                    variant,
                    "sharegpt",
                    "gpt3-7b",
                    size,
                    ratio[place : place + 1],
                )

    for arrays in (1, 2, 4, 8):
        figure = f"neupims over npu-only with attention on {arrays} of its 8 arrays"
        write(
            figure,
            "simulator",
            "all",
            "all",
            "all",
            (speeds["simulator"]["neupims"] / npu_only_speed(results, arrays)).mean(axis=-1),
            "2.4",
        )

    point = (MODELS.index("gpt3-30b"), list(DATASETS).index("sharegpt"), BATCHES.index(256))
    published = {
        ("npu", "npu-pim"): "28.0",
        ("npu", "neupims-2"): "64.9",
        ("pim", "npu-pim"): "17",
        ("pim", "neupims-2"): "26.4",
    }
    for fidelity, result in results.items():
        for system in ("npu-pim", "one row buffer", "neupims-1", "neupims-2", "npu-only"):
            for unit in ("npu", "pim", "bandwidth"):
                values = 100 * np.asarray(getattr(result[system], f"{unit}_utilization"))[point]
                write(
                    f"{unit} utilisation of {system}, %",
                    fidelity,
                    "sharegpt",
                    "gpt3-30b",
                    256,
                    values,
                    published.get((unit, system), ""),
                )
        spent = {system: memory_joules(one) for system, one in result.items()}
        better = np.where(
            speeds[fidelity]["neupims-2"] > speeds[fidelity]["neupims-1"],
            spent["neupims-2"],
            spent["neupims-1"],
        )
        joules = better / spent["npu-only"]
        watts = joules * speeds[fidelity]["neupims"] / speeds[fidelity]["npu-only"]
        write(
            "memory energy of neupims over npu-only",
            fidelity,
            "all",
            "all",
            "all",
            joules.mean(axis=-1),
            "0.75",
        )
        write(
            "memory power of neupims over npu-only",
            fidelity,
            "all",
            "all",
            "all",
            watts.mean(axis=-1),
            "1.8",
        )

    for model in MODELS:
        for place, size in enumerate(BATCHES):
            for index, dataset in enumerate(DATASETS):
                batches = [
                    jax.tree.map(lambda part, at=(index, place, one): part[at], drawn.greedy)
                    for one in range(options.draws)
                ]
                over = np.array(
                    [
                        bool(
                            find_overflow(
                                Hardware(), load_model(model), batch, load_parallel(model)
                            ).channel
                        )
                        for batch in batches
                    ]
                )
                if over.any():
                    write(
                        "share of batches whose fullest channel exceeds the memory",
                        "greedy",
                        dataset,
                        model,
                        size,
                        over,
                    )


def compare_speed_ups() -> dict[str, list[tuple[float, float]]]:
    """Returns measured and predicted speed-ups of each model, data set and batch size.

    The runs of GGEM_SHARED/golden/neupims must have both sides: NeuPIMs, the better of one and two
    sub-batches, on the trace of greedy packing; NPU + PIM on that of round robin with the same
    requests.
    """
    folder = Path(os.environ.get("GGEM_SHARED", "../shared")) / "golden" / "neupims"
    layers: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for run in read_runs(folder)[0]:
        if (
            run["kind"] != "e2e"
            or not run["trace"].startswith("gen-")
            or ("-rr-" in run["trace"]) != (run["system"] == "npu+pim")
        ):
            continue
        predicted = predict(case_of(run, folder), path="closed")["layer", "", "layer"]
        batch = run["trace"].replace("-rr-", "-clb-")
        layers.setdefault((run["model"], batch), {})[run["system"]] = (
            float(run["layer_cycles"]),
            predicted,
        )
    ratios: dict[str, list[tuple[float, float]]] = {}
    for of in layers.values():
        if not {"neupims_sbi", "neupims_nosbi"} <= set(of):
            continue
        best = [min(of["neupims_sbi"][which], of["neupims_nosbi"][which]) for which in (0, 1)]
        for slow, name in (("npu+pim", "npu-pim"), ("npu-only", "npu-only")):
            if slow in of:
                ratios.setdefault(f"neupims over {name}", []).append(
                    (of[slow][0] / best[0], of[slow][1] / best[1])
                )
    return ratios


def compare_schedules() -> dict[str, tuple[float, float]]:
    """Returns measured and predicted gains of greedy packing over round robin, by system.

    Both must have been run with the same requests.
    """
    folder = Path(os.environ.get("GGEM_SHARED", "../shared")) / "golden" / "neupims"
    layers: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for run in read_runs(folder)[0]:
        policy = next((name for name in ("clb", "rr") if f"-{name}-" in run["trace"]), None)
        if (
            run["kind"] == "e2e"
            and run["model"].lower() == "gpt3-7b"
            and policy
            and "-bs256-" in run["trace"]
            and "share-gpt" in run["trace"]
        ):
            predicted = predict(case_of(run, folder), path="closed")["layer", "", "layer"]
            layers.setdefault((run["system"], run["trace"].replace("-rr-", "-clb-")), {})[
                policy
            ] = float(run["layer_cycles"]), predicted
    gains = {}
    for (system, _), of in layers.items():
        if len(of) == 2:
            if system in gains:
                raise SystemExit(f"{system} has several pairs of traces: name which one is meant")
            (measured, predicted), (measured_before, predicted_before) = of["clb"], of["rr"]
            gains[system] = 1 - measured / measured_before, 1 - predicted / predicted_before
    return gains


def compare_utilizations() -> dict[str, dict[str, list[float]]]:
    """Returns predicted less measured utilisation of the layer, in percentage points.

    The result has all runs of whole models, by system and unit.
    """
    folder = Path(os.environ.get("GGEM_SHARED", "../shared")) / "golden" / "neupims"
    runs, listed = read_runs(folder)
    differences: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        if run["kind"] != "e2e":
            continue
        case = pad_case(case_of(run, folder))
        known = (case.hardware, case.model, case.batch, case.parallel)
        result = simulate(
            *known,
            system=case.system,
            sub_batches=case.sub_batches,
            most_channels=max(64, CHANNELS),
        )
        stages = {"neupims_sbi": "CD", "npu-only": ""}.get(run["system"], "ABE")
        layer = float(run["layer_cycles"])
        mine = [
            each
            for each in listed[run["run_id"]]
            if KINDS[each["op"]] in ("gemm", "attention")
            and (not stages or each["stage"] in stages)
        ]
        measured = {"npu": sum(float(each["compute_cycles"]) for each in mine) / layer}
        if stages:
            measured["pim"] = sum(float(run[f"pim_{stage}"]) for stage in stages) / layer
            measured["bandwidth"] = (
                sum(
                    float(run[f"bw_{stage}"]) / 100 * float(run[f"cyc_{stage}"]) for stage in stages
                )
                / layer
            )
        for unit, value in measured.items():
            difference = 100 * (float(getattr(result, f"{unit}_utilization")) - value)
            differences.setdefault(run["system"], {}).setdefault(unit, []).append(difference)
    return differences


def draw(draws: int) -> Draws:
    """Returns batches as the public generator draws them, each from its own stream of requests.

    A stream starts in its stationary state: a request is drawn in proportion to its output, at a
    uniform point of its generation. Then it runs for SETTLING_STEPS, so that the lists of the
    channels are those of the policy: a request stays on its channel until it ends.

    Args:
        draws: Batches of each data set and size.
    """
    folder = Path(os.environ.get("GGEM_SHARED", "../shared")) / "data" / "llm-traces"
    lists: dict[str, list[tuple]] = {"greedy": [], "round robin": []}
    for dataset, name in enumerate(DATASETS.values()):
        table = np.loadtxt(folder / name, delimiter=",", skiprows=1)
        table = table[table[:, 1] > 0].astype(np.int64)
        for size in BATCHES:
            for one in range(draws):
                lengths, channels = stream(table, size, np.random.default_rng((dataset, size, one)))
                for policy, (mine, places) in {
                    "greedy": (lengths, channels[:, 0]),
                    "round robin": (lengths, channels[:, 1]),
                }.items():
                    parts = mine, places, np.asarray(halves(places, CHANNELS))
                    lists[policy].append(
                        tuple(np.pad(part, (0, max(BATCHES) - size)) for part in parts)
                    )
    shape = (len(DATASETS), len(BATCHES), draws, max(BATCHES))

    def stack(each):
        return Batch(
            *(
                jnp.asarray(np.stack(part).reshape(shape), jnp.int32)
                for part in zip(*each, strict=True)
            )
        )

    return Draws(stack(lists["greedy"]), stack(lists["round robin"]))


def stream(table: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws the requests that are alive at one time.

    Args:
        table: Input and output tokens `(n, 2)` of the requests of a data set.
        size: Number of requests that are alive.
        rng: Source of the random numbers.

    Returns:
        Lengths `(size,)`, the oldest first, and channels `(size, 2)`, greedy and round robin.
    """
    first = table[rng.choice(len(table), size, p=table[:, 1] / table[:, 1].sum())]
    done = rng.integers(0, first[:, 1])
    oldest = np.argsort(-done, kind="stable")
    requests, done = first[oldest], done[oldest]
    channels, turn = place(requests[:, 0] + done, np.zeros(CHANNELS), 0)
    for _ in range(SETTLING_STEPS):
        done = done + STEP_TOKENS
        alive = done < requests[:, 1]
        requests, done, channels = requests[alive], done[alive], channels[alive]
        new = table[rng.integers(len(table), size=size - len(requests))]
        new = new[np.argsort(-new[:, 0], kind="stable")]
        loads = np.bincount(channels[:, 0], estimate(requests[:, 0] + done), minlength=CHANNELS)
        placed, turn = place(new[:, 0], loads, turn)
        requests, done, channels = (
            np.concatenate([requests, new]),
            np.concatenate([done, 0 * new[:, 0]]),
            np.concatenate([channels, placed]),
        )
    return np.clip(requests[:, 0] + done, 1, LONGEST), channels


def place(lengths: np.ndarray, loads: np.ndarray, turn: int) -> tuple[np.ndarray, int]:
    """Returns channels `(r, 2)` of new requests, and the channel whose turn is next.

    The first column has the least loaded channel (algorithm 2 of the paper), the second the next in
    turn.

    Args:
        lengths: Lengths `(r,)` of the requests, in tokens.
        loads: Estimated load of each channel, in memory cycles; it is changed in place.
        turn: Count of the requests that round robin has placed.
    """
    least = []
    for cost in estimate(lengths):
        least.append(int(loads.argmin()))
        loads[least[-1]] += cost
    return np.stack(
        [np.array(least, np.int64), (turn + np.arange(len(lengths))) % CHANNELS], axis=1
    ), turn + len(lengths)


def estimate(lengths: np.ndarray) -> np.ndarray:
    """Returns the generator's estimate of each request's time in its channel, in memory cycles.

    It is that of GPT3-7B on 4 devices (algorithm 1; it counts all heads).

    Args:
        lengths: Lengths of the requests, in tokens.
    """
    lengths = np.clip(lengths, 1, LONGEST)
    logit = GWRITE_ESTIMATE + TILE_ESTIMATE * np.ceil(lengths / 32)
    return 2 * logit + 32 * np.ceil(lengths / 512) * (GWRITE_ESTIMATE + 4 * TILE_ESTIMATE)


def run(drawn: Draws, fidelity: str) -> dict[str, Iteration]:
    """Returns the simulation of every system on every batch, by system.

    The leading axes of the results are models, datasets, sizes and draws.
    """
    models = jax.tree.map(
        lambda *values: jnp.array(values, jnp.float32), *(load_model(name) for name in MODELS)
    )
    parallels = jax.tree.map(
        lambda *values: jnp.array(values, jnp.float32), *(load_parallel(name) for name in MODELS)
    )
    results = {}
    for name, (system, sub_batches, row_buffers, policy) in SYSTEMS.items():
        hardware = jax.tree.map(float, replace(Hardware(), "pim.row_buffers", row_buffers))

        def one(model, parallel, batch, hardware=hardware, system=system, sub_batches=sub_batches):
            return simulate(
                hardware,
                model,
                batch,
                parallel,
                system=system,
                sub_batches=sub_batches,
                fidelity=fidelity,
                most_channels=CHANNELS,
            )

        for _ in range(3):
            one = jax.vmap(one, in_axes=(None, None, 0))
        batches = drawn.greedy if policy == "greedy" else drawn.round_robin
        results[name] = jax.device_get(
            jax.vmap(one, in_axes=(0, 0, None))(models, parallels, batches)
        )
    return results


def variants(speeds: dict, results: dict) -> dict[str, dict[str, np.ndarray]]:
    """Returns tokens per second of each system: as coded, without single quirks, and as intended.

    It adds the better NeuPIMs to `speeds`.

    Args:
        speeds: Fidelity -> system -> tokens per second `(models, datasets, sizes, draws)`.
        results: Fidelity -> system -> simulation, as `run` returns it.
    """
    for of in speeds.values():
        of["neupims"] = np.maximum(of["neupims-1"], of["neupims-2"])
    coded, ideal = speeds["simulator"], speeds["intended"]
    npu_only, other = results["simulator"]["npu-only"], results["intended"]["npu-only"]
    spread = (
        npu_only.layer_cycles - npu_only.op_cycles[..., ATTENTION] + other.op_cycles[..., ATTENTION]
    )
    stages = results["simulator"]["neupims-1"].stage_cycles
    same_npu = stages[..., 0] + stages[..., 4] + other.op_cycles[..., ATTENTION]
    as_fast = coded["npu-only"] * npu_only.layer_cycles
    return {
        "simulator": coded,
        "npu-pim without its front end": coded | {"npu-pim": coded["one row buffer"]},
        "npu-only attention spread over the arrays": coded | {"npu-only": as_fast / spread},
        "npu-only attention spread, and the NPU of neupims": coded
        | {"npu-only": as_fast / same_npu},
        "none of the three": coded
        | {"npu-pim": coded["one row buffer"], "npu-only": as_fast / same_npu},
        "intended": ideal,
    }


def npu_only_speed(results: dict, arrays: int) -> np.ndarray:
    """Returns tokens per second of the coded NPU-only system with attention on several arrays.

    Attention is not faster than in `intended` fidelity.

    Args:
        results: As in `variants`.
        arrays: Number of systolic arrays that share attention.
    """
    npu_only, other = results["simulator"]["npu-only"], results["intended"]["npu-only"]
    coded = npu_only.op_cycles[..., ATTENTION]
    faster = np.maximum(coded / arrays, other.op_cycles[..., ATTENTION])
    return (
        npu_only.tokens_per_second
        * npu_only.layer_cycles
        / (npu_only.layer_cycles - coded + faster)
    )


def memory_joules(one: Iteration) -> np.ndarray:
    """Returns the energy of the memory as the simulator counts it, in J, without the interface."""
    return np.asarray(
        one.energy.dram_array + one.energy.pim + one.energy.refresh + one.energy.background
    )


if __name__ == "__main__":
    main()
