"""Vectors and rankings in files of anybody's: `.npy`, `.npz`, JSON."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ggem_jax.files.atomic import replacing


@dataclass(frozen=True)
class VectorFile:
    """Vectors `(n, d)` as a store: read block by block, in float16 or float32, of length 1 where
    that is asked for.

    What is not finite raises `ValueError` when it is read.
    """

    name: str
    array: np.ndarray
    normalize: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        n, d = self.array.shape
        return n, d

    def take(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m d"]:
        return self._read(self.array[ids])

    def blocks(self, rows: int) -> Iterator[tuple[int, Float[np.ndarray, "m d"]]]:
        return (
            (start, self._read(self.array[start : start + rows]))
            for start in range(0, len(self.array), rows)
        )

    def _read(self, block: np.ndarray) -> np.ndarray:
        kind = (
            np.float64
            if self.normalize
            else np.float16
            if block.dtype.itemsize == 2
            else np.float32
        )
        with np.errstate(over="ignore"):
            block = np.asarray(block, kind)
        if not np.isfinite(block).all():
            raise ValueError(f"{self.name} holds vectors that are not finite in {np.dtype(kind)}")
        return _unit(block) if self.normalize else block


def _unit(block: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m d"]:
    """From float64, first by the largest number of each so that no square is too large or too
    small; zeros stay.
    """
    largest = np.maximum(block.max(axis=1, keepdims=True), -block.min(axis=1, keepdims=True))
    block = block / np.where(largest > 0, largest, 1)
    block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1)
    return block.astype(np.float32)


def file_of(name: str) -> str:
    """`FILE.npz` of `FILE.npz:NAME`; other names as they are."""
    before, ending, key = name.rpartition(".npz:")
    return f"{before}.npz" if ending and key else name


def read_array(name: str) -> np.ndarray:
    """The array of a `.npy` file, mapped, or of a `.npz` file: the only one there, or the one of
    `FILE.npz:NAME`. Raises `ValueError`.
    """
    file = file_of(name)
    key = name[len(file) + 1 :]
    try:
        loaded = np.load(file, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            names = loaded.files
            if key and key not in names:
                raise ValueError(f"it has no array {key!r}, but {', '.join(names)}")
            if not key and len(names) != 1:
                raise ValueError(
                    f"it holds {', '.join(names) or 'nothing'}: name one array as {file}:NAME"
                )
            array = loaded[key or names[0]]
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{key or names[0]} in it is no array")
        return array
    except (
        Exception
    ) as error:  # a damaged file fails in NumPy, zipfile or zlib with errors of a dozen kinds
        raise ValueError(f"{file} cannot be read as an array: {_reason(error)}") from None


def read_vectors(name: str, *, normalize: bool = False) -> VectorFile:
    """Vectors `(n, d)` of floating point. Raises `ValueError`."""
    array = read_array(name)
    if array.ndim != 2 or 0 in array.shape or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{name} must hold vectors (n, d) of floating point, not {array.dtype} of shape"
            f" {array.shape}"
        )
    return VectorFile(name, array, normalize)


def read_ranking(file: str) -> tuple[Float[np.ndarray, "q k"] | None, Int[np.ndarray, "q k"]]:
    """Scores, where the file has them, and ids."""
    ending = Path(file).suffix.lower()
    if ending == ".npy":
        return None, _ids(file, read_array(file))
    try:
        if ending == ".json":
            values: Any = json.loads(Path(file).read_text(encoding="utf-8-sig"))
        else:
            with np.load(file, allow_pickle=False) as loaded:
                values = {name: loaded[name] for name in loaded.files}
        ids = np.asarray(values["ids"])
        scores = np.asarray(values["scores"], np.float32) if "scores" in values else None
    except KeyError:
        raise ValueError(f"{file} must hold ids, and may hold scores") from None
    except Exception as error:  # as above
        raise ValueError(f"{file} cannot be read as a ranking: {_reason(error)}") from None
    if scores is not None and not np.isfinite(scores).all():
        raise ValueError(f"{file} holds scores that are not finite")
    return scores, _ids(file, ids)


def write_ranking(
    file: Path, scores: Float[np.ndarray, "q k"], ids: Int[np.ndarray, "q k"]
) -> None:
    """As `.json` or `.npz`, by the name; it appears when it is complete."""
    with replacing(file) as temporary, temporary.open("wb") as handle:
        if file.suffix.lower() == ".json":
            handle.write(json.dumps({"ids": ids.tolist(), "scores": scores.tolist()}).encode())
        else:
            np.savez(handle, ids=ids, scores=scores)


def _ids(file: str, ids: np.ndarray) -> np.ndarray:
    if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{file} must hold ids (q, k), whole numbers, not {ids.dtype} of shape {ids.shape}"
        )
    return np.asarray(ids)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "it is no such file" if "pickle" in str(error) else str(error) or type(error).__name__
