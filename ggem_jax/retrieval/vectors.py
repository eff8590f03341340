"""Where the vectors of a database come from, and what a ranking is.

A database is an array `(n, d)` of JAX or NumPy (a memory-mapped file among them), a store, or a
callback that returns the vectors of ids.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeGuard, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

T = TypeVar("T")


class Ranking(NamedTuple):
    """The results of each query, best first; equal scores are ordered by smaller id."""

    scores: Float[Array, "q k"]  # float32: dot products, or the scores of a reranker
    ids: Int[Array, "q k"]  # int32: rows of the database


@runtime_checkable
class Store(Protocol):
    """Vectors that need not be in memory, such as an open index or a vector database."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of vectors and their dimension, (n, d)."""

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Returns the vectors `(m, d)` of ids.

        Args:
            ids: Rows of the store, whole numbers `(m,)`.
        """

    def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields all vectors by id in blocks: the id of the first vector, and the vectors `(m, d)`.

        The search calls this in a thread of its own.

        Args:
            rows: Vectors in a block; the last block may have fewer.
        """


Callback = Callable[[np.ndarray], np.ndarray]  # ids (m,) -> vectors (m, d)
Database = Float[Array, "n d"] | np.ndarray | Store | Callback


def is_callback(database: Any) -> TypeGuard[Callback]:
    """Returns whether the database is a function of ids, which cannot be searched.

    Args:
        database: Any of the kinds of `Database`.
    """
    return callable(database) and not isinstance(database, Store)


def on_device(database: Any) -> TypeGuard[jax.Array]:
    """Returns whether the database is an array of JAX, whose search can be traced.

    Args:
        database: Any of the kinds of `Database`.
    """
    return isinstance(database, jax.Array)


def shape_of(database: Any) -> tuple[int, int]:
    """Returns (n, d) of an array or store.

    Args:
        database: A database that is not a callback.
    """
    return database.shape


def check_queries(queries: Float[Array, "q d"]) -> Float[Array, "q d"]:
    """Returns queries `(q, d)` in float32, and raises for anything else.

    Args:
        queries: Vectors `(q, d)` of floating point, q and d at least 1.

    Raises:
        ValueError: The queries have another shape or dtype.
    """
    queries = queries if isinstance(queries, jax.Array) else np.asarray(queries)
    if queries.ndim != 2 or 0 in queries.shape or not jnp.issubdtype(queries.dtype, jnp.floating):
        raise ValueError(
            "queries must be (q, d) of floating point with at least one of each, not"
            f" {queries.dtype} of shape {queries.shape}"
        )
    if isinstance(queries, jax.Array):
        return queries.astype(jnp.float32)
    with np.errstate(over="ignore"):
        return jax.device_put(queries.astype(np.float32))  # jnp.asarray would compile a program


def check_database(database: Database, dim: int | None) -> Database:
    """Returns the database unchanged, and raises unless it can be used with the queries.

    Args:
        database: An array or store `(n, dim)` with 1 <= n < 2^31, or a callback, which is not
            checked.
        dim: Dimension d of the queries; None without queries, for any d of at least 1.

    Raises:
        TypeError: The database is no array, store or function.
        ValueError: It has another shape, is an array of whole numbers, or lies on a mesh with
            explicit axis types.
    """
    if is_callback(database):
        return database
    if not isinstance(database, Store | np.ndarray | jax.Array):
        raise TypeError(
            "database must be an array (n, d), a store with shape, take and blocks, or a function"
            f" of ids, not {type(database)}"
        )
    shape = tuple(database.shape)
    if len(shape) != 2 or 0 in shape or shape[1] != (shape[1] if dim is None else dim):
        wanted = "(n, d) with n and d" if dim is None else f"(n, {dim}) as the queries are, with n"
        raise ValueError(f"database must be {wanted} at least 1, not of shape {shape}")
    if shape[0] >= 2**31:
        raise ValueError(f"database must have fewer than 2^31 rows, not {shape[0]}")
    if isinstance(database, np.ndarray | jax.Array) and not jnp.issubdtype(
        database.dtype, jnp.floating
    ):
        raise ValueError(f"database must be floating point, not {database.dtype}")
    if on_device(database):
        check_mesh(jax.typeof(database).sharding.mesh)
    return database


def check_ranking(ranking: Ranking, queries: Float[Array, "q d"], database: Database) -> Ranking:
    """Returns the ranking in float32 and int32, and raises unless it fits queries and database.

    Each id must exist, and may occur once for each query. Of traced ids only the shape is checked.

    Args:
        ranking: Scores and ids, each `(q, k)`, k at least 1.
        queries: Vectors `(q, d)`.
        database: The database that the ids are rows of; ids of a callback may be up to 2^31 - 1.

    Raises:
        ValueError: The shapes differ, or an id is not whole, does not exist or occurs twice.
    """
    scores, ids = ranking
    if (
        np.ndim(ids) != 2
        or np.shape(ids) != np.shape(scores)
        or np.shape(ids)[0] != len(queries)
        or np.shape(ids)[1] == 0
    ):
        raise ValueError(
            f"ranking must have scores and ids of one shape ({len(queries)}, k) with k at least 1,"
            f" not {np.shape(scores)} and {np.shape(ids)}"
        )
    if isinstance(ids, jax.core.Tracer):
        return Ranking(jnp.asarray(scores, jnp.float32), ids)
    known = np.asarray(ids)
    if not np.issubdtype(known.dtype, np.integer):
        raise ValueError(f"the ids of a ranking must be whole numbers, not {known.dtype}")
    least, most = int(known.min()), int(known.max())
    limit = 2**31 if is_callback(database) else shape_of(database)[0]
    if least < 0 or most >= limit:
        raise ValueError(
            f"the ids of a ranking must be from 0 to {limit - 1}, not from {least} to {most}"
        )
    ascending = np.sort(known, axis=1)
    twice = np.any(ascending[:, 1:] == ascending[:, :-1], axis=1)
    if twice.any():
        query = int(np.argmax(twice))
        raise ValueError(
            f"a ranking must have each id once for each query; query {query} has one twice"
        )
    return Ranking(jnp.asarray(scores, jnp.float32), jnp.asarray(known, jnp.int32))


def check_mesh(mesh: Any) -> None:
    """Raises `ValueError` if a mesh has explicit axis types.

    Args:
        mesh: A `jax.sharding.Mesh`, or the abstract mesh of an array.
    """
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            "meshes with explicit axis types are not supported: make the mesh with AxisType.Auto,"
            " or use jax.sharding.auto_axes"
        )


def take_vectors(database: Database, ids: Int[np.ndarray | Array, "..."], dim: int) -> np.ndarray:
    """Returns the vectors of ids of any shape, in memory.

    Args:
        database: An array `(n, dim)`, a store or a callback.
        ids: Rows of the database, `(...)`.
        dim: Dimension of the vectors.

    Returns:
        The vectors, `(..., dim)`, in a dtype that JAX supports.

    Raises:
        ValueError: The store or callback gives another shape, or no floating point.
    """
    # both are copies: a store may change the ids it is given, and reuse the vectors it returns
    flat = np.array(ids).reshape(-1)
    if isinstance(database, np.ndarray | jax.Array):
        vectors = np.asarray(database[flat])
    else:
        count = len(flat)
        vectors = np.array(database.take(flat) if isinstance(database, Store) else database(flat))
        if vectors.shape != (count, dim):
            raise ValueError(
                f"the database must return {dim} numbers for each of {count} ids, {(count, dim)},"
                f" not {vectors.shape}"
            )
    return native(vectors).reshape(*np.shape(ids), dim)


def native(vectors: np.ndarray) -> np.ndarray:
    """Returns vectors in a dtype that JAX supports.

    Foreign byte orders and floats longer than 64 bits become float32.

    Args:
        vectors: Floating-point numbers of any shape.

    Raises:
        ValueError: The vectors are not floating point.
    """
    if not jnp.issubdtype(vectors.dtype, jnp.floating):
        raise ValueError(f"the database must give floating-point numbers, not {vectors.dtype}")
    return (
        vectors
        if vectors.dtype.isnative and vectors.dtype.itemsize <= 8
        else vectors.astype(np.float32)
    )


def blocks_of(database: np.ndarray | Store, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields all vectors of a database in blocks, as `Store.blocks` does, in a dtype of JAX.

    Args:
        database: A NumPy array `(n, d)` or a store.
        rows: Vectors in a block; the last block may have fewer.

    Raises:
        ValueError: The store's blocks do not follow each other, or have another shape or dtype.
    """
    if not isinstance(database, Store):
        yield from (
            (start, native(np.asarray(database[start : start + rows])))
            for start in range(0, len(database), rows)
        )
        return
    (n, d), expected = database.shape, 0
    for start, given in database.blocks(rows):
        block, wanted = np.asarray(given), (min(rows, n - expected), d)
        if start != expected or block.shape != wanted:
            raise ValueError(
                f"the store's blocks must follow each other, {wanted} from {expected}, not"
                f" {block.shape} from {start}"
            )
        expected += len(block)
        # the store may overwrite a writeable block while it is searched
        yield start, native(block.copy() if block.flags.writeable else block)
    if expected != n:
        raise ValueError(f"the store's blocks must hold all {n} vectors, not {expected}")


def make_sortable(scores: Float[Array, "... m"]) -> Float[Array, "... m"]:
    """Returns scores that sort as numbers do.

    -0 becomes 0, and NaN and -inf become the lowest finite number.

    Args:
        scores: Floating-point scores of any shape.
    """
    scores = jnp.where(scores == 0, 0, scores)
    return jnp.maximum(jnp.where(jnp.isnan(scores), -jnp.inf, scores), jnp.finfo(scores.dtype).min)


def ahead(items: Iterable[T], size: int = 1) -> Iterator[T]:
    """Yields the items, which another thread makes while the previous ones are in use.

    Args:
        items: Iterable that the other thread runs through. What it raises is raised here.
        size: Finished items that wait at most.

    Raises:
        BaseException: Whatever the iterable raises.
    """
    made: queue.Queue = queue.Queue(size)
    stop, end = threading.Event(), object()

    def put(item) -> bool:
        while not stop.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join()
