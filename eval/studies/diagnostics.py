"""Measures what a pooling did to the channels: dependence of blocks, amplification, and more.

Descriptors are `(n, d)`, one row for each image. A block is a group of channels of equal size;
`blocks` are `(groups, d / groups)` numbers of channels, as `contiguous`, `interleaved` and
`random_blocks` return them. Everything is computed in float64 with NumPy; the memory of `hsic`
grows with n^2. Scores of dependence are those of the sample: for independent blocks they lie above
0 by an amount that falls with n and grows with the channels. Compare them at equal n, and with
random blocks. Shapes that do not fit raise `ValueError`.
"""

from collections.abc import Callable
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int, Real
from scipy import stats

Blocks = Int[np.ndarray, "groups size"]


def contiguous(d: int, groups: int) -> Blocks:
    """Returns blocks of neighbouring channels, `(groups, d / groups)`.

    Block g has the channels g d/groups ... (g + 1) d/groups - 1.

    Args:
        d: Number of channels.
        groups: Number of blocks, a divisor of `d`.

    Raises:
        ValueError: The blocks would not have equal sizes.
    """
    _require_groups(d, groups)
    return np.arange(d).reshape(groups, -1)


def interleaved(d: int, groups: int) -> Blocks:
    """Returns interleaved blocks of channels, `(groups, d / groups)`.

    Block g has the channels g, g + groups, g + 2 groups, ...

    Args:
        d: Number of channels.
        groups: Number of blocks, a divisor of `d`.

    Raises:
        ValueError: The blocks would not have equal sizes.
    """
    _require_groups(d, groups)
    return np.arange(d).reshape(-1, groups).T


def random_blocks(d: int, groups: int, seed: int) -> Blocks:
    """Returns blocks of channels drawn at random, `(groups, d / groups)`.

    They are the null that meaningful blocks are compared with.

    Args:
        d: Number of channels.
        groups: Number of blocks, a divisor of `d`.
        seed: Seed of the draw.

    Raises:
        ValueError: The blocks would not have equal sizes.
    """
    _require_groups(d, groups)
    return np.random.default_rng(seed).permutation(d).reshape(groups, -1)


def block_dependence(
    descriptors: Float[np.ndarray, "n d"],
    blocks: Blocks,
    score: Callable[[np.ndarray, np.ndarray], float],
) -> Float[np.ndarray, " pairs"]:
    """Returns a score of dependence for every pair of blocks, `(pairs,)`.

    Args:
        descriptors: Descriptors `(n, d)`.
        blocks: Numbers of the channels of each block, `(groups, d / groups)`.
        score: Function of two blocks `(n, size)`, such as `linear_cka`.
    """
    x = _as_matrix(descriptors)
    return np.array([score(x[:, one], x[:, other]) for one, other in combinations(blocks, 2)])


def mean_correlation(x: Float[np.ndarray, "n a"], y: Float[np.ndarray, "n b"]) -> float:
    """Returns the mean absolute Pearson correlation between the channels of two blocks.

    Constant channels count as uncorrelated.

    Args:
        x: Channels of one block, `(n, a)`.
        y: Channels of the other block for the same images, `(n, b)`.
    """
    x, y = _centre(x), _centre(y)
    lengths = np.outer(np.linalg.norm(x, axis=0), np.linalg.norm(y, axis=0))
    return float(np.mean(np.abs(x.T @ y) / np.where(lengths > 0, lengths, np.inf)))


def linear_cka(x: Float[np.ndarray, "n a"], y: Float[np.ndarray, "n b"]) -> float:
    """Returns the linear centred kernel alignment of two blocks, from 0 to 1.

    ||X^T Y||^2 / (||X^T X|| ||Y^T Y||) of centred columns: 0 for uncorrelated blocks, 1 for blocks
    that are equal up to a rotation.

    Args:
        x: Channels of one block, `(n, a)`.
        y: Channels of the other block for the same images, `(n, b)`.

    Reference: Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019,
    arXiv:1905.00414, section 3.
    """
    x, y = _centre(x), _centre(y)
    return _divide(np.sum((x.T @ y) ** 2), float(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def hsic(x: Float[np.ndarray, "n a"], y: Float[np.ndarray, "n b"]) -> float:
    """Returns the normalised Hilbert-Schmidt independence criterion of two blocks, from 0 to 1.

    The kernels are exp(-distance^2 / its median): 0 for independent blocks, 1 for equal ones.

    Args:
        x: Channels of one block, `(n, a)`.
        y: Channels of the other block for the same images, `(n, b)`.

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
    """Returns how much larger each channel is than under a reference pooling, `(d,)`.

    It is the ratio of the means over images; 0 where the reference is not positive.

    Args:
        pooled: Descriptors `(n, d)`.
        reference: Descriptors `(n, d)` of the same images under the reference pooling, such as the
            average of positive values.

    Raises:
        ValueError: The shapes differ.
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
    """Returns how well each channel separates the classes, `(d,)`.

    It is the variance of the class means over the mean variance inside classes, weighted by the
    number of images of each class; 0 where no class varies.

    Args:
        descriptors: Descriptors `(n, d)`.
        labels: Label of each image, `(n,)`.

    Raises:
        ValueError: There is not one label for each image.
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


def rank_correlation(a: Real[np.ndarray, " d"], b: Real[np.ndarray, " d"]) -> float:
    """Returns Spearman's rank correlation of two scores; 0 where one of them is constant.

    Args:
        a: A score of each channel, `(d,)`.
        b: Another score of each channel, `(d,)`.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(stats.spearmanr(a, b).statistic)


def gini(values: Real[np.ndarray, " d"]) -> float:
    """Returns the Gini coefficient of a positive quantity over the channels.

    It is 0 where all channels have the same, and close to 1 where one channel has everything.

    Args:
        values: The quantity of each channel, `(d,)`; 0 is returned where the sum is not positive.
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
