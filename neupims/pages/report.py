"""Results as one HTML page that holds everything it shows: nothing is loaded, nothing runs, light
and dark, wide and narrow.

A page is a list of sections, each a plain dictionary with `kind`, `title`, where wanted `text`, and
what its kind needs:

    text        nothing more
    table       columns, rows
    roofline    points (name, roof, flops, bytes, seconds), roofs (name, flops_per_second, bytes_per_second)
    gantt       ops (stage, platform, op, cycles, start_cycle), stage_cycles
    bars        shares (name, share)
    channels    loads (name, cycles: one number a channel)
    curves      series (name, x, y, low, high), x_name, y_name, log_x, lines (name, value)
    pareto      points (x, y, front, name), x_name, y_name, log_x, log_y
    validation  rows and groups as `validate --json` prints them

Below each chart stands the table of its numbers, folded.
"""

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neupims.files import write_text
from neupims.pages import plots

MOST_DOTS = 4000  # dominated designs in one chart: more cover each other and make the page heavy
STYLE = (
    """
:root { color-scheme: light dark; --soft: #8881; --rule: #8884 }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 0 .4rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem }
dt { opacity: .7 } dd { margin: 0; overflow-wrap: anywhere }
figure { margin: .6rem 0; padding: .6rem; background: var(--soft); border-radius: 10px; overflow-x: auto }
figure svg { display: block; width: 100%; min-width: 36rem; height: auto }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap }
th:first-child, td:first-child { text-align: left } td.words, th.words { text-align: left }
details { margin: .3rem 0 } summary { cursor: pointer; font-size: .9rem; opacity: .8 }
nav { font-size: .9rem } nav a { margin-right: .9rem; white-space: nowrap }
@media print { details { display: none } figure { break-inside: avoid } }
"""
    + plots.STYLE
)


def write_report(
    path: str | Path,
    sections: Sequence[Mapping[str, Any]],
    *,
    title: str,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes the page; it appears when it is complete. `facts` stand at its head.

    Raises:
        ValueError: a section's kind is none of those there are, or lacks what it needs.
        OSError: the page cannot be written.
    """
    write_text(path, page(sections, title=title, facts=facts or {}))


def page(sections: Sequence[Mapping[str, Any]], *, title: str, facts: Mapping[str, Any]) -> str:
    """The page as text."""
    parts = [_section(i, each) for i, each in enumerate(sections)]
    links = "".join(
        f'<a href="#s{i}">{html.escape(str(each["title"]))}</a> ' for i, each in enumerate(sections)
    )
    listed = "".join(
        f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(_cell(fact))}</dd>"
        for name, fact in facts.items()
    )
    head = (
        f'<meta charset="utf-8"><title>{html.escape(title)}</title><meta name="viewport"'
        ' content="width=device-width, initial-scale=1">'
    )
    body = f"<h1>{html.escape(title)}</h1>\n<dl>{listed}</dl>\n<nav>{links}</nav>\n{''.join(parts)}"
    return (
        "<!DOCTYPE html>\n<html"
        f' lang="en">\n<head>{head}<style>{STYLE}</style></head>\n<body>\n{body}</body>\n</html>\n'
    )


def _section(index: int, section: Mapping[str, Any]) -> str:
    kind = section.get("kind")
    if kind not in KINDS:
        raise ValueError(f"a section's kind must be one of {', '.join(KINDS)}, not {kind!r}")
    try:
        content = KINDS[kind](section)
    except KeyError as missing:
        raise ValueError(
            f"the section {section.get('title', kind)!r} of kind {kind} needs {missing}"
        ) from None
    text = f"<p>{html.escape(str(section['text']))}</p>" if section.get("text") else ""
    return (
        "<section"
        f' id="s{index}">\n<h2>{html.escape(str(section["title"]))}</h2>\n{text}{content}\n</section>\n'
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; numbers to the right, words to the left."""
    listed = [list(row) for row in rows]
    words = [all(isinstance(row[i], str) for row in listed) for i in range(len(columns))]
    style = ["" if not word else ' class="words"' for word in words]
    head = "".join(
        f"<th{style[i]}>{html.escape(str(column))}</th>" for i, column in enumerate(columns)
    )
    body = "".join(
        f"<tr>{''.join(f'<td{style[i]}>{html.escape(_cell(cell))}</td>' for i, cell in enumerate(row))}</tr>"
        for row in listed
    )
    return (
        "<div"
        f' class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _figure(chart: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return f"<figure>{chart}</figure>\n<details><summary>Numbers</summary>{table(columns, rows)}</details>"


def _text(section: Mapping[str, Any]) -> str:
    return ""


def _table(section: Mapping[str, Any]) -> str:
    return table(section["columns"], section["rows"])


def _roofline(section: Mapping[str, Any]) -> str:
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
    chart = plots.roofline(section["points"], section["roofs"])
    return _figure(chart, ("operation", "on", "FLOP", "bytes", "FLOP/B", "FLOP/s"), rows)


def _gantt(section: Mapping[str, Any]) -> str:
    rows = [
        (each["stage"], each["platform"], each["op"], each["start_cycle"], each["cycles"])
        for each in section["ops"]
    ]
    return _figure(
        plots.gantt(section["ops"], section["stage_cycles"]),
        ("stage", "unit", "operation", "start", "core cycles"),
        rows,
    )


def _bars(section: Mapping[str, Any]) -> str:
    return _figure(
        plots.bars(section["shares"]),
        ("unit", "share, %"),
        [(each["name"], 100 * each["share"]) for each in section["shares"]],
    )


def _channels(section: Mapping[str, Any]) -> str:
    loads = section["loads"]
    channels = max((len(each["cycles"]) for each in loads), default=0)
    rows = [
        (
            channel,
            *(each["cycles"][channel] if channel < len(each["cycles"]) else "" for each in loads),
        )
        for channel in range(channels)
    ]
    return _figure(
        plots.channel_loads(loads), ("channel", *(str(each["name"]) for each in loads)), rows
    )


def _curves(section: Mapping[str, Any]) -> str:
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
    return _figure(
        chart, ("curve", f"last {names['x_name']}", names["y_name"], "low", "high"), last
    )


def _pareto(section: Mapping[str, Any]) -> str:
    points = section["points"]
    dominated = [point for point in points if not point["front"]]
    stride = max(1, math.ceil(len(dominated) / MOST_DOTS))
    front = [point for point in points if point["front"]]
    options = {key: section[key] for key in ("x_name", "y_name")} | {
        key: bool(section.get(key)) for key in ("log_x", "log_y")
    }
    chart = plots.pareto([*dominated[::stride], *front], **options)
    left_out = (
        f"<p>One in {stride} of the {len(dominated)} dominated designs is drawn.</p>"
        if stride > 1
        else ""
    )
    rows = [
        (str(point.get("name", "")), point["x"], point["y"])
        for point in sorted(front, key=lambda point: point["x"])
    ]
    return _figure(chart, ("design", options["x_name"], options["y_name"]), rows) + left_out


def _validation(section: Mapping[str, Any]) -> str:
    columns = ("level", "system", "kind", "name", "n", "mean", "median", "p95", "max")
    errors = table(columns, [[group[column] for column in columns] for group in section["groups"]])
    charts = "".join(
        f"<figure>{chart(section['rows'])}</figure>\n" for chart in (plots.validation, plots.errors)
    )
    return f"{charts}<p>Absolute error, % of the measured cycles.</p>{errors}"


KINDS: dict[Any, Callable[[Mapping[str, Any]], str]] = {
    "text": _text,
    "table": _table,
    "roofline": _roofline,
    "gantt": _gantt,
    "bars": _bars,
    "channels": _channels,
    "curves": _curves,
    "pareto": _pareto,
    "validation": _validation,
}


def _ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom else math.nan


def _cell(value: Any) -> str:
    if isinstance(value, bool | str) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1e4 and abs(value) < 1e12 else f"{value:.4g}"
