"""Utilisation as the public simulator counts it, against its runs (GGEM_SHARED/golden/neupims, by
default ../shared).
"""

import os
from pathlib import Path

import pytest

from neupims.simulator_runs import case_of, pad_case, read_runs
from neupims.timing.iteration import simulate
from neupims.validation import KINDS

GOLDEN = Path(os.environ.get("GGEM_SHARED", "../shared")) / "golden" / "neupims"
TRACES = {
    "gen-share-gpt2-bs256-ms7B-tp4-pp1-clb-0.csv",
    "gen-share-gpt2-bs256-ms7B-tp4-pp1-rr-0.csv",
}
pytestmark = [
    pytest.mark.golden,
    pytest.mark.skipif(not GOLDEN.is_dir(), reason="no folder golden/neupims"),
]


@pytest.fixture(scope="module")
def runs():
    rows, listed = read_runs(GOLDEN)
    chosen = [
        row
        for row in rows
        if row["trace"] in TRACES and row["model"] == "gpt3-7B" and row["kind"] == "e2e"
    ]
    return chosen, listed


@pytest.mark.parametrize("system", ["neupims_sbi", "neupims_nosbi", "npu+pim", "npu-only"])
def test_utilization_within_four_points(runs, system):
    rows, listed = runs
    mine = [row for row in rows if row["system"] == system]
    if not mine:
        pytest.skip(f"no run of {system}")
    for row in mine:
        stages = "CD" if system == "neupims_sbi" else "ABE"
        layer = float(row["layer_cycles"])
        busy = sum(
            float(each["compute_cycles"])
            for each in listed[row["run_id"]]
            if KINDS[each["op"]] in ("gemm", "attention")
            and (each["stage"] in stages or system == "npu-only")
        )
        case = pad_case(case_of(row, GOLDEN))
        result = simulate(
            case.hardware,
            case.model,
            case.batch,
            case.parallel,
            system=case.system,
            sub_batches=case.sub_batches,
            most_channels=64,
        )
        assert float(result.npu_utilization) == pytest.approx(busy / layer, abs=0.04)
        if system != "npu-only":
            pim = sum(float(row[f"pim_{stage}"]) for stage in stages)
            assert float(result.pim_utilization) == pytest.approx(pim / layer, abs=0.04)
