"""What a pooling did to the channels: how much blocks of them depend on each other, and which of
them it made larger.

Descriptors are `(n, d)`, one row for each image; a block is a group of channels of equal size,
and `blocks` says which: `(groups, d / groups)` numbers of channels, as `contiguous`, `interleaved`
and `random_blocks` give them. Everything is computed in float64 with NumPy; memory grows with n^2
for `hsic`. The scores of dependence are those of the sample: of independent blocks they are above 0
by an amount that falls with n and grows with the channels, so compare them at equal n, and with
random blocks. Errors: `ValueError` for shapes that do not fit.
"""

from collections.abc import Callable
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

Blocks = Int[np.ndarray, "groups size"]


def contiguous(d: int, groups: int) -> Blocks:
    """Block g has the channels g d/groups ... (g + 1) d/groups - 1."""
    _require_groups(d, groups)
    return np.arange(d).reshape(groups, -1)


def interleaved(d: int, groups: int) -> Blocks:
    """Block g has the channels g, g + groups, g + 2 groups, ..."""
    _require_groups(d, groups)
    return np.arange(d).reshape(-1, groups).T


def random_blocks(d: int, groups: int, seed: int) -> Blocks:
    """Blocks of channels drawn at random: the null that blocks which mean something are compared
    with.
    """
    _require_groups(d, groups)
    return np.random.default_rng(seed).permutation(d).reshape(groups, -1)


def block_dependence(
    descriptors: Float[np.ndarray, "n d"],
    blocks: Blocks,
    score: Callable[[np.ndarray, np.ndarray], float],
) -> Float[np.ndarray, " pairs"]:
    """A score of dependence, such as `linear_cka`, of every pair of blocks."""
    x = _as_matrix(descriptors)
    return np.array([score(x[:, one], x[:, other]) for one, other in combinations(blocks, 2)])


def mean_correlation(x: Float[np.ndarray, "n a"], y: Float[np.ndarray, "n b"]) -> float:
    """Mean absolute Pearson correlation of the channels of one block with those of the other;
    constant channels count as uncorrelated.
    """
    x, y = _centre(x), _centre(y)
    lengths = np.outer(np.linalg.norm(x, axis=0), np.linalg.norm(y, axis=0))
    return float(np.mean(np.abs(x.T @ y) / np.where(lengths > 0, lengths, np.inf)))


def linear_cka(x: Float[np.ndarray, "n a"], y: Float[np.ndarray, "n b"]) -> float:
    """Linear centred kernel alignment, ||X^T Y||^2 / (||X^T X|| ||Y^T Y||) of centred columns: 0
    for uncorrelated, 1 for equal up to rotation.

    Reference: Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019,
        arXiv:1905.00414, section 3.
    """
    x, y = _centre(x), _centre(y)
    return _divide(np.sum((x.T @ y) ** 2), float(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def hsic(x: Float[np.ndarray, "n a"], y: Float[np.ndarray, "n b"]) -> float:
    """Normalised Hilbert-Schmidt independence criterion, kernels exp(-distance^2 / its median): 0
    for independent, 1 for equal.

    Reference: Gretton et al., "Measuring Statistical Dependence with Hilbert-Schmidt Norms", 2005;
        normalised as in arXiv:1905.00414.
    """
    kernels = [_gaussian_kernel(_centre(block)) for block in (x, y)]
    k, m = (
        kernel - kernel.mean(axis=0) - kernel.mean(axis=1)[:, None] + kernel.mean()
        for kernel in kernels
    )
    return _divide(np.sum(k * m), float(np.linalg.norm(k) * np.linalg.norm(m)))


DEPENDENCE: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "correlation": mean_correlation,
    "linear CKA": linear_cka,
    "HSIC": hsic,
}


def amplification(
    pooled: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, " d"]:
    """How much larger each channel is than under a reference pooling, such as the average of what
    is positive: ratio of the means over images.
    """
    pooled, reference = _as_matrix(pooled), _as_matrix(reference)
    if pooled.shape != reference.shape:
        raise ValueError(
            f"both descriptors must have the same shape, not {pooled.shape} and {reference.shape}"
        )
    below = reference.mean(axis=0)
    return pooled.mean(axis=0) / np.where(below > 0, below, np.inf)


def fisher_scores(
    descriptors: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " d"]:
    """How well each channel tells classes apart: variance of the class means over the mean variance
    inside classes, weighted by their images.
    """
    x, labels = _as_matrix(descriptors), np.asarray(labels)
    if labels.shape != x.shape[:1]:
        raise ValueError(f"labels must be ({len(x)},), not of shape {labels.shape}")
    between = within = np.zeros(x.shape[1])
    for label in np.unique(labels):
        own = x[labels == label]
        between = between + len(own) * (own.mean(axis=0) - x.mean(axis=0)) ** 2
        within = within + len(own) * own.var(axis=0)
    return between / np.where(within > 0, within, np.inf)


def rank_correlation(a: Float[np.ndarray, " d"], b: Float[np.ndarray, " d"]) -> float:
    """Spearman's correlation of two scores of the channels, equal ones sharing their rank; 0 where
    one of them is constant.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(stats.spearmanr(a, b).statistic)


def gini(values: Float[np.ndarray, " d"]) -> float:
    """How unequally a positive quantity is spread over the channels: 0 where all have the same,
    towards 1 where one has all.
    """
    ascending = np.sort(np.asarray(values, float))
    n = len(ascending)
    return _divide(
        float(2 * (np.arange(1, n + 1) @ ascending)), n * float(ascending.sum()), less=(n + 1) / n
    )


def _gaussian_kernel(x: np.ndarray) -> np.ndarray:
    squared = np.maximum(np.sum(x**2, axis=1)[:, None] + np.sum(x**2, axis=1) - 2 * x @ x.T, 0)
    median = np.median(squared[np.triu_indices(len(x), 1)]) if len(x) > 1 else 0.0
    return np.exp(-squared / (median if median > 0 else 1.0))


def _divide(above: float, below: float, less: float = 0.0) -> float:
    return float(above / below - less) if below > 0 else 0.0


def _centre(x: np.ndarray) -> np.ndarray:
    x = _as_matrix(x)
    return x - x.mean(axis=0)


def _as_matrix(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or not len(x):
        raise ValueError(f"descriptors must be (n, d) with n at least 1, not of shape {x.shape}")
    return x


def _require_groups(d: int, groups: int) -> None:
    if groups < 1 or d % groups:
        raise ValueError(f"{d} channels cannot be split into {groups} blocks of equal size")
