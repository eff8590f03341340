"""Attention in the memory: the work of each channel.

The work is computed in two ways: `closed_attention` adds up closed forms and can be jitted and
mapped; `exact_attention` follows each channel's list of PIM commands, for one design at a time.
Cycles are core cycles.

Source: src/scheduler/Scheduler.cc, src/operations/NeuPIMSLogitSoftmax.cc and NeuPIMSAttend.cc of
    the public simulator.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from neupims.machine.calibration import DEFAULT, Calibration
from neupims.machine.hardware import Hardware
from neupims.machine.systems import Fidelity, System
from neupims.machine.workload import FLOAT16_BYTES, Batch, Decoder, Parallel
from neupims.timing.columns import designs_last, reduce_requests, sum_by_place
from neupims.timing.gemv import channel_work
from neupims.timing.gemv_exact import follow_list, list_groups, list_timing
from neupims.timing.layout import (
    attend_groups,
    logit_groups,
    page_elements,
)
from neupims.timing.pim_commands import PIMCounts, results_of, total_commands
from neupims.timing.split import (
    group_of_channels,
    piece_lengths,
    spread_over_channels,
)

# The exact path takes the mean over this number of starts within a round of refreshes.
PHASES = 8


class Attention(NamedTuple):
    """PIM work of each sub-batch on each channel.

    Pieces run one after another, where the scratchpad cannot hold all results at once. The last
    axis is logit, attend.
    """

    alone: Float[Array, "2 pieces channels 2"]  # core cycles
    beside: Float[Array, "2 pieces channels 2"]  # the same while the NPU uses the memory too
    instructions: Float[Array, "2 pieces channels 2"]  # where each product is a command of its own
    requests: Float[Array, "2 pieces channels"]  # number of requests
    longest: Float[Array, "2"]  # tokens of the longest request


def no_attention() -> Attention:
    """Returns the work of a step in which the memory only reads and writes: none."""
    zero = jnp.zeros((2, 1, 1, 2))
    return Attention(zero, zero, zero, zero[..., 0], zero[:, 0, 0, 0])


def closed_attention(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    *,
    system: System,
    interleaved: bool,
    channels: int,
    fidelity: Fidelity,
    calibration: Calibration,
    two_buffers: bool = False,
) -> tuple[Attention, PIMCounts]:
    """Returns the work of each channel as the sum over its requests (`timing.gemv.channel_work`).

    Args:
        hardware: The machine.
        model: The model.
        batch: The requests, their channels and sub-batches.
        parallel: How many devices share a layer.
        system: "neupims" or "npu-pim".
        interleaved: Whether there are two sub-batches; else all requests are in the first one.
        channels: The number of channels, or a bound on it where it is traced.
        fidelity: "simulator" or "intended".
        calibration: The fitted constants; only `reopen_cycles` is used.
        two_buffers: As in `gemv.request_works`.

    Returns:
        The work, in one piece, and the commands of all channels, as `attention_counts` gives them.
    """
    sub_batch = batch.sub_batches if interleaved else jnp.zeros_like(batch.sub_batches)
    lengths, places = batch.seq_lens, batch.channels
    if fidelity == "intended":
        lengths = piece_lengths(lengths, parallel)
        places = group_of_channels(places, hardware, parallel)
    places = sub_batch * channels + places

    def by_channel(sums):
        return sums.reshape(2, 1, channels, *sums.shape[1:])

    found = channel_work(
        hardware,
        model,
        lengths * 1.0,
        places,
        parallel,
        count=2 * channels,
        fidelity=fidelity,
        waits=(None, calibration.reopen_cycles) if interleaved else (None,),
        two_buffers=two_buffers,
    )
    alone, beside, counts = *(by_channel(found.cycles[at]) for at in (0, -1)), found.counts
    if fidelity == "intended":
        alone, beside = (spread_over_channels(x, hardware, parallel) for x in (alone, beside))
        counts = _of_all_pieces(counts, parallel)
    instructions = jnp.zeros_like(alone)
    if system == "npu-pim":
        issued = count_instructions(hardware, model, batch.seq_lens, parallel, fidelity)
        instructions = by_channel(sum_by_place(issued, places, 2 * channels))
    longest = [
        jnp.where((sub_batch == which) & (batch.seq_lens > 0), batch.seq_lens, 0).max(axis=0)
        for which in (0, 1)
    ]
    requests = by_channel(found.requests)
    return Attention(alone, beside, instructions, requests, 1.0 * jnp.stack(longest)), counts


def exact_attention(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    *,
    system: System,
    sub_batches: int,
    fidelity: Fidelity,
    channels: int,
    calibration: Calibration = DEFAULT,
) -> Attention:
    """Returns the work of each channel by the controller's rule, for one concrete design.

    The work is the mean over `PHASES` starts within a round of refreshes. In "simulator" fidelity
    requests are cut into pieces where their results exceed the scratchpad, by the simulator's
    count, which takes the last request of a piece into the next one too; and with one row buffer
    of "npu-pim" commands leave the core one a cycle for all channels.

    Args:
        hardware: The machine.
        model: The model.
        batch: The requests, their channels and sub-batches.
        parallel: How many devices share a layer.
        system: "neupims" or "npu-pim".
        sub_batches: 1, or 2 interleaved ones.
        fidelity: "simulator" or "intended".
        channels: The number of channels of the result.
        calibration: The fitted constants; only `reopen_cycles` is used.

    Returns:
        The work, piece after piece.
    """
    interleaved = system == "neupims" and sub_batches == 2
    lengths, channel = np.asarray(batch.seq_lens), np.asarray(batch.channels)
    tokens, split = lengths, fidelity == "intended"
    if split:
        lengths = np.asarray(piece_lengths(lengths, parallel), np.int32)
        channel = np.asarray(group_of_channels(channel, hardware, parallel))
    sub_batch = np.asarray(batch.sub_batches) if interleaved else np.zeros_like(channel)
    instructions = np.zeros((len(lengths), 2), np.float32)
    if system == "npu-pim":
        count = jax.jit(count_instructions, static_argnums=4)
        instructions = np.asarray(count(hardware, model, jnp.asarray(lengths), parallel, fidelity))
    late = system == "npu-pim" and fidelity == "simulator"  # commands come one a cycle
    to_core = hardware.npu.clock_hz / hardware.hbm.clock_hz

    def pieces_of(mine, operation) -> list:
        if fidelity != "simulator":
            return [mine]
        return _cut_pieces(hardware, model, parallel, lengths[mine], mine, operation)

    lists = _list_requests(lengths, channel, sub_batch, pieces_of)
    shape = (2, 1 + max((one.place[1] for one in lists), default=0), channels, 2)
    alone, beside, commands, requests = (np.zeros(shape, np.float32) for _ in range(4))
    for operation, name in enumerate(("logit", "attend")):
        chosen = [one for one in lists if one.place[3] == operation]
        if not chosen:
            continue
        longest_list = max(len(one.requests) for one in chosen)
        # Rounded up to powers of two: few shapes, few compilations.
        rounded = [1 << (size - 1).bit_length() for size in (len(chosen), longest_list)]
        padded, ready = np.zeros(rounded, np.int32), np.zeros(rounded, np.float32)
        for row, (place, own) in enumerate(chosen):
            padded[row, : len(own)] = lengths[own]
            issued = instructions[own, operation]
            ready[row, : len(own)] = (np.cumsum(issued) - issued) if late else 0
            commands[place], requests[place] = issued.sum(), len(own)
        groups = list_groups(hardware, model, padded, parallel, operation=name, fidelity=fidelity)

        waits = (None, calibration.reopen_cycles) if interleaved else (None,)
        followed = _follow_lists(hardware, waits, groups, ready, to_core)
        undisturbed, disturbed = np.asarray(followed[0]), np.asarray(followed[-1])
        for row, one in enumerate(chosen):
            alone[one.place], beside[one.place] = undisturbed[row], disturbed[row]
    longest = np.array([tokens[sub_batch == which].max(initial=0) for which in (0, 1)])
    work = [jnp.asarray(part, jnp.float32) for part in (alone, beside)]
    if split:
        work = [spread_over_channels(part, hardware, parallel) for part in work]
    parts = (commands, requests[..., 0], longest)
    return Attention(*work, *(jnp.asarray(part, jnp.float32) for part in parts))


class _List(NamedTuple):
    """Requests that one channel serves one after another, and their place in the result."""

    place: tuple[int, int, int, int]  # sub-batch, piece, channel, operation
    requests: np.ndarray


def _list_requests(lengths, channel, sub_batch, pieces_of) -> list[_List]:
    """Returns the lists of all channels, for logit (0) and attend (1)."""
    lists = []
    for operation in (0, 1):
        for which in (0, 1):
            mine = np.flatnonzero((sub_batch == which) & (lengths > 0))
            mine = mine[np.argsort(channel[mine], kind="stable")]
            lists += [
                _List((which, piece, each, operation), own[channel[own] == each])
                for piece, own in enumerate(pieces_of(mine, operation))
                for each in np.unique(channel[own])
            ]
    return lists


@jax.jit
def _follow_lists(hardware, waits, groups, ready, to_core):
    """Returns the core cycles of each list for each wait, (waits, lists), the mean over phases."""
    shape = (len(waits), ready.shape[0], PHASES)
    wait, row, phase = (each.ravel() for each in jnp.indices(shape))
    times = [list_timing(hardware, each) for each in waits]
    found = jax.vmap(follow_list)(
        jax.tree.map(lambda *each: jnp.stack(each)[wait], *times),
        jax.tree.map(lambda field: field[row], groups),
        (phase + 0.5) / PHASES,
        ready[row] / to_core,
    )
    return found.reshape(shape).mean(axis=2) * to_core


def _cut_pieces(hardware, model, parallel, lengths, mine, operation) -> list:
    """Returns the requests of each piece of logit (0) or attend (1).

    A piece ends where the simulator's count of scratchpad bytes exceeds its limit.
    """
    heads, width = float(model.heads / parallel.tp), float(model.head_dim)
    page = float(page_elements(hardware, model))
    chunks = np.ceil(heads * width / (np.floor(page / width) * width)) if page >= width else np.inf
    attended = np.full(len(lengths), width + chunks * width)
    numbers = 2 * lengths + width if operation == 0 else attended
    needed = numbers * heads * FLOAT16_BYTES
    limit = float(hardware.npu.scratchpad_bytes) / FLOAT16_BYTES
    ends, total = [], 0.0
    for request, bytes_ in enumerate(needed):
        total += bytes_
        if total > limit and request > 0:
            ends.append(request - 1)
            total = bytes_
    ends.append(len(mine) - 1)
    begins = [0, *ends[:-1]]
    if not len(mine):
        return [mine]
    return [mine[begin : end + 1] for begin, end in zip(begins, ends, strict=True)]


def count_instructions(hardware, model, seq_lens, parallel, fidelity):
    """Returns the commands of each request, (r, 2), where every product is a command of its own.

    A group has one GWRITE and, for each tile, a header, its products and its results.

    Args:
        hardware: The machine.
        model: The model.
        seq_lens: The tokens of each request, (r,).
        parallel: How many devices share a layer.
        fidelity: The layout of keys and values, "simulator" or "intended".
    """
    counts = []
    for groups_of in (logit_groups, attend_groups):
        counts.append(
            sum(
                group.groups * (1 + group.tiles + results_of(group) * (group.products + 1))
                for group in groups_of(hardware, model, seq_lens * 1.0, parallel, fidelity=fidelity)
            )
        )
    return jnp.stack(jnp.broadcast_arrays(*counts), axis=1)


def attention_counts(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    *,
    fidelity: Fidelity = "simulator",
) -> PIMCounts:
    """Returns the PIM commands of a layer, which do not depend on the schedule.

    Args:
        hardware: The machine.
        model: The model.
        batch: The requests; only their lengths matter.
        parallel: How many devices share a layer.
        fidelity: The layout of keys and values, "simulator" or "intended".
    """

    @designs_last
    def count(hardware, model, lengths, parallel):
        def of_requests(some):
            layouts = (logit_groups, attend_groups)
            found = [each(hardware, model, some, parallel, fidelity=fidelity) for each in layouts]
            return total_commands((*found[0], *found[1]))

        return reduce_requests(jnp.add, of_requests, lengths)

    if fidelity == "simulator":
        return count(hardware, model, batch.seq_lens * 1.0, parallel)
    pieces = piece_lengths(batch.seq_lens, parallel) * 1.0
    return _of_all_pieces(count(hardware, model, pieces, parallel), parallel)


def _of_all_pieces(counts: PIMCounts, parallel: Parallel) -> PIMCounts:
    """The commands of all pieces of requests, from those of one piece of each."""
    return PIMCounts(*(1.0 * parallel.kv_split * each for each in counts))
