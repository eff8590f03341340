"""The LM head: its bytes and products, once for the batch, and where it runs."""

import dataclasses

import numpy as np
import pytest

from neupims.envelope import features
from neupims.machine.calibration import DEFAULT
from neupims.machine.case import Case, make_case
from neupims.machine.hardware import Hardware
from neupims.machine.layer_kinds import Mix, find_mix, layer_kinds
from neupims.machine.model import Decoder
from neupims.machine.workload import Parallel, make_batch
from neupims.timing.iteration import simulate
from neupims.timing.npu import Context
from neupims.timing.prefill import first_token_seconds, prefill
from neupims.timing.stages import head_work

WITHOUT = Decoder(8, 512, 4, 2, 1024, mlp_matrices=3, vocabulary=32000)
WITH = dataclasses.replace(WITHOUT, lm_head=1)
BATCH = make_batch([700, 90, 400, 300, 1], [0, 1, 0, 1, 2])
TOKENS = 5


def context_of(model, parallel, system="npu-only", fidelity="intended"):
    mix = find_mix(model).of_layer
    return Context(Hardware(), model, BATCH, parallel, DEFAULT, system, fidelity, mix)


def test_bytes_and_products_by_hand():
    for tp in (1, 4):
        work = head_work(context_of(WITH, Parallel(tp, 1)), 7.0)
        norm, rows = 2 * (7 + 2) * 512, 2 * 7 * 512
        assert float(work.read_bytes) == 2 * 512 * 32000 / tp + norm + rows
        assert float(work.write_bytes) == 2 * 7 * 512 + 2 * 7 * 32000 / tp
        assert float(work.macs) == 7 * 512 * 32000 / tp
    assert not any(head_work(context_of(WITHOUT, Parallel(1, 1)), 7.0))


def test_its_numbers_have_16_bits():
    narrow = dataclasses.replace(WITH, weight_bits=4, activation_bits=8)
    works = [head_work(context_of(model, Parallel(1, 1)), 7.0) for model in (WITH, narrow)]
    np.testing.assert_array_equal(*works)


def test_on_a_gpu_it_takes_the_time_of_its_weights():
    work = head_work(context_of(WITH, Parallel(1, 1), system="gpu"), 1.0)
    moved = 2 * 512 * 32000 + 2 * 32000
    assert float(work.cycles) == pytest.approx(moved / 1555e9 * 1e9, rel=1e-3)


@pytest.mark.parametrize("system", ["neupims", "gpu"])
def test_an_iteration_has_it_once(system):
    """Also with several sub-batches, layers and kinds of layers; the layer is the same."""
    spread, options = Parallel(1, 2), {"system": system}
    plain, more = (simulate(Hardware(), each, BATCH, spread, **options) for each in (WITHOUT, WITH))
    head = head_work(context_of(WITH, spread, system, "simulator"), float(TOKENS))
    assert float(plain.head_cycles) == 0
    assert float(more.head_cycles) == pytest.approx(float(head.cycles), rel=1e-6)
    assert float(more.layer_cycles) == float(plain.layer_cycles)
    longer = float(more.iteration_cycles - plain.iteration_cycles)
    assert longer == pytest.approx(float(head.cycles), rel=1e-3)
    assert float(more.tokens_per_second * more.iteration_seconds) == pytest.approx(TOKENS)
    # one of the two groups of devices computes it
    read = float(more.counts.read_bytes - plain.counts.read_bytes)
    assert read == pytest.approx(float(head.read_bytes) / 2, rel=1e-3)
    assert float(more.energy_joules) > float(plain.energy_joules)
    assert not more.flagged


def test_every_kind_of_layers_has_it():
    model = dataclasses.replace(WITH, window=64, window_layers=4, weight_bits=8)
    kinds = layer_kinds(model, find_mix(model))
    assert [each.mix for each in kinds] == [
        Mix(windows=True, narrow=True, lm_head=True),
        Mix(narrow=True, lm_head=True),
    ]


def test_a_prefill_computes_it_for_one_token_of_each_prompt_in_the_last_group():
    spread = Parallel(1, 2)
    plain, more = (prefill(Hardware(), each, BATCH, spread) for each in (WITHOUT, WITH))
    head = head_work(context_of(WITH, spread), float(TOKENS))
    assert float(more.head_cycles) == pytest.approx(float(head.cycles), rel=1e-6)
    first = [
        first_token_seconds(Hardware(), model, BATCH, spread, run)
        for model, run in ((WITHOUT, plain), (WITH, more))
    ]
    assert first[1] - first[0] == pytest.approx(float(head.cycles) / 1e9, rel=1e-2)


def test_the_flag_and_the_expected_error_of_the_layer():
    assert make_case("llama3-8b", BATCH, lm_head=True).model.lm_head == 1
    with pytest.raises(ValueError, match="the model has no vocabulary"):
        make_case("gpt3-7b", BATCH, lm_head=True)
    both = [features(Case(Hardware(), model, BATCH, Parallel(1, 1))) for model in (WITH, WITHOUT)]
    assert both[0] == both[1]
