"""Quality of an index against ground truth of one's own, before and after reranking."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ggem_jax.retrieval.index.index import Index
from ggem_jax.retrieval.index.search import check_count, query_vectors
from ggem_jax.retrieval.index.store import IndexRefused
from ggem_jax.retrieval.methods import Method, as_method
from ggem_jax.retrieval.metrics import Relevance, recall_at, scores
from ggem_jax.retrieval.truth import read_truth, to_relevance


@dataclass(frozen=True)
class Evaluation:
    """Metrics over all queries by name, from 0 to 1; None if no query has a relevant image."""

    before: dict[str, float | None]  # mAP, mP@k and recall@k of the search
    after: dict[str, float | None] | None  # after reranking; None if nothing is reranked
    queries: int  # number of queries
    without_relevant: int  # number of queries that are left out of the means
    depth: int  # results of each query that count
    method: Method
    folder: Path  # folder of the index
    truth: str  # file of the ground truth
    size: int  # number of images in the index

    def record(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {
            "index": str(self.folder.absolute()),
            "truth": self.truth,
            "queries": self.queries,
            "without_relevant": self.without_relevant,
            "depth": self.depth,
            "rerank": self.method.record(),
            "before": self.before,
            **({} if self.after is None else {"after": self.after}),
        }


def evaluate_index(
    index: Index,
    truth: str | Path,
    *,
    root: str | Path | None = None,
    k: int = 10_000,
    at: Sequence[int] = (1, 5, 10),
    rerank: Method | str | None = "superglobal",
    weights: str | None = None,
    whitening: str | None = None,
) -> Evaluation:
    """Returns the quality of an index against ground truth, as `Index.evaluate` documents.

    Args:
        index: The opened index.
        truth, root, k, at, rerank, weights, whitening: As in `Index.evaluate`.

    Raises:
        IndexRefused: The index is empty, or the files that it was made with are not there.
        UnreadableImage: A query holds no image, or one that cannot be described.
        ValueError: The ground truth or an argument does not fit.
    """
    if not len(index):
        raise IndexRefused(f"{index.folder} holds no images: add some first")
    method, k = as_method(rerank), check_count("k", k)
    if isinstance(at, str) or not isinstance(at, Sequence) or not at:
        raise ValueError(f"at must be whole numbers such as (1, 5, 10), not {at!r}")
    at = tuple(check_count("each of at", each) for each in at)
    queries = read_truth(truth, root=os.path.abspath(root or Path(truth).parent))
    relevance = to_relevance(queries, [index.root / path for path in index.paths])
    images, boxes = [query.path for query in queries], [query.box for query in queries]
    vectors = query_vectors(index, images, boxes, weights=weights, whitening=whitening)
    before, after = method.search(vectors, index.vectors(), depth=k)
    reranks = method.name != "none"
    return Evaluation(
        before=measure(before[1], relevance, at),
        after=measure(after[1], relevance, at) if reranks else None,
        queries=len(queries),
        without_relevant=sum(not len(each.positive) for each in relevance),
        depth=before[1].shape[1],
        method=method,
        folder=index.folder,
        truth=str(truth),
        size=len(index),
    )


def measure(
    ids: Int[np.ndarray, "q k"], relevance: Sequence[Relevance], at: Sequence[int]
) -> dict[str, float | None]:
    """Returns mAP, and mP and recall at each of `at`, of a ranking.

    Args:
        ids: Rankings `(q, k)`, best first.
        relevance: The lists of each query.
        at: Ranks at which precision and recall are measured.

    Returns:
        Values from 0 to 1 by the names `mAP`, `mP@1`, `recall@1`, ...; None if no query has a
        relevant image.

    Raises:
        ValueError: As in `ggem_jax.retrieval.metrics.scores`.
    """
    found = scores(ids, relevance, kappas=at)
    recall = recall_at(ids, relevance, kappas=at)[[len(each.positive) > 0 for each in relevance]]
    values = {"mAP": found.mean_average_precision}
    values |= {f"mP@{k}": value for k, value in found.mean_precision_at.items()}
    values |= {
        f"recall@{k}": float(recall[:, i].mean()) if len(recall) else math.nan
        for i, k in enumerate(at)
    }
    return {name: None if math.isnan(value) else value for name, value in values.items()}
