"""Why a design is best: what happens to it where one knob alone takes another value.

Each knob of the best design of an objective is set to the value of the given machine, and to its
next lower and higher values in the space. A change that makes the objective worse says what the
knob is worth; one that makes it better is forbidden by a constraint, or was not found.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from neupims.exploration.designs import Design, make_designs
from neupims.exploration.impossible import REASONS
from neupims.exploration.points import Objective, Points, costs
from neupims.exploration.sensitivity import next_values
from neupims.exploration.space import Space

MACHINE, LOWER, HIGHER = "the machine's", "next lower", "next higher"
COSTS = ("area_mm2", "power_watts")  # metrics that a table shows beside the objective


class Step(NamedTuple):
    """Another value of one knob."""

    column: int  # of the knob
    value: float
    kind: str  # MACHINE, LOWER or HIGHER


@dataclass(frozen=True)
class Change:
    """What happens to a design where one knob takes another value."""

    knob: str
    kind: str  # which value: "the machine's", "next lower" or "next higher"
    before: float  # value of the knob in the design
    after: float  # its other value
    metrics: dict[str, float]  # of the changed design; empty if it is impossible
    ratios: dict[str, float]  # of them to those of the design
    fault: str  # why the changed design is impossible, or which constraints it violates


@dataclass(frozen=True)
class Ablation:
    """The best design of an objective, and all changes of one knob."""

    objective: str  # NAME:max or NAME:min
    best: Design
    # The one that makes the objective worst first, impossible ones last.
    changes: tuple[Change, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)

    def table(self) -> list[tuple[Any, ...]]:
        """Returns rows of a table, with the cells of `titles`."""
        shown = self.shown
        return [
            (
                each.knob,
                f"{each.before:.4g} -> {each.after:.4g}",
                each.kind,
                *(_percent(each.ratios.get(name, np.nan)) for name in shown),
                each.fault,
            )
            for each in self.changes
        ]

    @property
    def shown(self) -> tuple[str, ...]:
        """The metrics of a table: the objective, and area and power where there are any."""
        name = self.objective.rpartition(":")[0]
        return tuple(dict.fromkeys((name, *(each for each in COSTS if each in self.best.metrics))))

    @property
    def titles(self) -> tuple[str, ...]:
        """The columns of a table."""
        return ("knob", "value", "which", *(f"{name}, %" for name in self.shown), "")


def ablate(
    space: Space,
    front: Points,
    objectives: Sequence[Objective],
    evaluate: Callable[[np.ndarray], Points],
) -> tuple[Ablation, ...]:
    """Returns the ablation of the best design of each objective.

    Args:
        space: The space of the designs.
        front: Their Pareto front, which has the best design of each objective; none if it is empty.
        objectives: Metrics to be minimised or maximised.
        evaluate: Returns designs with their metrics, given values of the knobs, `(n, k)`.
    """
    if not len(front.place):
        return ()
    rows = costs(front, objectives).argmin(axis=0)
    steps = [list(_steps(space, front.values[row])) for row in rows]
    changed = []
    for row, of_design in zip(rows, steps, strict=True):
        for step in of_design:
            values = front.values[row].copy()
            values[step.column] = step.value
            changed.append(values)
    if not changed:
        return ()
    found, start, made = evaluate(np.stack(changed)), 0, []
    for objective, row, of_design in zip(objectives, rows, steps, strict=True):
        part = found.take(np.arange(start, start + len(of_design)))
        start += len(of_design)
        made.append(_make(space, objective, front.take(np.array([row])), of_design, part))
    return tuple(made)


def _steps(space: Space, values: np.ndarray) -> Iterator[Step]:
    """The other values of each knob, each once."""
    for column, knob in enumerate(space.knobs):
        low, high = next_values(knob, values[column])
        seen = {values[column]}
        for value, kind in ((space.base[knob.name], MACHINE), (low, LOWER), (high, HIGHER)):
            if value not in seen:
                seen.add(value)
                yield Step(column, value, kind)


def _make(
    space: Space, objective: Objective, best: Points, steps: Sequence[Step], changed: Points
) -> Ablation:
    design = make_designs(best, space)[0]
    changes = []
    for row, (step, other) in enumerate(zip(steps, make_designs(changed, space), strict=True)):
        metrics = {} if changed.code[row] else other.metrics
        ratios = {
            name: value / design.metrics[name] if design.metrics[name] else np.nan
            for name, value in metrics.items()
        }
        knob, before = space.names[step.column], float(best.values[0, step.column])
        fault = _fault(space, other, int(changed.code[row]))
        changes.append(Change(knob, step.kind, before, float(step.value), metrics, ratios, fault))
    sign = 1 if objective.largest else -1
    changes.sort(key=lambda each: sign * each.metrics.get(objective.name, sign * np.inf))
    return Ablation(str(objective), design, tuple(changes))


def _fault(space: Space, design: Design, code: int) -> str:
    """Why a design is impossible, or which constraints it violates; "" if neither."""
    if code:
        return f"impossible: {REASONS[code]}"
    known = {
        name: np.array([value])
        for name, value in (space.base | design.knobs | design.metrics).items()
    }
    broken = [each.text for each in space.constraints if each.violation(known)[0] > 0]
    return f"violates {' and '.join(broken)}" if broken else ""


def _percent(ratio: float) -> str:
    """What a ratio is above or below 1; "" where there is none."""
    return f"{100 * (ratio - 1):+.2f}" if np.isfinite(ratio) else ""
