"""One decode step of a batch on a system: its time, its traffic and its energy.

Operations make stages, stages make a layer, layers make the iteration. Everything is a pure
function of records, so any leading axis of hardware, model, batch or parallel can be mapped over.
Cycles are core cycles.

Source: src/StageProgram.cc and src/scheduler/Scheduler.h of the public simulator; section 6 of the
    paper.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from neupims.costs.energy import Counts, Energy, energy
from neupims.machine.calibration import DEFAULT, Calibration
from neupims.machine.division import ceil_divide
from neupims.machine.hardware import Hardware, banks, burst_bytes
from neupims.machine.layer_kinds import LayerKind, Mix, attended, find_mix, layer_kinds
from neupims.machine.record import Number, record
from neupims.machine.supported import check_latent, is_timed
from neupims.machine.systems import (
    FIDELITIES,
    PIM_SYSTEMS,
    SYSTEMS,
    Fidelity,
    System,
    TimingPath,
)
from neupims.machine.workload import Batch, Decoder, Parallel
from neupims.timing.attention import Attention, exact_attention
from neupims.timing.columns import designs_last
from neupims.timing.experts import route
from neupims.timing.gemm import (
    SIXTEEN,
    Bits,
    Tiling,
    Work,
    bytes_per_cycle,
    holds_tile,
    tiling,
)
from neupims.timing.links import link_seconds, messages
from neupims.timing.npu import Context, mlp_rows, product_bits
from neupims.timing.overlap import DRAINED, side_by_side
from neupims.timing.pim_commands import PIM_NONE, PIMCounts
from neupims.timing.shapes import mlp_channels
from neupims.timing.split import check_split, is_split
from neupims.timing.stage_attention import Totals, stage_attention
from neupims.timing.stages import (
    INTERLEAVED,
    PRODUCTS,
    STAGES,
    head_work,
    npu_operation,
    stages,
)

TRACED_CHANNELS = 64  # the bound on the channels where their number is traced


@record
class Iteration:
    """One decode step of a batch. A batch of results is the same record with a leading axis.

    Cycles are core cycles. Energy, counts and times are of one of the model's devices.
    """

    # A to F, 0 where there is no such stage; the only stage of npu-only comes first.
    stage_cycles: Float[Array, "6"]
    op_cycles: Float[Array, " operations"]  # in the order of `operations`
    op_starts: Float[Array, " operations"]  # from the start of their stage
    layer_cycles: Float[Array, ""]  # stages C and D if interleaved, else all stages
    # Of the LM head and the layer norm before it, once in an iteration; 0 where it is left out.
    head_cycles: Float[Array, ""]
    # Of all layers of a device, the LM head, and their communication.
    iteration_cycles: Float[Array, ""]
    iteration_seconds: Float[Array, ""]  # the same in seconds
    tokens_per_second: Float[Array, ""]  # tokens of the batch in an iteration's time
    npu_utilization: Float[Array, ""]  # share of a layer's cycles with products in the arrays
    # Share of a layer's cycles with PIM commands waiting or running, in the mean of the channels.
    pim_utilization: Float[Array, ""]
    # Share of a layer's cycles in which the buses move reads, writes and PIM results.
    bandwidth_utilization: Float[Array, ""]
    channel_cycles: Float[Array, "2 channels"]  # attention of each sub-batch on each channel
    counts: Counts  # commands and operations of an iteration
    energy: Energy  # joules of an iteration by part; without meaning for the GPU
    energy_joules: Float[Array, ""]  # of an iteration
    # Whether the result is invalid: a quantity is NaN, a channel does not exist, the model
    # has what `mix` does not name, the scratchpad is too small for a tile, or a result is
    # not finite.
    flagged: Bool[Array, ""]


def simulate(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    *,
    system: System = "neupims",
    sub_batches: int = 2,
    fidelity: Fidelity = "simulator",
    path: TimingPath = "closed",
    most_channels: int | None = None,
    calibration: Calibration = DEFAULT,
    attention: Attention | None = None,
    mix: Mix | None = None,
) -> Iteration:
    """Returns one decode step of a batch: each request gets one token.

    Any leading axis of the four records can be mapped over with `jax.vmap` on the closed path.

    Args:
        hardware: The machine; times are in cycles of its core.
        model: The decoder-only model.
        batch: The requests: their lengths in tokens, their channels and sub-batches.
        parallel: How many devices share a layer, and into how many groups the layers are cut.
        system: "neupims", "npu-pim", "npu-only" or "gpu".
        sub_batches: 2 interleaved sub-batches, or 1; only "neupims" interleaves.
        fidelity: "simulator" follows the public simulator as it is coded, "intended" the machine of
            the paper (docs/accelerator/model.md lists the differences).
        path: "closed" adds up closed forms and can be jitted and mapped; "exact" follows the list
            of PIM commands of each channel, for one concrete design.
        most_channels: A bound on `hbm.num_channels` where that is traced (default: the number
            itself, or 64 where it is traced).
        calibration: The fitted constants.
        attention: The work of the channels where it is already known (default: computed); layers
            must be alike.
        mix: What the model has beside one kind of layer, where its numbers are traced (default:
            read from the model; nothing where they are traced).

    Returns:
        Cycles of every operation and stage, throughput, utilization, and energy of one device.

    Raises:
        ValueError: `system`, `sub_batches`, `fidelity` or `path` is unknown, or the model has
            latent attention, which needs "intended" fidelity except on a GPU.

    Example:
        >>> from neupims import Hardware, load_model, load_parallel, make_batch, simulate
        >>> batch = make_batch([300, 512, 40, 77], channels=[0, 1, 0, 1])
        >>> model, parallel = load_model("gpt3-7b"), load_parallel("gpt3-7b")
        >>> simulate(Hardware(), model, batch, parallel).stage_cycles.shape
        (6,)

    Reference:
        Heo et al., "NeuPIMs", ASPLOS 2024, arXiv:2403.00579, section 6.
    """
    _check_known("system", system, SYSTEMS)
    _check_known("sub_batches", sub_batches, (1, 2))
    _check_known("fidelity", fidelity, FIDELITIES)
    _check_known("path", path, ("closed", "exact"))
    check_split(
        parallel.kv_split,
        system=system,
        fidelity=fidelity,
        channels=hardware.hbm.num_channels,
    )
    if system == "npu-pim":
        sub_batches = 1
    options: dict[str, Any] = {
        "system": system,
        "sub_batches": sub_batches,
        "fidelity": fidelity,
        "channels": _count_channels(hardware, most_channels),
    }
    two_buffers = _has_two_buffers(hardware)
    mix = find_mix(model) if mix is None else mix
    check_latent(mix, system=system, fidelity=fidelity)
    kinds, runs = layer_kinds(model, mix), []
    for each in kinds:
        given = (hardware, each.model, see_window(batch, each), parallel)
        work = attention
        if work is None and path == "exact" and system in PIM_SYSTEMS:
            work = exact_attention(*given, calibration=calibration, **options)
        runs.append(
            _simulate(*given, calibration, work, mix=each.mix, two_buffers=two_buffers, **options)
        )
    return mean_of_layers(kinds, runs)


def see_window(batch: Batch, kind: LayerKind) -> Batch:
    """Returns a batch with the tokens that a kind of layer attends to.

    Args:
        batch: The requests.
        kind: The kind of layer.
    """
    if not kind.mix.windows:
        return batch
    return dataclasses.replace(batch, seq_lens=attended(kind.model, batch.seq_lens))


def mean_of_layers(kinds: Sequence[LayerKind], runs: Sequence[Iteration]) -> Iteration:
    """Returns the iteration of a model with several kinds of layers.

    Cycles of a layer, its stages and operations are the mean over the layers of a device, so that
    layers times `layer_cycles` is the iteration, as for layers that are alike.

    Args:
        kinds: The kinds of layers.
        runs: The iteration of a model with layers of each kind alone.
    """
    if len(runs) == 1:
        return runs[0]

    def mean(shares, values):
        return sum(share * value for share, value in zip(shares, values, strict=True))

    shares = [each.share for each in kinds]
    found = jax.tree.map(lambda *values: mean(shares, values), *runs)
    busy = [
        share * run.layer_cycles / found.layer_cycles
        for share, run in zip(shares, runs, strict=True)
    ]
    used = {
        name: mean(busy, [getattr(run, name) for run in runs])
        for name in ("npu_utilization", "pim_utilization", "bandwidth_utilization")
    }
    tokens = runs[0].tokens_per_second * runs[0].iteration_seconds
    return dataclasses.replace(
        found,
        tokens_per_second=tokens / found.iteration_seconds,
        flagged=jnp.stack([run.flagged for run in runs]).any(axis=0),
        **used,
    )


@partial(
    jax.jit,
    static_argnames=("system", "sub_batches", "fidelity", "channels", "two_buffers", "mix"),
)
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
    two_buffers,
    mix,
) -> Iteration:
    context = Context(hardware, model, batch, parallel, calibration, system, fidelity, mix)
    interleaved = system == "neupims" and sub_batches == 2
    planned = stages(system, sub_batches)
    memory = stage_attention(
        *(hardware, model, batch, parallel, attention),
        sub_batches=tuple({stage.pim_sub_batch for stage in planned} - {-1}),
        system=system,
        interleaved=interleaved,
        channels=channels,
        fidelity=fidelity,
        calibration=calibration,
        two_buffers=two_buffers,
    )
    tokens = memory.totals.tokens
    if attention is not None and attention.requests.shape[1] > 1:
        # The simulator's pieces share a request; each counts once.
        which = batch.sub_batches if interleaved else jnp.zeros_like(batch.sub_batches)
        tokens = jax.ops.segment_sum((batch.seq_lens > 0) * 1.0, which, 2)
    tiles = _tile_products(context, tokens)
    stage_cycles, starts, cycles, works = [], [], [], []
    left: Number = 0.0  # bytes that the stage before wrote last, if its NPU side ended with it
    for stage in planned:
        npu: list[Work] = []
        for operation in stage.npu:
            tile = tiles.get((operation.name, stage.npu_sub_batch))
            before = npu[-1].write_bytes if npu else left
            count = tokens[stage.npu_sub_batch]
            npu.append(npu_operation(operation, context, count, before, tile))
        alone, beside = memory.cycles.get(stage.pim_sub_batch, ((), ()))
        on_npu, on_pim = side_by_side(hardware, calibration, npu, alone, beside)
        stage_cycles.append(jnp.maximum(on_npu.end, on_pim.end))
        left = 0.0
        if npu:
            left = jnp.where(stage_cycles[-1] - on_npu.end < DRAINED, npu[-1].write_bytes, 0.0)
        starts += [on_npu.starts, on_pim.starts]
        cycles += [on_npu.cycles, on_pim.cycles]
        works.append(npu)
    return summarize(
        context,
        memory.totals,
        memory.counts if system in PIM_SYSTEMS else PIM_NONE,
        works,
        stage_cycles,
        jnp.concatenate(starts),
        jnp.concatenate(cycles),
        sub_batches=sub_batches,
        tokens=tokens,
    )


def _tile_products(context: Context, tokens) -> dict[tuple[str, int], Tiling]:
    """Returns the tiling of each product for each sub-batch; one loop finds all of them."""

    @designs_last
    def tile(hardware, model, parallel, tokens):
        at = context._replace(hardware=hardware, model=model, parallel=parallel)
        sides = [product.sides(model, parallel) for product in PRODUCTS if product.sides]
        kinds = [product_bits(at, routed=product.routed) for product in PRODUCTS]
        each = route(model, tokens).tokens  # unused where there is a skew
        counts = jnp.stack([each if product.routed else tokens for product in PRODUCTS], axis=1)

        def column(numbers):
            values = jnp.stack(jnp.broadcast_arrays(*(1.0 * number for number in numbers)))
            return values.reshape(*values.shape, *[1] * (counts.ndim - 1 - values.ndim))

        inner, features = (column([side[which] for side in sides]) for which in (0, 1))
        bits = SIXTEEN
        if context.mix.narrow:
            bits = Bits(*(column([kind[which] for kind in kinds]) for which in (0, 1)))
        tiles = tiling(hardware, counts, inner, features, bits)
        return [
            [jax.tree.map(lambda value, at=(which, place): value[at], tiles) for which in (0, 1)]
            for place in range(len(PRODUCTS))
        ]

    found = tile(context.hardware, context.model, context.parallel, tokens)
    return {
        (product.name, which): tiles[which]
        for product, tiles in zip(PRODUCTS, found, strict=True)
        for which in (0, 1)
    }


def summarize(
    context: Context,
    attention: Totals,
    pim: PIMCounts,
    works: Sequence[Sequence[Work]],
    stage_cycles: Sequence[Number],
    starts: Float[Array, " operations"],
    cycles: Float[Array, " operations"],
    *,
    sub_batches: int,
    tokens: Float[Array, "2"],
    headed: Number | None = None,
) -> Iteration:
    """Returns the iteration whose operations do the given work in the given time.

    Args:
        context: The hardware, the model, the batch, and the system that runs it.
        attention: The sums of the work of the channels.
        pim: The PIM commands of one layer.
        works: The NPU's operations of each stage.
        stage_cycles: The core cycles of each stage.
        starts: The start of each operation from the start of its stage, core cycles.
        cycles: The core cycles of each operation.
        sub_batches: The number of sub-batches.
        tokens: The tokens of each sub-batch.
        headed: The tokens of which the LM head is computed (default: all).
    """
    hardware, model, batch, parallel = context[:4]
    system = context.system
    planned = stages(system, sub_batches)
    names = [stage.name for stage in planned]
    of = dict(zip(names, stage_cycles, strict=True))
    layers = ceil_divide(model.layers, parallel.pp)
    if len(planned) == len(INTERLEAVED):
        in_layer = ["C", "D"]
        iteration = of["A"] + of["B"] + (layers - 1) * (of["C"] + of["D"]) + of["E"] + of["F"]
    else:
        in_layer = names
        iteration = layers * sum(stage_cycles)
    layer = sum((of[name] for name in in_layer), start=jnp.float32(0))
    head, headed = None, tokens.sum() if headed is None else headed
    if context.mix.lm_head:
        head = head_work(context, headed)
        iteration = iteration + head.cycles

    in_use = [
        work
        for stage, npu in zip(planned, works, strict=True)
        if stage.name in in_layer
        for work in npu
    ]
    total = jax.tree.map(lambda *values: sum(values, start=jnp.float32(0)), *in_use)
    with_pim = system in PIM_SYSTEMS
    sent = messages(model, parallel, layers, tokens.sum(), jnp.maximum((tokens > 0).sum(), 1))
    communication = link_seconds(hardware, sent[0]) + link_seconds(hardware, sent[1])
    seconds = iteration / hardware.npu.clock_hz + communication
    elapsed = seconds * hardware.npu.clock_hz
    counts = count_commands(context, total, pim, layers, elapsed, sent, tokens.sum())
    if head is not None:
        counts = add_head(context, counts, head, headed)
    spent = energy(counts, hardware, pim=with_pim)
    joules = spent.total if system != "gpu" else seconds * hardware.gpu.board_watts
    moved = total.read_bytes + total.write_bytes + pim.results * burst_bytes(hardware.hbm)
    bandwidth = (
        hardware.gpu.bytes_per_second / hardware.npu.clock_hz
        if system == "gpu"
        else bytes_per_cycle(hardware)
    )
    places = jnp.array([STAGES.index(name) if name in STAGES else 0 for name in names])
    lost = jnp.max(jnp.where(batch.seq_lens > 0, batch.channels, 0)) >= jnp.minimum(
        hardware.hbm.num_channels, attention.channel_cycles.shape[1]
    )
    lost = lost | ~is_split(hardware, parallel, context.fidelity)
    leaves = jax.tree.leaves((hardware, model, parallel))
    wrong = sum(jnp.isnan(jnp.asarray(leaf, jnp.float32)) for leaf in leaves) > 0
    if with_pim:  # tested here and not in the results, which are maxima and may drop NaN
        wrong = wrong | ~attention.finite
    return Iteration(
        stage_cycles=jnp.zeros(len(STAGES)).at[places].set(jnp.stack(stage_cycles)),
        op_cycles=cycles,
        op_starts=starts,
        layer_cycles=layer,
        head_cycles=0.0 * layer if head is None else head.cycles,
        iteration_cycles=elapsed,
        iteration_seconds=seconds,
        tokens_per_second=tokens.sum() / seconds,
        npu_utilization=total.busy_cycles / layer,
        pim_utilization=(
            attention.cycles / hardware.hbm.num_channels / layer if with_pim else 0.0 * layer
        ),
        bandwidth_utilization=moved / bandwidth / layer,
        channel_cycles=attention.channel_cycles,
        counts=counts,
        energy=spent,
        energy_joules=joules,
        flagged=wrong
        | ~is_timed(model, context.mix)
        | (lost if with_pim else False)
        | (~holds_tile(hardware) if system != "gpu" else False)
        | ~jnp.isfinite(seconds)
        | ~(seconds > 0)
        | ~jnp.isfinite(joules),
    )


def add_head(context: Context, counts: Counts, head: Work, tokens) -> Counts:
    """Returns the counts with those of the LM head.

    Only the last of the groups of devices has the LM head; each counts its share of it.

    Args:
        context: The hardware, the model, the batch, and the system that runs it.
        counts: The counts of the layers.
        head: The work of the LM head, `stages.head_work`.
        tokens: The tokens of which it is computed.
    """
    each = jax.tree.map(lambda value: value / context.parallel.pp, head)
    norm = 5.0 * tokens * context.model.width * context.model.lm_head / context.parallel.pp
    moved = each.read_bytes + each.write_bytes
    return dataclasses.replace(
        counts,
        npu_macs=counts.npu_macs + each.macs,
        vector_operations=counts.vector_operations + norm,
        scratchpad_bytes=counts.scratchpad_bytes + 2 * moved,
        read_bytes=counts.read_bytes + each.read_bytes,
        write_bytes=counts.write_bytes + each.write_bytes,
        activations=counts.activations + moved / context.hardware.hbm.row_bytes,
    )


def count_commands(context: Context, total: Work, pim, layers, elapsed, sent, tokens) -> Counts:
    """Returns what the layers of one device do in an iteration, from the work of one layer.

    Args:
        context: The hardware, the model, the batch, and the system that runs it.
        total: The work of the NPU in one layer.
        pim: The PIM commands of one layer.
        layers: The layers of one device.
        elapsed: The core cycles of the iteration.
        sent: The messages to other devices, `links.messages`.
        tokens: The tokens of the batch.
    """
    hardware, hbm = context.hardware, context.hardware.hbm
    to_core = hardware.npu.clock_hz / hbm.clock_hz
    # Outside attention: two layer norms of 5 operations, two sums and one activation.
    elements = (
        12.0 * tokens * context.model.width
        + mlp_rows(context, tokens) * mlp_channels(context.model) / context.parallel.tp
    )
    return Counts(
        npu_macs=layers * total.macs,
        vector_operations=layers * elements,
        scratchpad_bytes=layers * 2 * (total.read_bytes + total.write_bytes),
        read_bytes=layers * total.read_bytes,
        write_bytes=layers * total.write_bytes,
        activations=layers * (total.read_bytes + total.write_bytes) / hbm.row_bytes,
        group_activations=layers * pim.tiles * banks(hbm) / hardware.pim.banks_per_activation,
        gwrites=layers * pim.gwrites,
        comps=layers * pim.products,
        result_reads=layers * pim.results,
        refreshes=elapsed / to_core / hbm.trefi_cycles * hbm.ranks * hbm.num_channels,
        elapsed_cycles=elapsed,
        link_bytes=sum((each.count * each.each_bytes for each in sent), start=jnp.float32(0)),
    )


def _count_channels(hardware: Hardware, most_channels: int | None) -> int:
    if most_channels is not None:
        return most_channels
    try:
        return int(hardware.hbm.num_channels)
    except (TypeError, jax.errors.ConcretizationTypeError):
        return TRACED_CHANNELS


def _has_two_buffers(hardware: Hardware) -> bool:
    """Whether all machines are known to have two row buffers; False where the number is traced."""
    buffers = hardware.pim.row_buffers
    return not isinstance(buffers, jax.core.Tracer) and bool(np.all(np.asarray(buffers) > 1))


def _check_known(name: str, value, known) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, not {value!r}")
