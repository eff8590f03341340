"""Milvus as a vector database: a file of Milvus Lite, or the address of a server or cluster.

Vectors are kept in float32 under inner products, with an HNSW graph that finds nearly all of the
candidates; the rest of an index stays in the index. The marker is a row of a second collection. A
server that asks for a password finds `user:password` in the environment variable `MILVUS_TOKEN`.
Needs the extra `milvus`.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ggem_jax.retrieval.stores.protocol import Marker, StoreRefused

SCHEME = "milvus:"
_SERVERS = ("http://", "https://", "tcp://", "unix:")
_MARKER = "_marker"  # ending of the name of the collection with the marker
_BYTES = 1 << 21  # of vectors in one message
_GRAPH = {"M": 32, "efConstruction": 200}
# vectors that a search visits for each result, and at most: with Milvus Lite's default, 60 % of 400
# candidates of 20,000 were missing (`benchmarks.bench_stores`)
_VISITED, _MOST_VISITED = 4, 32_768
_ROWS = 10_000  # ids in one message; Milvus allows 16,384


def open_milvus(url: str, name: str, *, dim: int, new: bool = False) -> "MilvusCollection":
    """Returns a collection of a Milvus database.

    Args:
        url: `milvus:FILE.db` for a file of Milvus Lite, `milvus:http://HOST:19530` for a server.
        name: Name of the collection: letters, digits and `_`.
        dim: Dimension of its vectors.
        new: Whether a file and a collection that do not exist are made.

    Raises:
        StoreRefused: The address or name is wrong, the database cannot be opened, or there is no
            such collection.
        ImportError: The extra `milvus` is not installed.
    """
    address = url.removeprefix(SCHEME)
    if not url.startswith(SCHEME) or not address:
        raise StoreRefused(
            f"{url} is no address of a vector database: use milvus:FILE.db or"
            " milvus:http://HOST:19530"
        )
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", name):
        raise StoreRefused(
            f"a collection must be named by letters, digits and _, not {name!r}: give another"
            " --collection"
        )
    try:
        from pymilvus import MilvusClient
    except ImportError as error:
        raise ImportError(f"{url} needs pymilvus: pip install 'ggem-jax[milvus]'") from error
    for logger in ("pymilvus", "milvus_lite"):  # they print tracebacks where we print a sentence
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    local = not address.startswith(_SERVERS)
    if local:
        _check_file(Path(address), new=new)
    with _one_sentence(address, local=local):
        client = MilvusClient(address, token=os.environ.get("MILVUS_TOKEN", ""))
    collection = MilvusCollection(client, address, name, dim)
    try:
        collection.open(new=new)
    except BaseException:
        collection.close()
        raise
    return collection


def _check_file(file: Path, *, new: bool) -> None:
    """Refuses a path where Milvus Lite would fail, or write between files of something else."""
    if file.suffix != ".db":
        raise StoreRefused(f"{file} must end with .db: Milvus Lite asks for it")
    if not new and not file.exists():
        raise StoreRefused(f"{file} is not there: push an index into it first")
    if not file.absolute().parent.is_dir():
        raise StoreRefused(f"{file} cannot be made: {file.parent} is no folder")
    known = file.is_dir() and (not any(file.iterdir()) or (file / "LOCK").exists())
    if file.exists() and not known:
        raise StoreRefused(f"{file} is no database of Milvus Lite: choose another name")


@contextlib.contextmanager
def _one_sentence(address: str, *, local: bool = False) -> Iterator[None]:
    from pymilvus import MilvusException

    try:
        yield
    except MilvusException as error:
        cause = " ".join(str(error.message or error).split())
        remedy = ": another process may have it open" if local else ""
        raise StoreRefused(f"{address} did not do what was asked ({cause}){remedy}") from error


class MilvusCollection:
    """A collection of Milvus, open until `close`; a `Collection` and a context manager.

    Args:
        client: Connection to the database.
        address: Address of the database, for error messages.
        name: Name of the collection.
        dim: Dimension of its vectors.
    """

    def __init__(self, client: Any, address: str, name: str, dim: int):
        self.client, self.address, self.name, self.dim = client, address, name, dim

    def __enter__(self) -> "MilvusCollection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        self.client.close()

    def open(self, *, new: bool) -> None:
        """Makes the collection ready for requests.

        Args:
            new: Whether it is made where it does not exist. The collection with the marker comes
                first, so that one without it is known to be of somebody else.

        Raises:
            StoreRefused: There is no such collection, or it is not one of ours.
        """
        names = (self.name + _MARKER, self.name)
        with _one_sentence(self.address):
            marked, there = map(self.client.has_collection, names)
            if there and not marked:
                raise StoreRefused(
                    f"{self.name} in {self.address} was made by another program: give another"
                    " --collection"
                )
            if not (marked and there) and not new:
                raise StoreRefused(
                    f"{self.address} has no finished collection {self.name}: push an index into it"
                    " first"
                )
            for name, known in zip(names, (marked, there), strict=True):
                if not known:
                    self._clear(name)
            if not marked:
                self._make(names[0], 2, with_value=True)
            if not there:
                self._make(names[1], self.dim)
            self._load(names, again=new and not self.address.startswith(_SERVERS))
            fields = self.client.describe_collection(self.name)["fields"]
            (dim,) = (field["params"]["dim"] for field in fields if field["name"] == "vector")
        if int(dim) != self.dim:
            raise StoreRefused(
                f"{self.name} in {self.address} has vectors of {dim} numbers, not {self.dim}: give"
                " another --collection"
            )

    def _clear(self, name: str) -> None:
        """Removes the folder of a collection that Milvus Lite was making when it was killed."""
        if not self.address.startswith(_SERVERS):
            shutil.rmtree(Path(self.address) / "collections" / name, ignore_errors=True)

    def _load(self, names: tuple[str, str], *, again: bool) -> None:
        """Loads the marker's collection and ours; `again` makes both again where that fails.

        Milvus Lite cannot load a graph that was half written when its process was killed.
        """
        from pymilvus import MilvusException

        try:
            for name in names:
                self.client.load_collection(name)
        except MilvusException:
            if not again:
                raise
            for name in reversed(names):  # without vectors first, so that no marker speaks of them
                self.client.drop_collection(name)
            self._make(names[0], 2, with_value=True)
            self._make(names[1], self.dim)
            self._load(names, again=False)

    def _make(self, name: str, dim: int, *, with_value: bool = False) -> None:
        from pymilvus import DataType

        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        if with_value:
            schema.add_field("value", DataType.VARCHAR, max_length=4096)
        index = self.client.prepare_index_params()
        index.add_index("vector", index_type="HNSW", metric_type="IP", params=_GRAPH)
        self.client.create_collection(
            name, schema=schema, index_params=index, consistency_level="Strong"
        )

    def search(
        self, vectors: Float[np.ndarray, "q d"], k: int
    ) -> tuple[Int[np.ndarray, "q k"], Float[np.ndarray, "q k"]]:
        """Returns ids and scores, as `VectorStore.search`.

        Args:
            vectors: Queries `(q, d)` in float32.
            k: Results of each query, at most 16,384.

        Raises:
            StoreRefused: The database cannot be asked, or has fewer vectors.
        """
        ef = min(max(_VISITED * k, 64), _MOST_VISITED)
        with _one_sentence(self.address):
            found = self.client.search(
                self.name,
                data=list(np.asarray(vectors, np.float32)),
                limit=k,
                output_fields=["id"],
                search_params={"metric_type": "IP", "params": {"ef": ef}},
                consistency_level="Strong",
            )
        if any(len(hits) != k for hits in found):
            raise StoreRefused(
                f"{self.name} in {self.address} gave {min(map(len, found))} of {k} results: push"
                " the index again, or take fewer candidates"
            )
        ids = np.array([[hit["id"] for hit in hits] for hits in found], np.int64)
        return ids, np.array([[hit["distance"] for hit in hits] for hits in found], np.float32)

    def take(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m d"]:
        """Returns the vectors of ids in float32, as `VectorStore.take`.

        Args:
            ids: Whole numbers `(m,)`.

        Raises:
            StoreRefused: The database cannot be asked, or has no such vector.
        """
        taken = np.empty((len(ids), self.dim), np.float32)
        at = {number: row for row, number in enumerate(np.asarray(ids).tolist())}
        rows = max(_BYTES // (4 * self.dim), 1)
        count = 0
        for start in range(0, len(ids), rows):
            own = np.asarray(ids[start : start + rows]).tolist()
            with _one_sentence(self.address):
                found = self.client.get(
                    self.name, ids=own, output_fields=["vector"], consistency_level="Strong"
                )
            for row in found:
                taken[at[row["id"]]] = row["vector"]
                count += 1
        if count != len(ids):
            raise StoreRefused(
                f"{self.name} in {self.address} lacks {len(ids) - count} of {len(ids)} vectors:"
                " push the index again"
            )
        return taken

    def read_marker(self) -> Marker | None:
        """Returns the marker, or None where nothing has been pushed yet.

        Raises:
            StoreRefused: The database cannot be asked, or the marker is of a newer version.
        """
        with _one_sentence(self.address):
            found = self.client.get(
                self.name + _MARKER, ids=[0], output_fields=["value"], consistency_level="Strong"
            )
        try:
            return Marker(**json.loads(found[0]["value"])) if found else None
        except (TypeError, ValueError) as error:
            raise StoreRefused(
                f"{self.name} in {self.address} has a marker that cannot be read: update ggem_jax,"
                " or give another --collection"
            ) from error

    def write_marker(self, marker: Marker) -> None:
        """Replaces the marker, after all that was written before is on disk.

        Args:
            marker: The new marker.

        Raises:
            StoreRefused: The database cannot be asked.
        """
        with _one_sentence(self.address):
            self.client.flush(self.name)
            row = {"id": 0, "vector": [1.0, 0.0], "value": json.dumps(marker._asdict())}
            self.client.upsert(self.name + _MARKER, [row])
            self.client.flush(self.name + _MARKER)

    def ids(self) -> Int[np.ndarray, " n"]:
        """Returns the ids of all vectors.

        Raises:
            StoreRefused: The database cannot be asked.
        """
        numbers: list[int] = []
        with _one_sentence(self.address):
            pages = self.client.query_iterator(
                self.name,
                filter="id >= 0",
                output_fields=["id"],
                batch_size=_ROWS,
                consistency_level="Strong",
            )
            try:
                while page := pages.next():
                    numbers += [row["id"] for row in page]
            finally:
                pages.close()
        return np.array(numbers, np.int64)

    def put(self, ids: Int[np.ndarray, " m"], vectors: Float[np.ndarray, "m d"]) -> None:
        """Adds vectors, and replaces those of known ids.

        Args:
            ids: Whole numbers `(m,)`.
            vectors: Their vectors `(m, d)`.

        Raises:
            StoreRefused: The database cannot be asked.
        """
        rows = max(_BYTES // (4 * self.dim), 1)
        for start in range(0, len(ids), rows):
            own = zip(
                ids[start : start + rows].tolist(),
                np.asarray(vectors[start : start + rows], np.float32),
                strict=True,
            )
            with _one_sentence(self.address):
                self.client.upsert(self.name, [{"id": i, "vector": v} for i, v in own])

    def drop(self, ids: Int[np.ndarray, " m"]) -> None:
        """Removes vectors.

        Args:
            ids: Whole numbers `(m,)`; unknown ones have no effect.

        Raises:
            StoreRefused: The database cannot be asked.
        """
        for start in range(0, len(ids), _ROWS):
            with _one_sentence(self.address):
                self.client.delete(self.name, ids=ids[start : start + _ROWS].tolist())
