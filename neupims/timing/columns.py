"""Functions of one design that are computed for many designs side by side.

`jax.vmap` makes mapped designs the first axis of every array that has another one, such as the
requests of a batch: the vectors of a processor then hold the requests of one design, and what
depends on the design alone is copied into all of them. Functions here put designs on the last axis
instead. A function that is wrapped by `designs_last` works with both: its records hold numbers, or
arrays of designs, and its arrays have requests first, or requests first and designs last.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

REQUESTS_TOGETHER = 64  # requests of one step of a loop over requests
VECTOR = 16  # float32 numbers in the longest vectors of a CPU; blocks are multiples of it

Columns = Any  # a pytree of arrays (r, *designs)


def designs_last(function: Callable[..., Any], *, together: int | None = None):
    """Returns the function, which `jax.vmap` computes with mapped axes last.

    Args:
        function: Function of pytrees of numbers, and of arrays of which the first axis is no
            design. It must not close over traced arrays.
        together: Most designs computed together on a CPU, so that their arrays fit its cache
            (default: all).
    """
    wrapped = jax.custom_batching.custom_vmap(function)

    @wrapped.def_vmap
    def of_designs(count, batched, *arguments):
        leaves, tree = jax.tree.flatten(list(arguments))
        is_mapped = jax.tree.leaves(batched)
        mapped = [leaf for leaf, flag in zip(leaves, is_mapped, strict=True) if flag]

        def compute(some):
            """The results of some designs; they are the first axis of arguments and results."""
            size, of_some = len(some[0]), iter(some)
            moved = [
                jnp.moveaxis(next(of_some), 0, -1) if flag else _keep(leaf)
                for leaf, flag in zip(leaves, is_mapped, strict=True)
            ]
            found = function(*jax.tree.unflatten(tree, moved))
            return jax.tree.map(lambda value: _move_first(value, size), found)

        on_cpu = jax.default_backend() == "cpu"
        found = in_blocks(compute, mapped, together if on_cpu and together else count)
        return found, jax.tree.map(lambda _: True, found)

    return wrapped


def in_blocks(function: Callable[[Any], Any], columns: Any, block: int) -> Any:
    """Returns the function of rows, which are computed in blocks of one size, one after another.

    Args:
        function: Function of some rows, a pytree of arrays (n, ...), to another one.
        columns: All rows.
        block: Most rows of a block; rounded up to a multiple of `VECTOR`.

    Returns:
        The result for all rows, arrays (n, ...).
    """
    rows = len(jax.tree.leaves(columns)[0])
    if rows <= block:
        return function(columns)
    count = -(-rows // block)
    size = -(-rows // count // VECTOR) * VECTOR
    count = -(-rows // size)

    def fill(column):
        padding = [(0, count * size - rows), *[(0, 0)] * (column.ndim - 1)]
        return jnp.pad(column, padding, mode="edge").reshape(count, size, *column.shape[1:])

    found = jax.lax.map(function, jax.tree.map(fill, columns))
    return jax.tree.map(lambda part: part.reshape(count * size, *part.shape[2:])[:rows], found)


def _keep(value) -> Array:
    """A value that is the same for all designs; arrays get a last axis of 1."""
    value = jnp.asarray(value)
    return value[..., None] if value.ndim else value


def _move_first(value: Array, count: int) -> Array:
    value = jnp.broadcast_to(value, (*jnp.shape(value)[:-1], count))  # the last axis may be 1
    return jnp.moveaxis(value, -1, 0)


def reduce_requests(
    combine: Callable[[Array, Array], Array], function: Callable[[Array], Columns], lengths: Array
) -> Columns:
    """Returns the values of `function` combined over requests: a sum, or the largest.

    Args:
        combine: Function of two arrays, such as `jnp.add`.
        function: Function of the lengths of some requests to their values, arrays (r, *designs).
        lengths: The lengths of all requests, (r, *designs).

    Returns:
        Arrays (*designs).
    """
    steps = -(-len(lengths) // REQUESTS_TOGETHER)
    size = -(-len(lengths) // steps)
    padding = [(0, steps * size - len(lengths)), *[(0, 0)] * (lengths.ndim - 1)]
    parts = jnp.pad(lengths, padding).reshape(steps, size, *lengths.shape[1:])

    def step(number, found):
        return jax.tree.map(combine, found, function(parts[number]))

    found = jax.lax.fori_loop(1, steps, step, function(parts[0]))
    return jax.tree.map(lambda rows: functools.reduce(combine, list(rows)), found)


def sum_by_place(values: Columns, places: Array, count: int) -> Array:
    """Returns the sums of the requests of each place.

    Args:
        values: Values of each request, (r, k, *designs).
        places: The place of each request, such as its channel, (r, *designs).
        count: The number of places.

    Returns:
        Sums, (places, k, *designs).
    """
    if places.size == len(places):  # the same places in all designs
        return jax.ops.segment_sum(values, places.reshape(-1), count)
    designs = max(values.shape[-1], places.shape[-1])  # one of them may be the same for all
    of_designs = jnp.moveaxis(jnp.broadcast_to(values, (*values.shape[:-1], designs)), -1, 0)
    spread = jnp.broadcast_to(places, (len(values), designs))
    sums = jax.vmap(lambda rows, at: jax.ops.segment_sum(rows, at, count))(of_designs, spread.T)
    return jnp.moveaxis(sums, 0, -1)


def pack_pairs(values: Sequence[Array]) -> list[Array]:
    """Returns complex arrays, each of two arrays: its real and its imaginary part.

    A compiler makes a loop for each array of a result, and each loop computes all that it needs: a
    loop for two arrays computes what they share once.

    Args:
        values: Arrays of one shape, to broadcasting.
    """
    pairs = [values[at : at + 2] for at in range(0, len(values), 2)]
    return [jax.lax.complex(*jnp.broadcast_arrays(pair[0], pair[-1])) for pair in pairs]


def unpack_pairs(pairs: Sequence[Array], count: int) -> list[Array]:
    """Returns the arrays that `pack_pairs` packed.

    Args:
        pairs: Its result.
        count: The number of arrays.
    """
    return [part for pair in pairs for part in (pair.real, pair.imag)][:count]
