"""Query expansion and database augmentation: average vectors with their neighbours, search again.

Queries are `(q, d)` and the database is `(n, d)`, both unit vectors. Averages are normalised to
unit length.
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

_TOGETHER = 64  # queries, or rows of the database, whose neighbours are in memory at a time
_ROWS = 1024  # rows of the database that are augmented at a time


def average_query_expansion(
    queries: Float[Array, "q d"],
    database: Database,
    ranking: Ranking,
    *,
    num_neighbors: int = 10,
    precision: Precision = "float32",
) -> Ranking:
    """Returns the ranking of a search with the mean of each query and its first results.

    A callback cannot be searched; with one, the ids of the given ranking are reordered.

    Args:
        queries: Unit vectors `(q, d)`.
        database: An array `(n, d)`, a `Store`, or a function from ids to vectors.
        ranking: Scores and ids of the first search, each `(q, k)`, best first.
        num_neighbors: Results that are averaged with the query, at least 1; all k if k is smaller.
        precision: Precision of the dot products, as in `search`.

    Returns:
        Scores and ids, each `(q, k)`.

    Raises:
        ValueError: Shapes, dtypes or values do not fit.
        TypeError: The database is none of the above.

    Reference: Chum et al., "Total Recall: Automatic Query Expansion with a Generative Feature Model
        for Object Retrieval", ICCV 2007.

    Example:
        >>> import jax.numpy as jnp
        >>> from ggem_jax.retrieval import average_query_expansion, search
        >>> queries, database = jnp.eye(2)[:1], jnp.array([[0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
        >>> first = search(queries, database, k=3)
        >>> average_query_expansion(queries, database, first, num_neighbors=1).ids.tolist()
        [[1, 0, 2]]
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
    """Returns `average_query_expansion` with results weighted by their similarity.

    The expanded query is q + sum_j max(q . x_j, 0)^alpha x_j, normalised to unit length.

    Args:
        queries, database, ranking, num_neighbors, precision: As in `average_query_expansion`.
        alpha: Power of the similarity, at least 0.

    Returns:
        Scores and ids, each `(q, k)`.

    Raises:
        ValueError: Shapes, dtypes or values do not fit.
        TypeError: The database is of another kind.

    Reference: Radenović et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", 2018,
        arXiv:1711.02512.

    Example:
        >>> import jax.numpy as jnp
        >>> from ggem_jax.retrieval import alpha_query_expansion, search
        >>> queries, database = jnp.eye(2)[:1], jnp.array([[0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
        >>> first = search(queries, database, k=3)
        >>> alpha_query_expansion(queries, database, first, alpha=2.0).ids.tolist()
        [[1, 0, 2]]
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
    """Returns the ranking of a search in the augmented database.

    Every vector is compared with all others, which takes n^2 d operations. To search more than
    once, keep the result of `augment_database`. A store or NumPy array is augmented block by block,
    so that only a few blocks are in memory.

    Args:
        queries: Unit vectors `(q, d)`.
        database: An array `(n, d)` or a `Store`, unit vectors.
        ranking: Scores and ids, each `(q, k)`. Only k is used, as the number of results.
        num_neighbors, alpha, precision: As in `augment_database`.

    Returns:
        Scores and ids, each `(q, k)`.

    Raises:
        ValueError: Shapes, dtypes or values do not fit.
        TypeError: The database is a callback, or none of the above.

    Reference: Turcot and Lowe, "Better Matching with Fewer Features", 2009.

    Example:
        >>> import jax.numpy as jnp
        >>> from ggem_jax.retrieval import database_augmentation, search
        >>> queries, database = jnp.eye(2)[:1], jnp.array([[0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
        >>> first = search(queries, database, k=3)
        >>> database_augmentation(queries, database, first, num_neighbors=1).ids.tolist()
        [[1, 0, 2]]
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
    """Returns the database with each vector replaced by a mean of its neighbourhood.

    The mean is sum_j max(x . x_j, 0)^alpha x_j over the `num_neighbors` + 1 nearest vectors, x
    itself among them, normalised to unit length.

    Args:
        database: An array `(n, d)` or a `Store`, unit vectors.
        num_neighbors: Neighbours besides the vector itself, at least 0; all if there are fewer.
        alpha: Power of the similarity, at least 0.
        precision: Precision of the dot products, as in `search`.

    Returns:
        `(n, d)` in float32: JAX for an array of JAX, NumPy for another array or a store.

    Raises:
        ValueError: Shapes, dtypes or values do not fit.
        TypeError: The database is a callback.

    Reference: Turcot and Lowe, "Better Matching with Fewer Features", 2009; weights as in
        `alpha_query_expansion`.

    Example:
        >>> import jax.numpy as jnp
        >>> from ggem_jax.retrieval import augment_database
        >>> augment_database(jnp.eye(3), num_neighbors=1).tolist()[0]
        [1.0, 0.0, 0.0]
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
    """The augmented database: an array of JAX, or a store that augments blocks as they are read."""
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
    """start + sum_j max(s_j, 0)^alpha x_j as a unit vector; without alpha all weights are 1."""
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
