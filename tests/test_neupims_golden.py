"""The accelerator model against measured runs of the public simulator (GGEM_SHARED/golden/neupims,
by default ../shared).
"""

import csv
import os
from pathlib import Path

import pytest

from neupims.machine.workload import read_trace
from neupims.simulator_runs import KNOBS_END, case_of, read_measured, read_runs
from neupims.validation import predict, validate

GOLDEN = Path(os.environ.get("GGEM_SHARED", "../shared")) / "golden" / "neupims"
pytestmark = [
    pytest.mark.golden,
    pytest.mark.skipif(not GOLDEN.is_dir(), reason="no folder golden/neupims"),
]


@pytest.fixture(scope="module")
def result():
    return validate(GOLDEN)


def errors(result, level, kind, system="all", name=None):
    name = name or {"layer": "layer"}.get(kind, "all")
    return next(
        (
            group
            for group in result.groups
            if (group.level, group.system, group.kind, group.name) == (level, system, kind, name)
        ),
        None,
    )


def test_every_run_is_covered_or_named(result):
    runs, _ = read_runs(GOLDEN)
    covered = {row.run_id for row in result.rows}
    left_out = {each.run_id for each in result.not_covered}
    assert covered | left_out == {run["run_id"] for run in runs}
    assert not covered & left_out
    assert all(each.reason for each in result.not_covered)
    assert len(covered) > len(left_out)


@pytest.mark.parametrize(("kind", "most"), [("pim", 3), ("gemm > 20000 cycles", 4), ("gemm", 8)])
def test_operations(result, kind, most):
    assert errors(result, "op", kind).mean <= most


def test_stages(result):
    assert errors(result, "stage", "stage").mean <= 5


@pytest.mark.parametrize("system", ["neupims_sbi", "neupims_nosbi", "npu+pim"])
def test_layers(result, system):
    group = errors(result, "layer", "layer", system)
    if group is None:
        pytest.skip(f"no run of {system}")
    assert group.mean <= 3
    assert group.max <= 10


def test_npu_only_layers(result):
    group = errors(result, "layer", "layer", "npu-only")
    if group is None:
        pytest.skip("no run of npu-only")
    assert group.mean <= 5


def test_predictions_read_knobs_only():
    runs, _ = read_runs(GOLDEN)
    for run in runs[:3]:
        names = list(run)
        blank = {
            name: value if place <= names.index(KNOBS_END) else ""
            for place, (name, value) in enumerate(run.items())
        }
        assert predict(case_of(blank, GOLDEN)) == predict(case_of(run, GOLDEN))


def test_stages_and_operations_are_those_measured():
    runs, listed = read_runs(GOLDEN)
    first = {run["system"]: run for run in runs}
    for run in first.values():
        assert set(read_measured(run, listed[run["run_id"]])) == set(predict(case_of(run, GOLDEN)))


def test_all_traces_are_read():
    for path in sorted((GOLDEN / "traces").glob("*.csv")):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        batch = read_trace(path, num_channels=64)
        assert batch.seq_lens.tolist() == [int(row["seq_len"]) for row in rows]
        assert batch.channels.tolist() == [int(row["ch_idx"]) for row in rows]
