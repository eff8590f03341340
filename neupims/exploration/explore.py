"""Design-space exploration of the accelerator: Pareto front, hypervolume and sensitivities."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np

from neupims.envelope import ExpectedError
from neupims.exploration.ablation import Ablation
from neupims.exploration.designs import Design, EliteMap, make_designs, make_map, write_points
from neupims.exploration.elites import AXES, Axis, parse_axes
from neupims.exploration.evaluation import Schedule, make_evaluate
from neupims.exploration.evaluator import Measure
from neupims.exploration.explore_space import Report, SpaceResult, explore_space
from neupims.exploration.goodput import (
    SERVED_CHUNK,
    SERVED_POINTS,
    ServedTrace,
    measure_goodput,
    read_served,
    split_goodput,
)
from neupims.exploration.impossible import REASONS
from neupims.exploration.points import Objective, overall, parse_objectives
from neupims.exploration.sensitivity import Sensitivity
from neupims.exploration.sobol import ROWS, Indices
from neupims.exploration.space import make_space
from neupims.exploration.validated import base_error, count_validated
from neupims.exploration.workloads import Model, Spread, Trace, Workload, list_notes, make_workloads
from neupims.files import finite, write_text
from neupims.machine.config import load_hardware
from neupims.machine.effects import idle_changes
from neupims.machine.hardware import Hardware
from neupims.machine.record import check_seed, cut
from neupims.machine.systems import FIDELITY_ANSWERS, Fidelity, System
from neupims.timing.split import check_split

METRICS = (
    "tokens_per_second",
    "iteration_seconds",
    "energy_joules_per_token",
    "tokens_per_joule",
    "power_watts",
    "peak_power_watts",
    "area_mm2",
    "tokens_per_second_per_mm2",
    "npu_utilization",
    "pim_utilization",
    "bandwidth_utilization",
)
OBJECTIVES = "tokens_per_second:max,energy_joules_per_token:min,area_mm2:min"


@dataclass(frozen=True)
class Exploration:
    """The result of `explore`."""

    method: str  # "grid", "random", "sobol", "evolution" or "map-elites"
    seed: int  # of all random numbers
    system: System  # that all designs run
    sub_batches: int  # halves of the batch, unless a knob
    fidelity: Fidelity  # "simulator" or "intended"
    workloads: tuple[str, ...]  # names, MODEL/BATCH
    trace_notes: tuple[str, ...]  # what was assumed about requests, served ones too
    objectives: tuple[Objective, ...]  # metrics to be minimised or maximised
    points: int  # designs that were evaluated
    kept: int  # designs that meet all constraints
    flagged: int  # designs that are impossible or not finite
    flagged_by_reason: dict[str, int]  # their number, by the first reason of each; most first
    front: tuple[Design, ...]  # best of the first objective first
    elite_map: EliteMap | None  # the best designs by area and power; of "map-elites" alone
    base: Design  # the given hardware, moved into the space
    reference: dict[str, float]  # where the hypervolume ends, by objective
    hypervolume: float  # of the front, objectives in units of the base design
    sensitivity_of: str  # name of the metric
    sensitivities: dict[str, Sensitivity]  # by knob
    indices: Indices | None  # Sobol indices of all metrics; None if there are no rows for them
    ablations: tuple[Ablation, ...]  # what one knob changes, of the best design of each objective
    expected_error: ExpectedError  # of a layer of the base design, or why none is known
    # Designs of the front whose knobs are inside of the envelope; None if the base design is not.
    front_validated: int | None
    seconds: float  # wall time of the exploration
    devices: str  # number and kind of the devices that evaluated
    result: SpaceResult  # arrays of the front and of other designs
    # On fields of the base design without effect, why it is impossible, or on axes of the map.
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but `result` as plain values, as `neupims explore --json` prints it.

        Numbers that are not finite are None.
        """
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        del found["result"]
        found |= {
            "objectives": [str(each) for each in self.objectives],
            "front": [asdict(each) for each in self.front],
            "elite_map": self.elite_map and self.elite_map.to_dict(),
            "base": asdict(self.base),
            **self.expected_error.to_dict(),
            "fidelity_answers": FIDELITY_ANSWERS[self.fidelity],
            "sensitivities": {name: each._asdict() for name, each in self.sensitivities.items()},
            "ablations": [each.to_dict() for each in self.ablations],
            "indices": self.indices and self.indices.to_dict(),
        }
        return finite(found)

    def front_csv(self) -> str:
        """Returns the front as CSV: knobs, metrics, the throughput of each workload, and twins."""
        twins = {"twins": self.result.twins}
        return write_points(self.result.front, self.base.knobs, self.workloads, after=twins)

    def map_csv(self) -> str:
        """Returns the map of the method "map-elites" as CSV, a row for each cell with a design.

        Columns are the cell and where it begins and ends on both axes, then those of the front.

        Raises:
            ValueError: The method is another one.
        """
        elites = self.result.elites
        if elites is None or elites.points is None:
            raise ValueError(f"the method {self.method} has no map: take map-elites")
        return write_points(elites.points, self.base.knobs, self.workloads, before=elites.columns())


def explore(
    hardware: Hardware | str | Path,
    models: Model | Sequence[Model],
    batches: Trace | Sequence[Trace],
    knobs: Mapping[str, Any],
    *,
    constraints: str | Sequence[str] = (),
    objectives: str | Sequence[Objective] = OBJECTIVES,
    method: str = "sobol",
    points: int | None = None,
    seed: int = 0,
    system: System = "neupims",
    sub_batches: int | None = None,
    fidelity: Fidelity = "simulator",
    schedule: Schedule = "dealt",
    parallel: Spread | None = None,
    lm_head: bool = False,
    reference: Mapping[str, float] | None = None,
    sensitivity_of: str = "tokens_per_second",
    measures: Sequence[Measure] = (),
    axes: Sequence[Axis] | None = None,
    index_rows: int | None = None,
    serve: ServedTrace | None = None,
    chunk: int | None = None,
    folder: str | Path | None = None,
    report: Report = lambda done, total: None,
) -> Exploration:
    """Returns the Pareto front of accelerator designs, with hypervolume and sensitivities.

    Every design runs one decode step of each model with each batch. With the objective
    "goodput@LIMITS:max" it also serves a trace (`serving.goodput`).

    Args:
        hardware: The base design: a name (`neupims`, ...), a TOML or JSON file, or a record.
        models: One or several, each a name (`gpt3-7b`, ...), a file or a `Decoder`.
        batches: One or several, each a file or a distribution as for `read_requests`, `Requests`,
            or a `Batch`.
        knobs: For each name a list of values or a range `(low, high)`, see `make_space`. Names are
            fields of the hardware, `sub_batches`, `parallel.tp`, `parallel.pp` and
            `parallel.kv_split`.
        constraints: One comparison or several, such as "area_mm2 < 20000", of knobs and metrics.
        objectives: Some of `METRICS` and of the measures, as text (NAME:max or NAME:min, separated
            by commas) or records. "goodput@ttft_p99<2s,tpot_p99<100ms:max" is the highest rate of
            requests at which these percentiles stay below these limits.
        method: "grid", "random", "sobol", "evolution" (NSGA-II) or "map-elites", which keeps the
            best design by the first objective in each cell of area and power.
        points: Designs to evaluate; 4096 if not given, 256 with a goodput, and the whole grid for
            "grid".
        seed: Seed of all random numbers.
        system: One of `neupims.machine.systems.SYSTEMS`.
        sub_batches: Halves of the batch that NPU and PIM interleave; if not given, 2 for "neupims"
            and 1 for other systems.
        fidelity: "simulator", as the public simulator is coded, or "intended", as in the paper.
        schedule: "dealt" assigns the requests to the channels of each design, whatever the batch
            says; "trace" keeps the channels of the batch.
        parallel: How all models are spread over devices, or some of its fields, such as {"tp": 8};
            what is not given is as published for the model.
        lm_head: Whether each step computes the LM head too (default: as the model's file says).
        reference: Where the hypervolume ends, by objective; if not given, where designs are four
            times worse than the base design.
        sensitivity_of: The metric whose sensitivities are computed.
        measures: Further metrics of designs, such as those of a simulation of serving.
        axes: The two axes of the map of "map-elites", which `elites.parse_axes` makes of text; 16
            cells each of area and power if not given.
        index_rows: Rows of designs from which Sobol indices are computed, each with two more
            designs than knobs, best a power of 2; 0 for no indices. If not given, 1024, and 0 where
            there are measures, which may take long.
        serve: The requests that are served for a goodput, such as `ServedTrace("sharegpt:200")`.
        chunk: Designs of a file, or of a generation; 16384 and 256 if not given, 64 with a goodput.
        folder: Keeps evaluated designs, `front.csv`, `map.csv` of "map-elites", and
            `summary.json`; the same call resumes from it. None keeps nothing.
        report: Called with the number of finished designs, and of all designs.

    Raises:
        ValueError: An argument is unknown or impossible; the folder holds another exploration.
        OSError: A file cannot be read or written.
        ImportError: The extra `neupims` is not installed.

    Example:
        >>> from neupims import explore, make_batch
        >>> batch = make_batch([300, 40, 900, 512], [0, 1, 2, 3])
        >>> knobs = {"hbm.num_channels": [16, 32], "npu.num_arrays": (4, 8)}
        >>> found = explore("neupims", "gpt3-7b", batch, knobs, method="grid")
        >>> found.points, found.front[0].knobs["hbm.num_channels"]
        (10, 32.0)
    """
    began = time.perf_counter()
    check_seed(seed)
    constraints = [constraints] if isinstance(constraints, str) else constraints
    if system != "neupims" and (sub_batches == 2 or "sub_batches" in knobs):
        raise ValueError(f"two sub_batches need the system neupims, not {system}")
    halves = (2 if system == "neupims" else 1) if sub_batches is None else sub_batches
    machine = hardware if isinstance(hardware, Hardware) else load_hardware(hardware)
    workloads = make_workloads(
        models,
        batches,
        num_channels=int(machine.hbm.num_channels),
        parallel=parallel,
        lm_head=lm_head,
        dealt=schedule == "dealt",
    )
    for each in workloads:
        split = 2 if "parallel.kv_split" in knobs else each.parallel.kv_split
        check_split(split, system=system, fidelity=fidelity)
    notes = list_notes(workloads)
    aims, tails = split_goodput(parse_objectives(objectives))
    if (serve is None) != (not tails):
        raise ValueError(
            "the objective goodput@LIMITS:max, such as goodput@ttft_p99<2s,tpot_p99<100ms:max, and"
            " a trace to serve (--serve) need each other"
        )
    if serve is not None:
        requests = read_served(serve, seed)
        notes += tuple(f"{requests.name}: {note}" for note in requests.notes)
        goodput = measure_goodput(
            workloads,
            machine,
            requests,
            tails,
            tuple(knobs),
            system=system,
            sub_batches=halves,
            fidelity=fidelity,
            batch=serve.batch,
        )
        measures = [*measures, goodput]
        points = SERVED_POINTS if points is None and method != "grid" else points
        chunk = SERVED_CHUNK if chunk is None else chunk
    if not all(isinstance(each, Measure) for each in measures):
        raise ValueError(f"measures must be records of Measure, not {cut(measures)}")
    space = make_space(
        knobs,
        constraints,
        hardware=machine,
        settings={
            "sub_batches": halves,
            "parallel.tp": workloads[0].parallel.tp,
            "parallel.pp": workloads[0].parallel.pp,
            "parallel.kv_split": workloads[0].parallel.kv_split,
        },
        metrics=[*METRICS, *(name for each in measures for name in each.names)],
    )
    if axes is None and method == "map-elites":
        axes = parse_axes(AXES)
    options: dict[str, Any] = {
        "system": system,
        "sub_batches": halves,
        "fidelity": fidelity,
        "schedule": schedule,
    }
    channels = [knob.most for knob in space.knobs if knob.name == "hbm.num_channels"]
    most_channels = int(max([machine.hbm.num_channels, *channels]))
    result = explore_space(
        space,
        make_evaluate(workloads, hardware=machine, most_channels=most_channels, **options),
        aims,
        method=method,
        points=points,
        seed=seed,
        chunk=chunk,
        folder=folder,
        settings=options | {"workloads": [_describe(each) for each in workloads]},
        reference=reference,
        sensitivity_of=sensitivity_of,
        measures=measures,
        axes=axes,
        index_rows=(0 if measures else ROWS) if index_rows is None else index_rows,
        report=report,
    )
    error = base_error(space, machine, workloads, options)
    found = Exploration(
        method=method,
        seed=seed,
        system=system,
        sub_batches=halves,
        fidelity=fidelity,
        workloads=tuple(each.name for each in workloads),
        trace_notes=notes,
        objectives=result.objectives,
        points=result.points,
        kept=result.kept,
        flagged=result.flagged,
        flagged_by_reason=_count_reasons(result),
        front=make_designs(
            result.front.take(_best_first(result)), space, result.twins[_best_first(result)]
        ),
        elite_map=make_map(result.elites, space) if result.elites else None,
        base=make_designs(result.base, space)[0],
        reference=result.reference,
        hypervolume=result.hypervolume,
        sensitivity_of=result.sensitivity_of,
        sensitivities=result.sensitivities,
        indices=result.indices,
        ablations=result.ablations,
        expected_error=error,
        front_validated=count_validated(space, workloads, options, result.front.values)
        if error.percent
        else None,
        seconds=time.perf_counter() - began,
        devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        result=result,
        warnings=[
            *_warn_of_base(result),
            *_warn_of_axes(axes, result),
            *idle_changes(machine, system, fidelity, [each.model for each in workloads]),
        ],
    )
    if folder is not None:
        summary = json.dumps(found.to_dict(), indent=2, allow_nan=False)
        write_text(Path(folder) / "front.csv", found.front_csv())
        if found.elite_map is not None:
            write_text(Path(folder) / "map.csv", found.map_csv())
        write_text(Path(folder) / "summary.json", summary)
    return found


def _count_reasons(result: SpaceResult) -> dict[str, int]:
    counts = sorted(result.flagged_by_code.items(), key=lambda each: -each[1])
    return {REASONS[code]: count for code, count in counts}


def _warn_of_base(result: SpaceResult) -> tuple[str, ...]:
    code = int(result.base.code[0])
    return (f"the base design is impossible: {REASONS[code]}",) if code else ()


def _warn_of_axes(axes: Sequence[Axis] | None, result: SpaceResult) -> list[str]:
    """A sentence for each axis that should have cells of equal ratios, and cannot."""
    found = result.elites.axes if result.elites else ()
    return [
        f"the axis {now.name} has cells of equal widths, not of equal ratios, because it begins at"
        f" {now.low:g}: write {now.name}:linear, or {now.name}=LOW:HIGH with LOW above 0"
        for given, now in zip(axes or (), found, strict=True)
        if given.log and not now.log and now.cells > 1
    ]


def _describe(workload: Workload) -> dict[str, Any]:
    """A workload as values that JSON can hold."""
    return {
        "name": workload.name,
        "model": {name: int(value) for name, value in vars(workload.model).items()},
        "parallel": {name: int(value) for name, value in vars(workload.parallel).items()},
        "batch": [np.asarray(part).tolist() for part in vars(workload.batch).values()],
    }


def _best_first(result: SpaceResult) -> np.ndarray:
    """Rows of the front by the first objective."""
    first = result.objectives[0]
    metric = overall(result.front.metrics[first.name])
    return np.argsort(-metric if first.largest else metric, kind="stable")
