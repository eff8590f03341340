"""Exact search: every query against every vector, block by block, in bounded memory."""

import mmap
from functools import partial, reduce
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ggem_jax.retrieval.vectors import (
    Database,
    Ranking,
    ahead,
    blocks_of,
    check_database,
    check_mesh,
    check_queries,
    is_callback,
    make_sortable,
    on_device,
    shape_of,
    take_vectors,
)

Precision = Literal["float32", "bfloat16"]

# bytes of widened vectors and their scores in a block: vectors that fit in a cache are multiplied
# as fast as float32 vectors
_BLOCK_BYTES = 16 * 2**20
# products in one sum: for unit vectors, sums of 2048 differ from float64 by 2e-6, and sums in
# pieces of 512 by 5e-7
_SUMMED = 512
# results beyond k that are scored again in float64: at first, and at most, if float32 cannot order
# the results around rank k
_MARGIN, _WIDEST = 16, 4096
_CLOSE = 1e-6  # largest error of a float32 score, relative to the lengths of both vectors
_SCORED = 4096  # vectors that are widened to float64 at a time
# bytes of vectors in a block that is read: one is searched, one waits, and one is being read
_READ_BYTES = 128 * 2**20
# NumPy searches at most so many numbers of a database, and makes at most so many scores: up to
# there it takes less time than the loading of one compiled program
_NUMPY_NUMBERS, _NUMPY_SCORES = 2**25, 2**19
_NUMPY_BYTES = 2**20  # bytes of widened vectors that stay in a cache of the processor


def search(
    queries: Float[Array, "q d"],
    database: Database,
    *,
    k: int,
    precision: Precision = "float32",
    mesh: Mesh | None = None,
) -> Ranking:
    """Returns the k vectors with the largest dot product with each query, best first.

    The search is exact, and its memory is bounded for any n: vectors are widened block by block.
    Time grows with k, because each block is sorted together with the k best so far. Equal scores
    are ordered by smaller id; scores that are NaN come last.

    - With an array of JAX this is a pure function, for use inside `jit`. The scores of equal
      vectors may differ in the last bit, depending on their rows.
    - Other databases are read block by block. In "float32" the best are ordered by their scores in
      float64, rounded to float32, so that the order is the same on every device, unless more than
      4,096 vectors are too close to the k-th for float32. NumPy reads databases of up to 33 million
      numbers (26,000 vectors of 1,280), unless there are many queries: nothing is compiled then.

    Args:
        queries: Vectors `(q, d)` of floating point.
        database: An array `(n, d)` of JAX or NumPy (memory-mapped too) or a `Store`, in float32,
            float16 or bfloat16.
        k: Results of each query, from 1 to n.
        precision: "float32" multiplies in full precision on every device. "bfloat16" rounds both
            sides to bfloat16 and adds in float32. It keeps 99.5 % of the 100 best of 50,000 random
            unit vectors with d = 2,048, with errors of at most 2e-4 in the scores
            (`benchmarks.bench_search`).
        mesh: Devices that share the rows; None uses one device.

    Returns:
        Scores in float32 and ids in int32, each `(q, k)`.

    Raises:
        ValueError: Shapes, dtypes or values do not fit.
        TypeError: The database is a callback, which cannot be searched, or none of the above.

    Example:
        >>> import jax.numpy as jnp
        >>> from ggem_jax.retrieval import search
        >>> search(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0], [0.6, 0.8]]), k=1).ids.tolist()
        [[1]]
    """
    queries = check_queries(queries)
    database = check_database(database, queries.shape[1])
    if is_callback(database):
        raise TypeError(
            "search needs an array or a store: a callback cannot be asked for all vectors"
        )
    check_precision(precision)
    if mesh is not None:
        check_mesh(mesh)
    n, _ = shape_of(database)
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or not 1 <= k <= n:
        raise ValueError(
            f"k must be a whole number from 1 to the {n} rows of the database, not {k!r}"
        )
    options: dict[str, Any] = {"k": int(k), "precision": precision, "mesh": mesh}
    if on_device(database):
        return _search_on_device(queries, database, **options)
    small = n * queries.shape[1] <= _NUMPY_NUMBERS and n * len(queries) <= _NUMPY_SCORES
    if small and precision == "float32" and mesh is None:
        return _search_in_numpy(queries, database, int(k))
    return _search_blocks(queries, database, **options)


def check_precision(precision: str) -> None:
    """Raises `ValueError` unless the precision is "float32" or "bfloat16".

    Args:
        precision: The precision of dot products, as `search` takes it.
    """
    if precision not in get_args(Precision):
        raise ValueError(
            f"precision must be one of {', '.join(get_args(Precision))}, not {precision!r}"
        )


def similarity(
    a: Float[Array, "*b m d"], b: Float[Array, "*b n d"], precision: Precision
) -> Float[Array, "*b m n"]:
    """Returns all dot products of two sets of vectors in float32.

    In "float32" long vectors are summed in pieces of 512 products, as the rounding error grows with
    the length of a sum.

    Args:
        a: Vectors `(..., m, d)`.
        b: Vectors `(..., n, d)`.
        precision: As in `search`.

    Returns:
        The dot products, `(..., m, n)`.
    """
    if precision == "bfloat16":
        return jnp.einsum(
            "...md,...nd->...mn",
            a.astype(jnp.bfloat16),
            b.astype(jnp.bfloat16),
            preferred_element_type=jnp.float32,
        )
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    pieces = [slice(start, start + _SUMMED) for start in range(0, a.shape[-1], _SUMMED)]
    return reduce(
        jnp.add,
        [
            jnp.einsum(
                "...md,...nd->...mn", a[..., piece], b[..., piece], precision=lax.Precision.HIGHEST
            )
            for piece in pieces
        ],
    )


@partial(jax.jit, static_argnames=("k", "precision", "mesh"))
def _search_on_device(queries, database, *, k, precision, mesh):
    """Searches an array of JAX."""
    if mesh is None or mesh.size == 1:
        scores, ids = _best(queries, database, k, precision, first=0)
    else:
        n, share = len(database), -(-len(database) // mesh.size)
        padded = jnp.pad(database, ((0, share * mesh.size - n), (0, 0)))
        scores, ids = _over_devices(queries, padded, k, precision, mesh, first=0, end=n)
    return Ranking(scores, ids)


def _search_in_numpy(queries, database, k):
    """Searches a small database by scores in float64, rounded to float32."""
    (n, d), queries = database.shape, np.asarray(queries, np.float64)
    rows = max(_NUMPY_BYTES // (8 * d), 1)
    scores, widened = np.empty((len(queries), n), np.float32), np.empty((rows, d))
    with np.errstate(invalid="ignore", over="ignore"):
        for first, block in blocks_of(database, max(_READ_BYTES // (8 * d), 1)):
            for start in range(0, len(block), rows):
                part = block[start : start + rows]
                widened[: len(part)] = part
                at = first + start
                for own, query in zip(scores, queries, strict=True):
                    own[at : at + len(part)] = widened[: len(part)] @ query
    scores = np.maximum(np.where(np.isnan(scores), -np.inf, scores), np.finfo(np.float32).min)
    ids = np.stack([_best_ids(own, k) for own in scores])
    best = np.take_along_axis(scores, ids, axis=1)
    return Ranking(*jax.device_put((best, ids.astype(np.int32))))


def _best_ids(scores, k):
    """The ids of the k largest of scores `(n,)`; equal scores are ordered by smaller id."""
    last = np.partition(scores, len(scores) - k)[len(scores) - k]
    above, equal = np.flatnonzero(scores > last), np.flatnonzero(scores == last)
    ids = np.sort(np.concatenate([above, equal[: k - len(above)]]))
    return ids[np.argsort(-scores[ids], kind="stable")]


def _search_blocks(queries, database, *, k, precision, mesh):
    """Searches vectors that are read block by block; float64 decides between the best."""
    options = {"precision": precision, "mesh": mesh}
    if precision != "float32":
        return _read_through(queries, database, k=k, **options)
    n, margin = database.shape[0], _MARGIN
    while True:
        found = _read_through(queries, database, k=min(k + margin, n), **options)
        settled, sure = _settle(queries, database, found, k)
        if sure or margin >= min(_WIDEST, n - k):
            return settled
        margin *= 16


def _read_through(queries, database, *, k, precision, mesh):
    """The k best by the scores of the devices; the next block is read while one is searched."""
    n, d = database.shape
    devices = 1 if mesh is None else mesh.size
    rows = (
        max(_READ_BYTES // (np.dtype(getattr(database, "dtype", np.float32)).itemsize * d), 1)
        // devices
        * devices
        or devices
    )
    rows = rows if rows < n else -(-n // devices) * devices
    spread = None if mesh is None else NamedSharding(mesh, P(mesh.axis_names))
    best = Ranking(jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32))

    def read(numbered):
        start, block = numbered
        return start, _at_hand(block, rows)

    for start, block in ahead(map(read, blocks_of(database, rows))):
        best = _absorb(
            best,
            queries,
            jax.device_put(block, spread),
            np.int32(start),
            np.int32(n),
            k=k,
            precision=precision,
            mesh=mesh,
        )
        jax.block_until_ready(best)  # so that no more than three blocks are in memory
    return best


def _at_hand(block, rows):
    """The block, with rows of zeros at its end up to `rows`.

    Its address is a multiple of 64, so that JAX on a CPU takes it without a copy.
    """
    if len(block) == rows and block.flags.c_contiguous and block.ctypes.data % 64 == 0:
        block.reshape(-1).view(np.uint8)[
            :: mmap.PAGESIZE
        ].max()  # reads every page of a mapped file now, in this thread
        return block
    size = rows * block.shape[1] * block.dtype.itemsize
    memory = np.zeros(size + 64, np.uint8)
    skipped = -memory.ctypes.data % 64
    copy = memory[skipped : skipped + size].view(block.dtype).reshape(rows, block.shape[1])
    copy[: len(block)] = block
    return copy


def _settle(queries, database, found, k):
    """The k best by scores in float64, and whether no better vector can have been missed.

    The rounding of float32 depends on the sizes of blocks and on the device.
    """
    rows, sure = [], True
    for query, scores, ids in zip(
        np.asarray(queries, np.float64), *map(np.asarray, found), strict=True
    ):
        own = np.sort(ids)
        exact, length = np.empty(len(own), np.float32), 0.0
        for start in range(0, len(own), _SCORED):
            vectors = take_vectors(database, own[start : start + _SCORED], len(query)).astype(
                np.float64
            )
            with np.errstate(invalid="ignore", over="ignore"):
                exact[start : start + _SCORED] = vectors @ query
                length = max(
                    length,
                    float(np.sqrt(np.nan_to_num(np.einsum("nd,nd->n", vectors, vectors)).max())),
                )
        exact = np.maximum(np.where(np.isnan(exact), -np.inf, exact), np.finfo(np.float32).min)
        order = np.argsort(-exact, kind="stable")[:k]
        rows.append((exact[order], own[order]))
        sure &= len(own) == k or bool(
            scores[-1] < exact[order[-1]] - _CLOSE * length * np.linalg.norm(query)
        )
    best, numbers = map(np.stack, zip(*rows, strict=True))
    return Ranking(jnp.asarray(best), jnp.asarray(numbers, jnp.int32)), sure


@partial(jax.jit, static_argnames=("k", "precision", "mesh"))
def _absorb(best, queries, block, first, end, *, k, precision, mesh):
    most = min(k, len(block))
    if mesh is None or mesh.size == 1:
        found = _best(queries, block, most, precision, first, end)
    else:
        found = _over_devices(queries, block, most, precision, mesh, first, end)
    return _merge(best, found, k)


def _over_devices(queries, database, k, precision, mesh, first, end):
    """Each device searches its own rows, then all share their results."""
    axes = mesh.axis_names
    share = len(database) // mesh.size

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(axes), P(), P()), out_specs=P(None, axes))
    def own(queries, rows, first, end):
        begin = first + share * lax.axis_index(axes).astype(jnp.int32)
        return _best(queries, rows, min(k, share), precision, begin, end)

    scores, ids = own(queries, database, jnp.int32(first), jnp.int32(end))
    top, at = lax.top_k(scores, k)  # stable, and devices are in the order of their ids
    return top, jnp.take_along_axis(ids, at, axis=1)


def _best(queries, database, k, precision, first=0, end=None):
    """The k best rows of an array whose ids begin at `first`; ids from `end` on do not exist."""
    (q, d), n = queries.shape, len(database)
    rows = max(min(_BLOCK_BYTES // (4 * (d + 3 * q)), n), 1)

    def block(best, i):
        start = jnp.minimum(i * rows, n - rows)  # the last block starts earlier and repeats rows
        scores = make_sortable(
            similarity(queries, lax.dynamic_slice_in_dim(database, start, rows), precision)
        )
        at = start + jnp.arange(rows)
        fresh = at >= i * rows
        if end is not None:
            fresh &= first + at < end
        scores = jnp.where(fresh, scores, -jnp.inf)
        top, position = lax.top_k(scores, min(k, rows))
        return _merge(best, (top, (first + start + position).astype(jnp.int32)), k), None

    from ggem_jax.pooling.dispatch import vary_alike  # NumPy's search needs no poolings

    scores, ids, *_ = vary_alike(
        jnp.full((q, k), -jnp.inf), jnp.zeros((q, k), jnp.int32), queries, database
    )
    empty: Any = Ranking(scores, ids)  # type: ignore[arg-type]
    if rows == n:
        return block(empty, 0)[0]
    return lax.scan(block, empty, jnp.arange(-(-n // rows)))[0]


def _merge(best, found, k):
    """The k best of two rankings; `lax.top_k` is stable, so equal scores stay ordered by id."""
    scores, ids = (jnp.concatenate(pair, axis=1) for pair in zip(best, found, strict=True))
    top, at = lax.top_k(scores, k)
    return Ranking(top, jnp.take_along_axis(ids, at, axis=1))
