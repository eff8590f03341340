"""SuperGlobal's reranking: candidates refine each other, and the best of them expand the query.

The query and the expanded query then score the candidates.

Reference: Shao et al., "Global Features are All You Need for Image Retrieval and Reranking", 2023,
arXiv:2308.06954, and its code: github.com/ShihaoShao-GH/SuperGlobal.

With candidates x_d, the neighbours n_0 .. n_K of each (itself among them) and weights w, a refined
candidate is sum_i w_i x_{n_i} / sum_i w_i. Its dot product with any vector is the same mean of dot
products. Therefore only the few refined vectors that expand the query are computed, and nearly all
of the work is the matrix of dot products between the candidates of a query.
"""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ggem_jax.retrieval.exact_search import Precision, check_precision, similarity
from ggem_jax.retrieval.vectors import (
    Database,
    Ranking,
    check_database,
    check_queries,
    check_ranking,
    make_sortable,
    on_device,
    take_vectors,
)

Variant = Literal["code", "paper"]

_GRAM_ROWS = 1024  # rows of the matrix of dot products that are computed at a time


def superglobal_rerank(
    queries: Float[Array, "q d"],
    database: Database,
    ranking: Ranking,
    *,
    num_candidates: int = 400,
    num_neighbors: int = 9,
    beta: float = 0.15,
    variant: Variant = "code",
    precision: Precision = "float32",
) -> Ranking:
    """Returns the ranking with the first `num_candidates` results of each query reordered.

    The refined x_d of a candidate d is a weighted mean of its `num_neighbors` + 1 nearest
    candidates: the nearest (itself) has weight 1, the others have `beta` times their similarity.
    The first score is S1(d) = q . x_d. The expanded query e is the maximum, channel by channel, of
    the refined `num_neighbors` + 1 best by S1, and the final score is
    S(d) = (S1(d) + e . x_d) / 2. The defaults were found for landmarks and vectors of CVNet. Memory
    is bounded by the candidates of one query, so there may be thousands of them.

    Args:
        queries: Unit vectors `(q, d)`.
        database: An array `(n, d)`, a `Store`, or a function from ids to vectors, which is asked
            for the candidates alone.
        ranking: Scores and ids of a search, each `(q, k)`, best first.
        num_candidates: Results that are reordered, at least 1; all k if k is smaller.
        num_neighbors: Neighbours that refine a candidate, at least 0; all if there are fewer.
        beta: Factor of the similarity in the weight of a neighbour, from 0 to 1e6.
        variant: "code" is the published code. "paper" follows the description of the paper where
            the two differ: the query takes part in the maximum, and e is compared with the
            unrefined candidates.
        precision: Precision of the dot products, as in `search`.

    Returns:
        Scores and ids, each `(q, k)`; those after the candidates keep their place and score.

    Raises:
        ValueError: Shapes, dtypes or values do not fit.
        TypeError: The database is none of the above.

    Reference: Shao et al., 2023, arXiv:2308.06954, section 4, and the published code.

    Example:
        >>> import jax.numpy as jnp
        >>> from ggem_jax.retrieval import search, superglobal_rerank
        >>> queries, database = jnp.eye(2)[:1], jnp.array([[0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
        >>> first = search(queries, database, k=3)
        >>> superglobal_rerank(queries, database, first, num_neighbors=1).ids.tolist()
        [[1, 0, 2]]
    """
    queries = check_queries(queries)
    database = check_database(database, queries.shape[1])
    ranking = check_ranking(ranking, queries, database)
    for name, value, least in (
        ("num_candidates", num_candidates, 1),
        ("num_neighbors", num_neighbors, 0),
    ):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, not {variant!r}")
    if not isinstance(beta, jax.core.Tracer) and not (
        np.ndim(beta) == 0 and np.isrealobj(beta) and _is_number(beta) and 0 <= beta <= 1e6
    ):
        raise ValueError(f"beta must be a number from 0 to 1e6, not {beta!r}")
    check_precision(precision)
    m = min(int(num_candidates), ranking.ids.shape[1])
    options: dict[str, Any] = {
        "num_neighbors": min(int(num_neighbors), m - 1),
        "variant": variant,
        "precision": precision,
    }
    if on_device(database):
        return _rerank_on_device(queries, database, ranking, beta, m=m, **options)
    dim = queries.shape[1]
    rows: list[Any] = []
    for query, ids in zip(queries, np.sort(np.asarray(ranking.ids[:, :m]), axis=1), strict=True):
        rows.append(_one(query, take_vectors(database, ids, dim), ids, beta, **options))
        jax.block_until_ready(
            rows[-2:-1]
        )  # so that no more than two queries have their candidates in memory
    return _with_rest(ranking, *map(jnp.stack, zip(*rows, strict=True)))


def _is_number(value):
    return isinstance(value, int | float | np.number | np.ndarray | jax.Array) and not isinstance(
        value, bool
    )


@partial(jax.jit, static_argnames=("m", "num_neighbors", "variant", "precision"))
def _rerank_on_device(queries, database, ranking, beta, *, m, **options):
    def one(each):
        query, ids = each
        return _one(query, database[ids], ids, beta, **options)

    return _with_rest(ranking, *lax.map(one, (queries, jnp.sort(ranking.ids[:, :m], axis=1))))


def _with_rest(ranking, scores, ids):
    m = ids.shape[1]
    return Ranking(
        jnp.concatenate([scores, ranking.scores[:, m:]], axis=1),
        jnp.concatenate([ids, ranking.ids[:, m:]], axis=1),
    )


@partial(jax.jit, static_argnames=("num_neighbors", "variant", "precision"))
def _one(query, candidates, ids, beta, *, num_neighbors, variant, precision):
    """Scores and ids of one query, best first.

    The given ids ascend, so that the stable `top_k` puts the smaller of equals first.
    """
    candidates = candidates.astype(jnp.float32)
    neighbours, weights = neighbourhood(
        candidates, num_neighbors=num_neighbors, beta=beta, precision=precision
    )

    def refined_dot(vector):
        return jnp.sum(weights * _dot(candidates, vector, precision)[neighbours], axis=1)

    s1 = refined_dot(query)
    best = lax.top_k(make_sortable(s1), num_neighbors + 1)[1]
    expanded = jnp.max(
        jnp.einsum(
            "kn,knd->kd",
            weights[best],
            candidates[neighbours[best]],
            precision=lax.Precision.HIGHEST,
        ),
        axis=0,
    )
    if variant == "code":
        s2 = refined_dot(expanded)
    else:
        s2 = _dot(candidates, jnp.maximum(expanded, query), precision)
    scores = (s1 + s2) / 2
    order = jnp.argsort(-make_sortable(scores), stable=True)
    return scores[order], ids[order]


def neighbourhood(
    candidates: Float[Array, "m d"],
    *,
    num_neighbors: int,
    beta: float,
    precision: Precision = "float32",
) -> tuple[Int[Array, "m k"], Float[Array, "m k"]]:
    """Returns the nearest candidates of each candidate, itself first, and their weights.

    The weight is 1 for the candidate itself and `beta` times the similarity for the others, divided
    by the sum of the weights.

    Args:
        candidates: Candidates of one query, unit vectors `(m, d)`.
        num_neighbors: Neighbours besides the candidate itself, from 0 to m - 1.
        beta: Factor of the similarity in the weight of a neighbour.
        precision: Precision of the dot products, as in `search`.

    Returns:
        Rows of the candidates, and weights that sum to 1, each `(m, num_neighbors + 1)`.
    """
    m = len(candidates)

    def nearest(rows):
        return lax.top_k(make_sortable(similarity(rows, candidates, precision)), num_neighbors + 1)

    if m <= _GRAM_ROWS:
        similarities, neighbours = nearest(candidates)
    else:
        blocks = -(-m // _GRAM_ROWS)
        padded = jnp.pad(candidates, ((0, blocks * _GRAM_ROWS - m), (0, 0))).reshape(
            blocks, _GRAM_ROWS, -1
        )
        similarities, neighbours = (
            a.reshape(-1, num_neighbors + 1)[:m] for a in lax.map(nearest, padded)
        )
    weights = (beta * similarities).at[:, 0].set(1.0)
    return neighbours, weights / jnp.sum(weights, axis=1, keepdims=True)


def _dot(candidates, vector, precision):
    return similarity(candidates, vector[None], precision)[:, 0]
