"""`search`: better schedules of one batch, and a bound on the best possible one."""

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
from neupims.envelope import describe_gain_error
from neupims.exploration.space import SETTINGS, make_space, parse_knob
from neupims.machine.case import Case
from neupims.machine.systems import SYSTEMS
from neupims.scheduling.decision import HardwareKnob
from neupims.scheduling.schedule_search import search_schedule

DEFAULT_BUDGET = 20000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `search`.

    Args:
        parser: The parser of the command; changed in place.
    """
    add_workload_arguments(parser)
    add_overflow_argument(parser)
    parser.add_argument(
        "--strategy",
        default="evolution",
        help="evolution, random, annealing, evosax or all (default: evolution)",
    )
    parser.add_argument(
        "--budget",
        type=int,
        default=DEFAULT_BUDGET,
        metavar="N",
        help=f"schedules that each strategy evaluates for each seed (default: {DEFAULT_BUDGET})",
    )
    parser.add_argument(
        "--population",
        type=int,
        default=64,
        metavar="N",
        help="schedules of one round (default: 64)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=4,
        metavar="N",
        help="independent searches of each strategy (default: 4)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the random numbers of all searches together (default: 0)",
    )
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="start from random schedules, not from the baselines",
    )
    parser.add_argument(
        "--realisable",
        action="store_true",
        help="only schedules that the public simulator can execute: traces that its rule halves",
    )
    parser.add_argument(
        "--export-trace",
        type=Path,
        metavar="FILE",
        help="write the best schedule as a trace of the simulator (needs --realisable)",
    )
    parser.add_argument(
        "--new-only",
        type=int,
        metavar="N",
        help="only the last N requests of the trace may choose their channel; the others stay",
    )
    parser.add_argument(
        "--order-levels",
        type=int,
        default=1,
        metavar="N",
        help="priorities that order a channel's list (default: 1, order by request)",
    )
    parser.add_argument(
        "--hardware-knob",
        action="append",
        default=[],
        metavar="NAME=LOW:HIGH",
        help="search this field of the hardware too; may repeat",
    )
    parser.add_argument(
        "--measure", default="time", help="time, energy or energy-delay of a layer (default: time)"
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="score the published and the best schedule by the exact path too",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write a page with curves and channel loads",
    )


def run(arguments: argparse.Namespace) -> int:
    """Searches, prints the result, and returns the exit code 0.

    Args:
        arguments: Parsed flags of `add_arguments`.

    Raises:
        ValueError: A flag is impossible, or flags contradict each other.
        OSError: A file cannot be read or written.
    """
    case = read_case(arguments)
    _check(arguments, case)
    is_fixed = arguments.sub_batches is not None or arguments.system.lower() not in SYSTEMS
    result = search_schedule(
        case,
        strategy=arguments.strategy,
        budget=arguments.budget,
        population=arguments.population,
        seeds=arguments.seeds,
        seed=arguments.seed,
        from_scratch=arguments.from_scratch,
        realisable=arguments.realisable,
        sub_batches=(case.sub_batches,) if is_fixed else (1, 2),
        new_only=arguments.new_only,
        order_levels=arguments.order_levels,
        hardware_knobs=parse_hardware_knobs(arguments.hardware_knob, case),
        measure=arguments.measure,
        exact=arguments.exact,
        export=arguments.export_trace,
        allow_overflow=arguments.allow_overflow,
    ).to_dict()
    print_warnings(result["warnings"])
    if arguments.html:
        _write_page(arguments.html, result)
    if arguments.json:
        print_json(result)
    else:
        _print_tables(result)
    return 0


def _check(arguments: argparse.Namespace, case: Case) -> None:
    """Raises for flags that exclude each other or are out of range."""
    if arguments.sub_batches == AUTO:
        raise ValueError("--sub-batches auto is for simulate: say 1 or 2")
    if arguments.export_trace and not arguments.realisable:
        raise ValueError(
            "--export-trace needs --realisable: other schedules have no trace that the simulator"
            " would halve so"
        )
    if arguments.export_trace and arguments.hardware_knob:
        raise ValueError(
            "--export-trace writes a schedule for the given hardware, so it excludes"
            " --hardware-knob"
        )
    if arguments.exact and arguments.hardware_knob:
        raise ValueError(
            "--exact scores schedules on the given hardware, so it excludes --hardware-knob"
        )
    reads = (arguments.trace, arguments.model, arguments.hardware)
    check_run(arguments.html, arguments.export_trace, seed=arguments.seed, reads=reads)
    for name in ("budget", "population", "seeds", "order_levels"):
        if getattr(arguments, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least 1, not {getattr(arguments, name)}"
            )
    requests = len(case.batch.seq_lens)
    if arguments.new_only is not None and not 0 <= arguments.new_only <= requests:
        raise ValueError(
            f"--new-only must be from 0 to the {requests} requests of the trace, not"
            f" {arguments.new_only}"
        )


def parse_hardware_knobs(texts: list[str], case: Case) -> list[HardwareKnob]:
    """Returns the knobs of --hardware-knob NAME=LOW:HIGH.

    Args:
        texts: Values of --hardware-knob, each NAME=LOW:HIGH.
        case: The case; its hardware has the fields.

    Raises:
        ValueError: A text is not a range of a field of the hardware.
    """
    if not texts:
        return []
    knobs = make_space(dict(map(parse_knob, texts)), hardware=case.hardware).knobs
    for each in knobs:
        if each.values or each.log or each.name in SETTINGS:
            raise ValueError(
                f"--hardware-knob needs a field of the hardware as NAME=LOW:HIGH; {each.name}"
                " is searched otherwise or by `explore`"
            )
    return [HardwareKnob(each.name, each.low, each.high, each.whole) for each in knobs]


def _print_tables(result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    lines = console()
    unit = {"time": "layer cycles", "energy": "J", "energy-delay": "J x cycles"}[result["measure"]]
    kind = "realisable schedules" if result["realisable"] else "schedules"
    table = Table(
        title=(
            f"{kind} of {result['batch']} requests, {result['model']}, {result['fidelity']}"
            " fidelity"
        ),
        box=box.SIMPLE,
        title_justify="left",
    )
    for name in ("schedule", unit, "mean of seeds", "gain", "above bound", "evaluations"):
        table.add_column(name, justify="left" if name == "schedule" else "right")
    for name, row in (result["baselines"] | result["strategies"]).items():
        mean = _format(row["mean_cost"]) if "mean_cost" in row else ""
        above = "" if row["gap_to_bound"] is None else f"{row['gap_to_bound']:.2%}"
        table.add_row(
            name,
            _format(row["cost"]),
            mean,
            f"{row['gain']:.2%}",
            above,
            f"{row['evaluations']:,}" if "evaluations" in row else "",
        )
    if result["lower_bound"]:
        table.add_row(
            "lower bound",
            _format(result["lower_bound"]),
            "",
            f"{1 - result['lower_bound'] / result['published']:.2%}",
            "",
            "",
        )
    lines.print(table)
    best = result["best"]
    halves = "two sub-batches" if best["sub_batches"] == 2 else "one batch"
    lines.print(
        f"best: {best['found_by']}, {halves}, gain over the trace as published {best['gain']:.2%}"
    )
    if best["gain_error"]:
        lines.print(describe_gain_error(best["gain_error"]))
    for knob, number in best["knobs"].items():
        lines.print(f"  {knob} = {number:g}")
    if result["exact"]:
        exact = result["exact"]
        lines.print(
            f"layer cycles by the exact path: {exact['published']:,.0f} as published,"
            f" {exact['best']:,.0f} at best"
        )
        lines.print(f"gain by the exact path: {exact['gain']:.2%}")
    for when, loads in result["channel_cycles"].items():
        longest = " and ".join(f"{max(load):,.0f}" for load in loads)
        average = sum(map(sum, loads)) / len(loads[0]) / 2
        lines.print(
            f"attention on the fullest channel {when}: {longest} cycles of the sub-batches; mean"
            f" {average:,.0f}"
        )
    print_error(lines, result, "best schedule: ")
    if result["trace"]:
        lines.print(f"trace written to {result['trace']}")


def _format(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value != value else f"{value:.4g}"


def _write_page(path: Path, result: dict[str, Any]) -> None:
    """Best-so-far curves with their intervals, and the channels before and after."""
    from neupims.pages.report import write_report

    curves = [
        {
            "name": name,
            "x": row["curve"]["evaluations"],
            "y": row["curve"]["best"],
            "low": row["curve"]["low"],
            "high": row["curve"]["high"],
        }
        for name, row in result["strategies"].items()
    ]
    lines = [{"name": "as published", "value": result["published"]}]
    if result["lower_bound"]:
        lines.append({"name": "lower bound", "value": result["lower_bound"]})
    sections: list[dict[str, Any]] = [
        {
            "kind": "curves",
            "title": "Best so far",
            "text": "Mean over seeds with its 95 % interval.",
            "series": curves,
            "x_name": "schedules evaluated",
            "y_name": "layer cycles" if result["measure"] == "time" else result["measure"],
            "lines": lines,
        }
    ]
    for when, title in (("before", "Channels as published"), ("after", "Channels after search")):
        loads = [
            {"name": f"sub-batch {index + 1}", "cycles": load}
            for index, load in enumerate(result["channel_cycles"][when])
        ]
        sections.append(
            {
                "kind": "channels",
                "title": title,
                "text": "Attention on each channel.",
                "loads": loads,
            }
        )
    best = result["best"]
    facts = {
        "model": result["model"],
        "batch": f"{result['batch']} requests",
        "best": (
            f"{_format(best['cost'])}, by {best['found_by']}, {best['sub_batches']} sub-batches"
        ),
        "gain": f"{best['gain']:.2%} over the trace as published",
    }
    write_report(path, sections, title="Schedule search", facts=facts)
