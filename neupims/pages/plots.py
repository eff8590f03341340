"""Charts of searches, explorations and validations as SVG text.

Every chart takes plain numbers and returns one `<svg>` element with an `aria-label`. Numbers that
are not finite, and those that are not positive on a logarithmic axis, are left out.

The charts are drawn here, not with matplotlib, whose SVG has no hover titles and no colours from
CSS, so no dark mode. A front of 60 designs among 4060 takes 62 kB here and 440 kB from matplotlib.
"""

import html
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from neupims.files import write_text
from neupims.pages.step_plots import operation_kind
from neupims.pages.svg import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    draw_axes,
    draw_chart,
    draw_dots,
    draw_legend,
    is_drawable,
    join_points,
    scale,
    short,
)


def curves(
    series: Sequence[Mapping[str, Any]],
    *,
    x_name: str,
    y_name: str,
    log_x: bool = False,
    lines: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Returns curves with intervals.

    Args:
        series: Mappings of name, x and y of each curve, and low and high if it has an interval.
        x_name: Name of the horizontal axis.
        y_name: Name of the vertical axis.
        log_x: Whether the horizontal axis is logarithmic.
        lines: Mappings of name and value of horizontal lines.
    """
    kept = [
        (
            each,
            [
                i
                for i, at in enumerate(each["x"])
                if is_drawable(at, log_x) and is_drawable(each["y"][i], False)
            ],
        )
        for each in series
    ]
    heights = [
        each[key][i]
        for each, indices in kept
        for key in ("y", "low", "high")
        if each.get(key) is not None
        for i in indices
    ]
    x = scale(
        [each["x"][i] for each, indices in kept for i in indices],
        LEFT,
        WIDTH - RIGHT,
        log=log_x,
        margin=0.01,
    )
    y = scale([*heights, *(line["value"] for line in lines)], HEIGHT - BOTTOM, TOP + 14)
    body = [draw_axes(x, y, x_name, y_name)]
    for i, (each, indices) in enumerate(kept):
        colour = i % COLOURS
        if each.get("low") is not None and each.get("high") is not None:
            edge = [(x(each["x"][j]), y(each["high"][j])) for j in indices] + [
                (x(each["x"][j]), y(each["low"][j])) for j in reversed(indices)
            ]
            body.append(f'<polygon class="band f{colour}" points="{join_points(edge)}"/>')
        body.append(
            f'<polyline class="s{colour}"'
            f' points="{join_points((x(each["x"][j]), y(each["y"][j])) for j in indices)}"/>'
        )
    for line in lines:
        at = y(line["value"])
        body.append(
            f'<line class="dash" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        body.append(
            f'<text class="small end" x="{WIDTH - RIGHT - 4}"'
            f' y="{at - 4:.1f}">{html.escape(str(line["name"]))}</text>'
        )
    body.append(draw_legend([(i, str(each["name"])) for i, each in enumerate(series)]))
    ends = [
        f"{each['name']} ends at {short(each['y'][indices[-1]])}"
        for each, indices in kept
        if indices
    ]
    return draw_chart(f"{y_name} over {x_name}: " + ", ".join(ends), body)


def pareto(
    points: Sequence[Mapping[str, Any]],
    *,
    x_name: str,
    y_name: str,
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """Returns designs as dots; those of the front are joined.

    Args:
        points: Mappings of x, y and front (bool) of each design, and optionally its name.
        x_name: Name of the horizontal axis.
        y_name: Name of the vertical axis.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is logarithmic.
    """
    shown = [
        point
        for point in points
        if is_drawable(point["x"], log_x) and is_drawable(point["y"], log_y)
    ]
    front = sorted(
        (point for point in shown if point["front"]), key=lambda point: (point["x"], point["y"])
    )
    x = scale([point["x"] for point in shown], LEFT, WIDTH - RIGHT, log=log_x)
    y = scale([point["y"] for point in shown], HEIGHT - BOTTOM, TOP + 14, log=log_y)
    body = [
        draw_axes(x, y, x_name, y_name),
        draw_dots([(x(point["x"]), y(point["y"])) for point in shown if not point["front"]], 5),
    ]
    body.append(
        '<polyline class="s0"'
        f' points="{join_points((x(point["x"]), y(point["y"])) for point in front)}"/>'
    )
    for point in front:
        name = point.get("name", "")
        hover = (
            f"{name + ': ' if name else ''}{x_name} {short(point['x'])}, {y_name}"
            f" {short(point['y'])}"
        )
        body.append(
            f'<circle class="f0" cx="{x(point["x"]):.1f}" cy="{y(point["y"]):.1f}"'
            f' r="4"><title>{html.escape(hover)}</title></circle>'
        )
    body.append(
        draw_legend(
            [
                (0, f"Pareto front, {len(front)} designs"),
                (5, f"dominated, {len(shown) - len(front)} designs"),
            ]
        )
    )
    return draw_chart(
        f"{y_name} against {x_name}: {len(front)} of {len(shown)} designs are on the Pareto front",
        body,
    )


def validation(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns predicted against measured core cycles, both logarithmic, by kind.

    Args:
        rows: Mappings of level, name, measured and predicted of each pair, in core cycles.
    """
    shown = [
        row
        for row in rows
        if is_drawable(row["measured"], True) and is_drawable(row["predicted"], True)
    ]
    both = [row[key] for row in shown for key in ("measured", "predicted")]
    x = scale(both, LEFT, WIDTH - RIGHT, log=True)
    y = scale(both, HEIGHT - BOTTOM + 60, TOP + 14, log=True)
    height = HEIGHT + 60
    body = [draw_axes(x, y, "measured, core cycles", "predicted, core cycles", height=height)]
    for factor, style in ((1.0, "axis"), (1.1, "dash"), (1 / 1.1, "dash")):
        low, high = max(x.low, x.low / factor), min(x.high, x.high / factor)
        body.append(
            f'<line class="{style}" x1="{x(low):.1f}" y1="{y(low * factor):.1f}" x2="{x(high):.1f}"'
            f' y2="{y(high * factor):.1f}"/>'
        )
    legend = []
    for i, kind in enumerate(ROW_KINDS):
        mine = [row for row in shown if row_kind(row) == kind]
        if mine:
            body.append(draw_dots([(x(row["measured"]), y(row["predicted"])) for row in mine], i))
            legend.append((i, kind))
    body.append(draw_legend(legend))
    sentence = (
        f"Predicted against measured cycles, {len(shown)} pairs:"
        f" {', '.join(name for _, name in legend)}; dashed: 10 % more and less"
    )
    return draw_chart(sentence, body, height)


def errors(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the relative error over measured core cycles, by kind.

    Errors above the 99th percentile are drawn at the edge.

    Args:
        rows: Mappings of level, name, measured and predicted of each pair, in core cycles.
    """
    shown = [
        row
        for row in rows
        if is_drawable(row["measured"], True) and is_drawable(row["predicted"], True)
    ]
    percent = {id(row): 100 * (row["predicted"] / row["measured"] - 1) for row in shown}
    sizes = sorted(abs(value) for value in percent.values())
    edge = max(12.0, sizes[int(0.99 * len(sizes))] if sizes else 0.0)
    x = scale([row["measured"] for row in shown], LEFT, WIDTH - RIGHT, log=True)
    y = Scale(-edge, edge, HEIGHT - BOTTOM, TOP + 14)
    body = [draw_axes(x, y, "measured, core cycles", "predicted less measured, %")]
    body.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>'
    )
    kinds = [kind for kind in ROW_KINDS if any(row_kind(row) == kind for row in shown)]
    for kind in kinds:
        places = [
            (x(row["measured"]), y(min(max(percent[id(row)], -edge), edge)))
            for row in shown
            if row_kind(row) == kind
        ]
        body.append(draw_dots(places, ROW_KINDS.index(kind)))
    body.append(draw_legend([(ROW_KINDS.index(kind), kind) for kind in kinds]))
    return draw_chart(
        f"Relative error over measured cycles, {len(shown)} pairs, 99 % of them within"
        f" {edge:.0f} %",
        body,
    )


ROW_KINDS = ("matrix product", "vector work", "PIM", "NPU attention", "stage", "layer")


def row_kind(row: Mapping[str, Any]) -> str:
    """Returns the level of a validation row, or the kind of its operation: one of ROW_KINDS.

    Args:
        row: Mapping of level and name.
    """
    if row["level"] != "op":
        return row["level"]
    kind = operation_kind(row["name"])
    return "PIM" if kind in ("logit", "attend") else kind


def check_svg(path: str | Path) -> None:
    """Raises if the name of the file does not end in .svg.

    Args:
        path: The file.

    Raises:
        ValueError: The name ends otherwise.
    """
    if Path(path).suffix.lower() != ".svg":
        raise ValueError(f"the plot is an SVG file: give a name that ends in .svg, not {path}")


def draw_validation(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the scatter plot of a validation to an SVG file.

    Args:
        path: The SVG file.
        rows: Mappings of level, name, measured and predicted of each pair, in core cycles.

    Raises:
        ValueError: The name of the file does not end in .svg.
        OSError: The file cannot be written.
    """
    check_svg(path)
    chart = validation(rows)
    head, rest = chart.split(">", 1)
    style = resources.files("neupims.pages").joinpath("templates/chart.css").read_text("utf-8")
    paper = f"<style>{style}</style><rect width='100%' height='100%' style='fill: var(--paper)'/>"
    write_text(path, f'{head} xmlns="http://www.w3.org/2000/svg">{paper}{rest}\n')
