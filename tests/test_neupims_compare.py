"""Systems and machines compared in one run, designs that are equal, and knobs without effect."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import neupims
from neupims.__main__ import main
from neupims.exploration.compare import compare
from neupims.exploration.evaluation import make_evaluate
from neupims.exploration.explore import explore
from neupims.exploration.explore_space import explore_space
from neupims.exploration.points import overall, parse_objectives
from neupims.exploration.space import make_space
from neupims.exploration.workloads import make_workloads
from neupims.machine.case import select_system
from neupims.machine.workload import make_batch

BATCH = make_batch(np.random.default_rng(0).integers(1, 900, 64), np.arange(64) % 16)
SYSTEMS = ["neupims", "npu-pim", "gpu"]


@pytest.fixture
def machines(tmp_path):
    """The published machine, and a smaller one."""
    (tmp_path / "small.toml").write_text("[npu]\nnum_arrays = 4\n[hbm]\nnum_channels = 16\n")
    return ["neupims", str(tmp_path / "small.toml")]


def test_a_comparison_is_the_single_runs(machines):
    found = compare(machines, ["gpt3-7b", "gpt3-13b"], BATCH, systems=SYSTEMS)
    assert [(each.system, each.hardware) for each in found.contenders] == [
        (system, machine) for system in SYSTEMS for machine in machines
    ]
    for each in found.contenders:
        system, halves, hardware = select_system(each.system, hardware=each.hardware)
        workloads = make_workloads(["gpt3-7b", "gpt3-13b"], BATCH, dealt=True)
        alone = make_evaluate(workloads, hardware=hardware, system=system, sub_batches=halves)(
            {"npu.num_arrays": jnp.array([hardware.npu.num_arrays])}
        )
        assert each.sub_batches == halves
        for name, value in each.metrics.items():
            assert value == pytest.approx(float(overall(alone[name])[0]), rel=1e-5)
    for winner in found.winners:
        name, _, sense = winner.objective.partition(":")
        values = [each.metrics[name] for each in found.contenders]
        best = (max if sense == "max" else min)(values)
        assert winner.value == best
        assert winner.best == tuple(place for place, value in enumerate(values) if value == best)
        rest = [value for value in values if value != best]
        following = (max if sense == "max" else min)(rest)
        assert winner.lead == pytest.approx(abs(best / following - 1))


def test_what_is_impossible_wins_nothing(tmp_path, machines):
    found = compare(
        machines, "gpt3-7b", BATCH, changes={"npu.scratchpad_bytes": 131072}, systems=SYSTEMS
    )
    assert [each.flagged for each in found.contenders] == [True] * 4 + [False] * 2
    assert all(set(winner.best) <= {4, 5} for winner in found.winners)
    found = compare(machines, "gpt3-7b", BATCH, changes={"npu.scratchpad_bytes": 131072})
    assert all((winner.best, winner.lead) == ((), None) for winner in found.winners)


def test_the_command_prints_the_record_of_the_library(capsys, tmp_path, machines):
    trace = tmp_path / "trace.csv"
    trace.write_text("".join(f"{length}\n" for length in BATCH.seq_lens.tolist()))
    page = tmp_path / "page.html"
    flags = ["--hardware", ",".join(machines), "--system", "neupims, gpu", "--trace", str(trace)]
    aims = ["--objectives", "tokens_per_second:max,area_mm2:min", "--html", str(page)]
    assert main(["explore", *flags, *aims, "--json"]) == 0
    found = compare(
        machines,
        "gpt3-7b",
        trace,
        systems=["neupims", "gpu"],
        objectives="tokens_per_second:max,area_mm2:min",
    )
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.to_dict()))
    content = page.read_text()
    leads = [winner.lead for winner in found.winners]
    assert min(leads) > 0
    assert all(f"{100 * lead:.4g}" in content for lead in leads)
    assert [content.count(f"<h2>{title}") for title in ("Winners", "Systems and machines")] == [
        1
    ] * 2
    assert main(["explore", *flags]) == 0
    out = capsys.readouterr().out
    for words in ("winners", "tokens_per_second_per_mm2:max", "better than the next", "small.toml"):
        assert words in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--system", "neupims,tpu"], "tpu"),
        (["--system", "gpu,gpu"], "each system must be given once: gpu, gpu"),
        (["--hardware", "neupims,"], "each machine|unknown|''"),
        (["--system", "gpu,neupims", "--knob", "npu.num_arrays=2,4"], "--knob is for the designs"),
        (["--system", "gpu,neupims", "--out", "x"], "--out is for the designs"),
        (["--system", "gpu,neupims", "--objectives", "speed:max"], "no metric 'speed'"),
        (["--system", "gpu,neupims", "--sub-batches", "auto"], "auto is for simulate"),
        (["--system", "gpu"], "or give several systems or machines to compare"),
    ],
)
def test_wrong_comparisons_are_refused_in_one_line(capsys, flags, words):
    assert main(["explore", "--trace", "const:100x8", *flags]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert any(each in err for each in words.split("|"))


def plane(columns):
    """Speed is arrays times channels, cost their sum; tRCD does not act below 15 cycles."""
    arrays, channels = columns["npu.num_arrays"] * 1.0, columns["hbm.num_channels"] * 1.0
    late = jnp.maximum(columns["hbm.trcd_read_cycles"], 15.0)
    return {
        "speed": (arrays * channels / late)[:, None],
        "cost": (arrays + channels)[:, None],
    }


def test_equal_designs_count_once_with_their_twins():
    """tRCD of 10, 12 and 15 are the same design: two twins each. 2 arrays with 4 channels and 4
    with 2 have equal metrics, but both knobs act: they are two designs.
    """
    space = make_space(
        {
            "npu.num_arrays": [2, 4],
            "hbm.num_channels": [2, 4],
            "hbm.trcd_read_cycles": [10, 12, 15, 20],
        }
    )
    options = {"method": "grid", "sensitivity_of": "speed"}
    found = explore_space(space, plane, parse_objectives("speed:max,cost:min"), **options)
    designs = {tuple(row[:2]) for row in found.front.values.tolist()}
    assert designs == {(2, 2), (2, 4), (4, 2), (4, 4)}
    assert found.twins.tolist() == [2] * 4
    assert set(found.front.values[:, 2]) <= {10, 12, 15}


def test_the_design_nearest_the_base_stands_for_its_twins():
    """The base has 14 cycles of tRCD; fewer than 15 do not act."""
    space = make_space({"npu.num_arrays": [2, 4], "hbm.trcd_read_cycles": [10, 14, 20]})

    def evaluate(columns):
        late = jnp.maximum(columns["hbm.trcd_read_cycles"], 15.0)
        return {"speed": (columns["npu.num_arrays"] / late)[:, None]}

    found = explore_space(
        space, evaluate, parse_objectives("speed:max"), method="grid", sensitivity_of="speed"
    )
    assert (found.front.values.tolist(), found.twins.tolist()) == ([[4, 14]], [1])


@pytest.mark.parametrize(
    ("knobs", "system", "idle"),
    [
        ({"npu.num_cores": [1, 2]}, "neupims", "npu.num_cores has no effect"),
        ({"pim.gwrite_bursts": (8, 32)}, "gpu", "pim.gwrite_bursts has no effect"),
        (
            {"pim.least_products": [4, 6], "pim.gwrite_bursts": (8, 32), "npu.num_arrays": [4, 8]},
            "npu-only",
            "pim.least_products and pim.gwrite_bursts have no effect",
        ),
    ],
)
def test_knobs_without_effect_are_refused(knobs, system, idle):
    with pytest.raises(ValueError, match=idle):
        explore("neupims", "gpt3-7b", BATCH, knobs, system=system, points=4)


def test_a_knob_that_decides_what_is_possible_acts():
    """With 64 rows a bank the memory does not hold the model."""
    knobs = {"hbm.rows": [64, 32768]}
    found = explore("neupims", "gpt3-7b", BATCH, knobs, method="grid", system="npu-only")
    assert (found.points, found.flagged) == (2, 1)
    assert neupims.compare is compare
