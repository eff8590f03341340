"""`neupims explore` on traces with and without channels."""

import json

import pytest

from neupims.__main__ import main
from neupims.exploration.explore import explore
from neupims.exploration.workloads import make_workloads
from neupims.machine.config import load_model
from neupims.machine.traces import read_requests
from neupims.machine.workload import Parallel, make_batch

KNOBS = {"npu.num_arrays": [4, 8], "hbm.num_channels": [8, 16]}


def test_dealt_requests_need_no_channels_and_ignore_those_they_have(tmp_path):
    """Channels 40 and 50 do not exist on any of the designs."""
    (tmp_path / "far.csv").write_text("seq_len,ch_idx\n300,40\n40,50\n")
    (tmp_path / "none.csv").write_text("300\n40\n")
    batch = make_batch([300, 40], [40, 50], num_channels=64)
    fronts = [
        explore("neupims", "gpt3-7b", trace, KNOBS, method="grid").front
        for trace in (tmp_path / "far.csv", tmp_path / "none.csv", batch)
    ]
    assert fronts[0] == fronts[1] == fronts[2]
    for trace, words in ((tmp_path / "far.csv", "not 40"), (tmp_path / "none.csv", "no channels")):
        with pytest.raises(ValueError, match=f"{words}.*--schedule dealt"):
            explore("neupims", "gpt3-7b", trace, KNOBS, schedule="trace")
    with pytest.raises(ValueError, match="must be a Batch"):
        make_workloads("gpt3-7b", [3], dealt=True)


def test_notes_are_in_the_record_and_on_standard_error(capsys, tmp_path):
    (tmp_path / "some.csv").write_text("input,output\n300,10\n40,20\n")
    flags = ["--trace", str(tmp_path / "some.csv"), "alpaca:8", "--generated", "0.5"]
    knobs = ["--knob", "npu.num_arrays=4,8", "--points", "2", "--json"]
    assert main(["explore", *flags, *knobs]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["workloads"] == ["gpt3-7b/some", "gpt3-7b/alpaca:8"]
    assert found["trace_notes"][0] == "some: each request has generated 0.5 of its output"
    assert [f"neupims: note: {note}" for note in found["trace_notes"]] == err.splitlines()
    one, two = (
        make_workloads("gpt3-7b", [read_requests(trace, generated=0.5)], dealt=True)[0]
        for trace in (tmp_path / "some.csv", "alpaca:8")
    )
    assert one.batch.seq_lens.tolist() == [305, 50]
    assert len(two.notes) == 2


@pytest.mark.parametrize("several", [False, True])
def test_the_flags_of_devices_experts_and_the_head_reach_the_library(monkeypatch, several):
    """They do both for a space and for several systems that are compared."""
    seen = {}

    def refuse(*arguments, **options):
        seen.update(options)
        raise ValueError("seen")

    monkeypatch.setattr("neupims.exploration.explore.explore", refuse)
    monkeypatch.setattr("neupims.exploration.compare.compare", refuse)
    what = ["--system", "neupims,npu-only"] if several else ["--knob", "npu.num_arrays=4,8"]
    flags = ["--tp", "8", "--pp", "2", "--kv-split", "4", "--ep", "2", "--lm-head"]
    assert main(["explore", "--trace", "const:300x8", *what, *flags]) == 1
    assert seen["parallel"] == {"tp": 8, "pp": 2, "kv_split": 4, "ep": 2}
    assert seen["lm_head"] is True
    assert main(["explore", "--trace", "const:300x8", *what]) == 1
    assert (seen["parallel"], seen["lm_head"]) == ({}, False)


@pytest.mark.slow
def test_devices_groups_of_experts_and_the_head_are_those_of_simulate(capsys, tmp_path):
    """The base design takes the time that `simulate` gives with the same flags."""
    path = tmp_path / "trace.csv"
    path.write_text("seq_len,ch_idx\n" + "".join(f"{40 * i + 5},{i}\n" for i in range(16)))
    flags = ["--trace", str(path), "--tp", "8", "--ep", "2", "--lm-head", "--json"]
    design = ["--models", "mixtral-8x7b", "--schedule", "trace", "--knob", "npu.num_arrays=4,8"]
    assert main(["explore", *design, *flags, "--method", "grid"]) == 0
    found = json.loads(capsys.readouterr().out)["base"]["metrics"]
    assert main(["simulate", "--model", "mixtral-8x7b", *flags, "--path", "closed"]) == 0
    expected = json.loads(capsys.readouterr().out)
    for name in ("tokens_per_second", "energy_joules_per_token", "power_watts"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_some_fields_of_the_spread_leave_the_others_as_published():
    batch, model = make_batch([5], [0]), load_model("llama3-8b")
    options = {"parallel": {"tp": 2}, "lm_head": True}
    one, two = make_workloads(["mixtral-8x22b", model], batch, **options)
    assert (one.parallel, two.parallel) == (Parallel(2, 2), Parallel(2, 1))
    assert (one.model.lm_head, two.model.lm_head) == (1, 1)
    with pytest.raises(ValueError, match="parallel has ep, kv_split, pp, tp, but not dp"):
        make_workloads("gpt3-7b", batch, parallel={"dp": 2})
