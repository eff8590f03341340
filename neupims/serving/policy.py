"""Policies of serving: who is admitted next, and to which channel.

An order gives each request a key; of those that wait, the least is admitted first. A placement
gives each channel a value; of those that can take the request, the least gets it. Both are
functions that are passed in. The tables at the end have those that a flag can name.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neupims.machine.hardware import Hardware
from neupims.machine.workload import Decoder, Parallel
from neupims.scheduling.policies import estimate_cycles
from neupims.serving.requests import Arrivals
from neupims.serving.state import Channels, Packing
from neupims.timing.gemv import request_work

PATIENCE = 10**6  # nanoseconds that a prompt waits for each of its tokens, by deadline

Order = Callable[[Arrivals], Int[np.ndarray, " n"]]
# (hardware, model, lengths, parallel) -> what a request of that length loads a channel with
Load = Callable[[Hardware, Decoder, Int[Array, " lengths"], Parallel], Float[Array, " lengths"]]


def first_come(arrivals: Arrivals) -> Int[np.ndarray, " n"]:
    """Returns keys by which requests are admitted in their order of arrival, (n,).

    Args:
        arrivals: The requests.
    """
    return np.arange(len(arrivals.inputs))


def shortest_first(arrivals: Arrivals) -> Int[np.ndarray, " n"]:
    """Returns keys by which short prompts are admitted first, equal ones as they came, (n,).

    A long prompt may wait for as long as shorter ones come.

    Args:
        arrivals: The requests.
    """
    return _rank(arrivals.inputs)


def by_deadline(arrivals: Arrivals) -> Int[np.ndarray, " n"]:
    """Returns keys by which those with the earliest deadline are admitted first, (n,).

    The deadline is the arrival and one millisecond for each token of the prompt, so that short
    prompts overtake long ones, but not for ever.

    Args:
        arrivals: The requests.
    """
    return _rank(arrivals.nanoseconds + PATIENCE * arrivals.inputs)


def _rank(values: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    keys = np.empty(len(values), np.int64)
    keys[np.argsort(values, kind="stable")] = np.arange(len(values))
    return keys


class Placement(NamedTuple):
    """How a channel is chosen for a request."""

    load: Load
    packing: Packing


def least_loaded(channels: Channels) -> Float[Array, " rows"]:
    """Returns the load of each channel: the least loaded one gets the request.

    Args:
        channels: The channels.
    """
    return channels.loads


def in_turn(channels: Channels) -> Float[Array, " rows"]:
    """Returns the distance of each channel from the one whose turn it is.

    Args:
        channels: The channels.
    """
    places = jnp.arange(channels.loads.shape[0])
    return 1.0 * ((places - channels.admitted) % channels.rows)


def modelled_work(
    hardware: Hardware, model: Decoder, lengths: Int[Array, " lengths"], parallel: Parallel
) -> Float[Array, " lengths"]:
    """Returns the cycles of logit and attend by the closed form, (lengths,).

    Args:
        hardware: The machine.
        model: The model.
        lengths: The tokens of requests.
        parallel: How the model is spread over devices.
    """
    return request_work(hardware, model, lengths, parallel).sum(axis=1)


ORDERS: dict[str, Order] = {
    "fcfs": first_come,
    "shortest-first": shortest_first,
    "deadline": by_deadline,
}
PLACEMENTS: dict[str, Placement] = {
    "greedy": Placement(estimate_cycles, least_loaded),  # as published
    "least-work": Placement(modelled_work, least_loaded),
    "round-robin": Placement(estimate_cycles, in_turn),
}
