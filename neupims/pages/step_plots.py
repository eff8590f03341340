"""Charts of one simulated step as SVG text: roofline, Gantt chart, utilisation, channel loads.

Every chart takes plain numbers and returns one `<svg>` element with an `aria-label`. Numbers that
are not finite, and those that are not positive on a logarithmic axis, are left out.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from neupims.pages.svg import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    LEFT,
    LETTER,
    RIGHT,
    TOP,
    WIDTH,
    Labels,
    Scale,
    draw_axes,
    draw_chart,
    draw_legend,
    is_drawable,
    join_points,
    scale,
    short,
    with_unit,
)


def roofline(points: Sequence[Mapping[str, Any]], roofs: Sequence[Mapping[str, Any]]) -> str:
    """Returns a roofline chart: operations under the roofs of the machines.

    Args:
        points: Mappings of name, roof (name of the machine), flops, bytes and seconds of each
            operation.
        roofs: Mappings of name, flops_per_second and bytes_per_second of each machine.
    """
    spots = [
        (point["flops"] / point["bytes"], point["flops"] / point["seconds"], point)
        for point in points
        if point["bytes"] > 0 < point["seconds"]
    ]
    spots = [spot for spot in spots if is_drawable(spot[0], True) and is_drawable(spot[1], True)]
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
    body = [draw_axes(x, y, "operations a byte of memory traffic, FLOP/B", "FLOP/s")]
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
        body.append(f'<polyline class="s{i % COLOURS}" points="{join_points(line)}"/>')
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
    body.append(draw_legend(list(enumerate(told))))
    sentence = "; ".join(
        f"{point['name']} at {with_unit(speed, 'FLOP/s')}" for _, speed, point in spots
    )
    return draw_chart(f"Roofline. {'; '.join(told)}. {sentence}", body)


def gantt(
    operations: Sequence[Mapping[str, Any]],
    stage_cycles: Mapping[str, float],
    *,
    unit: str = "core cycles",
) -> str:
    """Returns a Gantt chart: stages in order, operations on the lanes of NPU and PIM.

    Args:
        operations: Mappings of stage, platform ("SA" or "PIM"), op, cycles and start_cycle (in the
            stage).
        stage_cycles: Length of each stage by name, in order.
        unit: Unit of all times.
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
        draw_legend(
            [
                (i, kind)
                for i, kind in enumerate(OPERATION_KINDS)
                if any(operation_kind(each["op"]) == kind for each in operations)
            ]
        )
    )
    return draw_chart(
        "Stages in order: "
        + ", ".join(f"{stage} {cycles:,.0f} {unit}" for stage, cycles in stage_cycles.items()),
        body,
        floor + 38,
    )


OPERATION_KINDS = ("matrix product", "vector work", "logit", "attend", "NPU attention")


def operation_kind(name: str) -> str:
    """Returns which of `OPERATION_KINDS` an operation is.

    Args:
        name: Its name in the simulator, such as "ffn.fc1".
    """
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
    """Returns the short name of an operation, for a label.

    Args:
        name: Its name in the simulator; a name without a short form loses only its prefix.
    """
    return {
        "NeuPIMSLogitSoftmax": "logit",
        "NeuPIMSAttend": "attend",
        "QKVgen": "qkv",
        "FusedMHA": "attention",
    }.get(last := name.rpartition(".")[2], last)


def bars(shares: Sequence[Mapping[str, Any]]) -> str:
    """Returns horizontal bars.

    Args:
        shares: Mappings of name and share, from 0 to 1, of each bar.
    """
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
    return draw_chart(
        ", ".join(f"{each['name']} {each['share']:.1%}" for each in shares),
        body,
        20 + 34 * max(len(shares), 1),
    )


def channel_loads(loads: Sequence[Mapping[str, Any]], *, unit: str = "core cycles") -> str:
    """Returns bars for each channel, side by side for each load.

    Args:
        loads: Mappings of name and cycles (one number for each channel) of each load.
        unit: Unit of the loads.
    """
    channels = max((len(each["cycles"]) for each in loads), default=0)
    x = Scale(-0.5, max(channels, 1) - 0.5, LEFT, WIDTH - RIGHT)
    y = scale(
        [value for each in loads for value in each["cycles"]], HEIGHT - BOTTOM, TOP + 14, zero=True
    )
    width = 0.8 * (x(1) - x(0)) / max(len(loads), 1)
    body = [
        draw_axes(
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
        draw_legend(
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
    return draw_chart(f"Load of {channels} channels. {sentence}", body)
