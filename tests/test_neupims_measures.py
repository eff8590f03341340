"""Measures: further metrics of designs, which are refused where they are not what they promise, are
computed only where they matter, and are kept with the other results.
"""

import numpy as np
import pytest
from test_neupims_explore_space import SPACE, arrays_of, run, speed_and_cost

from neupims.exploration.elites import parse_axes
from neupims.exploration.evaluator import NOT_FINITE, Evaluator, Measure
from neupims.exploration.explore_space import explore_space
from neupims.exploration.points import overall, parse_objectives
from neupims.exploration.space import make_space


def test_a_measure_is_an_objective_like_any_metric():
    """Its designs are those that are possible; it may find further ones impossible."""
    seen = []

    def slack(columns):
        seen.append(columns)
        arrays, channels = columns["npu.num_arrays"], columns["hbm.num_channels"]
        return {
            "slack": np.stack([arrays - channels + 10, 4 * (arrays - channels + 10)], axis=1),
            "flagged": np.stack([arrays == 9, 0 * arrays], axis=1) * 7,
        }

    measure = Measure(("slack",), slack, workloads=2)
    objectives = parse_objectives("slack:max,speed:max")
    for method in ("grid", "evolution"):
        seen.clear()
        found = explore_space(
            *(SPACE, speed_and_cost, objectives),
            method=method,
            sensitivity_of="slack",
            measures=[measure],
            points=None if method == "grid" else 512,
            seed=1,
        )
        arrays, channels, _ = found.front.values.T
        assert overall(found.front.metrics["slack"]) == pytest.approx(2 * (arrays - channels + 10))
        assert arrays.max() == 8
        assert set(zip(arrays, channels, strict=True)) == {(8, 1), (8, 2), (8, 4), (8, 8)}
        assert not any(np.isin(each["npu.num_arrays"], (3, 5)).any() for each in seen)
    grid = explore_space(
        *(SPACE, speed_and_cost, objectives),
        method="grid",
        sensitivity_of="slack",
        measures=[measure],
    )
    assert grid.flagged_by_code == {1: 20, NOT_FINITE: 20, 7: 20}


def test_a_folder_knows_the_settings_of_measures(tmp_path):
    def ones(columns):
        return {"one": np.ones((len(columns["npu.num_arrays"]), 1))}

    def explored(settings):
        return run(points=8, folder=tmp_path, measures=[Measure(("one",), ones, settings=settings)])

    explored({"rate": 3})
    explored({"rate": 3})
    with pytest.raises(ValueError, match=r"another settings \(measures\)"):
        explored({"rate": 4})


@pytest.mark.parametrize("method", ["sobol", "evolution", "map-elites"])
def test_a_finished_run_that_resumes_evaluates_nothing(tmp_path, monkeypatch, method):
    def slack(columns):
        arrays, channels = columns["npu.num_arrays"], columns["hbm.num_channels"]
        return {"slack": (arrays - channels + 10)[:, None]}

    space = make_space(dict(SPACE.describe()["knobs"]) | {"hbm.trcd_read_cycles": [10.0, 20.0]})
    options = {"method": method, "points": 32, "chunk": 16, "index_rows": 4, "folder": tmp_path}
    options |= {"measures": [Measure(("slack",), slack)], "sensitivity_of": "speed"}
    if method == "map-elites":
        options["axes"] = parse_axes("speed,cost", "3")
    objectives = parse_objectives("slack:max,cost:min")
    first = explore_space(space, speed_and_cost, objectives, **options)

    def forbidden(*_):
        raise AssertionError("a design is evaluated anew")

    monkeypatch.setattr(Evaluator, "__call__", forbidden)
    again = explore_space(space, speed_and_cost, objectives, **options)
    for one, two in zip(arrays_of(first), arrays_of(again), strict=True):
        assert np.array_equal(one, two)
    assert str(again.indices) == str(first.indices)  # with NaN
    assert str(again.ablations) == str(first.ablations)
    assert first.ablations
    assert np.array_equal(again.base.values, first.base.values)
    assert not list((tmp_path / "beside").glob("*.part"))


def measured(constraints, *, method="grid", names=("slack",), **options):
    """The designs that a measure saw, as pairs of arrays and channels, and the result."""
    seen = []

    def slack(columns):
        seen.extend(zip(columns["npu.num_arrays"], columns["hbm.num_channels"], strict=True))
        return {"slack": (columns["npu.num_arrays"] + 1.0)[:, None]}

    knobs = {"npu.num_arrays": [8, 2, 4, 6], "hbm.num_channels": [1, 2, 4, 8]}
    space = make_space(
        knobs | {"hbm.trcd_read_cycles": [10]}, constraints, metrics=["cost", "speed", *names]
    )
    found = explore_space(
        *(space, speed_and_cost, parse_objectives("slack:max,speed:max")),
        method=method,
        measures=[Measure(names, slack)],
        **{"sensitivity_of": "speed"} | options,
    )
    return set(seen), found


def test_designs_that_violate_constraints_are_not_measured():
    """But the base design is, and the changes of the best one, which are told."""
    kept = {(a, c) for a in (2, 4, 6, 8) for c in (1, 2, 4, 8) if a + c < 7}
    seen, found = measured(["cost < 7", "slack > 3.5"])
    assert found.kept == sum(a > 2 for a, _ in kept)
    told = {(8, 8)}  # the base design has 32 channels, which is moved into the space
    for ablation in found.ablations:
        best = ablation.best.knobs
        for change in ablation.changes:
            knobs = best | {change.knob: change.after}
            told.add((knobs["npu.num_arrays"], knobs["hbm.num_channels"]))
            assert np.isfinite(change.metrics["slack"])
    assert seen == kept | told
    every = {(a, c) for a in (2, 4, 6, 8) for c in (1, 2, 4, 8)}
    assert measured(["cost < 7"], sensitivity_of="slack")[0] >= every
    # Evolution ranks by violation, that of the measure too, where a constraint asks for it.
    options = {"method": "evolution", "points": 256, "chunk": 64}
    assert measured(["cost < 7", "slack > 3.5"], **options)[0] >= every
    assert measured(["cost < 7"], **options)[0] == measured(["cost < 7"])[0]


def test_evolution_finds_the_same_without_measuring_what_violates(monkeypatch):
    options = {"method": "evolution", "points": 128, "chunk": 32, "seed": 2}
    sparing = measured(["cost < 9"], **options)[1]
    monkeypatch.setattr(Evaluator, "measuring", lambda self, _: self)
    for one, two in zip(
        arrays_of(sparing), arrays_of(measured(["cost < 9"], **options)[1]), strict=True
    ):
        assert np.array_equal(one, two)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            lambda n: {},
            "must return these metrics, and may return flagged, but it returned nothing",
        ),
        (lambda n: {"a": np.ones((n, 1))}, "measure of a, b .* but it returned a$"),
        (lambda n: dict.fromkeys("abc", np.ones((n, 1))), "but it returned a, b, c"),
        (lambda n: dict.fromkeys("ab", np.ones((n + 1, 1))), r"a as numbers of the shape \(\d+, 1"),
        (lambda n: dict.fromkeys("ab", np.ones(n)), r"float64 of the shape \(\d+,\)"),
        (lambda n: dict.fromkeys("ab", 1.0), r"float64 of the shape \(\)"),
        (lambda n: dict.fromkeys("ab", np.full((n, 1), "x")), "not <U1 of the shape"),
        (lambda n: [1.0], "must return arrays by name, not list"),
        (
            lambda n: dict.fromkeys("ab", np.ones((n, 1))) | {"flagged": np.full((n, 1), 99)},
            "may flag with codes from 0 to 12, or -1, .* not 99 to 99",
        ),
    ],
)
def test_a_measure_that_returns_something_else_is_refused(found, words):
    measure = Measure(("a", "b"), lambda columns: found(len(columns["npu.num_arrays"])))
    with pytest.raises(ValueError, match=words):
        run(points=8, measures=[measure])


@pytest.mark.parametrize("name", ["speed", "other", "npu.num_arrays", "npu.clock_hz"])
def test_a_measure_has_names_of_its_own(name):
    measures = [Measure((each,), None) for each in ("other", name)]
    with pytest.raises(ValueError, match=f"a measure cannot be called {name}: a metric, a knob"):
        run(points=8, measures=measures)


@pytest.mark.parametrize("names", [(), "ab", ("a", "a"), ("",), ("flagged",), (3,)])
def test_a_measure_without_names_is_refused(names):
    with pytest.raises(ValueError, match="a tuple of different texts"):
        Measure(names, None)


@pytest.mark.parametrize(
    ("value", "flag", "words"),
    [
        (0.0, 0, r"slack of the base design is 0 \(too slow\), so nothing can be compared with it"),
        (-1.0, 0, "slack of the base design is nan, so nothing"),
        (1.0, 8, "has no slack, .*: weights exceed the memory; choose a base design"),
    ],
)
def test_a_base_design_without_a_metric_says_why(value, flag, words):
    def slack(columns):
        ones = np.ones((len(columns["npu.num_arrays"]), 1))
        return {"slack": np.nan * ones if flag else value * ones, "flagged": flag * ones}

    measure = Measure(("slack",), slack, zero="too slow")
    with pytest.raises(ValueError, match=words):
        explore_space(
            *(SPACE, speed_and_cost, parse_objectives("slack:max")),
            points=8,
            sensitivity_of="speed",
            measures=[measure],
        )


def test_a_reference_of_another_name_says_which_there_are():
    with pytest.raises(ValueError, match="names area, which is not an objective; there are speed,"):
        run(points=8, reference={"area": 1.0})
