"""Published and simple ways to give requests a channel and a sub-batch. All are pure functions that
jit and vmap; the number of channels is static.

A policy packs first (which channel holds a request) and splits then (which half of the channel's
list computes it). Work and loads are cycles.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neupims.machine.hardware import Hardware, banks
from neupims.machine.workload import Decoder, Parallel
from neupims.timing.gemv import heads_of_device, page_elements

GWRITE_ESTIMATE, TILE_ESTIMATE = (
    100.0,
    184.0,
)  # cycles; the paper's L_gwrite and L_tile, src/scheduler/Scheduler.cc


def round_robin(num_requests: int, num_channels: int) -> Int[Array, " r"]:
    """Requests to channels in turn: the baseline without load balancing."""
    return jnp.arange(num_requests, dtype=jnp.int32) % num_channels


def estimated_cycles(
    hardware: Hardware, model: Decoder, seq_lens: Int[Array, " r"], parallel: Parallel
) -> Float[Array, " r"]:
    """What the public scheduler believes that a request's attention takes of its channel.

    Source: algorithm 1 of the paper; `estimate_mha_latency` in src/scheduler/Scheduler.cc, with the
        heads and width of one device.
    """
    heads, kv_heads = heads_of_device(model, parallel)
    width, page, lanes = (
        model.width / model.heads,
        page_elements(hardware),
        1.0 * banks(hardware.hbm),
    )
    lengths = jnp.asarray(seq_lens) * 1.0
    logit = jnp.ceil(kv_heads * width / page) * (
        GWRITE_ESTIMATE + jnp.ceil(lengths / lanes) * TILE_ESTIMATE
    )
    attend = (
        jnp.ceil(lengths / page)
        * heads
        * (GWRITE_ESTIMATE + jnp.ceil(width / lanes) * TILE_ESTIMATE)
    )
    return jnp.where(lengths > 0, logit + attend, 0.0)


def pack_longest_first(
    work: Float[Array, " r"],
    num_channels: int,
    *,
    loads: Float[Array, " channels"] | None = None,
    resident: Int[Array, " r"] | None = None,
) -> Int[Array, " r"]:
    """The largest request first, each onto the channel with the least load, the lowest of equals.

    `loads` is what channels hold already. A request whose `resident` is not negative stays on that
    channel, and loads it from the start. With all requests free the fullest channel holds at most
    4/3 - 1/(3m) of the least possible for m channels (Graham, "Bounds on Multiprocessing Timing
    Anomalies", 1969). On `estimated_cycles` it is algorithm 2 of the paper, on `gemv.request_work`
    longest-first packing on our own work.
    """
    work = jnp.asarray(work) * 1.0
    stays = jnp.full(work.shape, -1) if resident is None else jnp.asarray(resident)
    start = jnp.zeros(num_channels) if loads is None else jnp.asarray(loads) * 1.0
    start = start.at[jnp.maximum(stays, 0)].add(jnp.where(stays >= 0, work, 0.0))

    def place(load, request):
        least = jnp.argmin(load)
        free = stays[request] < 0
        return load.at[least].add(jnp.where(free, work[request], 0.0)), jnp.where(
            free, least, stays[request]
        )

    order = jnp.argsort(-work, stable=True)
    _, placed = jax.lax.scan(place, start, order)
    return jnp.zeros(work.shape, jnp.int32).at[order].set(placed.astype(jnp.int32))


def first_halves(counts: Int[Array, " channels"]) -> Int[Array, " channels"]:
    """How many requests of each channel the simulator puts into sub-batch 0: half, and of odd
    numbers the larger and the smaller half in turn.

    Source: `group_sub_batches` in src/scheduler/Scheduler.cc; algorithm 3 of the paper.
    """
    odd = counts % 2
    before = jnp.cumsum(odd) - odd
    return counts // 2 + odd * (1 - before % 2)


def rank_in_channel(
    channels: Int[Array, " r"], order: Int[Array, " r"], num_channels: int
) -> tuple[Int[Array, " r"], Int[Array, " channels"]]:
    """The place of each request in its channel's list, and the length of each list. `order` are the
    requests in the order of the lists' rows.

    Channels may follow each other in any way in `order`.
    """
    grouped = order[jnp.argsort(channels[order], stable=True)]
    rank, counts = rank_of_grouped(channels[grouped], num_channels)
    return jnp.zeros_like(channels).at[grouped].set(rank.astype(channels.dtype)), counts


def rank_of_grouped(
    channels: Int[Array, " r"], num_channels: int
) -> tuple[Int[Array, " r"], Int[Array, " channels"]]:
    """The same where the requests of a channel follow each other, channel 0 first."""
    counts = jax.ops.segment_sum(jnp.ones_like(channels), channels, num_channels)
    return jnp.arange(channels.shape[0]) - (jnp.cumsum(counts) - counts)[channels], counts


def halving_split(channels: Int[Array, " r"], num_channels: int) -> Int[Array, " r"]:
    """Sub-batch of each request by the simulator's rule, requests in the order of the trace:
    `workload.halves` as a function that jits.
    """
    channels = jnp.asarray(channels, jnp.int32)
    rank, counts = rank_in_channel(channels, jnp.arange(channels.shape[0]), num_channels)
    return (rank >= first_halves(counts)[channels]).astype(jnp.int32)


def snake_split(
    work: Float[Array, " r"], channels: Int[Array, " r"], num_channels: int
) -> Int[Array, " r"]:
    """Sub-batches 0 1 1 0 0 1 1 0 ... down each channel's list from the largest request, so that
    both hold a like share of its load.

    The halves have the sizes that the simulator's rule gives them: the split is one it can execute,
    from a list that names sub-batch 0 first.
    """
    channels = jnp.asarray(channels, jnp.int32)
    rank, counts = rank_in_channel(
        channels, jnp.argsort(-jnp.asarray(work), stable=True), num_channels
    )
    snake = (rank + 1) // 2 % 2
    zeros = counts // 2 + (counts % 4 == 1)  # of a snake of this length
    flip = jnp.where(counts % 2 == 1, zeros != first_halves(counts), False)
    return (snake ^ flip[channels]).astype(jnp.int32)
