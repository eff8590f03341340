"""Operations -> stages -> iteration: how long one decode step of a batch takes on a system, and
what it moves.

Systems: "neupims" (NPU and PIM work side by side, on one batch or on two interleaved sub-batches),
"npu-pim" (they take turns; one row buffer), "npu-only" and "gpu" (a roofline). Stages with two
sub-batches, layer l of sub-batch 1 and 2:

    A  NPU: qkv 1            B  NPU: qkv 2             PIM: attention 1
    C  NPU: the rest and the next layer's qkv of 1     PIM: attention 2
    D  NPU: the rest and the next layer's qkv of 2     PIM: attention 1 of the next layer
    E  NPU: the rest of 1    PIM: attention 2          F  NPU: the rest of 2

and with one: A (qkv), B (attention), E (the rest), one after the other. A stage ends when both
sides end. Everything is a pure function of records, so any leading axis of hardware, model, batch
or parallel can be mapped over. Cycles are core cycles.

Source: src/StageProgram.cc and src/scheduler/Scheduler.h of the public simulator; the paper,
    section 6.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from neupims.costs.energy import Counts, Energy, energy
from neupims.machine.calibration import DEFAULT, Calibration
from neupims.machine.hardware import Hardware, banks, burst_bytes
from neupims.machine.record import Number, record
from neupims.machine.systems import FIDELITIES, PIM_SYSTEMS, SYSTEMS, Fidelity, System
from neupims.machine.workload import FLOAT16_BYTES, Batch, Decoder, Parallel
from neupims.timing import gemv
from neupims.timing.gemm import Work, bytes_per_cycle, gemm, stuck_chance, tiling
from neupims.timing.vector import activation, layer_norm, residual_sum, softmax_cycles

STAGES = "ABCDEF"
MOST_CHANNELS = 64  # where the number of channels is traced
BLOCKED = 1e4  # times slower: the NPU beside PIM that owns the only row buffer
DRAINED = 100  # core cycles after which the bank queues hold no write of the operation before
TO_SOFTMAX = 9  # core cycles from the last product of a head's logit to its softmax, as measured
PHASES = (
    8  # of the refresh round in which an operation may start, that the exact path averages over
)

QKV = ("attn.ln", "attn.QKVgen")
REST = ("attn.proj", "attn.res", "ffn.ln", "ffn.fc1", "ffn.gelu", "ffn.fc2", "ffn.res")
ATTENTION = ("attn.NeuPIMSLogitSoftmax", "attn.NeuPIMSAttend")
NPU_ATTENTION = "attn.attn.FusedMHA"


class Operation(NamedTuple):
    """An operation of a stage, named as the simulator names it. `platform` is SA (the NPU) or
    PIM.
    """

    stage: str
    platform: str
    name: str


class Stage(NamedTuple):
    """What a stage runs: NPU operations of one sub-batch beside attention of another; -1 is
    none.
    """

    name: str
    npu: tuple[str, ...]
    npu_sub_batch: int
    pim_sub_batch: int


INTERLEAVED = (
    Stage("A", QKV, 0, -1),
    Stage("B", QKV, 1, 0),
    Stage("C", REST + QKV, 0, 1),
    Stage("D", REST + QKV, 1, 0),
    Stage("E", REST, 0, 1),
    Stage("F", REST, 1, -1),
)
SERIAL = (Stage("A", QKV, 0, -1), Stage("B", (), -1, 0), Stage("E", REST, 0, -1))
NPU_ONLY = (Stage("all", (*QKV, NPU_ATTENTION, *REST), 0, -1),)


def stages(system: System, sub_batches: int) -> tuple[Stage, ...]:
    """The stages of a system."""
    if system in ("npu-only", "gpu"):
        return NPU_ONLY
    return INTERLEAVED if system == "neupims" and sub_batches == 2 else SERIAL


def operations(system: System, sub_batches: int) -> tuple[Operation, ...]:
    """The operations of a system, stage by stage, those of the NPU first."""
    listed = []
    for stage in stages(system, sub_batches):
        listed += [Operation(stage.name, "SA", name) for name in stage.npu]
        listed += [
            Operation(stage.name, "PIM", name) for name in ATTENTION if stage.pim_sub_batch >= 0
        ]
    return tuple(listed)


@record
class Iteration:
    """One decode step of a batch. Cycles are core cycles; a batch of results is the same record
    with a leading axis.
    """

    stage_cycles: Float[
        Array, "6"
    ]  # A to F, 0 where there is no such stage; the only stage of npu-only comes first
    op_cycles: Float[Array, " operations"]  # in the order of `operations`
    op_starts: Float[Array, " operations"]  # from the start of their stage
    layer_cycles: Float[Array, ""]
    iteration_cycles: Float[Array, ""]
    iteration_seconds: Float[Array, ""]
    tokens_per_second: Float[Array, ""]
    npu_utilization: Float[Array, ""]  # share of the layer's cycles with products in the arrays
    pim_utilization: Float[
        Array, ""
    ]  # share with PIM commands waiting or running, mean of the channels
    bandwidth_utilization: Float[
        Array, ""
    ]  # share of the buses' cycles that move reads, writes and PIM results
    channel_cycles: Float[Array, "2 channels"]  # attention of each sub-batch on each channel
    counts: Counts  # of one iteration of one device
    energy: Energy
    energy_joules: Float[Array, ""]  # of one iteration of one device
    flagged: Bool[
        Array,
        "",
        # not a machine: a quantity is not a number, a channel is not there, or the result is
        # not finite
    ]


class Attention(NamedTuple):
    """PIM work of each sub-batch on each channel, in pieces that follow each other where the
    scratchpad cannot hold all results.
    """

    alone: Float[Array, "2 pieces channels 2"]  # core cycles of logit and of attend
    beside: Float[Array, "2 pieces channels 2"]  # the same while the NPU uses the memory too
    instructions: Float[Array, "2 pieces channels 2"]  # where each product is a command of its own
    requests: Float[Array, "2 pieces channels"]
    longest: Float[Array, "2"]  # tokens


def no_attention() -> Attention:
    """Of a step whose memory only reads and writes."""
    zero = jnp.zeros((2, 1, 1, 2))
    return Attention(zero, zero, zero, zero[..., 0], zero[:, 0, 0, 0])


def simulate(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    *,
    system: System = "neupims",
    sub_batches: int = 2,
    fidelity: Fidelity = "simulator",
    path: Literal["closed", "exact"] = "closed",
    most_channels: int | None = None,
    calibration: Calibration = DEFAULT,
    attention: Attention | None = None,
) -> Iteration:
    """One decode step of `batch`.

    `fidelity` "simulator" is the public simulator as coded, "intended" the machine of the paper
    (docs/neupims.md lists the differences). `path` "closed" adds up closed forms and can be jitted
    and mapped; "exact" follows each channel's list of PIM commands, for one design at a time.
    `most_channels` bounds `hbm.num_channels` where that is traced. `attention` is the work of the
    channels where it is known already.

    Raises:
        ValueError: `system`, `sub_batches`, `fidelity` or `path` is none of those there are.
    """
    _known("system", system, SYSTEMS)
    _known("sub_batches", sub_batches, (1, 2))
    _known("fidelity", fidelity, FIDELITIES)
    _known("path", path, ("closed", "exact"))
    if system == "npu-pim":
        sub_batches = 1
    given = (hardware, model, batch, parallel)
    options: dict[str, Any] = {
        "system": system,
        "sub_batches": sub_batches,
        "fidelity": fidelity,
        "channels": _channels(hardware, most_channels),
    }
    if attention is None and path == "exact" and system in PIM_SYSTEMS:
        attention = exact_attention(*given, calibration=calibration, **options)
    return _simulate(*given, calibration, attention, **options)


def closed_attention(
    hardware,
    model,
    batch,
    parallel,
    *,
    system: System,
    interleaved: bool,
    channels: int,
    steps: bool,
    calibration: Calibration,
) -> Attention:
    """The work of each channel as the sum of what its requests take (`gemv.request_works`)."""
    sub_batch = batch.sub_batches if interleaved else jnp.zeros_like(batch.sub_batches)
    there = batch.seq_lens > 0

    def summed(values):
        return jax.ops.segment_sum(
            values, sub_batch * channels + batch.channels, 2 * channels
        ).reshape(2, 1, channels, *values.shape[1:])

    waits = (None, calibration.reopen_cycles) if interleaved else (None,)
    works = gemv.request_works(hardware, model, batch.seq_lens, parallel, steps=steps, waits=waits)
    alone, beside = summed(works[0]), summed(works[-1])
    instructions = (
        summed(_instructions(hardware, model, batch.seq_lens, parallel))
        if system == "npu-pim"
        else jnp.zeros_like(alone)
    )
    longest = jax.ops.segment_max(jnp.where(there, batch.seq_lens, 0) * 1.0, sub_batch, 2)
    return Attention(alone, beside, instructions, summed(1.0 * there), jnp.maximum(longest, 0))


def exact_attention(
    hardware,
    model,
    batch,
    parallel,
    *,
    system: System,
    sub_batches: int,
    fidelity: Fidelity,
    channels: int,
    calibration: Calibration = DEFAULT,
) -> Attention:
    """The work of each channel by the controller's rule, the mean over PHASES starts within a round
    of refreshes. For one concrete design.

    In "simulator" fidelity requests are cut into pieces where their results exceed the scratchpad,
    by the simulator's count, which takes the last request of a piece into the next one too; and
    with one row buffer of "npu-pim" commands leave the core one a cycle for all channels.
    """
    interleaved = system == "neupims" and sub_batches == 2
    lengths, channel = np.asarray(batch.seq_lens), np.asarray(batch.channels)
    sub_batch = np.asarray(batch.sub_batches) if interleaved else np.zeros_like(channel)
    instructions = np.asarray(_instructions(hardware, model, jnp.asarray(lengths), parallel))
    late = system == "npu-pim" and fidelity == "simulator"  # commands come one a cycle
    lists = []
    for operation in (0, 1):
        for which in (0, 1):
            mine = np.flatnonzero((sub_batch == which) & (lengths > 0))
            mine = mine[np.argsort(channel[mine], kind="stable")]
            pieces = (
                _pieces(hardware, model, parallel, lengths[mine], mine, operation)
                if fidelity == "simulator"
                else [mine]
            )
            lists += [
                _List((which, piece, each, operation), own[channel[own] == each])
                for piece, own in enumerate(pieces)
                for each in np.unique(channel[own])
            ]
    shape = (2, 1 + max((one.place[1] for one in lists), default=0), channels, 2)
    alone, beside, commands, requests = (np.zeros(shape, np.float32) for _ in range(4))
    for operation, name in enumerate(("logit", "attend")):
        chosen = [one for one in lists if one.place[3] == operation]
        if not chosen:
            continue
        rounded = [
            1 << (size - 1).bit_length()
            for size in (len(chosen), max(len(one.requests) for one in chosen))
        ]  # few shapes, few compilations
        padded, ready = np.zeros(rounded, np.int32), np.zeros(rounded, np.float32)
        for row, (place, own) in enumerate(chosen):
            padded[row, : len(own)] = lengths[own]
            issued = instructions[own, operation]
            ready[row, : len(own)] = (np.cumsum(issued) - issued) if late else 0
            commands[place], requests[place] = issued.sum(), len(own)
        follow = partial(_channels_exact, hardware, model, parallel, padded, ready, operation=name)
        undisturbed = np.asarray(follow(wait=None))
        disturbed = (
            np.asarray(follow(wait=calibration.reopen_cycles)) if interleaved else undisturbed
        )
        for row, one in enumerate(chosen):
            alone[one.place], beside[one.place] = undisturbed[row], disturbed[row]
    longest = np.array([lengths[sub_batch == which].max(initial=0) for which in (0, 1)])
    return Attention(
        *(
            jnp.asarray(part, jnp.float32)
            for part in (alone, beside, commands, requests[..., 0], longest)
        )
    )


class _List(NamedTuple):
    """Requests that one channel serves one after another, and their place in the result: sub-batch,
    piece, channel, operation.
    """

    place: tuple[int, int, int, int]
    requests: np.ndarray


@partial(jax.jit, static_argnames="operation")
def _channels_exact(hardware, model, parallel, lengths, ready, wait, *, operation):
    """Core cycles of each list, the mean over the phases; `ready` in core cycles."""
    to_core = hardware.npu.clock_hz / hardware.hbm.clock_hz
    phases = (jnp.arange(PHASES) + 0.5) / PHASES

    def one(length, first):
        return jax.vmap(
            lambda phase: gemv.channel_cycles_exact(
                hardware, model, length, parallel, phase, first / to_core, wait, operation=operation
            )
        )(phases)

    return jax.vmap(lambda length, first: one(length, first).mean())(lengths, ready) * to_core


def _pieces(hardware, model, parallel, lengths, mine, operation) -> list:
    """Requests of each piece of logit (0) or attend (1), by the simulator's count of the scratchpad
    they need.
    """
    heads, width = float(model.heads / parallel.tp), float(model.width / model.heads)
    page = float(gemv.page_elements(hardware))
    chunks = np.ceil(heads * width / (np.floor(page / width) * width)) if page >= width else np.inf
    needed = (
        ((2 * lengths + width) if operation == 0 else np.full(len(lengths), width + chunks * width))
        * heads
        * FLOAT16_BYTES
    )
    limit = float(hardware.npu.scratchpad_bytes) / FLOAT16_BYTES
    ends, total = [], 0.0
    for request, bytes_ in enumerate(needed):
        total += bytes_
        if total > limit and request > 0:
            ends.append(request - 1)
            total = bytes_
    ends.append(len(mine) - 1)
    begins = [0, *ends[:-1]]
    return (
        [mine[begin : end + 1] for begin, end in zip(begins, ends, strict=True)]
        if len(mine)
        else [mine]
    )


def _instructions(hardware, model, seq_lens, parallel):
    """Commands of each request where every product is one: GWRITE, and for each tile a header, its
    products and its results.
    """
    counts = []
    for groups_of in (gemv.logit_groups, gemv.attend_groups):
        counts.append(
            sum(
                group.groups * (1 + group.tiles * (1 + group.results * (group.products + 1)))
                for group in groups_of(hardware, model, seq_lens * 1.0, parallel)
            )
        )
    return jnp.stack(counts, axis=-1)


@partial(jax.jit, static_argnames=("system", "sub_batches", "fidelity", "channels"))
def _simulate(
    hardware,
    model,
    batch,
    parallel,
    calibration,
    attention,
    *,
    system,
    sub_batches,
    fidelity,
    channels,
) -> Iteration:
    interleaved = system == "neupims" and sub_batches == 2
    if attention is None:
        steps = fidelity == "simulator"
        attention = closed_attention(
            hardware,
            model,
            batch,
            parallel,
            system=system,
            interleaved=interleaved,
            channels=channels,
            steps=steps,
            calibration=calibration,
        )
    tokens = jnp.stack([attention.requests[which].sum() for which in (0, 1)])
    if attention.requests.shape[1] > 1:  # the simulator's pieces share a request; each counts once
        which = batch.sub_batches if interleaved else jnp.zeros_like(batch.sub_batches)
        tokens = jax.ops.segment_sum((batch.seq_lens > 0) * 1.0, which, 2)
    products = product_sides(model, parallel)
    inner, features = (
        jnp.stack([jnp.asarray(shape[which]) for shape in products.values()]) for which in (0, 1)
    )
    tiles = tiling(hardware, tokens[:, None], inner, features)  # one loop for all products
    options = {"calibration": calibration, "system": system, "fidelity": fidelity}
    stage_cycles, starts, cycles, works = [], [], [], []
    left: Number = 0.0  # bytes that the stage before wrote last, if its NPU side ended with it
    for stage in stages(system, sub_batches):
        count = tokens[max(stage.npu_sub_batch, 0)]
        npu: list[Work] = []
        for name in stage.npu:
            before = npu[-1].write_bytes if npu else left
            at = (stage.npu_sub_batch, list(products).index(name)) if name in products else None
            tile = jax.tree.map(lambda value, at=at: value[at], tiles) if at else None
            npu.append(
                npu_operation(
                    hardware, model, batch, parallel, name, count, before, tile, **options
                )
            )
        alone = beside = jnp.zeros(0)
        if stage.pim_sub_batch >= 0:
            part = jax.tree.map(lambda value, which=stage.pim_sub_batch: value[which], attention)
            alone, beside = (
                attention_cycles(
                    hardware, model, parallel, part, load, system=system, fidelity=fidelity
                )
                for load in (part.alone, part.beside)
            )
        sides = side_by_side(hardware, calibration, npu, alone, beside)
        stage_cycles.append(jnp.concatenate([side.ends for side in sides]).max())
        left = (
            jnp.where(stage_cycles[-1] - sides[0].ends[-1] < DRAINED, npu[-1].write_bytes, 0.0)
            if npu
            else 0.0
        )
        starts += [side.starts for side in sides]
        cycles += [side.ends - side.starts for side in sides]
        works.append(npu)
    times = (jnp.stack(stage_cycles), jnp.concatenate(starts), jnp.concatenate(cycles))
    return measured(
        hardware,
        model,
        batch,
        parallel,
        attention,
        works,
        *times,
        system=system,
        sub_batches=sub_batches,
        tokens=tokens,
    )


class Side(NamedTuple):
    """When the operations of one side of a stage start and end, from the start of the stage."""

    starts: Float[Array, " operations"]
    ends: Float[Array, " operations"]


def side_by_side(
    hardware: Hardware,
    calibration: Calibration,
    npu: list[Work],
    alone: Float[Array, " p"],
    beside: Float[Array, " p"],
) -> tuple[Side, Side]:
    """Runs NPU operations and PIM operations at the same time: each side slows the other down until
    one ends.

    While PIM works the NPU gets a share of its bandwidth (none with one row buffer); while the NPU
    works PIM operations take `beside` instead of `alone`.
    """
    slowdown = jnp.where(
        jnp.asarray(hardware.pim.row_buffers) > 1, calibration.pim_slowdown, BLOCKED
    )
    solo = jnp.cumsum(jnp.stack([work.cycles for work in npu])) if npu else jnp.zeros(0)
    slow = (
        jnp.cumsum(jnp.stack([work.cycles + work.memory_cycles * slowdown for work in npu]))
        if npu
        else solo
    )
    pim_solo, pim_slow = jnp.cumsum(alone), jnp.cumsum(beside)
    until = jnp.minimum(slow[-1], pim_slow[-1]) if npu and alone.shape[0] else 0.0
    return _sided(solo, slow, until), _sided(pim_solo, pim_slow, until)


def _sided(solo, slow, until) -> Side:
    """Ends of operations that run at the slow pace `until` the first side has ended, and at their
    own after it.
    """
    if not solo.shape[0]:
        return Side(solo, solo)
    zero = jnp.zeros_like(solo[:1])
    begins, took = jnp.concatenate([zero, slow[:-1]]), jnp.diff(slow, prepend=0.0)
    shares = jnp.clip(until - begins, 0, took) / jnp.maximum(
        took, 1e-9
    )  # of each operation, at the slow pace
    done = (shares * jnp.diff(solo, prepend=0.0)).sum()
    ends = jnp.where(slow <= until, slow, until + solo - done)
    return Side(jnp.concatenate([zero, ends[:-1]]), ends)


def attention_cycles(
    hardware, model, parallel, part: Attention, load, *, system: System, fidelity: Fidelity
) -> Float[Array, "2"]:
    """Core cycles of logit with softmax, and of attend, for one sub-batch: the slowest channel's,
    piece after piece.

    `part` is one sub-batch's, and `load` its work alone or beside the NPU, (pieces, channels, 2).
    As coded, softmax instructions leave one a cycle in the order of the channels, so the ones of
    later channels wait for the slowest before them; and in "npu-pim" PIM commands do too.
    """
    heads, _ = gemv.heads_of_device(model, parallel)
    there = load > 0
    if fidelity == "simulator":
        later = jnp.cumsum(part.requests[..., ::-1], axis=-1)[..., ::-1] - part.requests
        tail = jnp.stack([heads * later, jnp.zeros_like(later)], axis=-1)
        before = (
            jnp.cumsum(part.instructions, axis=-2) - part.instructions
            if system == "npu-pim"
            else 0.0
        )
        ends = jnp.where(there, load + tail + before, 0)
        return ends.max(axis=-2).sum(axis=0)
    softmax = heads * softmax_cycles(hardware, part.longest) / hardware.npu.vector_units
    return jnp.where(there, load, 0).max(axis=-2).sum(axis=0) + jnp.stack([softmax, 0.0 * softmax])


def product_sides(model: Decoder, parallel: Parallel) -> dict[str, tuple[Number, Number]]:
    """Inner channels and output features of each product of a layer, on one of the devices that
    share it.
    """
    width, mlp = 1.0 * model.width, 1.0 * model.mlp_width / parallel.tp
    _, kv_heads = gemv.heads_of_device(model, parallel)
    queries, keys = width / parallel.tp, kv_heads * width / model.heads
    return {
        "attn.QKVgen": (width, queries + 2 * keys),
        "attn.proj": (queries, width),
        "ffn.fc1": (width, (model.mlp_matrices - 1.0) * mlp),
        "ffn.fc2": (mlp, width),
    }


def npu_operation(
    hardware,
    model,
    batch,
    parallel,
    name: str,
    tokens,
    written_before,
    tile=None,
    *,
    calibration: Calibration,
    system: System,
    fidelity: Fidelity,
) -> Work:
    """One operation of the NPU for `tokens` tokens, on one of the devices that share a layer.

    `written_before` are the bytes that the operation just before wrote: part of them is still to
    reach the memory. `tile` is a product's tiling.
    """
    width, mlp = 1.0 * model.width, 1.0 * model.mlp_width / parallel.tp
    if system == "gpu":
        return _gpu_operation(hardware, model, batch, parallel, name, tokens)
    if name == NPU_ATTENTION:
        return npu_attention(
            hardware, model, batch, parallel, calibration=calibration, fidelity=fidelity
        )
    products = product_sides(model, parallel)
    options: dict[str, Any] = {"calibration": calibration, "fidelity": fidelity}
    if name in products:
        few = {
            "ffn.fc1": calibration.stuck_after_norm,
            "ffn.fc2": calibration.stuck_after_activation,
        }.get(name, 0.0)
        stuck = stuck_chance(hardware, written_before, few)
        work = gemm(
            hardware,
            tokens,
            *products[name],
            npu_only=system == "npu-only",
            stuck=stuck,
            tile=tile,
            **options,
        )
        return jax.tree.map(lambda value: jnp.where(tokens > 0, value, 0.0), work)
    options["inherited_bytes"] = written_before
    if name.endswith("ln"):
        return layer_norm(hardware, tokens, width, **options)
    if name.endswith("res"):
        return residual_sum(hardware, tokens, width, **options)
    return activation(hardware, tokens, mlp, model.mlp_matrices - 1.0, **options)


def npu_attention(
    hardware, model, batch, parallel, *, calibration: Calibration, fidelity: Fidelity
) -> Work:
    """Attention of the whole batch on the arrays, keys and values read from memory.

    As coded (src/operations/FusedMHA.cc of the simulator's NPU-only branch) all heads of all
    requests follow each other through one pipeline as products of one row, each filling and
    draining the arrays. "intended" spreads heads over the arrays, so that the memory is the bound.
    """
    npu = hardware.npu
    heads, kv_heads = gemv.heads_of_device(model, parallel)
    width = 1.0 * model.width / model.heads
    lengths = batch.seq_lens * 1.0
    there = lengths > 0
    fill = 2.0 * npu.array_height - 1
    columns = npu.array_width
    logit = fill + lengths / npu.num_arrays + TO_SOFTMAX
    blocks = jnp.ceil((lengths + columns - 1) / columns)
    attend = blocks * (fill + width / npu.num_arrays)
    softmax = softmax_cycles(hardware, lengths)
    one = jnp.where(there, logit + attend + softmax, 0)
    read = jnp.where(there, 2 * FLOAT16_BYTES * lengths * width * kv_heads, 0).sum()
    written = FLOAT16_BYTES * width * heads * there.sum()
    rate = bytes_per_cycle(hardware)
    memory = (
        read
        / rate
        / (
            calibration.shallow_efficiency
            if fidelity == "simulator"
            else calibration.queued_efficiency
        )
    )
    first = (jnp.where(there, 2 * FLOAT16_BYTES * lengths * width, 0) / rate)[0]
    busy = heads * one.sum()
    if fidelity == "intended":
        busy = busy / npu.num_arrays
        cycles = jnp.maximum(memory, busy) + fill
    else:
        cycles = jnp.maximum(memory, busy + first)
    macs = 2 * heads * width * jnp.where(there, lengths, 0).sum()
    return Work(
        cycles, jnp.maximum(memory - busy, 0), jnp.minimum(busy, cycles), read, written, macs
    )


def _gpu_operation(hardware, model, batch, parallel, name, tokens) -> Work:
    work = npu_operation(
        hardware,
        model,
        batch,
        parallel,
        name,
        tokens,
        0.0,
        calibration=DEFAULT,
        system="npu-only",
        fidelity="intended",
    )
    return on_gpu(hardware, work)


def on_gpu(hardware: Hardware, work: Work) -> Work:
    """The same work at the roofline of a GPU: the longer of its arithmetic and its traffic. In core
    cycles of the NPU's clock, so that systems compare.
    """
    arithmetic = 2 * work.macs / hardware.gpu.flops_per_second
    cycles = (
        jnp.maximum(
            arithmetic, (work.read_bytes + work.write_bytes) / hardware.gpu.bytes_per_second
        )
        * hardware.npu.clock_hz
    )
    return work._replace(
        cycles=cycles, memory_cycles=cycles, busy_cycles=arithmetic * hardware.npu.clock_hz
    )


def measured(
    hardware,
    model,
    batch,
    parallel,
    attention,
    works,
    stage_cycles,
    starts,
    cycles,
    *,
    system,
    sub_batches,
    tokens,
) -> Iteration:
    """What an iteration is worth, from what its operations do and when: `works` of the NPU by
    stage, the cycles of the stages, and starts and cycles of all operations.
    """
    planned = stages(system, sub_batches)
    names = [stage.name for stage in planned]
    of = dict(zip(names, stage_cycles, strict=True))
    layers = jnp.ceil(model.layers / parallel.pp)
    if len(planned) == len(INTERLEAVED):
        in_layer = ["C", "D"]
        iteration = of["A"] + of["B"] + (layers - 1) * (of["C"] + of["D"]) + of["E"] + of["F"]
    else:
        in_layer = names
        iteration = layers * stage_cycles.sum()
    layer = sum((of[name] for name in in_layer), start=jnp.float32(0))

    in_use = [
        work
        for stage, npu in zip(planned, works, strict=True)
        if stage.name in in_layer
        for work in npu
    ]
    total = jax.tree.map(lambda *values: sum(values, start=jnp.float32(0)), *in_use)
    with_pim = system in PIM_SYSTEMS
    pim = attention_counts(hardware, model, batch, parallel) if with_pim else PIM_NONE
    to_core = hardware.npu.clock_hz / hardware.hbm.clock_hz
    sent = messages(model, parallel, layers, tokens.sum(), jnp.maximum((tokens > 0).sum(), 1))
    communication = link_seconds(hardware, sent[0]) + link_seconds(hardware, sent[1])
    seconds = iteration / hardware.npu.clock_hz + communication
    elapsed = seconds * hardware.npu.clock_hz
    counts = Counts(
        npu_macs=layers * total.macs,
        vector_operations=layers * _vector_operations(model, parallel, tokens.sum()),
        scratchpad_bytes=layers * 2 * (total.read_bytes + total.write_bytes),
        read_bytes=layers * total.read_bytes,
        write_bytes=layers * total.write_bytes,
        activations=layers * (total.read_bytes + total.write_bytes) / hardware.hbm.row_bytes,
        group_activations=layers
        * pim.tiles
        * banks(hardware.hbm)
        / hardware.pim.banks_per_activation,
        gwrites=layers * pim.gwrites,
        comps=layers * pim.products,
        result_reads=layers * pim.results,
        refreshes=elapsed
        / to_core
        / hardware.hbm.trefi_cycles
        * hardware.hbm.ranks
        * hardware.hbm.num_channels,
        elapsed_cycles=elapsed,
        link_bytes=sum((each.count * each.each_bytes for each in sent), start=jnp.float32(0)),
    )
    spent = energy(counts, hardware)
    joules = spent.total if system != "gpu" else seconds * hardware.gpu.board_watts
    moved = total.read_bytes + total.write_bytes + pim.results * burst_bytes(hardware.hbm)
    bandwidth = (
        hardware.gpu.bytes_per_second / hardware.npu.clock_hz
        if system == "gpu"
        else bytes_per_cycle(hardware)
    )
    channel_cycles = attention.alone.sum(axis=(1, 3))
    in_stages = (
        jnp.zeros(len(STAGES))
        .at[jnp.array([STAGES.index(name) if name in STAGES else 0 for name in names])]
        .set(stage_cycles)
    )
    lost = jnp.max(jnp.where(batch.seq_lens > 0, batch.channels, 0)) >= jnp.minimum(
        hardware.hbm.num_channels, attention.alone.shape[2]
    )
    leaves = jax.tree.leaves((hardware, model, parallel))
    wrong = sum(jnp.isnan(jnp.asarray(leaf, jnp.float32)) for leaf in leaves) > 0
    return Iteration(
        stage_cycles=in_stages,
        op_cycles=cycles,
        op_starts=starts,
        layer_cycles=layer,
        iteration_cycles=elapsed,
        iteration_seconds=seconds,
        tokens_per_second=tokens.sum() / seconds,
        npu_utilization=total.busy_cycles / layer,
        pim_utilization=(
            channel_cycles.sum() / hardware.hbm.num_channels / layer if with_pim else 0.0 * layer
        ),
        bandwidth_utilization=moved / bandwidth / layer,
        channel_cycles=channel_cycles,
        counts=counts,
        energy=spent,
        energy_joules=joules,
        flagged=wrong
        | (lost if with_pim else False)
        | ~jnp.isfinite(seconds)
        | ~(seconds > 0)
        | ~jnp.isfinite(joules),
    )


class PIMCounts(NamedTuple):
    """PIM commands of one layer on all channels."""

    gwrites: Number
    tiles: Number
    results: Number
    products: Number


PIM_NONE = PIMCounts(0.0, 0.0, 0.0, 0.0)


def attention_counts(hardware, model, batch, parallel) -> PIMCounts:
    """What the PIM commands of a layer do; it does not depend on the schedule."""
    gwrites = tiles = results = products = jnp.float32(0)
    for groups_of in (gemv.logit_groups, gemv.attend_groups):
        for group in groups_of(hardware, model, batch.seq_lens * 1.0, parallel):
            gwrites = gwrites + group.groups.sum()
            each = group.groups * group.tiles
            tiles = tiles + each.sum()
            results = results + (each * group.results).sum()
            products = products + (each * group.results * group.products).sum()
    return PIMCounts(gwrites, tiles, results, products)


def _vector_operations(model: Decoder, parallel: Parallel, tokens) -> Number:
    """Element operations of a layer outside attention: two layer norms of 5, two sums, one
    activation.
    """
    return tokens * (12.0 * model.width + model.mlp_width / parallel.tp)


class Messages(NamedTuple):
    """Messages of one device that follow each other."""

    count: Number
    each_bytes: Number


def link_seconds(hardware: Hardware, sent: Messages) -> Number:
    """How long they take, one after another."""
    return sent.count * (
        sent.each_bytes / hardware.link.bandwidth_bytes_per_second + hardware.link.latency_seconds
    )


def messages(
    model: Decoder, parallel: Parallel, layers, tokens, sub_batches
) -> tuple[Messages, Messages]:
    """What a device sends in an iteration: in each layer two ring all-reduces of the activations of
    each sub-batch, among the devices that share it; and after its last layer the activations, to
    the next group of devices.
    """
    shares, activations = 1.0 * parallel.tp, FLOAT16_BYTES * tokens * model.width / sub_batches
    return (
        Messages(layers * sub_batches * 2 * 2 * (shares - 1), activations / shares),
        Messages(jnp.where(jnp.asarray(parallel.pp) > 1, sub_batches, 0), activations),
    )


def _channels(hardware: Hardware, most_channels: int | None) -> int:
    if most_channels is not None:
        return most_channels
    try:
        return int(hardware.hbm.num_channels)
    except (TypeError, jax.errors.ConcretizationTypeError):
        return MOST_CHANNELS


def _known(name: str, value, known) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, not {value!r}")
