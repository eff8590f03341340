"""Comparison of systems and machines on the same requests, and the best one by each objective."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neupims.envelope import ExpectedError, describe_percent, expected_error, join_errors
from neupims.exploration.evaluation import Schedule, make_evaluate
from neupims.exploration.explore import METRICS
from neupims.exploration.impossible import REASONS
from neupims.exploration.points import Objective, overall, parse_objectives
from neupims.exploration.validated import base_case
from neupims.exploration.workloads import Model, Spread, Trace, Workload, list_notes, make_workloads
from neupims.files import SUFFIXES, finite
from neupims.machine.case import find_setting, select_system
from neupims.machine.effects import idle_changes
from neupims.machine.hardware import Hardware
from neupims.machine.layer_kinds import find_mix
from neupims.machine.quantity import describe
from neupims.machine.record import INT32_MOST
from neupims.machine.supported import check_latent
from neupims.machine.systems import FIDELITY_ANSWERS, Fidelity
from neupims.timing.memory_check import check_memory

FILES = (*SUFFIXES, ".ini")  # ends of names that are files
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
    fidelity: Fidelity  # "simulator" or "intended"
    metrics: dict[str, float]  # of `METRICS`, by name
    flagged: bool  # whether it is left out, so that it wins nothing
    flagged_by_reason: dict[str, int]  # workloads that it cannot run, by reason
    expected_error: ExpectedError  # of a layer over the workloads, or why none is known
    warnings: tuple[str, ...]  # what `simulate` says about memory and fields without effect

    @property
    def name(self) -> str:
        """The system and the machine, as they were given."""
        return f"{self.system} on {self.hardware}"

    @property
    def trust(self) -> str:
        """Why it is left out, or its expected error, or why it has none, in words."""
        if self.flagged:
            return f"left out: {'; '.join(self.flagged_by_reason)}"
        if self.expected_error.percent:
            return describe_percent(self.expected_error.percent)
        return f"not validated: {'; '.join(self.expected_error.not_validated)}"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, with the expected error under the names that all commands use."""
        found = asdict(self)
        del found["expected_error"]
        return found | self.expected_error.to_dict()


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

    @property
    def flagged(self) -> int:
        """The number of contenders that are left out."""
        return sum(each.flagged for each in self.contenders)

    @property
    def flagged_by_reason(self) -> dict[str, int]:
        """The contenders that are left out, by the first reason of each; most first."""
        counts = Counter(
            next(iter(each.flagged_by_reason)) for each in self.contenders if each.flagged
        )
        return dict(counts.most_common())

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of the contenders, each sentence once, after those that it is about."""
        about: dict[str, list[str]] = {}
        for each in self.contenders:
            for sentence in each.warnings:
                about.setdefault(sentence, []).append(each.name)
        return tuple(f"{', '.join(names)}: {sentence}" for sentence, names in about.items())

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as `neupims explore --json` prints them; None is not finite."""
        return finite(
            asdict(self)
            | {
                "contenders": [each.to_dict() for each in self.contenders],
                "fidelity_answers": FIDELITY_ANSWERS[self.fidelity],
                "flagged": self.flagged,
                "flagged_by_reason": self.flagged_by_reason,
                "warnings": list(self.warnings),
            }
        )


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
    parallel: Spread | None = None,
    lm_head: bool = False,
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
        parallel: How all models are spread over devices, or some of its fields, such as {"tp": 8};
            what is not given is as published for the model.
        lm_head: Whether each step computes the LM head too (default: as the model's file says).

    Raises:
        ValueError: A name is unknown or repeated, or a value is impossible.
        OSError: A file cannot be read.
    """
    machines = [hardware] if isinstance(hardware, str | Path) else list(hardware)
    names = [str(name).strip() for name in ([systems] if isinstance(systems, str) else systems)]
    halves = {name: sub_batches if name.lower() == "neupims" else None for name in names}
    _check_once("machine", list(map(str, machines)), _place)
    _check_once("system", names, lambda name: find_setting(name, halves[name]))
    aims = parse_objectives(objectives)
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
                sub_batches=halves[name],
                row_buffers=row_buffers,
                changes=changes,
            )
            for machine in machines
        ]
        made = [each[2] for each in settings]
        workloads = make_workloads(
            models,
            batches,
            num_channels=min(int(each.hbm.num_channels) for each in made),
            parallel=parallel,
            lm_head=lm_head,
            dealt=schedule == "dealt",
        )
        options: dict[str, Any] = {
            "system": settings[0][0],
            "sub_batches": settings[0][1],
            "fidelity": fidelity,
            "schedule": schedule,
        }
        untimed = _find_untimed(workloads, options)
        nothing = (dict.fromkeys(METRICS, np.nan), untimed)
        rows = [nothing] * len(made) if untimed else _evaluate(made, workloads, options)
        found += [
            _make_contender(name, str(machine), one, workloads, options, *row)
            for machine, one, row in zip(machines, made, rows, strict=True)
        ]
    return Comparison(
        fidelity,
        tuple(each.name for each in workloads),
        list_notes(workloads),
        tuple(found),
        tuple(_winner(each, found) for each in aims),
    )


def _check_once(kind: str, names: Sequence[str], meaning: Callable[[str], Any]) -> None:
    """Raises unless there are names, and no two of them mean the same."""
    if not names or not all(name.strip() for name in names):
        listed = ", ".join(map(repr, names)) or "nothing"
        raise ValueError(f"each {kind} needs a name, not {listed}")
    first: dict[Any, str] = {}
    for name in names:
        same = first.setdefault(meaning(name), name)
        if same is not name:  # also where the text is equal: it is another item of the list
            raise ValueError(f"each {kind} must be given once: {same} and {name} are the same")


def _place(name: str) -> str:
    """Returns what the name of a machine means: the resolved path of a file, or the name."""
    return os.path.realpath(name) if name.lower().endswith(FILES) else name.lower()


def _find_untimed(workloads: Sequence[Workload], options: Mapping[str, Any]) -> dict[str, int]:
    """Returns the workloads whose model the timing refuses on this system, by the reason."""
    found: Counter[str] = Counter()
    for each in workloads:
        try:
            check_latent(
                find_mix(each.model), system=options["system"], fidelity=options["fidelity"]
            )
        except ValueError as refusal:
            found[f"not timed: {refusal}"] += 1
    return dict(found)


def _evaluate(
    machines: Sequence[Hardware], workloads: Sequence[Workload], options: Mapping[str, Any]
) -> list[tuple[dict[str, float], dict[str, int]]]:
    """Returns the metrics of each machine, and its workloads that are impossible, by reason."""
    channels = [int(each.hbm.num_channels) for each in machines]
    evaluate = make_evaluate(
        workloads, hardware=machines[0], most_channels=max(channels), **options
    )
    metrics = jax.device_get(jax.jit(evaluate)(_columns(machines)))
    codes = metrics.pop("flagged")
    means = {metric: overall(each) for metric, each in metrics.items()}
    return [
        (
            {metric: float(means[metric][row]) for metric in METRICS},
            dict(Counter(REASONS[code] for code in codes[row].tolist() if code).most_common()),
        )
        for row in range(len(machines))
    ]


def _make_contender(
    name: str,
    machine: str,
    hardware: Hardware,
    workloads: Sequence[Workload],
    options: Mapping[str, Any],
    metrics: dict[str, float],
    reasons: dict[str, int],
) -> Contender:
    cases = [base_case(hardware, each, options) for each in workloads]
    error = join_errors([expected_error(case, path="closed") for case in cases])
    several = len(cases) > 1
    said = [
        f"{workload.name}: {sentence}" if several else sentence
        for workload, case in zip(workloads, cases, strict=True)
        for sentence in check_memory(
            *(case.hardware, case.model, case.batch, case.parallel),
            system=case.system,
            fidelity=case.fidelity,
            allow_overflow=True,
        )
    ]
    models = [each.model for each in workloads]
    idle = idle_changes(hardware, options["system"], options["fidelity"], models)
    return Contender(
        system=name,
        hardware=machine,
        sub_batches=options["sub_batches"],
        fidelity=options["fidelity"],
        metrics=metrics,
        flagged=bool(reasons),
        flagged_by_reason=reasons,
        expected_error=error,
        warnings=(*said, *idle),
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
