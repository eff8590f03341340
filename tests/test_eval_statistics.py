"""eval/statistics.py against worked examples."""

import numpy as np
import pytest

from eval.statistics import Interval, bootstrap, compare_paired, mean, proportion


def test_wilson_interval_of_a_published_example():
    """81 of 263: Wilson's interval is 0.2553 to 0.3662 (Newcombe, Statistics in Medicine 17, 1998,
    table I, method 3).
    """
    interval = proportion(np.arange(263) < 81)
    assert (interval.value, interval.low, interval.high) == pytest.approx(
        (81 / 263, 0.2553, 0.3662), abs=5e-5
    )


def test_an_interval_of_no_errors_does_not_end_at_one():
    interval = proportion(np.ones(20, bool))
    assert interval.value == 1
    assert 0.8 < interval.low < 0.9


def test_mean_of_three_values_by_hand():
    """1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.3027, half width 2.4841."""
    interval = mean(np.array([1.0, 2.0, 3.0]))
    assert (interval.value, interval.low, interval.high) == pytest.approx(
        (2, 2 - 2.4841, 2 + 2.4841), abs=1e-4
    )
    assert np.isnan(mean(np.array([1.0])).low)


def test_the_t_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [mean(rng.normal(1.0, 2.0, 5)) for _ in range(2000)]
    covered = np.mean([interval.low <= 1.0 <= interval.high for interval in intervals])
    assert 0.935 < covered < 0.965


def test_mcnemar_by_hand():
    """10 images only the first has right, 2 only the second: 2 (C(12,0) + C(12,1) + C(12,2)) /
    2^12 = 0.03857.
    """
    first = np.array([True] * 10 + [False] * 2 + [True] * 30 + [False] * 5)
    second = np.array([False] * 10 + [True] * 2 + [True] * 30 + [False] * 5)
    result = compare_paired(first, second)
    assert (result.only_first, result.only_second) == (10, 2)
    assert result.p_value == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert result.difference.value == pytest.approx(8 / 47)
    assert compare_paired(first, first).p_value == 1


def test_different_images_cannot_be_paired():
    with pytest.raises(ValueError, match="same images"):
        compare_paired(np.ones(3, bool), np.ones(4, bool))


def test_intervals_are_printed_in_percent():
    assert str(Interval(0.5, 0.4, 0.6)) == "50.00 % [40.00, 60.00]"


def test_the_interval_of_a_difference_holds_its_level_where_two_hardly_differ():
    same = np.ones(360, bool)
    assert compare_paired(same, same).difference.low < -0.004
    few = np.zeros(10_000, bool)
    few[:4] = True
    found = compare_paired(few, np.zeros(10_000, bool))  # McNemar's p is 0.125
    assert found.difference.low < 0 < found.difference.high
    assert found.difference.value == pytest.approx(4e-4)
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        cell = rng.choice(3, 400, p=(0.98, 0.015, 0.005))  # a true difference of one in a hundred
        interval = compare_paired(cell == 1, cell == 2).difference
        covered += interval.low <= 0.01 <= interval.high
    assert covered / 500 >= 0.93


@pytest.mark.parametrize("answers", [[], [[True, False]], [0.5, 1.0]])
def test_what_are_no_answers_is_refused(answers):
    with pytest.raises(ValueError, match="true and false"):
        proportion(np.array(answers))
    with pytest.raises(ValueError, match="at least 1"):
        mean(np.array([]))


def test_bootstrap_of_many_values_is_that_of_the_normal_distribution():
    """1,000 values of deviation s: half width 1.96 s / sqrt(1,000). NaN is ignored."""
    values = np.random.default_rng(0).exponential(size=1000)
    interval = bootstrap(np.concatenate([values, [np.nan] * 50]))
    half = 1.96 * values.std() / np.sqrt(1000)
    assert interval.value == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.005
    )


def test_bootstrap_of_two_values_by_hand():
    """0 and 1: the means are 0, 1/2 and 1 with probabilities 1/4, 1/2 and 1/4."""
    assert bootstrap(np.array([0.0, 1.0])) == Interval(0.5, 0.0, 1.0)
    assert bootstrap(np.array([0.25])) == Interval(0.25, 0.25, 0.25)


@pytest.mark.parametrize("values", [np.array([]), np.array([np.nan]), np.ones((2, 2))])
def test_bootstrap_refuses(values):
    with pytest.raises(ValueError, match="at least one number"):
        bootstrap(values)
