"""Goodput as a metric of designs: each serves a trace of requests at the highest rate it bears."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neupims.exploration.evaluator import Measure
from neupims.exploration.points import Objective
from neupims.exploration.space import SETTINGS
from neupims.exploration.workloads import Workload
from neupims.machine.hardware import Hardware
from neupims.machine.record import cut, replace_all
from neupims.machine.systems import Fidelity, System
from neupims.machine.workload import Parallel
from neupims.serving.goodput import find_goodputs
from neupims.serving.objectives import Tail, parse_tails
from neupims.serving.requests import Arrivals, read_arrivals, stretch
from neupims.serving.server import Server, assemble_server
from neupims.serving.tables import Interleaving, Setting

NAME = "goodput"
ZERO = "a request exceeds its memory, or the limits hold at no rate"
SERVED_POINTS = 256  # designs, unless another number is given: each serves the trace ten times
SERVED_CHUNK = 64  # designs of a file, or of a generation


@dataclass(frozen=True)
class ServedTrace:
    """The requests that each design serves for its goodput.

    Arrivals are stretched to each rate, and drawn (Poisson) where the trace has none.
    """

    trace: str | Path | Arrivals  # with input and output tokens, as for `read_arrivals`
    batch: int = 256  # the most requests that are served at once
    first: int | None = None  # the number of requests from the beginning of the trace; None: all


def split_goodput(
    objectives: Sequence[Objective],
) -> tuple[tuple[Objective, ...], tuple[Tail, ...]]:
    """Returns the objectives with `goodput` for `goodput@LIMITS`, and these limits.

    Args:
        objectives: Objectives, of which one may be named like "goodput@ttft_p99<2s,tpot_p99<100ms".

    Raises:
        ValueError: Limits are missing or have another form, goodput is to be minimised, or there
            are two goodputs.
    """
    found: list[Objective] = []
    tails: tuple[Tail, ...] = ()
    for each in objectives:
        name, at, limits = each.name.partition("@")
        if name != NAME:
            found.append(each)
            continue
        if tails:
            raise ValueError("an exploration has one goodput: give all limits behind one goodput@")
        if not at or not each.largest:
            raise ValueError(
                "goodput is goodput@LIMITS:max, such as goodput@ttft_p99<2s,tpot_p99<100ms:max, not"
                f" {str(each)[:80]!r}"
            )
        tails = parse_tails(limits)
        found.append(Objective(NAME, True))
    return tuple(found), tails


def read_served(served: ServedTrace, seed: int = 0) -> Arrivals:
    """Returns the requests that are served, with arrivals.

    Args:
        served: The requests.
        seed: Seed of random arrivals and lengths.

    Raises:
        ValueError: The trace is empty or damaged, or all requests arrive at one instant.
        OSError: A file cannot be read.
    """
    if not isinstance(served, ServedTrace):
        raise ValueError(f"serve must be a ServedTrace of the requests, not {cut(served)}")
    rate = None if isinstance(served.trace, Arrivals) else 1.0  # those that are read are as read
    requests = read_arrivals(served.trace, rate=rate, first=served.first, seed=seed)
    stretch(requests, 1.0)
    return requests


def measure_goodput(
    workloads: Sequence[Workload],
    hardware: Hardware,
    requests: Arrivals,
    tails: tuple[Tail, ...],
    knobs: Sequence[str],
    *,
    system: System,
    sub_batches: int,
    fidelity: Fidelity,
    batch: int = 256,
) -> Measure:
    """Returns the metric "goodput", requests a second, of each model on each design.

    Two sub-batches mean that they are interleaved in every iteration. Prompts are computed whole.

    Args:
        workloads: Their models are served, spread as they say; their batches do not matter.
        hardware: Values of all fields that are not knobs.
        requests: The requests that are served, not all at one instant.
        tails: The limits on percentiles.
        knobs: Names of the knobs.
        system: The system of all designs.
        sub_batches: 1 or 2, unless a knob.
        fidelity: "simulator" or "intended".
        batch: The most requests at once.

    Raises:
        ValueError: A model is spread over a pipeline, or `parallel.pp` is a knob.
    """
    if "parallel.pp" in knobs:
        raise ValueError("a pipeline is not served yet: goodput cannot have the knob parallel.pp")

    def server(machine: Hardware, workload: Workload, settings: dict[str, float]) -> Server:
        shares = {
            name: int(settings.get(f"parallel.{name}", value))
            for name, value in vars(workload.parallel).items()
        }
        halves = settings.get("sub_batches", sub_batches)
        interleaving: Interleaving = "on" if halves == 2 else "off"
        setting = Setting(workload.model, Parallel(**shares), system, fidelity, interleaving)
        return assemble_server(machine, setting, batch=batch)

    for each in workloads:
        server(hardware, each, {})

    def compute(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = np.zeros((len(next(iter(columns.values()))), len(workloads)))
        machines = _machines(hardware, columns)
        for settings, rows in _groups(columns):
            known: dict[Any, np.ndarray] = {}
            for place, workload in enumerate(workloads):
                key = workload.model, workload.parallel
                if key not in known:
                    chosen = [machines[row] for row in rows]
                    serving = server(chosen[0], workload, settings)
                    known[key] = find_goodputs(serving, chosen, requests, tails)
                found[rows, place] = known[key]
        return {NAME: found}

    described = {
        "trace": requests.name,
        "requests": _digest(requests),
        "limits": list(map(str, tails)),
        "batch": batch,
    }
    return Measure((NAME,), compute, len(workloads), described, ZERO)


def _machines(hardware: Hardware, columns: dict[str, np.ndarray]) -> list[Hardware]:
    """The machine of each design."""
    fields = {name: column for name, column in columns.items() if name not in SETTINGS}
    rows = range(len(next(iter(columns.values()))))
    return [
        replace_all(hardware, {name: float(column[row]) for name, column in fields.items()})
        for row in rows
    ]


def _groups(columns: dict[str, np.ndarray]) -> Iterator[tuple[dict[str, float], np.ndarray]]:
    """The designs that one program serves: those with equal settings, and their rows."""
    names = [name for name in columns if name in SETTINGS]
    count = len(next(iter(columns.values())))
    table = np.stack([columns[name] for name in names], axis=1) if names else np.zeros((count, 0))
    for values in np.unique(table, axis=0):
        rows = np.flatnonzero((table == values).all(axis=1))
        yield dict(zip(names, values.tolist(), strict=True)), rows


def _digest(requests: Arrivals) -> str:
    digest = hashlib.sha256()
    for each in (requests.nanoseconds, requests.inputs, requests.outputs):
        digest.update(np.asarray(each, np.int64).tobytes())
    return digest.hexdigest()
