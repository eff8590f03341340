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
    alpha: float = (
        3.0  # of alpha-qe and dba: power of the similarity that a neighbour is weighted with
    )

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


def ranked(
    queries: np.ndarray, database: np.ndarray | jax.Array | Store, *, own: np.ndarray | None = None
) -> Ranking:
    """All ids of the database for each query, best first, as `search` with k = n gives them, with
    one sort.

    `own` `(q,)`: the row that is a query's own picture, which comes last, or -1. Takes 12 bytes for
    each query and row.
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


def reranked(
    name: Name,
    queries: np.ndarray,
    database: np.ndarray | jax.Array | Store,
    ranking: Ranking,
    how: Rerank,
    *,
    own: np.ndarray | None = None,
) -> np.ndarray:
    """The ids of a ranking of all rows in their new order. A query's own picture (see `ranked`)
    takes part in nothing but dba.
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
