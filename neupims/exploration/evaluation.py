"""Metrics of designs over workloads: the evaluation that `neupims.exploration.explore` uses."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from neupims.costs.area import area, gpu_area
from neupims.costs.power import power_metrics
from neupims.exploration.space import SETTINGS
from neupims.exploration.workloads import Workload, deal, stack_workloads
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.systems import PIM_SYSTEMS, Fidelity, System
from neupims.machine.workload import Batch, Decoder, Parallel
from neupims.timing.capacity import channel_tiles, request_tiles
from neupims.timing.iteration import Iteration, simulate

Schedule = Literal["dealt", "trace"]
SCHEDULES: tuple[Schedule, ...] = ("dealt", "trace")
BLOCK = 256  # designs computed together on a CPU, so that their arrays fit its cache


def make_evaluate(
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
    """Returns a function from `{knob: (n,)}` to `{metric: (n, workloads)}`.

    The metrics are tokens_per_second, iteration_seconds, the utilisations and, of all devices of
    the model together, power_watts (the mean), peak_power_watts (all parts at full speed),
    energy_joules_per_token, tokens_per_joule, area_mm2 and tokens_per_second_per_mm2. `flagged`,
    `(n, workloads)`, is true where the design cannot exist or cannot run the workload.

    Args:
        workloads: Models and batches that each design runs.
        hardware: Values of all fields that are not knobs; `Hardware()` if not given.
        system: One of `neupims.machine.systems.SYSTEMS`.
        sub_batches: Halves of the batch that NPU and PIM interleave, unless a knob.
        fidelity: "simulator", as the public simulator is coded, or "intended", as in the paper.
        schedule: "dealt" assigns the requests to the channels of each design again (`deal`);
            "trace" keeps the channel and sub-batch of the batch.
        most_channels: Upper bound of `hbm.num_channels` over all designs.
        block: Designs computed together; if not given, `BLOCK` on a CPU and all on a GPU.

    Raises:
        ValueError: There is no workload, or the schedule is unknown.
    """
    if not workloads:
        raise ValueError("at least one workload is needed")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    base = Hardware() if hardware is None else hardware
    models, parallels, batches = stack_workloads(workloads, ordered=schedule == "dealt")

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
                *(_select_metrics(run(halves)) for halves in (1, 2)),
            )
        else:
            found = _select_metrics(run(sub_batches))
        wrong = found.pop("flagged") | ~is_possible(
            machine, model, batch, parallel, fidelity=fidelity
        )
        devices = 1.0 * parallel.tp * parallel.pp
        device_mm2 = (
            gpu_area(machine) if system == "gpu" else area(machine, pim=system in PIM_SYSTEMS).total
        )
        power = power_metrics(
            machine,
            system,
            joules=found.pop("energy_joules"),
            seconds=found["iteration_seconds"],
            tokens=(batch.seq_lens > 0).sum(),
            devices=devices,
        )
        mm2 = device_mm2 * devices
        per_mm2 = {"area_mm2": mm2, "tokens_per_second_per_mm2": found["tokens_per_second"] / mm2}
        return found | power | per_mm2 | {"flagged": wrong}

    def evaluate(columns: dict[str, Array]) -> dict[str, Array]:
        def of_design(design):
            return jax.lax.map(lambda workload: one(design, workload), (models, parallels, batches))

        return map_blocks(of_design, columns, block)

    return evaluate


def map_blocks(one: Callable[[Any], Any], columns: Any, block: int | None = None) -> Any:
    """Returns `one` of every row of a pytree, computed in blocks of equal size.

    Args:
        one: Function of one row, which is a pytree of scalars.
        columns: Pytree of arrays `(n,)`.
        block: Most rows computed together; if not given, `BLOCK` on a CPU and all on a GPU.

    Returns:
        Pytree of arrays `(n, ...)`.
    """
    rows = len(jax.tree.leaves(columns)[0])
    if not rows:
        shapes = jax.eval_shape(jax.vmap(one), columns)
        return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
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


def _select_metrics(iteration: Iteration) -> dict[str, Array]:
    """The values of an iteration that are kept; the compiler removes the rest."""
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


def is_possible(
    hardware: Hardware,
    model: Decoder,
    batch: Batch,
    parallel: Parallel,
    *,
    fidelity: Fidelity = "simulator",
) -> Array:
    """Returns whether the machine can exist and holds the model and the batch.

    Pages must fit in rows, heads and layers must divide over the devices, every request needs an
    existing channel, and the memory must hold weights, keys and values.

    Args:
        hardware: The machine; numbers may be traced.
        model: The model.
        batch: The requests; those of length 0 do not count.
        parallel: How the model is spread over devices.
        fidelity: The layout of keys and values, "simulator" or "intended".

    Returns:
        A boolean scalar.
    """
    tiles = request_tiles(hardware, model, batch.seq_lens, parallel, fidelity=fidelity)
    room = channel_tiles(hardware, model, parallel)
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
        & (tiles.sum() * parallel.kv_split <= room * hardware.hbm.num_channels)
    )
