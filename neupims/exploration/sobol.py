"""Sobol indices of every metric to every knob, of first order and in total, with intervals.

The variance of a metric over a space is divided among its knobs. The first-order index of a knob
is the share that the knob explains alone, its total index the share that would remain if only this
knob varied. Both need designs in rows: A, B, and for each knob A with that knob's value of B.

SciPy's `sobol_indices` has the same estimators. It is the reference of the tests, but takes only
whole powers of 2 of rows, so that none could be left out where a design is impossible, and its
intervals take a jackknife over the rows.

References: Saltelli et al., "Variance based sensitivity analysis of model output", 2010, table 2 (b
and f); Jansen, "Analysis of variance designs for model output", 1999.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from neupims.exploration.points import Points, result
from neupims.exploration.sampling import unit_sample
from neupims.exploration.space import Space

ROWS = 1024
RESAMPLES = 200  # of the rows, for intervals
COVERED = 0.95  # share of the resamples inside of an interval
VARIES = 1e-12  # least variance in squares of the mean: below are roundings of single precision
POSSIBLE = "possible"  # name of the output that is 1 for a possible design and 0 for others
COLUMNS = ("metric", "knob", "first order", "95 % interval", "total", "95 % interval")


class Index(NamedTuple):
    """Indices of one metric to one knob; NaN where the metric does not vary, or no row is left."""

    first: float  # share of the variance that the knob explains alone
    first_low: float  # where its interval begins
    first_high: float  # where its interval ends
    total: float  # share of the variance in which the knob takes part
    total_low: float  # where its interval begins
    total_high: float  # where its interval ends


class Indices(NamedTuple):
    """Sobol indices of a space."""

    rows: int  # of the sample, each with one design for each knob and two more
    impossible: float  # share of its designs that are impossible, which are left out
    metrics: dict[str, dict[str, Index]]  # by metric, then by knob

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        metrics = {
            name: {knob: each._asdict() for knob, each in of_knobs.items()}
            for name, of_knobs in self.metrics.items()
        }
        return {"rows": self.rows, "impossible": self.impossible, "metrics": metrics}

    @property
    def about(self) -> str:
        """A sentence about the sample."""
        left_out = (
            f"; {self.impossible:.1%} of its designs are impossible and left out"
            if self.impossible
            else ""
        )
        return (
            f"The indices are of {self.rows} rows of designs, whatever the constraints{left_out}."
        )

    def table(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """Returns rows of a table, with the cells of `COLUMNS`.

        The knobs of a metric are sorted by their total index.

        Args:
            names: Names of the metrics; `POSSIBLE` is added where it has indices.
        """
        rows: list[tuple[str, ...]] = []
        for name in (*names, *({POSSIBLE} & set(self.metrics))):
            knobs = self.metrics[name].items()
            for knob, each in sorted(knobs, key=lambda item: -np.nan_to_num(item[1].total)):
                rows.append((name, knob, *_show(*each[:3]), *_show(*each[3:])))
        return rows


def _show(value: float, low: float, high: float) -> tuple[str, str]:
    """An index and its interval as text; a dash where the metric does not vary."""
    return (f"{value:.3f}", f"{low:.3f} to {high:.3f}") if np.isfinite(value) else ("-", "-")


def draw_rows(space: Space, rows: int, seed: int) -> Float[np.ndarray, "m k"]:
    """Returns the designs of all rows: A, B, and for each knob A with its value of B.

    Args:
        space: The space with k knobs.
        rows: Their number, best a power of 2.
        seed: Seed of the scrambled Sobol sequence.

    Returns:
        `((2 + k) * rows, k)` values of the knobs.

    Raises:
        ImportError: SciPy is not installed.
    """
    knobs = len(space.knobs)
    units = unit_sample(2 * knobs, "sobol", 0, rows, seed=seed)
    a, b = space.values(units[:, :knobs]), space.values(units[:, knobs:])
    mixed = np.repeat(a[None], knobs, axis=0)
    for column in range(knobs):
        mixed[column, :, column] = b[:, column]
    return np.concatenate([a, b, *mixed])


def sobol_indices(space: Space, points: Points, *, seed: int = 0) -> Indices:
    """Returns the indices of all metrics, and of whether a design is possible if not all are.

    Args:
        space: The space with k knobs.
        points: The designs of `draw_rows`, evaluated.
        seed: Seed of the resamples.
    """
    knobs = len(space.knobs)
    sound = points.code == 0
    outputs = {name: result(points, name) for name in points.metrics}
    if not sound.all():
        outputs[POSSIBLE] = sound * 1.0
    found = estimate(np.stack([*outputs.values()]).reshape(len(outputs), 2 + knobs, -1), seed=seed)
    return Indices(
        rows=len(points.place) // (2 + knobs),
        impossible=1 - float(sound.mean()),
        metrics={
            name: {
                knob: Index(*each.tolist())
                for knob, each in zip(space.names, of_knobs, strict=True)
            }
            for name, of_knobs in zip(outputs, found, strict=True)
        },
    )


def estimate(outputs: Float[np.ndarray, "s r n"], *, seed: int = 0) -> Float[np.ndarray, "s k 6"]:
    """Returns the indices of s outputs to k knobs, with intervals, in the order of `Index`.

    Where an output is NaN, each estimate leaves out the rows that it needs it of.

    Args:
        outputs: `(s, 2 + k, n)` outputs of n rows: of A, of B, and of A with each knob of B.
        seed: Seed of the resamples.

    Returns:
        `(s, k, 6)` indices.
    """
    with np.errstate(all="ignore"):
        known = np.isfinite(outputs[:, :2]).sum(axis=(1, 2), keepdims=True)
        centre = np.nansum(outputs[:, :2], axis=(1, 2), keepdims=True) / known
    a, b, mixed = outputs[:, :1] - centre, outputs[:, 1:2] - centre, outputs[:, 2:] - centre
    both = np.concatenate([a, b], axis=1)
    terms = [b * (mixed - a), (a - mixed) ** 2 / 2, both, both**2]
    parts = [part for term in terms for part in (np.nan_to_num(term), np.isfinite(term) * 1.0)]

    def indices(weights: np.ndarray) -> np.ndarray:
        """First-order and total indices, `(2, s, k)`, of weighted rows."""
        sums = [part @ weights for part in parts]
        with np.errstate(all="ignore"):
            first, total = sums[0] / sums[1], sums[2] / sums[3]
            mean = sums[4].sum(axis=1) / sums[5].sum(axis=1)
            variance = sums[6].sum(axis=1) / sums[7].sum(axis=1) - mean**2
            divided = np.stack([first, total]) / variance[:, None]
        varies = variance > VARIES * np.nan_to_num(centre[:, 0, 0]) ** 2
        return np.where(varies[:, None], divided, np.nan)

    rows, rng = outputs.shape[2], np.random.default_rng(seed)
    found = indices(np.ones(rows))
    drawn = np.stack(
        [
            indices(np.bincount(rng.integers(rows, size=rows), minlength=rows) * 1.0)
            for _ in range(RESAMPLES)
        ]
    )
    out = (1 - COVERED) / 2
    with np.errstate(all="ignore"):
        low, high = np.quantile(drawn, [out, 1 - out], axis=0)
    return np.stack([found, low, high]).transpose(2, 3, 1, 0).reshape(*found.shape[1:], 6)
