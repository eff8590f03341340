"""neupims/exploration/pareto.py against brute force and values worked by hand."""

import itertools
import sys

import numpy as np
import pytest

from neupims.exploration import pareto


def brute_ranks(rows: np.ndarray) -> list[int]:
    """Peels fronts row by row."""
    left, rank, found = set(range(len(rows))), 0, [len(rows)] * len(rows)
    left -= {i for i in left if not np.isfinite(rows[i]).all()}
    while left:
        now = {
            i
            for i in left
            if not any((rows[j] <= rows[i]).all() and (rows[j] < rows[i]).any() for j in left)
        }
        for i in now:
            found[i] = rank
        left, rank = left - now, rank + 1
    return found


def rows(seed: int, n: int, m: int, values: int | None) -> np.ndarray:
    """Random rows, some of them not finite. With `values`, entries take few values, so that some
    rows are equal.
    """
    rng = np.random.default_rng(seed)
    made = rng.random((n, m)) if values is None else rng.integers(0, values, (n, m)).astype(float)
    made[rng.random(n) < 0.1, rng.integers(m)] = np.nan
    made[rng.random(n) < 0.05, rng.integers(m)] = np.inf
    return made


@pytest.mark.parametrize(("m", "values"), [(1, 5), (2, None), (2, 4), (3, None), (3, 3), (4, None)])
def test_fronts_are_those_of_brute_force(m, values):
    for seed in range(5):
        made = rows(seed, 120, m, values)
        expected = brute_ranks(made)
        assert pareto.ranks(made).tolist() == expected
        assert pareto.front(made).tolist() == [i for i, rank in enumerate(expected) if rank == 0]


@pytest.mark.parametrize(
    ("most_x", "most_y", "expected"),
    [(False, True, [0, 1, 3]), (True, True, [3]), (False, False, [0]), (True, False, [0, 2, 3])],
)
def test_front_in_a_plane_by_hand(most_x, most_y, expected):
    x, y = np.array([1.0, 2, 3, 4]), np.array([1.0, 4, 3, 5])
    assert np.flatnonzero(pareto.in_plane(x, y, most_x=most_x, most_y=most_y)).tolist() == expected


def test_a_large_front_is_kept_whole():
    """Points of a line of which none dominates another, and each with a dominated twin."""
    x = np.random.default_rng(0).permutation(5000) / 5000
    line = np.stack([x, 1 - x], axis=1)
    assert pareto.front(np.concatenate([line + 0.5, line])).tolist() == list(range(5000, 10000))


def test_front_of_nothing():
    assert pareto.front(np.zeros((0, 2))).tolist() == []
    assert pareto.front(np.full((3, 2), np.nan)).tolist() == []


def test_crowding_by_hand():
    """Front 0 is (0, 4), (1, 2), (4, 0): the middle one's neighbours lie 4/4 and 4/4 apart. Front 1
    is one row. The last row is not finite.
    """
    made = np.array([[0.0, 4], [1, 2], [4, 0], [5, 5], [np.nan, 0]])
    rank = pareto.ranks(made)
    assert rank.tolist() == [0, 0, 0, 1, 5]
    assert pareto.crowding(made, rank).tolist() == [np.inf, 2, np.inf, np.inf, 0]


def test_crowding_in_a_front_of_five_by_hand():
    """x 0 1 2 6 10 and y 10 6 3 1 0: 2/10 + 7/10, 5/10 + 5/10, 8/10 + 3/10 inside."""
    made = np.array([[0.0, 10], [1, 6], [2, 3], [6, 1], [10, 0]])
    order = np.array([3, 0, 4, 2, 1])
    found = pareto.crowding(made[order], pareto.ranks(made[order]))
    assert found.tolist() == [
        pytest.approx(1.1),
        np.inf,
        np.inf,
        pytest.approx(1.0),
        pytest.approx(0.9),
    ]


@pytest.mark.parametrize(
    ("made", "reference", "volume"),
    [
        ([[1.0]], [3], 2),
        ([[1.0], [2]], [3], 2),
        ([[1, 1]], [3, 3], 4),
        ([[1, 2], [2, 1]], [3, 3], 2 + 2 - 1),
        ([[1, 2], [2, 1], [2, 2]], [3, 3], 3),
        ([[1, 3], [2, 2], [3, 1]], [4, 4], 3 + 2 + 1),
        ([[1, 1, 1]], [2, 3, 4], 1 * 2 * 3),
        (
            [[0, 1, 1], [1, 0, 1], [1, 1, 0]],
            [2, 2, 2],
            3 * 2 - 3 + 1,
        ),  # two units each, the unit cube common to all three
        ([[5, 0], [0, 5]], [4, 4], 0),
        ([[1, 1], [np.nan, 0], [-np.inf, 0]], [3, 3], 4),
        ([[1, 1], [1, 1]], [3, 3], 4),
    ],
)
def test_hypervolume_by_hand(made, reference, volume):
    assert pareto.hypervolume(np.array(made, float), np.array(reference)) == pytest.approx(volume)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_hypervolume_is_the_count_of_cells(m):
    """Whole coordinates: the volume is the number of unit cells that some row dominates."""
    rng, side = np.random.default_rng(m), 7 if m < 4 else 4
    for _ in range(20):
        made = rng.integers(0, side + 1, (rng.integers(1, 12), m))
        cells = sum(
            any((row <= cell).all() for row in made)
            for cell in itertools.product(range(side), repeat=m)
        )
        assert pareto.hypervolume(made.astype(float), np.full(m, float(side))) == pytest.approx(
            cells
        )


def test_hypervolume_refusals():
    with pytest.raises(ValueError, match="one number for each"):
        pareto.hypervolume(np.zeros((2, 2)), np.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        pareto.hypervolume(np.zeros((2, 2)), np.array([1, np.inf]))


def test_hypervolume_of_many_objectives():
    """One point: the product of its distances; two points: the sum less the common box."""
    low, high = np.full(7, 0.5), np.array([0.25, *[0.75] * 6])
    both = 0.5**7 + 0.75 * 0.25**6 - 0.5 * 0.25**6
    for rows, volume in ((low[None], 0.5**7), (np.stack([low, high]), both)):
        assert pareto.hypervolume(rows, np.ones(7)) == pytest.approx(volume, rel=2e-3)


def test_without_moocore_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "moocore", None)
    with pytest.raises(ImportError, match=r"moocore: pip install 'ggem-jax\[neupims\]'"):
        pareto.front(np.zeros((1, 2)))
