"""What a schedule search decides, as arrays: the channel of each request, its sub-batch, its place
in the channel's list, one or two sub-batches, and hardware knobs.

`Genome` is what searches change, `Decision` what it means. A genome holds a place for each request:
twice its channel, plus its sub-batch. In a realisable space (what the public simulator can execute:
a trace of lengths and channels, halved by its own rule) `repair` makes the sub-batches obey that
rule: within a channel's list, requests that want sub-batch 0 come first, and the list is cut where
the simulator cuts it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from neupims.files import write_text
from neupims.machine.workload import Batch, halves, make_batch
from neupims.scheduling.policies import first_halves, rank_of_grouped

CHANNELS_KNOB = "hbm.num_channels"


class Genome(NamedTuple):
    """One point of a search; populations have leading axes."""

    places: Int[Array, " r"]  # 2 x channel + sub-batch
    priorities: Int[
        Array, " r"
    ]  # within the sub-batch of a channel: the least first, equals in the order of the requests
    interleaved: Bool[Array, ""]  # two sub-batches, or all requests at once
    knobs: Float[Array, " k"]


class Decision(NamedTuple):
    """What a genome means. Arrays are in the order of the requests; `order` lists them as the rows
    of a trace would.
    """

    channels: Int[Array, " r"]
    sub_batches: Int[Array, " r"]
    order: Int[Array, " r"]
    interleaved: Bool[Array, ""]
    knobs: Float[Array, " k"]


@dataclass(frozen=True)
class Knob:
    """A quantity of the hardware that is searched with the schedule."""

    name: str  # dotted, as in the hardware record
    low: float
    high: float
    whole: bool = False


@dataclass(frozen=True)
class Space:
    """Where to search. Static: two equal spaces share their compiled searches."""

    channels: int
    realisable: bool = False
    sub_batches: tuple[int, ...] = (1, 2)  # the numbers of sub-batches that may be chosen
    priorities: int = 1  # levels; 1 leaves the order within a sub-batch as it is
    knobs: tuple[Knob, ...] = ()


def repair(space: Space, resident: Int[Array, " r"], genome: Genome) -> Genome:
    """The genome made valid: channels below the number there are, sub-batches by the simulator's
    rule if realisable.

    `resident` is the channel of a request that must stay there, -1 where it is free.
    """
    channels = genome.places // 2
    for index, knob in enumerate(space.knobs):
        if knob.name == CHANNELS_KNOB:
            channels = channels % genome.knobs[index].astype(channels.dtype)
    channels = jnp.where(resident >= 0, resident, channels)
    genome = genome._replace(places=2 * channels + genome.places % 2)
    if not space.realisable:
        return genome
    order = serving_order(space, genome)
    grouped = channels[order]
    rank, counts = rank_of_grouped(grouped, space.channels)
    second = rank >= first_halves(counts)[grouped]
    return genome._replace(places=jnp.zeros_like(channels).at[order].set(2 * grouped + second))


def serving_order(space: Space, genome: Genome) -> Int[Array, " r"]:
    """The requests by channel, sub-batch, priority and number. One sort of whole numbers, which is
    faster than a stable one by keys.
    """
    requests = genome.places.shape[-1]
    keys = (genome.places * space.priorities + genome.priorities) * requests + jnp.arange(requests)
    return jnp.sort(keys) % requests


def decide(space: Space, genome: Genome) -> Decision:
    """The decision of a repaired genome."""
    return Decision(
        genome.places // 2,
        genome.places % 2,
        serving_order(space, genome),
        genome.interleaved,
        genome.knobs,
    )


def make_genome(
    space: Space, channels, sub_batches, *, interleaved: bool = True, knobs=None
) -> Genome:
    """The genome of a schedule given by arrays in the order of the requests."""
    places = 2 * jnp.asarray(channels, jnp.int32) + jnp.asarray(sub_batches, jnp.int32)
    values = jnp.array([knob.low for knob in space.knobs]) if knobs is None else jnp.asarray(knobs)
    return Genome(
        places, jnp.zeros_like(places), jnp.asarray(interleaved), jnp.asarray(values, jnp.float32)
    )


def decision_batch(seq_lens: Int[Array, " r"], decision: Decision) -> Batch:
    """The batch of a decision, its requests in the order in which their channels serve them."""
    order = np.asarray(decision.order)
    rows = [
        np.asarray(part, np.int32)[order]
        for part in (seq_lens, decision.channels, decision.sub_batches)
    ]
    return Batch(*rows)


def export_trace(path: str | Path, batch: Batch, *, num_channels: int = 32) -> None:
    """Writes a batch as a trace of the public simulator, so that reading it gives the same channels
    and sub-batches.

    Rows go by channel, those of sub-batch 0 first, else in the batch's order. The file appears
    whole or not at all.

    Raises:
        ValueError: the simulator's halving rule gives other sub-batches than the batch has,
            whatever the order of rows.
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
