"""Intervals and paired tests for accuracies and for means over queries, all at 95 %."""

from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; printed in percent."""

    value: float  # shares and accuracies are from 0 to 1
    low: float  # lower end; NaN where there is no interval
    high: float  # upper end; NaN where there is no interval

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} % [{100 * self.low:.2f}, {100 * self.high:.2f}]"


def proportion(correct: np.ndarray) -> Interval:
    """Returns the share of true entries of `(n,)` with Wilson's score interval.

    Args:
        correct: Right and wrong answers `(n,)`, as booleans or as 0 and 1.

    Raises:
        ValueError: There is no answer, or there are other values or axes.

    Reference: E. B. Wilson, Journal of the American Statistical Association 22, 1927.
    """
    correct = _answers(correct)
    successes, n = int(correct.sum()), len(correct)
    interval = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return Interval(successes / n, interval.low, interval.high)


def mean(values: np.ndarray) -> Interval:
    """Returns the mean of independent values `(n,)`, such as seeds, with Student's t interval.

    Args:
        values: The values `(n,)`. The interval of a single value has NaN at both ends.

    Raises:
        ValueError: There is no value, or there is more than one axis.
    """
    values = np.asarray(values, float)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be (n,) with n at least 1, not of shape {values.shape}")
    centre, n = float(values.mean()), len(values)
    if n < 2:
        return Interval(centre, float("nan"), float("nan"))
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Interval(centre, centre - half, centre + half)


def bootstrap(values: np.ndarray, *, draws: int = 10_000, seed: int = 0) -> Interval:
    """Returns the mean of values with the percentile interval of resampled means.

    The interval treats the values as independent, and is too narrow where there are few. That of a
    single value is the value itself.

    Args:
        values: Values `(n,)`, such as average precisions of queries. NaN is left out.
        draws: Number of resamples of n values, drawn with replacement.
        seed: Seed of the resamples.

    Raises:
        ValueError: There is no number, or there is more than one axis.

    Reference: B. Efron, The Annals of Statistics 7, 1979.
    """
    values = np.asarray(values, float)
    values = values[~np.isnan(values)] if values.ndim == 1 else values
    if values.ndim != 1 or not len(values):
        raise ValueError(
            f"values must be (n,) with at least one number, not of shape {values.shape}"
        )
    if len(values) == 1:
        return Interval(float(values[0]), float(values[0]), float(values[0]))
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=draws,
        batch=max(1, 1_000_000 // len(values)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(values.mean()), float(found.low), float(found.high))


def pigeonhole_bootstrap(values: np.ndarray, *, draws: int = 2000, seed: int = 0) -> Interval:
    """Returns the mean of values with an interval for other seeds and other images.

    Seeds and images are resampled independently. The percentile interval is widened to Student's t
    interval over seeds where that reaches further, because a bootstrap of few seeds alone is too
    narrow.

    Args:
        values: Finite values `(seeds, images)`, such as differences of right answers.
        draws: Number of resamples.
        seed: Seed of the resamples.

    Raises:
        ValueError: The values are not finite, or do not have two axes.

    Reference: A. B. Owen, "The pigeonhole bootstrap", The Annals of Applied Statistics 1, 2007,
    arXiv:0712.1111.
    """
    values = np.asarray(values, float)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(
            "values must be finite and (seeds, images), at least one of each, not of shape"
            f" {values.shape}"
        )
    rng = np.random.default_rng(seed)
    rows, columns = (
        rng.multinomial(count, np.full(count, 1 / count), size=draws) / count
        for count in values.shape
    )
    means = np.einsum("kr,kr->k", rows, columns @ values.T)
    low, high = np.quantile(means, (0.025, 0.975))
    over_seeds = mean(values.mean(axis=1))  # its ends are NaN for one seed
    return Interval(
        float(values.mean()),
        float(np.fmin(low, over_seeds.low)),
        float(np.fmax(high, over_seeds.high)),
    )


@dataclass(frozen=True)
class PairedTest:
    """Two classifiers compared on the same images."""

    difference: Interval  # accuracy of the first less that of the second
    only_first: int  # images that only the first has right
    only_second: int  # images that only the second has right
    p_value: float  # of McNemar's exact test, under which both counts are equally likely


def compare_paired(first: np.ndarray, second: np.ndarray) -> PairedTest:
    """Compares two classifiers by their right and wrong answers to the same images.

    The p-value is McNemar's exact test. The interval of the difference adds half an image to each
    cell of the two-by-two table, which keeps its coverage near 95 % where the two hardly differ.

    Args:
        first: Answers `(n,)` of the first, as booleans or as 0 and 1.
        second: Answers `(n,)` of the second, in the same order.

    Returns:
        Accuracy of the first less that of the second, the numbers of images that only one has
        right, and the p-value.

    Raises:
        ValueError: The arrays have different lengths, or hold something else.

    Reference: Q. McNemar, Psychometrika 12, 1947; A. Agresti and Y. Min, Statistics in Medicine 24,
    2005.
    """
    first, second = _answers(first), _answers(second)
    if first.shape != second.shape:
        raise ValueError(f"both must answer the same images, not {first.shape} and {second.shape}")
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    discordant = only_first + only_second
    p_value = stats.binomtest(only_first, discordant).pvalue if discordant else 1.0
    n, a, b = len(first) + 2, only_first + 0.5, only_second + 0.5
    half = stats.norm.ppf(0.975) * np.sqrt(a + b - (a - b) ** 2 / n) / n
    difference = Interval(
        (only_first - only_second) / len(first),
        max((a - b) / n - half, -1.0),
        min((a - b) / n + half, 1.0),
    )
    return PairedTest(difference, only_first, only_second, float(p_value))


def _answers(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or not len(values) or not np.isin(values, (0, 1)).all():
        raise ValueError(
            "right and wrong answers must be (n,) of true and false, n at least 1, not"
            f" {values.dtype} of shape {values.shape}"
        )
    return values.astype(bool)
