"""Files of vectors: `.npy` files that grow at their end.

The number of rows that count is in `index.sqlite`. A writer appends vectors, writes the header that
counts them, and then commits their number, each step through to the disk. Rows beyond that number
are left by a writer that was interrupted: they are ignored, and overwritten.
"""

import os
import re
import secrets
from dataclasses import replace
from pathlib import Path

import numpy as np

from ggem_jax.retrieval.index.store import Damaged, Facts

SHARD_BYTES = 1 << 28  # largest shard: a reader of 16 GiB of vectors maps 64 files
_HEADER_BYTES = 128  # a multiple of 64, and room for any number of rows


def is_shard(name: str) -> bool:
    """Returns whether a file's name is that of a file of vectors.

    Args:
        name: Name of the file without its folder.
    """
    return name.startswith("vectors-") and name.endswith(".npy")


def shard_file(folder: Path, shard: int) -> Path:
    """Returns the file of a shard.

    Args:
        folder: Folder of the index.
        shard: Number of the shard, a random one of 47 bits.
    """
    return folder / f"vectors-{shard:012x}.npy"


def rows_of_shard(facts: Facts) -> int:
    """Returns the number of vectors in a full shard.

    Args:
        facts: Facts of the index, with `dim` and `dtype`.
    """
    return max(1, SHARD_BYTES // max(1, facts.row_bytes()))


def append_vectors(
    folder: Path, facts: Facts, vectors: np.ndarray
) -> tuple[Facts, list[tuple[int, int]]]:
    """Appends vectors to the last shard, and to new ones where it is full, through to the disk.

    Args:
        folder: Folder of the index.
        facts: Facts of the index, with `dim` and `dtype`; their `shards` say where to append.
        vectors: Vectors `(n, dim)` in the dtype of the index.

    Returns:
        The facts with the new numbers of rows, and the shard and row of each vector.

    Raises:
        OSError: A file cannot be written.
    """
    shards, places = dict(facts.shards), list[tuple[int, int]]()
    capacity = rows_of_shard(facts)
    while len(vectors):
        shard = next(reversed(shards), -1)
        if shards.get(shard, capacity) >= capacity or not is_sound(folder, shard, facts):
            shard = secrets.randbits(47)
        rows = shards.get(shard, 0)
        part, vectors = vectors[: capacity - rows], vectors[capacity - rows :]
        _write(folder, shard, rows, part, facts)
        shards[shard] = rows + len(part)
        places += [(shard, row) for row in range(rows, rows + len(part))]
    return replace(facts, shards=shards), places


def is_sound(folder: Path, shard: int, facts: Facts) -> bool:
    """Returns whether a shard can be read: its size and header are right.

    Args:
        folder, shard, facts: As in `map_shard`.
    """
    try:
        return len(map_shard(folder, shard, facts)) > 0
    except (Damaged, OSError):
        return False


def _write(folder: Path, shard: int, rows: int, vectors: np.ndarray, facts: Facts) -> None:
    """Writes vectors behind the first rows of a shard, and then the header that counts them."""
    start = _HEADER_BYTES + rows * facts.row_bytes()
    header = _npy_header(rows + len(vectors), facts)
    with shard_file(folder, shard).open("r+b" if rows else "xb") as handle:
        for place, data in ((start, np.ascontiguousarray(vectors).data), (0, header)):
            handle.seek(place)
            handle.write(data)
            handle.truncate(start + vectors.nbytes)
            os.fsync(handle.fileno())
    if not rows:
        sync(folder)


def sync(path: Path) -> None:
    """Flushes a file, or the list of names in a folder, to the disk.

    Args:
        path: The file or folder.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def map_shard(folder: Path, shard: int, facts: Facts) -> np.ndarray:
    """Returns the vectors of a shard, `(rows, dim)`, memory-mapped.

    Args:
        folder: Folder of the index.
        shard: Number of the shard, a key of `facts.shards`.
        facts: Facts of the index.

    Raises:
        FileNotFoundError: There is no such file.
        Damaged: The file is too short or has another header; the text follows its name in a
            sentence.
    """
    rows, file = facts.shards[shard], shard_file(folder, shard)
    with file.open("rb") as handle:
        header = handle.read(_HEADER_BYTES)
        there = os.fstat(handle.fileno()).st_size
        if there < (expected := _HEADER_BYTES + rows * facts.row_bytes()):
            raise Damaged(f"is truncated ({there} bytes where {expected} are expected)")
        found = re.search(rb"'shape': \(([0-9]{1,18}),", header)
        counted = int(found[1]) if found else -1
        if (
            header != _npy_header(counted, facts)
            or not rows <= counted <= (there - _HEADER_BYTES) // facts.row_bytes()
        ):
            raise Damaged("has an altered header")
        return np.asarray(
            np.memmap(handle, facts.stored(), "r", _HEADER_BYTES, (rows, facts.dim))
        )  # indexing np.memmap itself is slow


def _npy_header(rows: int, facts: Facts) -> bytes:
    """Version 1.0 of NumPy's format in 128 bytes; the same for any NumPy."""
    text = (
        f"{{'descr': '{facts.stored().str}', 'fortran_order': False, 'shape': ({rows},"
        f" {facts.dim}), }}"
    )
    text = text.ljust(_HEADER_BYTES - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")
