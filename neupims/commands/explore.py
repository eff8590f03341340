"""`explore`: the Pareto front of a space of designs, or several systems and machines compared."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from neupims.commands.common import (
    TRACE,
    add_experts_and_head_arguments,
    add_json_argument,
    add_spread_arguments,
    add_system_arguments,
    add_trace_arguments,
    check_run,
    console,
    given_spread,
    print_error,
    print_json,
    print_notes,
    print_warnings,
    read_trace_argument,
    split_names,
)
from neupims.commands.common import system as chosen_system
from neupims.commands.comparison import compare_and_print
from neupims.machine.config import read_model
from neupims.machine.systems import FIDELITY_ANSWERS
from neupims.pages.svg import short
from neupims.processors import count_processors

SHOWN = 20  # designs of the front on the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `explore`.

    Args:
        parser: The parser of the command; changed in place.
    """
    space = parser.add_argument_group("the space")
    space.add_argument(
        "--space",
        type=Path,
        metavar="FILE",
        help="TOML or JSON file with a table knobs and a list constraints",
    )
    space.add_argument(
        "--knob",
        action="append",
        default=[],
        metavar="NAME=...",
        help=(
            "LOW:HIGH, LOW:HIGH:log or a,b,c for a field of the hardware, sub_batches,"
            " parallel.tp, parallel.pp or parallel.kv_split; can be repeated"
        ),
    )
    space.add_argument(
        "--constraint",
        action="append",
        default=[],
        metavar="EXPR",
        help="such as 'npu.num_arrays*npu.array_width <= 2048' or 'area_mm2 < 20000'",
    )
    what = parser.add_argument_group("what is run")
    what.add_argument(
        "--models",
        default="gpt3-7b",
        metavar="A,B",
        help="names or files, separated by commas (default: gpt3-7b)",
    )
    add_spread_arguments(what)
    add_experts_and_head_arguments(what)
    what.add_argument(
        "--trace",
        nargs="+",
        required=True,
        metavar="FILE|DISTRIBUTION",
        help=f"{TRACE}; each model runs each trace",
    )
    add_trace_arguments(parser)
    what.add_argument(
        "--schedule",
        choices=("dealt", "trace"),
        default="dealt",
        help=(
            "dealt: assign the requests to the channels of each design, whatever the trace says;"
            " trace: keep the channels of the trace (default: dealt)"
        ),
    )
    add_system_arguments(parser)
    serving = parser.add_argument_group("what is served, for the objective goodput@LIMITS:max")
    serving.add_argument(
        "--serve",
        metavar="FILE|DISTRIBUTION",
        help=(
            "requests with input and output tokens, such as sharegpt:200; the goodput is the"
            " highest rate at which all limits hold"
        ),
    )
    serving.add_argument(
        "--serve-batch",
        type=int,
        metavar="N",
        help="most requests that are served at once (default: 256)",
    )
    serving.add_argument(
        "--serve-requests",
        type=int,
        metavar="N",
        help="serve the first N requests (default: all)",
    )
    how = parser.add_argument_group("the exploration")
    how.add_argument(
        "--method",
        choices=("grid", "random", "sobol", "evolution", "map-elites"),
        help=(
            "map-elites keeps the best design by the first objective in each cell of area and power"
            " (default: sobol)"
        ),
    )
    how.add_argument(
        "--points",
        type=int,
        metavar="N",
        help="designs to evaluate (default: 4096, 256 with a goodput, or all of the grid)",
    )
    how.add_argument(
        "--objectives",
        metavar="NAME:max|min,...",
        help=(
            "metrics, and goodput@LIMITS such as goodput@ttft_p99<2s,tpot_p99<100ms (default:"
            " tokens_per_second:max,energy_joules_per_token:min,area_mm2:min)"
        ),
    )
    how.add_argument(
        "--reference",
        default="",
        metavar="NAME=VALUE,...",
        help="where the hypervolume ends (default: four times worse than the base design)",
    )
    how.add_argument(
        "--axes",
        metavar="NAME[=LOW:HIGH][:linear],...",
        help="the two metrics of map-elites (default: area_mm2,power_watts)",
    )
    how.add_argument(
        "--cells", metavar="NxM", help="cells of both axes of map-elites (default: 16x16)"
    )
    how.add_argument(
        "--index-rows",
        type=int,
        metavar="N",
        help=(
            "rows of designs for Sobol indices, each with two more designs than knobs; 0 for none"
            " (default: 1024, 0 with a goodput)"
        ),
    )
    how.add_argument("--seed", type=int, default=0, metavar="N")
    how.add_argument(
        "--chunk",
        type=int,
        metavar="N",
        help="designs in a file, or in a generation (default: 16384, and 256 of a generation)",
    )
    how.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write a page with the front and the sensitivities",
    )
    how.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=(
            "folder of points, front.csv, map.csv of map-elites, and summary.json; the same command"
            " resumes from it"
        ),
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Explores, prints the result, and returns the exit code 0.

    Args:
        arguments: Parsed flags of `add_arguments`.

    Raises:
        ValueError: There is nothing to explore, or a flag is impossible or contradicts another.
        OSError: A file cannot be read or written.
        ImportError: The extra `neupims` is not installed.
    """
    import jax

    from neupims.exploration.elites import AXES, CELLS, parse_axes
    from neupims.exploration.explore import OBJECTIVES, explore
    from neupims.exploration.space import parse_knob, read_space

    with suppress(RuntimeError):  # JAX has started already: in another program
        jax.config.update("jax_num_cpu_devices", count_processors())  # each takes a share
    check_run(arguments.html, seed=arguments.seed, reads=_other_files(arguments))
    knobs, constraints = read_space(arguments.space) if arguments.space else ({}, [])
    knobs |= dict(parse_knob(text) for text in arguments.knob)
    models = split_names(arguments.models)
    for name in models:
        print_notes(name, read_model(name).notes)
    traces = [read_trace_argument(text, arguments) for text in arguments.trace]
    for each in traces:
        print_notes(each.name, each.notes)
    if max(len(split_names(each)) for each in (arguments.system, arguments.hardware)) > 1:
        return compare_and_print(arguments, models, traces, is_space=bool(knobs))
    if not knobs:
        raise ValueError(
            "give the space: --space FILE, or --knob NAME=LOW:HIGH; or give several systems or"
            " machines to compare: --system A,B --hardware C,D"
        )
    system, sub_batches, hardware = chosen_system(arguments)
    axes = None
    if arguments.axes is not None or arguments.cells is not None:
        axes = parse_axes(
            AXES if arguments.axes is None else arguments.axes,
            CELLS if arguments.cells is None else arguments.cells,
        )
    with _progress() as report:
        found = explore(
            hardware,
            models,
            traces,
            knobs,
            constraints=[*constraints, *arguments.constraint],
            objectives=OBJECTIVES if arguments.objectives is None else arguments.objectives,
            method=arguments.method or "sobol",
            points=arguments.points,
            seed=arguments.seed,
            system=system,
            sub_batches=sub_batches,
            fidelity=arguments.fidelity,
            schedule=arguments.schedule,
            parallel=given_spread(arguments),
            lm_head=arguments.lm_head,
            reference=_reference(arguments.reference),
            axes=axes,
            index_rows=arguments.index_rows,
            serve=_served(arguments),
            chunk=arguments.chunk,
            folder=arguments.out,
            report=report,
        )
    print_warnings(found.warnings)
    if arguments.html:
        from neupims.pages.exploration import write_exploration

        write_exploration(arguments.html, found)
    if arguments.json:
        print_json(found.to_dict())
    else:
        _print(found, arguments.out)
    return 0


def _other_files(arguments: argparse.Namespace) -> list[str | Path]:
    """What is read, and what is written to the folder of the run, which a page must not replace."""
    from neupims.exploration.chunks import OWN_FILES

    files = [*arguments.trace, *split_names(arguments.models), *split_names(arguments.hardware)]
    files += filter(None, (arguments.serve, arguments.space))
    return [*files, *(arguments.out / name for name in (OWN_FILES if arguments.out else ()))]


def _served(arguments: argparse.Namespace) -> Any:
    """The requests that are served, a `ServedTrace`; None without --serve."""
    from neupims.exploration.goodput import ServedTrace, read_served

    flags = {"--serve-batch": arguments.serve_batch, "--serve-requests": arguments.serve_requests}
    given = [flag for flag, value in flags.items() if value is not None]
    if arguments.serve is None:
        if given:
            raise ValueError(f"{given[0]} needs --serve")
        return None
    batch = ServedTrace.batch if arguments.serve_batch is None else arguments.serve_batch
    trace = ServedTrace(arguments.serve, batch, arguments.serve_requests)
    requests = read_served(trace, arguments.seed)
    print_notes(requests.name, requests.notes)
    return ServedTrace(requests, batch)


def _reference(text: str) -> dict[str, float]:
    """The values of `--reference` by name."""
    ends = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            ends[name.strip()] = float(value)
            if not np.isfinite(ends[name.strip()]):
                raise ValueError
        except ValueError:
            raise ValueError(f"--reference is NAME=VALUE,..., not {text!r}") from None
    return ends


@contextmanager
def _progress() -> Iterator[Any]:
    """A progress bar on standard error, if that is a terminal."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        raise ImportError("explore needs rich: pip install 'ggem-jax[neupims]'") from None
    errors = Console(stderr=True)
    columns = (
        TextColumn("designs"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as bar:
        task = bar.add_task("designs", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(found, folder: Path | None) -> None:
    """The tables and sentences on the terminal."""
    lines = console()
    shown = _print_front(lines, found)
    lines.print(
        f"{shown} of {len(found.front)} designs of the front shown, sorted by"
        f" {found.objectives[0].name}; the last row is the base design."
    )
    if twins := sum(design.twins for design in found.front):
        lines.print(
            f"{twins} further designs equal one of the front: they differ only in knobs that do not"
            " act there."
        )
    if found.elite_map is not None and found.elite_map.elites:
        _print_map(lines, found)
    elif found.elite_map is not None:
        lines.print("The map has no design, because none meets the constraints.")
    lines.print(f"{found.kept} designs meet the constraints, {found.flagged} are impossible.")
    for reason, count in found.flagged_by_reason.items():
        lines.print(f"  {count}: {reason}")
    ends = ", ".join(f"{name} {value:.4g}" for name, value in found.reference.items())
    lines.print(f"hypervolume {found.hypervolume:.6g}, in units of the base design, up to {ends}")
    _print_sensitivities(lines, found)
    if found.indices is not None:
        _print_indices(lines, found)
    for each in found.ablations:
        _print_ablation(lines, each)
    answers = {"fidelity": found.fidelity, "fidelity_answers": FIDELITY_ANSWERS[found.fidelity]}
    print_error(lines, answers | found.expected_error.to_dict(), "base design: ")
    if found.front_validated is not None:
        lines.print(
            f"{found.front_validated} of {len(found.front)} designs of the front have knobs inside"
            " the envelope of the validated runs"
        )
    rate = found.points / found.seconds
    lines.print(
        f"{found.seconds:.1f} s, {rate:,.3g} designs per second including compilation, on"
        f" {found.devices}"
    )
    if folder:
        names = ["front.csv", *(["map.csv"] if found.elite_map else []), "summary.json"]
        lines.print(f"{', '.join(str(folder / name) for name in names)} written")


def _print_front(lines, found) -> int:
    """A table of at most `SHOWN` designs of the front and the base; returns how many."""
    from rich.table import Table

    title = (
        f"Pareto front: {len(found.front)} of {found.points} designs, over"
        f" {', '.join(found.workloads)} (geometric means)"
    )
    table = Table(title=title)
    for name in (*found.base.knobs, *found.base.metrics):
        table.add_column(re.sub(r"[._]", "\n", name), justify="right")
    last = len(found.front) - 1
    places = sorted(set(np.linspace(0, last, SHOWN).astype(int))) if found.front else []
    for design in (*(found.front[place] for place in places), found.base):
        if design is found.base:
            table.add_section()
        values = (*design.knobs.values(), *design.metrics.values())
        table.add_row(*(f"{value:.4g}" for value in values))
    lines.print(table)
    return len(places)


def _print_map(lines, found) -> None:
    """The best value in each cell, the greatest area (or other first axis) last."""
    from rich.table import Table

    shown, best = found.elite_map, found.objectives[0].name
    x, y = shown.axes
    table = Table(title=f"best {best} by {x} (rows) and {y} (columns), cells from")
    values = {each.cell: short(each.design.metrics[best]) for each in shown.elites}
    rows, columns = (sorted({cell[axis] for cell in values}) for axis in (0, 1))
    for name in (x, *(short(shown.edges[1][j]) for j in columns)):
        table.add_column(name, justify="right")
    for i in rows:
        table.add_row(short(shown.edges[0][i]), *(values.get((i, j), "") for j in columns))
    lines.print(table)
    lines.print(
        f"{len(shown.elites)} of {shown.size} cells have a design; rows and columns without one"
        " are left out, and the outermost cells are open."
    )


def _print_sensitivities(lines, found) -> None:
    """A table of the knobs, the one that explains most first."""
    from rich.table import Table

    table = Table(title=f"Sensitivity of {found.sensitivity_of}")
    for name in ("knob", "elasticity at the base", "rank correlation", "share of variance"):
        table.add_column(name, justify="left" if name == "knob" else "right")
    order = sorted(
        found.sensitivities.items(), key=lambda each: -abs(np.nan_to_num(each[1].first_order))
    )
    for name, each in order:
        table.add_row(name, *(f"{value:+.3f}" if np.isfinite(value) else "-" for value in each))
    lines.print(table)


def _print_indices(lines, found) -> None:
    """The Sobol indices of the objectives, a section for each."""
    from rich.table import Table

    from neupims.exploration.sobol import COLUMNS

    table = Table(title="Sobol indices")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
    last = None
    for metric, *cells in found.indices.table(each.name for each in found.objectives):
        if metric != last and last is not None:
            table.add_section()
        table.add_row("" if metric == last else metric, *cells)
        last = metric
    lines.print(table)
    lines.print(found.indices.about)


def _print_ablation(lines, ablation) -> None:
    """What one knob changes in the best design of an objective, at most `SHOWN` changes."""
    from rich.table import Table

    best = f"design {ablation.best.index}, the best by {ablation.objective}"
    table = Table(title=f"Why is this design best? One knob changed in {best}")
    for place, title in enumerate(ablation.titles):
        middle = 3 <= place < len(ablation.titles) - 1
        table.add_column(title, justify="right" if middle else "left")
    for row in ablation.table()[:SHOWN]:
        table.add_row(*row)
    lines.print(table)
    if (left_out := len(ablation.changes) - SHOWN) > 0:
        lines.print(f"{left_out} further changes are in --json and --html.")
