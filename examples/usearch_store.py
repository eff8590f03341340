"""Rerank the candidates of usearch, an approximate index of vectors in one file.

A vector database is two methods: `search` gives ids and scores of the candidates, `take` gives the
vectors of ids. SuperGlobal's reranking fetches the vectors of the candidates and of no others.
Needs `pip install usearch`.
"""

import numpy as np
from usearch.index import Index

from ggem_jax import search, superglobal_rerank
from ggem_jax.retrieval.stores import search_store


class UsearchStore:
    """Vectors in an index of usearch, with inner products as scores."""

    def __init__(self, dim: int, *, depth: int = 500, exact: bool = False):
        # a graph that is searched deeper misses fewer of the candidates
        self.index = Index(ndim=dim, metric="ip", dtype="f32", expansion_search=depth)
        self.exact = exact  # whether all vectors are compared, without the graph

    def put(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        # one thread makes the same graph in every run
        self.index.add(ids.astype(np.uint64), np.asarray(vectors, np.float32), threads=1)

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        each = [self.index.search(vector, k, exact=self.exact) for vector in vectors]
        k = min(map(len, each))  # the graph may reach fewer
        ids = np.stack([found.keys[:k].astype(np.int64) for found in each])
        return ids, 1 - np.stack([found.distances[:k] for found in each])

    def take(self, ids: np.ndarray) -> np.ndarray:
        return np.stack(self.index.get(ids.astype(np.uint64)))


def make_vectors(places: int = 100, images: int = 30, dim: int = 64) -> np.ndarray:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(places, 1, dim)) + rng.normal(size=(places, images, dim))
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def main() -> None:
    vectors = make_vectors()
    queries, database = vectors[:, 0], vectors[:, 1:].reshape(-1, vectors.shape[-1])
    store = UsearchStore(database.shape[1])
    store.put(np.arange(len(database)), database)
    (_, candidates), (_, ids) = search_store(queries, store, k=10, size=len(database))
    first = search(queries, database, k=candidates.shape[1])
    reranked = np.asarray(superglobal_rerank(queries, database, first).ids)[:, :10]
    pairs = zip(candidates, np.asarray(first.ids), strict=True)
    recall = np.mean([np.isin(right, own).mean() for own, right in pairs])
    print(f"{100 * recall:.1f} % of the candidates of an exact search")
    print(f"{100 * (ids == reranked).mean():.1f} % of the 10 best in the same place")


if __name__ == "__main__":
    main()
