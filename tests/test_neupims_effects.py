"""Fields that are said to change nothing change nothing, and are warned of or refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims import Hardware, Parallel, load_model, make_batch, replace
from neupims.costs.area import area
from neupims.machine.effects import idle_changes, idle_reason
from neupims.machine.quantity import describe
from neupims.timing.iteration import simulate

BATCH = make_batch([300, 512, 40, 1700] * 4, channels=np.arange(16))
MODEL, SPREAD = (jax.tree.map(float, each) for each in (load_model("gpt3-7b"), Parallel(4, 2)))
BASE = replace(jax.tree.map(float, Hardware()), "link.bandwidth_bytes_per_second", 64e9)
RUNS = [
    ("neupims", 2, "simulator"),
    ("neupims", 1, "intended"),
    ("npu-pim", 1, "simulator"),
    ("npu-only", 1, "simulator"),
    ("gpu", 1, "intended"),
]
FACTORS = 2.0, 0.5, 1 / 64


@pytest.mark.parametrize(("system", "sub_batches", "fidelity"), RUNS)
def test_a_field_without_effect_changes_no_time_and_the_others_do(system, sub_batches, fidelity):
    """Every field times FACTORS, in the closed form: seconds, and joules and area where the
    field is said to have no effect at all.
    """

    @jax.jit
    @jax.vmap
    def run(hardware):
        found = simulate(
            hardware, MODEL, BATCH, SPREAD, system=system, sub_batches=sub_batches,
            fidelity=fidelity, path="closed",
        )  # fmt: skip
        return found.iteration_seconds, found.energy_joules, area(hardware).total

    fields = list(describe(BASE))
    machines = [BASE]
    for each in fields:
        for factor in FACTORS:
            value = np.asarray((each.value or 1e-5) * factor)
            machines.append(replace(BASE, each.name, value))
    rows = jax.tree.map(lambda *values: jnp.stack([jnp.float32(v) for v in values]), *machines)
    seconds, joules, mm2 = (np.asarray(part) for part in run(rows))
    for place, each in enumerate(fields):
        mine = slice(1 + len(FACTORS) * place, 1 + len(FACTORS) * (place + 1))
        reason = idle_reason(each, system, fidelity, 16)  # bits of the model
        if reason:
            assert (seconds[mine] == seconds[0]).all(), each.name
        if reason and system == "gpu" and each.name.startswith("energy."):
            assert (joules[mine] == joules[0]).all(), each.name
        if each.effect == "none":
            assert (joules[mine] == joules[0]).all(), each.name
            assert (mm2[mine] == mm2[0]).all(), each.name


def test_the_sentences_name_every_field_and_the_reason():
    machine = functools.reduce(
        lambda hardware, change: replace(hardware, *change),
        [("npu.num_cores", 4), ("hbm.twr_cycles", 20), ("gpu.board_watts", 700)],
        Hardware(),
    )
    first, second = idle_changes(machine, "neupims", "simulator", [MODEL])
    assert first == (
        "npu.num_cores, hbm.twr_cycles differ from the default without effect on times: no part of"
        " the model depends on it"
    )
    assert second.startswith("gpu.board_watts differs from the default without effect on times:")
    assert idle_changes(Hardware(), "neupims", "simulator", [MODEL]) == []
    costs = replace(Hardware(), "energy.read_bit", 3)
    assert idle_changes(costs, "neupims", "simulator", [MODEL]) == []
    assert "the system gpu does not have it" in idle_changes(costs, "gpu", "simulator", [MODEL])[0]
    assert (
        idle_changes(replace(Hardware(), "area.dram_gigabyte", 22), "gpu", "simulator", [MODEL])
        == []
    )
    vectors = replace(Hardware(), "npu.vector_units", 4)
    assert "intended fidelity only" in idle_changes(vectors, "neupims", "simulator", [MODEL])[0]
    assert idle_changes(vectors, "neupims", "intended", [MODEL]) == []
    assert (
        "the system npu-only does not have it"
        in idle_changes(
            replace(Hardware(), "pim.row_buffers", 1), "npu-only", "simulator", [MODEL]
        )[0]
    )


def test_fast_products_of_few_bits_need_a_model_that_has_them():
    eight = replace(Hardware(), "npu.speedup_8_bit", 2)
    four = replace(Hardware(), "npu.speedup_4_bit", 2)
    small = replace(replace(load_model("gpt3-7b"), "activation_bits", 8), "weight_bits", 8)
    mixed = replace(small, "activation_bits", 16)
    ends = "differs from the default without effect on times: no product of the model has numbers"
    for machine, models, bits in (
        (eight, [MODEL], 8),
        (eight, [mixed], 8),
        (eight, [MODEL, small], 0),
        (four, [small], 4),
        (four, [replace(small, "activation_bits", 4)], 4),
    ):
        (*said,) = idle_changes(machine, "neupims", "simulator", models)
        assert said == ([f"npu.speedup_{bits}_bit {ends} of {bits} bits"] if bits else [])
    narrow = replace(replace(small, "activation_bits", 4), "weight_bits", 4)
    assert idle_changes(four, "neupims", "simulator", [narrow]) == []
