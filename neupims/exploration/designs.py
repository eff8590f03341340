"""Designs as records and as CSV: what explorations return of their arrays."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from neupims.exploration.elites import Elites
from neupims.exploration.points import Points, overall
from neupims.exploration.space import Space


@dataclass(frozen=True)
class Design:
    """One design; metrics are geometric means over the workloads."""

    index: int  # number in the run
    knobs: dict[str, float]  # value by name
    metrics: dict[str, float]  # by name
    twins: int = 0  # further designs with these metrics, which differ in knobs that do not act


@dataclass(frozen=True)
class Elite:
    """The best design of a cell."""

    cell: tuple[int, int]  # its place on both axes, from 0
    design: Design  # the best by the objective


@dataclass(frozen=True)
class EliteMap:
    """The best design in each cell of two metrics; cells without a design are left out."""

    objective: str  # what is best, NAME:max or NAME:min
    axes: tuple[str, str]  # names of the metrics
    log: tuple[bool, bool]  # whether cells have equal ratios, not equal widths
    # Where cells begin and end, by axis; the first and the last one are open.
    edges: tuple[tuple[float, ...], tuple[float, ...]]
    elites: tuple[Elite, ...]  # by rising cell

    @property
    def size(self) -> int:
        """Number of cells, with a design or without."""
        one, two = (max(len(each) - 1, 0) for each in self.edges)
        return one * two

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, and the number of cells as `size`."""
        return asdict(self) | {"size": self.size}


def make_designs(
    points: Points, space: Space, twins: np.ndarray | None = None
) -> tuple[Design, ...]:
    """Returns the designs as records.

    Args:
        points: The designs, n of them.
        space: Their space.
        twins: `(n,)` number of the twins of each design; 0 if not given.
    """
    metrics = {name: overall(each) for name, each in points.metrics.items()}
    return tuple(
        Design(
            int(points.place[row]),
            dict(zip(space.names, points.values[row].tolist(), strict=True)),
            {name: float(each[row]) for name, each in metrics.items()},
            0 if twins is None else int(twins[row]),
        )
        for row in range(len(points.place))
    )


def make_map(elites: Elites, space: Space) -> EliteMap:
    """Returns the map as a record; it has no edges while no design meets the constraints.

    Args:
        elites: The best designs.
        space: Their space.
    """
    one, two = elites.axes
    names, log = (one.name, two.name), (one.log, two.log)
    if elites.points is None or not len(elites.points.place):
        return EliteMap(str(elites.objective), names, log, ((), ()), ())
    edges = tuple(one.edges.tolist()), tuple(two.edges.tolist())
    designs = make_designs(elites.points, space)
    cells = elites.cells_of(elites.points).tolist()
    found = (Elite((i, j), each) for (i, j), each in zip(cells, designs, strict=True))
    return EliteMap(str(elites.objective), names, log, edges, tuple(found))


def write_points(
    points: Points,
    knobs: Iterable[str],
    workloads: Sequence[str],
    *,
    before: Mapping[str, np.ndarray] | None = None,
    after: Mapping[str, np.ndarray] | None = None,
) -> str:
    """Returns designs as CSV: their number, knobs, metrics and the throughput of each workload.

    Args:
        points: The designs, n of them.
        knobs: Names of the knobs.
        workloads: Names of the workloads.
        before: Further columns by name, `(n,)`, on the left.
        after: Further columns by name, `(n,)`, on the right.
    """
    before, after, text = before or {}, after or {}, io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    throughputs = (f"tokens_per_second of {name}" for name in workloads)
    writer.writerow([*before, "index", *knobs, *points.metrics, *throughputs, *after])
    metrics = [overall(each) for each in points.metrics.values()]
    metrics += list(points.metrics["tokens_per_second"].T)
    for row, index in enumerate(points.place):
        writer.writerow(
            [
                *(f"{float(column[row]):.9g}" for column in before.values()),
                int(index),
                *(f"{value:.9g}" for value in points.values[row]),
                *(f"{float(column[row]):.7g}" for column in metrics),
                *(int(column[row]) for column in after.values()),
            ]
        )
    return text.getvalue()
