"""Hardware and serving policy searched together, beside the published machine.

    python -m eval.studies.codesign

Of the machines of a grid that are no larger and need no more power than the published one, those
with the fastest decode step serve a trace with every policy. What is best there is then measured on
traces that no choice has seen. It writes a page and all numbers.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from eval.statistics import Interval, mean
from eval.studies.retrieval import describe_machine
from eval.tables import format_interval, make_table
from ggem_jax.files.atomic import write_text
from ggem_jax.files.pages import render_page
from neupims import Hardware
from neupims.exploration.evaluation import make_evaluate
from neupims.exploration.workloads import make_workloads
from neupims.machine.case import select_model
from neupims.machine.record import replace_all
from neupims.machine.systems import FIDELITIES, Fidelity
from neupims.serving.goodput import find_goodputs
from neupims.serving.objectives import Tail, parse_tails
from neupims.serving.policy import PLACEMENTS
from neupims.serving.requests import Arrivals, read_arrivals
from neupims.serving.server import Server, assemble_server
from neupims.serving.tables import Interleaving, Setting
from train.cli import Refused, one_sentence, parse

ROOT = Path(__file__).parent.parent.parent
TEMPLATE = Path(__file__).parent / "templates" / "codesign.md"

# Knobs that cost area or power. Timings of the memory are technology, and stay as they are.
GRID = {
    "hbm.num_channels": (16, 20, 24, 28, 32, 36, 40, 48),
    "npu.num_arrays": (2, 4, 6, 8, 10, 12, 14, 16),
    "npu.array_width": (64, 128, 256),
    "npu.array_height": (64, 128, 256),
    "pim.macs_per_bank": (8, 16, 32),
}
TRACES = ("sharegpt", "alpaca")
SIZES = ("area_mm2", "peak_power_watts")  # of which a machine has at most that of the published one
INTERLEAVED: tuple[Interleaving, ...] = ("on", "off")


class Policy(NamedTuple):
    """How a machine serves."""

    interleaving: Interleaving
    placement: str  # a name of PLACEMENTS


PUBLISHED = Policy("on", "greedy")
POLICIES = tuple(Policy(*each) for each in product(INTERLEAVED, PLACEMENTS))


@dataclass(frozen=True)
class Codesign:
    """Hardware and serving policy searched together, beside the published machine."""

    model: str = "gpt3-7b"  # served, spread over devices as published
    limits: str = "ttft_p99<1s,tpot_p99<50ms"  # of the goodput
    requests: int = 100  # of each trace
    served: int = 64  # machines that serve, beside the published one
    seeds: int = 5  # traces of each kind that the result is measured on
    fidelities: tuple[Fidelity, ...] = FIDELITIES  # in which the machines are timed
    out: Path = ROOT / "docs" / "accelerator" / "codesign.md"  # the page
    # all numbers
    results: Path = ROOT / "benchmarks" / "results" / "codesign.json"


class Contender(NamedTuple):
    """A machine with a policy."""

    name: str
    knobs: dict[str, float]  # of the machine
    policy: Policy
    size: dict[str, float]  # area and peak power of the machine
    searched: float  # goodput on the trace of the search, requests a second


def main(argv: list[str] | None = None) -> None:
    """Runs the study."""
    with one_sentence("eval.studies.codesign"):
        study = parse(Codesign, argv, "eval.studies.codesign", default=Codesign())
        tails = check_study(study)
        began = time.perf_counter()
        found: dict[str, Any] = {each: compare(study, each, tails) for each in study.fidelities}
        about = describe_machine() | {"seconds": round(time.perf_counter() - began)}
        settings = asdict(study)
        del settings["out"], settings["results"]
        everything = {"machine": about, "study": settings, "grid": GRID, "found": found}
        write_text(
            study.results,
            json.dumps(
                everything,
                indent=1,
            )
            + "\n",
        )
        write_text(study.out, "".join(make_page(study, found, about)))
        for fidelity, part in found.items():
            print(f"{fidelity}\n{make_contender_table(part)}")


def check_study(study: Codesign) -> tuple[Tail, ...]:
    """Returns the limits of a study, or raises for settings that no study can be made of.

    Args:
        study: Settings of the study.

    Raises:
        Refused: A number is too small, a fidelity or the form of a limit is unknown, or a folder is
            missing.
    """
    for name, least in (("seeds", 2), ("requests", 2), ("served", 1)):
        if getattr(study, name) < least:
            raise Refused(f"--{name} must be at least {least}, it is {getattr(study, name)}")
    if not study.fidelities or set(study.fidelities) - set(FIDELITIES):
        raise Refused(f"--fidelities must be among {', '.join(FIDELITIES)}")
    for path in (study.out, study.results):
        if not path.parent.is_dir():
            raise Refused(f"there is no folder {path.parent} to write {path.name} to")
    try:
        return parse_tails(study.limits)
    except ValueError as fault:
        raise Refused(f"--limits: {fault}") from None


def compare(study: Codesign, fidelity: Fidelity, tails: tuple[Tail, ...]) -> dict[str, Any]:
    """Returns what the search chose, and what it is worth on other traces, as JSON values.

    Args:
        study: Settings of the study.
        fidelity: How the machines are timed.
        tails: The limits of the goodput.

    Raises:
        ValueError: The model is unknown or cannot be served.
    """
    machines, sizes, grid, allowed = list_machines(study, fidelity)
    trace = draw_trace("sharegpt", study.requests, 0)
    table = np.array(
        [
            find_goodputs(make_server(study, fidelity, policy), machines, trace, tails)
            for policy in POLICIES
        ]
    )
    contenders = choose(table, [knobs_of(each) for each in machines], sizes)
    report(f"{fidelity}: {table.size} of machine and policy served; best {contenders[-1]}")
    measured: dict[str, list[list[float]]] = {}
    for kind in TRACES:
        measured[kind] = []
        for seed in range(1, study.seeds + 1):
            requests = draw_trace(kind, study.requests, seed)
            measured[kind].append(
                [_measure(study, fidelity, each, requests, tails) for each in contenders]
            )
            report(f"{fidelity}: {kind}, seed {seed}: {np.round(measured[kind][-1], 2)}")
            if not measured[kind][-1][0]:
                raise Refused(
                    f"the published machine meets {study.limits} at no rate on {requests.name},"
                    f" seed {seed}: give looser --limits"
                )
    return {
        "grid": grid,
        "allowed": allowed,
        "served": len(machines),
        "contenders": [each._asdict() for each in contenders],
        "goodputs": measured,
        "ratios": {kind: ratios(np.array(values)) for kind, values in measured.items()},
    }


class Machines(NamedTuple):
    """The machines that serve."""

    hardware: list[Hardware]  # the published one first
    sizes: list[dict[str, float]]  # area and peak power of each
    grid: int  # machines of the grid
    allowed: int  # of these, those that are no larger than the published one


def list_machines(study: Codesign, fidelity: Fidelity) -> Machines:
    """Returns the published machine, and the fastest ones of the grid that are allowed.

    A machine is allowed if it can exist, and has at most the area and the peak power of the
    published one. The fastest ones have the highest throughput of one decode step, with one or two
    sub-batches, whichever is better.

    Args:
        study: Settings of the study.
        fidelity: How the machines are timed.
    """
    published = np.array(list(knobs_of(Hardware()).values()))
    grid = np.array(list(product(*GRID.values())), np.float64)
    grid = grid[(grid != published).any(axis=1)]
    found = evaluate_step(study, fidelity, np.concatenate([published[None], grid]))
    sizes = np.stack([found[name] for name in SIZES], axis=1)
    allowed = (sizes <= sizes[0] * (1 + 1e-6)).all(axis=1) & (found["flagged"] == 0)
    speed = np.where(allowed, found["tokens_per_second"], -np.inf)[1:]
    order = np.argsort(-speed, kind="stable")[: min(study.served, int(allowed[1:].sum()))]
    machines = [
        replace_all(Hardware(), dict(zip(GRID, values, strict=True)))
        for values in [published, *grid[order]]
    ]
    rows = [0, *(1 + order).tolist()]
    kept = [{name: float(found[name][row]) for name in SIZES} for row in rows]
    return Machines(machines, kept, len(grid) + 1, int(allowed.sum()))


def evaluate_step(
    study: Codesign, fidelity: Fidelity, values: Float[np.ndarray, "n knobs"]
) -> dict[str, np.ndarray]:
    """Returns area, peak power, throughput, and the code of what is impossible, (n,) each.

    The step decodes 256 requests with ShareGPT's lengths.

    Args:
        study: Settings of the study.
        fidelity: How the machines are timed.
        values: Those of the knobs of `GRID`.
    """
    workloads = make_workloads(study.model, "sharegpt:256", dealt=True)
    most = max(GRID["hbm.num_channels"])
    columns = {name: jnp.asarray(values[:, place]) for place, name in enumerate(GRID)}
    one, two = (
        jax.jit(
            make_evaluate(workloads, fidelity=fidelity, most_channels=most, sub_batches=halves)
        )(columns)
        for halves in (1, 2)
    )
    speed = np.maximum(one["tokens_per_second"], two["tokens_per_second"])
    found = {name: np.asarray(two[name])[:, 0] for name in (*SIZES, "flagged")}
    return found | {"tokens_per_second": np.asarray(speed)[:, 0]}


def knobs_of(hardware: Hardware) -> dict[str, float]:
    """Returns the values of the knobs of a machine.

    Args:
        hardware: The machine.
    """
    found = {}
    for name in GRID:
        part, field = name.split(".")
        found[name] = float(getattr(getattr(hardware, part), field))
    return found


def make_server(study: Codesign, fidelity: Fidelity, policy: Policy) -> Server:
    """Returns what serves the model with a policy.

    Args:
        study: Settings of the study.
        fidelity: How the machines are timed.
        policy: The policy.
    """
    _, model, parallel = select_model(study.model)
    setting = Setting(model, parallel, "neupims", fidelity, policy.interleaving)
    return assemble_server(Hardware(), setting, placement=PLACEMENTS[policy.placement])


def draw_trace(kind: str, requests: int, seed: int) -> Arrivals:
    """Returns requests with lengths of a kind, and Poisson arrivals.

    Args:
        kind: One of `TRACES`.
        requests: Their number.
        seed: Seed of lengths and arrivals.
    """
    return read_arrivals(f"{kind}:{requests}", rate=1.0, seed=seed)


def choose(
    table: np.ndarray, knobs: list[dict[str, float]], sizes: list[dict[str, float]]
) -> list[Contender]:
    """Returns the published machine, the best policy on it, the best machine, and the best of all.

    The best machine has the published policy. Of equally good ones the first counts.

    Args:
        table: Goodputs, (policies, machines); the first machine is the published one.
        knobs: Those of each machine.
        sizes: Area and peak power of each machine.
    """
    published = POLICIES.index(PUBLISHED)
    policy, machine = int(table[:, 0].argmax()), int(table[published].argmax())
    both = np.unravel_index(table.argmax(), table.shape)
    chosen = {
        "published": (published, 0),
        "policy searched": (policy, 0),
        "hardware searched": (published, machine),
        "both searched": (int(both[0]), int(both[1])),
    }
    return [
        Contender(name, knobs[place], POLICIES[row], sizes[place], float(table[row, place]))
        for name, (row, place) in chosen.items()
    ]


def _measure(
    study: Codesign,
    fidelity: Fidelity,
    contender: Contender,
    requests: Arrivals,
    tails: tuple[Tail, ...],
) -> float:
    server = make_server(study, fidelity, contender.policy)
    machine = replace_all(Hardware(), contender.knobs)
    return float(find_goodputs(server, [machine], requests, tails)[0])


def ratios(goodputs: np.ndarray) -> list[dict[str, float]]:
    """Returns the ratio of each contender to the first one, with its interval over seeds.

    Args:
        goodputs: (seeds, contenders).
    """
    return [asdict(mean(column)) for column in (goodputs / goodputs[:, :1]).T]


def make_contender_table(part: dict[str, Any]) -> str:
    """Returns the table of contenders in Markdown.

    Args:
        part: What `compare` returned.
    """
    names = [name.rpartition(".")[2].replace("_", " ") for name in GRID]
    columns = ["", *names, "interleaving", "placement", "area, mm2", "peak power, W"]
    columns += ["searched, requests/s", *(f"{kind}: times published" for kind in TRACES)]
    rows = []
    for place, each in enumerate(part["contenders"]):
        size = each["size"]
        rows.append(
            [
                each["name"],
                *(f"{value:g}" for value in each["knobs"].values()),
                *each["policy"],
                f"{size['area_mm2']:,.0f}",
                f"{size['peak_power_watts']:,.0f}",
                f"{each['searched']:.2f}",
                *(
                    format_interval(Interval(**part["ratios"][kind][place]), percent=False)
                    for kind in TRACES
                ),
            ]
        )
    return make_table(columns, rows)


def make_page(study: Codesign, found: dict[str, Any], about: dict[str, Any]) -> Iterator[str]:
    """Returns the pieces of the page.

    Args:
        study: Settings of the study.
        found: What `compare` returned, by fidelity.
        about: The machine that ran the study.
    """
    return render_page(
        TEMPLATE,
        study=study,
        machine=about,
        grid=GRID,
        policies=len(POLICIES),
        found=found,
        tables={name: make_contender_table(part) for name, part in found.items()},
    )


def report(line: str) -> None:
    """Prints a line of progress on standard error.

    Args:
        line: The line.
    """
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
