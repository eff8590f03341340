"""Searches of the page: an entry of the index, or an uploaded image -> results as JSON values."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from jaxtyping import Float

from ggem_jax.files.images import MAX_MEGAPIXELS, RGB, crop, decode_image
from ggem_jax.retrieval.index import describing
from ggem_jax.retrieval.index.duplicates import ImageFile, read_files
from ggem_jax.retrieval.index.folder import shown
from ggem_jax.retrieval.index.index import Index
from ggem_jax.retrieval.index.reading import facts_of
from ggem_jax.retrieval.index.store import IndexRefused
from ggem_jax.retrieval.index.text_search import (
    Encode,
    load_text_encoder,
    parse_words,
    takes_words,
    vector_of_words,
)
from ggem_jax.retrieval.methods import Method
from ggem_jax.retrieval.page.originals import Originals

Describe = Callable[[RGB], Float[np.ndarray, " d"]]


@dataclass(frozen=True)
class Wanted:
    """What a search returns: the number of results, and how they are reranked."""

    k: int
    method: Method


class Searcher:
    """Searches one index; the network is loaded for the first image, and kept.

    Args:
        index: The opened index.
        originals: The files of its images.
        describe: Function from an image to its vector; None takes the network of the index.
        encode: Function from texts to unit vectors; None takes that of the same weights.
        weights, whitening: Where the files that the index was made with are now; None takes their
            old places.
    """

    def __init__(
        self,
        index: Index,
        originals: Originals,
        *,
        describe: Describe | None = None,
        encode: Encode | None = None,
        weights: str | None = None,
        whitening: str | None = None,
    ):
        self.index = index
        self._describe, self._weights, self._whitening = describe, weights, whitening
        self._originals = originals
        self._extract: describing.LazyExtract | None = None
        self._encode: Encode | None = encode
        self._one_at_a_time = threading.Lock()
        self._version = self._revision()
        files = read_files(index)
        same = [file.path for file in files] == index.paths
        self._files = files if same else [ImageFile(path, 0, 0, 0) for path in index.paths]

    @property
    def takes_words(self) -> bool:
        """Whether the index can be searched by words."""
        return self._encode is not None or takes_words(self.index)

    def list_images(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Returns what the page shows of images.

        Args:
            ids: Rows of the index.
        """
        return [self._entry(number) for number in ids]

    def search_entry(self, number: int, wanted: Wanted) -> dict[str, Any]:
        """Returns the images that are most like an image of the index, as JSON values.

        Args:
            number: Id of the image, whose stored vector is the query.
            wanted: Number of results, and reranking.
        """
        vector = self.index.vectors().take(np.array([number]))[0].astype(np.float32)
        return self._search(vector, wanted, self._entry(number) | {"box": None}, 0.0)

    def search_part(self, number: int, box: Sequence[float], wanted: Wanted) -> dict[str, Any]:
        """Returns the images that are most like a part of an image of the index, as JSON values.

        Args:
            number: Id of the image.
            box: The part, x1, y1, x2, y2 in pixels.
            wanted: Number of results, and reranking.

        Raises:
            UnreadableImage: The image cannot be read or described.
            ValueError: Nothing of the image is inside the box.
        """
        entry = self._entry(number)
        with self._originals.open(number) as file:
            return self._search_file(file, wanted, box, entry, entry["name"], MAX_MEGAPIXELS)

    def search_upload(
        self,
        data: bytes,
        wanted: Wanted,
        *,
        box: Sequence[float] | None = None,
        max_megapixels: float = MAX_MEGAPIXELS,
    ) -> dict[str, Any]:
        """Returns the images that are most like an image or a part of it, as JSON values.

        Args:
            data: Contents of an image file.
            wanted: Number of results, and reranking.
            box: The part, x1, y1, x2, y2 in pixels; None takes the whole image.
            max_megapixels: Larger images are refused before they are decoded.

        Raises:
            UnreadableImage: The data is no image, or one that cannot be described.
            ValueError: Nothing of the image is inside the box.
        """
        entry = {"id": None, "path": None, "name": None, "bytes": len(data)}
        return self._search_file(data, wanted, box, entry, "the upload", max_megapixels)

    def search_words(self, words: str, wanted: Wanted) -> dict[str, Any]:
        """Returns the images that are most like words, as JSON values.

        Args:
            words: The query, as `ggem_jax.retrieval.index.text_search.parse_words` takes it.
            wanted: Number of results, and reranking.

        Raises:
            IndexRefused: The index cannot be searched by words.
            ValueError: The words are none, or there is no tokenizer.
            ModuleNotFoundError: The package tokenizers is not installed.
        """
        parse_words(words)
        with self._one_at_a_time:
            if self._encode is None:
                self._encode = load_text_encoder(self.index, weights=self._weights)
            start = time.perf_counter()
            vector = vector_of_words(words, self._encode)
            seconds = time.perf_counter() - start
        query = {"id": None, "path": None, "name": words, "bytes": 0, "box": None}
        return self._search(vector, wanted, query | {"width": 0, "height": 0}, seconds)

    def warm_up(self) -> None:
        """Loads the network and compiles a search, so that the first query does not wait for it."""
        if not len(self.index):
            return
        self._vector_of(np.full((240, 320, 3), 127, np.uint8), "grey")
        self.search_entry(0, Wanted(1, Method("none", 1, {})))

    def _search(
        self, vector: np.ndarray, wanted: Wanted, query: dict[str, Any], network_seconds: float
    ) -> dict[str, Any]:
        start = time.perf_counter()
        results = self.index.search(vector[None], wanted.k, rerank=wanted.method)
        seconds = time.perf_counter() - start
        (found,) = results.record()["queries"]
        return {
            "query": query,
            "rerank": wanted.method.record(),
            "seconds": {"network": network_seconds, "search": seconds},
            "index_changed": self._revision() != self._version,
            "results": [
                self._entry(number) | hit
                for number, hit in zip(results.ids[0].tolist(), found["results"], strict=True)
            ],
        }

    def _entry(self, number: int) -> dict[str, Any]:
        file = self._files[number]
        size = {"width": file.width, "height": file.height, "bytes": file.bytes}
        return {"id": number, "path": file.path, "name": shown(file.path), **size}

    def _search_file(
        self,
        source: bytes | IO[bytes],
        wanted: Wanted,
        box: Sequence[float] | None,
        entry: dict[str, Any],
        name: str,
        max_megapixels: float,
    ) -> dict[str, Any]:
        """A whole image is decoded as those of the index are, at the size that is described."""
        whole = self._described_by() if box is None else None
        with self._originals.decoding:
            found = decode_image(
                source,
                name=name,
                fit=whole.fit if whole else None,
                draft=whole.draft if whole else False,
                max_megapixels=max_megapixels,
            )
        part = found.pixels if box is None else crop(found.pixels, box)
        start = time.perf_counter()
        vector = self._vector_of(part, name)
        seconds = time.perf_counter() - start
        query = entry | {"width": found.width, "height": found.height, "box": box}
        return self._search(vector, wanted, query, seconds)

    def _vector_of(self, pixels: RGB, name: str) -> Float[np.ndarray, " d"]:
        extract = self._described_by()
        with self._one_at_a_time:
            if extract is None:
                return self._describe(pixels)  # type: ignore[misc]
            return describing.describe_images(extract, [pixels], [name])[0]

    def _described_by(self) -> describing.LazyExtract | None:
        """The network of the index; None where a function was given instead."""
        with self._one_at_a_time:
            if self._describe is None and self._extract is None:
                settings = describing.find_settings(
                    self.index.folder,
                    self.index.settings,
                    weights=self._weights,
                    whitening=self._whitening,
                )
                self._extract = describing.LazyExtract(settings)
            return self._extract

    def _revision(self) -> int:
        try:
            return facts_of(self.index.folder).revision
        except IndexRefused:
            return -1
