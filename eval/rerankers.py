"""Rankings of a whole database, and the rerankers by their names in evaluations."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ggem_jax.retrieval.exact_search import similarity
from ggem_jax.retrieval.methods import METHODS, Method, choose_method
from ggem_jax.retrieval.vectors import Ranking, Store, blocks_of

Name = Literal["none", "superglobal", "superglobal-paper", "aqe", "alpha-qe", "dba"]

# Results that a search with expanded vectors reranks. The others of a larger database follow in
# their old order.
DEPTH = 10_000
_ROWS = 8192  # rows of a database that are searched at a time


@dataclass(frozen=True)
class Rerank:
    """Options of the rerankers."""

    num_candidates: int = 400  # results that superglobal reranks, as in its paper
    num_neighbors: int = 9  # neighbours that refine a candidate in superglobal
    beta: float = 0.15  # weight of such a neighbour in superglobal
    qe_neighbors: int = 10  # neighbours that aqe, alpha-qe and dba average a vector with
    alpha: float = 3.0  # alpha-qe and dba weight a neighbour by this power of its similarity

    def __post_init__(self):
        for name, least in (
            ("num_candidates", 1),
            ("num_neighbors", 0),
            ("beta", 0),
            ("qe_neighbors", 1),
            ("alpha", 0),
        ):
            value = getattr(self, name)
            if not least <= value < np.inf:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least {least}, it is {value}")


def rank_all(
    queries: np.ndarray, database: np.ndarray | jax.Array | Store, *, own: np.ndarray | None = None
) -> Ranking:
    """Returns all ids of the database for each query, best first.

    The result is that of `search` with k = n, found with one sort. It takes 12 bytes for each pair
    of query and row.

    Args:
        queries: Unit vectors `(q, d)`.
        database: Unit vectors `(n, d)`, or a store of them.
        own: Row `(q,)` of each query's own image, which comes last, or -1. None: no query is in the
            database.

    Returns:
        Scores and ids `(q, n)`.
    """
    parts = ((0, database),) if isinstance(database, jax.Array) else blocks_of(database, _ROWS)
    scores = np.concatenate(
        [np.asarray(_scores(jnp.asarray(queries), jnp.asarray(block))) for _, block in parts],
        axis=1,
    )
    if own is not None:
        scores[np.flatnonzero(own >= 0), own[own >= 0]] = -np.inf
    ids = np.stack([np.argsort(-row, kind="stable").astype(np.int32) for row in scores])
    return Ranking(np.take_along_axis(scores, ids, axis=1), ids)  # type: ignore[arg-type]


_scores = jax.jit(partial(similarity, precision="float32"))


def method_of(name: Name, how: Rerank, *, most: int) -> Method:
    """Returns the library's method for the name of a reranker.

    Args:
        name: Name of the reranker. `superglobal-paper` is SuperGlobal as its paper describes it,
            `superglobal` as its code computes it.
        how: Options of the rerankers.
        most: Rows that may take part at most; it bounds candidates and neighbours.
    """
    if name.startswith("superglobal"):
        return choose_method(
            "superglobal",
            candidates=min(how.num_candidates, most),
            neighbors=how.num_neighbors,
            beta=how.beta,
            variant="paper" if name == "superglobal-paper" else "code",
        )
    given: dict[str, Any] = {"neighbors": min(how.qe_neighbors, most), "alpha": how.alpha}
    return choose_method(name, **{option: given[option] for option in METHODS[name]})


def rerank_all(
    name: Name,
    queries: np.ndarray,
    database: np.ndarray | jax.Array | Store,
    ranking: Ranking,
    how: Rerank,
    *,
    own: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the ids `(q, n)` of a ranking of all rows in their new order.

    Args:
        name: Name of the reranker.
        queries: Unit vectors `(q, d)`.
        database: Unit vectors `(n, d)`, or a store of them.
        ranking: Scores and ids `(q, n)`, as `rank_all` returns them.
        how: Options of the rerankers.
        own: As in `rank_all`, `(q,)`. A query's own image takes part in dba only.
    """
    n = ranking.ids.shape[1]
    others = n if own is None or not np.any(own >= 0) else max(n - 1, 1)
    method = method_of(name, how, most=others)
    expands = method.name not in ("none", "superglobal")
    first = Ranking(ranking.scores[:, :DEPTH], ranking.ids[:, :DEPTH]) if expands else ranking
    ids = np.asarray(method.rerank(jnp.asarray(queries), database, first).ids)
    if ids.shape[1] == n:
        return ids
    return np.stack(
        [
            np.concatenate([new, old[~np.isin(old, new)]])
            for new, old in zip(ids, np.asarray(ranking.ids), strict=True)
        ]
    )
