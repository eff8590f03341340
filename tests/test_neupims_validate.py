"""neupims/validation.py: any folder of the form of the measured runs, here made by the tests."""

import csv
import json
import re

import pytest

from neupims.__main__ import main
from neupims.simulator_runs import (
    CORE_FIELDS,
    MEMORY_FIELDS,
    WITHOUT_EFFECT,
    NotCovered,
    case_of,
    read_runs,
)
from neupims.validation import Pair, group_errors, predict, validate

KNOBS = {
    "run_id": "a", "kind": "gemv", "system": "neupims_nosbi", "model": "custom", "n_layer": "1",
    "n_head": "4", "n_embd": "512", "n_tp": "1",
    "n_pp": "1",
    "trace": "t.csv", "dram_channels": "32", "core_width": "128", "core_height": "128",
    "vector_core_count": "8", "vector_core_width": "128",
    "sram_kb": "134218", "core_freq_mhz": "1000", "dram_freq_mhz": "1000", "icnt_freq_mhz": "2000",
    "dram_overrides": "", "core_overrides": "",
    "sub_batch_mode": "0",
}  # fmt: skip
MEASURED = {
    "status": "ok",
    "layer_cycles": "30000",
    "cyc_A": "5000",
    "cyc_B": "15000",
    "cyc_C": "",
    "cyc_D": "",
    "cyc_E": "10000",
    "cyc_F": "",
}
OPS = [
    ("A", "attn.QKVgen", 2100),
    ("B", "attn.NeuPIMSAttend", 7000),
    ("E", "ffn.fc1", 25000),
    ("E", "ffn.ln", 400),
]


def write_table(path, rows):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def folder_of(path, *changes, ops=OPS):
    """A folder with one run for each of `changes` of the knobs or of the measured values."""
    (path / "traces").mkdir()
    (path / "traces" / "t.csv").write_text("seq_len,ch_idx\n300,0\n40,1\n513,0\n7,2\n")
    runs = [
        KNOBS | MEASURED | {"run_id": f"r{number}"} | change
        for number, change in enumerate(changes)
    ]
    write_table(path / "runs.csv", runs)
    rows = [
        {"run_id": run["run_id"], "system": run["system"], "stage": s, "op": o, "cycles": c}
        for run in runs
        for s, o, c in ops
    ]
    write_table(path / "ops.csv", rows or [{"run_id": "", "stage": "", "op": "", "cycles": ""}])
    return path


def dram(**fields):
    return {"dram_overrides": json.dumps(fields)}


def core(**fields):
    return {"core_overrides": json.dumps(fields)}


def test_json_is_one_object_of_the_form_asked_for(tmp_path, capsys):
    folder_of(tmp_path, {}, dram(tFAW=16), {"system": "tpu"}, {"status": "aborted"})
    assert main(["validate", str(tmp_path), "--json", "--path", "closed"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"groups", "rows", "not_covered"}
    assert {row["run_id"] for row in result["rows"]} == {"r0", "r1"}
    assert {each["run_id"]: "tpu" in each["reason"] for each in result["not_covered"]} == {
        "r2": True,
        "r3": False,
    }
    assert len(result["rows"]) == 2 * (len(OPS) + 3 + 1)  # stages A, B and E, and the layer
    for row in result["rows"]:
        assert {"run_id", "level", "stage", "name", "measured", "predicted"} <= set(row)
        assert row["predicted"] > 0
    for group in result["groups"]:
        assert set(group) == {
            "level",
            "system",
            "kind",
            "name",
            "n",
            "mean",
            "median",
            "p95",
            "max",
        }
        assert 0 <= group["median"] <= group["p95"] <= group["max"]
    counted = {
        (group["level"], group["system"], group["kind"], group["name"]): group["n"]
        for group in result["groups"]
    }
    assert (
        counted["op", "all", "pim", "all"]
        == counted["layer", "neupims_nosbi", "layer", "layer"]
        == 2
    )
    assert counted["op", "all", "gemm", "all"] == 4
    assert counted["op", "all", "gemm > 20000 cycles", "all"] == 2
    assert counted["stage", "all", "stage", "all"] == 6
    record = validate(tmp_path, path="closed").to_dict()
    assert json.loads(json.dumps(record)) == result


def test_errors_are_percentages_of_what_was_measured(tmp_path):
    result = validate(folder_of(tmp_path, {}), path="closed")
    layer = next(row for row in result.rows if row.level == "layer")
    group = next(
        group for group in result.groups if group.level == "layer" and group.system == "all"
    )
    assert group.mean == pytest.approx(100 * abs(layer.predicted - 30000) / 30000)


def test_groups_of_errors_by_hand():
    """Errors of 0 to 20 %, one of each: their mean and median are 10, the 95th percentile 19."""
    rows = [
        Pair("r", "npu-only", "op", "all", "ffn.fc1", 1000.0, 1000.0 - 10 * i) for i in range(21)
    ]
    groups = {(group.system, group.kind, group.name): group for group in group_errors(rows)}
    assert set(groups) == {
        (system, "gemm", name) for system in ("npu-only", "all") for name in ("all", "ffn.fc1")
    }
    for group in groups.values():
        assert [
            getattr(group, key) for key in ("n", "mean", "median", "p95", "max")
        ] == pytest.approx([21, 10, 10, 19, 20])


def test_the_tool_prints_a_table_and_draws(tmp_path, capsys):
    folder_of(tmp_path, {}, dram(tXYZ=1))
    assert (
        main(
            [
                "validate",
                str(tmp_path),
                "--path",
                "closed",
                "--plot",
                str(tmp_path / "plot.svg"),
                "--html",
                str(tmp_path / "page.html"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "tXYZ" in out
    assert "1 runs covered, 1 not" in out
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    page = (tmp_path / "page.html").read_text()
    assert "Relative error over measured cycles" in page
    assert "tXYZ" in page[page.index("<h2>Not covered") :]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        (dram(tRP=28), ("hbm", "trp_cycles", 28)),
        (dram(tRFC=350), ("hbm", "trfc_cycles", 350)),
        (dram(tFAW="16"), ("hbm", "tfaw_cycles", 16)),
        (dram(tRCDRD=28, tRCDWR=20), ("hbm", "trcd_read_cycles", 28)),
        (dram(tRCDWR=20), ("hbm", "trcd_write_cycles", 20)),
        (dram(tREFI=1000000), ("hbm", "trefi_cycles", 1000000)),
        (dram(tRTRS=0), ("hbm", "trtrs_cycles", 0)),
        (dram(dram_page_size=512), ("pim", "page_bytes", 512)),
        (dram(pim_comp_coverage=32), ("pim", "macs_per_bank", 32)),
        (dram(dram_freq=1200), ("hbm", "clock_hz", 1.2e9)),
        (core(core_width=64), ("npu", "array_width", 64)),
        (core(core_height=64), ("npu", "array_height", 64)),
        (core(core_freq=500), ("npu", "clock_hz", 5e8)),
        (core(num_cores=2), ("npu", "num_cores", 2)),
        (core(sram_size=4096), ("npu", "scratchpad_bytes", 4096 * 1024)),
        (core(vector_core_count=4), ("npu", "vector_units", 4)),
        (core(icnt_freq=1000), ("npu", "interconnect_hz", 1e9)),
        ({"core_width": "256", "core_height": "256"}, ("npu", "array_width", 256)),
        ({"dram_channels": "16"}, ("hbm", "num_channels", 16)),
        ({"sram_kb": "7168"}, ("npu", "scratchpad_bytes", 7168 * 1024)),
        ({"system": "main_newton_nosbi"}, ("pim", "row_buffers", 1)),
        ({"system": "npu+pim"}, ("pim", "row_buffers", 1)),
    ],
)
def test_every_knob_reaches_its_field(tmp_path, override, value):
    folder = folder_of(tmp_path, override)
    group, name, expected = value
    assert (
        getattr(getattr(case_of(read_runs(folder)[0][0], folder).hardware, group), name) == expected
    )


@pytest.mark.parametrize(
    ("fields", "organisation"),
    [  # a rank is bank groups x banks of 32 MiB, a channel of 1024 MiB by default
        ({"bankgroups": 8}, (1, 8, 4)),
        ({"bankgroups": 1, "banks_per_group": 8}, (4, 1, 8)),
        ({"banks_per_group": 2}, (4, 4, 2)),
        ({"channel_size": 2048}, (4, 4, 4)),
        ({"channel_size": 512}, (1, 4, 4)),
    ],
)
def test_ranks_follow_from_the_size_of_a_channel(tmp_path, fields, organisation):
    folder = folder_of(tmp_path, dram(**fields))
    hbm = case_of(read_runs(folder)[0][0], folder).hardware.hbm
    assert (hbm.ranks, hbm.bank_groups, hbm.banks_per_group) == organisation


def test_every_field_of_the_simulator_is_accepted_or_refused_by_name(tmp_path):
    both = [dram(**{field: 64}) for field in MEMORY_FIELDS] + [
        core(**{field: 64}) for field in CORE_FIELDS
    ]
    idle = [dram(**{field: 64}) for field in WITHOUT_EFFECT]
    folder = folder_of(tmp_path, *both, *idle, {})
    runs, _ = read_runs(folder)
    plain = case_of(runs[-1], folder)
    assert all(
        case_of(run, folder).hardware != plain.hardware
        for run in runs[: len(both)]
        if "64" in run["dram_overrides"] + run["core_overrides"]
    )
    assert all(case_of(run, folder).hardware == plain.hardware for run in runs[len(both) : -1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dram(tXYZ=5), "tXYZ"),
        (dram(bankgroups=64), "channel of 1024 MiB"),
        (dram(channel_size=700), "channel of 700 MiB"),
        (core(warp=5), "warp"),
        ({"system": "tpu"}, "tpu"),
        (dram(tRP=-1), "trp_cycles"),
        (dram(tRP="fast"), "tRP"),
        (dram(tRP=None), "tRP"),
        (dram(tRP=float("inf")), "tRP"),
        ({"dram_overrides": "{tRP: 5}"}, "dram_overrides"),
        ({"dram_overrides": "[5]"}, "dram_overrides"),
        ({"n_head": "5"}, "heads"),
        ({"n_head": ""}, "n_head"),
        ({"n_tp": "0"}, "tp"),
        ({"n_tp": "3"}, "tp"),
        ({"trace": "absent.csv"}, "absent"),
        ({"trace": ""}, "trace"),
        ({"dram_channels": "2"}, "channel"),
        (dram(tREFI=100), "refresh"),
    ],
)
def test_what_cannot_be_modelled_is_listed_with_its_reason(tmp_path, change, reason):
    result = validate(folder_of(tmp_path, change), path="closed")
    assert result.rows == ()
    assert [each.run_id for each in result.not_covered] == ["r0"]
    assert re.search(reason, result.not_covered[0].reason)


def test_measured_columns_do_not_reach_predictions(tmp_path):
    folder = folder_of(
        tmp_path, {}, {"layer_cycles": "1", "cyc_A": "1", "cyc_B": "1", "cyc_E": "1"}
    )
    first, second = (predict(case_of(run, folder), path="closed") for run in read_runs(folder)[0])
    assert first == second


def test_a_folder_without_its_files_or_columns_is_one_sentence(tmp_path, capsys):
    assert main(["validate", str(tmp_path), "--json"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "runs.csv" in said.err
    folder_of(tmp_path, {})
    (tmp_path / "runs.csv").write_text("run_id,system\na,neupims_sbi\n")
    assert main(["validate", str(tmp_path), "--json"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "trace" in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("ops", "change", "reason"),
    [
        ([("A", "attn.dance", 5)], {}, "op A attn.dance"),
        ([("A", "attn.ln", 0)], {}, "op A attn.ln"),
        ([("A", "attn.ln", "")], {}, "op A attn.ln"),
        (OPS, {"layer_cycles": ""}, "layer"),
    ],
)
def test_what_cannot_be_compared_is_listed_with_its_reason(tmp_path, ops, change, reason):
    result = validate(folder_of(tmp_path, change, ops=ops), path="closed")
    assert result.rows == ()
    assert reason in result.not_covered[0].reason


def test_not_covered_is_raised_for_a_single_case(tmp_path):
    folder = folder_of(tmp_path, {"system": "tpu"})
    with pytest.raises(NotCovered, match="tpu"):
        case_of(read_runs(folder)[0][0], folder)
