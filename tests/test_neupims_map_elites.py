"""Maps of elites: cells, the best design in each, MAP-Elites against a whole grid, and the tool."""

import csv
import io
import json
import re

import numpy as np
import pytest
from test_neupims_explore_space import SPEED_AND_COST, speed_and_cost

from neupims.__main__ import main
from neupims.exploration.chunks import Chunks
from neupims.exploration.elites import Axis, Elites, parse_axes
from neupims.exploration.evaluator import Evaluator, Measure
from neupims.exploration.explore import explore
from neupims.exploration.explore_space import explore_space
from neupims.exploration.methods import illuminate
from neupims.exploration.points import Objective, Points, costs, overall
from neupims.exploration.sampling import grid_size, sample
from neupims.exploration.space import make_space
from neupims.machine.workload import make_batch

SMALL = {
    "npu.num_arrays": {"low": 2, "high": 9},
    "hbm.num_channels": [1, 2, 4, 8],
    "hbm.trcd_read_cycles": [10, 15, 20],
}
AXES = parse_axes("cost=3:17,speed=0.25:16", "6x5")


def run(space=None, **options):
    space = space or make_space(SMALL, ["npu.num_arrays * hbm.num_channels <= 40"])
    options = {"points": 2048, "chunk": 64, "axes": AXES, "sensitivity_of": "speed"} | options
    return explore_space(space, speed_and_cost, SPEED_AND_COST, method="map-elites", **options)


def test_cells_begin_at_their_edges_and_the_outermost_are_open():
    values = np.array([0.1, 1, 1.999, 2, 3.999, 4, 8, 15.9, 16, 1000])
    axis = Axis("a", 1, 16, cells=4)
    assert axis.edges == pytest.approx([1, 2, 4, 8, 16])
    assert axis.place(values).tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]
    linear = Axis("a", 0, 16, log=False, cells=4)
    assert linear.edges.tolist() == [0, 4, 8, 12, 16]
    assert linear.place(values).tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 3, 3]
    edges = Axis("a", 0.7, 90.0, cells=37).edges
    assert Axis("a", 0.7, 90.0, cells=37).place(edges).tolist() == [*range(37), 36]


def test_axes_begin_and_end_at_the_first_designs():
    found = Axis("a", cells=5).fit(np.array([3.0, 2, 8]))
    assert (found.low, found.high, found.cells) == (2, 8, 5)
    assert found.fit(np.array([1.0, 100])) == found
    same = Axis("a", cells=5).fit(np.array([3.0, 3]))
    assert (same.cells, same.place(np.array([1.0, 3, 9])).tolist()) == (1, [0, 0, 0])


def test_each_cell_has_the_best_design_of_the_grid():
    """3 and 5 arrays are impossible, and the product of arrays and channels is at most 40."""
    found = run()
    space = make_space(SMALL)
    grid = sample(space, "grid", 0, grid_size(space))
    best = {}
    for arrays, channels, trcd in grid:
        if arrays in (3, 5) or arrays * channels > 40:
            continue
        cost, speed = arrays + channels, 2 * arrays * channels / trcd
        i = sum(cost >= edge for edge in AXES[0].edges[1:-1])
        j = sum(speed >= edge for edge in AXES[1].edges[1:-1])
        best[i, j] = max(best.get((i, j), 0), speed)
    elites = found.elites
    cells = map(tuple, elites.cells_of(elites.points).tolist())
    assert len(best) > 12
    assert dict(zip(cells, overall(elites.points.metrics["speed"]), strict=True)) == pytest.approx(
        best, rel=1e-5
    )
    assert (elites.points.violation == 0).all()
    assert not np.isin(elites.points.values[:, 0], (3, 5)).any()
    assert space.values(elites.units).tolist() == elites.points.values.tolist()
    # The front is that of all designs, as with other methods.
    whole = explore_space(
        make_space(SMALL, ["npu.num_arrays * hbm.num_channels <= 40"]),
        *(speed_and_cost, SPEED_AND_COST),
        method="grid",
        sensitivity_of="speed",
    )
    assert sorted(found.front.values.tolist()) == sorted(whole.front.values.tolist())


def test_the_seed_decides_and_a_run_that_resumes_breeds_the_same(tmp_path):
    whole = run(points=512, seed=3)
    run(points=192, seed=3, folder=tmp_path)
    resumed = run(points=512, seed=3, folder=tmp_path)
    other = run(points=512, seed=4)
    for name in ("place", "values"):
        one, two = (getattr(each.elites.points, name) for each in (whole, resumed))
        assert np.array_equal(one, two)
    assert not np.array_equal(whole.elites.points.place, other.elites.points.place)
    with pytest.raises(ValueError, match=r"another run \(axes\)"):
        run(points=512, seed=3, folder=tmp_path, axes=parse_axes("cost,speed", "4"))


def test_of_equal_designs_the_first_stays_and_the_smallest_can_be_best():
    def points(first, speeds, costs_):
        n = len(speeds)
        metrics = {
            name: np.array(each)[:, None] for name, each in (("speed", speeds), ("cost", costs_))
        }
        return Points(first + np.arange(n), np.zeros((n, 1)), metrics, np.zeros(n), np.zeros(n))

    elites = Elites(parse_axes("speed=1:4,cost=1:4", "2"), Objective("cost", False))
    units = np.arange(3.0)[:, None]
    elites.update(points(0, [1.0, 1, 3], [1.5, 1.25, 3]), units)
    elites.update(points(3, [1.0, 3, 3], [1.25, 2.5, 2.5]), units + 3)
    assert elites.points.place.tolist() == [1, 4]
    assert elites.units.ravel().tolist() == [1, 4]
    assert costs(elites.points, [elites.objective]).ravel().tolist() == [1.25, 2.5]


def test_a_single_design_that_meets_the_constraints_does_not_set_the_range():
    """The first three are possible, the last one is not."""
    values = {"speed": np.array([[2.0], [4], [8], [99]]), "cost": np.array([[3.0], [5], [9], [99]])}
    violation, code = np.array([1.0, 0, 1, np.inf]), np.array([0, 0, 0, 3])
    part = Points(np.arange(4), np.zeros((4, 1)), values, violation, code)
    elites = Elites(parse_axes("speed,cost", "4"), Objective("cost", False))
    elites.update(part, np.zeros((4, 1)))
    ends = [end for axis in elites.axes for end in (axis.low, axis.high)]
    assert ends == pytest.approx([2, 8, 3, 9])
    assert elites.points.place.tolist() == [1]


def test_while_nothing_meets_the_constraints_the_space_is_sampled_on():
    found = run(make_space(SMALL, ["speed < 0"], metrics=["speed"]), points=128)
    assert (found.kept, len(found.elites.points.place), found.elites.columns()) == (0, 0, {})
    knobs = {"npu.num_arrays": {"low": 6, "high": 9000}, "hbm.num_channels": [1, 2]}
    drawn = sample(make_space(knobs), "sobol", 0, 64, seed=1)
    space = make_space(knobs, [f"npu.num_arrays == {drawn[20, 0]}"])
    evaluator = Evaluator(
        space, lambda found: speed_and_cost(found | {"hbm.trcd_read_cycles": 10.0}), 16
    )
    elites = Elites(AXES, Objective("speed", True))
    parts = list(illuminate(evaluator, elites, 64, 16, 1, Chunks(None)))
    assert np.array_equal(np.concatenate([part.values for part in parts[:2]]), drawn[:32])
    assert not np.array_equal(parts[2].values, drawn[32:48])
    assert elites.points.values[0, 0] == drawn[20, 0]


@pytest.mark.parametrize(
    ("text", "cells", "words"),
    [
        ("area_mm2", "4", "two axes"),
        ("area_mm2=5:2,b", "4", "LOW below HIGH"),
        ("area_mm2=0:2,b", "4", "above 0 unless it is linear"),
        ("area_mm2=nan:2,b", "4", "LOW below HIGH"),
        ("area_mm2:log,b", "4", "an axis is NAME"),
        ("area_mm2=1:x,b", "4", "an axis is NAME"),
        ("a,b", "0x4", "1 to 1024 cells, not 0"),
        ("a,b", "4x2000", "1 to 1024 cells, not 2000"),
        ("a,b", "4x4x4", "cells are N or NxM"),
    ],
)
def test_impossible_axes_are_refused(text, cells, words):
    with pytest.raises(ValueError, match=words):
        parse_axes(text, cells)


def test_axes_are_of_metrics_and_of_one_method():
    batch, knobs = make_batch([5], [0]), {"npu.num_arrays": [4]}
    for options, words in (
        ({"axes": parse_axes("size,power_watts"), "method": "map-elites"}, "no metric 'size'"),
        ({"axes": AXES}, "the axes of a map are for the method map-elites, not for sobol"),
        ({"axes": "a,b", "method": "map-elites"}, "two axes, records that .* not 'a,b'"),
        ({"axes": AXES[:1], "method": "map-elites"}, "a map has two axes"),
        ({"axes": parse_axes("cost,cost"), "method": "map-elites"}, "not cost twice"),
    ):
        with pytest.raises(ValueError, match=words):
            explore("neupims", "gpt3-7b", batch, knobs, **options)


def test_an_axis_that_begins_at_0_says_that_its_cells_have_equal_widths():
    def from_zero(columns):
        return {"idle": columns["npu.num_arrays"][:, None] - 2}

    options = {
        "method": "map-elites",
        "points": 64,
        "chunk": 32,
        "measures": [Measure(("idle",), from_zero)],
    }
    knobs, batch = {"npu.num_arrays": [2, 4, 8], "hbm.num_channels": [16, 32]}, make_batch([5], [0])
    found = explore(
        "neupims", "gpt3-7b", batch, knobs, axes=parse_axes("area_mm2,idle", "4"), **options
    )
    assert found.warnings == [
        "the axis idle has cells of equal widths, not of equal ratios, because it begins at 0:"
        " write idle:linear, or idle=LOW:HIGH with LOW above 0"
    ]
    for axes in ("area_mm2,idle:linear", "area_mm2,idle=1:8"):
        found = explore("neupims", "gpt3-7b", batch, knobs, axes=parse_axes(axes), **options)
        assert found.warnings == []


def test_a_map_without_a_design_is_a_sentence(capsys, tmp_path):
    flags = ["explore", "--trace", "const:300x64", "--knob", "npu.num_arrays=2:16"]
    flags += ["--method", "map-elites", "--points", "8", "--chunk", "4", "--index-rows", "0"]
    page = tmp_path / "page.html"
    assert main([*flags, "--constraint", "area_mm2 < 1", "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert "The map has no design, because none meets the constraints." in text
    assert "cells have a design" not in text


def test_the_command_prints_the_map_and_writes_page_and_csv(capsys, tmp_path):
    flags = [
        *("explore", "--trace", "const:300x64", "--knob", "npu.num_arrays=2:16"),
        *("--knob", "npu.clock_hz=0.7e9:1.5e9:log", "--method", "map-elites", "--points", "512"),
        *("--cells", "5x4", "--axes", "area_mm2:linear,power_watts"),
        *("--html", str(tmp_path / "page.html"), "--out", str(tmp_path / "out")),
    ]
    assert main(flags) == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["elite_map"]
    text = capsys.readouterr().out
    assert f"{len(found['elites'])} of 20 cells have a design" in text
    table = text[text.index("best tokens_per_second by") : text.index("of 20 cells")]
    assert table.count("\n│") == len({each["cell"][0] for each in found["elites"]})
    assert found["axes"] == ["area_mm2", "power_watts"]
    assert found["log"] == [False, True]
    assert [len(each) for each in found["edges"]] == [6, 5]
    assert np.ptp(np.diff(found["edges"][0])) < 1e-6
    assert np.ptp(np.diff(np.log(found["edges"][1]))) < 1e-9
    assert (found["size"], found["objective"]) == (20, "tokens_per_second:max")
    for elite in found["elites"]:
        for axis, place, edges in zip(found["axes"], elite["cell"], found["edges"], strict=True):
            value = elite["design"]["metrics"][axis]
            assert place == 0 or edges[place] <= value
            assert place == len(edges) - 2 or value < edges[place + 1]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "map.csv").read_text())))
    assert [int(row["index"]) for row in rows] == [
        each["design"]["index"] for each in found["elites"]
    ]
    assert list(rows[0])[:3] == ["cell of area_mm2", "area_mm2 from", "area_mm2 to"]
    page = (tmp_path / "page.html").read_text()
    chart = page[page.index("<h2>Best tokens_per_second by area_mm2 and power_watts") :]
    chart = chart[: chart.index("</svg>")]
    assert len(re.findall("<title>", chart)) == len(found["elites"])
    assert f"{len(found['elites'])} of 20 cells have a design" in chart
