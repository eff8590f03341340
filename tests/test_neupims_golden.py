"""The accelerator model against measured runs of the public simulator (GGEM_SHARED/golden/neupims
and neupims_2, by default ../shared).
"""

import csv
import os
from pathlib import Path

import pytest

from neupims.machine.traces import read_trace
from neupims.simulator_runs import KNOBS_END, case_of, read_measured, read_runs
from neupims.validation import predict, validate

ROOT = Path(os.environ.get("GGEM_SHARED", "../shared")) / "golden"
pytestmark = pytest.mark.golden

# Bounds of the mean absolute errors in percent, by level, kind and system, and of the largest error
# of a layer: the measured errors, rounded up. None of the constants was fitted to the second set.
BOUNDS = {
    "neupims": {
        ("op", "pim", "all"): 3,
        ("op", "gemm > 20000 cycles", "all"): 2.5,
        ("op", "gemm", "all"): 5,
        ("stage", "stage", "all"): 2.3,
        ("layer", "layer", "neupims_sbi"): 1,
        ("layer", "layer", "neupims_nosbi"): 1.8,
        ("layer", "layer", "npu+pim"): 1.9,
        ("layer", "layer", "npu-only"): 0.5,
    },
    "neupims_2": {
        ("op", "pim", "all"): 3,
        ("op", "gemm > 20000 cycles", "all"): 6,
        ("op", "gemm", "all"): 6,
        ("stage", "stage", "all"): 4,
        ("layer", "layer", "neupims_sbi"): 2.3,
        ("layer", "layer", "neupims_nosbi"): 2,
        ("layer", "layer", "npu+pim"): 1,
    },
}
MOST_OF_A_LAYER = {"neupims": 7, "neupims_2": 7}


@pytest.fixture(scope="module", params=BOUNDS)
def folder(request):
    path = ROOT / request.param
    if not path.is_dir():
        pytest.skip(f"{path} is absent")
    return path


@pytest.fixture(scope="module")
def result(folder):
    return validate(folder)


def test_every_run_is_covered_or_named(folder, result):
    runs, _ = read_runs(folder)
    covered = {row.run_id for row in result.rows}
    left_out = {each.run_id for each in result.not_covered}
    assert covered | left_out == {run["run_id"] for run in runs}
    assert not covered & left_out
    assert all(each.reason for each in result.not_covered)
    assert len(covered) > len(left_out)


def test_errors_are_within_their_bounds(folder, result):
    """The bounds are checked for every system that the folder has runs of."""
    found = {
        (group.level, group.kind, group.system): group
        for group in result.groups
        if group.name in ("all", "layer")
    }
    bounds = {key: most for key, most in BOUNDS[folder.name].items() if key in found}
    assert {key for key in found if key[0] == "layer"} <= {*bounds, ("layer", "layer", "all")}
    assert ("op", "gemm", "all") in bounds
    errors = {key: round(found[key].mean, 2) for key in bounds}
    assert {key: error for key, error in errors.items() if error > bounds[key]} == {}
    layers = [group for key, group in found.items() if key[0] == "layer" and key[2] != "npu-only"]
    assert (
        max(group.max for group in layers if group.system != "all") <= MOST_OF_A_LAYER[folder.name]
    )


def test_predictions_read_knobs_only(folder):
    runs, _ = read_runs(folder)
    for run in runs[:3]:
        names = list(run)
        blank = {
            name: value if place <= names.index(KNOBS_END) else ""
            for place, (name, value) in enumerate(run.items())
        }
        assert predict(case_of(blank, folder)) == predict(case_of(run, folder))


def test_stages_and_operations_are_those_measured(folder):
    runs, listed = read_runs(folder)
    first = {run["system"]: run for run in runs if run["run_id"] in listed}
    for run in first.values():
        assert set(read_measured(run, listed[run["run_id"]])) == set(predict(case_of(run, folder)))


def test_all_traces_are_read(folder):
    for path in sorted((folder / "traces").glob("*.csv")):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        batch = read_trace(path, num_channels=64)
        assert batch.seq_lens.tolist() == [int(row["seq_len"]) for row in rows]
        assert batch.channels.tolist() == [int(row["ch_idx"]) for row in rows]
