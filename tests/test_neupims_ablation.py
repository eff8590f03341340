"""Ablation of the best designs: by hand, with constraints, impossible changes, and measures."""

import re

import numpy as np
import pytest
from test_neupims_explore_space import SPEED_AND_COST, speed_and_cost

from neupims.__main__ import main
from neupims.exploration.ablation import HIGHER, LOWER, MACHINE
from neupims.exploration.evaluator import Measure
from neupims.exploration.explore_space import explore_space
from neupims.exploration.impossible import REASONS
from neupims.exploration.points import parse_objectives
from neupims.exploration.space import make_space

KNOBS = {
    "npu.num_arrays": {"low": 2, "high": 9},
    "hbm.num_channels": [1, 2, 4, 8],
    "hbm.trcd_read_cycles": {"low": 10.0, "high": 20.0},
}
LIMIT = "npu.num_arrays * hbm.num_channels <= 40"


def changes_of(ablation):
    return [(each.knob.rpartition(".")[2], each.kind, each.after) for each in ablation.changes]


def test_the_fastest_and_the_cheapest_design_by_hand():
    """Speed is arrays times channels over tRCD: 9 x 4 / 10 within the limit. The machine has 8
    arrays, 32 channels and tRCD 14.
    """
    space = make_space(KNOBS, [LIMIT])
    fastest, cheapest = explore_space(
        *(space, speed_and_cost, SPEED_AND_COST), method="grid", sensitivity_of="speed"
    ).ablations
    assert fastest.objective == "speed:max"
    assert list(fastest.best.knobs.values()) == [9, 4, 10]
    assert changes_of(fastest) == [
        ("num_channels", LOWER, 2),
        ("trcd_read_cycles", MACHINE, 14),
        ("num_arrays", MACHINE, 8),
        ("trcd_read_cycles", HIGHER, 11),
        ("num_channels", HIGHER, 8),
        ("num_channels", MACHINE, 32),
    ]
    ratios = [each.ratios["speed"] for each in fastest.changes]
    assert ratios == pytest.approx([1 / 2, 10 / 14, 8 / 9, 10 / 11, 2, 8])
    assert [each.ratios["cost"] for each in fastest.changes[:3]] == pytest.approx(
        [11 / 13, 1, 12 / 13]
    )
    assert [each.fault for each in fastest.changes] == [""] * 4 + [f"violates {LIMIT}"] * 2
    assert list(cheapest.best.knobs.values())[:2] == [2, 1]
    worst = cheapest.changes[0]
    assert (worst.knob, worst.after, worst.ratios["cost"]) == ("hbm.num_channels", 32, 34 / 3)
    impossible = cheapest.changes[-1]
    assert (impossible.knob, impossible.after, impossible.ratios) == ("npu.num_arrays", 3, {})
    assert impossible.fault == f"impossible: {REASONS[1]}"
    row = fastest.table()[0]
    assert row == ("hbm.num_channels", "4 -> 2", LOWER, "-50.00", "")
    assert len(row) == len(fastest.titles)


def test_without_a_design_there_is_none():
    space = make_space(KNOBS, ["speed < 0"], metrics=["speed"])
    found = explore_space(
        *(space, speed_and_cost, SPEED_AND_COST), points=16, sensitivity_of="speed"
    )
    assert found.ablations == ()


def test_an_objective_may_be_a_measure_which_effects_need_not():
    """Whether a knob acts is asked of measures only where no other metric shows it."""
    asked = []

    def slack(columns):
        asked.append(len(columns["npu.num_arrays"]))
        return {"slack": (40 - columns["npu.num_arrays"] - columns["hbm.trp_cycles"])[:, None]}

    options = {
        "method": "grid",
        "sensitivity_of": "speed",
        "measures": [Measure(("slack",), slack)],
    }
    objectives = parse_objectives("slack:max,speed:max")
    plain = KNOBS | {"hbm.trp_cycles": [14]}
    (ablation, _) = explore_space(
        make_space(plain), speed_and_cost, objectives, **options
    ).ablations
    assert ablation.best.metrics["slack"] == pytest.approx(24)
    assert ablation.changes[0].ratios["slack"] == pytest.approx(18 / 24)
    assert asked[0] <= 1 + 2 * 4  # the base design and its neighbours come first
    asked.clear()
    acting = KNOBS | {"hbm.trp_cycles": [10, 1]}  # acts on the slack alone
    explore_space(make_space(acting), speed_and_cost, objectives, **options)
    assert 1 + 2 * 4 < asked[0] <= 16 * (1 + 4)  # that knob in 16 designs comes before
    with pytest.raises(ValueError, match=r"hbm\.trp_cycles has no effect"):
        explore_space(
            make_space(acting), speed_and_cost, SPEED_AND_COST, sensitivity_of="speed", points=16
        )


def test_the_command_prints_them_and_the_page_has_them(capsys, tmp_path):
    flags = ["--trace", "const:300x64", "--knob", "npu.num_arrays=2:16", "--points", "64"]
    flags += ["--knob", "hbm.tfaw_cycles=12,30", "--constraint", "npu.num_arrays <= 8"]
    page = tmp_path / "page.html"
    assert main(["explore", *flags, "--index-rows", "0", "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert "Why is this design best" in text
    assert re.search(r"hbm\.tfaw_cycles\W+12 -> 30\W+the machine's", text)
    assert "violates npu.num_arrays <= 8" in text
    shown = page.read_text()
    assert shown.count("<h2>Why is this design best?") == 3
    assert "Sobol indices" not in text + shown
    assert np.isfinite(float(re.search(r"12 -> 30\W+the machine's\W+(-[\d.]+)", text)[1]))
