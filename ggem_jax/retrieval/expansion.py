"""Query expansion and database augmentation: vectors are averaged with their nearest neighbours,
and the search is done again.

Queries and vectors are `(q, d)` and `(n, d)`, unit vectors; averages are made unit vectors again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ggem_jax.retrieval.exact_search import Precision, check_precision, search, similarity
from ggem_jax.retrieval.vectors import (
    Database,
    Ranking,
    Store,
    blocks_of,
    check_database,
    check_queries,
    check_ranking,
    is_callback,
    make_sortable,
    on_device,
    shape_of,
    take_vectors,
)

_TOGETHER = 64  # queries, or rows of a database, whose neighbours are in memory at a time
_ROWS = 1024  # of a database that are augmented at a time


def average_query_expansion(
    queries: Float[Array, "q d"],
    database: Database,
    ranking: Ranking,
    *,
    num_neighbors: int = 10,
    precision: Precision = "float32",
) -> Ranking:
    """Searches again with the mean of each query and its first `num_neighbors` results; the ranking
    keeps its length.

    A database that is a callback cannot be searched: then the ids of the ranking are ordered anew.
    Reference: Chum et al., "Total Recall: Automatic Query Expansion with a Generative Feature Model
        for Object Retrieval", ICCV 2007.
    """
    return _search_expanded(queries, database, ranking, num_neighbors, None, precision)


def alpha_query_expansion(
    queries: Float[Array, "q d"],
    database: Database,
    ranking: Ranking,
    *,
    num_neighbors: int = 10,
    alpha: float = 3.0,
    precision: Precision = "float32",
) -> Ranking:
    """`average_query_expansion` with each result weighted by its similarity to the power `alpha`;
    the query has weight 1, a negative similarity 0.

    Reference: Radenović et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", 2018,
        arXiv:1711.02512.
    """
    return _search_expanded(queries, database, ranking, num_neighbors, alpha, precision)


def database_augmentation(
    queries: Float[Array, "q d"],
    database: Database,
    ranking: Ranking,
    *,
    num_neighbors: int = 10,
    alpha: float = 3.0,
    precision: Precision = "float32",
) -> Ranking:
    """Searches in `augment_database`, for as many results as the ranking has. Every vector meets
    all others: n^2 d operations.

    To search more than once, keep what `augment_database` returns. Of a store no more than a few
    blocks are in memory.
    """
    queries = check_queries(queries)
    database = check_database(database, queries.shape[1])
    ranking = check_ranking(ranking, queries, database)
    return search(
        queries,
        _augment(database, num_neighbors, alpha, precision),
        k=ranking.ids.shape[1],
        precision=precision,
    )


def augment_database(
    database: Database,
    *,
    num_neighbors: int = 10,
    alpha: float = 3.0,
    precision: Precision = "float32",
) -> Float[Array, "n d"] | np.ndarray:
    """Every vector replaced by the mean of its `num_neighbors` + 1 nearest, itself among them,
    weighted by similarity to the power `alpha`.

    `(n, d)` in float32; JAX for an array of JAX, NumPy for another array or a store. Negative
    similarities have weight 0.
    Reference: Turcot and Lowe, "Better Matching with Fewer Features", 2009; weights as in
        `alpha_query_expansion`.
    """
    if is_callback(database):
        raise TypeError("a callback cannot be augmented: that takes an array or a store")
    augmented = _augment(
        check_database(database, shape_of(database)[1]), num_neighbors, alpha, precision
    )
    return (
        augmented
        if on_device(augmented)
        else np.concatenate([block for _, block in augmented.blocks(_ROWS)])
    )


def _search_expanded(queries, database, ranking, num_neighbors, alpha, precision):
    queries = check_queries(queries)
    database = check_database(database, queries.shape[1])
    ranking = check_ranking(ranking, queries, database)
    _check(num_neighbors, alpha, precision, least=1)
    first, k = ranking.ids[:, : int(num_neighbors)], ranking.ids.shape[1]

    def expand(query, vectors):
        return _mean(query, similarity(vectors, query[None], precision)[:, 0], vectors, alpha)

    if on_device(database):
        expanded = lax.map(
            lambda each: expand(each[0], database[each[1]]), (queries, first), batch_size=_TOGETHER
        )
        return search(expanded, database, k=k, precision=precision)
    together = [
        jax.vmap(expand)(
            queries[part], jnp.asarray(take_vectors(database, first[part], queries.shape[1]))
        )
        for part in _parts(len(queries))
    ]
    expanded = jnp.concatenate(together)
    if not is_callback(database):
        return search(expanded, database, k=k, precision=precision)
    ids = np.sort(np.asarray(ranking.ids), axis=1)
    rows = [
        similarity(q[None], jnp.asarray(take_vectors(database, own, len(q))), precision)[0]
        for q, own in zip(expanded, ids, strict=True)
    ]
    scores, at = lax.top_k(make_sortable(jnp.stack(rows)), k)
    return Ranking(scores, jnp.take_along_axis(jnp.asarray(ids, jnp.int32), at, axis=1))


def _augment(database, num_neighbors, alpha, precision):
    """The augmented database: an array of JAX, or a store that augments what is read."""
    if is_callback(database):
        raise TypeError("a callback cannot be augmented: that takes an array or a store")
    _check(num_neighbors, alpha, precision, least=0)
    k = min(int(num_neighbors) + 1, database.shape[0])
    if not on_device(database):
        return _AugmentedStore(database, k, alpha, precision)
    (n, d), rows = database.shape, min(_ROWS, database.shape[0])

    def block(vectors):
        similarities, ids = search(vectors, database, k=k, precision=precision)
        return lax.map(
            lambda each: _mean(jnp.zeros(d), each[0], database[each[1]], alpha),
            (similarities, ids),
            batch_size=_TOGETHER,
        )

    return lax.map(block, jnp.pad(database, ((0, -n % rows), (0, 0))).reshape(-1, rows, d)).reshape(
        -1, d
    )[:n]


@dataclass(frozen=True)
class _AugmentedStore:
    database: np.ndarray | Store
    k: int
    alpha: float
    precision: Precision

    @property
    def shape(self) -> tuple[int, int]:
        n, d = self.database.shape
        return n, d

    def take(self, ids: np.ndarray) -> np.ndarray:
        return self._average(take_vectors(self.database, ids, self.shape[1]))

    def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        return ((start, self._average(block)) for start, block in blocks_of(self.database, rows))

    def _average(self, vectors):
        d = self.shape[1]
        similarities, ids = search(
            jnp.asarray(vectors), self.database, k=self.k, precision=self.precision
        )
        mean = jax.vmap(
            lambda similarities, neighbours: _mean(
                jnp.zeros(d), similarities, neighbours, self.alpha
            )
        )
        return np.concatenate(
            [
                mean(similarities[part], jnp.asarray(take_vectors(self.database, ids[part], d)))
                for part in _parts(len(ids))
            ]
        )


def _mean(start, similarities, vectors, alpha):
    """start `(d,)` + sum_j max(s_j, 0)^alpha x_j, with all weights 1 where alpha is None, as a unit
    vector.
    """
    positive = similarities > 0
    powers = jnp.where(positive, jnp.where(positive, similarities, 1) ** (alpha or 0), 0)
    weights = jnp.ones_like(similarities) if alpha is None else powers
    total = start + jnp.einsum(
        "k,kd->d", weights, vectors.astype(jnp.float32), precision=lax.Precision.HIGHEST
    )
    return total / jnp.maximum(jnp.linalg.norm(total), 1e-12)


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + _TOGETHER) for start in range(0, count, _TOGETHER))


def _check(num_neighbors, alpha, precision, least):
    if (
        not isinstance(num_neighbors, int | np.integer)
        or isinstance(num_neighbors, bool)
        or num_neighbors < least
    ):
        raise ValueError(
            f"num_neighbors must be a whole number of at least {least}, not {num_neighbors!r}"
        )
    if alpha is not None and (
        not isinstance(alpha, int | float | np.number)
        or isinstance(alpha, bool)
        or not 0 <= alpha < np.inf
    ):
        raise ValueError(f"alpha must be a number of at least 0, not {alpha!r}")
    check_precision(precision)
