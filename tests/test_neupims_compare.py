"""Systems and machines compared in one run, designs that are equal, and knobs without effect."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import neupims
from neupims.__main__ import main
from neupims.envelope import describe_percent
from neupims.exploration.compare import compare
from neupims.exploration.evaluation import make_evaluate
from neupims.exploration.explore import explore
from neupims.exploration.explore_space import explore_space
from neupims.exploration.points import overall, parse_objectives
from neupims.exploration.space import make_space
from neupims.exploration.workloads import deal, make_workloads
from neupims.machine.case import select_system
from neupims.machine.workload import Decoder, make_batch

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
        (["--system", "gpu,gpu"], "each system must be given once: gpu and gpu are the same"),
        (["--system", "gpu, GPU"], "each system must be given once: gpu and GPU are the same"),
        (["--system", "NeuPIMs,neupims_sbi"], "once: NeuPIMs and neupims_sbi are the same"),
        (["--hardware", "neupims,Neupims"], "each machine must be given once: neupims and Neupims"),
        (["--hardware", "neupims,"], "each machine needs a name, not 'neupims', ''"),
        (["--system", ",gpu"], "each system needs a name, not '', 'gpu'"),
        (["--system", "gpu,neupims", "--knob", "npu.num_arrays=2,4"], "--knob is for the designs"),
        (["--system", "gpu,neupims", "--out", "x"], "--out is for the designs"),
        (["--system", "gpu,neupims", "--points", "0"], "--points is for the designs"),
        (["--system", "gpu,neupims", "--method", "grid"], "--method is for the designs"),
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


def test_a_file_by_two_paths_is_one_machine(tmp_path, machines):
    (tmp_path / "link.toml").symlink_to(machines[1])
    for again in (tmp_path / "link.toml", f"{tmp_path}/../{tmp_path.name}/small.toml"):
        with pytest.raises(ValueError, match=r"once: .*small.toml and .* are the same"):
            compare([machines[1], again], "gpt3-7b", BATCH)


def test_a_row_has_what_simulate_says(tmp_path, monkeypatch):
    """64 requests of 600 tokens exceed 6 GiB beside the weights; one scratchpad is too small for an
    NPU, but a GPU has none.
    """
    sizes = {"small": "[hbm]\nnum_channels = 16\nrows = 12288\n"}
    sizes |= {"tiny": "[npu]\nscratchpad_bytes = 131072\n"}
    for name, text in sizes.items():
        (tmp_path / f"{name}.toml").write_text(text)
    machines = ["neupims", *(str(tmp_path / f"{name}.toml") for name in sizes)]
    batch = make_batch(np.full(64, 600), np.arange(64) % 16)
    changes = {"gpu.die_mm2": 900}
    found = compare(machines, "gpt3-7b", batch, systems=["npu-only", "gpu"], changes=changes)
    times = SimpleNamespace(iteration_seconds=0.0)  # which are slow, and not compared here
    monkeypatch.setattr("neupims.simulation.run_case", lambda case, path: times)
    assert [each.fidelity for each in found.contenders] == ["simulator"] * 6
    for each in (*found.contenders[:2], found.contenders[3]):
        machine = {"system": each.system, "hardware": each.hardware, "changes": changes}
        dealt = deal(batch.seq_lens, int(select_system(**machine)[2].hbm.num_channels))
        case = neupims.make_case("gpt3-7b", dealt, **machine)
        run = neupims.simulate_case(case, path="closed", allow_overflow=True)
        assert list(each.warnings) == run.warnings
        assert each.expected_error == run.expected_error
    first, second, third, *gpus = found.contenders
    assert first.trust == describe_percent(first.expected_error.percent)
    assert "would not fit" in second.warnings[0]
    assert second.flagged_by_reason == {"the batch exceeds the memory beside the weights": 1}
    scratchpad = "the scratchpad holds no three blocks as wide as an array"
    assert third.flagged_by_reason == {scratchpad: 1}
    assert third.trust == f"left out: {scratchpad}"
    assert not any(each.flagged for each in gpus)
    assert gpus[0].trust == "not validated: a GPU, which the public simulator does not run"
    assert found.flagged == sum(found.flagged_by_reason.values()) == 2
    listed = found.to_dict()
    assert listed["contenders"][0]["expected_error"] == first.expected_error.percent
    assert listed["contenders"][5]["not_validated"] == list(gpus[2].expected_error.not_validated)
    assert listed["flagged_by_reason"] == found.flagged_by_reason
    assert any(each.startswith("npu-only on neupims, npu-only on") for each in found.warnings)


def test_rows_that_are_left_out_are_counted_and_warned_of(capsys, tmp_path, monkeypatch):
    changes = {"npu.scratchpad_bytes": 131072, "npu.num_cores": 2}
    machines = ["neupims", "npu-pim"]
    found = compare(machines, "gpt3-7b", "const:100x8", systems="npu-only", changes=changes)
    monkeypatch.setattr("neupims.exploration.compare.compare", lambda *given, **options: found)
    page = tmp_path / "page.html"
    flags = ["explore", "--trace", "const:100x8", "--hardware", "neupims,npu-pim"]
    assert main([*flags, "--html", str(page)]) == 0
    out, err = capsys.readouterr()
    assert "npu-only on neupims, npu-only on npu-pim: npu.scratchpad_bytes" not in err
    assert "warning: npu-only on neupims, npu-only on npu-pim: npu.num_cores differs" in err
    assert "2 of 2 are left out:\n  2: the scratchpad holds no three blocks" in out
    assert out.count("none") == 6  # the winners, none of which has a lead
    content = page.read_text()
    for words in ("left out: the scratchpad holds", "npu.num_cores differs", "<h2>Warnings"):
        assert words in content
    assert main([*flags, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(found.to_dict()))
    assert [f"neupims: warning: {each}" for each in printed["warnings"]] == err.splitlines()


def test_a_system_that_is_not_timed_leaves_the_others():
    """The public simulator has no latent attention, a GPU does."""
    model = Decoder(2, 512, 4, 4, 1024, head_dim=64, kv_rank=128, rope_dim=32)
    found = compare("neupims", model, BATCH, systems=["npu-pim", "gpu"])
    first, second = found.contenders
    (reason,) = found.flagged_by_reason
    assert reason.startswith("not timed: latent attention (kv_rank) needs the fidelity intended")
    assert first.flagged_by_reason == {reason: 1}
    assert not second.flagged
    assert {each.best for each in found.winners} == {(1,)}
    assert found.to_dict()["contenders"][0]["metrics"]["power_watts"] is None


def test_a_file_whose_name_has_a_comma_is_one_machine(capsys, tmp_path):
    (tmp_path / "a,b.toml").write_text("[npu]\nnum_arrays = 4\n")
    assert (
        main(["explore", "--trace", "const:100x8", "--hardware", str(tmp_path / "a,b.toml")]) == 1
    )
    assert "give the space" in capsys.readouterr().err


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
