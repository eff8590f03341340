"""Charts as SVG text: no library, colours by CSS so that they follow light and dark, the same bytes
for the same numbers.

Every chart takes plain numbers and gives one `<svg>` element with a sentence for those who cannot
see it. Numbers that are not finite, and those below zero on a logarithmic axis, are left out.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neupims.files import write_text

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 74, 18, 34, 48
LETTER = 6.3  # width of a letter of 12 pixels
COLOURS = 6
STYLE = """
.chart { --c0: #2f63c0; --c1: #c2571a; --c2: #17835a; --c3: #9246c4; --c4: #8a6d00; --c5: #6b6b6b; --ink: #1b1b1b; --grid: #8884; --paper: #fff }
@media (prefers-color-scheme: dark) {
.chart { --c0: #82adff; --c1: #ff9e5e; --c2: #56d39b; --c3: #d6a0ff; --c4: #e0c14a; --c5: #b0b0b0; --ink: #ececec; --grid: #8886; --paper: #16181c } }
.chart text { font: 12px system-ui, sans-serif; fill: var(--ink) } .chart .small { font-size: 11px } .chart .end { text-anchor: end }
.chart .middle { text-anchor: middle } .chart .name { opacity: .75 } .chart .inside { fill: var(--paper); font-size: 11px }
.chart line, .chart polyline { fill: none; stroke-width: 1.6 } .chart .grid { stroke: var(--grid); stroke-width: 1 }
.chart .axis { stroke: var(--ink); stroke-width: 1; opacity: .6 } .chart .dash { stroke: var(--ink); stroke-dasharray: 5 4; opacity: .6 }
.chart .dots { fill: none; stroke-linecap: round; stroke-width: 4; opacity: .65 } .chart .band { opacity: .16; stroke: none }
.chart .stage { fill: var(--grid); opacity: .35 }
""" + "".join(
    f".chart .f{i} {{ fill: var(--c{i}) }} .chart .s{i} {{ stroke: var(--c{i}) }}\n"
    for i in range(COLOURS)
)


class Scale(NamedTuple):
    """Where a value lies between two pixels, on a linear or a logarithmic axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            math.log10(each) if self.log else each for each in (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values, about six."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            stride = max(1, round((last - first) / 7))
            steps = (1, 2, 5) if last - first <= 2 else (1,)
            values = [
                step * 10.0**power for power in range(first, last + 1, stride) for step in steps
            ]
        else:
            step = _round_step((self.high - self.low) / 6.5)
            values = [
                step * i
                for i in range(
                    math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1
                )
            ]
        return [
            value
            for value in values
            if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9) or value == 0 == self.low
        ]


def scale(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    log: bool = False,
    zero: bool = False,
    margin: float = 0.05,
) -> Scale:
    """An axis that holds all values with a margin; from zero where `zero`."""
    shown = [value for value in values if _drawn(value, log)] or [1.0]
    low, high = min(shown), max(shown)
    if log:
        low, high = (
            (low / 1.5, high * 1.5)
            if low == high
            else (low / (high / low) ** margin, high * (high / low) ** margin)
        )
        return Scale(low, high, start, end, True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0) or 1.0
        return Scale(low, low + (high - low) * (1 + margin), start, end)
    room = (high - low) * margin or abs(high) * 0.1 or 1.0
    return Scale(low - room, high + room, start, end)


def short(value: float) -> str:
    """A number with at most three digits and a letter for thousands, millions and so on."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{float(f'{value / 10**power:.3g}'):g}{letter}"
    return f"{float(f'{value:.3g}'):g}"


def with_unit(value: float, unit: str) -> str:
    """A number with its unit, the letter of its thousands before the unit: 262 TFLOP/s."""
    text = short(value)
    return f"{text[:-1]} {text[-1]}{unit}" if text[-1] in "PTGMk" else f"{text} {unit}"


def roofline(points: Sequence[Mapping[str, Any]], roofs: Sequence[Mapping[str, Any]]) -> str:
    """Operations under the roofs of the machines.

    `points`: name, roof, flops, bytes, seconds. `roofs`: name, flops_per_second, bytes_per_second.
    """
    spots = [
        (point["flops"] / point["bytes"], point["flops"] / point["seconds"], point)
        for point in points
        if point["bytes"] > 0 < point["seconds"]
    ]
    spots = [spot for spot in spots if _drawn(spot[0], True) and _drawn(spot[1], True)]
    ridges = [roof["flops_per_second"] / roof["bytes_per_second"] for roof in roofs]
    x = scale(
        [*(spot[0] for spot in spots), *(4 * ridge for ridge in ridges), 0.25],
        LEFT,
        WIDTH - RIGHT,
        log=True,
    )
    y = scale(
        [*(spot[1] for spot in spots), *(roof["flops_per_second"] for roof in roofs)],
        HEIGHT - BOTTOM,
        TOP + 14,
        log=True,
    )
    order = [roof["name"] for roof in roofs]
    body = [_axes(x, y, "operations a byte of memory traffic, FLOP/B", "FLOP/s")]
    for i, roof in enumerate(roofs):
        corners = sorted({x.low, min(max(ridges[i], x.low), x.high), x.high})
        line = [
            (x(at), y(max(min(roof["flops_per_second"], roof["bytes_per_second"] * at), y.low)))
            for at in corners
            if at > 0
        ]
        start = y.low / roof["bytes_per_second"]
        if start > x.low:  # the roof comes up through the floor of the chart
            line = [(x(start), y(y.low)), *line[1:]]
        body.append(f'<polyline class="s{i % COLOURS}" points="{_points(line)}"/>')
    labels = Labels()
    for at, speed, point in sorted(spots, key=lambda spot: -spot[1]):
        colour = order.index(point["roof"]) % COLOURS if point["roof"] in order else 5
        hover = f"{point['name']}: {short(at)} FLOP/B, {with_unit(speed, 'FLOP/s')}"
        body.append(
            f'<circle class="f{colour}" cx="{x(at):.1f}" cy="{y(speed):.1f}"'
            f' r="4.5"><title>{html.escape(hover)}</title></circle>'
        )
        labels.block(x(at), y(speed))
    body += [
        labels.place(point["name"], x(at), y(speed))
        for at, speed, point in sorted(spots, key=lambda spot: -spot[1])
    ]
    told = [
        f"{roof['name']}: {with_unit(roof['flops_per_second'], 'FLOP/s')},"
        f" {with_unit(roof['bytes_per_second'], 'B/s')}"
        for roof in roofs
    ]
    body.append(_legend(list(enumerate(told))))
    sentence = "; ".join(
        f"{point['name']} at {with_unit(speed, 'FLOP/s')}" for _, speed, point in spots
    )
    return _svg(f"Roofline. {'; '.join(told)}. {sentence}", body)


def gantt(
    operations: Sequence[Mapping[str, Any]],
    stage_cycles: Mapping[str, float],
    *,
    unit: str = "core cycles",
) -> str:
    """Stages one after another, operations on the lanes of NPU and PIM. `operations`: stage,
    platform, op, cycles, start_cycle.
    """
    total = sum(stage_cycles.values())
    x = Scale(0, total or 1, 52, WIDTH - RIGHT)
    lanes = {"SA": ("NPU", 62)} | (
        {"PIM": ("PIM", 122)} if any(each["platform"] == "PIM" for each in operations) else {}
    )
    floor = 54 + 60 * len(lanes)
    starts, at = {}, 0.0
    body = []
    for i, (stage, cycles) in enumerate(stage_cycles.items()):
        starts[stage] = at
        if i % 2 == 0:
            body.append(
                f'<rect class="stage" x="{x(at):.1f}" y="36" width="{x(at + cycles) - x(at):.1f}"'
                f' height="{floor - 36}"/>'
            )
        if cycles > 0:
            hover = f"<title>stage {html.escape(stage)}: {cycles:,.0f} {html.escape(unit)}</title>"
            body.append(
                f'<text class="middle" x="{x(at + cycles / 2):.1f}"'
                f' y="52">{html.escape(stage)}{hover}</text>'
            )
        at += cycles
    for name, top in lanes.values():
        body.append(f'<text class="end" x="46" y="{top + 28}">{name}</text>')
    for each in operations:
        if each["platform"] not in lanes or not each["cycles"] > 0 or each["stage"] not in starts:
            continue
        begin = starts[each["stage"]] + each["start_cycle"]
        left, right = x(begin), x(min(begin + each["cycles"], total))
        top = lanes[each["platform"]][1]
        kind, name = operation_kind(each["op"]), html.escape(operation_name(each["op"]))
        hover = (
            f"<title>{html.escape(each['stage'])} {html.escape(each['op'])}: {each['cycles']:,.0f}"
            f" {html.escape(unit)}</title>"
        )
        box = f'x="{left:.1f}" y="{top}" width="{max(right - left - 0.8, 0.4):.1f}" height="46"'
        body.append(f'<rect class="f{OPERATION_KINDS.index(kind)}" {box}>{hover}</rect>')
        if right - left > LETTER * len(name) + 4:
            body.append(
                f'<text class="inside middle" x="{(left + right) / 2:.1f}"'
                f' y="{top + 27}">{name}</text>'
            )
    body += [
        f'<text class="small middle" x="{x(tick):.1f}" y="{floor + 15}">{short(tick)}</text>'
        for tick in x.ticks()
    ]
    body.append(
        f'<text class="name end" x="{WIDTH - RIGHT}" y="{floor + 32}">{html.escape(unit)}</text>'
    )
    body.append(
        _legend(
            [
                (i, kind)
                for i, kind in enumerate(OPERATION_KINDS)
                if any(operation_kind(each["op"]) == kind for each in operations)
            ]
        )
    )
    return _svg(
        "Stages in order: "
        + ", ".join(f"{stage} {cycles:,.0f} {unit}" for stage, cycles in stage_cycles.items()),
        body,
        floor + 38,
    )


OPERATION_KINDS = ("matrix product", "vector work", "logit", "attend", "NPU attention")


def operation_kind(name: str) -> str:
    """What an operation, named as the simulator names it, does."""
    if "Logit" in name:
        return "logit"
    if "Attend" in name:
        return "attend"
    if "MHA" in name:
        return "NPU attention"
    return (
        "matrix product"
        if name.rpartition(".")[2] in ("QKVgen", "proj", "fc1", "fc2")
        else "vector work"
    )


def operation_name(name: str) -> str:
    """The short name of an operation, as a label."""
    return {
        "NeuPIMSLogitSoftmax": "logit",
        "NeuPIMSAttend": "attend",
        "QKVgen": "qkv",
        "FusedMHA": "attention",
    }.get(last := name.rpartition(".")[2], last)


def bars(shares: Sequence[Mapping[str, Any]]) -> str:
    """Horizontal bars of shares from 0 to 1. `shares`: name, share."""
    left = 20 + LETTER * max((len(str(each["name"])) for each in shares), default=0)
    x = Scale(
        0,
        max([1.0, *(each["share"] for each in shares if math.isfinite(each["share"]))]),
        left,
        WIDTH - 70,
    )
    body = []
    for i, each in enumerate(shares):
        top = 12 + 34 * i
        share = each["share"] if math.isfinite(each["share"]) else 0.0
        body.append(
            f'<text class="end" x="{left - 8:.0f}"'
            f' y="{top + 15}">{html.escape(str(each["name"]))}</text>'
        )
        body.append(
            f'<rect class="stage" x="{left:.1f}" y="{top}" width="{x(1) - left:.1f}" height="22"/>'
        )
        body.append(
            f'<rect class="f{i % COLOURS}" x="{left:.1f}" y="{top}"'
            f' width="{max(x(share) - left, 0):.1f}" height="22"/>'
        )
        body.append(f'<text x="{x(share) + 6:.1f}" y="{top + 15}">{each["share"]:.1%}</text>')
    return _svg(
        ", ".join(f"{each['name']} {each['share']:.1%}" for each in shares),
        body,
        20 + 34 * max(len(shares), 1),
    )


def channel_loads(loads: Sequence[Mapping[str, Any]], *, unit: str = "core cycles") -> str:
    """Bars for each channel, side by side for each schedule. `loads`: name, cycles (one number a
    channel).
    """
    channels = max((len(each["cycles"]) for each in loads), default=0)
    x = Scale(-0.5, max(channels, 1) - 0.5, LEFT, WIDTH - RIGHT)
    y = scale(
        [value for each in loads for value in each["cycles"]], HEIGHT - BOTTOM, TOP + 14, zero=True
    )
    width = 0.8 * (x(1) - x(0)) / max(len(loads), 1)
    body = [
        _axes(
            x,
            y,
            "channel",
            unit,
            x_ticks=[i for i in range(channels) if i % max(1, math.ceil(channels / 16)) == 0],
        )
    ]
    for i, each in enumerate(loads):
        colour = i % COLOURS
        for channel, value in enumerate(each["cycles"]):
            left, top = x(channel) + width * (i - len(loads) / 2), y(value)
            hover = (
                f"<title>{html.escape(str(each['name']))}, channel {channel}: {value:,.0f}"
                f" {html.escape(unit)}</title>"
            )
            body.append(
                f'<rect class="f{colour}" x="{left:.1f}" y="{top:.1f}"'
                f' width="{max(width - 0.5, 0.5):.1f}" height="{y(0) - top:.1f}">{hover}</rect>'
            )
        if each["cycles"]:
            longest = y(max(each["cycles"]))
            body.append(
                f'<line class="s{colour}" stroke-dasharray="5 4" x1="{LEFT}" x2="{WIDTH - RIGHT}"'
                f' y1="{longest:.1f}" y2="{longest:.1f}"/>'
            )
    body.append(
        _legend(
            [
                (i, f"{each['name']}: longest {short(max(each['cycles'], default=0))}")
                for i, each in enumerate(loads)
            ]
        )
    )
    sentence = "; ".join(
        f"{each['name']}: longest channel {max(each['cycles'], default=0):,.0f} {unit}"
        for each in loads
    )
    return _svg(f"Load of {channels} channels. {sentence}", body)


def curves(
    series: Sequence[Mapping[str, Any]],
    *,
    x_name: str,
    y_name: str,
    log_x: bool = False,
    lines: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Curves with intervals. `series`: name, x, y, and where there is an interval low, high.
    `lines`: name, value; drawn across.
    """
    kept = [
        (
            each,
            [
                i
                for i, at in enumerate(each["x"])
                if _drawn(at, log_x) and _drawn(each["y"][i], False)
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
    body = [_axes(x, y, x_name, y_name)]
    for i, (each, indices) in enumerate(kept):
        colour = i % COLOURS
        if each.get("low") is not None and each.get("high") is not None:
            edge = [(x(each["x"][j]), y(each["high"][j])) for j in indices] + [
                (x(each["x"][j]), y(each["low"][j])) for j in reversed(indices)
            ]
            body.append(f'<polygon class="band f{colour}" points="{_points(edge)}"/>')
        body.append(
            f'<polyline class="s{colour}"'
            f' points="{_points((x(each["x"][j]), y(each["y"][j])) for j in indices)}"/>'
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
    body.append(_legend([(i, str(each["name"])) for i, each in enumerate(series)]))
    ends = [
        f"{each['name']} ends at {short(each['y'][indices[-1]])}"
        for each, indices in kept
        if indices
    ]
    return _svg(f"{y_name} over {x_name}: " + ", ".join(ends), body)


def pareto(
    points: Sequence[Mapping[str, Any]],
    *,
    x_name: str,
    y_name: str,
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """Designs as dots, those of the front joined. `points`: x, y, front (bool), and where it has
    one name.
    """
    shown = [point for point in points if _drawn(point["x"], log_x) and _drawn(point["y"], log_y)]
    front = sorted(
        (point for point in shown if point["front"]), key=lambda point: (point["x"], point["y"])
    )
    x = scale([point["x"] for point in shown], LEFT, WIDTH - RIGHT, log=log_x)
    y = scale([point["y"] for point in shown], HEIGHT - BOTTOM, TOP + 14, log=log_y)
    body = [
        _axes(x, y, x_name, y_name),
        _dots([(x(point["x"]), y(point["y"])) for point in shown if not point["front"]], 5),
    ]
    body.append(
        '<polyline class="s0"'
        f' points="{_points((x(point["x"]), y(point["y"])) for point in front)}"/>'
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
        _legend(
            [
                (0, f"Pareto front, {len(front)} designs"),
                (5, f"dominated, {len(shown) - len(front)} designs"),
            ]
        )
    )
    return _svg(
        f"{y_name} against {x_name}: {len(front)} of {len(shown)} designs are on the Pareto front",
        body,
    )


def validation(rows: Sequence[Mapping[str, Any]]) -> str:
    """Predicted against measured core cycles, both logarithmic, by kind. `rows`: level, name,
    measured, predicted.
    """
    shown = [
        row for row in rows if _drawn(row["measured"], True) and _drawn(row["predicted"], True)
    ]
    both = [row[key] for row in shown for key in ("measured", "predicted")]
    x = scale(both, LEFT, WIDTH - RIGHT, log=True)
    y = scale(both, HEIGHT - BOTTOM + 60, TOP + 14, log=True)
    height = HEIGHT + 60
    body = [_axes(x, y, "measured, core cycles", "predicted, core cycles", height=height)]
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
            body.append(_dots([(x(row["measured"]), y(row["predicted"])) for row in mine], i))
            legend.append((i, kind))
    body.append(_legend(legend))
    sentence = (
        f"Predicted against measured cycles, {len(shown)} pairs:"
        f" {', '.join(name for _, name in legend)}; dashed: 10 % more and less"
    )
    return _svg(sentence, body, height)


def errors(rows: Sequence[Mapping[str, Any]]) -> str:
    """Relative error over measured core cycles, by kind; what is far out stands at the edge.
    `rows`: level, name, measured, predicted.
    """
    shown = [
        row for row in rows if _drawn(row["measured"], True) and _drawn(row["predicted"], True)
    ]
    percent = {id(row): 100 * (row["predicted"] / row["measured"] - 1) for row in shown}
    sizes = sorted(abs(value) for value in percent.values())
    edge = max(12.0, sizes[int(0.99 * len(sizes))] if sizes else 0.0)
    x = scale([row["measured"] for row in shown], LEFT, WIDTH - RIGHT, log=True)
    y = Scale(-edge, edge, HEIGHT - BOTTOM, TOP + 14)
    body = [_axes(x, y, "measured, core cycles", "predicted less measured, %")]
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
        body.append(_dots(places, ROW_KINDS.index(kind)))
    body.append(_legend([(ROW_KINDS.index(kind), kind) for kind in kinds]))
    return _svg(
        f"Relative error over measured cycles, {len(shown)} pairs, 99 % of them within"
        f" {edge:.0f} %",
        body,
    )


ROW_KINDS = ("matrix product", "vector work", "PIM", "NPU attention", "stage", "layer")


def row_kind(row: Mapping[str, Any]) -> str:
    """Level of a validation row; of an operation, what it does."""
    if row["level"] != "op":
        return row["level"]
    kind = operation_kind(row["name"])
    return "PIM" if kind in ("logit", "attend") else kind


def check_svg(path: str | Path) -> None:
    """Raises ValueError if the file is not named as an SVG file."""
    if Path(path).suffix.lower() != ".svg":
        raise ValueError(f"the plot is an SVG file: give a name that ends in .svg, not {path}")


def draw_validation(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the scatter plot of a validation as an SVG file of its own.

    Raises:
        ValueError: the file is not named as an SVG file.
        OSError: it cannot be written.
    """
    check_svg(path)
    chart = validation(rows)
    head, rest = chart.split(">", 1)
    paper = f"<style>{STYLE}</style><rect width='100%' height='100%' style='fill: var(--paper)'/>"
    write_text(path, f'{head} xmlns="http://www.w3.org/2000/svg">{paper}{rest}\n')


class Labels:
    """Places names beside points so that no two cover each other; a name that finds no room is left
    to the point's own tooltip and the table.
    """

    def __init__(self):
        self._taken: list[tuple[float, float, float, float]] = []

    def block(self, x: float, y: float, radius: float = 5) -> None:
        """Keeps names off a point."""
        self._taken.append((x - radius, y - radius, x + radius, y + radius))

    def place(self, name: str, x: float, y: float) -> str:
        width = LETTER * len(name)
        for left, base in (
            (x + 8, y + 4),
            (x - 8 - width, y + 4),
            (x - width / 2, y - 9),
            (x - width / 2, y + 18),
            (x + 8, y - 9),
            (x + 8, y + 17),
        ):
            box = (left, base - 10, left + width, base + 2)
            inside = (
                box[0] > LEFT and box[2] < WIDTH - 4 and box[1] > TOP and box[3] < HEIGHT - BOTTOM
            )
            if inside and not any(
                box[0] < each[2] and each[0] < box[2] and box[1] < each[3] and each[1] < box[3]
                for each in self._taken
            ):
                self._taken.append(box)
                return (
                    f'<text class="small" x="{left:.1f}" y="{base:.1f}">{html.escape(name)}</text>'
                )
        return ""


def _svg(sentence: str, body: Iterable[str], height: float = HEIGHT) -> str:
    label = html.escape(sentence, quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img"'
        f' aria-label="{label}">{"".join(body)}</svg>'
    )


def _axes(
    x: Scale,
    y: Scale,
    x_name: str,
    y_name: str,
    *,
    x_ticks: Sequence[float] | None = None,
    height: float = HEIGHT,
) -> str:
    bottom = height - BOTTOM
    parts = []
    for tick in y.ticks():
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}"'
            f' y2="{y(tick):.1f}"/>'
        )
        parts.append(
            f'<text class="small end" x="{LEFT - 6}" y="{y(tick) + 4:.1f}">{short(tick)}</text>'
        )
    for tick in x.ticks() if x_ticks is None else x_ticks:
        if x_ticks is None:
            parts.append(
                f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP + 14}"'
                f' y2="{bottom}"/>'
            )
        parts.append(
            f'<text class="small middle" x="{x(tick):.1f}" y="{bottom + 17}">{short(tick)}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    )
    parts.append(
        f'<text class="name end" x="{WIDTH - RIGHT}" y="{bottom + 38}">{html.escape(x_name)}</text>'
    )
    parts.append(f'<text class="name" x="6" y="{TOP + 2}">{html.escape(y_name)}</text>')
    return "".join(parts)


def _legend(entries: Sequence[tuple[int, str]]) -> str:
    parts, left = [], float(LEFT)
    for colour, name in entries:
        parts.append(
            f'<rect class="f{colour % COLOURS}" x="{left:.0f}" y="6" width="10" height="10"'
            ' rx="2"/>'
        )
        parts.append(f'<text class="small" x="{left + 14:.0f}" y="15">{html.escape(name)}</text>')
        left += 30 + 5.9 * len(name)
    return "".join(parts)


def _dots(places: Sequence[tuple[float, float]], colour: int) -> str:
    """Many dots as one path: lines of no length with round ends."""
    return (
        f'<path class="dots s{colour % COLOURS}"'
        f' d="{"".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)}"/>'
    )


def _points(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _drawn(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= step * (1 - 1e-9))
