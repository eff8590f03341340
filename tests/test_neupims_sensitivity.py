"""Sensitivities of metrics to knobs: elasticities, first-order indices, and rank correlations."""

import numpy as np
import pytest
from test_neupims_explore_space import SPACE, run

from neupims.exploration.sensitivity import first_order, neighbours, rank_correlation
from neupims.exploration.space import make_space


def test_sensitivities_by_hand():
    """speed = a c / t: elasticities 1, 1 and -1 (between steps, nearly); of c alone ln varies
    most.
    """
    result = run(method="random", points=8192)
    found = result.sensitivities
    assert [found[name].elasticity for name in SPACE.names] == [
        pytest.approx(1, rel=1e-5),
        pytest.approx(1, rel=1e-5),
        pytest.approx(-1, rel=1e-5),
    ]
    assert (
        found["npu.num_arrays"].rank_correlation
        > 0
        > found["hbm.trcd_read_cycles"].rank_correlation
    )
    shares = [found[name].first_order for name in SPACE.names]
    assert max(shares) == shares[1]
    assert 0.8 < sum(shares) < 1


def test_first_order_index_of_a_sum_and_of_chance():
    """y = 2a + b of independent uniform a and b: 4/5 and 1/5 of the variance; c has none."""
    rng = np.random.default_rng(0)
    a, b, c = rng.random((3, 20000))
    y = 2 * a + b
    assert first_order(a, y) == pytest.approx(0.8, abs=0.01)
    assert first_order(b, y) == pytest.approx(0.2, abs=0.01)
    assert first_order(c, y) == pytest.approx(0, abs=0.005)
    assert first_order(np.round(3 * a), y) < 0.8
    assert np.isnan(first_order(np.ones(100), y[:100]))
    few = [
        first_order(*rng.random((2, 256))) for _ in range(40)
    ]  # 32 bins of 8 show 31 / 255 of the variance by chance, which is taken away
    assert np.mean(few) == pytest.approx(0, abs=0.03)


def test_rank_correlation_by_hand():
    """Ranks 1 2.5 2.5 4 and 1 3 2 4: covariance 4.5 / 4, variances 4.5 / 4 and 5 / 4."""
    found = rank_correlation(np.array([1.0, 5, 5, 9]), np.array([1.0, 30, 20, 4000]))
    assert found == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(rank_correlation(np.ones(5), np.arange(5.0)))
    assert np.isnan(rank_correlation(np.arange(5.0), np.ones(5)))
    assert np.isnan(rank_correlation(np.arange(2.0), np.arange(2.0)))


def test_neighbours_are_the_next_values():
    space = make_space(
        {
            "npu.num_arrays": {"low": 2, "high": 8},
            "hbm.num_channels": [16, 64, 32],
            "hbm.tfaw_cycles": {"low": 40, "high": 60},
        }
    )
    base, *others = neighbours(space).tolist()
    assert base == [8, 32, 40]  # tFAW is 30, below the range
    assert others == [[7, 32, 40], [8, 32, 40], [8, 16, 40], [8, 64, 40], [8, 32, 40], [8, 32, 44]]
