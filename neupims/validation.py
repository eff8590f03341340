"""Comparison of the model with measured runs of the public simulator.

Predictions come from the knobs of a run alone (`simulator_runs`); errors are absolute percentages
of the measured cycles, by operation, stage and layer.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from neupims.machine.case import Case
from neupims.machine.record import to_values
from neupims.machine.systems import Fidelity, TimingPath
from neupims.simulator_runs import (
    NotCovered,
    case_of,
    most_channels,
    pad_case,
    read_measured,
    read_runs,
)
from neupims.timing.iteration import simulate
from neupims.timing.stages import ATTENTION, NPU_ATTENTION, QKV, REST, STAGES, operations, stages

KINDS = {each.name: each.kind for each in (*QKV, *REST, *ATTENTION, NPU_ATTENTION)}
LONG_CYCLES = 20_000


class Pair(NamedTuple):
    """A measured and a predicted time in core cycles."""

    run_id: str  # of runs.csv
    system: str  # as the validation files spell it
    level: str  # "op", "stage" or "layer"
    stage: str  # name of the stage; empty for the layer
    name: str  # of the operation or the stage, or "layer"
    measured: float  # core cycles
    predicted: float  # core cycles


class ErrorGroup(NamedTuple):
    """Absolute percentage errors of the pairs of one level, system, kind and name."""

    level: str  # "op", "stage" or "layer"
    system: str  # "all" for all of them
    kind: str  # of the operations; else the level
    name: str  # of the operation or the stage; "all" for all of the kind
    n: int  # number of pairs
    mean: float  # per cent
    median: float  # per cent
    p95: float  # 95th percentile, per cent
    max: float  # per cent


class LeftOut(NamedTuple):
    """A run that was not compared, and why."""

    run_id: str  # of runs.csv
    reason: str  # a sentence


@dataclass(frozen=True)
class Validation:
    """Errors of the model on a folder of runs."""

    groups: tuple[ErrorGroup, ...]  # errors by level, system, kind and name
    rows: tuple[Pair, ...]  # every measured and predicted time
    not_covered: tuple[LeftOut, ...]  # runs that were not compared

    def to_dict(self) -> dict[str, Any]:
        """Returns the values of JSON, as `validate --json` prints them."""
        return to_values(self)


def validate(
    folder: str | Path,
    *,
    fidelity: Fidelity = "simulator",
    path: TimingPath = "exact",
    progress: Callable[[list], Iterable] = iter,
) -> Validation:
    """Returns the errors of the model on all runs of a folder.

    Args:
        folder: Folder with `runs.csv`, `ops.csv` and `traces/` of runs of the public simulator.
        fidelity: "simulator" or "intended".
        path: "exact" follows the list of commands of each channel, "closed" adds up closed forms.
        progress: Wraps the list of runs, to show the progress (default: shows nothing).

    Returns:
        Errors by level, system and kind; every pair of times; and the runs left out, with reasons.

    Raises:
        OSError: A file is missing.
        ValueError: A file is malformed; the sentence names it.
    """
    runs, listed = read_runs(folder)
    rows: list[Pair] = []
    left_out: list[LeftOut] = []
    for run in progress(runs):
        if run.get("status", "ok") not in ("", "ok"):
            reason = f"the simulator did not end it: {run['status']}"
            left_out.append(LeftOut(run["run_id"], reason))
            continue
        try:
            rows += compare(run, listed.get(run["run_id"], []), folder, fidelity, path)
        except NotCovered as error:
            left_out.append(LeftOut(run["run_id"], str(error)))
    return Validation(tuple(group_errors(rows)), tuple(rows), tuple(left_out))


def compare(
    run: dict[str, str],
    listed: list[dict[str, str]],
    folder: str | Path,
    fidelity: Fidelity = "simulator",
    path: TimingPath = "exact",
) -> list[Pair]:
    """Returns the measured and predicted times of one run.

    Args:
        run: A row of `runs.csv`.
        listed: Its rows of `ops.csv`.
        folder: The folder of the runs.
        fidelity: "simulator" or "intended".
        path: "exact" or "closed".

    Raises:
        NotCovered: The run cannot be modelled.
    """
    predicted = predict(case_of(run, folder), fidelity=fidelity, path=path)
    if not all(map(math.isfinite, predicted.values())):
        raise NotCovered(
            "this hardware cannot run it: the predicted time is not finite (PIM tiles must fit"
            " between refreshes)"
        )
    pairs = []
    for key, value in read_measured(run, listed).items():
        if key not in predicted:
            raise NotCovered(
                f"it measured {' '.join(filter(None, key))}, which {run['system']} does not have"
            )
        pairs.append(Pair(run["run_id"], run["system"], *key, value, predicted[key]))
    return pairs


def predict(
    case: Case, *, fidelity: Fidelity = "simulator", path: TimingPath = "exact", **options
) -> dict[tuple[str, str, str], float]:
    """Returns predicted core cycles by (level, stage, name): operations, stages and the layer.

    Args:
        case: The case; its fidelity is not used.
        fidelity: "simulator" or "intended".
        path: "exact" or "closed".
        **options: Further options of `simulate`.
    """
    known = pad_case(case)
    options |= {
        "system": case.system,
        "sub_batches": case.sub_batches,
        "fidelity": fidelity,
        "path": path,
        "most_channels": most_channels(case),
    }
    result = simulate(known.hardware, known.model, known.batch, known.parallel, **options)
    op_cycles, stage_cycles = jax.device_get((result.op_cycles, result.stage_cycles))
    listed = operations(case.system, case.sub_batches)
    predicted = {
        ("op", operation.stage, operation.name): cycles
        for operation, cycles in zip(listed, op_cycles.tolist(), strict=True)
    }
    by_stage = dict(zip(STAGES, stage_cycles.tolist(), strict=True))
    for stage in stages(case.system, case.sub_batches):
        predicted["stage", stage.name, stage.name] = by_stage.get(stage.name, by_stage["A"])
    predicted["layer", "", "layer"] = float(result.layer_cycles)
    return predicted


def group_errors(rows: Iterable[Pair]) -> list[ErrorGroup]:
    """Returns the errors by system ("all" too) and level; those of operations by kind and by name.

    Args:
        rows: Measured and predicted times in core cycles.
    """
    groups: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        error = 100 * abs(row.predicted / row.measured - 1)
        for system in (row.system, "all"):
            for kind, name in _group_keys(row):
                groups.setdefault((row.level, system, kind, name), []).append(error)
    return [
        ErrorGroup(
            *key,
            n=len(errors),
            mean=float(np.mean(errors)),
            median=float(np.median(errors)),
            p95=float(np.percentile(errors, 95)),
            max=float(np.max(errors)),
        )
        for key, errors in sorted(groups.items())
    ]


def _group_keys(row: Pair) -> list[tuple[str, str]]:
    """Returns the kinds and names under which a pair counts."""
    if row.level == "stage":
        return [("stage", "all"), ("stage", row.stage)]
    if row.level == "layer":
        return [("layer", "layer")]
    kind = KINDS[row.name]
    keys: list[tuple[str, str]] = [(kind, "all"), (kind, row.name)]
    if kind == "gemm" and row.measured > LONG_CYCLES:
        keys.append((f"gemm > {LONG_CYCLES} cycles", "all"))
    return keys
