"""Rerank the candidates of PostgreSQL, whose extension pgvector searches vectors.

A vector database is two methods: `search` gives ids and scores of the candidates, `take` gives the
vectors of ids. SuperGlobal's reranking fetches the vectors of the candidates and of no others.
Needs `pip install pgvector 'psycopg[binary]' pgserver`; pgserver brings PostgreSQL with pgvector.
"""

import numpy as np
import pgserver
import psycopg
from pgvector.psycopg import register_vector
from usearch_store import make_vectors

from ggem_jax import search, superglobal_rerank
from ggem_jax.retrieval.stores import search_store


class PgvectorStore:
    """Vectors in a table, searched exactly; docs/retrieval_stores.md adds an index to it."""

    def __init__(self, connection: psycopg.Connection, dim: int):
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        connection.execute(f"CREATE TABLE images (id bigint PRIMARY KEY, vector vector({dim}))")
        register_vector(connection)
        self.connection = connection

    def put(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        rows = "COPY images FROM STDIN WITH (FORMAT binary)"
        with self.connection.cursor().copy(rows) as copy:
            copy.set_types(["int8", "vector"])
            for number, vector in zip(ids.tolist(), np.asarray(vectors, np.float32), strict=True):
                copy.write_row((number, vector))

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        query = "SELECT id, -(vector <#> %(v)s) FROM images ORDER BY vector <#> %(v)s LIMIT %(k)s"
        found = [self.connection.execute(query, {"v": v, "k": k}).fetchall() for v in vectors]
        return tuple(np.array([[row[i] for row in own] for own in found]) for i in (0, 1))

    def take(self, ids: np.ndarray) -> np.ndarray:
        query = "SELECT id, vector FROM images WHERE id = ANY(%s)"
        found = dict(self.connection.execute(query, (ids.tolist(),), binary=True).fetchall())
        return np.stack([found[number].to_numpy() for number in ids.tolist()])


def main() -> None:
    vectors = make_vectors()
    queries, database = vectors[:, 0], vectors[:, 1:].reshape(-1, vectors.shape[-1])
    server = pgserver.get_server("postgres")  # in this folder, until the script ends
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        store = PgvectorStore(connection, database.shape[1])
        store.put(np.arange(len(database)), database)
        _, (_, ids) = search_store(queries, store, k=10, size=len(database))
    first = search(queries, database, k=400)
    reranked = np.asarray(superglobal_rerank(queries, database, first).ids)[:, :10]
    print(f"{100 * (ids == reranked).mean():.1f} % of the 10 best in the same place")


if __name__ == "__main__":
    main()
