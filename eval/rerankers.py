"""Rankings of a whole database, and everything that orders one anew, by name."""

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

# results that a search with expanded vectors orders anew; of a larger database the others stand
# behind them as they stood
DEPTH = 10_000
_ROWS = 8192  # of a database that are searched at a time


@dataclass(frozen=True)
class Rerank:
    """How rankings are ordered anew."""

    num_candidates: int = 400  # of superglobal; these and the next two are those of its paper
    num_neighbors: int = 9  # of superglobal: neighbours that refine a candidate
    beta: float = 0.15  # of superglobal: weight of a neighbour
    qe_neighbors: int = 10  # of aqe, alpha-qe and dba: neighbours that a vector is averaged with
    alpha: float = 3.0  # of alpha-qe and dba: power of the similarity that weights a neighbour

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

    The result is that of `search` with k = n, found with one sort. It takes 12 bytes for each query
    and row.

    Args:
        queries: `(q, d)` unit vectors.
        database: `(n, d)` unit vectors, or a store of them.
        own: `(q,)` the row that is a query's own image, which comes last, or -1; None: no query is
            in the database.

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
    """Returns the library's method of that name; no more than `most` rows take part."""
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
        name: of the reranker.
        queries: `(q, d)` unit vectors.
        database: `(n, d)` unit vectors, or a store of them.
        ranking: as `rank_all` returns it.
        how: options of the rerankers.
        own: `(q,)` as in `rank_all`; a query's own image takes part in dba only.
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
