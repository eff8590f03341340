"""Times search and SuperGlobal's reranking through vector databases beside our own exact search.

    python -m benchmarks.bench_stores

One query at a time, 400 candidates of 20,000 unit vectors of 512 around 2,000 centres. All take
turns in one run:

- ours: `search` and `superglobal_rerank` on a NumPy array
- milvus: a file of Milvus Lite, with the graph (HNSW) that `ggem-retrieval push` asks for
- pgvector: PostgreSQL, exact
- pgvector hnsw: with an index, `hnsw.ef_search` 500
- usearch: its graph in memory, searched 500 deep

`search_ms` is the time in which the database finds the candidates, `fetch_ms` that in which it
gives their vectors, `ms` that of all with the reranking. `recall` is the share of the candidates of
an exact search that were found, `same` that of the first 10 after reranking which are in the same
place as ours. Rows go to benchmarks/results/stores.csv. Needs the extra dev.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import append, machine, median_and_spread, time_in_turns
from ggem_jax.retrieval.methods import Method, choose_method
from ggem_jax.retrieval.stores import search_store
from ggem_jax.retrieval.stores.milvus import open_milvus

K = 10
EXAMPLES = Path(__file__).parent.parent / "examples"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, default in (("images", 20_000), ("dim", 512), ("queries", 20), ("rounds", 5)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    options = parser.parse_args(argv)
    queries, database = example(options.images, options.dim, options.queries)
    method = choose_method("superglobal")
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: TimedStore(store) for name, store in fill_stores(Path(folder), database)}
        calls: dict[str, Callable[[], Any]] = {
            "ours": lambda: [method.search(query, database, k=K) for query in queries[:, None]]
        }
        for name, store in stores.items():
            calls[name] = lambda store=store: search_all(queries, store, method)
        found = {name: call() for name, call in calls.items()}
        for store in stores.values():
            store.clear()
        times = time_in_turns(calls, options.rounds)
        runs = (options.rounds + 1) * len(queries)
        ours = median_and_spread(times["ours"])[0]
        for name in calls:
            milliseconds, spread = median_and_spread(times[name])
            row = {
                "contestant": name,
                "images": options.images,
                "dim": options.dim,
                "candidates": method.candidates,
                "ms": f"{milliseconds / len(queries):.1f}",
                "spread": f"{spread:.2f}",
                "over_ours": f"{milliseconds / ours:.2f}",
            }
            row |= {
                f"{part}_ms": f"{1e3 * seconds / runs:.1f}" if seconds else ""
                for part, seconds in (stores[name].seconds if name in stores else NONE).items()
            }
            append("stores", machine() | row | agreement(found[name], found["ours"]))


NONE = {"search": 0.0, "fetch": 0.0}


def example(images: int, dim: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns unit vectors of queries `(count, dim)` and database `(images, dim)` in float32."""
    rng = np.random.default_rng(0)
    places = rng.normal(size=(max(images // 10, 1), dim)).astype(np.float32)

    def around(number: int) -> np.ndarray:
        noise = 0.8 * rng.normal(size=(number, dim)).astype(np.float32)
        vectors = places[rng.integers(0, len(places), number)] + noise
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return around(count), around(images)


class TimedStore:
    """A vector database that adds up the time of its calls."""

    def __init__(self, store: Any):
        self.store = store
        self.clear()

    def clear(self) -> None:
        self.seconds = dict(NONE)

    def search(self, vectors: np.ndarray, k: int) -> Any:
        return self._timed("search", self.store.search, vectors, k)

    def take(self, ids: np.ndarray) -> np.ndarray:
        return self._timed("fetch", self.store.take, ids)

    def _timed(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        found = call(*arguments)
        self.seconds[name] += time.perf_counter() - began
        return found


def fill_stores(folder: Path, database: np.ndarray) -> list[tuple[str, Any]]:
    """Returns each vector database by name, filled with the vectors."""
    sys.path.insert(0, str(EXAMPLES))
    import pgserver
    import psycopg
    from pgvector_store import PgvectorStore
    from usearch_store import UsearchStore

    ids, dim = np.arange(len(database)), database.shape[1]
    uri = pgserver.get_server(folder / "postgres").get_uri()

    def connect(schema: str) -> psycopg.Connection:
        connection = psycopg.connect(uri, autocommit=True)
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        connection.execute(f"CREATE SCHEMA {schema}")
        connection.execute(f"SET search_path = {schema}, public")
        return connection

    approximate = connect("approximate")
    milvus = f"milvus:{folder / 'm.db'}"
    stores = {
        "milvus": open_milvus(milvus, "vectors", dim=dim, new=True),
        "pgvector": PgvectorStore(connect("exact"), dim),
        "pgvector hnsw": PgvectorStore(approximate, dim),
        "usearch": UsearchStore(dim),
    }
    for name, store in list(stores.items()):
        began = time.perf_counter()
        store.put(ids, database)
        if name == "milvus":  # what was just added is searched without the graph until it is opened
            store.client.flush("vectors")
            store.close()
            stores[name] = open_milvus(milvus, "vectors", dim=dim)
        if name == "pgvector hnsw":
            approximate.execute("CREATE INDEX ON images USING hnsw (vector vector_ip_ops)")
            approximate.execute("SET hnsw.ef_search = 500")
        print(f"{name} filled in {time.perf_counter() - began:.1f} s", flush=True)
    return list(stores.items())


def search_all(queries: np.ndarray, store: Any, method: Method) -> list[Any]:
    """Returns the rankings before and after reranking of each query, asked one by one."""
    return [search_store(query, store, k=K, rerank=method) for query in queries[:, None]]


def agreement(found: list[Any], ours: list[Any]) -> dict[str, str]:
    """Returns the recall of the candidates, and the share of equal places after reranking."""
    pairs = list(zip(found, ours, strict=True))
    recall = np.mean([np.isin(right[0][1], own[0][1]).mean() for own, right in pairs])
    same = np.mean([(right[1][1] == own[1][1]).mean() for own, right in pairs])
    return {"recall": f"{recall:.4f}", "same": f"{same:.3f}"}


if __name__ == "__main__":
    main()
