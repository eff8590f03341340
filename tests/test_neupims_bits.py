"""Weights and activations of 8 and 4 bits: the bytes that move, what must fit, and the rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.machine.calibration import DEFAULT
from neupims.machine.hardware import Hardware
from neupims.machine.layer_kinds import Mix, find_mix
from neupims.machine.model import Decoder
from neupims.machine.record import replace
from neupims.machine.systems import FIDELITIES
from neupims.machine.workload import Parallel, make_batch
from neupims.scheduling.decision import Choices, decide, make_genome
from neupims.scheduling.objective import Layer, make_problem
from neupims.timing.capacity import activation_bytes, device_weight_bytes
from neupims.timing.gemm import Bits, gemm, products_at_once, tiling
from neupims.timing.iteration import simulate
from neupims.timing.npu import Context, activate, attend, matrix_product, normalize
from neupims.timing.prefill import prefill
from neupims.timing.shapes import fc1_sides
from neupims.timing.stages import PRODUCTS, npu_operation

PLAIN = Decoder(8, 512, 4, 2, 1024, mlp_matrices=3)
EXPERTS = dataclasses.replace(
    PLAIN, experts=8, active_experts=2, shared_experts=1, expert_width=256, expert_bits=16
)
ALONE = Parallel(1, 1)
BATCH = make_batch([700, 90, 400, 300], [0, 1, 0, 1])
FAST = replace(replace(Hardware(), "npu.speedup_8_bit", 2), "npu.speedup_4_bit", 4)


def change(model, **numbers):
    return dataclasses.replace(model, **numbers)


def context_of(model, fidelity="intended", system="neupims", hardware=FAST):
    return Context(
        hardware, model, BATCH, ALONE, DEFAULT, system, fidelity, find_mix(model).of_layer
    )


def product(tokens=40.0, inner=512.0, features=1024.0, *, hardware=None, fidelity="intended", bits):
    hardware = hardware or Hardware()
    return gemm(
        hardware, tokens, inner, features, bits=bits, calibration=DEFAULT, fidelity=fidelity
    )


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize(("inputs", "weights"), [(16, 16), (16, 4), (8, 8), (4, 8)])
def test_bytes_of_a_product(inputs, weights, fidelity):
    work = product(bits=Bits(inputs, weights), fidelity=fidelity)
    assert float(work.read_bytes) == weights / 8 * 512 * 1024 + inputs / 8 * 40 * 512
    wide = product(bits=Bits(), fidelity=fidelity)
    assert float(work.write_bytes) == float(wide.write_bytes)  # results have 16 bits
    assert float(work.macs) == float(wide.macs) == 40 * 512 * 1024
    assert float(work.cycles) <= float(wide.cycles)


def test_a_product_that_waits_for_its_weights_takes_their_time():
    """With a slow memory, the time is that of the weights."""
    large = {"tokens": 1.0, "inner": 8192.0, "features": 4096.0}
    large["hardware"] = replace(Hardware(), "hbm.clock_hz", 1e8)
    wide, narrow = (float(product(**large, bits=Bits(16, bits)).cycles) for bits in (16, 4))
    assert wide / narrow == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize(
    ("bits", "wanted"),
    [((16, 4), 1), ((8, 8), 2), ((8, 4), 2), ((4, 8), 2), ((4, 4), 4), ((16, 16), 1)],
)
def test_the_wider_number_sets_the_rate(bits, wanted):
    assert float(products_at_once(FAST.npu, Bits(*bits))) == wanted
    assert float(products_at_once(Hardware().npu, Bits(*bits))) == 1


def test_arrays_hold_more_inner_channels_at_a_higher_rate():
    """2,560 tokens are 20 blocks. Each meets 4 blocks of 128 inner channels, or 2 of 256, which
    take 128 cycles to load and then 16 for each further block of features. The first one waits for
    the memory: it is free here.
    """
    free = replace(FAST, "hbm.clock_hz", 1e11)
    wide, narrow = (
        float(product(2560.0, hardware=free, bits=bits).cycles) for bits in (Bits(), Bits(8, 8))
    )
    one_block = 128 + 16 * 7
    assert wide - narrow == pytest.approx(20 * (4 - 2) * one_block, rel=0.01)
    slow = replace(free, "npu.speedup_8_bit", 1)
    assert float(product(2560.0, hardware=slow, bits=Bits(8, 8)).cycles) == pytest.approx(wide)


def test_numbers_of_4_bits_are_multiplied_at_least_as_fast_as_those_of_8():
    fast = replace(Hardware(), "gpu.speedup_8_bit", 2).gpu
    assert [float(products_at_once(fast, Bits(bits, bits))) for bits in (16, 8, 4)] == [1, 2, 2]


def test_tiles_of_narrow_numbers_are_larger():
    """Half of the scratchpad, 64 MiB and a little, is 8192 x 8192 weights of 8 bits, but not of
    16; the longer side of a tile is halved until it fits.
    """
    for bits, tiles in ((16, 4), (8, 2), (4, 1)):
        found = tiling(Hardware(), 1.0, 8192.0, 8192.0, Bits(16, bits))
        assert float(found.inner_tiles * found.feature_tiles) == tiles
        numbers = 128 * float(found.inner) + 128 * float(found.features)
        assert 2 * numbers + bits / 8 * float(found.inner * found.features) <= 134218 * 512


def test_each_operation_writes_what_the_next_one_reads():
    model = change(PLAIN, weight_bits=4, activation_bits=8)
    for run in (normalize, activate, attend):
        wide, narrow = (run(context_of(each), 4.0, 0.0) for each in (PLAIN, model))
        assert float(narrow.write_bytes) == float(wide.write_bytes) / 2
        assert float(narrow.read_bytes) == float(wide.read_bytes)


def test_experts_have_their_own_bits():
    """Two experts of 8 get one token, and the shared one gets it too."""
    model = change(EXPERTS, weight_bits=8, expert_bits=4)
    work = matrix_product(fc1_sides, routed=True)(context_of(model), 1.0, 0.0)
    weights = 512 * 2 * 256
    assert float(work.read_bytes) == (2 * 4 / 8 + 8 / 8) * weights + 3 * 2 * 512
    dense = matrix_product(fc1_sides)(context_of(model), 1.0, 0.0)
    assert float(dense.read_bytes) == 8 / 8 * weights + 2 * 512


def test_a_gpu_multiplies_narrow_numbers_at_its_own_rate():
    """8,192 tokens keep it busy. With routed experts of 4 bits, inputs of 8 bits and the shared
    expert at 16, the routed ones alone are faster.
    """
    model = change(EXPERTS, width=8192, expert_width=8192)
    fast = replace(Hardware(), "gpu.speedup_8_bit", 2)
    tokens, (fc1,) = 8192.0, [each for each in PRODUCTS if each.name == "ffn.fc1"]
    one = 2 * tokens * 8192 * 2 * 8192 / 312e12 * 1e9  # cycles of one expert for all tokens
    for bits, wanted in (
        ({}, 2 + 1),
        ({"weight_bits": 8, "expert_bits": 8, "activation_bits": 8}, 1 + 1 / 2),
        ({"expert_bits": 4, "activation_bits": 8}, 1 + 1),
    ):
        context = context_of(change(model, **bits), system="gpu", hardware=fast)
        work = npu_operation(fc1, context, tokens)
        assert float(work.cycles) == pytest.approx(wanted * one, rel=1e-3)


def test_memory_that_narrow_models_take():
    model = change(PLAIN, weight_bits=4, activation_bits=8)
    assert float(device_weight_bytes(model, ALONE)) == device_weight_bytes(PLAIN, ALONE) / 4
    # the residual stream, two inputs of the gate, and its output
    assert float(activation_bytes(PLAIN, ALONE, 7)) == 7 * (2 * 512 + 2 * 2048 + 2 * 1024)
    assert float(activation_bytes(model, ALONE, 7)) == 7 * (2 * 512 + 2 * 2048 + 1024)


@pytest.mark.parametrize(
    "options", [{}, {"fidelity": "intended"}, {"system": "npu-only"}, {"system": "gpu"}]
)
def test_fewer_bits_are_never_slower(options):
    models = [change(PLAIN, weight_bits=bits, activation_bits=bits) for bits in (16, 8, 4)]
    options |= {"mix": Mix(narrow=True)}  # of the first one too: one compilation for all
    found = [simulate(FAST, model, BATCH, ALONE, **options) for model in models]
    cycles = [float(each.layer_cycles) for each in found]
    assert cycles == sorted(cycles, reverse=True)
    assert cycles[0] > cycles[2]
    assert not any(each.flagged for each in found)


def test_a_prefill_of_narrow_numbers_is_faster():
    """It is bound by the arrays, so their rate decides."""
    narrow = change(PLAIN, weight_bits=8, activation_bits=8)
    same, fast = (
        float(prefill(machine, narrow, make_batch([4000], [0]), ALONE).layer_cycles)
        for machine in (Hardware(), FAST)
    )
    assert fast < 0.9 * same


def test_traced_models_need_to_say_that_numbers_are_narrow():
    models = [PLAIN, change(PLAIN, weight_bits=8)]
    stacked = jax.tree.map(lambda *numbers: jnp.array(numbers), *models)
    assert find_mix(stacked) == Mix(narrow=True)
    run = jax.vmap(lambda model: simulate(FAST, model, BATCH, ALONE, mix=Mix(narrow=True)))
    found = run(stacked)
    assert not found.flagged.any()
    alone = [
        float(simulate(FAST, model, BATCH, ALONE, mix=mix).layer_cycles)
        for model, mix in zip(models, (Mix(), Mix(narrow=True)), strict=True)
    ]
    np.testing.assert_allclose(found.layer_cycles, alone, rtol=1e-5)


def test_a_search_costs_what_simulate_costs():
    model, choices = change(PLAIN, weight_bits=8), Choices(32, sub_batches=(2,))
    problem = make_problem(Hardware(), model, ALONE, BATCH.seq_lens)
    decision = decide(choices, make_genome(choices, BATCH.channels, BATCH.sub_batches))
    done = simulate(Hardware(), model, BATCH, ALONE)
    for measure, wanted in (("time", done.layer_cycles), ("energy", done.energy_joules)):
        cost = Layer(choices, measure=measure, mix=find_mix(model))(problem, decision)
        assert float(cost.objective) == pytest.approx(float(wanted), rel=1e-4)
