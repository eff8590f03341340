"""Energy of a device: the simulator's arithmetic, parts that add up, scaling with work and time,
and no dependence on a clock.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.costs.area import area
from neupims.costs.energy import Counts, Energy, command_energies, energy, idle_watts
from neupims.machine.costs import AreaCosts, EnergyCosts
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace

COUNTS = Counts(
    npu_macs=1e12,
    vector_operations=1e9,
    scratchpad_bytes=1e9,
    read_bytes=1e9,
    write_bytes=1e8,
    activations=1e6,
    group_activations=1e6,
    gwrites=1e5,
    comps=1e7,
    result_reads=1e6,
    refreshes=1e4,
    elapsed_cycles=1e6,
    link_bytes=1e8,
)
NOTHING = Counts(*([0.0] * len(dataclasses.fields(Counts))))


def parts(spent: Energy) -> dict[str, float]:
    return {each.name: float(getattr(spent, each.name)) for each in dataclasses.fields(spent)}


def test_commands_cost_what_the_simulator_says():
    """1.2 V x (65 mA x 48 ns - 55 x 34 - 40 x 14) = 828 pJ; 1.2 x (390 - 55) x 2 = 804; 1.2 x (500
    - 55) x 2 = 1068; 1.2 x 195 x 260 = 60840.
    """
    each = command_energies(Hardware())
    expected = (828, 804, 1068, 4 * 828, 16 * 804, 4 * 804, 804, 60840)
    np.testing.assert_allclose(each, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "command", "factor"),
    [
        ("hbm.row_bytes", 2048, "activation", 2),
        ("hbm.row_bytes", 2048, "refresh", 2),
        ("hbm.rows", 65536, "refresh", 2),
        ("hbm.bus_bits", 256, "read", 2),
        ("hbm.burst_length", 8, "write", 2),
        ("pim.macs_per_bank", 32, "comp", 2),
        ("pim.page_bytes", 512, "gwrite", 0.5),
        ("pim.banks_per_activation", 8, "group_activation", 2),
        ("hbm.num_channels", 64, "refresh", 1),
        ("hbm.banks_per_group", 8, "result_read", 2),
    ],
)
def test_commands_scale_with_what_they_serve(field, value, command, factor):
    before, after = (
        getattr(command_energies(hardware), command)
        for hardware in (Hardware(), replace(Hardware(), field, value))
    )
    assert after == pytest.approx(factor * before)


@pytest.mark.parametrize("clock_hz", [0.5e9, 2e9, 4e9])
def test_no_energy_depends_on_the_memory_clock(clock_hz):
    """A faster memory moves the same charge in less time: 12.6 pJ a byte at any clock."""
    faster = replace(Hardware(), "hbm.clock_hz", clock_hz)
    assert command_energies(faster) == command_energies(Hardware())
    assert parts(energy(COUNTS, faster)) == parts(energy(COUNTS, Hardware()))
    read = dataclasses.replace(NOTHING, read_bytes=1e9)
    assert parts(energy(read, faster))["dram_array"] == pytest.approx(804 / 64 * 1e-3)


@pytest.mark.parametrize("clock_hz", [0.5e9, 2e9])
def test_no_energy_depends_on_the_core_clock(clock_hz):
    """As many core cycles more as the clock is faster take the same time."""
    other = replace(Hardware(), "npu.clock_hz", clock_hz)
    same = dataclasses.replace(COUNTS, elapsed_cycles=COUNTS.elapsed_cycles * clock_hz / 1e9)
    for name, joules in parts(energy(same, other)).items():
        assert joules == pytest.approx(parts(energy(COUNTS, Hardware()))[name], rel=1e-6), name


def test_what_waits_pays_by_time_and_nothing_else_does():
    slower = dataclasses.replace(COUNTS, elapsed_cycles=3 * COUNTS.elapsed_cycles)
    before, after = (parts(energy(counts, Hardware())) for counts in (COUNTS, slower))
    waiting = {"npu_idle", "pim_idle", "background"}
    for name, joules in after.items():
        assert joules == pytest.approx((3 if name in waiting else 1) * before[name]), name


def test_idle_power_by_hand():
    """A TPU v4 draws 90 W idle with 32 GB of HBM2, over a die below 600 mm2; 64 ranks of HBM2 draw
    1.2 V x 55 mA each.
    """
    idle, parts_mm2 = idle_watts(Hardware()), area(Hardware())
    assert idle.npu == pytest.approx((90 - 32 * 0.132) / 600 * parts_mm2.npu)
    assert 0.5 * 90 < idle.npu + idle.memory < 90
    assert idle.memory == pytest.approx(64 * 1.2 * 55e-3)
    assert idle.pim == pytest.approx(0.132 / 81.8 * parts_mm2.pim_units)
    assert idle_watts(Hardware(), pim=False).pim == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("npu.num_arrays", 16), ("npu.scratchpad_bytes", 3e8), ("npu.vector_lanes", 256)],
)
def test_a_larger_npu_leaks_more(field, value):
    larger = replace(Hardware(), field, value)
    assert idle_watts(larger).npu > idle_watts(Hardware()).npu
    assert idle_watts(larger).memory == idle_watts(Hardware()).memory


def test_parts_add_up():
    spent = energy(COUNTS, Hardware())
    assert float(spent.total) == pytest.approx(sum(parts(spent).values()), rel=1e-6)
    assert all(part > 0 for part in parts(spent).values())


def test_worked_case():
    """10^12 products at 0.72 pJ are 0.72 J; 1.1 GB and 10^6 results of 64 bytes over the interface,
    8 x 0.8 pJ a byte, are 7.45 mJ.
    """
    spent = parts(energy(COUNTS, Hardware()))
    assert spent["npu"] == pytest.approx(0.72)
    assert spent["dram_interface"] == pytest.approx(6.4e-12 * (1.1e9 + 64e6))
    assert spent["dram_array"] == pytest.approx(1e-12 * (828e6 + 804 * 1e9 / 64 + 1068 * 1e8 / 64))
    assert spent["pim"] == pytest.approx(1e-12 * (3312e6 + 12864e5 + 3216e7 + 804e6))
    assert spent["refresh"] == pytest.approx(60840e-12 * 1e4)
    assert spent["background"] == pytest.approx(
        2 * 66e-12 * 1e6 * 2 * 32
    )  # two row buffers, 2 ranks, 32 channels
    assert spent["link"] == pytest.approx(80e-12 * 1e8)


def test_a_read_costs_less_than_published_for_the_whole_access():
    """Fine-Grained DRAM, MICRO 2017: 3.92 pJ a bit of HBM2, with more rows opened than a stream
    opens. The currents of the ini stay below it.
    """
    stream = dataclasses.replace(
        NOTHING, read_bytes=1e9, activations=1e9 / 1024, elapsed_cycles=1e9 / 1024
    )
    spent = parts(energy(stream, Hardware()))
    per_bit = sum(spent[name] for name in ("dram_array", "dram_interface", "background")) / 8e9
    assert 2.0e-12 < per_bit < 3.92e-12


def test_the_second_row_buffer_costs_only_where_pim_runs():
    idle = dataclasses.replace(NOTHING, elapsed_cycles=1e6)
    both = dataclasses.replace(idle, group_activations=1.0)
    single = replace(Hardware(), "pim.row_buffers", 1)
    assert parts(energy(both, Hardware()))["background"] == pytest.approx(
        2 * parts(energy(idle, Hardware()))["background"]
    )
    assert parts(energy(both, single))["background"] == pytest.approx(
        parts(energy(idle, single))["background"]
    )


def test_more_of_anything_costs_more():
    before = float(energy(COUNTS, Hardware()).total)
    for each in dataclasses.fields(COUNTS):
        more = dataclasses.replace(COUNTS, **{each.name: 2 * getattr(COUNTS, each.name)})
        assert float(energy(more, Hardware()).total) > before, each.name


def test_every_cost_of_energy_counts_and_none_twice():
    """Twice a cost adds what it stood for; twice all costs are twice the energy."""
    before = float(energy(COUNTS, Hardware()).total)
    added, twice = 0.0, Hardware()
    for each in dataclasses.fields(EnergyCosts):
        name = f"energy.{each.name}"
        value = 2 * getattr(Hardware().energy, each.name)
        extra = float(energy(COUNTS, replace(Hardware(), name, value)).total) - before
        assert extra > 0, name
        added, twice = added + extra, replace(twice, name, value)
    assert added == pytest.approx(before, rel=1e-4)
    assert float(energy(COUNTS, twice).total) == pytest.approx(2 * before, rel=1e-6)


def test_a_batch_of_designs_is_the_loop():
    """Costs are fields of the machine, and may have a batch axis as all of them."""
    counts = jax.tree.map(lambda value: value * jnp.array([1.0, 2.0, 0.0]), COUNTS)
    hardware = replace(Hardware(), "hbm.num_channels", jnp.array([16, 32, 64]))
    hardware = replace(hardware, "energy.mac", jnp.array([0.5, 1.0, 2.0]))
    hardware = replace(hardware, "area.mac", jnp.array([1e-3, 2e-3, 3e-3]))
    axes = jax.tree.map(lambda leaf: 0 if jnp.ndim(leaf) else None, (counts, hardware))
    batched = jax.jit(jax.vmap(energy, in_axes=axes))(counts, hardware)
    for row in range(3):
        one = jax.tree.map(
            lambda leaf, row=row: leaf[row] if jnp.ndim(leaf) else leaf, (counts, hardware)
        )
        np.testing.assert_allclose(batched.total[row], energy(*one).total, rtol=1e-6)


@pytest.mark.parametrize("costs", [EnergyCosts, AreaCosts])
def test_costs_say_how_far_to_trust_them(costs):
    for each in dataclasses.fields(costs):
        label, separator, source = each.metadata["source"].partition(": ")
        assert separator, each.name
        assert label in ("published", "derived", "assumed"), each.name
        assert source


def test_an_impossible_cost_is_refused():
    with pytest.raises(ValueError, match=r"energy\.mac must be 0 or from 0\.005 to 100 pJ, not -1"):
        EnergyCosts(mac=-1)
    with pytest.raises(ValueError, match=r"area\.mac must be 0 or from 1e-5 to 0\.05 mm2, not -1"):
        replace(Hardware(), "area.mac", -1)
