"""Search and rerank the vectors of any database, and measure what reranking gains.

Only descriptors are needed: arrays `(n, d)` of length 1, from any network. Here they are made: each
of 40 places is seen in 30 images that drift away from one another, so that the last ones are too
far from a query to be found directly, but not from its neighbours.
"""

import numpy as np

from ggem_jax import alpha_query_expansion, search, superglobal_rerank
from ggem_jax.retrieval.metrics import Relevance, scores


def make_vectors(places: int = 40, images: int = 30, dim: int = 64) -> np.ndarray:
    rng = np.random.default_rng(0)
    start, drift = rng.normal(size=(2, places, 1, dim))
    way = np.linspace(0, 2.5, images)[:, None]
    vectors = start + way * drift + 0.9 * rng.normal(size=(places, images, dim))
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def main() -> None:
    vectors = make_vectors()
    places, images, dim = vectors.shape
    queries, database = vectors[:, 0], vectors[:, 1:].reshape(-1, dim)
    nobody = np.empty(0, int)
    relevance = [
        Relevance(np.arange(i * (images - 1), (i + 1) * (images - 1)), nobody)
        for i in range(places)
    ]
    first = search(queries, database, k=200)
    expanded = alpha_query_expansion(queries, database, first)
    reranked = superglobal_rerank(queries, database, first, num_candidates=200)
    for name, ranking in {
        "search": first,
        "alpha query expansion": expanded,
        "SuperGlobal reranking": reranked,
    }.items():
        found = scores(np.asarray(ranking.ids), relevance, kappas=(10,))
        print(f"{name:22} mAP {100 * found.mean_average_precision:.1f}")


if __name__ == "__main__":
    main()
