"""What a schedule costs: the closed form of the model for one decoder layer, arranged so that
populations of schedules of one batch are cheap.

The schedule of a batch decides how much work each channel has, and how many tokens the NPU has at a
time. What does not depend on it is worked out once in a `Problem`: the work of each request, and
the NPU's operations for every number of tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neupims.machine.calibration import DEFAULT
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.systems import Fidelity
from neupims.machine.workload import Batch, Decoder, Parallel
from neupims.scheduling.decision import Decision, Space
from neupims.timing import gemv
from neupims.timing.capacity import request_tiles
from neupims.timing.gemm import Work
from neupims.timing.schedule import (
    DRAINED,
    Attention,
    attention_cycles,
    npu_operation,
    side_by_side,
    simulate,
    stages,
)

MEASURES = ("time", "energy", "energy-delay")


class Problem(NamedTuple):
    """What is to be scheduled. All leaves may be traced; a batch of problems is the same tuple with
    a leading axis.
    """

    hardware: Hardware
    model: Decoder
    parallel: Parallel
    seq_lens: Int[Array, " r"]
    resident: Int[Array, " r"]  # the channel of a request that must stay there, -1 where it is free
    work: Float[Array, "r 2"]  # core cycles of logit and of attend on its channel
    beside: Float[Array, "r 2"]  # the same while the NPU uses the memory too
    tiles: Float[Array, " r"]  # of the memory
    room: Float[Array, ""]  # tiles of a channel
    second_npu: Float[
        Array, "tokens operations 2"
    ]  # stage B with 0, 1, ... r tokens, the others in stage A: cycles and memory cycles
    layer_npu: Float[
        Array, "2 tokens operations 2"
    ]  # stage C (or D), after a stage that ended with PIM (0) or with the NPU (1)
    serial_npu: Float[Array, ""]  # cycles of stages A and E together, for all tokens


class Cost(NamedTuple):
    """Compared in this order: the second decides only between equals of the first."""

    objective: Float[Array, ""]
    busy: Float[
        Array, ""
    ]  # cycles of the fullest channels: PIM at work slows the NPU and costs energy


Objective = Callable[[Problem, Decision], Cost]


def make_problem(
    hardware: Hardware,
    model: Decoder,
    parallel: Parallel,
    seq_lens,
    *,
    resident=None,
    room: float = np.inf,
    fidelity: Fidelity = "simulator",
) -> Problem:
    """The problem of a batch. `room` is how many tiles a channel holds (`capacity.channel_tiles`);
    no limit by default, as in the public simulator.

    Raises:
        ValueError: some requests alone, or residents together, are more than a channel holds.
    """
    lengths = np.asarray(seq_lens, np.int32)
    stays = (
        np.full(lengths.shape, -1, np.int32) if resident is None else np.asarray(resident, np.int32)
    )
    records = jax.tree.map(jnp.float32, (hardware, model, parallel))
    work, beside, tiles, *npu = _tables(*records, jnp.asarray(lengths), fidelity=fidelity)
    held = np.zeros(int(hardware.hbm.num_channels))
    np.add.at(held, stays[stays >= 0], np.asarray(tiles)[stays >= 0])
    if max(held.max(), float(tiles.max())) > room:
        raise ValueError(
            f"a channel has {room:g} tiles; the largest request needs {float(tiles.max()):g},"
            f" residents together {held.max():g}"
        )
    hardware, model, parallel = records
    return Problem(
        hardware,
        model,
        parallel,
        jnp.asarray(lengths),
        jnp.asarray(stays),
        work,
        beside,
        tiles,
        jnp.float32(room),
        *npu,
    )


@partial(jax.jit, static_argnames="fidelity")
def _tables(hardware, model, parallel, lengths, *, fidelity):
    of = partial(
        gemv.request_work, hardware, model, lengths, parallel, steps=fidelity == "simulator"
    )
    work, beside = of(), of(wait=DEFAULT.reopen_cycles)
    tiles = request_tiles(hardware, model, lengths, parallel)
    batch = Batch(lengths, jnp.zeros_like(lengths), jnp.zeros_like(lengths))
    options = {"calibration": DEFAULT, "system": "neupims", "fidelity": fidelity}
    tokens = jnp.sum(lengths > 0) * 1.0
    counts = jnp.arange(lengths.shape[0] + 1) * 1.0

    def run(stage, count, left) -> list[Work]:
        done: list[Work] = []
        for name in stage.npu:
            before = done[-1].write_bytes if done else left
            done.append(
                npu_operation(hardware, model, batch, parallel, name, count, before, **options)
            )
        return done

    def cycles(stage, count, after_npu):
        left = (
            run(_stage(2, "A"), tokens - count, 0.0)[-1].write_bytes * after_npu
        )  # all stages before end with these operations
        return jnp.array([[each.cycles, each.memory_cycles] for each in run(stage, count, left)])

    second = jax.vmap(partial(cycles, _stage(2, "B"), after_npu=1.0))(counts)
    layer = jax.vmap(
        lambda after_npu: jax.vmap(partial(cycles, _stage(2, "C"), after_npu=after_npu))(counts)
    )(jnp.arange(2.0))
    serial = sum(
        (each.cycles for name in "AE" for each in run(_stage(1, name), tokens, 0.0)),
        start=jnp.float32(0),
    )
    return work, beside, tiles, second, layer, serial


def _stage(sub_batches: int, name: str):
    return next(stage for stage in stages("neupims", sub_batches) if stage.name == name)


@dataclass(frozen=True)
class Layer:
    """The objective of most searches: the time of one decoder layer, its energy, or their product.

    Time is in cycles of the given hardware's core, whatever clock a knob chooses. A schedule that
    overflows a channel's memory, or leaves a sub-batch empty, costs infinity. The fidelity must be
    that of the problem.
    """

    space: Space
    fidelity: Fidelity = "simulator"
    measure: str = "time"

    def __post_init__(self):
        if self.measure not in MEASURES:
            raise ValueError(
                f"the measure must be one of {', '.join(MEASURES)}, not {self.measure!r}"
            )

    def __call__(self, problem: Problem, decision: Decision) -> Cost:
        of = (
            self.from_tables
            if self.measure == "time" and not self.space.knobs
            else self.from_simulation
        )
        costs = {count: of(problem, decision, count) for count in self.space.sub_batches}
        if len(costs) == 2:
            cost = jax.tree.map(
                lambda two, one: jnp.where(decision.interleaved, two, one), costs[2], costs[1]
            )
        else:
            (cost,) = costs.values()
        full = (
            jax.ops.segment_sum(problem.tiles, decision.channels, self.space.channels).max()
            > problem.room
        )
        return cost._replace(objective=jnp.where(full, jnp.inf, cost.objective))

    def from_tables(self, problem: Problem, decision: Decision, sub_batches: int) -> Cost:
        """The cost from the tables of the problem: what `simulate` gives, to rounding, at a
        fraction of the work.
        """
        batch = Batch(problem.seq_lens, decision.channels, decision.sub_batches)
        work = channel_work(problem, batch, sub_batches, self.space.channels)
        of = partial(
            attention_cycles,
            problem.hardware,
            problem.model,
            problem.parallel,
            system="neupims",
            fidelity=self.fidelity,
        )
        parts = [jax.tree.map(lambda value, which=which: value[which], work) for which in (0, 1)]
        if sub_batches == 1:
            busy = of(parts[0], parts[0].alone).sum()
            return Cost(problem.serial_npu + busy, busy)
        first, second = (part.requests.sum().astype(jnp.int32) for part in parts)
        attention = [(of(part, part.alone), of(part, part.beside)) for part in parts]
        _, left = stage_end(problem, problem.second_npu[second], *attention[0])
        in_c, left = stage_end(problem, problem.layer_npu[left, first], *attention[1])
        in_d, _ = stage_end(problem, problem.layer_npu[left, second], *attention[0])
        return Cost(
            jnp.where((first == 0) | (second == 0), jnp.inf, in_c + in_d),
            work.alone.sum(axis=-1).max(axis=(1, 2)).sum(),
        )

    def from_simulation(self, problem: Problem, decision: Decision, sub_batches: int) -> Cost:
        """The cost by the whole model, which energies and hardware knobs need."""
        hardware = with_knobs(problem.hardware, self.space, decision.knobs)
        batch = Batch(problem.seq_lens, decision.channels, decision.sub_batches)
        done = simulate(
            hardware,
            problem.model,
            batch,
            problem.parallel,
            sub_batches=sub_batches,
            fidelity=self.fidelity,
            most_channels=self.space.channels,
            attention=(
                None
                if self.space.knobs
                else channel_work(problem, batch, sub_batches, self.space.channels)
            ),
        )
        cycles = done.layer_cycles * (problem.hardware.npu.clock_hz / hardware.npu.clock_hz)
        value = {
            "time": cycles,
            "energy": done.energy_joules,
            "energy-delay": done.energy_joules * cycles,
        }[self.measure]
        there = problem.seq_lens > 0
        second = jnp.sum(decision.sub_batches * there)
        empty = (second == 0) | (second == jnp.sum(there)) if sub_batches == 2 else jnp.array(False)
        return Cost(
            jnp.where(done.flagged | empty, jnp.inf, value), done.channel_cycles.max(axis=-1).sum()
        )


def stage_end(
    problem: Problem, operations, alone, beside
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Cycles of a stage whose NPU runs `operations` (cycles and memory cycles of each), and whether
    it ends with them (1) or with attention (0).
    """
    zero = jnp.float32(0)
    npu = [Work(cycles, memory, zero, zero, zero, zero) for cycles, memory in operations]
    on_npu, on_pim = side_by_side(problem.hardware, DEFAULT, npu, alone, beside)
    end = jnp.maximum(on_npu.ends[-1], on_pim.ends[-1])
    return end, (end - on_npu.ends[-1] < DRAINED).astype(jnp.int32)


def channel_work(problem: Problem, batch: Batch, sub_batches: int, channels: int) -> Attention:
    """The work of each channel, from that of the requests, which no schedule changes:
    `schedule.closed_attention` without computing it again.
    """
    which = batch.sub_batches if sub_batches == 2 else jnp.zeros_like(batch.sub_batches)
    there = problem.seq_lens > 0
    values = jnp.concatenate(
        [problem.work, problem.beside if sub_batches == 2 else problem.work, there[:, None] * 1.0],
        axis=1,
    )
    sums = jax.ops.segment_sum(values, which * channels + batch.channels, 2 * channels).reshape(
        2, 1, channels, 5
    )
    longest = (
        jnp.stack([jnp.where(which == one, problem.seq_lens, 0).max() for one in (0, 1)]) * 1.0
    )
    return Attention(
        sums[..., :2], sums[..., 2:4], jnp.zeros_like(sums[..., :2]), sums[..., 4], longest
    )


def with_knobs(hardware: Hardware, space: Space, knobs: Float[Array, " k"]) -> Hardware:
    """The hardware with the values of a genome's knobs."""
    for index, knob in enumerate(space.knobs):
        hardware = replace(hardware, knob.name, knobs[index])
    return hardware
