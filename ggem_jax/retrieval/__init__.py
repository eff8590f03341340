"""Image retrieval with global descriptors: images -> descriptors -> index -> ranking -> reranked.

Descriptors are `(num_images, dim)`, usually unit vectors; ids are the rows of a database; a ranking
is `(num_queries, k)`, best first. `ggem_jax.retrieval.index` has the index. The names here are
loaded when they are first used, so that the tool starts without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ggem_jax.retrieval.exact_search import search
    from ggem_jax.retrieval.expansion import (
        alpha_query_expansion,
        augment_database,
        average_query_expansion,
        database_augmentation,
    )
    from ggem_jax.retrieval.rerank import superglobal_rerank
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

_MODULES = {
    "Ranking": "vectors",
    "alpha_query_expansion": "expansion",
    "augment_database": "expansion",
    "average_query_expansion": "expansion",
    "database_augmentation": "expansion",
    "search": "exact_search",
    "superglobal_rerank": "rerank",
}


if not TYPE_CHECKING:  # for a type checker, every name would exist

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
