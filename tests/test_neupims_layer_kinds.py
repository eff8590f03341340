"""Models whose layers differ: shared experts, dense layers beside experts, sliding windows."""

import dataclasses

import jax
import numpy as np
import pytest

from neupims.exploration.explore import explore
from neupims.machine.calibration import DEFAULT
from neupims.machine.hardware import Hardware
from neupims.machine.layer_kinds import Mix, find_mix, layer_kinds
from neupims.machine.model import Decoder
from neupims.machine.model_size import kv_cache_bytes
from neupims.machine.workload import Parallel, make_batch
from neupims.scheduling.objective import make_problem
from neupims.timing.capacity import activation_bytes, request_bytes, request_tiles
from neupims.timing.gemm import gemm
from neupims.timing.iteration import simulate
from neupims.timing.npu import Context, activate, matrix_product
from neupims.timing.prefill import prefill, prefill_attention
from neupims.timing.shapes import fc1_sides, fc2_sides

DENSE = Decoder(8, 512, 4, 2, 1024, mlp_matrices=3)
EXPERTS = dataclasses.replace(
    DENSE, experts=8, active_experts=2, expert_width=256, expert_bits=16, mlp_width=2048
)
ALONE = Parallel(1, 1)
BATCH = make_batch([700, 90, 400, 300], [0, 1, 0, 1])


def change(model, **numbers):
    return dataclasses.replace(model, **numbers)


def test_the_kinds_of_a_model_and_their_shares():
    assert find_mix(DENSE) == Mix()
    (one,) = layer_kinds(DENSE, Mix())
    assert one.share == 1
    assert one.model == DENSE
    model = change(EXPERTS, shared_experts=1, dense_layers=2, window=64, window_layers=6)
    mix = find_mix(model)
    assert mix == Mix(True, True, True)
    kinds = layer_kinds(model, mix)
    found = {
        (int(each.model.experts), int(each.model.window), each.mix.shared): float(each.share)
        for each in kinds
    }
    assert found == {
        (0, 64, False): 2 / 8 * 6 / 8,
        (0, 0, False): 2 / 8 * 2 / 8,
        (8, 64, True): 6 / 8 * 6 / 8,
        (8, 0, True): 6 / 8 * 2 / 8,
    }
    assert len(layer_kinds(change(DENSE, window=64), Mix(windows=True))) == 1  # in all layers


@pytest.mark.parametrize("fidelity", ["simulator", "intended"])
def test_shared_experts_are_one_more_mlp_for_all_tokens(fidelity):
    model = change(EXPERTS, shared_experts=3)
    context = Context(Hardware(), EXPERTS, BATCH, ALONE, fidelity=fidelity)
    shared = context._replace(model=model, mix=Mix(shared=True))
    options = {"calibration": DEFAULT, "fidelity": fidelity}
    for sides, inner, features in (
        (fc1_sides, 512.0, 2 * 3 * 256.0),
        (fc2_sides, 3 * 256.0, 512.0),
    ):
        product = matrix_product(sides, routed=True)
        more = gemm(Hardware(), 40.0, inner, features, **options)
        wanted = jax.tree.map(np.add, product(context, 40.0, 0.0), more)
        np.testing.assert_allclose(product(shared, 40.0, 0.0), wanted, rtol=1e-6)
        assert not any(product(shared, 0.0, 0.0))
    rows = [float(activate(each, 40.0, 0.0).write_bytes) for each in (context, shared)]
    assert rows == pytest.approx([2 * 256 * 40 * 2, 2 * 256 * 40 * (2 + 3)])


def step(model, batch=BATCH, **options):
    done = simulate(Hardware(), model, batch, ALONE, **options)
    assert not done.flagged
    return done


@pytest.mark.parametrize(
    "options", [{"path": "exact"}, {"fidelity": "intended"}, {"system": "npu-only"}]
)
def test_windows(options):
    plain, every = step(DENSE, **options), step(change(DENSE, window=128), **options)
    clipped = dataclasses.replace(BATCH, seq_lens=np.minimum(BATCH.seq_lens, 128))
    jax.tree.map(np.testing.assert_array_equal, every, step(DENSE, clipped, **options))
    wide = step(change(DENSE, window=700, window_layers=3), **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), wide, plain)
    some = step(change(DENSE, window=128, window_layers=3), **options)
    for name in ("layer_cycles", "iteration_cycles", "energy_joules"):
        one, two, mean = (float(getattr(each, name)) for each in (every, plain, some))
        assert one < two
        assert mean == pytest.approx(3 / 8 * one + 5 / 8 * two)
    assert float(some.tokens_per_second * some.iteration_seconds) == pytest.approx(4)
    busy = [float(each.npu_utilization * each.layer_cycles) for each in (every, plain, some)]
    assert busy[2] == pytest.approx(3 / 8 * busy[0] + 5 / 8 * busy[1])


def test_dense_layers_beside_experts():
    model = change(EXPERTS, shared_experts=1, dense_layers=2)
    dense, mixed = step(change(DENSE, mlp_width=2048)), step(model)
    experts = step(change(model, dense_layers=0))
    assert float(experts.layer_cycles) > float(step(EXPERTS).layer_cycles)
    for name in ("layer_cycles", "iteration_seconds", "stage_cycles", "op_cycles"):
        one, two, mean = (np.asarray(getattr(each, name)) for each in (dense, experts, mixed))
        np.testing.assert_allclose(mean, 2 / 8 * one + 6 / 8 * two, rtol=1e-5)


def test_attention_of_a_prefill_with_a_window():
    """Counted one query after the other."""
    lengths, window = np.array([1000, 130, 60]), 200
    work = [
        prefill_attention(Hardware(), model, lengths, ALONE, calibration=DEFAULT)
        for model in (DENSE, change(DENSE, window=window), change(DENSE, window=1000))
    ]
    seen = sum(min(token + 1, window) for length in lengths for token in range(length))
    assert float(work[1].macs) == 2 * 512 * seen
    assert float(work[1].cycles) < float(work[0].cycles)
    np.testing.assert_array_equal(work[2], work[0])
    done = [prefill(Hardware(), model, BATCH, ALONE) for model in (DENSE, change(DENSE, window=64))]
    assert float(done[1].layer_cycles) < float(done[0].layer_cycles)


def test_the_memory_of_layers_with_a_window():
    model, lengths = change(DENSE, window=256, window_layers=6), np.array([100, 5000])
    for fidelity in ("simulator", "intended"):
        given = (lengths, ALONE)
        full, seen = (
            request_tiles(Hardware(), DENSE, tokens, ALONE, fidelity=fidelity)
            for tokens in (lengths, np.minimum(lengths, 256))
        )
        found = request_tiles(Hardware(), model, *given, fidelity=fidelity)
        np.testing.assert_allclose(found, 6 / 8 * seen + 2 / 8 * full)
    found = request_bytes(Hardware(), model, lengths, ALONE, system="gpu")
    np.testing.assert_allclose(found, [kv_cache_bytes(model, int(each)) for each in lengths])
    mixed = change(EXPERTS, dense_layers=1)
    small, large = (float(activation_bytes(each, ALONE, 4)) for each in (EXPERTS, mixed))
    assert large == 2 * 4 * (512 + 3 * 2048) > small  # two inputs of the gate and its output


def test_explore_agrees_with_simulate():
    model = change(EXPERTS, shared_experts=1, dense_layers=2, window=128, window_layers=6)
    options = {"method": "grid", "schedule": "trace"}
    found = explore("neupims", model, BATCH, {"npu.num_arrays": [8, 4]}, **options)
    assert found.flagged == 0
    assert found.base.metrics["tokens_per_second"] == pytest.approx(
        float(step(model).tokens_per_second), rel=1e-4
    )


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        ({"shared_experts": 1}, "shared_experts"),
        ({"dense_layers": 1}, "dense_layers beside experts"),
        ({"window": 9}, "a window"),
    ],
)
def test_schedules_of_such_models_are_not_searched(numbers, word):
    with pytest.raises(ValueError, match=f"the model has {word}, for which schedules are not"):
        make_problem(Hardware(), change(EXPERTS, **numbers), ALONE, [30, 40])
