"""`neupims explore` on traces with and without channels."""

import json

import pytest

from neupims.__main__ import main
from neupims.exploration.explore import explore
from neupims.exploration.workloads import make_workloads
from neupims.machine.traces import read_requests
from neupims.machine.workload import make_batch

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
