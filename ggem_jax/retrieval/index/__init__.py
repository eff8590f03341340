"""A folder of described images on disk."""

from ggem_jax.retrieval.index.index import Index

__all__ = ["Index"]
