"""neupims/pages/step.py: the page and the trace of one simulated step."""

import json

import numpy as np
import pytest

from neupims.envelope import ExpectedError
from neupims.machine.case import Case
from neupims.machine.config import load_hardware, load_model
from neupims.machine.hardware import Hardware
from neupims.machine.workload import Parallel, make_batch
from neupims.pages.report import page
from neupims.pages.step import make_sections, roofline_points, roofline_roofs, write_step
from neupims.simulation import simulate_case

LENGTHS = np.array([300, 40, 900, 512])


def case(system, sub_batches):
    batch = make_batch(LENGTHS, np.arange(4), num_channels=4)
    hardware = load_hardware("npu-pim" if system == "npu-pim" else "neupims")
    records = (hardware, load_model("gpt3-7b"), batch, Parallel(4, 1))
    return Case(*records, system, sub_batches, "simulator", "gpt3-7b")


PERCENT = {"layer_mean_percent": 1.2, "layer_max_percent": 4.5, "layer_runs": 7}


@pytest.fixture
def simulated(monkeypatch):
    """Simulates a small batch; the expected error, which is a file of its own, is made up."""
    monkeypatch.setattr(
        "neupims.simulation.expected_error",
        lambda *_, **__: ExpectedError(PERCENT, (), None),
    )
    return lambda system, sub_batches: simulate_case(case(system, sub_batches), path="closed")


@pytest.mark.parametrize(
    ("system", "sub_batches"), [("neupims", 2), ("npu-pim", 1), ("npu-only", 1), ("gpu", 1)]
)
def test_every_system_has_a_report_and_a_trace(tmp_path, simulated, system, sub_batches):
    step = simulated(system, sub_batches)
    write_step(step, page=tmp_path / "page.html", trace=tmp_path / "trace.json")
    text = (tmp_path / "page.html").read_text()
    assert "1.2 % in the mean, 4.5 % at most" in text
    titles = (
        ["Stages", "Utilisation", "Roofline"]
        + (["Channels"] if system in ("neupims", "npu-pim") else [])
        + (["Energy"] if system != "gpu" else [])
    )
    for title in ("Stages", "Utilisation", "Roofline", "Channels", "Energy"):
        assert (f"<h2>{title}" in text) == (title in titles), title
    slices = [
        each
        for each in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        if each["ph"] == "X"
    ]
    assert {each["pid"] for each in slices} == {0, 1, 2, 3}
    end = max(each["ts"] + each["dur"] for each in slices)
    assert end == pytest.approx(sum(step.to_dict()["stage_cycles"].values()) / 1e3, rel=1e-5)
    first, second = (page(make_sections(step), title="x", facts={}) for _ in range(2))
    assert first == second


def test_operations_of_the_roofline(simulated):
    """A product of 4 requests with 4096 x 3072 weights is 2 x 4 x 4096 x 3072 FLOP; attention does
    one FLOP for each byte of keys.
    """
    step = simulated("neupims", 2)
    found = {point["name"]: point for point in roofline_points(step)}
    assert found["qkv"]["flops"] == pytest.approx(2 * 4 * 4096 * 3072)
    assert found["logit"]["flops"] == pytest.approx(2 * LENGTHS.sum() * 4096 / 4)
    assert found["logit"]["flops"] == pytest.approx(found["logit"]["bytes"])
    assert {"attn.ln", "ffn.ln", "attn.res", "ffn.res"} <= set(found)


def test_roofs_are_the_machines_peaks():
    """NPU: 8 x 128 x 128 x 2 at 1 GHz; PIM: 32 channels x 32 banks x 16 x 2 every 2 ns."""
    npu, pim, gpu = roofline_roofs(Hardware())
    assert npu["flops_per_second"] == 262.144e12
    assert npu["bytes_per_second"] == 1.024e12
    assert pim["flops_per_second"] == pim["bytes_per_second"] == 16.384e12
    assert gpu["flops_per_second"] == 312e12
