"""Published and simple policies that give requests a channel and a sub-batch.

A policy first packs (which channel holds a request) and then splits (which half of the channel's
list computes it). All functions are pure, jit and vmap; the number of channels is static. Work and
loads are cycles. `scheduling.baselines` has the table of policies by name: a new policy is a
function here and a line there.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neupims.machine.division import ceil_divide
from neupims.machine.hardware import Hardware, banks
from neupims.machine.workload import Decoder, Parallel
from neupims.timing.layout import heads_of_device, page_elements

# Cycles: the paper's L_gwrite and L_tile, src/scheduler/Scheduler.cc of the simulator.
GWRITE_ESTIMATE, TILE_ESTIMATE = 100.0, 184.0
WORD = 32  # bits of a word of a mask


def round_robin(num_requests: int, num_channels: int) -> Int[Array, " r"]:
    """Returns a channel for each request in turn, (r,): the baseline without load balancing.

    Args:
        num_requests: The number of requests.
        num_channels: The number of channels.
    """
    return jnp.arange(num_requests, dtype=jnp.int32) % num_channels


def estimate_cycles(
    hardware: Hardware, model: Decoder, seq_lens: Int[Array, " r"], parallel: Parallel
) -> Float[Array, " r"]:
    """Returns the public scheduler's estimate of each request's attention, in cycles, (r,).

    Args:
        hardware: The machine.
        model: The model.
        seq_lens: The tokens of each request, (r,).
        parallel: How many devices share a layer.

    Reference:
        Algorithm 1 of the paper; `estimate_mha_latency` in src/scheduler/Scheduler.cc, with the
        heads and width of one device.
    """
    heads, kv_heads = heads_of_device(model, parallel)
    width, page = 1.0 * model.key_dim, page_elements(hardware, model)
    lanes = 1.0 * banks(hardware.hbm)
    lengths = jnp.asarray(seq_lens) * 1.0
    row = GWRITE_ESTIMATE + ceil_divide(lengths, lanes) * TILE_ESTIMATE
    head = GWRITE_ESTIMATE + ceil_divide(1.0 * model.attended_dim, lanes) * TILE_ESTIMATE
    logit = ceil_divide(kv_heads * width, page) * row
    attend = ceil_divide(lengths, page) * heads * head
    return jnp.where(lengths > 0, logit + attend, 0.0)


def pack_longest_first(
    work: Float[Array, " r"],
    num_channels: int,
    *,
    loads: Float[Array, " channels"] | None = None,
    resident: Int[Array, " r"] | None = None,
) -> Int[Array, " r"]:
    """Returns a channel for each request, (r,): the largest first, onto the least loaded channel.

    With all requests free the fullest channel of m holds at most 4/3 - 1/(3m) of the least possible
    load. On `estimate_cycles` this is algorithm 2 of the paper.

    Args:
        work: The cycles of each request, (r,).
        num_channels: The number of channels; of equal loads the lowest channel is taken.
        loads: The cycles that each channel already has, (channels,) (default: none).
        resident: The channel of a request that stays there and loads it from the start, -1 where it
            is free, (r,) (default: all are free).

    Reference:
        Graham, "Bounds on Multiprocessing Timing Anomalies", 1969.
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
    """Returns the number of requests of each channel that the simulator puts into sub-batch 0.

    It is half of them; channels with an odd number give the larger and the smaller half in turn.

    Args:
        counts: The requests of each channel, (channels,).

    Reference:
        `group_sub_batches` in src/scheduler/Scheduler.cc; algorithm 3 of the paper.
    """
    odd = counts % 2
    before = jnp.cumsum(odd) - odd
    return counts // 2 + odd * (1 - before % 2)


def rank_in_channel(
    channels: Int[Array, " r"], order: Int[Array, " r"], num_channels: int
) -> tuple[Int[Array, " r"], Int[Array, " channels"]]:
    """Returns the place of each request in its channel's list, and the length of each list.

    Args:
        channels: The channel of each request, (r,).
        order: The requests in the order in which lists take them, (r,).
        num_channels: The number of channels.
    """
    rank, counts = rank_by_number(channels[order], num_channels)
    return jnp.zeros_like(channels).at[order].set(rank.astype(channels.dtype)), counts


def rank_by_number(
    lists: Int[Array, " r"], num_lists: int
) -> tuple[Int[Array, " r"], Int[Array, " lists"]]:
    """Returns the place of each request in its list, and the length of each list.

    Lists take requests in the order of their numbers. A list is a mask with a bit for each request,
    in words of 32, so the place of a request is the number of bits below its own. That is several
    times as fast as a sort.

    Args:
        lists: The list of each request, (r,).
        num_lists: The number of lists.
    """
    numbers = jnp.arange(lists.shape[0])
    words, bits = -(-lists.shape[0] // WORD), jnp.uint32(1) << (numbers % WORD).astype(jnp.uint32)
    own = numbers // WORD * num_lists + lists
    masks = jax.ops.segment_sum(bits, own, words * num_lists)
    sizes = _count_bits(masks).reshape(words, num_lists)
    before = jnp.cumsum(sizes, axis=0) - sizes
    return before.reshape(-1)[own] + _count_bits(masks[own] & (bits - 1)), sizes.sum(axis=0)


def _count_bits(words):
    return jax.lax.population_count(words).astype(jnp.int32)


def halving_split(channels: Int[Array, " r"], num_channels: int) -> Int[Array, " r"]:
    """Returns the sub-batch of each request by the simulator's rule, (r,): `halves`, but it jits.

    Args:
        channels: The channel of each request in the order of the trace, (r,).
        num_channels: The number of channels.
    """
    channels = jnp.asarray(channels, jnp.int32)
    rank, counts = rank_in_channel(channels, jnp.arange(channels.shape[0]), num_channels)
    return (rank >= first_halves(counts)[channels]).astype(jnp.int32)


def snake_split(
    work: Float[Array, " r"], channels: Int[Array, " r"], num_channels: int
) -> Int[Array, " r"]:
    """Returns sub-batches 0 1 1 0 0 1 1 0 ... down each channel's list from the largest request.

    Both sub-batches then hold a similar share of the channel's load. The halves have the sizes that
    the simulator's rule gives them, so the simulator can execute the split.

    Args:
        work: The cycles of each request, (r,).
        channels: The channel of each request, (r,).
        num_channels: The number of channels.
    """
    channels = jnp.asarray(channels, jnp.int32)
    rank, counts = rank_in_channel(
        channels, jnp.argsort(-jnp.asarray(work), stable=True), num_channels
    )
    snake = (rank + 1) // 2 % 2
    zeros = counts // 2 + (counts % 4 == 1)  # of a snake of this length
    flip = jnp.where(counts % 2 == 1, zeros != first_halves(counts), False)
    return (snake ^ flip[channels]).astype(jnp.int32)
