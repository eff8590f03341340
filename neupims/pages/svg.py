"""SVG drawing for the charts of a page: scales, axes, legends, dots and labels.

Colours come from `templates/chart.css`, so charts follow light and dark. The same numbers give the
same bytes.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 74, 18, 34, 48
LETTER = 6.3  # width of a letter of 12 pixels
COLOURS = 6  # classes f0 to f5 (fill) and s0 to s5 (stroke)


class Scale(NamedTuple):
    """Maps values to pixels, on a linear or a logarithmic axis."""

    low: float  # value at the start
    high: float  # value at the end
    start: float  # pixel
    end: float  # pixel
    log: bool = False  # whether the axis is logarithmic

    def __call__(self, value: float) -> float:
        low, high, value = (
            math.log10(each) if self.log else each for each in (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Returns about six round values."""
        found = self._inside(self._log_steps()) if self.log else []
        # An axis of less than a decade may hold no round power: it takes linear steps.
        return found if len(found) > 1 else self._inside(self._linear_steps())

    def _log_steps(self) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        stride = max(1, round((last - first) / 7))
        steps = (1, 2, 5) if last - first <= 2 else (1,)
        return [step * 10.0**power for power in range(first, last + 1, stride) for step in steps]

    def _linear_steps(self) -> list[float]:
        step = _round_step((self.high - self.low) / 6.5)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [step * place for place in range(first, last + 1)]

    def _inside(self, values: Iterable[float]) -> list[float]:
        """Values on the axis, within rounding."""
        low, high = self.low * (1 - 1e-9), self.high * (1 + 1e-9)
        return [value for value in values if low <= value <= high or value == 0 == self.low]


def scale(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    log: bool = False,
    zero: bool = False,
    margin: float = 0.05,
) -> Scale:
    """Returns an axis that shows all values with a margin.

    Args:
        values: Numbers that the axis shows; those that cannot be drawn are ignored.
        start: Pixel of the low end.
        end: Pixel of the high end.
        log: Whether the axis is logarithmic.
        zero: Whether a linear axis includes 0.
        margin: Share of the range that is added on each side; with `zero` only above.
    """
    shown = [value for value in values if is_drawable(value, log)] or [1.0]
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
    """Returns a number with at most three digits and a letter for thousands, millions and so on.

    Args:
        value: The number; numbers that are not finite are written as `inf` or `nan`.
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 0.9995 * 10**power:
            return f"{float(f'{value / 10**power:.3g}'):g}{letter}"
    return f"{float(f'{value:.3g}'):g}"


def with_unit(value: float, unit: str) -> str:
    """Returns a number with its unit and the prefix of the unit, such as 262 TFLOP/s.

    Args:
        value: The number, in the plain unit.
        unit: The unit, such as "FLOP/s".
    """
    text = short(value)
    return f"{text[:-1]} {text[-1]}{unit}" if text[-1] in "PTGMk" else f"{text} {unit}"


class Labels:
    """Places names beside points so that no two overlap.

    A name that does not fit is left out; the tooltip of the point and the table still show it.
    """

    def __init__(self):
        self._taken: list[tuple[float, float, float, float]] = []

    def block(self, x: float, y: float, radius: float = 5) -> None:
        """Keeps names off a point.

        Args:
            x: Horizontal pixel of the point.
            y: Vertical pixel of the point.
            radius: Half the side of the square that is kept free, in pixels.
        """
        self._taken.append((x - radius, y - radius, x + radius, y + radius))

    def place(self, name: str, x: float, y: float) -> str:
        """Returns the SVG text of a name beside a point, or "" if it does not fit.

        Args:
            name: The name.
            x: Horizontal pixel of the point.
            y: Vertical pixel of the point.
        """
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


def draw_chart(sentence: str, body: Iterable[str], height: float = HEIGHT) -> str:
    """Returns a chart as one `<svg>` element.

    Args:
        sentence: Describes the chart to readers who cannot see it.
        body: SVG elements.
        height: Height in pixels; the width is `WIDTH`.
    """
    label = html.escape(sentence, quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img"'
        f' aria-label="{label}">{"".join(body)}</svg>'
    )


def draw_axes(
    x: Scale,
    y: Scale,
    x_name: str,
    y_name: str,
    *,
    x_ticks: Sequence[float] | None = None,
    height: float = HEIGHT,
) -> str:
    """Returns grid lines, tick labels and the names of both axes.

    Args:
        x: Horizontal scale.
        y: Vertical scale.
        x_name: Name of the horizontal axis.
        y_name: Name of the vertical axis.
        x_ticks: Labels of the horizontal axis, without grid lines; `x.ticks()` if not given.
        height: Height of the chart in pixels.
    """
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


def draw_legend(entries: Sequence[tuple[int, str]]) -> str:
    """Returns a legend in one line, at the top of the chart.

    Args:
        entries: Number of the colour and name of each entry.
    """
    parts, left = [], float(LEFT)
    for colour, name in entries:
        parts.append(
            f'<rect class="f{colour % COLOURS}" x="{left:.0f}" y="6" width="10" height="10"'
            ' rx="2"/>'
        )
        parts.append(f'<text class="small" x="{left + 14:.0f}" y="15">{html.escape(name)}</text>')
        left += 30 + 5.9 * len(name)
    return "".join(parts)


def draw_dots(places: Sequence[tuple[float, float]], colour: int) -> str:
    """Returns many dots as one path: lines without length, with round ends.

    Args:
        places: Pixels (x, y) of the dots.
        colour: Number of the colour.
    """
    return (
        f'<path class="dots s{colour % COLOURS}"'
        f' d="{"".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)}"/>'
    )


def join_points(places: Iterable[tuple[float, float]]) -> str:
    """Returns pixels as the `points` of a polyline.

    Args:
        places: Pixels (x, y) of the corners.
    """
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def is_drawable(value: float, log: bool) -> bool:
    """Returns whether an axis can show a value.

    Args:
        value: The number.
        log: Whether the axis is logarithmic.
    """
    return math.isfinite(value) and (value > 0 or not log)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= step * (1 - 1e-9))
