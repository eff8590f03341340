"""What a design is worth: the usual function for `neupims.exploration.explore`, from columns of
knobs to metrics over workloads.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from neupims.costs.area import area
from neupims.exploration.space import SETTINGS
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.systems import PIM_SYSTEMS, Fidelity, System
from neupims.machine.workload import Batch, Decoder, Parallel
from neupims.timing.capacity import channel_tiles, request_tiles
from neupims.timing.iteration import Iteration, simulate

Schedule = Literal["dealt", "trace"]
SCHEDULES: tuple[Schedule, ...] = ("dealt", "trace")
BLOCK = 256  # designs side by side on a CPU: what they need fits its cache


class Workload(NamedTuple):
    """A model, how it is spread over devices, and a batch of requests."""

    name: str
    model: Decoder
    parallel: Parallel
    batch: Batch


def evaluation(
    workloads: Sequence[Workload],
    *,
    hardware: Hardware | None = None,
    system: System = "neupims",
    sub_batches: int = 2,
    fidelity: Fidelity = "simulator",
    schedule: Schedule = "dealt",
    most_channels: int = 64,
    block: int | None = None,
) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """A function from {knob: (n,)} to {metric: (n, workloads)}, with `flagged`. What is no knob is
    as in `hardware` and the workloads.

    `schedule` "dealt" deals the requests of a batch anew to the channels of each design (`deal`);
    "trace" keeps the channel and sub-batch of the batch. `block` designs are computed side by side:
    `BLOCK` on a CPU, all on a GPU, if not given. Metrics: tokens_per_second and iteration_seconds;
    energy_joules_per_token and area_mm2 of all devices of the model; and the utilisations.

    Raises:
        ValueError: there is no workload, or an unknown schedule.
    """
    if not workloads:
        raise ValueError("at least one workload is needed")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    base = Hardware() if hardware is None else hardware
    models, parallels, batches = _stacked(workloads, ordered=schedule == "dealt")

    def one(
        design: dict[str, Array], workload: tuple[Decoder, Parallel, Batch]
    ) -> dict[str, Array]:
        model, parallel, batch = workload
        machine = base
        for name, value in design.items():
            if name not in SETTINGS:
                machine = replace(machine, name, value)
        shares = (design.get(f"parallel.{name}", value) for name, value in vars(parallel).items())
        parallel = jax.tree.unflatten(jax.tree.structure(parallel), shares)
        if schedule == "dealt":
            batch = deal(batch.seq_lens, machine.hbm.num_channels)

        def run(halves: int) -> Iteration:
            return simulate(
                machine,
                model,
                batch,
                parallel,
                system=system,
                sub_batches=halves,
                fidelity=fidelity,
                most_channels=most_channels,
            )

        if "sub_batches" in design:
            found = jax.tree.map(
                lambda a, b: jnp.where(design["sub_batches"] < 2, a, b),
                *(_lean(run(halves)) for halves in (1, 2)),
            )
        else:
            found = _lean(run(sub_batches))
        wrong = found.pop("flagged") | ~possible(machine, model, batch, parallel)
        devices = 1.0 * parallel.tp * parallel.pp
        tokens = (batch.seq_lens > 0).sum()
        joules = found.pop("energy_joules")
        return found | {
            "energy_joules_per_token": joules * devices / tokens,
            "area_mm2": area(machine, pim=system in PIM_SYSTEMS).total * devices,
            "flagged": wrong,
        }

    def evaluate(columns: dict[str, Array]) -> dict[str, Array]:
        def of_design(design):
            return jax.lax.map(lambda workload: one(design, workload), (models, parallels, batches))

        return in_blocks(of_design, columns, block)

    return evaluate


def in_blocks(one: Callable[[Any], Any], columns: Any, block: int | None = None) -> Any:
    """`one` of every row, `block` rows side by side (see `evaluation`), or a little fewer, so that
    all blocks are of one size and compiled once.
    """
    rows = len(jax.tree.leaves(columns)[0])
    if block is None:
        block = BLOCK if jax.default_backend() == "cpu" else rows
    count = -(-rows // block)
    size = -(-rows // count)
    filled = jax.tree.map(
        lambda column: jnp.pad(column, (0, count * size - rows), mode="edge").reshape(count, size),
        columns,
    )
    found = jax.lax.map(jax.vmap(one), filled)
    return jax.tree.map(lambda part: part.reshape(count * size, *part.shape[2:])[:rows], found)


def _lean(iteration: Iteration) -> dict[str, Array]:
    """What is kept of an iteration; the rest is not computed."""
    names = (
        "tokens_per_second",
        "iteration_seconds",
        "energy_joules",
        "npu_utilization",
        "pim_utilization",
        "bandwidth_utilization",
        "flagged",
    )
    return {name: getattr(iteration, name) for name in names}


def deal(seq_lens: Int[Array, " r"], num_channels) -> Batch:
    """A batch of requests in falling order of length, dealt to the channels to and fro, and each
    channel's to the sub-batches 0 1 1 0 0 1 1 0 ...

    Neighbouring channels begin with different sub-batches. The number of channels may be traced;
    for lengths spread like those of chats the fullest channel holds little more than the mean.
    """
    place = (
        jnp.arange(seq_lens.shape[0]) + 0.5
    )  # between whole numbers, so that division cannot round across one
    lap = jnp.floor(place / num_channels)
    forth = place - 0.5 - lap * num_channels
    channel = jnp.where(lap % 2 == 0, forth, num_channels - 1 - forth)
    half = (jnp.floor((lap + 1) / 2) + channel) % 2
    return Batch(seq_lens, channel.astype(jnp.int32), half.astype(jnp.int32))


def possible(hardware: Hardware, model: Decoder, batch: Batch, parallel: Parallel) -> Array:
    """Whether the machine can exist and holds the model and the batch: rows as long as what is used
    of them, heads and layers that divide over the devices, a channel for each request, and memory
    for weights, keys and values.
    """
    tiles, room = (
        request_tiles(hardware, model, batch.seq_lens, parallel),
        channel_tiles(hardware, model, parallel),
    )
    there = batch.seq_lens > 0
    return (
        (jnp.asarray(hardware.pim.page_bytes) <= hardware.hbm.row_bytes)
        & (jnp.asarray(model.heads) % parallel.tp == 0)
        & (
            (jnp.asarray(model.kv_heads) % parallel.tp == 0)
            | (jnp.asarray(parallel.tp) % model.kv_heads == 0)
        )
        & (jnp.asarray(parallel.pp) <= model.layers)
        & (jnp.where(there, batch.channels, 0).max() < hardware.hbm.num_channels)
        & (tiles.max() <= room)
        & (tiles.sum() <= room * hardware.hbm.num_channels)
    )


def _stacked(workloads: Sequence[Workload], *, ordered: bool) -> tuple[Any, Any, Any]:
    """Models, parallels and batches with a leading axis; batches filled up with requests of length
    0, in falling order of length where `ordered`.
    """
    most = max(len(each.batch.seq_lens) for each in workloads)

    def filled(batch: Batch) -> Batch:
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
    return models, parallels, jax.tree.map(stack, *(filled(each.batch) for each in workloads))
