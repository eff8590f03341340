"""eval/studies/diagnostics.py: scores of dependence and amplification against cases with known
answers.
"""

import numpy as np
import pytest
from scipy import stats

from eval.studies import diagnostics

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4))


def test_blocks_by_hand_and_every_channel_once():
    np.testing.assert_array_equal(diagnostics.contiguous(6, 2), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(diagnostics.interleaved(6, 2), [[0, 2, 4], [1, 3, 5]])
    drawn = diagnostics.random_blocks(12, 3, 5)
    np.testing.assert_array_equal(np.sort(drawn.ravel()), np.arange(12))
    assert not np.array_equal(drawn, diagnostics.random_blocks(12, 3, 6))
    for function in (diagnostics.contiguous, diagnostics.interleaved):
        with pytest.raises(ValueError, match="7 channels cannot be split into 2 blocks"):
            function(7, 2)


@pytest.mark.parametrize("score", diagnostics.DEPENDENCE)
def test_equal_blocks_depend_wholly_and_independent_ones_hardly(score):
    function = diagnostics.DEPENDENCE[score]
    many, others = RNG.normal(size=(500, 1)), RNG.normal(size=(500, 1))
    assert function(many, many) == pytest.approx(1)
    assert function(many, others) < 0.1
    assert 0.05 < function(many, many + 2 * others) < 0.95


@pytest.mark.parametrize("score", ["linear CKA", "HSIC"])
def test_rotation_scale_and_shift_change_nothing(score):
    rotation = np.linalg.qr(RNG.normal(size=(4, 4)))[0]
    other = X @ RNG.normal(size=(4, 3)) + RNG.normal(size=(60, 3))
    function = diagnostics.DEPENDENCE[score]
    assert function(5 * X @ rotation + 7, other) == pytest.approx(function(X, other))


def test_hsic_sees_what_correlation_does_not():
    line = RNG.normal(size=(400, 1))
    parabola = line**2 - np.mean(line**2)
    assert diagnostics.linear_cka(line, parabola) < 0.05
    assert diagnostics.hsic(line, parabola) > 0.3


def test_hsic_is_the_trace_of_the_centred_kernels():
    y = RNG.normal(size=(60, 2)) + X[:, :2]

    def kernel(x):
        squared = np.array([[np.sum((a - b) ** 2) for b in x] for a in x])
        return np.exp(-squared / np.median(squared[np.triu_indices(60, 1)]))

    centring = np.eye(60) - 1 / 60
    k, m = centring @ kernel(X) @ centring, centring @ kernel(y) @ centring
    assert diagnostics.hsic(X, y) == pytest.approx(
        np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))
    )


def test_mean_correlation_is_that_of_numpy_and_constant_channels_count_as_none():
    y = RNG.normal(size=(60, 3)) + X[:, :3]
    expected = np.abs(np.corrcoef(X.T, y.T)[:4, 4:]).mean()
    assert diagnostics.mean_correlation(X, y) == pytest.approx(expected)
    assert diagnostics.mean_correlation(X, np.column_stack([y, np.ones(60)])) == pytest.approx(
        expected * 3 / 4
    )
    for score in diagnostics.DEPENDENCE.values():
        assert score(np.ones((5, 2)), X[:5]) == pytest.approx(0, abs=1e-12)


def test_every_pair_of_blocks_has_its_score():
    scores = diagnostics.block_dependence(
        X, np.array([[0, 1], [2, 3], [1, 0]]), diagnostics.linear_cka
    )
    np.testing.assert_allclose(
        scores,
        [
            diagnostics.linear_cka(X[:, [0, 1]], X[:, [2, 3]]),
            1,
            diagnostics.linear_cka(X[:, [2, 3]], X[:, [0, 1]]),
        ],
    )


def test_amplification_is_the_ratio_of_means():
    np.testing.assert_allclose(
        diagnostics.amplification(np.array([[2.0, 6], [4, 0]]), np.array([[1.0, 1], [1, 2]])),
        [3, 2],
    )
    np.testing.assert_allclose(diagnostics.amplification(np.ones((2, 1)), np.zeros((2, 1))), [0])
    with pytest.raises(ValueError, match="same shape"):
        diagnostics.amplification(X, X[:, :2])


def test_fisher_scores_by_hand():
    """Channel 0: class means 0 and 4, variance inside 1: 2^2 / 1. Channel 1: the same in both
    classes. Channel 2: no variance inside.
    """
    x = np.array([[-1.0, 0, 3], [1, 2, 3], [3, 0, 3], [5, 2, 3]])
    np.testing.assert_allclose(diagnostics.fisher_scores(x, np.array([0, 0, 1, 1])), [4, 0, 0])
    with pytest.raises(ValueError, match="labels"):
        diagnostics.fisher_scores(x, np.array([0, 1]))


def test_rank_correlation_is_spearmans_with_ties():
    a, b = RNG.integers(0, 5, 40).astype(float), RNG.normal(size=40)
    assert diagnostics.rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert diagnostics.rank_correlation(np.arange(5), np.arange(5) ** 3) == pytest.approx(1)
    assert diagnostics.rank_correlation(np.ones(5), np.arange(5)) == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 1, 1, 1], 0), ([0, 0, 0, 1], 0.75), ([1, 3], 0.25)],
    ids=["equal", "one", "two"],
)
def test_gini_by_hand(values, expected):
    assert diagnostics.gini(np.array(values)) == pytest.approx(expected)


def test_what_is_no_table_of_descriptors_is_refused():
    with pytest.raises(ValueError, match=r"descriptors must be \(n, d\)"):
        diagnostics.linear_cka(np.zeros(3), np.zeros(3))
