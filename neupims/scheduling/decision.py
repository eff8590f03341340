"""The choices of a schedule search, as arrays.

A decision gives the channel of each request, its sub-batch, its place in the channel's list, one or
two sub-batches, and values of hardware knobs. Searches change a `Genome`; `decide` turns it into a
`Decision`. A genome holds a place for each request: twice its channel, plus its sub-batch. A
realisable schedule is one that the public simulator can execute: a trace of lengths and channels,
halved by its own rule. `repair` makes the sub-batches of a genome obey that rule: within a
channel's list, requests that want sub-batch 0 come first, and the list is cut where the simulator
cuts it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from neupims.files import write_text
from neupims.machine.workload import Batch, halves, make_batch
from neupims.scheduling.policies import first_halves, rank_by_number

CHANNELS_KNOB = "hbm.num_channels"


class Genome(NamedTuple):
    """One point of a search; populations have leading axes."""

    places: Int[Array, " r"]  # 2 x channel + sub-batch
    # Within the sub-batch of a channel: the least first, equals in the order of the requests.
    priorities: Int[Array, " r"]
    interleaved: Bool[Array, ""]  # two sub-batches, or all requests at once
    knobs: Float[Array, " k"]  # values of the hardware knobs


class Decision(NamedTuple):
    """A schedule. Arrays are in the order of the requests."""

    channels: Int[Array, " r"]  # the channel of each request
    sub_batches: Int[Array, " r"]  # the sub-batch of each request, 0 or 1
    order: Int[Array, " r"]  # the requests in the order of a trace's rows
    interleaved: Bool[Array, ""]  # two sub-batches, or all requests at once
    knobs: Float[Array, " k"]  # values of the hardware knobs


@dataclass(frozen=True)
class HardwareKnob:
    """A field of the hardware that is searched with the schedule."""

    name: str  # dotted, as in the hardware record
    low: float  # the least value
    high: float  # the greatest value
    whole: bool = False  # whether values are whole numbers


@dataclass(frozen=True)
class Choices:
    """The choices that a search has. Equal choices share their compiled searches."""

    channels: int  # number of channels
    realisable: bool = False  # whether the public simulator must be able to execute the schedule
    sub_batches: tuple[int, ...] = (1, 2)  # the numbers of sub-batches that may be chosen
    priorities: int = 1  # levels; 1 leaves the order within a sub-batch as it is
    knobs: tuple[HardwareKnob, ...] = ()  # fields of the hardware that are searched too


def repair(choices: Choices, resident: Int[Array, " r"], genome: Genome) -> Genome:
    """Returns a valid genome: its channels exist, and it is realisable if the choices require it.

    Args:
        choices: What may be chosen.
        resident: The channel of a request that must stay there, -1 where it is free, (r,).
        genome: Any genome.
    """
    channels = genome.places >> 1
    for index, knob in enumerate(choices.knobs):
        if knob.name == CHANNELS_KNOB:
            channels = channels % genome.knobs[index].astype(channels.dtype)
    channels = jnp.where(resident >= 0, resident, channels)
    genome = genome._replace(places=2 * channels + (genome.places & 1))
    if not choices.realisable:
        return genome
    classes = 2 * choices.priorities
    groups = _groups(choices, genome)
    rank, counts = rank_by_number(groups, choices.channels * classes)
    counts = counts.reshape(choices.channels, classes)
    before = jnp.cumsum(counts, axis=1) - counts
    room = first_halves(counts.sum(axis=1))[:, None] - before  # of a group, in sub-batch 0
    return genome._replace(places=2 * channels + (rank >= room.reshape(-1)[groups]))


def _groups(choices: Choices, genome: Genome) -> Int[Array, " r"]:
    """Returns a number for each channel, sub-batch and priority, in the order of a trace's rows."""
    return genome.places * choices.priorities + genome.priorities


def serving_order(choices: Choices, genome: Genome) -> Int[Array, " r"]:
    """Returns the requests by channel, sub-batch, priority and number, (r,).

    This is one sort of whole numbers, which is faster than a stable one by keys.

    Args:
        choices: What may be chosen.
        genome: A repaired genome.
    """
    requests = genome.places.shape[-1]
    return jnp.sort(_groups(choices, genome) * requests + jnp.arange(requests)) % requests


def decide(choices: Choices, genome: Genome) -> Decision:
    """Returns the decision of a repaired genome.

    Args:
        choices: What may be chosen.
        genome: The genome.
    """
    return Decision(
        genome.places >> 1,
        genome.places & 1,
        serving_order(choices, genome),
        genome.interleaved,
        genome.knobs,
    )


def make_genome(
    choices: Choices, channels, sub_batches, *, interleaved: bool = True, knobs=None
) -> Genome:
    """Returns the genome of a schedule.

    Args:
        choices: What may be chosen.
        channels: The channel of each request, (r,).
        sub_batches: The sub-batch of each request, 0 or 1, (r,).
        interleaved: Whether two sub-batches are interleaved.
        knobs: Values of the hardware knobs, (k,) (default: the lowest ones).
    """
    places = 2 * jnp.asarray(channels, jnp.int32) + jnp.asarray(sub_batches, jnp.int32)
    values = jnp.asarray([knob.low for knob in choices.knobs] if knobs is None else knobs)
    return Genome(
        places, jnp.zeros_like(places), jnp.asarray(interleaved), jnp.asarray(values, jnp.float32)
    )


def decision_batch(seq_lens: Int[Array, " r"], decision: Decision) -> Batch:
    """Returns the batch of a decision, with requests in the order in which channels serve them.

    Args:
        seq_lens: The tokens of each request, (r,).
        decision: The schedule.
    """
    order = np.asarray(decision.order)
    rows = [
        np.asarray(part, np.int32)[order]
        for part in (seq_lens, decision.channels, decision.sub_batches)
    ]
    return Batch(*rows)


def export_trace(path: str | Path, batch: Batch, *, num_channels: int = 32) -> None:
    """Writes a batch as a trace of the public simulator, which reads the same schedule from it.

    Rows are sorted by channel, those of sub-batch 0 first. The file appears whole or not at all.

    Args:
        path: The CSV file.
        batch: The batch.
        num_channels: The channels of the machine.

    Raises:
        ValueError: The simulator's rule halves the batch into other sub-batches, whatever the order
            of rows.
        OSError: The file cannot be written.
    """
    batch = make_batch(batch.seq_lens, batch.channels, batch.sub_batches, num_channels=num_channels)
    rows = np.lexsort((np.asarray(batch.sub_batches), np.asarray(batch.channels)))
    lengths, channels, sub_batches = (
        np.asarray(part)[rows] for part in (batch.seq_lens, batch.channels, batch.sub_batches)
    )
    if not np.array_equal(halves(jnp.asarray(channels), num_channels), sub_batches):
        raise ValueError(
            "the simulator cannot execute this schedule: its rule halves each channel's list"
            " otherwise; search with --realisable"
        )
    listed = "".join(
        f"{length},{channel}\n"
        for length, channel in zip(lengths.tolist(), channels.tolist(), strict=True)
    )
    write_text(path, f"seq_len,ch_idx\n{listed}")
