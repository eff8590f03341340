"""Searches a vector database, and reranks its candidates on their own vectors."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from ggem_jax.retrieval.methods import Method, as_method, check_count
from ggem_jax.retrieval.stores.protocol import StoreRefused, VectorStore

if TYPE_CHECKING:
    from ggem_jax.retrieval.vectors import Ranking

    Arrays = tuple[np.ndarray, np.ndarray]  # scores and ids, each (q, k)

# results beyond the candidates that are asked for: they decide between equal scores at the end
MARGIN = 16
METHODS = ("superglobal", "none")  # the others search or change the whole database


def search_store(
    queries: Float[np.ndarray, "q d"],
    store: VectorStore,
    *,
    k: int,
    size: int | None = None,
    rerank: Method | str | None = "superglobal",
) -> tuple["Arrays", "Arrays"]:
    """Returns scores and ids of a search in a database, and the first k after reranking.

    The database finds the candidates, and a few more. Their vectors are fetched, and their dot
    products are computed again in float64, so that the order does not depend on the database: where
    it finds the right candidates, both rankings are those of `Method.search` on all vectors. Equal
    scores are ordered by smaller id.

    Args:
        queries: Unit vectors `(q, d)` of floating point.
        store: The database.
        k: Results of each query after reranking.
        size: Number of vectors in the database, which bounds k and the number of candidates; None
            where it is known to be larger.
        rerank: "superglobal", a `Method` of this name with options of its own, or None.

    Returns:
        Scores in float32 and ids in int64 before reranking, `(q, depth)`, where the depth is the
        larger of k and the number of candidates, and after it, `(q, k)`.

    Raises:
        StoreRefused: The database gives too few results, an id twice, or vectors that do not fit.
        ValueError: The method needs more than the candidates, or an argument does not fit.

    Example:
        >>> import numpy as np
        >>> from ggem_jax.retrieval.stores import search_store
        >>> class Table:
        ...     rows = np.array([[0.0, 1.0], [0.6, 0.8], [1.0, 0.0]], np.float32)
        ...     def search(self, vectors, k):
        ...         scores = vectors @ self.rows.T
        ...         ids = np.argsort(-scores, axis=1)[:, :k]
        ...         return ids, np.take_along_axis(scores, ids, axis=1)
        ...     def take(self, ids):
        ...         return self.rows[ids]
        >>> before, after = search_store(np.eye(2)[:1], Table(), k=2, size=3)
        >>> after[1].tolist()
        [[2, 1]]
    """
    method = as_method(rerank)
    if method.name not in METHODS:
        raise ValueError(
            f"{method.name} needs more than the candidates of a vector database: rerank by"
            f" {METHODS[0]}, or search without a store"
        )
    queries = np.asarray(queries, np.float32)
    if queries.ndim != 2 or 0 in queries.shape or not np.isfinite(queries).all():
        raise ValueError(f"queries must be finite vectors (q, d), not {queries.shape}")
    depth, asked = (method.depth(check_count("k", k)) + more for more in (0, MARGIN))
    if size is not None:
        depth, asked = min(depth, check_count("size", size)), min(asked, size)
    found = np.asarray(store.search(queries, asked)[0])
    if found.ndim != 2 or len(found) != len(queries) or not depth <= found.shape[1] <= asked:
        raise StoreRefused(
            f"the database gave ids {found.shape} where {asked} results are asked for and {depth}"
            f" are needed for each of {len(queries)} queries: let it search deeper, or take fewer"
            " candidates"
        )
    both = [
        _rerank(query, np.sort(ids), store, method, depth)
        for query, ids in zip(queries, found.astype(np.int64), strict=True)
    ]
    (scores_before, ids_before), (scores, ids) = (
        tuple(map(np.concatenate, zip(*part, strict=True))) for part in zip(*both, strict=True)
    )
    return (scores_before, ids_before), (scores[:, :k], ids[:, :k])


def _rerank(
    query: np.ndarray, ids: np.ndarray, store: VectorStore, method: Method, depth: int
) -> tuple["Arrays", "Arrays"]:
    """Both rankings of one query. Rows of the candidates stand for their ids, which ascend."""
    if (ids[1:] == ids[:-1]).any():
        raise StoreRefused("the database gave an id twice for one query: push it anew")
    vectors = np.asarray(store.take(ids))
    if vectors.shape != (len(ids), len(query)) or not np.issubdtype(vectors.dtype, np.floating):
        raise StoreRefused(
            f"the database must give vectors {(len(ids), len(query))} of floating point, not"
            f" {vectors.dtype} of shape {vectors.shape}"
        )
    exact = (vectors.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
    order = np.argsort(-exact, kind="stable")[:depth]
    before, after = method.reorder(query[None], vectors, _ranking(exact[order], order))
    return (before[0], ids[before[1]]), (after[0], ids[after[1]])


def _ranking(scores: np.ndarray, rows: np.ndarray) -> "Ranking":
    from ggem_jax.retrieval.vectors import Ranking

    both: Any = (scores[None], rows[None].astype(np.int32))
    return Ranking(*both)
