"""Results as one self-contained HTML page, which has no scripts and loads no other files.

The page follows light and dark and fits narrow windows. It is a list of sections, each a mapping
with `kind`, `title`, optionally `text`, and the keys of its kind:

    text        nothing more
    table       columns, rows
    roofline    points (name, roof, flops, bytes, seconds),
                roofs (name, flops_per_second, bytes_per_second)
    gantt       ops (stage, platform, op, cycles, start_cycle), stage_cycles
    bars        shares (name, share)
    channels    loads (name, cycles: one number for each channel)
    curves      series (name, x, y, low, high), x_name, y_name, log_x, lines (name, value)
    pareto      points (x, y, front, name), x_name, y_name, log_x, log_y
    heat        cells (x, y, value, name), x_edges, y_edges, x_name, y_name, z_name, log_x, log_y,
                largest
    validation  rows and groups as `validate --json` prints them

Below each chart is the table of its numbers, folded. `templates/page.html` is the page.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from neupims.files import write_text
from neupims.pages import heat_plot, plots, step_plots

MOST_DOTS = 4000  # dominated designs in one chart: more cover each other and make the page heavy

ENDS = ("from", "to")  # of a cell


class Content(NamedTuple):
    """The content of a section below its text: charts, a note, and a table."""

    charts: tuple[str, ...] = ()  # SVG
    columns: Sequence[str] = ()  # names of the table's columns; empty for no table
    rows: Sequence[Sequence[Any]] = ()  # cells of the table
    folded: bool = False  # whether the table is folded, with the note below it
    note: str = ""  # a sentence about the charts or the table

    @property
    def words(self) -> list[bool]:
        """Which columns hold words, which are aligned to the left."""
        return [
            all(isinstance(row[column], str) for row in self.rows)
            for column in range(len(self.columns))
        ]


def write_report(
    path: str | Path,
    sections: Sequence[Mapping[str, Any]],
    *,
    title: str,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes a page; the file appears when it is complete.

    Args:
        path: The HTML file.
        sections: Mappings, each with the keys that its kind needs; see the module's description.
        title: Heading of the page.
        facts: Names and values at the head of the page.

    Raises:
        ValueError: The kind of a section is unknown, or a section lacks a key that its kind needs.
        OSError: The page cannot be written.
        ImportError: Jinja is not installed.
    """
    write_text(path, page(sections, title=title, facts=facts or {}))


def page(sections: Sequence[Mapping[str, Any]], *, title: str, facts: Mapping[str, Any]) -> str:
    """Returns the page of `write_report` as text.

    Args:
        sections: As in `write_report`.
        title: As in `write_report`.
        facts: As in `write_report`.

    Raises:
        ValueError: As in `write_report`.
        ImportError: Jinja is not installed.
    """
    filled = [
        {
            "title": str(each["title"]),
            "text": str(each.get("text") or ""),
            "content": fill_section(each),
        }
        for each in sections
    ]
    template = _environment().get_template("page.html")
    return template.render(sections=filled, title=title, facts=facts)


@cache
def _environment():
    """The templates; values are escaped unless a template marks them as safe."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise ImportError("HTML pages need Jinja: pip install 'ggem-jax[neupims]'") from None
    environment = Environment(
        loader=PackageLoader("neupims.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = format_cell
    return environment


def fill_section(section: Mapping[str, Any]) -> Content:
    """Returns the charts, the note and the table of a section.

    Args:
        section: Mapping with `kind` and the keys that this kind needs.

    Raises:
        ValueError: The kind is unknown, or the section lacks a key that its kind needs.
    """
    kind = section.get("kind")
    if kind not in KINDS:
        raise ValueError(f"a section's kind must be one of {', '.join(KINDS)}, not {kind!r}")
    try:
        return KINDS[kind](section)
    except KeyError as missing:
        raise ValueError(
            f"the section {section.get('title', kind)!r} of kind {kind} needs {missing}"
        ) from None


def _figure(chart: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Content:
    return Content((chart,), columns, rows, folded=True)


def _text(section: Mapping[str, Any]) -> Content:
    return Content()


def _table(section: Mapping[str, Any]) -> Content:
    return Content((), section["columns"], section["rows"])


def _roofline(section: Mapping[str, Any]) -> Content:
    rows = [
        (
            point["name"],
            point["roof"],
            point["flops"],
            point["bytes"],
            _ratio(point["flops"], point["bytes"]),
            _ratio(point["flops"], point["seconds"]),
        )
        for point in section["points"]
    ]
    chart = step_plots.roofline(section["points"], section["roofs"])
    return _figure(chart, ("operation", "on", "FLOP", "bytes", "FLOP/B", "FLOP/s"), rows)


def _gantt(section: Mapping[str, Any]) -> Content:
    rows = [
        (each["stage"], each["platform"], each["op"], each["start_cycle"], each["cycles"])
        for each in section["ops"]
    ]
    chart = step_plots.gantt(section["ops"], section["stage_cycles"])
    return _figure(chart, ("stage", "unit", "operation", "start", "core cycles"), rows)


def _bars(section: Mapping[str, Any]) -> Content:
    rows = [(each["name"], 100 * each["share"]) for each in section["shares"]]
    return _figure(step_plots.bars(section["shares"]), ("unit", "share, %"), rows)


def _channels(section: Mapping[str, Any]) -> Content:
    loads = section["loads"]
    channels = max((len(each["cycles"]) for each in loads), default=0)
    rows = [
        (
            channel,
            *(each["cycles"][channel] if channel < len(each["cycles"]) else "" for each in loads),
        )
        for channel in range(channels)
    ]
    columns = ("channel", *(str(each["name"]) for each in loads))
    return _figure(step_plots.channel_loads(loads), columns, rows)


def _curves(section: Mapping[str, Any]) -> Content:
    names = {"x_name": section["x_name"], "y_name": section["y_name"]}
    chart = plots.curves(
        section["series"], **names, log_x=bool(section.get("log_x")), lines=section.get("lines", ())
    )
    last = [
        (
            str(each["name"]),
            each["x"][-1],
            *(each[key][-1] if each.get(key) is not None else "" for key in ("y", "low", "high")),
        )
        for each in section["series"]
    ]
    columns = ("curve", f"last {names['x_name']}", names["y_name"], "low", "high")
    return _figure(chart, columns, last)


def _pareto(section: Mapping[str, Any]) -> Content:
    points = section["points"]
    dominated = [point for point in points if not point["front"]]
    stride = max(1, math.ceil(len(dominated) / MOST_DOTS))
    front = [point for point in points if point["front"]]
    x_name, y_name = section["x_name"], section["y_name"]
    chart = plots.pareto(
        [*dominated[::stride], *front],
        x_name=x_name,
        y_name=y_name,
        log_x=bool(section.get("log_x")),
        log_y=bool(section.get("log_y")),
    )
    rows = [
        (str(point.get("name", "")), point["x"], point["y"])
        for point in sorted(front, key=lambda point: point["x"])
    ]
    found = _figure(chart, ("design", x_name, y_name), rows)
    if stride == 1:
        return found
    return found._replace(
        note=f"One in {stride} of the {len(dominated)} dominated designs is drawn."
    )


def _heat(section: Mapping[str, Any]) -> Content:
    cells, x, y = section["cells"], section["x_edges"], section["y_edges"]
    names = {key: section[key] for key in ("x_name", "y_name", "z_name")}
    chart = heat_plot.heat_map(
        cells,
        x_edges=x,
        y_edges=y,
        **names,
        log_x=bool(section.get("log_x")),
        log_y=bool(section.get("log_y")),
        largest=bool(section.get("largest", True)),
    )
    columns = ("design", *(f"{names[key]} {end}" for key in ("x_name", "y_name") for end in ENDS))
    rows = [
        (
            str(cell.get("name", "")),
            *(edges[cell[key] + end] for key, edges in (("x", x), ("y", y)) for end in (0, 1)),
            cell["value"],
        )
        for cell in cells
    ]
    return _figure(chart, (*columns, names["z_name"]), rows)


def _validation(section: Mapping[str, Any]) -> Content:
    columns = ("level", "system", "kind", "name", "n", "mean", "median", "p95", "max")
    return Content(
        (plots.validation(section["rows"]), plots.errors(section["rows"])),
        columns,
        [[group[column] for column in columns] for group in section["groups"]],
        note="Absolute error, % of the measured cycles.",
    )


KINDS: dict[Any, Callable[[Mapping[str, Any]], Content]] = {
    "text": _text,
    "table": _table,
    "roofline": _roofline,
    "gantt": _gantt,
    "bars": _bars,
    "channels": _channels,
    "curves": _curves,
    "pareto": _pareto,
    "heat": _heat,
    "validation": _validation,
}


def _ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom else math.nan


def format_cell(value: Any) -> str:
    """Returns a value as a table shows it: four digits, or whole thousands with commas.

    Args:
        value: A number, a text, a bool, or None, which is an empty cell.
    """
    if isinstance(value, bool | str) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1e4 and abs(value) < 1e12 else f"{value:.4g}"
