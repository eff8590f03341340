"""`explore` and its command: files, records, workloads, expected errors and refusals."""

import dataclasses
import doctest
import importlib
import json
import re

import numpy as np
import pytest

from neupims.__main__ import main
from neupims.exploration.explore import Exploration, explore
from neupims.exploration.points import Objective
from neupims.exploration.workloads import make_workloads
from neupims.machine.config import load_model
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.workload import Parallel, make_batch
from neupims.processors import count_processors

LENGTHS = np.random.default_rng(0).integers(1, 512, 64)


def test_the_command_prints_one_object_and_writes_its_files(tool, tmp_path):
    (tmp_path / "trace.csv").write_text(
        "seq_len,ch_idx\n" + "".join(f"{length},{i % 32}\n" for i, length in enumerate(LENGTHS))
    )
    flags = [
        "--knob",
        "npu.num_arrays=2:16",
        "--knob",
        "hbm.tfaw_cycles=12,30",
        "--constraint",
        "npu.num_arrays <= 8",
    ]
    flags += ["--trace", tmp_path / "trace.csv"]
    process = tool(
        "neupims",
        "explore",
        *flags,
        "--points",
        64,
        "--out",
        tmp_path / "out",
        "--html",
        tmp_path / "page.html",
        "--json",
    )
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    found = json.loads(out)
    assert found["points"] == 64
    assert found["expected_error"]["path"] == "closed"
    assert found["devices"].startswith(f"{count_processors()} x")
    assert 1 <= len(found["front"]) <= found["kept"] < 64
    assert all(design["knobs"]["npu.num_arrays"] <= 8 for design in found["front"])
    speeds = [design["metrics"]["tokens_per_second"] for design in found["front"]]
    assert speeds == sorted(speeds, reverse=True)
    assert found["sensitivities"]["hbm.tfaw_cycles"]["rank_correlation"] < 0
    assert (tmp_path / "out" / "front.csv").read_text().count("\n") == len(found["front"]) + 1
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == found
    page = (tmp_path / "page.html").read_text()
    assert [
        page.count(f"<h2>tokens_per_second against {name}")
        for name in ("energy_joules_per_token", "area_mm2")
    ] == [1, 1]
    assert (
        page.count(" of 14 designs are on the Pareto front") == 2
    )  # 2 to 8 arrays, two timings: so few that all are drawn, each once
    assert (
        len({tuple(design["knobs"].values()) for design in found["front"]})
        == len(found["front"])
        <= 14
    )
    assert "hbm.tfaw_cycles" in page[page.index("<h2>Sensitivity") :]
    chart = page[
        page.index("<h2>tokens_per_second against area_mm2") : page.index("<h2>Pareto front")
    ]
    assert {*re.findall(r'<td class="words">(\d+)</td>', chart)} <= {
        str(design["index"]) for design in found["front"]
    }


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    rows = (f"{length},{place % 32}\n" for place, length in enumerate(LENGTHS))
    path.write_text("seq_len,ch_idx\n" + "".join(rows))
    return path


def test_the_command_prints_the_record_of_the_library(capsys, tmp_path, trace):
    """The flags of the command and the arguments of the call give the same result."""
    flags = [
        *("--knob", "npu.num_arrays=2:16", "--knob", "pim.row_buffers=1,2"),
        *("--knob", "npu.clock_hz=0.7e9:1.5e9:log", "--constraint", "npu.num_arrays <= 12"),
        *("--models", "gpt3-7b,GPT3-13B", "--set", "hbm.num_channels=64", "--points", "24"),
        *("--objectives", "tokens_per_second:max,area_mm2:min", "--reference", "area_mm2=9e4"),
        *("--schedule", "trace", "--sub-batches", "1", "--fidelity", "intended", "--seed", "3"),
        *("--method", "random", "--chunk", "16", "--trace", str(trace), "--json"),
    ]
    assert main(["explore", *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = explore(
        replace(Hardware(), "hbm.num_channels", 64),
        ["gpt3-7b", "gpt3-13b"],
        trace,
        {
            "npu.num_arrays": (2, 16),
            "pim.row_buffers": [1, 2],
            "npu.clock_hz": (0.7e9, 1.5e9, "log"),
        },
        constraints=["npu.num_arrays <= 12"],
        objectives="tokens_per_second:max,area_mm2:min",
        reference={"area_mm2": 9e4},
        method="random",
        points=24,
        seed=3,
        sub_batches=1,
        fidelity="intended",
        schedule="trace",
        chunk=16,
        folder=tmp_path / "out",
    )
    record = found.to_dict()
    assert printed.pop("seconds") > 0 < record.pop("seconds")
    assert printed == json.loads(json.dumps(record))
    assert (found.reference["area_mm2"], found.points, found.sub_batches) == (9e4, 24, 1)
    assert all(each.knobs["npu.num_arrays"] <= 12 for each in found.front)
    assert (tmp_path / "out" / "front.csv").read_text() == found.front_csv()
    assert [each.index for each in found.front] != sorted(each.index for each in found.front)


def test_records_and_names_are_the_same_exploration():
    """A machine, a model and a batch as records, and two objectives as records."""
    knobs, batch = {"npu.num_arrays": [4, 8]}, make_batch([300, 40], [0, 1])
    objectives = (Objective("tokens_per_second", True), Objective("area_mm2", False))
    options = {"method": "grid", "parallel": Parallel(2, 1), "objectives": objectives}
    model = load_model("gpt3-7b")
    one = explore(Hardware(), model, batch, knobs, **options)
    two = explore("neupims", "gpt3-7b", [batch], knobs, **options)
    assert (one.workloads, two.workloads) == (("model/batch",), ("gpt3-7b/batch",))
    assert (one.front, one.hypervolume) == (two.front, two.hypervolume)
    assert isinstance(one, Exploration)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.seed = 1


def test_workloads_are_named_and_checked(trace):
    batch = make_batch([5], [0])
    found = make_workloads(["gpt3-7b", load_model("gpt3-7b")], [trace, batch])
    names = ["gpt3-7b/trace", "gpt3-7b/batch 2", "model 2/trace", "model 2/batch 2"]
    assert [each.name for each in found] == names
    assert (found[0].parallel.tp, found[2].parallel.tp) == (4, 1)
    for models, batches in (([], batch), ("gpt3-7b", []), ("gpt3-8b", batch)):
        with pytest.raises(ValueError, match=r"at least one|gpt3-8b"):
            make_workloads(models, batches)
    with pytest.raises(ValueError, match="tp must divide"):
        make_workloads("gpt3-7b", batch, parallel=Parallel(3, 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"system": "npu-pim", "sub_batches": 2}, "need the system neupims, not npu-pim"),
        ({"schedule": "sorted"}, "dealt, trace, not 'sorted'"),
        ({"system": "tpu"}, "tpu"),
        ({"objectives": "speed:max"}, "no metric 'speed'"),
    ],
)
def test_impossible_calls_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        explore("neupims", "gpt3-7b", make_batch([5], [0]), {"npu.num_arrays": [4]}, **options)


def test_the_example_of_the_documentation_runs():
    found = doctest.testmod(importlib.import_module("neupims.exploration.explore"))
    assert (found.attempted, found.failed) == (5, 0)


def test_the_expected_error_is_that_of_the_row_buffers(capsys, tmp_path):
    (tmp_path / "trace.csv").write_text("seq_len,ch_idx\n600,0\n40,1\n513,0\n300,2\n")
    for flags, known in (
        ([], True),
        (["--row-buffers", "single"], False),
        (["--knob", "pim.row_buffers=1,2"], False),
    ):
        assert (
            main(
                [
                    "explore",
                    "--trace",
                    str(tmp_path / "trace.csv"),
                    "--knob",
                    "npu.num_arrays=4,8",
                    "--points",
                    "4",
                    "--json",
                    *flags,
                ]
            )
            == 0
        )
        found = json.loads(capsys.readouterr().out)
        assert (found["expected_error"] is not None) == known == (not found["not_validated"])
        # Only designs of 8 arrays were measured.
        inside = sum(design["knobs"]["npu.num_arrays"] == 8 for design in found["front"])
        assert found["front_validated"] == (inside if known else None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--knob", "hbm.chanels=1,2"], "hbm.chanels"),
        ([], "--knob"),
        (["--knob", "npu.num_arrays=2:4", "--constraint", "npu.arrays < 3"], "npu.arrays"),
        (["--knob", "npu.num_arrays=2:4", "--objectives", "speed:max"], "speed"),
        (["--knob", "sub_batches=1,2", "--system", "npu-pim"], "sub_batches"),
    ],
)
def test_the_command_refuses_in_one_line(monkeypatch, capsys, tmp_path, flags, words):
    (tmp_path / "trace.csv").write_text("seq_len,ch_idx\n5,0\n")
    assert main(["explore", "--trace", str(tmp_path / "trace.csv"), "--points", "4", *flags]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["front.csv", "summary.json", "lock", "../space.toml"])
def test_a_page_replaces_no_other_file_of_an_exploration(tmp_path, capsys, name):
    (tmp_path / "space.toml").write_text("[knobs]\n'npu.num_arrays' = [2, 4]\n")
    (tmp_path / "out").mkdir()
    flags = ["--trace", "alpaca:8", "--space", str(tmp_path / "space.toml")]
    flags += ["--out", str(tmp_path / "out"), "--html", str(tmp_path / "out" / name)]
    assert main(["explore", *flags]) == 1
    assert "is another file of this run too: give each its own name" in capsys.readouterr().err
    assert (tmp_path / "space.toml").read_text().startswith("[knobs]")
