"""Image retrieval with global descriptors: search, reranking, and an index of pictures.

Descriptors are `(num_images, dim)`, usually unit vectors; ids number the rows of a database; a ranking is `(num_queries, k)`, best first.
"""

from ggem_jax.retrieval.expansion import alpha_query_expansion, augment_database, average_query_expansion, database_augmentation
from ggem_jax.retrieval.rerank import superglobal_rerank
from ggem_jax.retrieval.search import search
from ggem_jax.retrieval.vectors import Ranking

__all__ = [
    "Ranking",
    "alpha_query_expansion",
    "augment_database",
    "average_query_expansion",
    "database_augmentation",
    "search",
    "superglobal_rerank",
]
