"""Workloads of designs: models with their parallelism, and batches of requests."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from neupims.machine.case import select_model
from neupims.machine.division import floor_divide
from neupims.machine.traces import Requests, place_requests, read_requests
from neupims.machine.workload import Batch, Decoder, Parallel, check_batch, check_parallel

Model = str | Path | Decoder
Trace = str | Path | Batch | Requests
Spread = Parallel | Mapping[str, int]  # a mapping has some fields of Parallel, by name
TO_DEAL = "give --schedule dealt, which deals the requests to the channels of each design"


class Workload(NamedTuple):
    """A model, its parallelism and a batch of requests."""

    name: str  # MODEL/BATCH
    model: Decoder  # its dimensions
    parallel: Parallel  # how the model is spread over devices
    batch: Batch  # the requests, (r,)
    notes: tuple[str, ...] = ()  # what was assumed about the requests


def make_workloads(
    models: Model | Sequence[Model],
    batches: Trace | Sequence[Trace],
    *,
    num_channels: int = 32,
    parallel: Spread | None = None,
    lm_head: bool = False,
    dealt: bool = False,
) -> list[Workload]:
    """Returns a workload for each model with each batch.

    Args:
        models: One or several, each a name (`gpt3-7b`, ...), a TOML or JSON file or a record.
        batches: One or several, each a file or a distribution as for `read_requests`, or a record.
        num_channels: Number of channels; those of requests are below it.
        parallel: How all models are spread over devices, or some of its fields, such as {"tp": 8};
            what is not given is as published for the model, else 1.
        lm_head: Whether each step computes the LM head too (default: as the model's file says).
        dealt: Whether requests will be dealt to channels, so that those of a batch do not matter.

    Raises:
        ValueError: There is no model or no batch, a name is unknown, a file is damaged, or a model
            cannot be divided over the devices.
        OSError: A file cannot be read.
    """
    models = [models] if isinstance(models, Model) else list(models)
    batches = [batches] if isinstance(batches, Trace) else list(batches)
    if not models or not batches:
        raise ValueError("at least one model and one batch are needed")
    found = []
    for number, model in enumerate(models):
        title, decoder, spread = _read_model(model, number, len(models), parallel or {})
        if lm_head:
            decoder = dataclasses.replace(decoder, lm_head=1)
        for place, batch in enumerate(batches):
            name = _numbered("batch", place, len(batches))
            if isinstance(batch, str | Path):
                batch = read_requests(batch)
            name, notes = (batch.name, batch.notes) if isinstance(batch, Requests) else (name, ())
            placed = _place(batch, num_channels, dealt)
            found.append(Workload(f"{title}/{name}", decoder, spread, placed, notes))
    return found


def _read_model(
    model: Model, number: int, count: int, parallel: Spread
) -> tuple[str, Decoder, Parallel]:
    """Title, record and parallelism of a model."""
    given = vars(parallel) if isinstance(parallel, Parallel) else dict(parallel)
    if unknown := set(given) - (known := {field.name for field in dataclasses.fields(Parallel)}):
        raise ValueError(
            f"parallel has {', '.join(sorted(known))}, but not {', '.join(sorted(unknown))}"
        )
    if isinstance(model, Decoder):
        spread = Parallel(**({"tp": 1, "pp": 1} | given))
        check_parallel(model, spread)
        return _numbered("model", number, count), model, spread
    name, decoder, spread = select_model(model, **given)
    return Path(name).stem, decoder, spread


def _place(batch: Batch | Requests, num_channels: int, dealt: bool) -> Batch:
    """The requests on their channels; on channel 0 where they will be dealt."""
    if dealt and isinstance(batch, Batch | Requests):
        lengths = jnp.asarray(batch.seq_lens, jnp.int32)
        batch = Batch(lengths, jnp.zeros_like(lengths), jnp.zeros_like(lengths))
    elif isinstance(batch, Requests):
        return place_requests(batch, num_channels, mend=TO_DEAL)
    check_batch(batch, num_channels)
    return batch


def _numbered(kind: str, place: int, count: int) -> str:
    return kind if count == 1 else f"{kind} {place + 1}"


def list_notes(workloads: Sequence[Workload]) -> tuple[str, ...]:
    """Returns what was assumed about requests, each sentence once.

    Args:
        workloads: The workloads.
    """
    return tuple(
        dict.fromkeys(
            f"{each.name.partition('/')[2]}: {note}" for each in workloads for note in each.notes
        )
    )


def stack_workloads(workloads: Sequence[Workload], *, ordered: bool) -> tuple[Any, Any, Any]:
    """Returns models, parallels and batches with a leading axis for the workloads.

    Args:
        workloads: At least one; shorter batches are padded with requests of length 0.
        ordered: Whether to sort the requests of a batch by falling length.
    """
    most = max(len(each.batch.seq_lens) for each in workloads)

    def pad(batch: Batch) -> Batch:
        order = (
            np.argsort(-np.asarray(batch.seq_lens), kind="stable")
            if ordered
            else np.arange(len(batch.seq_lens))
        )
        return jax.tree.map(
            lambda part: np.pad(np.asarray(part)[order], (0, most - len(order))), batch
        )

    def stack(*parts):
        return jnp.stack([jnp.asarray(part) for part in parts])

    models = jax.tree.map(stack, *(each.model for each in workloads))
    parallels = jax.tree.map(stack, *(each.parallel for each in workloads))
    return models, parallels, jax.tree.map(stack, *(pad(each.batch) for each in workloads))


def deal(seq_lens: Int[Array, " r"], num_channels) -> Batch:
    """Returns a batch that deals requests to the channels in alternating direction.

    The requests of a channel go to the sub-batches 0 1 1 0 0 1 1 0 ..., and neighbouring channels
    begin with different sub-batches. For lengths distributed like those of chats, the fullest
    channel holds little more than the mean.

    Args:
        seq_lens: `(r,)` lengths in tokens, in falling order.
        num_channels: Number of channels; may be traced.
    """
    place = jnp.arange(seq_lens.shape[0])
    lap = floor_divide(place, num_channels)
    forth = place - lap * num_channels
    channel = jnp.where(lap % 2 == 0, forth, num_channels - 1 - forth)
    half = (floor_divide(lap + 1, 2) + channel) % 2
    return Batch(seq_lens, channel.astype(jnp.int32), half.astype(jnp.int32))
