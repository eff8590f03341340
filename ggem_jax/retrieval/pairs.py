"""Pairs of similar vectors and the groups that they connect: exact, block by block, with NumPy."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

if TYPE_CHECKING:
    from ggem_jax.retrieval.vectors import Store

_ROWS = 2048  # vectors in a block: 16 MiB of cosines
_CLOSE = 1e-6  # largest error of a cosine in float32: a vector and its copy count as equal


def similar_pairs(
    database: "np.ndarray | Store", threshold: float, *, rows: int = _ROWS
) -> Iterator[tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"], Float[np.ndarray, " m"]]]:
    """Yields all pairs of vectors whose cosine is at least the threshold, block by block.

    Every vector is compared with every other one. In memory are two blocks of vectors, their
    cosines, and the pairs among them.

    Args:
        database: An array `(n, d)` (memory-mapped too) or a store, such as `Index.vectors()`.
        threshold: Least cosine, above 0 and at most 1. The cosines are computed in float32 and may
            be 1e-6 smaller.
        rows: Vectors in a block, at least 1.

    Yields:
        The ids of both sides, each smaller than the other, and the cosines, `(m,)` each.

    Raises:
        ValueError: The threshold or `rows` is out of range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be a cosine above 0 and at most 1, not {threshold!r}")
    if rows < 1:
        raise ValueError(f"a block must have at least one row, not {rows}")
    starts = range(0, database.shape[0], rows)
    for first in starts:
        left = _unit_block(database, first, rows)
        for second in starts[first // rows :]:
            right = left if second == first else _unit_block(database, second, rows)
            cosines = left @ right.T
            a, b = np.nonzero(cosines >= np.float32(threshold - _CLOSE))
            if second == first:
                a, b = a[a < b], b[a < b]
            if a.size:
                yield a + first, b + second, cosines[a, b]


def connected_groups(
    n: int, pairs: Iterator[tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]]
) -> list[Int[np.ndarray, " m"]]:
    """Returns the groups that pairs connect; ids without a pair are in none.

    Args:
        n: Number of ids.
        pairs: Blocks of pairs, the ids of both sides `(m,)`, from 0 to n - 1.

    Returns:
        The ids of each group in rising order; the groups in the order of their smallest ids.
    """
    smallest = np.arange(n)  # of the ids of the same group
    for a, b in pairs:
        while (apart := smallest[a] != smallest[b]).any():
            a, b = a[apart], b[apart]
            low, high = np.sort([smallest[a], smallest[b]], axis=0)
            np.minimum.at(smallest, high, low)
            while ((further := smallest[smallest]) != smallest).any():
                smallest = further
    order = np.argsort(smallest, kind="stable")
    groups = np.split(order, np.nonzero(np.diff(smallest[order]))[0] + 1) if n else []
    return [group for group in groups if group.size > 1]


def cosines_to(
    database: "np.ndarray | Store", one: int, ids: Int[np.ndarray, " m"]
) -> Float[np.ndarray, " m"]:
    """Returns the cosines of vectors with one of them.

    Args:
        database: An array or a store, as in `similar_pairs`.
        one: Id of the vector that the others are compared with.
        ids: Ids of the others, `(m,)`.

    Returns:
        The cosines, `(m,)` in float32.
    """
    (own,) = _unit(_take(database, np.array([one])))
    blocks = (ids[start : start + _ROWS] for start in range(0, len(ids), _ROWS))
    found = [_unit(_take(database, block)) @ own for block in blocks]
    return np.minimum(np.concatenate(found), np.float32(1)) if found else np.empty(0, np.float32)


def _unit_block(database: "np.ndarray | Store", start: int, rows: int) -> np.ndarray:
    return _unit(_take(database, np.arange(start, min(start + rows, database.shape[0]))))


def _take(database: "np.ndarray | Store", ids: np.ndarray) -> np.ndarray:
    return database[ids] if isinstance(database, np.ndarray) else database.take(ids)


def _unit(vectors: np.ndarray) -> Float[np.ndarray, "m d"]:
    wide = np.asarray(vectors, np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.float32(1e-20))
