"""Intervals and paired tests for accuracies. All intervals are at 95 %."""

from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} % [{100 * self.low:.2f}, {100 * self.high:.2f}]"


def proportion(correct: np.ndarray) -> Interval:
    """Share of true entries `(n,)` with Wilson's score interval: E. B. Wilson, JASA 22, 1927."""
    successes, n = int(np.sum(correct)), len(correct)
    interval = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return Interval(successes / n, interval.low, interval.high)


def mean(values: np.ndarray) -> Interval:
    """Mean of independent values `(n,)`, such as seeds, with Student's t interval; one value has no interval."""
    values = np.asarray(values, float)
    centre, n = float(values.mean()), len(values)
    if n < 2:
        return Interval(centre, float("nan"), float("nan"))
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Interval(centre, centre - half, centre + half)


@dataclass(frozen=True)
class Paired:
    """Two classifiers on the same pictures."""

    difference: Interval  # accuracy of the first less that of the second
    only_first: int  # pictures that only the first has right
    only_second: int
    p_value: float  # McNemar's exact test that both are equally likely


def paired(first: np.ndarray, second: np.ndarray) -> Paired:
    """Compares two `(n,)` arrays of right and wrong answers: Q. McNemar, Psychometrika 12, 1947, in its exact form."""
    if first.shape != second.shape:
        raise ValueError(f"both must answer the same pictures, not {first.shape} and {second.shape}")
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    discordant = only_first + only_second
    p_value = stats.binomtest(only_first, discordant).pvalue if discordant else 1.0
    return Paired(mean(first.astype(float) - second.astype(float)), only_first, only_second, float(p_value))
