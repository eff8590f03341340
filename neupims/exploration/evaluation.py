"""Metrics of designs over workloads: the evaluation that `neupims.exploration.explore` uses."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from neupims.costs.area import area, gpu_area
from neupims.costs.power import power_metrics
from neupims.exploration.evaluator import NOT_FINITE
from neupims.exploration.impossible import reason_code
from neupims.exploration.space import SETTINGS
from neupims.exploration.workloads import Workload, deal, stack_workloads
from neupims.machine.hardware import Hardware
from neupims.machine.layer_kinds import find_mix
from neupims.machine.record import replace
from neupims.machine.systems import PIM_SYSTEMS, Fidelity, System
from neupims.machine.workload import Batch, Decoder, Parallel
from neupims.timing.columns import in_blocks
from neupims.timing.iteration import Iteration, simulate

Schedule = Literal["dealt", "trace"]
SCHEDULES: tuple[Schedule, ...] = ("dealt", "trace")
# Designs computed together on a CPU, so that their arrays fit its cache; attention takes fewer at a
# time (`timing.stage_attention`).
BLOCK = 512


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
    `(n, workloads)`, is the code of the reason (`impossible.REASONS`) where the design cannot exist
    or cannot run the workload, else 0.

    Args:
        workloads: Models and batches that each design runs.
        hardware: Values of all fields that are not knobs; `Hardware()` if not given.
        system: One of `neupims.machine.systems.SYSTEMS`.
        sub_batches: Halves of the batch that NPU and PIM interleave, unless a knob.
        fidelity: "simulator", as the public simulator is coded, or "intended", as in the paper.
        schedule: "dealt" assigns the requests to the channels of each design again (`deal`);
            "trace" keeps the channel and sub-batch of the batch.
        most_channels: Upper bound of `hbm.num_channels` over all designs.
        block: Designs computed together, as in `map_blocks`; if not given, `BLOCK` on a CPU and
            all on a GPU.

    Raises:
        ValueError: There is no workload, or the schedule is unknown.
    """
    if not workloads:
        raise ValueError("at least one workload is needed")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    base = Hardware() if hardware is None else hardware
    models, parallels, batches = stack_workloads(workloads, ordered=schedule == "dealt")
    mix = find_mix(models)

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
                mix=mix,
            )

        if "sub_batches" in design:
            found = jax.tree.map(
                lambda a, b: jnp.where(design["sub_batches"] < 2, a, b),
                *(_select_metrics(run(halves)) for halves in (1, 2)),
            )
        else:
            found = _select_metrics(run(sub_batches))
        # The public simulator times traces whose requests overflow a channel.
        full_channels = schedule == "trace" and fidelity == "simulator"
        code = reason_code(
            *(machine, model, batch, parallel),
            system=system,
            fidelity=fidelity,
            full_channels=full_channels,
            most_channels=most_channels,
        )
        failed = found.pop("flagged") * NOT_FINITE
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
        return found | power | per_mm2 | {"flagged": jnp.where(code == 0, failed, code)}

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
        block: Most rows computed together, rounded up to a multiple of 16; if not given, `BLOCK`
            on a CPU and all on a GPU.

    Returns:
        Pytree of arrays `(n, ...)`.
    """
    rows = len(jax.tree.leaves(columns)[0])
    if not rows:
        shapes = jax.eval_shape(jax.vmap(one), columns)
        return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    if block is None:
        block = BLOCK if jax.default_backend() == "cpu" else rows
    return in_blocks(jax.vmap(one), columns, block)


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
