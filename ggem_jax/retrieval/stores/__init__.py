"""Search in a vector database: it gives the candidates, and only their vectors are fetched.

A database is a `VectorStore`, two methods long. `ggem_jax.retrieval.stores.milvus` has Milvus,
which `ggem-retrieval push` fills; `examples/` shows pgvector and usearch.
"""

from ggem_jax.retrieval.stores.protocol import Collection, Marker, StoreRefused, VectorStore
from ggem_jax.retrieval.stores.searching import search_store

__all__ = ["Collection", "Marker", "StoreRefused", "VectorStore", "search_store"]
