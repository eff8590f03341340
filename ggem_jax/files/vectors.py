"""Vectors and rankings in files: `.npy`, `.npz` and JSON."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ggem_jax.files.atomic import replacing, write_text


@dataclass(frozen=True)
class VectorFile:
    """Vectors `(n, d)` of a file that are read block by block.

    A block is float32, or float16 where the file is; with `normalize` each vector is divided by its
    length. Reading a vector that is not finite raises `ValueError`.
    """

    name: str  # of the file, for errors
    array: np.ndarray  # (n, d) as stored, perhaps memory-mapped
    normalize: bool = False  # whether vectors are divided by their lengths

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and channels."""
        n, d = self.array.shape
        return n, d

    def take(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m d"]:
        """Returns the vectors with some ids.

        Args:
            ids: Rows of the file, `(m,)`.

        Returns:
            The vectors, `(m, d)`.
        """
        return self._read(self.array[ids])

    def blocks(self, rows: int) -> Iterator[tuple[int, Float[np.ndarray, "m d"]]]:
        """Yields the first row and the vectors of each block, in order.

        Args:
            rows: The most rows of a block.
        """
        return (
            (start, self._read(self.array[start : start + rows]))
            for start in range(0, len(self.array), rows)
        )

    def _read(self, block: np.ndarray) -> np.ndarray:
        stored = np.float16 if block.dtype.itemsize == 2 else np.float32
        kind = np.float64 if self.normalize else stored
        with np.errstate(over="ignore"):
            block = np.asarray(block, kind)
        if not np.isfinite(block).all():
            raise ValueError(f"{self.name} holds vectors that are not finite in {np.dtype(kind)}")
        return _unit(block) if self.normalize else block


def _unit(block: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m d"]:
    """Unit vectors from float64; zeros stay.

    They are first divided by their largest number, so that no square is too large or too small.
    """
    largest = np.maximum(block.max(axis=1, keepdims=True), -block.min(axis=1, keepdims=True))
    block = block / np.where(largest > 0, largest, 1)
    block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1)
    return block.astype(np.float32)


def file_of(name: str) -> str:
    """Returns `FILE.npz` of `FILE.npz:NAME`, and other names as they are.

    Args:
        name: Name of a file of vectors, as `read_array` takes it.
    """
    before, ending, key = name.rpartition(".npz:")
    return f"{before}.npz" if ending and key else name


def read_array(name: str) -> np.ndarray:
    """Returns the array of a `.npy` file, memory-mapped, or of a `.npz` file.

    Args:
        name: Path of the file; `FILE.npz:NAME` chooses one of several arrays.

    Raises:
        ValueError: The file cannot be read, or it holds several arrays and none is chosen.
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
            raise ValueError(f"{key or names[0]} in it is not an array")
        return array
    except Exception as error:  # NumPy, zipfile and zlib raise a dozen kinds over damaged files
        raise ValueError(f"{file} cannot be read as an array: {_reason(error)}") from None


def read_vectors(name: str, *, normalize: bool = False) -> VectorFile:
    """Returns the vectors `(n, d)` of a file, which are read as they are used.

    Args:
        name: Path of the file, as `read_array` takes it.
        normalize: Whether each vector is divided by its length when it is read.

    Raises:
        ValueError: The file cannot be read, or does not hold floating-point vectors `(n, d)`.
    """
    array = read_array(name)
    if array.ndim != 2 or 0 in array.shape or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{name} must hold vectors (n, d) of floating point, not {array.dtype} of shape"
            f" {array.shape}"
        )
    return VectorFile(name, array, normalize)


def read_ranking(file: str) -> tuple[Float[np.ndarray, "q k"] | None, Int[np.ndarray, "q k"]]:
    """Returns the scores `(q, k)` of a file, `None` where it has none, and the ids `(q, k)`.

    Args:
        file: A `.npy` file of ids, or a `.npz` or `.json` file of ids and scores by these names.

    Raises:
        ValueError: The file cannot be read, or holds something else.
    """
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


def write_npz(file: str | Path, **arrays: Any) -> None:
    """Writes arrays as an `.npz` file, which appears when it is complete.

    Args:
        file: The file to write; a file of this name is replaced.
        **arrays: The arrays by name.

    Raises:
        OSError: The file cannot be written.
    """
    with replacing(file) as temporary, temporary.open("wb") as handle:
        np.savez(handle, **arrays)


def write_ranking(
    file: Path, scores: Float[np.ndarray, "q k"], ids: Int[np.ndarray, "q k"]
) -> None:
    """Writes a ranking as `.json` or `.npz`, by the ending; the file appears when it is complete.

    Args:
        file: The file to write; an ending other than `.json` gives the form of `.npz`.
        scores: Scores of the candidates of each query, `(q, k)`, best first.
        ids: Their rows in the database, `(q, k)`.

    Raises:
        OSError: The file cannot be written.
    """
    if file.suffix.lower() == ".json":
        write_text(file, json.dumps({"ids": ids.tolist(), "scores": scores.tolist()}))
    else:
        write_npz(file, ids=ids, scores=scores)


def _ids(file: str, ids: np.ndarray) -> np.ndarray:
    if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{file} must hold ids (q, k), whole numbers, not {ids.dtype} of shape {ids.shape}"
        )
    return np.asarray(ids)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "it is not such a file" if "pickle" in str(error) else str(error) or type(error).__name__
