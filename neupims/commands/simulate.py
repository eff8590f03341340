"""`simulate`: one decode step of a batch, or its prefill."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from neupims.commands.common import (
    AUTO,
    Case,
    add_workload_arguments,
    check_run,
    console,
    error_sentence,
    print_json,
    simulated,
    workload,
)
from neupims.machine.systems import PIM_SYSTEMS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_workload_arguments(parser)
    parser.add_argument(
        "--path",
        choices=("exact", "closed"),
        help="follow every channel's commands, or add up closed forms (default: exact)",
    )
    parser.add_argument(
        "--prefill",
        action="store_true",
        help=(
            "instead of a decode step the prompts (the trace's lengths) through the system's NPU,"
            " or --system gpu, as intended: time to first token"
        ),
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write one page with roofline, Gantt chart and channel loads",
    )
    parser.add_argument(
        "--perfetto",
        type=Path,
        metavar="FILE",
        help="also write the stages as a Chrome trace (ui.perfetto.dev)",
    )


def run(arguments: argparse.Namespace) -> int:
    from neupims.timing.capacity import check_capacity

    path = arguments.path or "exact"
    check_run(arguments.html, arguments.perfetto)
    cases = _cases(arguments)
    case = cases[0]
    if case.system in PIM_SYSTEMS:
        warning = check_capacity(case.hardware, case.model, case.batch, case.parallel)
        if warning:
            sys.stderr.write(f"neupims: warning: {warning}\n")
    cases = [_as_prefill(case)] if arguments.prefill else cases
    case, iteration = _fastest(cases, path)
    result = as_dictionary(case, iteration, path=path)
    if arguments.html or arguments.perfetto:
        from neupims.pages.step import Step, write_step

        step = Step(case.hardware, case.model, case.parallel, case.batch, iteration, result)
        write_step(step, page=arguments.html, trace=arguments.perfetto)
    if arguments.json:
        print_json(result)
    else:
        _print_tables(result)
    return 0


def _cases(arguments: argparse.Namespace) -> list[Case]:
    """What the flags stand for: one case, or with `--sub-batches auto` one for each number of
    sub-batches that the system has.
    """
    for flag in ("sub_batches", "path"):
        if arguments.prefill and getattr(arguments, flag) is not None:
            raise ValueError(
                f"--prefill runs on the NPU or the GPU alone: leave out --{flag.replace('_', '-')}"
            )
    if arguments.sub_batches != AUTO:
        return [workload(arguments)]
    counts = ("1", "2") if arguments.system.lower() == "neupims" else (None,)
    return [
        workload(argparse.Namespace(**vars(arguments) | {"sub_batches": count})) for count in counts
    ]


def _fastest(cases: list[Case], path: str):
    """The case with the least time, and its iteration; those that the hardware cannot run are left
    out, unless it can run none.
    """
    done, reasons = [], []
    for case in cases:
        try:
            done.append((case, simulated(case, path)))
        except ValueError as reason:
            reasons.append(reason)
    if not done:
        raise reasons[0]
    return min(done, key=lambda run: float(run[1].iteration_seconds))


def _as_prefill(case: Case) -> Case:
    """The same machine with its prompts still to be read: the memory only reads and writes."""
    return case._replace(
        system="gpu" if case.system == "gpu" else "npu-only",
        sub_batches=1,
        fidelity="intended",
        prefill=True,
    )


def as_dictionary(case: Case, iteration, *, path: str) -> dict[str, Any]:
    """What `--json` prints. Cycles are core cycles; energy and the iteration are of one device."""
    from neupims.timing.prefill import first_token_seconds
    from neupims.timing.schedule import operations, stages
    from neupims.validation import expected_error

    names = [stage.name for stage in stages(case.system, case.sub_batches)]
    listed = operations(case.system, case.sub_batches)
    cycles = dict(zip("ABCDEF", iteration.stage_cycles.tolist(), strict=True))
    result: dict[str, Any] = {
        "phase": "prefill" if case.prefill else "decode",
        "system": case.system,
        "sub_batches": case.sub_batches,
        "row_buffers": int(case.hardware.pim.row_buffers),
        "model": case.model_name,
        "batch": int((case.batch.seq_lens > 0).sum()),
        "fidelity": case.fidelity,
        "stage_cycles": {name: cycles["A" if name == "all" else name] for name in names},
        "ops": [
            {
                "stage": each.stage,
                "platform": each.platform,
                "op": each.name,
                "cycles": took,
                "start_cycle": start,
            }
            for each, took, start in zip(
                listed, iteration.op_cycles.tolist(), iteration.op_starts.tolist(), strict=True
            )
        ],
        "layer_cycles": float(iteration.layer_cycles),
        "iteration_cycles": float(iteration.iteration_cycles),
        "iteration_seconds": float(iteration.iteration_seconds),
        "tokens_per_second": float(iteration.tokens_per_second),
        "npu_utilization": float(iteration.npu_utilization),
        "pim_utilization": float(iteration.pim_utilization),
        "bandwidth_utilization": float(iteration.bandwidth_utilization),
        "energy_joules": float(iteration.energy_joules),
        "energy_parts_joules": (
            None  # of a GPU the board's power is known, not its parts
            if case.system == "gpu"
            else {
                part.name: float(getattr(iteration.energy, part.name))
                for part in dataclasses.fields(iteration.energy)
            }
        ),
        "expected_error": expected_error(
            case.system,
            case.sub_batches,
            case.fidelity,
            row_buffers=int(case.hardware.pim.row_buffers),
            path=path,
        ),
    }
    if case.prefill:
        result["first_token_seconds"] = first_token_seconds(
            case.hardware, case.model, case.batch, case.parallel, iteration
        )
    return result


def _print_tables(result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    lines = console()
    title = (
        f"{result['system']}, {result['model']}, {result['phase']} of {result['batch']} requests,"
        f" {result['fidelity']} fidelity"
    )
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for name, justify in (
        ("stage", "left"),
        ("unit", "left"),
        ("operation", "left"),
        ("start", "right"),
        ("cycles", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    last = ""
    for each in result["ops"]:
        stage = "" if each["stage"] == last else each["stage"]
        last = each["stage"]
        table.add_row(
            stage,
            each["platform"],
            each["op"],
            f"{each['start_cycle']:,.0f}",
            f"{each['cycles']:,.0f}",
        )
    lines.print(table)
    summary = Table(box=box.SIMPLE, show_header=False)
    summary.add_column()
    summary.add_column(justify="right")
    for stage, cycles in result["stage_cycles"].items():
        summary.add_row(f"stage {stage}", f"{cycles:,.0f} cycles")
    summary.add_row("layer", f"{result['layer_cycles']:,.0f} cycles")
    summary.add_row("iteration", f"{result['iteration_seconds'] * 1e3:.3f} ms")
    if result["phase"] == "prefill":
        summary.add_row("time to the first token", f"{result['first_token_seconds'] * 1e3:.3f} ms")
    summary.add_row("throughput", f"{result['tokens_per_second']:,.0f} tokens/s")
    for name, key in (
        ("NPU busy", "npu_utilization"),
        ("PIM busy", "pim_utilization"),
        ("memory bus", "bandwidth_utilization"),
    ):
        summary.add_row(name, f"{result[key]:.1%}")
    summary.add_row("energy of a device", f"{result['energy_joules']:.3g} J")
    if error := result["expected_error"]:
        summary.add_row("expected error of the layer", error_sentence(error))
    lines.print(summary)
