"""Fills a vector database with the vectors of an index, and searches the index through it.

The id of an image in the database is a digest of its path, its content and its vector, so that a
push changes only what differs, and resumes wherever it stopped. The collection's marker says which
images it holds, and whether it holds all of them; a search compares this with the index.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ggem_jax.retrieval.index.index import Index
from ggem_jax.retrieval.index.reading import reading
from ggem_jax.retrieval.index.report import OnProgress
from ggem_jax.retrieval.index.store import IndexRefused
from ggem_jax.retrieval.stores.protocol import Collection, Marker, StoreRefused, VectorStore

_ROWS = 1000  # vectors that are read and sent together


@dataclass(frozen=True)
class Pushed:
    """What `push` did."""

    index: str  # folder of the index
    store: str  # address of the database
    collection: str
    added: int  # vectors that were sent
    unchanged: int  # vectors that were there
    removed: int  # vectors that the index no longer has

    def record(self) -> dict[str, Any]:
        """Returns JSON values."""
        return asdict(self)


def push(
    path: Path | str,
    store: str,
    *,
    collection: str | None = None,
    on_progress: OnProgress | None = None,
) -> Pushed:
    """Brings a collection of a vector database in line with an index.

    If it is interrupted, the collection is marked as incomplete, and the same call resumes. One
    push at a time may write to a collection.

    Args:
        path: Folder of the index.
        store: Address of the database, `milvus:FILE.db` or `milvus:http://HOST:19530`.
        collection: Name of the collection; None takes the name of the index's folder, with `_` for
            all but letters and digits.
        on_progress: Function that is called with the numbers of vectors done and of all vectors.

    Returns:
        The numbers of vectors that were sent, there already, and removed.

    Raises:
        IndexRefused: There is no index, it holds no images, or it changes meanwhile.
        StoreRefused: The database cannot be used, or the collection is of something else.
        ImportError: The extra `milvus` is not installed.
    """
    opened = Index.open(path)
    if not len(opened):
        raise IndexRefused(f"{path} holds no images: add some first")
    ids = read_ids(opened)
    name = collection or default_collection(opened.folder)
    with contextlib.closing(_open(store, name, opened.dim, new=True)) as target:
        added, removed = fill_collection(target, opened, ids, on_progress=on_progress)
    return Pushed(str(path), store, name, added, len(opened) - added, removed)


def default_collection(folder: Path) -> str:
    """Returns the name of the collection that an index is pushed into if none is given.

    Args:
        folder: Folder of the index.
    """
    name = re.sub(r"[^A-Za-z0-9]", "_", folder.absolute().name)[:100]
    return name if name[:1].isalpha() or name.startswith("_") else f"_{name}"


def fill_collection(
    target: Collection,
    opened: Index,
    ids: Int[np.ndarray, " n"],
    *,
    on_progress: OnProgress | None = None,
) -> tuple[int, int]:
    """Brings an open collection in line with an index, and returns what was added and removed.

    Args:
        target: The collection.
        opened: The index.
        ids: The id of each image, as `read_ids` returns them.
        on_progress: As in `push`.

    Raises:
        StoreRefused: The collection is of something else, or another push writes to it.
    """
    wanted, there = make_marker(opened, ids), target.read_marker()
    if there is not None and (there.source, there.dim) != (wanted.source, wanted.dim):
        raise StoreRefused(
            "the collection holds an index of other images or settings: give another --collection"
        )
    if there == wanted:
        return 0, 0
    target.write_marker(wanted._replace(complete=False))
    known = target.ids()
    missing, extra = np.flatnonzero(~np.isin(ids, known)), np.setdiff1d(known, ids)
    for start in range(0, len(missing), _ROWS):
        if on_progress is not None:
            on_progress(len(ids) - len(missing) + start, len(ids))
        rows = missing[start : start + _ROWS]
        target.put(ids[rows], opened.vectors().take(rows).astype(np.float32))
    target.drop(extra)
    if not np.array_equal(np.sort(target.ids()), np.sort(ids)):
        raise StoreRefused("the collection changed meanwhile: let one push at a time write to it")
    target.write_marker(wanted)
    if on_progress is not None:
        on_progress(len(ids), len(ids))
    return len(missing), len(extra)


def read_ids(opened: Index) -> Int[np.ndarray, " n"]:
    """Returns the id of each image in a vector database, from 0 to 2^63 - 1.

    Args:
        opened: The index.

    Raises:
        IndexRefused: The index has changed since it was opened.
    """
    with reading(opened.folder) as database:
        rows = database.execute(
            "SELECT path, content, vector_crc32 FROM images ORDER BY id"
        ).fetchall()
    if [os.fsdecode(path) for path, *_ in rows] != opened.paths:
        raise IndexRefused(f"{opened.folder} is being written: wait until it has finished")
    digests = (
        hashlib.blake2b(b"%d %b %b" % (crc32, content, path), digest_size=8).digest()
        for path, content, crc32 in rows
    )
    ids = np.frombuffer(b"".join(digests), "<u8") >> np.uint64(1)
    if len(np.unique(ids)) != len(ids):
        raise IndexRefused(f"two images of {opened.folder} have the same digest: move one of them")
    return ids.astype(np.int64)


def make_marker(opened: Index, ids: Int[np.ndarray, " n"]) -> Marker:
    """Returns the marker of a collection that holds an index.

    Args:
        opened: The index.
        ids: The id of each image.
    """
    source = json.dumps([opened.settings, str(opened.root), opened.dtype], sort_keys=True)
    version = hashlib.blake2b(np.sort(ids).astype("<i8").tobytes(), digest_size=16).hexdigest()
    digest = hashlib.blake2b(source.encode(), digest_size=16).hexdigest()
    return Marker(True, version, len(ids), opened.dim, digest)


class PushedIndex:
    """A pushed index as a `VectorStore` whose ids are those of the index.

    Args:
        store: The collection.
        ids: The id of each image in the collection.
    """

    def __init__(self, store: VectorStore, ids: Int[np.ndarray, " n"]):
        self.store, self.numbers, self.order = store, ids, np.argsort(ids)
        self.ordered = ids[self.order]

    def search(
        self, vectors: Float[np.ndarray, "q d"], k: int
    ) -> tuple[Int[np.ndarray, "q k"], Float[np.ndarray, "q k"]]:
        """Returns ids of the index and scores, as `VectorStore.search`.

        Args:
            vectors: Queries `(q, d)` in float32.
            k: Results of each query.

        Raises:
            StoreRefused: The collection holds an image that the index does not have.
        """
        found, scores = self.store.search(vectors, k)
        at = np.minimum(np.searchsorted(self.ordered, found), len(self.ordered) - 1)
        if (self.ordered[at] != found).any():
            raise StoreRefused("the collection changed meanwhile: push the index again")
        return self.order[at], scores

    def take(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m d"]:
        """Returns the vectors of ids of the index, as `VectorStore.take`.

        Args:
            ids: Ids of the index, `(m,)`.
        """
        return self.store.take(self.numbers[ids])


@contextlib.contextmanager
def opening_pushed(opened: Index, store: str, collection: str | None) -> Iterator[PushedIndex]:
    """Opens the collection that an index was pushed into.

    Args:
        opened: The index.
        store, collection: As in `push`.

    Yields:
        The collection as a `VectorStore` whose ids are those of the index.

    Raises:
        StoreRefused: There is no such collection, it is not complete, or it holds another version
            of the index.
        ImportError: The extra `milvus` is not installed.
    """
    ids, name = read_ids(opened), collection or default_collection(opened.folder)
    with contextlib.closing(_open(store, name, opened.dim, new=False)) as source:
        marker, wanted = source.read_marker(), make_marker(opened, ids)
        if marker != wanted:
            state = (
                "another version of the index"
                if marker is not None and marker.complete
                else "an unfinished push"
            )
            raise StoreRefused(
                f"{name} in {store} holds {state}: run ggem-retrieval push {opened.folder} {store}"
                f"{f' --collection {collection}' if collection else ''}"
            )
        yield PushedIndex(source, ids)


def _open(store: str, name: str, dim: int, *, new: bool) -> Collection:
    from ggem_jax.retrieval.stores.milvus import open_milvus

    return open_milvus(store, name, dim=dim, new=new)
