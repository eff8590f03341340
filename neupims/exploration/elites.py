"""A map of elites: for each cell of two metrics, such as area and power, the best design in it.

A map answers which designs are good at every size of machine, where a Pareto front keeps only
those that no smaller machine beats. The cells of an axis have equal widths or equal ratios, and
the outermost cells are open: what lies beyond an axis is in them.

The map is kept here, not with pyribs, whose `GridArchive` would replace one sort: its emitters do
not draw from lists of values and know no impossible designs, and it brings numba.

Reference: Mouret and Clune, "Illuminating search spaces by mapping elites", 2015, arXiv:1504.04909.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from neupims.exploration.points import Objective, Points, costs, overall
from neupims.machine.record import cut
from neupims.machine.workload import SHOWN

AXES = "area_mm2,power_watts"
CELLS = "16x16"
MOST_CELLS = 1024  # of an axis


@dataclass(frozen=True)
class Axis:
    """One of the two metrics of a map, cut into cells."""

    name: str  # of the metric
    low: float | None = None  # where the first cell begins; None: at the first designs
    high: float | None = None  # where the last cell ends; None: at the first designs
    log: bool = True  # whether cells have equal ratios, not equal widths
    cells: int = 16  # their number

    def __post_init__(self):
        given = [end for end in (self.low, self.high) if end is not None]
        rises = not given or (len(given) == 2 and 0 < given[1] - given[0] < np.inf)
        if not rises or (self.log and given and given[0] <= 0):
            raise ValueError(
                f"an axis needs LOW below HIGH, and above 0 unless it is linear, but {self.name}"
                f" has {self.low} and {self.high}"
            )
        if not 1 <= self.cells <= MOST_CELLS:
            raise ValueError(f"an axis has 1 to {MOST_CELLS} cells, not {self.cells}")

    def __str__(self) -> str:
        """The axis as it is written, and its number of cells."""
        ends = "" if self.low is None else f"={self.low:g}:{self.high:g}"
        return f"{self.name}{ends}{'' if self.log else ':linear'}/{self.cells}"

    @property
    def edges(self) -> Float[np.ndarray, " e"]:
        """Where cells begin and end, `(cells + 1,)`, rising."""
        space = np.geomspace if self.log else np.linspace
        return space(self.low, self.high, self.cells + 1)  # type: ignore[arg-type]

    def place(self, values: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Returns the cell of each value, `(n,)`.

        A value on an edge is in the cell that begins there. Values below the first edge are in the
        first cell, and values from the last edge on in the last one.

        Args:
            values: `(n,)` values of the metric.
        """
        return np.searchsorted(self.edges[1:-1], values, side="right")

    def fit(self, values: Float[np.ndarray, " n"]) -> "Axis":
        """Returns the axis from the least to the greatest value; one with ends stays as it is.

        An axis on which all values are equal has one cell.

        Args:
            values: `(n,)` values of the metric, at least one.
        """
        if self.low is not None:
            return self
        low, high = float(values.min()), float(values.max())
        one = {"low": low, "high": 2 * low or 1.0, "cells": 1}
        ends = {"low": low, "high": high} if low < high else one
        return dataclasses.replace(self, **ends, log=self.log and low > 0)  # type: ignore[arg-type]


def parse_axes(text: str, cells: str = CELLS) -> tuple[Axis, Axis]:
    """Returns the two axes of a text such as "area_mm2=200:2000,power_watts:linear".

    Args:
        text: Two axes NAME, NAME=LOW:HIGH, NAME:linear or NAME=LOW:HIGH:linear, separated by a
            comma.
        cells: Number of cells of both axes, such as "16" or "24x12".

    Raises:
        ValueError: A text has another form, or a range is empty.
    """
    counts = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", cells.strip(), re.ASCII)
    if not counts:
        raise ValueError(f"cells are N or NxM, such as {CELLS}, not {cells[:SHOWN]!r}")
    parts = text.split(",")
    if len(parts) != 2:
        raise ValueError(f"a map has two axes, such as {AXES}, not {text[:SHOWN]!r}")
    return _parse_axis(parts[0], counts[1]), _parse_axis(parts[1], counts[2] or counts[1])


def _parse_axis(text: str, cells: str) -> Axis:
    found = re.fullmatch(r"([^=:]+)(?:=([^=:]+):([^=:]+))?(:linear)?", text.strip())
    try:
        if not found:
            raise ValueError
        low, high = (None if end is None else float(end) for end in (found[2], found[3]))
    except ValueError:
        raise ValueError(
            f"an axis is NAME, NAME=LOW:HIGH, or either with :linear, not {text.strip()[:SHOWN]!r}"
        ) from None
    return Axis(found[1].strip(), low, high, log=not found[4], cells=int(cells))


def _fit(axis: Axis, part: Points, possible: Points) -> Axis:
    """The axis with ends: those of the designs that meet the constraints, if two differ."""
    values = overall(part.metrics[axis.name])
    if values.min() == values.max():
        values = overall(possible.metrics[axis.name])
    return axis.fit(values[np.isfinite(values)])


class Elites:
    """The best design of each cell so far.

    Args:
        axes: The two axes. Those without ends begin and end at the designs of the first call of
            `update` that has some which meet the constraints; or, if these are all alike, at all
            possible designs of that call.
        objective: What is best.

    Raises:
        ValueError: There are not two axes of different metrics.
    """

    def __init__(self, axes: Sequence[Axis], objective: Objective):
        self.axes = tuple(axes)
        if not all(isinstance(axis, Axis) for axis in self.axes) or len(self.axes) != 2:
            raise ValueError(
                f"a map has two axes, records that parse_axes makes of text, not {cut(axes)}"
            )
        if self.axes[0].name == self.axes[1].name:
            raise ValueError(f"the axes of a map are two metrics, not {self.axes[0].name} twice")
        self.objective = objective
        self.points: Points | None = None  # (f,) best designs, by rising cell; None at first
        self.units = np.zeros((0, 0), np.float32)  # (f, knobs) their coordinates

    def update(self, part: Points, units: Float[np.ndarray, "n k"]) -> None:
        """Puts designs into their cells; of equal ones of a cell the first one stays.

        Args:
            part: Designs, n of them; those that violate a constraint are left out.
            units: `(n, k)` their coordinates.
        """
        if self.points is not None:
            part, units = self.points.join(part), np.concatenate([self.units, units])
        cost = costs(part, [self.objective])[:, 0]
        kept = np.isfinite(cost)
        possible = part.take(part.code == 0)
        part, units, cost = part.take(kept), units[kept], cost[kept]
        if len(cost):
            self.axes = tuple(_fit(axis, part, possible) for axis in self.axes)
            cells = self.cells_of(part)
            order = np.lexsort((part.place, cost, cells[:, 1], cells[:, 0]))
            best = order[np.unique(cells[order], axis=0, return_index=True)[1]]
            part, units = part.take(best), units[best]
        self.points, self.units = part, units

    def cells_of(self, part: Points) -> Int[np.ndarray, "n 2"]:
        """Returns the cell of each design on both axes, `(n, 2)`.

        Args:
            part: Designs, n of them.
        """
        return np.stack(
            [axis.place(overall(part.metrics[axis.name])) for axis in self.axes], axis=1
        )

    def columns(self) -> dict[str, np.ndarray]:
        """Returns the cell of each best design, and where it begins and ends, by name, `(f,)`."""
        if self.points is None or not len(self.points.place):
            return {}
        found = {}
        for axis, cell in zip(self.axes, self.cells_of(self.points).T, strict=True):
            found[f"cell of {axis.name}"] = cell
            found[f"{axis.name} from"] = axis.edges[cell]
            found[f"{axis.name} to"] = axis.edges[cell + 1]
        return found
