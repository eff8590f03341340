"""Indexes of images on disk: build, search, evaluate. JAX is loaded when it is used, not before."""

from ggem_jax.retrieval.index.describing import (
    LearnedWhitening,
    add_images,
    build_index,
    whiten_index,
)
from ggem_jax.retrieval.index.duplicates import Duplicates, find_duplicates
from ggem_jax.retrieval.index.evaluation import Evaluation
from ggem_jax.retrieval.index.index import Index, info, remove
from ggem_jax.retrieval.index.merging import Merged, merge
from ggem_jax.retrieval.index.pushing import Pushed, push
from ggem_jax.retrieval.index.report import Report
from ggem_jax.retrieval.index.search import Results
from ggem_jax.retrieval.index.store import IndexRefused
from ggem_jax.retrieval.index.text_search import search_by_words
from ggem_jax.retrieval.index.verification import Verdict, verify

__all__ = [
    "Duplicates",
    "Evaluation",
    "Index",
    "IndexRefused",
    "LearnedWhitening",
    "Merged",
    "Pushed",
    "Report",
    "Results",
    "Verdict",
    "add_images",
    "build_index",
    "find_duplicates",
    "info",
    "merge",
    "push",
    "remove",
    "search_by_words",
    "verify",
    "whiten_index",
]
