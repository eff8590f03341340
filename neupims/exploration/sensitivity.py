"""How much a result depends on each knob: near one design, and over a sample of the whole space."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from neupims.exploration.space import Knob, Space

STEP = 0.1  # of a number near its base value
BINS = 32  # of a knob's values, of about as many designs each
LEAST_IN_BIN = 8


class Sensitivity(NamedTuple):
    """Of one result to one knob. NaN where it has no value."""

    elasticity: float  # per cent of the result for one per cent of the knob, at the base design
    rank_correlation: float  # Spearman's, over the sample
    first_order: float  # share of the sample's variance that this knob alone explains


def neighbours(space: Space) -> Float[np.ndarray, "1+2k k"]:
    """The base design, and for each knob the two designs with its next lower and higher value.

    The next value is `STEP` away, at least one for a whole number, or beside it in a list, and the
    base where there is none. Base values are those of the space's `base`, moved into a knob's
    range.
    """
    base = np.array([_inside(knob, space.base[knob.name]) for knob in space.knobs])
    rows = [base]
    for column, knob in enumerate(space.knobs):
        for value in _beside(knob, base[column]):
            row = base.copy()
            row[column] = value
            rows.append(row)
    return np.stack(rows)


def _inside(knob: Knob, value: float) -> float:
    if knob.values:
        return min(knob.values, key=lambda other: abs(other - value))
    return float(np.clip(value, knob.low, knob.high))


def _beside(knob: Knob, value: float) -> tuple[float, float]:
    if knob.values:
        ordered = sorted(knob.values)
        place = ordered.index(value)
        return ordered[max(place - 1, 0)], ordered[min(place + 1, len(ordered) - 1)]
    step = abs(value) * STEP if value else (knob.high - knob.low) * STEP
    if knob.whole:
        step = max(1, round(step))
    return max(value - step, knob.low), min(value + step, knob.high)


def elasticities(
    space: Space, values: Float[np.ndarray, "1+2k k"], results: Float[np.ndarray, " 1+2k"]
) -> Float[np.ndarray, " k"]:
    """d ln(result) / d ln(knob) between the two neighbours of the base design, as `neighbours`
    lists them; a neighbour without a result gives its place to the base. NaN where a knob has but
    one value, or one of 0.
    """
    found = np.full(len(space.knobs), np.nan)
    for column in range(len(space.knobs)):
        low, high = (
            row if np.isfinite(results[row]) else 0 for row in (2 * column + 1, 2 * column + 2)
        )
        ends = np.array([values[low, column], values[high, column], results[low], results[high]])
        if values[low, column] != values[high, column] and (ends > 0).all():
            found[column] = np.log(ends[3] / ends[2]) / np.log(ends[1] / ends[0])
    return found


def rank_correlation(column: Float[np.ndarray, " n"], results: Float[np.ndarray, " n"]) -> float:
    """Spearman's rank correlation, ties at their mean rank. NaN where either does not vary."""
    first, second = (_mean_ranks(each) for each in (column, results))
    if len(column) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[place]


def first_order(column: Float[np.ndarray, " n"], results: Float[np.ndarray, " n"]) -> float:
    """Variance of the mean result given the knob, as a share of all variance: the first-order Sobol
    index, for knobs drawn independently.

    Means are of bins of the knob's values; what bins of that size would show of a knob without
    effect is taken away, so a little below 0 is none. Li and Mahadevan, "An efficient modularized
    sample-based method to estimate the first-order Sobol' index", 2016.
    """
    distinct = np.unique(column)
    variance = float(np.var(results)) if len(results) else 0.0
    if len(distinct) < 2 or variance == 0:
        return float("nan")
    bins = min(BINS, len(column) // LEAST_IN_BIN)
    if len(distinct) <= bins:
        place = np.searchsorted(distinct, column)
    else:
        edges = np.quantile(column, np.linspace(0, 1, bins + 1)[1:-1]) if bins > 1 else np.array([])
        place = np.searchsorted(edges, column, side="right")
    counts = np.bincount(place)
    means = np.bincount(place, weights=results) / np.maximum(counts, 1)
    between = float(np.sum(counts * (means - np.mean(results)) ** 2)) / len(column)
    used, n = int(np.sum(counts > 0)), len(column)
    within = variance - between
    by_chance = within * (used - 1) / max(n - used, 1)
    return (between - by_chance) / variance


def sensitivities(
    space: Space, near: tuple[np.ndarray, np.ndarray], sample: tuple[np.ndarray, np.ndarray]
) -> dict[str, Sensitivity]:
    """Of one result to each knob, from (values, results) of `neighbours` and of a sample of
    independent draws. Results that are not finite are left out.
    """
    local = elasticities(space, *near)
    values, results = sample
    sound = np.isfinite(results)
    values, results = values[sound], results[sound]
    return {
        knob.name: Sensitivity(
            float(local[column]),
            rank_correlation(values[:, column], results),
            first_order(values[:, column], results),
        )
        for column, knob in enumerate(space.knobs)
    }
