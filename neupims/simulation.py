"""Simulates a case and says how far the result can be trusted, as `neupims simulate` prints it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from neupims.costs.power import power_metrics
from neupims.envelope import ExpectedError, expected_error
from neupims.machine.case import Case
from neupims.machine.effects import idle_changes
from neupims.machine.systems import FIDELITY_ANSWERS, PIM_SYSTEMS, TimingPath
from neupims.machine.workload import check_batch
from neupims.timing.gemm import check_scratchpad
from neupims.timing.iteration import Iteration, simulate
from neupims.timing.memory_check import check_memory
from neupims.timing.prefill import first_token_seconds, prefill
from neupims.timing.stages import STAGES, operations, stages


@dataclass(frozen=True)
class Simulation:
    """A simulated case."""

    case: Case  # with the number of sub-batches that was used
    path: TimingPath  # "exact" or "closed"
    iteration: Iteration  # cycles, times and energy
    expected_error: ExpectedError  # of the layer, or why none is known
    first_token_seconds: float | None  # of a prefill, else None
    overflow: tuple[str, ...]  # what does not fit the memory, one sentence each

    @property
    def warnings(self) -> list[str]:
        """Sentences on memory that does not suffice, and on changes without effect."""
        case = self.case
        idle = idle_changes(case.hardware, case.system, case.fidelity, [case.model])
        return [*self.overflow, *idle]

    def to_dict(self) -> dict[str, Any]:
        """Returns the values of JSON, as `simulate --json` prints them.

        Cycles are core cycles; energy_joules and the iteration are of one device; power_watts,
        peak_power_watts, energy_joules_per_token and tokens_per_joule are of all devices of the
        model together, as in `explore`.
        """
        case, iteration = self.case, self.iteration
        cycles = dict(zip(STAGES, iteration.stage_cycles.tolist(), strict=True))
        listed = zip(
            operations(case.system, case.sub_batches),
            iteration.op_cycles.tolist(),
            iteration.op_starts.tolist(),
            strict=True,
        )
        energies = {
            part.name: float(getattr(iteration.energy, part.name))
            for part in dataclasses.fields(iteration.energy)
        }
        power = power_metrics(
            case.hardware,
            case.system,
            joules=iteration.energy_joules,
            seconds=iteration.iteration_seconds,
            tokens=iteration.tokens_per_second * iteration.iteration_seconds,
            devices=case.parallel.tp * case.parallel.pp,
        )
        result = {
            "phase": "prefill" if case.prefill else "decode",
            "system": case.system,
            "sub_batches": case.sub_batches,
            "row_buffers": int(case.hardware.pim.row_buffers),
            "model": case.model_name,
            "model_notes": list(case.model_notes),
            "trace_notes": list(case.trace_notes),
            "batch": int((case.batch.seq_lens > 0).sum()),
            "fidelity": case.fidelity,
            "stage_cycles": {
                stage.name: cycles.get(stage.name, cycles["A"])
                for stage in stages(case.system, case.sub_batches)
            },
            "ops": [
                {
                    "stage": each.stage,
                    "platform": each.platform,
                    "op": each.name,
                    "cycles": took,
                    "start_cycle": start,
                }
                for each, took, start in listed
            ],
            "layer_cycles": float(iteration.layer_cycles),
            "head_cycles": float(iteration.head_cycles),
            "iteration_cycles": float(iteration.iteration_cycles),
            "iteration_seconds": float(iteration.iteration_seconds),
            "tokens_per_second": float(iteration.tokens_per_second),
            "npu_utilization": float(iteration.npu_utilization),
            "pim_utilization": float(iteration.pim_utilization),
            "bandwidth_utilization": float(iteration.bandwidth_utilization),
            "energy_joules": float(iteration.energy_joules),
            # The power of a GPU's board is known, but not its parts.
            "energy_parts_joules": None if case.system == "gpu" else energies,
            **{name: float(value) for name, value in power.items()},
            "devices": int(case.parallel.tp * case.parallel.pp),
            "fidelity_answers": FIDELITY_ANSWERS[case.fidelity],
            **self.expected_error.to_dict(),
            "warnings": self.warnings,
        }
        if self.first_token_seconds is not None:
            result["first_token_seconds"] = self.first_token_seconds
        return result


def simulate_case(
    case: Case,
    *,
    path: TimingPath = "exact",
    prefill: bool = False,
    fastest: bool = False,
    allow_overflow: bool = False,
) -> Simulation:
    """Returns one decode step of a case, or its prefill, with the expected error.

    Args:
        case: The case (`make_case`).
        path: "exact" follows the list of commands of each channel, "closed" adds up closed forms.
        prefill: Whether to run the prompts (the lengths of the batch) instead of a decode step, on
            the NPU or the GPU of the system, as intended.
        fastest: Whether to try one and two sub-batches, where the system is "neupims", and return
            the faster; a number that the hardware cannot run is left out.
        allow_overflow: Whether to time what the memory of a device does not hold, with a warning.

    Returns:
        The simulated case; its `case` has the sub-batches that were used.

    Raises:
        ValueError: The hardware cannot run the batch, its memory does not hold weights,
            activations, keys and values, or the model has latent attention, which needs "intended"
            fidelity except on a GPU.
    """
    check_batch(case.batch, int(case.hardware.hbm.num_channels))
    warnings = check_memory(
        *(case.hardware, case.model, case.batch, case.parallel),
        system=case.system,
        fidelity=case.fidelity,
        prefill=prefill,
        allow_overflow=allow_overflow,
    )
    if prefill:
        return _run(_prefill_case(case), path, warnings)
    counts = (1, 2) if fastest and case.system == "neupims" else (case.sub_batches,)
    done, reasons = [], []
    for count in counts:
        try:
            done.append(_run(case._replace(sub_batches=count), path, warnings))
        except ValueError as reason:
            reasons.append(reason)
    if not done:
        raise reasons[0]
    return min(done, key=lambda run: float(run.iteration.iteration_seconds))


def _prefill_case(case: Case) -> Case:
    """Returns the same machine with its prompts still to be read; PIM does not compute."""
    system: Literal["gpu", "npu-only"] = "gpu" if case.system == "gpu" else "npu-only"
    return case._replace(system=system, sub_batches=1, fidelity="intended", prefill=True)


def _run(case: Case, path: TimingPath, warnings: tuple[str, ...]) -> Simulation:
    records = (case.hardware, case.model, case.batch, case.parallel)
    iteration = run_case(case, path=path)
    error = expected_error(case, path=path)
    first_token = first_token_seconds(*records, iteration) if case.prefill else None
    return Simulation(case, path, iteration, error, first_token, warnings)


def run_case(case: Case, *, path: TimingPath = "exact") -> Iteration:
    """Returns the iteration of a case.

    Args:
        case: The case; a prefill where `case.prefill` says so.
        path: "exact" or "closed"; a prefill has only one path.

    Raises:
        ValueError: The hardware cannot run the batch.
    """
    records = (case.hardware, case.model, case.batch, case.parallel)
    if case.system != "gpu":
        check_scratchpad(case.hardware)
    if case.prefill:
        iteration = prefill(*records, system="gpu" if case.system == "gpu" else "npu-only")
    else:
        iteration = simulate(
            *records,
            system=case.system,
            path=path,
            sub_batches=case.sub_batches,
            fidelity=case.fidelity,
        )
    if iteration.flagged:
        hbm = case.hardware.hbm
        pim = (
            "; PIM tiles, for one, must fit between the refreshes of ranks, "
            f"hbm.trefi_cycles / hbm.ranks = {hbm.trefi_cycles / hbm.ranks:g} memory cycles apart"
        )
        raise ValueError(
            "this hardware cannot run the batch: a time or an energy is not"
            f" finite{pim if case.system in PIM_SYSTEMS else ''}"
        )
    return iteration
