"""Sobol indices: a known function, SciPy's estimates, lists, fixed knobs, impossible designs."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_neupims_explore_space import run

from neupims.exploration.evaluator import Evaluator
from neupims.exploration.sampling import unit_sample
from neupims.exploration.sobol import POSSIBLE, Index, draw_rows, estimate, sobol_indices
from neupims.exploration.space import make_space

FIRST, TOTAL = [0.3139, 0.4424, 0], [0.5576, 0.4424, 0.2437]  # of the Ishigami function


def ishigami(x):
    """Ishigami and Homma, 1990, with a = 7 and b = 0.1: x is (3, n), from -pi to pi."""
    return np.sin(x[0]) + 7 * np.sin(x[1]) ** 2 + 0.1 * x[2] ** 4 * np.sin(x[0])


def outputs(rows):
    units = np.pi * (2 * unit_sample(6, "sobol", 0, rows, seed=1).T - 1)
    a, b = units[:3], units[3:]
    mixed = [np.where(np.arange(3)[:, None] == column, b, a) for column in range(3)]
    return np.stack([ishigami(x) for x in (a, b, *mixed)])


def test_the_ishigami_function():
    """All indices are in their intervals, which shrink with the square root of the rows."""
    few, many = (estimate(outputs(rows)[None])[0] for rows in (1024, 16384))
    for found in (few, many):
        for column, truth in ((0, FIRST), (3, TOTAL)):
            value, low, high = found[:, column : column + 3].T
            assert ((low < truth) & (truth < high)).all()
            assert ((low < value) & (value < high)).all()
    assert many[:, 0] == pytest.approx(FIRST, abs=0.01)
    assert many[:, 3] == pytest.approx(TOTAL, abs=0.01)
    widths = [found[:, 5] - found[:, 4] for found in (few, many)]
    assert widths[0] / widths[1] == pytest.approx([4, 4, 4], rel=0.3)


def test_estimates_and_intervals_are_those_of_scipy():
    rows = outputs(256)
    found = estimate(np.stack([rows, 5 - 3 * rows]))
    other = stats.sobol_indices(
        func={"f_A": rows[:1], "f_B": rows[1:2], "f_AB": rows[2:, None]}, n=256
    )
    assert found[0][:, 0] == pytest.approx(other.first_order, abs=1e-12)
    assert found[0][:, 3] == pytest.approx(other.total_order, abs=1e-12)
    assert found[1] == pytest.approx(found[0], abs=1e-9)  # indices have no scale
    drawn = other.bootstrap(n_resamples=200)
    for column, part in ((0, drawn.first_order), (3, drawn.total_order)):
        ends = part.confidence_interval
        width = found[0][:, column + 2] - found[0][:, column + 1]
        assert width == pytest.approx(ends.high - ends.low, rel=0.25)


def test_an_output_that_is_missing_leaves_out_its_rows():
    rows = outputs(2048)
    holes = rows.copy()
    holes[:, np.random.default_rng(0).random(2048) < 0.5] = np.nan
    kept = rows[:, np.isfinite(holes[0])]
    assert estimate(holes[None])[0][:, [0, 3]] == pytest.approx(estimate(kept[None])[0][:, [0, 3]])
    some = rows.copy()
    some[2, :1024] = np.nan  # of the first knob alone
    found, whole = estimate(some[None])[0], estimate(rows[None])[0]
    assert found[1:, [0, 3]] == pytest.approx(whole[1:, [0, 3]])
    assert found[0, 0] != whole[0, 0]
    assert np.isnan(estimate(np.full((1, 5, 8), np.nan))).all()
    assert np.isnan(estimate(np.full((1, 5, 8), 3.3))).all()


def test_lists_whole_numbers_and_fixed_knobs():
    """y = c (2 a + b) with a in {0, 1}, b in {1, ..., 4}, and one value of c.

    The variance of 2 a is 1, that of b is 5/4.
    """
    space = make_space(
        {
            "hbm.trp_cycles": [0, 1],
            "npu.num_arrays": {"low": 1, "high": 4},
            "hbm.num_channels": [8],
        }
    )

    def evaluate(columns):
        a, b, c = (columns[name] * 1.0 for name in space.names)
        y = c * (2 * a + b)
        return {"y": jnp.stack([y, y], axis=1), "flagged": ((a == 1) & (b == 4))[:, None] * 3}

    points = Evaluator(space, evaluate, 64)(draw_rows(space, 4096, 0))
    found = sobol_indices(space, points)
    assert (found.rows, found.impossible) == (4096, pytest.approx(1 / 8, abs=0.01))
    fixed = found.metrics["y"]["hbm.num_channels"]
    assert fixed == Index(*[0.0] * 6)
    # a = 1 and b = 4 together are impossible: Var = p (1 - p) with p = 1/8; given a it is 0 or 1/4,
    # and given b it is 0 or 1/2.
    possible = found.metrics[POSSIBLE]
    p, of_a, of_b = 1 / 8, (1 / 8) ** 2, 3 / 4 * (1 / 8) ** 2 + 1 / 4 * (3 / 8) ** 2
    for name, first, other in (
        ("hbm.trp_cycles", of_a, of_b),
        ("npu.num_arrays", of_b, of_a),
    ):
        assert possible[name].first == pytest.approx(first / (p * (1 - p)), abs=0.03)
        assert possible[name].total == pytest.approx(1 - other / (p * (1 - p)), abs=0.03)
    whole = sobol_indices(
        space,
        Evaluator(space, lambda columns: {"y": evaluate(columns)["y"]}, 64)(
            draw_rows(space, 4096, 0)
        ),
    )
    assert POSSIBLE not in whole.metrics
    assert whole.metrics["y"]["hbm.trp_cycles"].total == pytest.approx(1 / 2.25, abs=0.02)
    assert whole.metrics["y"]["npu.num_arrays"].first == pytest.approx(1.25 / 2.25, abs=0.02)


def test_the_exploration_has_the_indices_of_all_metrics():
    """cost = arrays + channels, from 2 to 9 and in {1, 2, 4, 8}: variances 63/12 and 115/16."""
    found = run(points=16, index_rows=1024, chunk=512).indices
    assert set(found.metrics) == {"speed", "cost", POSSIBLE}
    assert found.impossible == pytest.approx(1 / 4, abs=0.02)
    assert found.metrics["cost"]["hbm.trcd_read_cycles"].total == 0
    assert found.metrics[POSSIBLE]["npu.num_arrays"].first == pytest.approx(1, abs=0.1)
    rows = found.table(["cost"])
    assert [row[1] for row in rows[:3]] == sorted(
        found.metrics["cost"], key=lambda knob: -found.metrics["cost"][knob].total
    )
    assert {row[0] for row in rows} == {"cost", POSSIBLE}
    assert run(points=16).indices is None
    with pytest.raises(ValueError, match="index_rows must be a whole number"):
        run(points=16, index_rows=-1)
