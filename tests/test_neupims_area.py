"""Area and power: against a published chip of the same size, worked by hand, and growing with every
part.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.costs.area import AreaCosts, area, average_power_watts, peak_power
from neupims.costs.energy import Counts, energy
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace


def test_the_default_npu_is_as_large_as_a_tpu_v4():
    """Google's TPU v4 (Jouppi et al., ISCA 2023, table 4): the same parts in 7 nm, 8 arrays of 128
    x 128, 128 + 32 MiB, four stacks of HBM2.

    Its die is below 600 mm2 (593 by its photograph), with links and a sparse unit that our NPU
    lacks; it draws 192 W at most.
    """
    default = area(Hardware())
    assert 400 < float(default.npu) < 600
    power = peak_power(Hardware())
    assert 0.5 * 192 < float(power.npu + power.memory) < 192


def test_pim_takes_the_published_shares():
    """Row buffers: 3.11 % of the memory. Units: 1024 banks x 0.094 mm2 + 256 bank groups x 0.036,
    of 32 GiB at 81.8 mm2.
    """
    default = area(Hardware())
    assert float(default.dram) == pytest.approx(32 * 81.8)
    assert float(default.row_buffers / default.dram) == pytest.approx(0.0311)
    assert float(default.pim_units) == pytest.approx(1024 * 0.094 + 256 * 0.036)
    assert (
        0.05 < float(default.pim / default.dram) < 0.11
    )  # AttAcc, with four times the banks in a die: 10.84 %


def test_arrays_by_hand():
    """Four arrays are 44 mm2 of the TPU v4i, so eight are 88."""
    assert float(area(Hardware()).arrays) == pytest.approx(88)
    assert float(area(Hardware()).scratchpad) == pytest.approx(
        0.28 * 400 / 134.2 * 137.438, rel=1e-4
    )


def test_parts_add_up():
    default = area(Hardware())
    parts = [float(getattr(default, each.name)) for each in dataclasses.fields(default)]
    assert float(default.total) == pytest.approx(sum(parts))
    assert float(default.uncore / default.npu) == pytest.approx(AreaCosts().uncore_share)
    power = peak_power(Hardware())
    assert float(power.total) == pytest.approx(
        sum(float(getattr(power, each.name)) for each in dataclasses.fields(power))
    )


@pytest.mark.parametrize(
    ("field", "more", "part"),
    [
        ("npu.array_width", 256, "arrays"),
        ("npu.num_arrays", 16, "arrays"),
        ("npu.vector_lanes", 256, "vector"),
        ("npu.scratchpad_bytes", 2e8, "scratchpad"),
        ("hbm.num_channels", 64, "memory_interface"),
        ("hbm.rows", 65536, "dram"),
        ("pim.macs_per_bank", 32, "pim_units"),
        ("pim.row_buffers", 3, "row_buffers"),
    ],
)
def test_more_is_larger(field, more, part):
    assert float(getattr(area(replace(Hardware(), field, more)), part)) > float(
        getattr(area(Hardware()), part)
    )


def test_without_pim_the_memory_is_plain():
    plain = area(Hardware(), pim=False)
    assert float(plain.pim) == 0
    assert float(area(replace(Hardware(), "pim.row_buffers", 1)).row_buffers) == 0
    assert float(plain.npu) == float(area(Hardware()).npu)


def test_peak_power_by_hand():
    """131072 products of 0.72 pJ at 1 GHz are 94.4 W; a product in all banks of 32 channels, 3216
    pJ every 2 ns, is 51.5 W.
    """
    power = peak_power(Hardware())
    assert float(power.arrays) == pytest.approx(94.4, rel=1e-3)
    assert float(power.pim) == pytest.approx(51.5, rel=1e-3)


def test_average_power():
    """10^12 products in 10 ms: 0.72 J / 0.01 s = 72 W."""
    counts = Counts(1e12, *([0.0] * 12))
    assert float(average_power_watts(energy(counts, Hardware()), 0.01)) == pytest.approx(72)


def test_a_batch_of_designs_is_the_loop():
    designs = replace(
        replace(Hardware(), "hbm.num_channels", jnp.array([8, 32, 64])),
        "npu.num_arrays",
        jnp.array([2, 8, 16]),
    )
    axes = jax.tree.map(lambda leaf: 0 if jnp.ndim(leaf) else None, designs)
    batched = jax.jit(
        jax.vmap(
            lambda hardware: (area(hardware).total, peak_power(hardware).total), in_axes=(axes,)
        )
    )(designs)
    for row, (channels, arrays) in enumerate(((8, 2), (32, 8), (64, 16))):
        one = replace(replace(Hardware(), "hbm.num_channels", channels), "npu.num_arrays", arrays)
        np.testing.assert_allclose(
            (batched[0][row], batched[1][row]), (area(one).total, peak_power(one).total), rtol=1e-6
        )


def test_costs_say_how_far_to_trust_them():
    for each in dataclasses.fields(AreaCosts):
        assert each.metadata["source"].partition(": ")[0] in (
            "data sheet",
            "published",
            "estimate",
        ), each.name
