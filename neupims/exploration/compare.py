"""Comparison of systems and machines on the same requests, and the best one by each objective."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neupims.exploration.evaluation import Schedule, make_evaluate
from neupims.exploration.explore import METRICS
from neupims.exploration.points import Objective, overall, parse_objectives
from neupims.exploration.workloads import Model, Trace, Workload, list_notes, make_workloads
from neupims.files import finite
from neupims.machine.case import select_system
from neupims.machine.hardware import Hardware
from neupims.machine.quantity import describe
from neupims.machine.record import INT32_MOST
from neupims.machine.systems import Fidelity
from neupims.machine.workload import Parallel

COMPARED = (
    "tokens_per_second:max,tokens_per_second_per_mm2:max,tokens_per_joule:max,"
    "iteration_seconds:min,power_watts:min,area_mm2:min"
)


@dataclass(frozen=True)
class Contender:
    """One system on one machine; metrics are geometric means over the workloads."""

    system: str  # as it was given
    hardware: str  # name or file of the machine, as it was given
    sub_batches: int  # halves of the batch
    metrics: dict[str, float]  # of `METRICS`, by name
    flagged: bool  # whether it is impossible, so that it wins nothing


@dataclass(frozen=True)
class Winner:
    """The best contenders by one objective."""

    objective: str  # NAME:max or NAME:min
    best: tuple[int, ...]  # places in `Comparison.contenders`; several where they are equal
    value: float  # of the metric
    lead: float | None  # over the next one, as a share of the next one; None where there is none


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`."""

    fidelity: Fidelity  # "simulator" or "intended"
    workloads: tuple[str, ...]  # names, MODEL/BATCH
    trace_notes: tuple[str, ...]  # what was assumed about the requests of a workload
    contenders: tuple[Contender, ...]  # each system on each machine, in the given order
    winners: tuple[Winner, ...]  # by objective, in the given order

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as `neupims explore --json` prints them; None is not finite."""
        return finite(asdict(self))


def compare(
    hardware: str | Path | Sequence[str | Path],
    models: Model | Sequence[Model],
    batches: Trace | Sequence[Trace],
    *,
    systems: str | Sequence[str] = "neupims",
    objectives: str | Sequence[Objective] = COMPARED,
    sub_batches: int | None = None,
    row_buffers: int | None = None,
    changes: Mapping[str, Any] | None = None,
    fidelity: Fidelity = "simulator",
    schedule: Schedule = "dealt",
    parallel: Parallel | None = None,
) -> Comparison:
    """Returns each system on each machine, and the best by each objective.

    Each runs one decode step of each model with each batch.

    Args:
        hardware: Machines, each a name (`neupims`, ...) or a TOML or JSON file.
        models: One or several, each a name (`gpt3-7b`, ...), a file or a `Decoder`.
        batches: One or several, each a file or a distribution as for `read_requests`, `Requests`,
            or a `Batch`.
        systems: Systems, each "neupims", "npu-pim", "npu-only", "gpu", or a spelling of the
            validation files.
        objectives: Some of `explore.METRICS`, as text (NAME:max or NAME:min, separated by commas)
            or records.
        sub_batches: 1 or 2 for the systems "neupims" (default: those of the system).
        row_buffers: Row buffers of a bank, 1 or 2 (default: those of the system).
        changes: Fields of all machines by dotted name, such as {"hbm.num_channels": 16}.
        fidelity: "simulator" or "intended".
        schedule: "dealt" assigns the requests to the channels of each machine; "trace" keeps the
            channels of the batch.
        parallel: How all models are spread over devices (default: as published for the model).

    Raises:
        ValueError: A name is unknown or repeated, or a value is impossible.
        OSError: A file cannot be read.
    """
    machines = [hardware] if isinstance(hardware, str | Path) else list(hardware)
    names = [systems] if isinstance(systems, str) else list(systems)
    for kind, several in (("machine", list(map(str, machines))), ("system", names)):
        if not several or len(set(several)) < len(several):
            raise ValueError(
                f"each {kind} must be given once: {', '.join(several) or 'there is none'}"
            )
    aims = parse_objectives(objectives) if isinstance(objectives, str) else tuple(objectives)
    for each in aims:
        if each.name not in METRICS:
            raise ValueError(f"there is no metric {each.name!r}; there are {', '.join(METRICS)}")
    found: list[Contender] = []
    workloads: list[Workload] = []
    for name in names:
        settings = [
            select_system(
                name,
                hardware=machine,
                sub_batches=sub_batches if name.lower() == "neupims" else None,
                row_buffers=row_buffers,
                changes=changes,
            )
            for machine in machines
        ]
        system, halves, _ = settings[0]
        made = [each[2] for each in settings]
        workloads = make_workloads(
            models,
            batches,
            num_channels=min(int(each.hbm.num_channels) for each in made),
            parallel=parallel,
            dealt=schedule == "dealt",
        )
        evaluate = make_evaluate(
            workloads,
            hardware=made[0],
            system=system,
            sub_batches=halves,
            fidelity=fidelity,
            schedule=schedule,
            most_channels=max(int(each.hbm.num_channels) for each in made),
        )
        metrics = jax.device_get(jax.jit(evaluate)(_columns(made)))
        flagged = metrics.pop("flagged").any(axis=1)
        means = {metric: overall(each) for metric, each in metrics.items()}
        found += [
            Contender(
                name,
                str(machine),
                halves,
                {metric: float(means[metric][row]) for metric in METRICS},
                bool(flagged[row]),
            )
            for row, machine in enumerate(machines)
        ]
    return Comparison(
        fidelity,
        tuple(each.name for each in workloads),
        list_notes(workloads),
        tuple(found),
        tuple(_winner(each, found) for each in aims),
    )


def _columns(machines: Sequence[Hardware]) -> dict[str, Any]:
    """The fields in which machines differ, one number for each; their channels in any case."""
    columns = {}
    for each in zip(*map(describe, machines), strict=True):
        values = [float(one.value) for one in each]
        if len(set(values)) > 1 or each[0].name == "hbm.num_channels":
            whole = each[0].whole and max(values) <= INT32_MOST
            columns[each[0].name] = jnp.asarray(values, jnp.int32 if whole else jnp.float32)
    return columns


def _winner(objective: Objective, contenders: Sequence[Contender]) -> Winner:
    """The best by one objective; none where all are flagged or have no such metric."""
    values = np.array(
        [np.nan if each.flagged else each.metrics[objective.name] for each in contenders]
    )
    usable = np.flatnonzero(np.isfinite(values))
    if not usable.size:
        return Winner(str(objective), (), np.nan, None)
    pick = np.max if objective.largest else np.min
    best = float(pick(values[usable]))
    others = usable[values[usable] != best]
    lead = None
    if others.size and (following := float(pick(values[others]))):
        lead = abs(best / following - 1)
    return Winner(str(objective), tuple(np.flatnonzero(values == best).tolist()), best, lead)
