"""A heat map of two axes as SVG text, for maps of elites."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from neupims.pages.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    draw_axes,
    draw_chart,
    short,
)

PALEST = 0.12  # opacity of the worst cell; the best one is opaque
STEPS = 5  # of the legend


def heat_map(
    cells: Sequence[Mapping[str, Any]],
    *,
    x_edges: Sequence[float],
    y_edges: Sequence[float],
    x_name: str,
    y_name: str,
    z_name: str,
    log_x: bool = False,
    log_y: bool = False,
    largest: bool = True,
) -> str:
    """Returns a map of cells; a darker one has a better value.

    Args:
        cells: Mappings of x and y (the place of the cell on each axis, from 0), value, and
            optionally its name. Cells whose value is not finite are left out.
        x_edges: Where cells begin and end on the horizontal axis, rising.
        y_edges: Where cells begin and end on the vertical axis, rising.
        x_name: Name of the horizontal axis.
        y_name: Name of the vertical axis.
        z_name: Name of the values.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is logarithmic.
        largest: Whether the largest value is best.
    """
    x = Scale(x_edges[0], x_edges[-1], LEFT, WIDTH - RIGHT, log_x)
    y = Scale(y_edges[0], y_edges[-1], HEIGHT - BOTTOM, TOP + 14, log_y)
    cells = [cell for cell in cells if math.isfinite(cell["value"])]
    values = [cell["value"] for cell in cells]
    low, high = min(values, default=0.0), max(values, default=0.0)
    body = [draw_axes(x, y, x_name, y_name)]
    for cell in cells:
        i, j = cell["x"], cell["y"]
        left, right, bottom, top = (
            x(x_edges[i]),
            x(x_edges[i + 1]),
            y(y_edges[j]),
            y(y_edges[j + 1]),
        )
        share = (cell["value"] - low) / (high - low) if high > low else float(largest)
        hover = (
            f"{cell['name'] + ': ' if cell.get('name') else ''}{z_name} {short(cell['value'])},"
            f" {x_name} {short(x_edges[i])} to {short(x_edges[i + 1])},"
            f" {y_name} {short(y_edges[j])} to {short(y_edges[j + 1])}"
        )
        body.append(
            f'<rect class="f0" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}"'
            f' height="{bottom - top:.1f}" fill-opacity="{_opacity(share, largest):.2f}">'
            f"<title>{html.escape(hover)}</title></rect>"
        )
    body.append(_draw_legend(z_name, low, high, largest))
    size = (len(x_edges) - 1) * (len(y_edges) - 1)
    return draw_chart(
        f"{z_name} by {x_name} and {y_name}: {len(cells)} of {size} cells have a design, from"
        f" {short(low)} to {short(high)}",
        body,
    )


def _opacity(share: float, largest: bool) -> float:
    """The opacity of a value, given its place between the least (0) and the greatest one (1)."""
    return PALEST + (1 - PALEST) * (share if largest else 1 - share)


def _draw_legend(name: str, low: float, high: float, largest: bool) -> str:
    """The shades from the least to the greatest value, in one line at the top."""
    parts = [f'<text class="small" x="{LEFT}" y="15">{html.escape(name)} {short(low)}</text>']
    left = LEFT + 12 + 5.9 * len(f"{name} {short(low)}")
    for step in range(STEPS):
        parts.append(
            f'<rect class="f0" x="{left + 16 * step:.0f}" y="6" width="16" height="10"'
            f' fill-opacity="{_opacity(step / (STEPS - 1), largest):.2f}"/>'
        )
    parts.append(f'<text class="small" x="{left + 16 * STEPS + 6:.0f}" y="15">{short(high)}</text>')
    return "".join(parts)
