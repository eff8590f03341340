"""`simulate`: one decode step of a batch, or its prefill."""

import argparse
from pathlib import Path
from typing import Any

from neupims.commands.common import (
    AUTO,
    add_overflow_argument,
    add_workload_arguments,
    check_run,
    console,
    print_error,
    print_json,
    print_warnings,
    read_case,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `simulate`.

    Args:
        parser: The parser of the command; changed in place.
    """
    add_workload_arguments(parser)
    add_overflow_argument(parser)
    parser.add_argument(
        "--path",
        choices=("exact", "closed"),
        help="follow the commands of each channel, or add up closed forms (default: exact)",
    )
    parser.add_argument(
        "--prefill",
        action="store_true",
        help=(
            "run the prompts (the trace's lengths) on the system's NPU, or with --system gpu,"
            " instead of a decode step; gives the time to the first token"
        ),
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write a page with roofline, Gantt chart and channel loads",
    )
    parser.add_argument(
        "--perfetto",
        type=Path,
        metavar="FILE",
        help="also write the stages as a Chrome trace (ui.perfetto.dev)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Simulates, prints the result, and returns the exit code 0.

    Args:
        arguments: Parsed flags of `add_arguments`.

    Raises:
        ValueError: A flag is impossible, flags contradict each other, or the hardware cannot run
            the batch.
        OSError: A file cannot be read or written.
    """
    from neupims.simulation import simulate_case

    for flag in ("sub_batches", "path"):
        if arguments.prefill and getattr(arguments, flag) is not None:
            raise ValueError(
                f"--prefill runs on the NPU or the GPU alone: leave out --{flag.replace('_', '-')}"
            )
    reads = (arguments.trace, arguments.model, arguments.hardware)
    check_run(arguments.html, arguments.perfetto, reads=reads)
    case, auto = read_case(arguments), arguments.sub_batches == AUTO
    if auto and case.system == "neupims" != arguments.system.lower():
        raise ValueError(
            f"the system {arguments.system} means sub-batches {case.sub_batches}, not auto, which"
            " is for --system neupims"
        )
    found = simulate_case(
        case,
        path=arguments.path or "exact",
        prefill=arguments.prefill,
        fastest=auto,
        allow_overflow=arguments.allow_overflow,
    )
    print_warnings(found.warnings)
    result = found.to_dict()
    if arguments.html or arguments.perfetto:
        from neupims.pages.step import write_step

        write_step(found, page=arguments.html, trace=arguments.perfetto)
    if arguments.json:
        print_json(result)
    else:
        _print_tables(result)
    return 0


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
    if result["head_cycles"]:
        summary.add_row("LM head", f"{result['head_cycles']:,.0f} cycles")
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
    summary.add_row("energy of a token", f"{result['energy_joules_per_token'] * 1e3:.4g} mJ")
    summary.add_row("tokens of a joule", f"{result['tokens_per_joule']:.4g}")
    devices = result["devices"]
    together = f"{devices} devices" if devices > 1 else "the device"
    summary.add_row(f"power of {together}", f"{result['power_watts']:.4g} W")
    summary.add_row("all parts at full speed", f"{result['peak_power_watts']:.4g} W")
    lines.print(summary)
    print_error(lines, result)
