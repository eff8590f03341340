"""Attention in the memory as the stages of a layer see it: how long it takes, and its sums.

`timing.attention` has the work of each channel. Cycles are core cycles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from neupims.machine.calibration import Calibration
from neupims.machine.hardware import Hardware
from neupims.machine.systems import Fidelity, System
from neupims.machine.workload import Batch, Decoder, Parallel
from neupims.timing.attention import Attention, attention_counts, closed_attention
from neupims.timing.columns import designs_last
from neupims.timing.layout import heads_of_device
from neupims.timing.pim_commands import PIMCounts
from neupims.timing.split import merge_cycles
from neupims.timing.vector import softmax_cycles

# Designs whose requests and tables are computed together on a CPU, so that they fit its cache: each
# has some hundreds of numbers.
DESIGNS_TOGETHER = 128


class Totals(NamedTuple):
    """Sums of the work of all channels."""

    tokens: Float[Array, "2"]  # requests of each sub-batch
    channel_cycles: Float[Array, "2 channels"]  # core cycles without the NPU
    cycles: Float[Array, ""]  # the sum of `channel_cycles`
    finite: Bool[Array, ""]  # whether no cycles are infinite or NaN


def attention_totals(attention: Attention) -> Totals:
    """Returns the sums of the work of all channels.

    Args:
        attention: The work of the channels.
    """
    channel_cycles = attention.alone.sum(axis=(1, 3))
    total = channel_cycles.sum(axis=(0, 1))
    # A sum keeps what is not finite; on CPUs the maximum of a large array drops NaN.
    finite = jnp.isfinite(total) & jnp.isfinite(attention.beside.sum(axis=(0, 1, 2, 3)))
    return Totals(attention.requests.sum(axis=(1, 2)), channel_cycles, total, finite)


class StageAttention(NamedTuple):
    """What the stages of a layer need to know of attention in the memory."""

    # Of each sub-batch: logit with softmax and attend, core cycles without the NPU and beside it.
    cycles: dict[int, tuple[Float[Array, "2"], Float[Array, "2"]]]
    totals: Totals
    counts: PIMCounts  # the commands of one layer


def stage_attention(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    attention: Attention | None = None,
    *,
    sub_batches: tuple[int, ...],
    system: System,
    interleaved: bool,
    channels: int,
    fidelity: Fidelity,
    calibration: Calibration,
    two_buffers: bool = False,
) -> StageAttention:
    """Returns what the stages need to know of attention, from the requests.

    Mapped over designs with `jax.vmap`, all designs are computed side by side (`timing.columns`).

    Args:
        hardware: As in `attention.closed_attention`.
        model: As in `attention.closed_attention`.
        batch: As in `attention.closed_attention`.
        parallel: As in `attention.closed_attention`.
        attention: The work of the channels, where it is known (default: computed by
            `attention.closed_attention`, which the options below are for).
        sub_batches: The sub-batches, 0 or 1, whose cycles are needed.
        system: As in `attention.closed_attention`.
        interleaved: As in `attention.closed_attention`.
        channels: As in `attention.closed_attention`.
        fidelity: As in `attention.closed_attention`.
        calibration: As in `attention.closed_attention`.
        two_buffers: As in `attention.closed_attention`.

    Returns:
        Cycles of the sub-batches, sums over the channels, and commands of one layer.
    """

    def find(hardware, model, batch, parallel, attention, calibration):
        if attention is not None:
            counts = attention_counts(hardware, model, batch, parallel, fidelity=fidelity)
        else:
            attention, counts = closed_attention(
                *(hardware, model, batch, parallel),
                system=system,
                interleaved=interleaved,
                channels=channels,
                fidelity=fidelity,
                calibration=calibration,
                two_buffers=two_buffers,
            )

        def cycles(which: int, beside: bool) -> Array:
            given = (hardware, model, parallel, attention, which)
            return attention_cycles(*given, beside=beside, system=system, fidelity=fidelity)

        both = {which: (cycles(which, False), cycles(which, True)) for which in sub_batches}
        return StageAttention(both, attention_totals(attention), counts)

    find_of_designs = designs_last(find, together=DESIGNS_TOGETHER)
    return find_of_designs(hardware, model, batch, parallel, attention, calibration)


def attention_cycles(
    hardware: Hardware,
    model: Decoder,
    parallel: Parallel,
    attention: Attention,
    sub_batch: int,
    *,
    beside: bool,
    system: System,
    fidelity: Fidelity,
) -> Float[Array, "2 ..."]:
    """Returns the core cycles of logit with softmax, and of attend, for one sub-batch.

    Both are the slowest channel's, piece after piece. In "simulator" fidelity softmax instructions
    leave one a cycle in the order of the channels, so those of later channels wait for the slowest
    channel before them; in "npu-pim" PIM commands wait in the same way.

    Args:
        hardware: The machine.
        model: The model.
        parallel: How many devices share a layer.
        attention: The work of the channels.
        sub_batch: The place of the sub-batch on the first axis of `attention`.
        beside: Whether the NPU uses the memory too.
        system: "neupims" or "npu-pim".
        fidelity: "simulator" or "intended".

    Returns:
        Core cycles of the two PIM operations, (2,).
    """
    part = Attention(*(each[sub_batch] for each in attention))
    load = part.beside if beside else part.alone  # (pieces, channels, 2)
    heads, _ = heads_of_device(model, parallel)
    if fidelity == "simulator":
        later = heads * _sum_before(part.requests[:, ::-1])[:, ::-1]
        after = jnp.stack([later, jnp.zeros_like(later)], axis=2)
        if system == "npu-pim":
            after = after + _sum_before(part.instructions)
        return jnp.where(load > 0, load + after, 0).max(axis=1).sum(axis=0)
    softmax = heads * softmax_cycles(hardware, part.longest) / hardware.npu.vector_units
    merge = merge_cycles(hardware, model, parallel, part.requests.sum(axis=(0, 1)), heads)
    slowest = jnp.where(load > 0, load, 0).max(axis=1).sum(axis=0)
    return slowest + jnp.stack(jnp.broadcast_arrays(softmax, merge))


def _sum_before(values: Float[Array, "pieces channels ..."]) -> Float[Array, "pieces channels ..."]:
    """Returns the sums of the channels before each channel."""
    return jax.lax.associative_scan(jnp.add, values, axis=1) - values
