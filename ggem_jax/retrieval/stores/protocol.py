"""What a vector database must offer: `VectorStore` to be searched, `Collection` to be filled."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int


class StoreRefused(ValueError):
    """A vector database does not allow the call; one sentence names the cause and the remedy."""


@runtime_checkable
class VectorStore(Protocol):
    """Vectors in a database that searches by itself. Ids are whole numbers of at most 63 bits."""

    def search(
        self, vectors: Float[np.ndarray, "q d"], k: int
    ) -> tuple[Int[np.ndarray, "q k"], Float[np.ndarray, "q k"]]:
        """Returns ids and scores of the k vectors with the largest dot products, best first.

        Args:
            vectors: Queries `(q, d)` in float32.
            k: Results of each query.
        """

    def take(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m d"]:
        """Returns the vectors of ids, in their order.

        Args:
            ids: Whole numbers `(m,)`.
        """


class Marker(NamedTuple):
    """What a collection holds; it may be searched only where this says that it is complete."""

    complete: bool
    version: str  # digest of the ids of all vectors
    size: int  # number of vectors
    dim: int
    source: str  # digest of the settings, the root and the dtype of the index


class Collection(VectorStore, Protocol):
    """A collection of vectors that an index is pushed into."""

    def read_marker(self) -> Marker | None:
        """Returns the marker, or None where nothing has been pushed yet."""

    def write_marker(self, marker: Marker) -> None:
        """Replaces the marker, after all that was written before is on disk.

        Args:
            marker: The new marker.
        """

    def ids(self) -> Int[np.ndarray, " n"]:
        """Returns the ids of all vectors, in any order."""

    def put(self, ids: Int[np.ndarray, " m"], vectors: Float[np.ndarray, "m d"]) -> None:
        """Adds vectors, and replaces those of known ids.

        Args:
            ids: Whole numbers `(m,)`.
            vectors: Their vectors `(m, d)` in float32.
        """

    def drop(self, ids: Int[np.ndarray, " m"]) -> None:
        """Removes vectors.

        Args:
            ids: Whole numbers `(m,)`; unknown ones have no effect.
        """

    def close(self) -> None:
        """Ends the connection."""
