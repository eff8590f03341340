"""`validate`: the model's error against runs of the public simulator."""

import argparse
from pathlib import Path

from neupims.commands.common import add_json_argument, check_run, console, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `validate`.

    Args:
        parser: The parser of the command; changed in place.
    """
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="holds runs.csv, ops.csv and traces/"
    )
    parser.add_argument(
        "--path",
        choices=("exact", "closed"),
        default="exact",
        help="follow the commands of each channel, or add up closed forms (default: exact)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help=(
            "draw predicted against measured cycles as SVG (default: validation.svg, none with"
            " --json)"
        ),
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write a page with both charts and all errors",
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Validates, prints the errors, and returns the exit code 0.

    Args:
        arguments: Parsed flags of `add_arguments`.

    Raises:
        ValueError: A file of the runs is malformed, or the plot's name does not end in .svg.
        OSError: A file cannot be read or written.
    """
    from neupims.pages.plots import check_svg
    from neupims.validation import validate

    plot = arguments.plot or (None if arguments.json else Path("validation.svg"))
    if plot:
        check_svg(plot)
    check_run(plot, arguments.html)
    found = validate(
        arguments.folder,
        path=arguments.path,
        progress=iter if arguments.json else _show_progress,
    )
    result = found.to_dict()
    if plot:
        from neupims.pages.plots import draw_validation

        draw_validation(plot, result["rows"])
    if arguments.html:
        _write_page(arguments.html, result, arguments)
    if arguments.json:
        print_json(result)
        return 0
    _print_table(result)
    if plot:
        print(f"predicted against measured: {plot}")
    return 0


def _show_progress(runs):
    from rich.progress import track

    return track(runs, description="runs", transient=True)


def _write_page(path: Path, result, arguments: argparse.Namespace) -> None:
    from neupims.pages.report import write_report

    runs = {row["run_id"] for row in result["rows"]}
    sections = [
        {
            "kind": "validation",
            "title": "Predicted and measured cycles",
            "rows": result["rows"],
            "groups": result["groups"],
        }
    ]
    if result["not_covered"]:
        rows = [[each["run_id"], each["reason"]] for each in result["not_covered"]]
        sections.append(
            {"kind": "table", "title": "Not covered", "columns": ["run", "reason"], "rows": rows}
        )
    facts = {
        "runs": f"{len(runs)} of {arguments.folder}, {len(result['not_covered'])} not covered",
        "path": arguments.path,
    }
    write_report(path, sections, title="The model against the simulator", facts=facts)


def _print_table(result) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        title="Absolute error, % of the measured cycles", box=box.SIMPLE, title_justify="left"
    )
    for name in ("level", "system", "kind", "name"):
        table.add_column(name)
    for name in ("n", "mean", "median", "p95", "max"):
        table.add_column(name, justify="right")
    for group in result["groups"]:
        table.add_row(
            *(group[name] for name in ("level", "system", "kind", "name")),
            str(group["n"]),
            *(f"{group[name]:.2f}" for name in ("mean", "median", "p95", "max")),
        )
    lines = console()
    lines.print(table)
    for each in result["not_covered"]:
        lines.print(f"not covered: {each['run_id']}: {each['reason']}")
    lines.print(
        f"{len({row['run_id'] for row in result['rows']})} runs covered,"
        f" {len(result['not_covered'])} not"
    )
