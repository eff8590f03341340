"""Energies of kinds of memory: arithmetic from published currents, order in files, refusals."""

import dataclasses

import pytest

from neupims.costs.energy import Counts, command_energies, energy
from neupims.machine import config
from neupims.machine.hardware import Hardware

FIELDS = (
    "activate_kilobyte",
    "read_bit",
    "write_bit",
    "interface_bit",
    "pim_bit",
    "refresh_kilobyte",
    "standby_gigabyte",
)


def values(name):
    return config.load_memory(name).values


@pytest.mark.parametrize("name", config.names("memory"))
def test_every_energy_of_a_memory_has_a_source(name):
    memory = config.load_memory(name)
    assert tuple(memory.values) == tuple(memory.sources) == FIELDS
    assert memory.about
    for source in memory.sources.values():
        label, separator, text = source.partition(": ")
        assert label in ("published", "derived", "assumed")
        assert separator
        assert text
    config.set_fields(Hardware(), {"energy.memory": name})


def test_all_kinds_are_there():
    assert set(config.names("memory")) == {
        *("hbm2", "hbm2e", "hbm3", "hbm3e", "gddr6-aim", "lpddr5x-pim")
    }


def test_hbm3_is_hbm2_at_a_lower_voltage():
    """Energy is charge times voltage, and charge is voltage times capacity."""
    for field in FIELDS:
        scaled = values("hbm2")[field] * (1.1 / 1.2) ** 2
        assert values("hbm3")[field] == pytest.approx(scaled, rel=5e-3), field


def test_hbm3e_from_the_currents_of_a_pseudo_channel():
    """SAFARI's HBM3E_6400MTs: mA at 1.1 V, cycles of 0.625 ns, a burst of 256 bits in 1.25 ns."""
    volts, cycle, burst = 1.1, 0.625, 1.25
    random, pins = 5.1486 / 3.1798, 0.52 / 5.1486
    activate = (106.1 * (45 + 26) - 70.5 * 26) / 45
    read = volts * (560.7 - 71.2) * random * burst / 256
    write = volts * (389.5 - 71.2) * random * burst / 256
    expected = {
        "activate_kilobyte": volts * (activate - 71.2) * 45 * cycle,
        "read_bit": read * (1 - pins),
        "write_bit": write - read * pins,
        "interface_bit": 2 * read * pins,
        "pim_bit": read * (1 - pins) / 4,
        "refresh_kilobyte": volts * (164.7 - 73.3) * 350 / (16 * 16384 / 8192),
        "standby_gigabyte": volts * 71.2e-3 / 0.5,
    }
    assert values("hbm3e") == pytest.approx(expected, rel=5e-3)


def test_aim_from_the_power_table_of_its_simulator():
    """mW of a channel of 4 Gb with rows of 2 KB."""
    expected = {
        "activate_kilobyte": 132.6 / 2 * 44.5 / 2,
        "read_bit": 876.3 / 2 * 1.25 / 256,
        "write_bit": 1106.3 / 2 * 1.25 / 256,
        "interface_bit": 5.5,
        "pim_bit": 3 * 876.3 / 2 * 1.0 / (16 * 256),
        "refresh_kilobyte": 132.6 / 2 * 44.5 / 2,
        "standby_gigabyte": 527.5e-3,
    }
    assert values("gddr6-aim") == pytest.approx(expected, rel=5e-3)


def test_lpddr5x_from_the_currents_of_a_die():
    """mA at 1.05 V; x16 at 7.5 Gb/s a pin is 120 bits a nanosecond; rows of 2 KB."""
    volts, rate = 1.05, 120
    expected = {
        "activate_kilobyte": volts * (53 * 60 - 40 * 42 - 32.5 * 18) / 2,
        "read_bit": volts * (390 - 40) / rate,
        "write_bit": volts * (265 - 40) / rate,
        "interface_bit": 5 * 0.5**2 / 4,
        "pim_bit": volts * (390 - 40) / rate / 4,
        "refresh_kilobyte": volts * (205 - 40) * 280 / (2 * 2**20 / 8192),
        "standby_gigabyte": volts * 40e-3 / 2,
    }
    assert values("lpddr5x-pim") == pytest.approx(expected, rel=1e-2)


def test_products_in_the_banks_cost_less_than_reads_over_the_interface():
    """It is why one multiplies in the memory; AttAcc's table has 0.44 pJ a bit beside a bank."""
    for name in config.names("memory"):
        each = values(name)
        assert 0.3 < each["pim_bit"] < each["read_bit"] < each["read_bit"] + each["interface_bit"]
    assert 0.3 < Hardware().energy.pim_bit < 0.6


def test_a_memory_stands_before_the_fields_beside_it(tmp_path):
    """In any order, in a file and in changes; changes come after a file."""
    for text in ('memory = "HBM3"\nread_bit = 1', 'read_bit = 1\nmemory = "hbm3"'):
        path = tmp_path / "mine.toml"
        path.write_text(f"[energy]\n{text}\n")
        machine = config.load_hardware(path)
        assert machine.energy.read_bit == 1
        assert machine.energy.activate_kilobyte == values("hbm3")["activate_kilobyte"]
        assert machine.energy.mac == Hardware().energy.mac
        sources = config.cost_sources(path)
        assert sources["energy.read_bit"] == f"given: {path}"
        assert sources["energy.pim_bit"].startswith("derived: a quarter of read_bit")
        again = config.set_fields(machine, {"energy.memory": "hbm2"})
        assert again.energy.read_bit == values("hbm2")["read_bit"]


@pytest.mark.parametrize("name", ["ddr2", "", "hbm2.toml", 3, None])
def test_an_unknown_memory_is_refused_with_those_that_there_are(tmp_path, name):
    with pytest.raises(ValueError, match=r"there is no memory .*; there are gddr6-aim, hbm2,"):
        config.set_fields(Hardware(), {"energy.memory": name})


def test_another_memory_changes_energy_alone():
    counts = Counts(*([1e6] * len(dataclasses.fields(Counts))))
    default = Hardware()
    other = config.set_fields(default, {"energy.memory": "lpddr5x-pim"})
    assert dataclasses.replace(other, energy=default.energy) == default
    assert command_energies(other) != command_energies(default)
    before, after = energy(counts, default), energy(counts, other)
    for part in ("npu", "vector", "scratchpad", "npu_idle", "pim_idle", "link"):
        assert float(getattr(after, part)) == float(getattr(before, part)), part
    for part in ("dram_array", "dram_interface", "refresh", "background"):
        assert float(getattr(after, part)) != float(getattr(before, part)), part
