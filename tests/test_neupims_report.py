"""The report, its charts and the Perfetto trace: well-formed, self-contained, the same bytes for
the same numbers, and what the numbers say.
"""

import html.parser
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from neupims.pages import heat_plot, plots, step_plots, svg
from neupims.pages.perfetto import (
    FIRST_CHANNEL_LANE,
    NPU_LANE,
    PIM_LANE,
    STAGE_LANE,
    make_events,
    write_perfetto,
)
from neupims.pages.report import page, write_report

NASTY = "<script>alert(\"1\")</script> & 'x'"
OPS = [
    {"stage": "A", "platform": "SA", "op": "attn.ln", "cycles": 10.0, "start_cycle": 0.0},
    {"stage": "A", "platform": "SA", "op": "attn.QKVgen", "cycles": 90.0, "start_cycle": 10.0},
    {"stage": "B", "platform": "SA", "op": "attn.QKVgen", "cycles": 50.0, "start_cycle": 0.0},
    {
        "stage": "B",
        "platform": "PIM",
        "op": "attn.NeuPIMSLogitSoftmax",
        "cycles": 30.0,
        "start_cycle": 0.0,
    },
    {
        "stage": "B",
        "platform": "PIM",
        "op": "attn.NeuPIMSAttend",
        "cycles": 90.0,
        "start_cycle": 30.0,
    },
    {"stage": "C", "platform": "SA", "op": "ffn.fc1", "cycles": 80.0, "start_cycle": 0.0},
    {
        "stage": "C",
        "platform": "PIM",
        "op": "attn.NeuPIMSLogitSoftmax",
        "cycles": 60.0,
        "start_cycle": 0.0,
    },
]
STAGES = {"A": 100.0, "B": 120.0, "C": 80.0}
RESULT = {"system": "neupims", "model": "gpt3-7b", "stage_cycles": STAGES, "ops": OPS}
ROOFS = [
    {"name": "NPU", "flops_per_second": 262e12, "bytes_per_second": 1.024e12},
    {"name": "PIM", "flops_per_second": 16e12, "bytes_per_second": 16e12},
]
SECTIONS = {
    "text": {"text": NASTY},
    "table": {
        "columns": ("name", NASTY),
        "rows": [(NASTY, 1.5), ("none", None), ("inf", math.inf), ("many", 123456)],
    },
    "roofline": {
        "roofs": ROOFS,
        "points": [{"name": NASTY, "roof": "NPU", "flops": 1e12, "bytes": 1e10, "seconds": 0.02}],
    },
    "gantt": {"ops": OPS, "stage_cycles": STAGES},
    "bars": {"shares": [{"name": NASTY, "share": 0.425}, {"name": "PIM", "share": 0.1}]},
    "channels": {
        "loads": [
            {"name": "before", "cycles": [5.0, 9.0, 1.0]},
            {"name": NASTY, "cycles": [5.0, 5.0, 5.0]},
        ]
    },
    "curves": {
        "x_name": "evaluations",
        "y_name": NASTY,
        "log_x": True,
        "series": [
            {
                "name": "random",
                "x": [1, 10, 100],
                "y": [9.0, 8.0, 7.0],
                "low": [8.0, 7.0, 6.0],
                "high": [10.0, 9.0, 8.0],
            }
        ],
        "lines": [{"name": "bound", "value": 5.0}],
    },
    "pareto": {
        "x_name": "mm2",
        "y_name": "tokens/s",
        "points": [
            {"x": 1.0, "y": 1.0, "front": True, "name": NASTY},
            {"x": 2.0, "y": 3.0, "front": True},
            {"x": 3.0, "y": 2.0, "front": False},
        ],
    },
    "heat": {
        "x_name": "mm2",
        "y_name": "watts",
        "z_name": NASTY,
        "x_edges": [1.0, 2.0, 4.0],
        "y_edges": [1.0, 10.0, 100.0, 1000.0],
        "log_x": True,
        "log_y": True,
        "cells": [
            {"x": 0, "y": 0, "value": 5.0, "name": NASTY},
            {"x": 1, "y": 2, "value": 8.0},
            {"x": 1, "y": 1, "value": 6.0},
        ],
    },
    "validation": {
        "rows": [
            {
                "run_id": "a",
                "level": "op",
                "stage": "A",
                "name": "attn.QKVgen",
                "measured": 100.0,
                "predicted": 103.0,
            },
            {
                "run_id": "a",
                "level": "op",
                "stage": "B",
                "name": "attn.NeuPIMSAttend",
                "measured": 1000.0,
                "predicted": 990.0,
            },
            {
                "run_id": "a",
                "level": "layer",
                "stage": "",
                "name": "layer",
                "measured": 5000.0,
                "predicted": 5100.0,
            },
        ],
        "groups": [
            {
                "level": "op",
                "system": NASTY,
                "kind": "pim",
                "name": "all",
                "n": 1,
                "mean": 1.0,
                "median": 1.0,
                "p95": 1.0,
                "max": 1.0,
            }
        ],
    },
}
PAGE = [{"kind": kind, "title": f"{kind} {NASTY}", **rest} for kind, rest in SECTIONS.items()]


class Checker(html.parser.HTMLParser):
    """Fails unless every element that is opened is closed, in order; collects names, links and
    text.
    """

    VOID = ("meta",)

    def __init__(self):
        super().__init__()
        self.open, self.names, self.links, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def checked(text):
    parser = Checker()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def charts(text):
    """Every chart as an XML element, which fails if it is not well-formed."""
    return [ElementTree.fromstring(each) for each in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_a_page_of_everything_is_whole_and_loads_nothing():
    text = page(PAGE, title=NASTY, facts={"batch": 256, NASTY: NASTY})
    found = checked(text)
    assert "script" not in found.names
    assert all(link.startswith("#") for link in found.links)
    assert "http" not in text
    assert "url(" not in text
    assert found.text.count('<script>alert("1")</script>') >= 10  # as words
    assert len(charts(text)) == 9  # a validation has two
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    for each in charts(text):
        assert each.get("role") == "img"
        assert len(each.get("aria-label")) > 10


def test_the_same_numbers_give_the_same_page(tmp_path):
    first, second = tmp_path / "first.html", tmp_path / "second.html"
    write_report(first, PAGE, title="A page")
    write_report(second, PAGE, title="A page")
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.html", "second.html"]


def test_numbers_reach_the_page():
    text = checked(page(PAGE, title="A page", facts={})).text
    for number in (
        "42.5%",
        "123,456",
        "not finite",
        "50 TFLOP/s",
        "predicted, core cycles",
        "longest 9",
    ):
        assert number in text, number


def test_a_front_is_counted_and_listed():
    text = page(
        [{"kind": "pareto", "title": "mine", **SECTIONS["pareto"]}], title="A page", facts={}
    )
    (chart,) = charts(text)
    words = [each.text for each in chart.iter() if each.tag == "text"]
    assert {"Pareto front, 2 designs", "dominated, 1 designs"} <= set(words)
    assert chart.get("aria-label", "").endswith("2 of 3 designs are on the Pareto front")
    assert re.findall(r"<td>(.*?)</td>", text) == ["1", "1", "2", "3"]


def test_notes_stand_below_their_charts():
    """Of 4001 dominated designs every second one is drawn."""
    points = [{"x": 1.0 + each, "y": 1.0, "front": not each} for each in range(4002)]
    pareto = {"kind": "pareto", "title": "mine", "x_name": "x", "y_name": "y", "points": points}
    validation = {"kind": "validation", "title": "errors", **SECTIONS["validation"]}
    text = page([pareto, validation], title="A page", facts={})
    notes = ["One in 2 of the 4001 dominated designs is drawn.", "Absolute error, % of the"]
    places = [text.index(note) for note in notes]
    assert text.index("</details>") < places[0] < text.index("<h2>errors") < places[1]
    assert (
        charts(text)[0].get("aria-label", "").endswith("1 of 2002 designs are on the Pareto front")
    )


@pytest.mark.parametrize("kind", list(SECTIONS))
def test_a_section_that_lacks_something_says_what(kind):
    whole = {"kind": kind, "title": "mine", **SECTIONS[kind]}
    for name in SECTIONS[kind]:
        if name in ("text", "log_x", "log_y", "lines"):
            continue
        with pytest.raises(ValueError, match=f"the section 'mine' of kind {kind} needs '{name}'"):
            page(
                [{key: value for key, value in whole.items() if key != name}],
                title="A page",
                facts={},
            )


def test_an_unknown_kind_lists_those_there_are():
    with pytest.raises(
        ValueError, match=r"a section's kind must be one of text, table, roofline, .*, not 'pie'"
    ):
        page([{"kind": "pie", "title": "x"}], title="A page", facts={})


def test_a_failed_report_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="kind"):
        write_report(tmp_path / "page.html", [{"kind": "pie", "title": "x"}], title="A page")
    with pytest.raises(OSError, match="No such file"):
        write_report(tmp_path / "none" / "page.html", PAGE, title="A page")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_report(tmp_path / "folder", PAGE, title="A page")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("roofline", {"points": []}),
        (
            "roofline",
            {
                "points": [
                    {"name": "nothing", "roof": "NPU", "flops": 0.0, "bytes": 0.0, "seconds": 0.0}
                ]
            },
        ),
        ("gantt", {"ops": [], "stage_cycles": {"A": 0.0}}),
        ("bars", {"shares": []}),
        ("bars", {"shares": [{"name": "odd", "share": math.nan}, {"name": "over", "share": 1.3}]}),
        ("channels", {"loads": []}),
        ("channels", {"loads": [{"name": "idle", "cycles": [0.0] * 64}]}),
        (
            "curves",
            {
                "series": [{"name": "one", "x": [1], "y": [3.0], "low": None, "high": None}],
                "lines": [],
            },
        ),
        ("curves", {"series": [{"name": "flat", "x": [1, 2], "y": [0.0, math.nan]}], "lines": []}),
        ("pareto", {"points": []}),
        (
            "pareto",
            {
                "points": [
                    {"x": math.inf, "y": 1.0, "front": False},
                    {"x": 1.0, "y": 0.0, "front": True},
                ]
            },
        ),
        ("heat", {"cells": []}),
        ("heat", {"cells": [{"x": 0, "y": 0, "value": 0.0}]}),
        ("heat", {"cells": [{"x": 0, "y": 0, "value": math.inf}, {"x": 1, "y": 0, "value": 1.0}]}),
        ("validation", {"rows": [], "groups": []}),
        (
            "validation",
            {
                "rows": [
                    {"level": "op", "name": "ffn.res", "measured": 10.0, "predicted": math.nan}
                ],
                "groups": [],
            },
        ),
    ],
)
def test_odd_numbers_do_not_break_a_chart(kind, change):
    text = page(
        [{"kind": kind, "title": "mine", **SECTIONS[kind], **change}], title="A page", facts={}
    )
    checked(text)
    for each in charts(text):
        for element in each.iter():
            for name, value in element.attrib.items():
                assert name == "aria-label" or not re.search(r"nan|inf", value), (
                    element.tag,
                    name,
                    value,
                )


@pytest.mark.parametrize(("largest", "shades"), [(True, [0.12, 1, 0.41]), (False, [1, 0.12, 0.71])])
def test_a_cell_of_a_heat_map_lies_between_its_edges(largest, shades):
    """On both axes cells have equal ratios: 2 columns of 334 pixels, 3 rows of 101.3."""
    (chart,) = charts(heat_plot.heat_map(**SECTIONS["heat"], largest=largest))
    found = [each for each in chart if each.tag == "rect" and len(each)]
    places = [[float(each.get(name)) for name in ("x", "y", "width", "height")] for each in found]
    assert places == [
        [74, pytest.approx(250.7), 334, pytest.approx(101.3)],
        [408, 48, 334, pytest.approx(101.3)],
        [408, pytest.approx(149.3), 334, pytest.approx(101.3)],
    ]
    assert [float(each.get("fill-opacity")) for each in found] == shades
    assert "3 of 6 cells have a design, from 5 to 8" in chart.get("aria-label")


@pytest.mark.parametrize("largest", [True, False])
def test_cells_of_equal_values_are_all_best(largest):
    cells = [{"x": x, "y": 0, "value": 5.0} for x in (0, 1)]
    section = SECTIONS["heat"] | {"cells": cells, "largest": largest}
    (chart,) = charts(heat_plot.heat_map(**section))
    assert {each.get("fill-opacity") for each in chart if each.tag == "rect" and len(each)} == {
        "1.00"
    }


def test_the_bars_of_a_gantt_chart_are_as_long_as_their_operations():
    """300 cycles are drawn in 690 pixels: 2.3 a cycle; NPU operations of C begin with the stage, at
    cycle 220.
    """
    (chart,) = charts(step_plots.gantt(OPS, STAGES))
    found = {each[0].text: each for each in chart.iter("rect") if len(each)}
    fc1, attend = found["C ffn.fc1: 80 core cycles"], found["B attn.NeuPIMSAttend: 90 core cycles"]
    assert float(fc1.get("x")) == pytest.approx(52 + 2.3 * 220, abs=0.06)
    assert float(fc1.get("width")) == pytest.approx(2.3 * 80 - 0.8, abs=0.11)
    assert float(attend.get("x")) == pytest.approx(52 + 2.3 * 130, abs=0.06)
    assert attend.get("y") != fc1.get("y")


def test_channel_bars_are_as_high_as_their_load():
    (chart,) = charts(step_plots.channel_loads([{"name": "a", "cycles": [2.0, 4.0]}]))
    low, high = (float(each.get("height")) for each in chart.iter("rect") if len(each))
    assert high == pytest.approx(2 * low, abs=0.11)


def test_a_point_at_its_roof_touches_it():
    """1 FLOP/B at 16 TFLOP/s is the corner of PIM's roof."""
    (chart,) = charts(
        step_plots.roofline(
            [{"name": "x", "roof": "PIM", "flops": 16e12, "bytes": 16e12, "seconds": 1.0}], ROOFS
        )
    )
    circle = next(chart.iter("circle"))
    corner = [each.get("points") for each in chart.iter("polyline")][1].split()[1]
    assert corner == f"{circle.get('cx')},{circle.get('cy')}"


def test_what_is_perfect_stands_on_the_diagonal():
    rows = [
        {"level": "layer", "name": "layer", "measured": value, "predicted": value}
        for value in (10.0, 1e3, 1e5)
    ]
    (scatter,), (error,) = charts(plots.validation(rows)), charts(plots.errors(rows))
    places = [
        tuple(map(float, place))
        for place in re.findall(r"M([\d.]+) ([\d.]+)", next(scatter.iter("path")).get("d"))
    ]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(places)]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-3)
    assert len(set(re.findall(r"M[\d.]+ ([\d.]+)", next(error.iter("path")).get("d")))) == 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (1.0, "1"),
        (999.6, "1k"),
        (1234.0, "1.23k"),
        (999999.0, "1M"),
        (262.144e12, "262T"),
        (0.01234, "0.0123"),
        (-2.5e6, "-2.5M"),
        (math.inf, "inf"),
    ],
)
def test_short_numbers(value, shown):
    assert svg.short(value) == shown


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        (0, 7, False),
        (0, 103e3, False),
        (-12, 12, False),
        (0.3, 0.31, False),
        (3, 5e6, True),
        (200, 900, True),
        (0.011, 0.019, True),
        (17e3, 52e3, True),
    ],
)
def test_ticks_are_round_and_few(low, high, log):
    ticks = svg.Scale(low, high, 0, 100, log).ticks()
    assert 2 <= len(ticks) <= 10
    assert all(low <= tick <= high for tick in ticks)
    assert all(float(f"{tick:.3g}") == pytest.approx(tick, abs=1e-12) for tick in ticks)


def test_names_in_a_chart_do_not_cover_each_other():
    points = [
        {
            "name": f"operation {i}",
            "roof": "NPU",
            "flops": (1 + i / 50) * 1e12,
            "bytes": 1e10,
            "seconds": 0.02,
        }
        for i in range(8)
    ]
    (chart,) = charts(step_plots.roofline(points, ROOFS))
    boxes = [
        (float(each.get("x")), float(each.get("y")), len(each.text))
        for each in chart.iter("text")
        if (each.text or "").startswith("operation ")
    ]
    names = [box for box in boxes if box[2] < 12]
    assert 2 <= len(names) <= 8
    for i, (x, y, length) in enumerate(names):
        for other_x, other_y, other in names[i + 1 :]:
            assert (
                abs(y - other_y) >= 12
                or x + svg.LETTER * length <= other_x
                or other_x + svg.LETTER * other <= x
            )


def test_the_validation_plot_is_a_file_of_its_own(tmp_path):
    plots.draw_validation(tmp_path / "plot.svg", SECTIONS["validation"]["rows"])
    root = ElementTree.parse(tmp_path / "plot.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    with pytest.raises(ValueError, match=r"give a name that ends in \.svg, not .*plot\.png"):
        plots.draw_validation(tmp_path / "plot.png", [])


def test_traces_have_a_process_a_device_and_lanes_that_never_overlap(tmp_path):
    loads = [[70.0, 120.0], [60.0, 500.0]]
    write_perfetto(tmp_path / "trace.json", RESULT, clock_hz=1e9, channel_cycles=loads, devices=2)
    trace = json.loads((tmp_path / "trace.json").read_text())
    slices = [each for each in trace["traceEvents"] if each["ph"] == "X"]
    assert {each["pid"] for each in slices} == {0, 1}
    lanes = {}
    for each in slices:
        lanes.setdefault((each["pid"], each["tid"]), []).append(
            (each["ts"], each["ts"] + each["dur"])
        )
    assert {lane for _, lane in lanes} == {
        STAGE_LANE,
        NPU_LANE,
        PIM_LANE,
        FIRST_CHANNEL_LANE,
        FIRST_CHANNEL_LANE + 1,
    }
    for spans in lanes.values():
        for (_, end), (start, _) in pairwise(sorted(spans)):
            assert start >= end - 1e-9
    named = {
        (each["pid"], each["tid"]): each["args"]["name"]
        for each in trace["traceEvents"]
        if each["name"] == "thread_name"
    }
    assert set(lanes) <= set(named)


def test_a_trace_keeps_times():
    """Stage C begins after 220 cycles, 0.22 us at 1 GHz; channel 1's second sub-batch ends with its
    stage.
    """
    found = {
        (each["name"], each["tid"]): each
        for each in make_events(RESULT, clock_hz=1e9, channel_cycles=[[70.0, 120.0], [60.0, 500.0]])
        if each["ph"] == "X"
    }
    assert found["fc1", NPU_LANE]["ts"] == pytest.approx(0.22)
    assert found["fc1", NPU_LANE]["dur"] == pytest.approx(0.08)
    assert found["attention", FIRST_CHANNEL_LANE]["dur"] == pytest.approx(0.06)
    assert found["attention", FIRST_CHANNEL_LANE + 1]["dur"] == pytest.approx(0.08)


def test_operations_that_overlap_are_set_apart():
    result = {
        "system": "x",
        "model": "y",
        "stage_cycles": {"A": 100.0},
        "ops": [OPS[0] | {"cycles": 12.0}, OPS[1] | {"cycles": 90.5}],
    }
    first, second = (
        each
        for each in make_events(result, clock_hz=1e9)
        if each["ph"] == "X" and each["tid"] == NPU_LANE
    )
    assert second["ts"] >= first["ts"] + first["dur"]
    assert second["ts"] + second["dur"] <= 0.1 + 1e-9
