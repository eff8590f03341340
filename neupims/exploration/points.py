"""Designs with their metrics, and the objectives that compare them.

A metric is `(n, workloads)`; its value over workloads is the geometric mean. A design is flagged if
it cannot exist, cannot run a workload, or has a metric that is not finite. Flagged designs are in
no front.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from neupims.exploration import pareto


class Objective(NamedTuple):
    """A metric, and whether more of it is better."""

    name: str  # of the metric
    largest: bool  # whether the largest value is best

    def __str__(self) -> str:
        return f"{self.name}:{'max' if self.largest else 'min'}"


class Points(NamedTuple):
    """Designs with their metrics."""

    place: np.ndarray  # (n,) number in the run
    values: np.ndarray  # (n, knobs) values of the knobs
    metrics: dict[str, np.ndarray]  # (n, workloads) by name
    violation: np.ndarray  # (n,) 0 where all constraints hold, infinite where flagged
    code: np.ndarray  # (n,) of the reason why a design is flagged, else 0

    def take(self, rows: np.ndarray) -> "Points":
        """Returns some of the designs.

        Args:
            rows: Row numbers, or a boolean for each design.
        """
        metrics = {name: each[rows] for name, each in self.metrics.items()}
        kept = (self.violation[rows], self.code[rows])
        return Points(self.place[rows], self.values[rows], metrics, *kept)

    def join(self, other: "Points") -> "Points":
        """Returns these designs followed by the others.

        Args:
            other: Designs with the same metrics, which follow.
        """
        return Points(
            np.concatenate([self.place, other.place]),
            np.concatenate([self.values, other.values]),
            {
                name: np.concatenate([each, other.metrics[name]])
                for name, each in self.metrics.items()
            },
            np.concatenate([self.violation, other.violation]),
            np.concatenate([self.code, other.code]),
        )

    def drop_repeats(self) -> "Points":
        """Returns the first of each design; a design that is drawn again has the same metrics."""
        return self.take(np.sort(np.unique(self.values, axis=0, return_index=True)[1]))

    def exclude(self, known: "Points") -> "Points":
        """Returns the designs, each once, that are not among the known ones.

        Args:
            known: Designs to leave out; designs with equal knob values count as the same.
        """
        both = known.join(self).drop_repeats()
        return both.take(~np.isin(both.place, known.place))


def parse_objectives(objectives: str | Sequence[Objective]) -> tuple[Objective, ...]:
    """Returns objectives as records, from records or a text "tokens_per_second:max,area_mm2:min".

    Args:
        objectives: At least one record, or NAME:max or NAME:min, separated by commas. After an @, a
            name may have commas.

    Raises:
        ValueError: An objective has another form or is repeated, or there is none.
    """
    found = _parse_text(objectives) if isinstance(objectives, str) else tuple(objectives)
    if not found or not all(isinstance(each, Objective) for each in found):
        raise ValueError(
            "objectives must be text such as area_mm2:min,tokens_per_second:max, or at least one"
            f" Objective, not {found!r}"
        )
    if len({each.name for each in found}) < len(found):
        raise ValueError(f"an objective is repeated in {','.join(map(str, found))!r}")
    return found


def _parse_text(text: str) -> tuple[Objective, ...]:
    found = []
    masked = re.sub("@[^:]*", lambda limits: limits[0].replace(",", "\0"), text)
    for part in (each.replace("\0", ",") for each in masked.split(",")):
        name, _, sense = part.strip().partition(":")
        if not name or sense not in ("max", "min"):
            raise ValueError(f"an objective is NAME:max or NAME:min, not {part.strip()!r}")
        found.append(Objective(name, sense == "max"))
    return tuple(found)


def overall(metric: Float[np.ndarray, "n w"]) -> Float[np.ndarray, " n"]:
    """Returns the geometric mean of a metric over the workloads, `(n,)`; NaN for negative values.

    That of equal values is their value, without rounding.

    Args:
        metric: `(n, workloads)` values.
    """
    values = np.asarray(metric, np.float64)
    alike = (values == values[:, :1]).all(axis=1) & (values[:, 0] >= 0)
    with np.errstate(all="ignore"):
        return np.where(alike, values[:, 0], np.exp(np.log(values).mean(axis=1)))


def result(points: Points, name: str) -> Float[np.ndarray, " n"]:
    """Returns a metric over all workloads; NaN for flagged designs, whatever the constraints.

    Args:
        points: The designs, n of them.
        name: Name of the metric.
    """
    return np.where(points.code != 0, np.nan, overall(points.metrics[name]))


def costs(points: Points, objectives: Sequence[Objective]) -> Float[np.ndarray, "n m"]:
    """Returns the `(n, m)` objectives to be minimised; NaN for designs that violate a constraint.

    An objective whose largest value is best is negated.

    Args:
        points: The designs, n of them.
        objectives: The m metrics to be minimised or maximised.
    """
    columns = [
        overall(points.metrics[each.name]) * (-1 if each.largest else 1) for each in objectives
    ]
    return np.where(points.violation[:, None] <= 0, np.stack(columns, axis=1), np.nan)


def update_front(front: Points | None, part: Points, objectives: Sequence[Objective]) -> Points:
    """Returns the front of an earlier front and further designs together, each design once.

    Args:
        front: The earlier front; None for none.
        part: Further designs.
        objectives: The metrics to be minimised or maximised.

    Raises:
        ImportError: moocore is not installed.
    """
    both = part if front is None else front.join(part)
    return both.take(pareto.front(costs(both, objectives))).drop_repeats()


def hypervolume(
    front: Points, base: Points, objectives: Sequence[Objective], reference: Mapping[str, float]
) -> float:
    """Returns the hypervolume of a front up to a reference, with objectives in units of the base.

    Args:
        front: The designs of the front.
        base: The base design, one row.
        objectives: The metrics to be minimised or maximised.
        reference: Where the hypervolume ends, by objective, in the units of the metrics.

    Raises:
        ValueError: The reference is not finite.
        ImportError: moocore is not installed.
    """
    unit = np.array([float(overall(base.metrics[each.name])[0]) for each in objectives])
    sense = np.array([-1.0 if each.largest else 1.0 for each in objectives])
    ends = np.array([reference[each.name] for each in objectives])
    return pareto.hypervolume(costs(front, objectives) / unit, sense * ends / unit)
