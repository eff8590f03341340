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


def designs_last(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, which `jax.vmap` computes with mapped axes last.

    Args:
        function: Function of pytrees of numbers, and of arrays of which the first axis is no
            design. It must not close over traced arrays.
    """
    wrapped = jax.custom_batching.custom_vmap(function)

    @wrapped.def_vmap
    def of_designs(count, batched, *arguments):
        def move(value, is_batched):
            value = jnp.asarray(value)
            if is_batched:
                return jnp.moveaxis(value, 0, -1)
            return value[..., None] if value.ndim else value

        def move_back(value):  # a last axis of 1 is the same for all designs
            return jnp.moveaxis(jnp.broadcast_to(value, (*value.shape[:-1], count)), -1, 0)

        found = function(*jax.tree.map(move, list(arguments), batched))
        return jax.tree.map(move_back, found), jax.tree.map(lambda _: True, found)

    return wrapped


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
