"""Mixtures of experts in the timing: which weights are read, and how tokens spread over them."""

import dataclasses

import numpy as np
import pytest

from neupims.exploration.impossible import REASONS, reason_code
from neupims.machine.calibration import DEFAULT
from neupims.machine.config import load_model
from neupims.machine.hardware import Hardware
from neupims.machine.layer_kinds import find_mix
from neupims.machine.model import Decoder
from neupims.machine.record import replace
from neupims.machine.systems import FIDELITIES
from neupims.machine.workload import Parallel, check_parallel, make_batch
from neupims.timing.experts import route, visits
from neupims.timing.iteration import simulate
from neupims.timing.memory_check import spread_more
from neupims.timing.npu import Context, activate, matrix_product
from neupims.timing.shapes import fc1_sides, fc2_sides

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


SKEWED = dataclasses.replace(MIXTRAL, expert_skew=1.0)


@pytest.mark.parametrize(
    ("active", "skew", "wanted"),
    [
        (1, 0.0, [1 / 4] * 4),
        (1, 1.0, [12 / 25, 6 / 25, 4 / 25, 3 / 25]),
        (2, 1.0, [24 / 25, 12 / 25, 8 / 25, 6 / 25]),
        # 2 / (1 + 1/4 + 1/9 + 1/16) is above 1: all tokens visit the first, one of the others too
        (2, 2.0, [1, 36 / 61, 16 / 61, 9 / 61]),
        (4, 2.0, [1, 1, 1, 1]),
    ],
)
def test_shares_of_tokens_that_visit_an_expert(active, skew, wanted):
    model = dataclasses.replace(MIXTRAL, experts=4, active_experts=active, expert_skew=skew)
    np.testing.assert_allclose(visits(model, 6), [*wanted, 0, 0], rtol=1e-5)


def test_experts_that_tokens_of_a_skew_hit():
    """Tokens drawn by systematic sampling: exactly two experts each, with the given shares."""
    shares = np.asarray(visits(SKEWED, 8))
    ends, rng = np.cumsum(shares), np.random.default_rng(0)

    def draw():
        start = rng.random()
        return {int(np.searchsorted(ends, start + step)) for step in (0, 1)}

    hits = [set().union(*(draw() for _ in range(3))) for _ in range(4000)]
    routing = route(SKEWED, 3.0, mix=find_mix(SKEWED))
    assert float(routing.products.sum()) == pytest.approx(np.mean(list(map(len, hits))), rel=0.01)
    assert float(routing.rows) == pytest.approx(3 * 2)
    uniform = route(MIXTRAL, 3.0)
    assert float(routing.products.sum()) < float(uniform.products)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_no_skew_is_uniform_routing(fidelity):
    product = matrix_product(fc1_sides, routed=True)
    wanted = product(context_of(MIXTRAL, fidelity), 40.0, 0.0)
    mixed = context_of(MIXTRAL, fidelity)._replace(mix=find_mix(SKEWED))
    np.testing.assert_allclose(product(mixed, 40.0, 0.0), wanted, rtol=1e-4)
    dense = context_of(DENSE, fidelity)
    one = product(dense._replace(mix=find_mix(SKEWED)), 40.0, 0.0)
    np.testing.assert_allclose(one, product(dense, 40.0, 0.0), rtol=1e-6)


@pytest.mark.parametrize("model", [MIXTRAL, SKEWED])
def test_experts_that_are_dealt_to_devices(model):
    """With 4 groups of one device each, the first has experts 1 and 5 of 8 whole."""
    product = matrix_product(fc1_sides, routed=True)
    shared, dealt = (
        context_of(model, tp=4)._replace(parallel=Parallel(4, 1, ep=ep), mix=find_mix(model))
        for ep in (1, 4)
    )
    expert, tokens = 4096 * 2 * 14336, 64.0
    mean, busiest = (float(product(each, tokens, 0.0).macs) for each in (shared, dealt))
    assert mean == pytest.approx(2 * tokens * expert / 4)
    visited = np.asarray(visits(model, 8))[[0, 4]].sum()
    assert busiest == pytest.approx(visited * tokens * expert, rel=1e-5)
    assert (busiest > 1.2 * mean) == (model is SKEWED)
    rows = [float(activate(each, tokens, 0.0).write_bytes) for each in (shared, dealt)]
    assert rows[1] / rows[0] == pytest.approx(busiest / mean)


def test_a_step_of_a_skewed_model():
    """Few tokens hit fewer experts, so less is read."""
    batch = make_batch([500] * 4, np.arange(4))
    steps = [simulate(Hardware(), each, batch, Parallel(4, 1)) for each in (MIXTRAL, SKEWED)]
    assert not any(step.flagged for step in steps)
    assert float(steps[1].layer_cycles) < float(steps[0].layer_cycles)


@pytest.mark.parametrize(
    ("model", "tp", "sentence"),
    [
        (DENSE, 4, "ep must be 1 for a model without experts, but is 4"),
        (MIXTRAL, 2, r"ep must divide the 2 devices of a layer \(tp\), but is 4"),
        (dataclasses.replace(MIXTRAL, experts=6), 4, "ep must divide the 6 experts, but is 4"),
    ],
)
def test_experts_that_cannot_be_dealt(model, tp, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_parallel(model, Parallel(tp, 1, ep=4))


@pytest.mark.parametrize(
    ("experts", "tp", "ep", "wanted"), [(8, 1, 2, 2), (6, 4, 4, 2), (0, 4, 2, 2), (8, 4, 2, 0)]
)
def test_designs_whose_experts_cannot_be_dealt(experts, tp, ep, wanted):
    model = dataclasses.replace(MIXTRAL, layers=1, experts=experts) if experts else DENSE
    batch = make_batch([100] * 4, [0, 1, 2, 3])
    parallel = Parallel(tp, 4 if model is DENSE else 1, ep=ep)
    assert int(reason_code(Hardware(), model, batch, parallel)) == wanted
    assert "(ep)" in REASONS[2]


def test_advised_devices_can_be_dealt_the_experts():
    """The weights take 52.5 MiB, and a device has 22. Three devices would do, but they make no two
    groups.
    """
    model = Decoder(1, 768, 12, 12, 4096, experts=4, active_experts=2)
    hardware = replace(replace(Hardware(), "hbm.rows", 176), "hbm.num_channels", 4)
    batch = make_batch([10], [0])
    assert spread_more(hardware, model, batch, Parallel(2, 1)) == Parallel(3, 1)
    assert spread_more(hardware, model, batch, Parallel(2, 1, ep=2)) == Parallel(4, 1, ep=2)
    assert spread_more(hardware, model, batch, Parallel(16, 1)) is None  # more than the heads
