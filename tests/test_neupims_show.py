"""`show` and the pictures of `simulate`: complete, one JSON object, true to the records."""

import argparse
import json

import numpy as np
import pytest

from neupims import catalogue
from neupims.commands import pictures, show
from neupims.commands.common import finite
from neupims.costs.energy import EnergyCosts
from neupims.machine import config
from neupims.machine.case import Case
from neupims.machine.config import load_model
from neupims.machine.hardware import Hardware
from neupims.machine.record import describe
from neupims.machine.workload import Parallel, make_batch
from neupims.pages.report import page
from neupims.simulation import simulate_case

LENGTHS = np.array([300, 40, 900, 512, 77, 1500, 30, 260])


def shown(capsys, *words):
    parser = argparse.ArgumentParser()
    show.add_arguments(parser)
    assert show.run(parser.parse_args(words)) == 0
    return capsys.readouterr().out


def case(system, sub_batches):
    batch = make_batch(LENGTHS, np.arange(8) % 4, num_channels=4)
    hardware = config.load_hardware("npu-pim" if system == "npu-pim" else "neupims")
    records = (hardware, load_model("gpt3-7b"), batch, Parallel(4, 1))
    return Case(*records, system, sub_batches, "simulator", "gpt3-7b")


@pytest.fixture
def simulated(monkeypatch):
    """Simulates a small batch; the expected error, which is a file of its own, is made up."""
    monkeypatch.setattr(
        "neupims.simulation.expected_error",
        lambda *_, **__: {"layer_mean_percent": 1.2, "layer_max_percent": 4.5},
    )
    return _simulated


def _simulated(system, sub_batches):
    found = simulate_case(case(system, sub_batches), path="closed")
    return found.case, found.iteration, found.to_dict()


@pytest.mark.parametrize("what", list(show.SUBJECTS))
def test_both_forms(capsys, what):
    assert isinstance(json.loads(shown(capsys, what, "--json")), dict)
    text = shown(capsys, what)
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize(
    ("words", "record"),
    [
        (["hardware", "--hardware", "npu-pim"], lambda: catalogue.list_hardware("npu-pim")),
        (["models"], catalogue.list_models),
        (["systems"], catalogue.list_systems),
        (["constants"], catalogue.list_constants),
        (["knobs"], catalogue.list_knobs),
    ],
)
def test_json_is_the_record_of_the_library(capsys, words, record):
    found = finite(record().to_dict())
    assert json.loads(json.dumps(found)) == json.loads(shown(capsys, *words, "--json"))


def test_hardware_lists_every_field(capsys):
    found = json.loads(shown(capsys, "hardware", "--json"))
    assert {each["name"] for each in found["fields"]} == {
        each.name for each in describe(Hardware())
    }
    assert all(each["unit"] and each["source"] for each in found["fields"])
    assert {each["name"] for each in found["configurations"]} == set(config.names("hardware"))
    text = " ".join(shown(capsys, "hardware").split())
    for field in describe(Hardware()):
        assert field.name in text


def test_another_machine_shows_its_values(capsys):
    found = {
        each["name"]: each
        for each in json.loads(shown(capsys, "hardware", "--hardware", "npu-pim", "--json"))[
            "fields"
        ]
    }
    assert (found["pim.row_buffers"]["value"], found["pim.row_buffers"]["default"]) == (1, 2)
    assert (
        json.loads(shown(capsys, "constants", "--hardware", "npu-pim", "--json"))["area_mm2"][
            "row_buffers"
        ]
        == 0
    )


def test_constants_have_a_confidence(capsys):
    found = json.loads(shown(capsys, "constants", "--json"))
    assert {each["confidence"] for each in found["constants"]} == {
        "fitted",
        "data sheet",
        "published",
        "estimate",
    }
    energies = {
        each["name"].removeprefix("energy.")
        for each in found["constants"]
        if each["name"].startswith("energy.")
    }
    assert energies == {each.name for each in describe(EnergyCosts())}
    assert found["command_picojoules"]["read"] == pytest.approx(804)


def test_models_and_systems(capsys):
    found = {each["name"]: each for each in json.loads(shown(capsys, "models", "--json"))["models"]}
    assert (found["llama3-8b"]["kv_heads"], found["gpt3-30b"]["pp"]) == (8, 2)
    systems = json.loads(shown(capsys, "systems", "--json"))
    assert [each["name"] for each in systems["systems"]] == [
        "neupims",
        "npu-pim",
        "npu-only",
        "gpu",
    ]
    assert systems["systems"][0]["stages_by_sub_batches"] == {"2": "ABCDEF", "1": "ABE"}


def test_knobs_name_fields_that_exist(capsys):
    found = json.loads(shown(capsys, "knobs", "--json"))
    assert {each["name"] for each in found["knobs"]} <= {each.name for each in describe(Hardware())}
    assert not {each["simulator"] for each in found["knobs"]} & set(found["without_effect"])


@pytest.mark.parametrize(
    ("system", "sub_batches"), [("neupims", 2), ("npu-pim", 1), ("npu-only", 1), ("gpu", 1)]
)
def test_every_system_has_a_report_and_a_trace(tmp_path, simulated, system, sub_batches):
    made, iteration, result = simulated(system, sub_batches)
    pictures.write_pictures(
        made, iteration, result, tmp_path / "page.html", tmp_path / "trace.json"
    )
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
    assert end == pytest.approx(sum(result["stage_cycles"].values()) / 1e3, rel=1e-5)
    assert page(pictures.sections(made, iteration, result), title="x", facts={}) == page(
        pictures.sections(made, iteration, result), title="x", facts={}
    )


def test_operations_of_the_roofline(simulated):
    """A product of 4 requests with 4096 x 3072 weights is 2 x 4 x 4096 x 3072 FLOP; attention does
    one FLOP for each byte of keys.
    """
    made, iteration, _ = simulated("neupims", 2)
    found = {point["name"]: point for point in pictures.points(made, iteration)}
    assert found["qkv"]["flops"] == pytest.approx(2 * 8 * 4096 * 3072)
    assert found["logit"]["flops"] == pytest.approx(2 * LENGTHS.sum() * 4096 / 4)
    assert found["logit"]["flops"] == pytest.approx(found["logit"]["bytes"])
    assert {"attn.ln", "ffn.ln", "attn.res", "ffn.res"} <= set(found)


def test_roofs_are_the_machines_peaks():
    """NPU: 8 x 128 x 128 x 2 at 1 GHz; PIM: 32 channels x 32 banks x 16 x 2 every 2 ns."""
    npu, pim, gpu = pictures.roofs(Hardware())
    assert npu["flops_per_second"] == 262.144e12
    assert npu["bytes_per_second"] == 1.024e12
    assert pim["flops_per_second"] == pim["bytes_per_second"] == 16.384e12
    assert gpu["flops_per_second"] == 312e12
