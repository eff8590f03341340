"""Energies and the GPU's roofline against published figures, and the tables of
docs/accelerator/costs.md.
"""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.neupims_costs import (
    access_picojoules,
    compare_energy,
    compare_serving,
    energy_table,
    replay,
    serving_table,
)
from neupims import load_hardware, load_model
from neupims.machine.config import load_memory, names, set_fields
from neupims.machine.hardware import Hardware
from neupims.machine.model_size import weight_bytes

PAGE = (Path(__file__).parent.parent / "docs/accelerator/costs.md").read_text(encoding="utf-8")
ENERGIES, SERVED = compare_energy(), compare_serving()


def test_every_memory_is_compared():
    compared = {each.what.partition(",")[0] for each in ENERGIES}
    assert compared == {"default", *names("memory")}


@pytest.mark.parametrize("each", ENERGIES, ids=lambda each: f"{each.what}, {each.published}")
def test_energies_are_near_the_published_ones_or_say_why(each):
    assert each.source
    assert 0.3 < each.factor < 1.6
    assert each.why or abs(each.factor - 1) < 0.05


def test_at_least_one_published_energy_of_each_hbm_and_gddr_is_met_within_a_quarter():
    for name in ("default", "hbm2", "hbm2e", "hbm3", "hbm3e", "gddr6-aim"):
        factors = [each.factor for each in ENERGIES if each.what.startswith(f"{name}, ")]
        assert min(abs(factor - 1) for factor in factors) < 0.25, name


def test_an_access_by_hand():
    """HBM2: 909 pJ over 8192 bits, 2.68 and 0.80; half of a row pays for all of it."""
    costs = set_fields(Hardware(), {"energy.memory": "hbm2"}).energy
    assert access_picojoules(costs, 8192) == pytest.approx(909 / 8192 + 2.68 + 0.80)
    assert access_picojoules(costs, 4096) == pytest.approx(909 / 4096 + 2.68 + 0.80)
    # A row of 2 KB is opened as two of 1 KB: as much a bit.
    assert access_picojoules(costs, 16384) == pytest.approx(access_picojoules(costs, 8192))


def test_published_powers_of_h200_memory():
    """Three GPUs, W with reads, W idle and GB/s: 5.8 pJ a bit (data/HBM3E_measurements.csv)."""
    runs = np.array([[255.22, 44.95, 4523.3], [247.75, 35.55, 4520.6], [241.71, 34.75, 4517.3]])
    picojoules = ((runs[:, 0] - runs[:, 1]) / runs[:, 2] / 8).mean() * 1000
    (each,) = [each for each in ENERGIES if "H200" in each.source]
    assert picojoules == pytest.approx(each.published, abs=0.01)
    # Of those, ours has 0.43 pJ at the far end of the interface.
    memory = each.ours - load_memory("hbm3e").values["interface_bit"] / 2
    assert memory == pytest.approx(picojoules, rel=0.05)


def test_two_stacks_and_more_are_compared():
    stacks = {each.what.partition(" ")[0] for each in SERVED}
    assert stacks >= {"TensorRT-LLM", "vLLM", "LMDeploy"}


@pytest.mark.parametrize("each", SERVED, ids=lambda each: each.what)
def test_no_stack_is_faster_than_the_roofline_and_none_is_far_below(each):
    assert each.source
    assert each.why
    assert 1 < each.factor < 2


def test_one_request_reads_the_weights_once_a_token():
    """At the roofline of one request, memory binds: the weights, and few keys and values."""
    hardware, model = load_hardware("a100"), load_model("llama3-8b")
    _, seconds = replay(hardware, model, np.array([16]), np.array([101]))
    reading = float(weight_bytes(model)) - 2 * 2 * model.vocabulary * model.width  # no LM head
    assert seconds == pytest.approx(100 * reading / hardware.gpu.bytes_per_second, rel=0.02)


def test_a_request_that_ends_leaves_the_others():
    """Two requests, one of which ends early, take as long as both parts in turn."""
    hardware, model = load_hardware("a100"), load_model("llama2-7b")
    _, together = replay(hardware, model, np.array([64, 64]), np.array([33, 65]))
    _, both = replay(hardware, model, np.array([64, 64]), np.array([33, 33]))
    _, alone = replay(hardware, model, np.array([96]), np.array([33]))
    assert together == pytest.approx(both + alone, rel=2e-3)


def test_the_page_has_the_tables_of_the_command():
    for table in (energy_table(), serving_table()):
        assert "\n".join(table) in PAGE
