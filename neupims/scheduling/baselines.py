"""The simple schedules by name: every packing with every split.

A policy is a function of the problem and a line in one of the two tables.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from neupims.scheduling.decision import Choices, Genome, make_genome, repair
from neupims.scheduling.objective import Problem
from neupims.scheduling.policies import (
    estimate_cycles,
    halving_split,
    pack_longest_first,
    round_robin,
    snake_split,
)

Channels = Int[Array, " r"]


class Split(NamedTuple):
    """A way to divide each channel's list, for one or two sub-batches."""

    sub_batches: int  # 1 or 2
    # (problem, channel of each request, number of channels) -> sub-batch of each request
    divide: Callable[[Problem, Channels, int], Channels]


def _pack_in_turn(problem: Problem, num_channels: int) -> Channels:
    dealt = round_robin(problem.resident.shape[0], num_channels)
    return jnp.where(problem.resident >= 0, problem.resident, dealt)


def _pack_by_estimate(problem: Problem, num_channels: int) -> Channels:
    estimate = estimate_cycles(problem.hardware, problem.model, problem.seq_lens, problem.parallel)
    return pack_longest_first(estimate, num_channels, resident=problem.resident)


def _pack_by_work(problem: Problem, num_channels: int) -> Channels:
    return pack_longest_first(problem.work.sum(axis=1), num_channels, resident=problem.resident)


def _split_by_rule(problem: Problem, channels: Channels, num_channels: int) -> Channels:
    return halving_split(channels, num_channels)


def _split_like_a_snake(problem: Problem, channels: Channels, num_channels: int) -> Channels:
    return snake_split(problem.work.sum(axis=1), channels, num_channels)


# (problem, number of channels) -> channel of each request
PACKINGS: dict[str, Callable[[Problem, int], Channels]] = {
    "round robin": _pack_in_turn,
    "greedy (paper)": _pack_by_estimate,
    "longest first": _pack_by_work,
}
SPLITS = {
    "halves": Split(2, _split_by_rule),
    "snake": Split(2, _split_like_a_snake),
    "one batch": Split(1, _split_like_a_snake),
}


def baselines(choices: Choices, problem: Problem, knobs=None) -> dict[str, Genome]:
    """Returns the simple schedules by name, with residents where they are.

    Args:
        choices: What may be chosen; splits for other numbers of sub-batches are left out.
        problem: The problem.
        knobs: Values of the hardware knobs, (k,) (default: the lowest ones).
    """
    least = [knob.low for knob in choices.knobs]
    values = jnp.asarray(least if knobs is None else knobs, jnp.float32)
    made = _baselines(choices, problem, values)
    return {  # JAX sorts the keys of a dictionary; this is the order of the tables
        f"{packing}, {split}": made[packing, split]
        for packing in PACKINGS
        for split in SPLITS
        if (packing, split) in made
    }


@partial(jax.jit, static_argnums=0)
def _baselines(choices: Choices, problem: Problem, knobs) -> dict[tuple[str, str], Genome]:
    made = {}
    for packing, pack in PACKINGS.items():
        channels = pack(problem, choices.channels)
        for name, split in SPLITS.items():
            if split.sub_batches in choices.sub_batches:
                sub_batches = split.divide(problem, channels, choices.channels)
                interleaved = split.sub_batches == 2
                genome = make_genome(
                    choices, channels, sub_batches, interleaved=interleaved, knobs=knobs
                )
                made[packing, name] = repair(choices, problem.resident, genome)
    return made
