"""Machines of published PIM parts: their peaks against the published ones, and that they run."""

import math

import pytest

from neupims import explore, load_hardware, make_batch, make_case, simulate_case
from neupims.machine import config
from neupims.machine.hardware import (
    Hardware,
    banks,
    memory_bytes,
    peak_bytes_per_cycle,
    pim_bytes_per_second,
    product_cycles,
)
from neupims.machine.record import replace
from neupims.machine.workload import FLOAT16_BYTES

# Published, of one part: parts of the machine, bytes/s at the pins, bytes/s at the banks, FLOP/s of
# 16-bit numbers and bytes; None where it is not published.
PUBLISHED = {
    # Lee et al., ISSCC 2022, 11.1: 8 Gb, 16 Gb/s/pin (32 pins), 1 TFLOPS.
    "gddr6-aim": (16, 16e9 * 32 / 8, None, 1e12, 2**30),
    # Kwon et al., ISSCC 2021, 25.4, and Lee et al., ISCA 2021: 307.2 GB/s, 1.2 TFLOPS; four compute
    # dies of 4 Gb, each operand of 16 bits feeds a product and a sum.
    "hbm-pim": (4, 307.2e9, 4 * 307.2e9, 1.2e12, 4 * 4 * 2**30 / 8),
    # Samsung, Hot Chips 2026: 76.8 and 614 GB/s a package, 2.4 TOPS with 4-bit weights.
    "lpddr5x-pim": (8, 76.8e9, 614e9, 2.4e12 / 4, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_peaks_of_a_part_are_the_published_ones(name):
    parts, pins, inside, flops, capacity = PUBLISHED[name]
    machine = load_hardware(name)
    found = pim_bytes_per_second(machine)
    assert peak_bytes_per_cycle(machine.hbm) * machine.hbm.clock_hz == pytest.approx(parts * pins)
    assert float(found) / FLOAT16_BYTES * 2 == pytest.approx(parts * flops, rel=0.03)
    if inside is not None:
        assert float(found) == pytest.approx(parts * inside, rel=1e-3)
    if capacity is not None:
        assert memory_bytes(machine.hbm) == parts * capacity


def test_bytes_at_the_banks_by_hand():
    """1024 banks x 32 bytes every 2 ns are 16.4 TB/s; every 4 ns half of that."""
    assert float(pim_bytes_per_second(Hardware())) == pytest.approx(32 * 32 * 32 / 2e-9)
    slow = replace(Hardware(), "pim.product_cycles", 4)
    assert float(pim_bytes_per_second(slow)) == pytest.approx(32 * 32 * 32 / 4e-9)
    assert banks(slow.hbm) == 32


def test_a_pace_below_that_of_a_burst_changes_nothing():
    for cycles in (0, 1, 2):
        assert float(product_cycles(replace(Hardware(), "pim.product_cycles", cycles))) == 2


@pytest.mark.parametrize("path", ["exact", "closed"])
def test_products_at_half_the_pace_take_longer(path):
    """Two results of 32 products each: the tile grows by about 2 cycles for each product."""
    batch = make_batch([512] * 32, channels=list(range(32)))
    layers = [
        float(
            simulate_case(
                make_case(
                    "gpt3-7b", batch, system="npu-pim", changes={"pim.product_cycles": cycles}
                ),
                path=path,
            ).iteration.channel_cycles[0, 0]
        )
        for cycles in (0, 2, 4, 8)
    ]
    assert layers[0] == layers[1] < layers[2] < layers[3]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("fidelity", ["simulator", "intended"])
def test_a_part_runs_a_model(name, fidelity):
    """Attention in the banks takes no less than their bandwidth allows."""
    machine = load_hardware(name)
    channels = machine.hbm.num_channels
    batch = make_batch([256] * channels, channels=list(range(channels)), num_channels=int(channels))
    case = make_case("gpt3-7b", batch, system="npu-pim", hardware=name, fidelity=fidelity)
    found = simulate_case(case, path="closed")
    model, shares = case.model, case.parallel.tp
    keys_and_values = 2 * FLOAT16_BYTES * 256 * channels * model.width / shares
    seconds = float(found.iteration.channel_cycles.sum()) / channels / machine.npu.clock_hz
    assert seconds > keys_and_values / float(pim_bytes_per_second(machine))
    result = found.to_dict()
    assert 0 < result["power_watts"] < result["peak_power_watts"]
    assert math.isfinite(result["tokens_per_second"])


def test_a_part_is_a_base_of_explore():
    batch = make_batch([256] * 32, channels=list(range(32)))
    found = explore(
        "gddr6-aim",
        "gpt3-7b",
        batch,
        {"pim.product_cycles": [2, 4, 8], "energy.interface_bit": [2.0, 5.5]},
        method="grid",
        system="npu-pim",
    )
    assert (found.points, found.flagged) == (6, 0)
    assert found.front[0].knobs == {"pim.product_cycles": 2, "energy.interface_bit": 2.0}


@pytest.mark.parametrize("name", config.names("hardware"))
def test_every_named_machine_states_what_it_is(name):
    assert config.about("hardware", name)
    load_hardware(name)


def test_parts_carry_the_energies_of_their_memory():
    for name, memory in (("gddr6-aim", "gddr6-aim"), ("hbm-pim", "hbm2"), ("hbm3", "hbm3")):
        energies = config.load_memory(memory).values
        machine = load_hardware(name)
        assert {field: getattr(machine.energy, field) for field in energies} == energies
