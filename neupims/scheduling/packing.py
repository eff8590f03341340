"""Packings: policies that deal the requests of a trace without channels to those of a machine."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from neupims.machine.hardware import Hardware
from neupims.machine.traces import Packing
from neupims.machine.workload import Batch, Decoder, Parallel, make_batch
from neupims.scheduling import policies
from neupims.timing.gemv import request_work


def greedy(
    hardware: Hardware, model: Decoder, seq_lens: Int[Array, " r"], parallel: Parallel
) -> Batch:
    """Returns requests packed as published: algorithms 1 and 2 of the paper, halved by the third.

    Args:
        hardware: The machine.
        model: The model.
        seq_lens: The tokens of each request, (r,).
        parallel: How the model is spread over devices.
    """
    channels = int(hardware.hbm.num_channels)
    found = _greedy(hardware, model, jnp.asarray(seq_lens), parallel, channels)
    return make_batch(seq_lens, *found, num_channels=channels)


@partial(jax.jit, static_argnums=4)
def _greedy(hardware, model, seq_lens, parallel, channels):
    work = policies.estimate_cycles(hardware, model, seq_lens, parallel)
    placed = policies.pack_longest_first(work, channels)
    return placed, policies.halving_split(placed, channels)


def longest_first(
    hardware: Hardware, model: Decoder, seq_lens: Int[Array, " r"], parallel: Parallel
) -> Batch:
    """Returns requests packed longest first by the model's own estimate, and split like a snake.

    Args:
        hardware: The machine.
        model: The model.
        seq_lens: The tokens of each request, (r,).
        parallel: How the model is spread over devices.
    """
    channels = int(hardware.hbm.num_channels)
    found = _longest_first(hardware, model, jnp.asarray(seq_lens), parallel, channels)
    return make_batch(seq_lens, *found, num_channels=channels)


@partial(jax.jit, static_argnums=4)
def _longest_first(hardware, model, seq_lens, parallel, channels):
    work = request_work(hardware, model, seq_lens, parallel).sum(axis=1)
    placed = policies.pack_longest_first(work, channels)
    return placed, policies.snake_split(work, placed, channels)


def round_robin(
    hardware: Hardware, model: Decoder, seq_lens: Int[Array, " r"], parallel: Parallel
) -> Batch:
    """Returns requests dealt to the channels in turn (round robin), halved by the simulator's rule.

    Args:
        hardware: The machine.
        model: The model; not used.
        seq_lens: The tokens of each request, (r,).
        parallel: How the model is spread over devices; not used.
    """
    channels = int(hardware.hbm.num_channels)
    return make_batch(
        seq_lens, policies.round_robin(len(seq_lens), channels), num_channels=channels
    )


# The names of --packing.
PACKINGS: dict[str, Packing] = {
    "greedy": greedy,
    "longest-first": longest_first,
    "round-robin": round_robin,
}
