"""Area: against a published chip of the same size, worked by hand, and growing with every part."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.costs.area import area, gpu_area
from neupims.machine.costs import AreaCosts
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace


def test_the_default_npu_is_as_large_as_a_tpu_v4():
    """Google's TPU v4 (Jouppi et al., ISCA 2023, table 4): the same parts in 7 nm, 8 arrays of 128
    x 128, 128 + 32 MiB, four stacks of HBM2.

    Its die is below 600 mm2 (593 by its photograph), with links and a sparse unit that our NPU
    lacks.
    """
    default = area(Hardware())
    assert 400 < float(default.npu) < 600


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


@pytest.mark.parametrize(
    ("field", "more", "part"),
    [
        ("npu.array_width", 256, "arrays"),
        ("npu.array_height", 256, "arrays"),
        ("npu.num_arrays", 16, "arrays"),
        ("npu.vector_units", 16, "vector"),
        ("npu.vector_lanes", 256, "vector"),
        ("npu.scratchpad_bytes", 2e8, "scratchpad"),
        ("hbm.num_channels", 64, "memory_interface"),
        ("hbm.bus_bits", 256, "memory_interface"),
        ("hbm.num_channels", 64, "dram"),
        ("hbm.rows", 65536, "dram"),
        ("hbm.row_bytes", 2048, "dram"),
        ("pim.macs_per_bank", 32, "pim_units"),
        ("hbm.num_channels", 64, "pim_units"),
        ("hbm.banks_per_group", 8, "pim_units"),
        ("hbm.bank_groups", 8, "pim_units"),
        ("hbm.ranks", 4, "pim_units"),
        ("pim.row_buffers", 3, "row_buffers"),
        ("hbm.num_channels", 64, "row_buffers"),
    ],
)
def test_more_is_larger(field, more, part):
    """The part grows, and no other one shrinks."""
    before, after = area(Hardware()), area(replace(Hardware(), field, more))
    assert float(getattr(after, part)) > float(getattr(before, part))
    for each in dataclasses.fields(before):
        assert float(getattr(after, each.name)) >= float(getattr(before, each.name)), each.name


@pytest.mark.parametrize(
    ("field", "value"),
    [("npu.clock_hz", 2e9), ("hbm.clock_hz", 2e9), ("hbm.tfaw_cycles", 60)],
)
def test_what_is_not_built_takes_no_area(field, value):
    assert area(replace(Hardware(), field, value)) == area(Hardware())


def test_narrow_channels_have_narrow_interfaces():
    """16 channels of 128 bits and 128 channels of 16 bits have as many pins."""
    wide = replace(replace(Hardware(), "hbm.num_channels", 16), "hbm.bus_bits", 128)
    narrow = replace(replace(Hardware(), "hbm.num_channels", 128), "hbm.bus_bits", 16)
    assert float(area(wide).memory_interface) == pytest.approx(float(area(narrow).memory_interface))


def test_every_cost_of_area_counts():
    before = float(area(Hardware()).total)
    for each in dataclasses.fields(AreaCosts):
        dearer = replace(Hardware(), f"area.{each.name}", 1.1 * getattr(AreaCosts(), each.name))
        assert float(area(dearer).total) > before, each.name


def test_a_gpu_is_its_die_and_its_memory():
    """826 mm2, and 40 GB of memory at 81.8 mm2 for 2^30 bytes."""
    assert float(gpu_area(Hardware())) == pytest.approx(826 + 81.8 * 40e9 / 2**30)


def test_without_pim_the_memory_is_plain():
    plain = area(Hardware(), pim=False)
    assert float(plain.pim) == 0
    assert float(area(replace(Hardware(), "pim.row_buffers", 1)).row_buffers) == 0
    assert float(plain.npu) == float(area(Hardware()).npu)


def test_a_batch_of_designs_is_the_loop():
    designs = replace(
        replace(Hardware(), "hbm.num_channels", jnp.array([8, 32, 64])),
        "npu.num_arrays",
        jnp.array([2, 8, 16]),
    )
    axes = jax.tree.map(lambda leaf: 0 if jnp.ndim(leaf) else None, designs)
    batched = jax.jit(jax.vmap(lambda hardware: area(hardware).total, in_axes=(axes,)))(designs)
    for row, (channels, arrays) in enumerate(((8, 2), (32, 8), (64, 16))):
        one = replace(replace(Hardware(), "hbm.num_channels", channels), "npu.num_arrays", arrays)
        np.testing.assert_allclose(batched[row], area(one).total, rtol=1e-6)
