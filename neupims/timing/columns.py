"""Functions of one design that are computed for many designs side by side.

`jax.vmap` makes mapped designs the first axis of every array that has another one, such as the
requests of a batch: the vectors of a processor then hold the requests of one design, and what
depends on the design alone is copied into all of them. Functions here put designs on the last axis
instead. A function that is wrapped by `designs_last` works with both: its records hold numbers, or
arrays of designs, and its arrays have requests first, or requests first and designs last.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

TOGETHER = 16  # requests of one step of a loop over requests

Columns = Any  # a pytree of arrays (r, *designs)


def designs_last(function: Callable[..., Any], *, together: int = 0) -> Callable[..., Any]:
    """Returns the function, which `jax.vmap` computes with mapped axes last.

    Args:
        function: Function of pytrees of numbers, and of arrays of which the first axis is no
            design. It must not close over traced arrays.
        together: Designs computed together on a CPU, so that their arrays fit its cache (default:
            all). Their number must be a multiple of it, or all are computed together.
    """
    wrapped = jax.custom_batching.custom_vmap(function)

    @wrapped.def_vmap
    def of_designs(count, batched, *arguments):
        leaves, tree = jax.tree.flatten(list(arguments))
        flags = jax.tree.leaves(batched)
        mapped = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]
        size = count
        if together and count % together == 0 and jax.default_backend() == "cpu":
            size = together

        def compute(mapped):
            """The results of `size` designs, designs first."""
            parts = iter(mapped)
            moved = [
                _move_last(next(parts)) if flag else _keep(leaf)
                for leaf, flag in zip(leaves, flags, strict=True)
            ]
            found = function(*jax.tree.unflatten(tree, moved))
            return jax.tree.map(lambda value: _move_first(value, size), found)

        blocks = [leaf.reshape(-1, size, *leaf.shape[1:]) for leaf in mapped]
        found = jax.lax.map(compute, blocks) if size < count else compute(mapped)
        if size < count:
            found = jax.tree.map(lambda value: value.reshape(count, *value.shape[2:]), found)
        return found, jax.tree.map(lambda _: True, found)

    return wrapped


def _move_last(value: Array) -> Array:
    return jnp.moveaxis(jnp.asarray(value), 0, -1)


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
    steps = -(-len(lengths) // TOGETHER)
    padding = [(0, steps * TOGETHER - len(lengths)), *[(0, 0)] * (lengths.ndim - 1)]
    parts = jnp.pad(lengths, padding).reshape(steps, TOGETHER, *lengths.shape[1:])

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
