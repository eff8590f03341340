"""The cost of a schedule: the closed form of the model for one decoder layer.

The schedule of a batch decides how much work each channel has, and how many tokens the NPU has at a
time. A `Problem` holds everything else, computed once, so that populations of schedules of one
batch are cheap to evaluate: the work of each request, and the NPU's operations for every number of
tokens.
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
from neupims.machine.layer_kinds import ALIKE, Mix, find_mix
from neupims.machine.record import replace
from neupims.machine.supported import check_alike, check_latent
from neupims.machine.systems import Fidelity
from neupims.machine.workload import Batch, Decoder, Parallel
from neupims.scheduling.decision import Choices, Decision
from neupims.timing import gemv
from neupims.timing.attention import Attention
from neupims.timing.capacity import request_tiles
from neupims.timing.gemm import Work
from neupims.timing.iteration import simulate
from neupims.timing.npu import Context
from neupims.timing.overlap import DRAINED, side_by_side
from neupims.timing.stage_attention import attention_cycles
from neupims.timing.stages import npu_operation, stages

MEASURES = ("time", "energy", "energy-delay")


class Problem(NamedTuple):
    """A batch to schedule. All leaves may be traced; a batch of problems adds a leading axis."""

    hardware: Hardware  # fields as float32, like those of model and parallel
    model: Decoder  # its dimensions
    parallel: Parallel  # how the model is spread over devices
    seq_lens: Int[Array, " r"]  # tokens of each request
    resident: Int[Array, " r"]  # the channel of a request that must stay there, -1 where it is free
    work: Float[Array, "r 2"]  # core cycles of logit and of attend on its channel
    beside: Float[Array, "r 2"]  # the same while the NPU uses the memory too
    tiles: Float[Array, " r"]  # of the memory, that the keys and values of each request take
    room: Float[Array, ""]  # tiles of a channel
    # Core cycles, and those that wait for the memory, of each operation of stage B with 0, 1, ... r
    # tokens; the other tokens are in stage A.
    second_npu: Float[Array, "tokens operations 2"]
    # The same of stage C (or D), after a stage that ended with PIM (0) or with the NPU (1).
    layer_npu: Float[Array, "2 tokens operations 2"]
    serial_npu: Float[Array, ""]  # core cycles of stages A and E together, for all tokens


class Cost(NamedTuple):
    """The cost of a schedule. `busy` decides only between equal objectives."""

    objective: Float[Array, ""]  # in the unit of the measure
    # Core cycles of the fullest channels: working PIM slows the NPU and costs energy.
    busy: Float[Array, ""]


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
    """Returns the problem of a batch.

    Args:
        hardware: The machine.
        model: The model.
        parallel: How the model is spread over devices.
        seq_lens: The tokens of each request, (r,).
        resident: The channel of a request that must stay there, -1 where it is free, (r,)
            (default: all are free).
        room: The tiles that a channel holds, `capacity.channel_tiles` (default: no limit, as in the
            public simulator).
        fidelity: "simulator" or "intended".

    Raises:
        ValueError: A request alone, or residents together, need more than a channel holds; or
            schedules of such a model are not searched, or requests are spread over channels.
    """
    check_alike(model)
    check_latent(find_mix(model), system="neupims", fidelity=fidelity)
    if np.any(np.asarray(parallel.kv_split) != 1):
        raise ValueError(
            "a schedule is searched for requests in one channel each: leave out kv_split, which is"
            f" {parallel.kv_split}"
        )
    lengths = np.asarray(seq_lens, np.int32)
    free = np.full(lengths.shape, -1, np.int32)
    stays = free if resident is None else np.asarray(resident, np.int32)
    records = jax.tree.map(jnp.float32, (hardware, model, parallel))
    work, beside, tiles, *npu = _tables(
        *records, jnp.asarray(lengths), fidelity=fidelity, mix=find_mix(model)
    )
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


@partial(jax.jit, static_argnames=("fidelity", "mix"))
def _tables(hardware, model, parallel, lengths, *, fidelity, mix):
    """Returns the work of requests, and the NPU's operations for every number of tokens."""
    given = (hardware, model, lengths, parallel)
    waits = (None, DEFAULT.reopen_cycles)
    work, beside = gemv.request_works(*given, fidelity=fidelity, waits=waits)
    tiles = request_tiles(hardware, model, lengths, parallel, fidelity=fidelity)
    batch = Batch(lengths, jnp.zeros_like(lengths), jnp.zeros_like(lengths))
    context = Context(hardware, model, batch, parallel, fidelity=fidelity, mix=mix)
    tokens = jnp.sum(lengths > 0) * 1.0
    counts = jnp.arange(lengths.shape[0] + 1) * 1.0

    def run(stage, count, left) -> list[Work]:
        done: list[Work] = []
        for operation in stage.npu:
            before = done[-1].write_bytes if done else left
            done.append(npu_operation(operation, context, count, before))
        return done

    def cycles(stage, count, after_npu):
        # All stages before end with the operations of stage A.
        left = run(_stage(2, "A"), tokens - count, 0.0)[-1].write_bytes * after_npu
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

    Time is in core cycles of the given hardware, even if a knob changes the clock. A schedule that
    overflows a channel's memory, or leaves a sub-batch empty, costs infinity.

    Raises:
        ValueError: The measure is none of `MEASURES`.
    """

    choices: Choices  # what may be chosen
    fidelity: Fidelity = "simulator"  # that of the problem
    measure: str = "time"  # or "energy" or "energy-delay"
    mix: Mix = ALIKE  # what the model has beside one kind of layer

    def __post_init__(self):
        if self.measure not in MEASURES:
            raise ValueError(
                f"the measure must be one of {', '.join(MEASURES)}, not {self.measure!r}"
            )

    def __call__(self, problem: Problem, decision: Decision) -> Cost:
        """Returns the cost of a schedule.

        Args:
            problem: The problem.
            decision: The schedule.
        """
        of = (
            self.from_tables
            if self.measure == "time" and not self.choices.knobs
            else self.from_simulation
        )
        costs = {count: of(problem, decision, count) for count in self.choices.sub_batches}
        if len(costs) == 2:
            cost = jax.tree.map(
                lambda two, one: jnp.where(decision.interleaved, two, one), costs[2], costs[1]
            )
        else:
            (cost,) = costs.values()
        full = (
            jax.ops.segment_sum(problem.tiles, decision.channels, self.choices.channels).max()
            > problem.room
        )
        return cost._replace(objective=jnp.where(full, jnp.inf, cost.objective))

    def from_tables(self, problem: Problem, decision: Decision, sub_batches: int) -> Cost:
        """Returns the cost that `simulate` gives, to rounding, from the tables of the problem.

        Args:
            problem: The problem.
            decision: The schedule.
            sub_batches: 1 or 2; `decision.interleaved` is not used.

        Returns:
            The layer time in core cycles, infinite if one of two sub-batches is empty.
        """
        batch = Batch(problem.seq_lens, decision.channels, decision.sub_batches)
        work = channel_work(problem, batch, sub_batches, self.choices.channels)
        of = partial(
            attention_cycles,
            problem.hardware,
            problem.model,
            problem.parallel,
            work,
            system="neupims",
            fidelity=self.fidelity,
        )
        if sub_batches == 1:
            busy = of(0, beside=False).sum()
            return Cost(problem.serial_npu + busy, busy)
        first, second = (work.requests[which].sum().astype(jnp.int32) for which in (0, 1))
        attention = [(of(which, beside=False), of(which, beside=True)) for which in (0, 1)]
        _, left = stage_end(problem, problem.second_npu[second], *attention[0])
        in_c, left = stage_end(problem, problem.layer_npu[left, first], *attention[1])
        in_d, _ = stage_end(problem, problem.layer_npu[left, second], *attention[0])
        return Cost(
            jnp.where((first == 0) | (second == 0), jnp.inf, in_c + in_d),
            work.alone.sum(axis=-1).max(axis=(1, 2)).sum(),
        )

    def from_simulation(self, problem: Problem, decision: Decision, sub_batches: int) -> Cost:
        """Returns the cost by the whole model, which energies and hardware knobs need.

        Args:
            problem: The problem.
            decision: The schedule; its knobs change the hardware.
            sub_batches: 1 or 2; `decision.interleaved` is not used.

        Returns:
            The cost in the unit of the measure, infinite if one of two sub-batches is empty or the
            hardware cannot run the batch.
        """
        hardware = with_knobs(problem.hardware, self.choices, decision.knobs)
        batch = Batch(problem.seq_lens, decision.channels, decision.sub_batches)
        done = simulate(
            hardware,
            problem.model,
            batch,
            problem.parallel,
            sub_batches=sub_batches,
            fidelity=self.fidelity,
            most_channels=self.choices.channels,
            mix=self.mix,
            attention=(
                None
                if self.choices.knobs
                else channel_work(problem, batch, sub_batches, self.choices.channels)
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
    """Returns the cycles of a stage, and whether it ends with the NPU (1) or with attention (0).

    Args:
        problem: The problem.
        operations: Core cycles and memory cycles of each operation of the NPU, (operations, 2).
        alone: Core cycles of logit and attend without the NPU, (2,).
        beside: Core cycles of logit and attend beside the NPU, (2,).
    """
    zero = jnp.float32(0)
    npu = [Work(cycles, memory, zero, zero, zero, zero) for cycles, memory in operations]
    on_npu, on_pim = side_by_side(problem.hardware, DEFAULT, npu, alone, beside)
    end = jnp.maximum(on_npu.end, on_pim.end)
    return end, (end - on_npu.end < DRAINED).astype(jnp.int32)


def channel_work(problem: Problem, batch: Batch, sub_batches: int, channels: int) -> Attention:
    """Returns the work of each channel: `closed_attention` from the known work of the requests.

    Args:
        problem: The problem.
        batch: The schedule.
        sub_batches: 1 or 2.
        channels: The number of channels.
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


def with_knobs(hardware: Hardware, choices: Choices, knobs: Float[Array, " k"]) -> Hardware:
    """Returns the hardware with the values of a genome's knobs.

    Args:
        hardware: The given machine.
        choices: What may be chosen; it names the k knobs.
        knobs: Their values, (k,).
    """
    for index, knob in enumerate(choices.knobs):
        hardware = replace(hardware, knob.name, knobs[index])
    return hardware
