"""Searches in an index: queries of every kind -> vectors -> ranking -> reranked ranking."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from ggem_jax.files.images import (
    RGB,
    UnfitImage,
    UnreadableImage,
    convert_image,
    crop,
    decode_image,
    read_image,
)
from ggem_jax.retrieval.index.describing import LazyExtract, describe_images, find_settings
from ggem_jax.retrieval.index.index import Index
from ggem_jax.retrieval.index.pushing import opening_pushed
from ggem_jax.retrieval.index.store import IndexRefused
from ggem_jax.retrieval.methods import Method, as_method, check_count
from ggem_jax.retrieval.stores.searching import search_store

Box = Sequence[float]  # x1, y1, x2, y2 in pixels
Query = str | os.PathLike | np.ndarray | Image.Image


@dataclass(frozen=True)
class Results:
    """The results of each query, best first; q queries, k results each.

    Where `method` is "none", ranks and scores before and after are the same.
    """

    ids: Int[np.ndarray, "q k"]  # rows of the index
    paths: np.ndarray  # (q, k) str, relative to `root`
    scores: Float[np.ndarray, "q k"]  # after reranking
    ranks: Int[np.ndarray, "q k"]  # after reranking, from 1
    scores_before: Float[np.ndarray, "q k"]  # of the first search; NaN for results beyond it
    ranks_before: Int[np.ndarray, "q k"]  # of the first search, from 1; 0 for results beyond it
    queries: tuple[str | None, ...]  # path of each query; None for arrays, images and vectors
    boxes: tuple[tuple[float, ...] | None, ...]  # part of each query, pixels; None for all of it
    method: Method
    folder: Path  # folder of the index
    root: Path  # folder of its images
    size: int  # number of images in the index
    settings: dict[str, Any]  # settings of the index

    def __len__(self) -> int:
        return len(self.ids)

    def record(self) -> dict[str, Any]:
        """Returns JSON values: the index, the method, and the results of each query."""
        return {
            "index": str(self.folder.absolute()),
            "root": str(self.root),
            "rerank": self.method.record(),
            "queries": [
                {"query": query, "box": box, "results": self._hits(row)}
                for row, (query, box) in enumerate(zip(self.queries, self.boxes, strict=True))
            ],
        }

    def _hits(self, row: int) -> list[dict[str, Any]]:
        hits = zip(
            self.paths[row].tolist(),
            self.ranks[row].tolist(),
            self.scores[row].tolist(),
            self.ranks_before[row].tolist(),
            self.scores_before[row].tolist(),
            strict=True,
        )
        return [
            {
                "path": path,
                "rank": rank,
                "score": score,
                "rank_before": before or None,
                "score_before": score_before if before else None,
            }
            for path, rank, score, before, score_before in hits
        ]


def search_index(
    index: Index,
    queries: Query | Sequence[Query] | Float[np.ndarray, "q d"],
    k: int = 10,
    *,
    rerank: Method | str | None = None,
    boxes: Sequence[Box | None] | None = None,
    weights: str | None = None,
    whitening: str | None = None,
    use_stored: bool = True,
    store: str | None = None,
    collection: str | None = None,
) -> Results:
    """Returns the results of a search in an index, as `Index.search` documents.

    Args:
        index: The opened index.
        queries, k, rerank, boxes, weights, whitening, use_stored, store, collection: As in
            `Index.search`.

    Raises:
        IndexRefused: The index is empty, or the files that it was made with are not there.
        UnreadableImage: A query holds no image, or one that cannot be described.
        ValueError: The queries, k or the options do not fit.
    """
    method = as_method(rerank)
    if not len(index):
        raise IndexRefused(f"{index.folder} holds no images: add some first")
    k = min(check_count("k", k), len(index))
    each = as_queries(queries)
    if boxes is not None and len(boxes) != len(each):
        raise ValueError(f"boxes must be one for each of the {len(each)} queries, not {len(boxes)}")
    boxes = list(boxes) if boxes is not None else [None] * len(each)
    if isinstance(each, np.ndarray):
        vectors = _check_vectors(each, index.dim, boxes)
        if method.name != "none":
            _warn_of_lengths(vectors)
    else:
        vectors = query_vectors(
            index, each, boxes, weights=weights, whitening=whitening, use_stored=use_stored
        )
    if store is None:
        before, after = method.search(vectors, index.vectors(), k=k)
    else:
        with opening_pushed(index, store, collection) as source:
            before, after = search_store(vectors, source, k=k, size=len(index), rerank=method)
    scores, ids = after
    ranks_before, scores_before = _find_before(ids, before)
    return Results(
        ids=ids,
        paths=np.array(index.paths, object)[ids],
        scores=scores,
        ranks=np.broadcast_to(np.arange(1, ids.shape[1] + 1), ids.shape),
        scores_before=scores_before,
        ranks_before=ranks_before,
        queries=tuple(_name(query) for query in each),
        boxes=tuple(None if box is None else tuple(box) for box in boxes),
        method=method,
        folder=index.folder,
        root=index.root,
        size=len(index),
        settings=index.settings,
    )


def as_queries(queries: Any) -> list[Any] | Float[np.ndarray, "q d"]:
    """Returns queries of every kind as a list of images, or as vectors `(q, d)`.

    Args:
        queries: One image or several (paths, `(h, w, 3)` uint8 arrays, PIL images), one array of
            images `(q, h, w, 3)`, or vectors `(d,)` or `(q, d)` of floating point, also in a list.

    Raises:
        ValueError: The queries are empty, of another kind, or vectors among images.
    """
    if isinstance(queries, str | os.PathLike | Image.Image):
        return [queries]
    if not isinstance(queries, list | tuple):
        array = np.asarray(queries)
        if array.dtype == np.uint8 and array.shape[-1:] == (3,) and array.ndim in (3, 4):
            return [array] if array.ndim == 3 else list(array)
        if array.ndim in (1, 2) and array.size and _is_floating(array):
            return np.atleast_2d(array)
        raise ValueError(
            "queries must be images (paths, (h, w, 3) uint8 arrays, PIL images) or vectors (q, d)"
            f" of floating point, not {array.dtype} of shape {array.shape}"
        )
    if not queries:
        raise ValueError("queries must be at least one image or vector")
    if all(not isinstance(query, str | os.PathLike | Image.Image) for query in queries):
        arrays = [_as_array(query) for query in queries]
        if all(array.ndim < 2 and array.shape == arrays[0].shape for array in arrays):
            return as_queries(np.stack(arrays))  # vectors, or the numbers of one vector
        if any(array.ndim == 1 for array in arrays):
            lengths = sorted({len(array) if array.ndim == 1 else 0 for array in arrays} - {0})
            raise ValueError(
                "vectors must all be of one length and not among images, not"
                f" {len(arrays)} queries with vectors of {' and '.join(map(str, lengths))} numbers"
            )
        queries = arrays
    return list(queries)


def _as_array(query: Any) -> np.ndarray:
    try:
        return np.asarray(query)
    except ValueError:  # rows of different lengths
        raise ValueError("each query must be an image or a vector, not rows of lengths") from None


def _is_floating(array: np.ndarray) -> bool:
    return np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16


def query_vectors(
    index: Index,
    queries: Sequence[Any],
    boxes: Sequence[Box | None],
    *,
    weights: str | None = None,
    whitening: str | None = None,
    use_stored: bool = True,
) -> Float[np.ndarray, "q d"]:
    """Returns the vectors of images: stored ones if they are in the index, else described.

    Args:
        index: The index that the images are compared with.
        queries: Images, q paths, `(h, w, 3)` uint8 arrays or PIL images.
        boxes: The part of each, x1, y1, x2, y2 in pixels, or None for the whole image.
        weights, whitening: As in `find_settings`.
        use_stored: Whether a whole image whose path is in the index takes its stored vector.

    Returns:
        The vectors, `(q, dim)` in float32.

    Raises:
        IndexRefused: The files that the index was made with are not there.
        UnreadableImage: A query holds no image, or one that cannot be described.
        ValueError: An array is no image, or nothing of an image is inside its box.
    """
    ids = {index.root / path: i for i, path in enumerate(index.paths)} if use_stored else {}
    stored = {
        number: ids[path]
        for number, (query, box) in enumerate(zip(queries, boxes, strict=True))
        if box is None and (path := _absolute(query)) is not None and path in ids
    }
    vectors = np.empty((len(queries), index.dim), np.float32)
    vectors[list(stored)] = index.vectors().take(np.array(list(stored.values()), int))
    others = [number for number in range(len(queries)) if number not in stored]
    if others or weights or whitening:
        settings = find_settings(index.folder, index.settings, weights=weights, whitening=whitening)
    if others:
        extract = LazyExtract(settings)
        images = [read_query(queries[number], boxes[number], extract) for number in others]
        names = [_name(queries[number]) or f"query {number + 1}" for number in others]
        vectors[others] = describe_images(extract, images, names)
    return vectors


def read_query(query: Query, box: Box | None = None, extract: LazyExtract | None = None) -> RGB:
    """Returns an image, or the part of it in the box, as `(h, w, 3)` uint8.

    Args:
        query: Path, `(h, w, 3)` uint8 array or PIL image.
        box: The corners x1, y1, x2, y2 in pixels, cut to the image; None takes the whole image.
        extract: The extractor that the image is read for: a whole file is decoded as those of its
            index are, at the size that is described. None keeps the size.

    Raises:
        UnreadableImage: The file is missing or holds no image.
        ValueError: The array is no image, or nothing of the image is inside the box.
    """
    if isinstance(query, Image.Image):
        image = convert_image(query, name="a query")
    elif isinstance(query, str | os.PathLike):
        if not os.path.isfile(query):
            state = "no file" if os.path.exists(query) else "not there"
            raise UnreadableImage(f"{os.fspath(query)} is {state}: name an image")
        if box is None and extract is not None:
            try:
                return decode_image(Path(query), fit=extract.fit, draft=extract.draft).pixels
            except UnfitImage as error:
                raise UnreadableImage(f"{os.fspath(query)}: {error}") from None
        image = read_image(Path(query))
    else:
        image = np.asarray(query)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(
                f"an image must be (h, w, 3) uint8, not {image.dtype} of shape {image.shape}"
            )
    try:
        return image if box is None else crop(image, box)
    except ValueError as error:
        raise ValueError(f"{_name(query) or 'a query'}: {error}") from None


def _find_before(
    ids: np.ndarray, before: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks from 1 and scores of ids in the first search; 0 and NaN for those beyond it."""
    ranks, scores = np.zeros(ids.shape, int), np.full(ids.shape, np.nan, np.float32)
    for row, own in enumerate(ids):
        place = {number: i for i, number in enumerate(before[1][row].tolist())}
        for column, number in enumerate(own.tolist()):
            if (i := place.get(number)) is not None:
                ranks[row, column], scores[row, column] = i + 1, before[0][row, i]
    return ranks, scores


def _check_vectors(
    vectors: np.ndarray, dim: int, boxes: Sequence[Box | None]
) -> Float[np.ndarray, "q d"]:
    if vectors.shape[1] != dim:
        raise ValueError(f"vectors must be (q, {dim}) as in the index, not {vectors.shape}")
    if any(box is not None for box in boxes):
        raise ValueError("boxes belong to images: leave them out for vectors")
    with np.errstate(over="ignore"):
        found = vectors.astype(np.float32)
    if not np.isfinite(found).all():
        raise ValueError("vectors must be finite in float32: some numbers are NaN or too large")
    return found


def _warn_of_lengths(vectors: Float[np.ndarray, "q d"]) -> None:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    if np.abs(lengths - 1).max() > 0.01:
        warnings.warn(
            "reranking needs vectors of length 1, and some queries have another length: divide each"
            " by its length",
            stacklevel=4,
        )


def _name(query: Any) -> str | None:
    return os.fspath(query) if isinstance(query, str | os.PathLike) else None


def _absolute(query: Any) -> Path | None:
    name = _name(query)
    return None if name is None else Path(os.path.abspath(name))
