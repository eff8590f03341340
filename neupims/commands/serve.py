"""`serve`: requests that arrive, wait, and are served in continuous batches."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from neupims.commands.common import (
    add_head_argument,
    add_json_argument,
    add_machine_arguments,
    add_row_buffers_argument,
    add_spread_model_arguments,
    check_run,
    console,
    parse_change,
    print_json,
    print_notes,
    print_warnings,
)
from neupims.machine.systems import FIDELITIES

ORDERS = ("fcfs", "shortest-first", "deadline")
PLACEMENTS = ("greedy", "least-work", "round-robin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `serve`.

    Args:
        parser: The parser of the command; changed in place.
    """
    add_spread_model_arguments(parser)
    add_machine_arguments(parser)
    add_row_buffers_argument(parser)
    parser.add_argument(
        "--fidelity",
        choices=FIDELITIES,
        default="simulator",
        help="of decode steps; prompts are always computed as intended (default: simulator)",
    )
    parser.add_argument(
        "--interleaving",
        choices=("on", "off", "chosen"),
        default="on",
        help=(
            "two sub-batches (neupims): always, never, or in each iteration what takes less time"
            " (default: on)"
        ),
    )
    add_head_argument(parser)
    parser.add_argument(
        "--trace",
        required=True,
        metavar="FILE|DISTRIBUTION",
        help=(
            "requests with input and output tokens, and arrivals (arrival_s, arrival_ms, Azure's"
            " TIMESTAMP or Mooncake's timestamp); or sharegpt:1000, alpaca:1000 with --rate"
        ),
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="requests a second: stretches the arrivals of the trace, or draws them",
    )
    parser.add_argument(
        "--arrivals",
        metavar="PROCESS",
        help="draw arrivals: poisson, or gamma:CV with a coefficient of variation (burstier)",
    )
    parser.add_argument(
        "--requests", type=int, metavar="N", help="serve the first N requests (default: all)"
    )
    parser.add_argument(
        "--columns",
        metavar="ROLE=NAME,...",
        help="columns with unknown names: arrival=NAME,input=NAME,output=NAME",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of random numbers (default: 0)"
    )
    parser.add_argument(
        "--batch", type=int, default=256, metavar="N", help="most requests at once (default: 256)"
    )
    parser.add_argument(
        "--order", choices=ORDERS, default="fcfs", help="who is admitted next (default: fcfs)"
    )
    parser.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default="greedy",
        help=(
            "the channel of a new request: the least loaded by the published estimate, by the"
            " model's cycles, or in turn (default: greedy)"
        ),
    )
    parser.add_argument(
        "--prefill",
        choices=("whole", "chunked", "separate"),
        default="whole",
        help=(
            "prompts run in iterations of their own, for which decoding waits, or in chunks beside"
            " decoding, or on devices of their own (default: whole)"
        ),
    )
    parser.add_argument(
        "--prefill-tokens",
        type=int,
        default=8192,
        metavar="N",
        help="most tokens of a prefill with several prompts (default: 8192)",
    )
    parser.add_argument(
        "--chunk-tokens",
        type=int,
        metavar="N",
        help="most tokens of an iteration, with --prefill chunked (default: 512)",
    )
    parser.add_argument(
        "--prefill-groups",
        type=int,
        default=1,
        metavar="N",
        help="groups of devices for prompts, with --prefill separate (default: 1)",
    )
    parser.add_argument(
        "--slo", metavar="LIMITS", help="objectives of each request, such as ttft<2s,tpot<100ms"
    )
    parser.add_argument(
        "--rate-sweep",
        metavar="RATES",
        help=(
            "serve at several rates at once, R,R,... or LOW:HIGH:N, and find the highest rate that"
            " meets the objectives, by bisection"
        ),
    )
    parser.add_argument(
        "--share",
        type=float,
        metavar="X",
        help="share of the requests that must meet them, with --rate-sweep (default: 0.99)",
    )
    parser.add_argument(
        "--leave-out-too-long",
        action="store_true",
        help="leave out requests that no channel can hold, instead of refusing the trace",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write a page: batch, queue and memory over time, distributions; or load curves",
    )
    parser.add_argument(
        "--perfetto",
        type=Path,
        metavar="FILE",
        help="also write the first iterations as a Chrome trace (ui.perfetto.dev)",
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serves a trace, prints the result, and returns the exit code 0.

    Args:
        arguments: Parsed flags of `add_arguments`.

    Raises:
        ValueError: A flag is impossible, the trace is, or a request is longer than the memory.
        OSError: A file cannot be read.
    """
    from neupims.pages.serving import write_serving, write_serving_trace, write_sweep
    from neupims.serving.rates import parse_rates, sweep_rates
    from neupims.serving.serve import serve

    reads = (arguments.trace, arguments.model, arguments.hardware)
    check_run(arguments.html, arguments.perfetto, seed=arguments.seed, reads=reads)
    chunk_tokens = _belongs(arguments, "chunk_tokens", "prefill", "chunked", 512)
    share = _belongs(arguments, "share", "rate_sweep", arguments.rate_sweep or "RATES", 0.99)
    options: dict[str, Any] = {
        "arrivals": arguments.arrivals,
        "first": arguments.requests,
        "columns": _parse_columns(arguments.columns),
        "seed": arguments.seed,
        "system": arguments.system,
        "hardware": arguments.hardware,
        "row_buffers": {"single": 1, "dual": 2}.get(arguments.row_buffers),
        "changes": dict(map(parse_change, arguments.set)),
        "tp": arguments.tp,
        "pp": arguments.pp,
        "kv_split": arguments.kv_split,
        "lm_head": arguments.lm_head,
        "fidelity": arguments.fidelity,
        "interleaving": arguments.interleaving,
        "batch": arguments.batch,
        "order": arguments.order,
        "placement": arguments.placement,
        "prefill": arguments.prefill,
        "prefill_tokens": arguments.prefill_tokens,
        "chunk_tokens": chunk_tokens,
        "slo": () if arguments.slo is None else arguments.slo,
        "leave_out_too_long": arguments.leave_out_too_long,
    }
    if arguments.rate_sweep is not None:
        given = (arguments.rate, arguments.perfetto, arguments.prefill_groups)
        if given != (None, None, 1):
            raise ValueError(
                "--rate-sweep has rates of its own, keeps no iterations, and computes prompts on"
                " the devices that decode: leave out --rate, --perfetto and --prefill-groups"
            )
        rates = parse_rates(arguments.rate_sweep)
        swept = sweep_rates(arguments.model, arguments.trace, rates, share=share, **options)
        first = swept.servings[0]
        print_notes(first.about["model"], first.about["model_notes"])
        print_notes(first.arrivals.name, [*first.arrivals.notes, *first.notes])
        print_warnings(first.about["warnings"])
        if arguments.html:
            write_sweep(arguments.html, swept)
        if arguments.json:
            print_json(swept.to_dict())
        else:
            _print_rates(swept.to_dict())
        return 0
    found = serve(
        arguments.model,
        arguments.trace,
        rate=arguments.rate,
        prefill_groups=arguments.prefill_groups,
        progress=_show_progress(),
        **options,
    )
    if arguments.html:
        write_serving(arguments.html, found)
    if arguments.perfetto:
        write_serving_trace(arguments.perfetto, found)
    result = found.to_dict()
    print_notes(result["model"], result["model_notes"])
    print_notes(found.arrivals.name, [*result["trace_notes"], *result["notes"]])
    print_warnings(result["warnings"])
    if arguments.json:
        print_json(result)
    else:
        _print_tables(result)
    return 0


def _belongs(arguments: argparse.Namespace, name: str, to: str, value: str, default: float) -> Any:
    """Returns the value of a flag, which is refused without the flag that it belongs to."""
    given = getattr(arguments, name)
    if given is None:
        return default
    if getattr(arguments, to) != value:
        flag, other = (f"--{each.replace('_', '-')}" for each in (name, to))
        raise ValueError(f"{flag} belongs to {other} {value}: leave it out, or give both")
    return given


def _parse_columns(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(role.strip() and name.strip() for role, _, name in pairs):
        raise ValueError(f"--columns is ROLE=NAME,..., not {text!r}")
    return {role.strip(): name.strip() for role, _, name in pairs}


def _show_progress():
    """Returns a function that shows the progress on a terminal; None where there is none."""
    if not (sys.stderr and sys.stderr.isatty()):
        return None
    began = time.perf_counter()

    def show(left: int, total: int, seconds: float, iterations: int) -> None:
        elapsed = time.perf_counter() - began
        rest = f", {elapsed * (total - left) / left:.0f} s to go" if left else ""
        line = f"{left:,} of {total:,} requests, {seconds:,.0f} s simulated{rest}"
        sys.stderr.write(f"\r{line:<78}" if left < total else f"\r{'':<78}\r")
        sys.stderr.flush()

    return show


def _print_rates(result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    lines, first = console(), result["runs"][0]
    table = Table(
        title=(
            f"{first['model']} on {first['system']}, {first['devices']} devices:"
            f" {first['requests']:,} requests of {first['trace']}, {first['fidelity']} fidelity"
        ),
        box=box.SIMPLE,
        title_justify="left",
    )
    for name in (
        *("requests a second", "tokens a second", "TTFT p50, ms", "p99", "TPOT p50, ms", "p99"),
        *("meet", "goodput"),
    ):
        table.add_column(name, justify="right")
    for rate, each in zip(result["rates"], result["runs"], strict=True):
        times = [each[key][name] for key in ("ttft", "tpot") for name in ("p50", "p99")]
        good = ["-", "-"]
        if result["objectives"]:
            goodput = each["goodput_requests_per_second"]
            good = [f"{each['meets_objectives']:.2%}", f"{goodput:,.3f}"]
        table.add_row(
            f"{rate:,.3f}",
            f"{each['tokens_per_second']:,.0f}",
            *("-" if time is None else f"{time * 1e3:,.1f}" for time in times),
            *good,
        )
    lines.print(table)
    if result["objectives"]:
        limits, highest = ", ".join(result["objectives"]), result["highest_rate"]
        said = "none of these rates" if highest is None else f"up to {highest:,.3f} a second"
        lines.print(f"{result['share']:.1%} of the requests meet {limits}: {said}")
        if result["lowest_rate_that_fails"] is None:
            lines.print("all of these rates meet the objectives: try higher ones")
    knee = result["knee_rate"]
    said = "at all of these rates" if knee is None else f"up to {knee:,.3f} a second"
    lines.print(f"the mean latency is at most twice that of the lowest rate: {said}")


def _show(number: float | None) -> str:
    return "-" if number is None else f"{number:,.1f}"


def _print_tables(result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    lines = console()
    interleaving = result["interleaving"]
    about = f", interleaving {interleaving}" if interleaving else ""
    table = Table(
        title=(
            f"{result['model']} on {result['system']}{about}, {result['devices']} devices:"
            f" {result['requests']:,} requests of {result['trace']} in {result['seconds']:,.1f} s,"
            f" {result['fidelity']} fidelity"
        ),
        box=box.SIMPLE,
        title_justify="left",
    )
    table.add_column("of a request, ms")
    for name in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    for name, key in (
        ("queueing", "queueing"),
        ("time to first token", "ttft"),
        ("time per output token", "tpot"),
        ("latency", "latency"),
    ):
        values = result[key].values()
        table.add_row(name, *("-" if each is None else f"{each * 1e3:,.1f}" for each in values))
    lines.print(table)
    summary = Table(box=box.SIMPLE, show_header=False)
    summary.add_column()
    summary.add_column(justify="right")
    saturated = result["saturated_tokens_per_second"]
    rows = [
        ("throughput", f"{result['tokens_per_second']:,.1f} tokens/s"),
        ("throughput while requests wait", f"{_show(saturated)} tokens/s"),
        ("requests", f"{result['requests_per_second']:,.3f} a second"),
        ("mean batch of a decode step", _show(result["mean_batch"])),
        ("iterations", f"{result['iterations']:,} ({result['decode_iterations']:,} decode steps)"),
        ("busy, of it prefill", f"{result['busy_share']:.1%}, {result['prefill_share']:.1%}"),
        ("NPU busy", f"{result['npu_utilization']:.1%}"),
        ("PIM busy", f"{result['pim_utilization']:.1%}"),
        ("memory bus", f"{result['bandwidth_utilization']:.1%}"),
        (
            "keys and values, mean and most",
            f"{result['kv_occupancy_mean']:.1%}, {result['kv_occupancy_max']:.1%}",
        ),
        ("requests that were paused", f"{result['paused_requests']:,}"),
        ("energy of a token", f"{result['energy_joules_per_token'] * 1e3:,.4g} mJ"),
    ]
    if result["objectives"]:
        limits = ", ".join(result["objectives"])
        goodput = result["goodput_requests_per_second"]
        rows.append((f"meet {limits}", f"{result['meets_objectives']:.2%}"))
        rows.append(("goodput", f"{goodput:,.3f} requests a second"))
    for row in rows:
        summary.add_row(*row)
    lines.print(summary)
    lines.print(f"{result['fidelity']} fidelity: {result['fidelity_answers']}")
