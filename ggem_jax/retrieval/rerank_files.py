"""Reranks vectors in files of any origin, and writes the ranking to a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from ggem_jax.files.vectors import read_ranking, read_vectors, write_ranking
from ggem_jax.retrieval.methods import Method, as_method

if TYPE_CHECKING:
    from ggem_jax.retrieval.vectors import Ranking


@dataclass(frozen=True)
class FileRanking:
    """The ranking that `rerank_files` wrote."""

    output: str  # path of the file
    scores: Float[np.ndarray, "q k"]  # after reranking
    ids: Int[np.ndarray, "q k"]  # rows of the database, best first
    method: Method
    unit_length: bool  # whether the queries have length 1 (within 0.01), or were normalised

    def record(self) -> dict[str, Any]:
        """Returns JSON values, without the ranking itself, which is in the file."""
        queries, results = self.ids.shape
        return {
            "output": self.output,
            "queries": queries,
            "results": results,
            "rerank": self.method.record(),
            "unit_length": self.unit_length,
        }


def rerank_files(
    queries: str,
    database: str,
    output: str | Path,
    *,
    ranking: str | None = None,
    k: int | None = None,
    rerank: Method | str | None = "superglobal",
    normalize: bool = False,
) -> FileRanking:
    """Searches vectors in files or takes a ranking of them, reranks it, and writes the result.

    Args:
        queries: `.npy` file of vectors `(q, d)`, or `.npz` (`FILE.npz:NAME` if it holds several
            arrays).
        database: Likewise `(n, d)`; a `.npy` file is not read into memory.
        output: `.npz` or `.json` file of ids and scores `(q, k)`, which appears when it is
            complete.
        ranking: `.npy` file of ids `(q, k)`, or `.npz` or `.json` of ids and scores; None searches.
        k: Results of the search, all n if it is larger; None takes as many as the method's
            candidates. Has no effect on a given ranking.
        rerank: The method, or the name of one with its defaults; None reranks nothing.
        normalize: Whether all vectors are divided by their lengths first.

    Returns:
        The ranking that was written, and how it was made.

    Raises:
        ValueError: A file cannot be read or does not fit.
        OSError: The output cannot be written.
    """
    method = as_method(rerank)
    asked, store = (read_vectors(name, normalize=normalize) for name in (queries, database))
    if asked.shape[1] != store.shape[1]:
        raise ValueError(
            f"{queries} has vectors of {asked.shape[1]} numbers, {database} of {store.shape[1]}"
        )
    vectors = np.concatenate([block for _, block in asked.blocks(len(asked.array))])
    if ranking is None:
        _, (scores, ids) = method.search(vectors, store, depth=k or method.candidates)
    else:
        _, (scores, ids) = method.reorder(vectors, store, _read_first(ranking, vectors, store))
    write_ranking(Path(output), scores, ids)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    unit_length = normalize or bool(np.abs(lengths - 1).max() <= 0.01)
    return FileRanking(str(output), scores, ids, method, unit_length)


def _read_first(file: str, queries: np.ndarray, database: Any) -> "Ranking":
    """The ranking of a file; scores that it does not have are computed."""
    from ggem_jax.retrieval.vectors import Ranking, check_ranking, take_vectors

    given, ids = read_ranking(file)
    known = np.zeros(ids.shape, np.float32) if given is None else given
    check_ranking(Ranking(known, ids), queries, database)  # type: ignore[arg-type]
    if given is None:
        rows = []
        with np.errstate(over="ignore", invalid="ignore"):
            for query, own in zip(queries, ids, strict=True):
                rows.append(take_vectors(database, own, len(query)).astype(np.float32) @ query)
        known = np.stack(rows)
    return Ranking(known, ids)  # type: ignore[arg-type]
