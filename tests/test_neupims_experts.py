"""Mixtures of experts in the timing: which weights are read, and how tokens spread over them."""

import dataclasses

import numpy as np
import pytest

from neupims.machine.calibration import DEFAULT
from neupims.machine.config import load_model
from neupims.machine.hardware import Hardware
from neupims.machine.model import Decoder
from neupims.machine.systems import FIDELITIES
from neupims.machine.workload import Parallel, make_batch
from neupims.timing.iteration import simulate
from neupims.timing.npu import Context, fc1_sides, fc2_sides, matrix_product, route

MIXTRAL = load_model("mixtral-8x7b")
DENSE = dataclasses.replace(MIXTRAL, experts=0, active_experts=0, expert_width=0, expert_bits=0)


def context_of(model, fidelity="intended", tp=1):
    batch = make_batch([100] * 4, [0, 1, 2, 3])
    return Context(Hardware(), model, batch, Parallel(tp, 1), DEFAULT, "neupims", fidelity)


def test_experts_that_random_tokens_hit():
    rng = np.random.default_rng(0)
    hits = [
        len({expert for _ in range(6) for expert in rng.choice(8, 2, replace=False)})
        for _ in range(4000)
    ]
    routing = route(MIXTRAL, 6.0)
    assert float(routing.products) == pytest.approx(np.mean(hits), rel=0.01)
    assert float(routing.products * routing.tokens) == pytest.approx(6 * 2)


def test_one_token_reads_its_active_experts_and_many_tokens_read_all():
    product = matrix_product(fc1_sides, routed=True)
    expert = 2 * 4096 * 2 * 14336  # bytes of the first matrix with its gate
    one, many = (product(context_of(MIXTRAL), tokens, 0.0) for tokens in (1.0, 512.0))
    assert 2 * expert < float(one.read_bytes) < 2.001 * expert  # tokens are read too
    assert 8 * expert < float(many.read_bytes) < 8.2 * expert
    assert float(many.macs) == pytest.approx(512 * 2 * expert / 2, rel=1e-5)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_a_mixture_of_one_expert_is_a_dense_mlp(fidelity):
    one = dataclasses.replace(MIXTRAL, experts=1, active_experts=1)
    for sides in (fc1_sides, fc2_sides):
        product = matrix_product(sides, routed=True)
        for tokens in (1.0, 40.0, 300.0):
            mixed, dense = (
                product(context_of(model, fidelity), tokens, 0.0) for model in (one, DENSE)
            )
            np.testing.assert_allclose(mixed, dense, rtol=1e-6)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_more_experts_are_never_faster(fidelity):
    """With the same active experts: more weights are read. And each beats all of its experts run
    as one dense MLP.
    """
    batch = make_batch([500] * 16, np.arange(16))
    cycles = []
    for experts in (2, 8, 16):
        model = dataclasses.replace(MIXTRAL, experts=experts)
        done = simulate(Hardware(), model, batch, Parallel(4, 1), fidelity=fidelity)
        assert not done.flagged
        cycles.append(float(done.layer_cycles))
    assert cycles == sorted(cycles)
    wide = Decoder(32, 4096, 32, 8, 8 * 14336, mlp_matrices=3)
    dense = simulate(Hardware(), wide, batch, Parallel(4, 1), fidelity=fidelity)
    assert cycles[1] < float(dense.layer_cycles)


def test_devices_share_each_expert():
    product = matrix_product(fc1_sides, routed=True)
    whole, quarter = (product(context_of(MIXTRAL, tp=tp), 64.0, 0.0) for tp in (1, 4))
    assert float(whole.macs) == pytest.approx(4 * float(quarter.macs))
