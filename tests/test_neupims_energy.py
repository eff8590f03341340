"""Energy of a device: the simulator's arithmetic, parts that add up, and scaling with the work."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.costs.energy import Counts, Energy, EnergyCosts, command_energies, energy
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
    each = command_energies(Hardware(), EnergyCosts())
    expected = (828, 804, 1068, 4 * 828, 16 * 804, 4 * 804, 804, 60840, 66)
    np.testing.assert_allclose(each, expected, rtol=1e-6)


def test_commands_scale_with_what_they_serve():
    hardware, costs = Hardware(), EnergyCosts()
    before = command_energies(hardware, costs)
    assert command_energies(
        replace(hardware, "hbm.row_bytes", 2048), costs
    ).activation == pytest.approx(2 * before.activation)
    assert command_energies(
        replace(hardware, "pim.macs_per_bank", 32), costs
    ).comp == pytest.approx(2 * before.comp)
    assert command_energies(replace(hardware, "hbm.bus_bits", 256), costs).read == pytest.approx(
        2 * before.read
    )
    assert command_energies(
        replace(hardware, "pim.banks_per_activation", 8), costs
    ).group_activation == pytest.approx(2 * before.group_activation)
    faster = command_energies(replace(hardware, "hbm.clock_hz", 2e9), costs)
    assert faster.active_cycle == pytest.approx(before.active_cycle / 2)


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
    per_bit = float(energy(stream, Hardware()).total) / 8e9
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


def test_background_depends_on_time_not_on_the_core_clock():
    """Twice the core cycles at twice the core clock take the same time."""
    twice = dataclasses.replace(COUNTS, elapsed_cycles=2 * COUNTS.elapsed_cycles)
    faster = replace(Hardware(), "npu.clock_hz", 2e9)
    assert parts(energy(twice, faster))["background"] == pytest.approx(
        parts(energy(COUNTS, Hardware()))["background"]
    )


def test_more_of_anything_costs_more():
    before = float(energy(COUNTS, Hardware()).total)
    for each in dataclasses.fields(COUNTS):
        more = dataclasses.replace(COUNTS, **{each.name: 2 * getattr(COUNTS, each.name)})
        assert float(energy(more, Hardware()).total) > before, each.name


def test_a_batch_of_designs_is_the_loop():
    counts = jax.tree.map(lambda value: value * jnp.array([1.0, 2.0, 0.0]), COUNTS)
    channels = jnp.array([16, 32, 64])
    costs = dataclasses.replace(EnergyCosts(), mac=jnp.array([0.5, 1.0, 2.0]))
    hardware = replace(Hardware(), "hbm.num_channels", channels)
    axes = jax.tree.map(lambda leaf: 0 if jnp.ndim(leaf) else None, (counts, hardware, costs))
    batched = jax.jit(jax.vmap(energy, in_axes=axes))(counts, hardware, costs)
    for row in range(3):
        one = jax.tree.map(
            lambda leaf, row=row: leaf[row] if jnp.ndim(leaf) else leaf,
            (counts, hardware, costs),
        )
        np.testing.assert_allclose(batched.total[row], energy(*one).total, rtol=1e-6)


def test_costs_say_how_far_to_trust_them():
    for each in dataclasses.fields(EnergyCosts):
        label, separator, source = each.metadata["source"].partition(": ")
        assert separator, each.name
        assert label in ("measured", "data sheet", "published", "estimate"), each.name
        assert source


def test_an_impossible_cost_is_refused():
    with pytest.raises(ValueError, match=r"costs\.mac must be a number of at least 0, not -1"):
        EnergyCosts(mac=-1)
