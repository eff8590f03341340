"""`explore`: the Pareto front of a space of designs, and what a result depends on."""

import argparse
import csv
import io
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from neupims.commands.common import (
    add_system_arguments,
    check_run,
    console,
    error_sentence,
    finite,
    print_json,
)
from neupims.commands.common import system as chosen_system
from neupims.files import write_text
from neupims.machine.case import select_model

METRICS = (
    "tokens_per_second",
    "iteration_seconds",
    "energy_joules_per_token",
    "area_mm2",
    "npu_utilization",
    "pim_utilization",
    "bandwidth_utilization",
)
OBJECTIVES = "tokens_per_second:max,energy_joules_per_token:min,area_mm2:min"
SHOWN = 20  # designs of the front on the terminal
MOST_ROWS = 500  # of them on a page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `explore`."""
    space = parser.add_argument_group("the space")
    space.add_argument(
        "--space",
        type=Path,
        metavar="FILE",
        help="TOML or JSON: a table knobs, and a list constraints",
    )
    space.add_argument(
        "--knob",
        action="append",
        default=[],
        metavar="NAME=...",
        help=(
            "LOW:HIGH, LOW:HIGH:log or a,b,c of a field of the hardware, of sub_batches,"
            " parallel.tp or parallel.pp; may repeat"
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
        help="names or files, with commas between them (default: gpt3-7b)",
    )
    what.add_argument(
        "--trace",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="CSV of seq_len,ch_idx; each model runs each trace",
    )
    what.add_argument(
        "--schedule",
        choices=("dealt", "trace"),
        default="dealt",
        help=(
            "deal the requests anew to the channels of each design, or keep the trace's channels"
            " (default: dealt)"
        ),
    )
    add_system_arguments(parser)
    how = parser.add_argument_group("the exploration")
    how.add_argument(
        "--method",
        choices=("grid", "random", "sobol", "evolution"),
        default="sobol",
        help="(default: sobol)",
    )
    how.add_argument(
        "--points",
        type=int,
        metavar="N",
        help="designs to evaluate (default: 4096, or all of the grid)",
    )
    how.add_argument(
        "--objectives",
        default=OBJECTIVES,
        metavar="NAME:max|min,...",
        help=f"of {', '.join(METRICS)} (default: {OBJECTIVES})",
    )
    how.add_argument(
        "--reference",
        default="",
        metavar="NAME=VALUE,...",
        help="where the hypervolume ends (default: four times worse than the base design)",
    )
    how.add_argument("--seed", type=int, default=0, metavar="N")
    how.add_argument(
        "--chunk",
        type=int,
        metavar="N",
        help="designs of a file, and of a generation (default: 16384, evolution 256)",
    )
    how.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write one page with the front and the sensitivities",
    )
    how.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of points, front.csv and summary.json; the same command goes on from there",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object and nothing else on standard output"
    )


def run(arguments: argparse.Namespace) -> int:
    """Explores and prints what was found."""
    import jax

    from neupims.exploration.explore import explore, parse_objectives
    from neupims.exploration.space import make_space, parse_knob, read_space

    with suppress(RuntimeError):  # JAX has begun: in another program
        jax.config.update(
            "jax_num_cpu_devices", os.cpu_count() or 1
        )  # each core takes its share of the designs
    check_run(arguments.html, seed=arguments.seed)
    knobs, constraints = read_space(arguments.space) if arguments.space else ({}, [])
    knobs |= dict(parse_knob(text) for text in arguments.knob)
    if not knobs:
        raise ValueError("give the space: --space FILE, or --knob NAME=LOW:HIGH")
    objectives = parse_objectives(arguments.objectives)
    workloads, system, sub_batches, hardware = _workloads(arguments)
    settings = {
        "sub_batches": sub_batches,
        "parallel.tp": workloads[0].parallel.tp,
        "parallel.pp": workloads[0].parallel.pp,
    }
    space = make_space(
        knobs,
        [*constraints, *arguments.constraint],
        hardware=hardware,
        settings=settings,
        metrics=METRICS,
    )
    evaluate, identity = _evaluation(arguments, space, workloads, system, sub_batches, hardware)
    began = time.perf_counter()
    with _progress() as report:
        found = explore(
            space,
            evaluate,
            objectives,
            method=arguments.method,
            points=arguments.points,
            seed=arguments.seed,
            chunk=arguments.chunk,
            folder=arguments.out,
            settings=identity,
            reference=_reference(arguments.reference),
            report=report,
        )
    summary = _summary(
        found,
        space,
        workloads,
        arguments,
        (system, sub_batches),
        hardware,
        time.perf_counter() - began,
    )
    if arguments.out:
        write_text(arguments.out / "front.csv", _table(found, space, workloads))
        write_text(
            arguments.out / "summary.json", json.dumps(finite(summary), indent=2, allow_nan=False)
        )
    if arguments.html:
        _write_page(arguments.html, found, summary)
    if arguments.json:
        print_json(summary)
    else:
        _print(summary, arguments.out)
    return 0


def _workloads(arguments: argparse.Namespace):
    """Every model with every trace, and the machine that they run on where no knob says
    otherwise.
    """
    from neupims.exploration.evaluation import Workload
    from neupims.machine.workload import read_trace

    system, sub_batches, hardware = chosen_system(arguments)
    workloads = []
    for name in arguments.models.split(","):
        title, decoder, parallel = select_model(name.strip())
        for path in arguments.trace:
            batch = read_trace(path, num_channels=int(hardware.hbm.num_channels))
            workloads.append(Workload(f"{Path(title).stem}/{path.stem}", decoder, parallel, batch))
    return workloads, system, sub_batches, hardware


def _evaluation(arguments, space, workloads, system: str, sub_batches: int, hardware):
    """The function that evaluates designs, and what it depends on."""
    from neupims.exploration.evaluation import evaluation

    if system != "neupims" and "sub_batches" in space.names:
        raise ValueError(f"the knob sub_batches needs --system neupims, not {system}")
    most = max(
        [
            int(hardware.hbm.num_channels),
            *(int(knob.most) for knob in space.knobs if knob.name == "hbm.num_channels"),
        ]
    )
    options: dict[str, Any] = {
        "system": system,
        "sub_batches": sub_batches,
        "fidelity": arguments.fidelity,
        "schedule": arguments.schedule,
    }
    evaluate = evaluation(workloads, hardware=hardware, most_channels=most, **options)
    parts = [
        {
            "name": each.name,
            "model": {name: int(value) for name, value in vars(each.model).items()},
            "parallel": {name: int(value) for name, value in vars(each.parallel).items()},
            "batch": [np.asarray(part).tolist() for part in vars(each.batch).values()],
        }
        for each in workloads
    ]
    return evaluate, options | {"workloads": parts}


def _reference(text: str) -> dict[str, float]:
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
    """A bar with the time left on standard error, where that is a terminal."""
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


def _summary(
    found, space, workloads, arguments, system: tuple[str, int], hardware, seconds: float
) -> dict[str, Any]:
    import jax

    from neupims.exploration.explore import overall
    from neupims.validation import expected_error

    def designs(points) -> list[dict[str, Any]]:
        metrics = {name: overall(each) for name, each in points.metrics.items()}
        listed = []
        for row in range(len(points.place)):
            knobs = {
                name: float(points.values[row, column]) for column, name in enumerate(space.names)
            }
            listed.append(
                {
                    "index": int(points.place[row]),
                    "knobs": knobs,
                    "metrics": {name: float(each[row]) for name, each in metrics.items()},
                }
            )
        return listed

    error = expected_error(
        *system, arguments.fidelity, row_buffers=int(hardware.pim.row_buffers), path="closed"
    )
    if {"sub_batches", "pim.row_buffers"} & set(space.names):
        error = None  # designs of several systems, each with its own
    order = np.argsort(
        overall(found.front.metrics[found.objectives[0].name])
        * (-1 if found.objectives[0].largest else 1),
        kind="stable",
    )
    return {
        "method": arguments.method,
        "seed": arguments.seed,
        "system": system[0],
        "sub_batches": system[1],
        "fidelity": arguments.fidelity,
        "workloads": [each.name for each in workloads],
        "objectives": [str(each) for each in found.objectives],
        "points": found.points,
        "kept": found.kept,
        "flagged": found.flagged,
        "front": designs(found.front.take(order)),
        "base": designs(found.base)[0],
        "reference": found.reference,
        "hypervolume": found.hypervolume,
        "sensitivity_of": found.sensitivity_of,
        "sensitivities": {name: each._asdict() for name, each in found.sensitivities.items()},
        "expected_error": error,
        "seconds": seconds,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def _table(found, space, workloads) -> str:
    """The front as CSV: the knobs, every metric over all workloads, and the throughput of each."""
    from neupims.exploration.explore import overall

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(found.front.metrics)
    writer.writerow(
        [
            "index",
            *space.names,
            *names,
            *(f"tokens_per_second of {each.name}" for each in workloads),
        ]
    )
    columns = [overall(found.front.metrics[name]) for name in names] + list(
        found.front.metrics["tokens_per_second"].T
    )
    for row, index in enumerate(found.front.place):
        writer.writerow(
            [
                int(index),
                *(f"{value:.9g}" for value in found.front.values[row]),
                *(f"{float(column[row]):.7g}" for column in columns),
            ]
        )
    return text.getvalue()


def _write_page(path: Path, found, summary: dict[str, Any]) -> None:
    """The first objective against each other one, the designs of the front, and what throughput
    depends on.
    """
    from neupims.exploration.explore import overall
    from neupims.exploration.pareto import in_plane
    from neupims.pages.report import write_report

    first, *others = found.objectives
    drawn = {
        name: np.concatenate([overall(part.metrics[name]) for part in (found.front, found.others)])
        for name in METRICS
    }
    sections: list[dict[str, Any]] = []
    for other in others:
        x, y = drawn[other.name], drawn[first.name]
        numbers = [*found.front.place.tolist(), *found.others.place.tolist()]
        best = in_plane(x, y, most_x=other.largest, most_y=first.largest)
        designs = zip(x.tolist(), y.tolist(), best.tolist(), map(str, numbers), strict=True)
        points = [dict(zip(("x", "y", "front", "name"), each, strict=True)) for each in designs]
        sections.append(
            {
                "kind": "pareto",
                "title": f"{first.name} against {other.name}",
                "text": (
                    "The front of these two. Of the other designs that keep the constraints some"
                    " are drawn."
                ),
                "points": points,
                "x_name": other.name,
                "y_name": first.name,
                "log_x": True,
                "log_y": True,
            }
        )
    base, knobs, metrics = (
        summary["base"],
        list(summary["base"]["knobs"]),
        list(summary["base"]["metrics"]),
    )
    rows = [
        [str(each["index"]), *each["knobs"].values(), *each["metrics"].values()]
        for each in summary["front"][:MOST_ROWS]
    ]
    rows.append(["base", *base["knobs"].values(), *base["metrics"].values()])
    listed = (
        f"Of {len(summary['front'])} designs, by {first.name}; geometric means over"
        f" {', '.join(summary['workloads'])}; last, the base design."
    )
    sections.append(
        {
            "kind": "table",
            "title": "Pareto front",
            "text": listed,
            "columns": ["design", *knobs, *metrics],
            "rows": rows,
        }
    )
    dependence = [
        [name, *(value for value in each.values())]
        for name, each in summary["sensitivities"].items()
    ]
    title, names = (
        f"Sensitivity of {summary['sensitivity_of']}",
        ["knob", "elasticity at the base", "rank correlation", "share of variance"],
    )
    sections.append({"kind": "table", "title": title, "columns": names, "rows": dependence})
    facts = {
        "designs": (
            f"{summary['points']:,} by {summary['method']}, {summary['kept']:,} keep the"
            f" constraints, {summary['flagged']:,} are impossible"
        ),
        "machine": f"{summary['system']}, {summary['fidelity']} fidelity",
        "workloads": ", ".join(summary["workloads"]),
    }
    if summary["hypervolume"] is not None:
        facts["hypervolume"] = f"{summary['hypervolume']:.6g}, in units of the base design"
    if error := summary["expected_error"]:
        facts["expected error of a layer near the base design"] = error_sentence(error)
    write_report(path, sections, title="Design space", facts=facts)


def _print(summary: dict[str, Any], folder: Path | None) -> None:
    from rich.table import Table

    lines = console()
    knobs, metrics = list(summary["base"]["knobs"]), list(summary["base"]["metrics"])
    front, workloads = summary["front"], summary["workloads"]
    table = Table(
        title=(
            f"Pareto front: {len(front)} of {summary['points']} designs, over"
            f" {', '.join(workloads)} (geometric means)"
        )
    )
    for name in (*knobs, *metrics):
        table.add_column(re.sub(r"[._]", "\n", name), justify="right")
    shown = (
        [front[place] for place in np.unique(np.linspace(0, len(front) - 1, SHOWN).astype(int))]
        if front
        else []
    )
    for design in (*shown, summary["base"]):
        if design is summary["base"]:
            table.add_section()
        table.add_row(
            *(f"{value:.4g}" for value in (*design["knobs"].values(), *design["metrics"].values()))
        )
    lines.print(table)
    lines.print(
        f"{len(shown)} of {len(front)} designs of the front shown, by"
        f" {summary['objectives'][0].partition(':')[0]}; last, the base design."
    )
    lines.print(
        f"{summary['kept']} designs keep the constraints, {summary['flagged']} are impossible."
    )
    if summary["hypervolume"] is not None:
        ends = ", ".join(f"{name} {value:.4g}" for name, value in summary["reference"].items())
        lines.print(
            f"hypervolume {summary['hypervolume']:.6g}, in units of the base design, up to {ends}"
        )
    table = Table(title=f"Sensitivity of {summary['sensitivity_of']}")
    for name in ("knob", "elasticity at the base", "rank correlation", "share of variance"):
        table.add_column(name, justify="left" if name == "knob" else "right")
    order = sorted(
        summary["sensitivities"].items(),
        key=lambda each: -abs(np.nan_to_num(each[1]["first_order"])),
    )
    for name, each in order:
        table.add_row(
            name, *(f"{value:+.3f}" if np.isfinite(value) else "-" for value in each.values())
        )
    lines.print(table)
    if error := summary["expected_error"]:
        lines.print(
            f"expected error of a layer's cycles near the base design: {error_sentence(error)}"
        )
    rate = summary["points"] / summary["seconds"]
    lines.print(
        f"{summary['seconds']:.1f} s, {rate:,.3g} designs a second with compilation, on"
        f" {summary['devices']}"
    )
    if folder:
        lines.print(f"{folder / 'front.csv'} and {folder / 'summary.json'} written")
