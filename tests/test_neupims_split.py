"""neupims/timing/split.py: keys and values of one request on several channels."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from neupims import explore, make_case, search_schedule, simulate_case
from neupims.machine.calibration import DEFAULT
from neupims.machine.config import load_model
from neupims.machine.hardware import Hardware
from neupims.machine.workload import Parallel, make_batch
from neupims.timing.attention import attention_counts, closed_attention
from neupims.timing.capacity import request_tiles
from neupims.timing.iteration import simulate
from neupims.timing.split import group_of_channels, merge_cycles

MODEL = load_model("llama3-8b")
FOUR = Parallel(1, 1, 4)  # channels of a request
BATCH = make_batch([4096, 1024, 512, 2048], channels=[0, 1, 2, 0], sub_batches=[0, 1, 0, 1])


def run(parallel, **options):
    return simulate(Hardware(), MODEL, BATCH, parallel, fidelity="intended", **options)


def work_of(batch, parallel):
    options = {"system": "neupims", "interleaved": True, "channels": 32, "fidelity": "intended"}
    return closed_attention(Hardware(), MODEL, batch, parallel, calibration=DEFAULT, **options)


def test_channels_with_the_same_remainder_share_a_request():
    groups = group_of_channels(jnp.arange(32), Hardware(), FOUR)
    assert groups.tolist() == [*range(8)] * 4
    assert group_of_channels(jnp.arange(32), Hardware(), Parallel(1, 1)).tolist() == [*range(32)]


def test_each_channel_has_the_pieces_of_its_group():
    """The load of a group is that of requests of a quarter of the length, on each of 4 channels."""
    split, counts = work_of(BATCH, FOUR)
    quarters = make_batch(
        np.asarray(BATCH.seq_lens) // 4, BATCH.channels, np.asarray(BATCH.sub_batches)
    )
    single, _ = work_of(quarters, Parallel(1, 1))
    for name in ("alone", "beside"):
        found, want = getattr(split, name), getattr(single, name)
        np.testing.assert_allclose(found, np.concatenate([want[:, :, :8]] * 4, axis=2), rtol=1e-6)
    assert split.requests.sum() == 4
    assert split.longest.tolist() == [4096, 2048]  # softmax is of the whole row
    expected = attention_counts(Hardware(), MODEL, BATCH, FOUR, fidelity="intended")
    np.testing.assert_allclose(np.array(counts), np.array(expected), rtol=1e-6)


def test_the_results_of_the_pieces_are_added_on_the_vector_units():
    """3 sums of 128 numbers, one pass each, for 32 heads of 4 requests on 8 units."""
    assert merge_cycles(Hardware(), MODEL, FOUR, 4, 32) == 3 * 32 * 4 / 8
    assert merge_cycles(Hardware(), MODEL, Parallel(1, 1), 4, 32) == 0


def test_a_split_shortens_the_attention_of_few_requests():
    """And the recurrence follows the closed form, which packs tiles in the mean."""
    closed = {split: run(Parallel(1, 1, split)) for split in (1, 4)}
    exact = run(FOUR, path="exact")
    loads = {split: float(found.channel_cycles.max()) for split, found in closed.items()}
    assert 3 < loads[1] / loads[4] < 4.2
    assert closed[4].layer_cycles < closed[1].layer_cycles
    assert float(exact.channel_cycles.sum()) == pytest.approx(
        float(closed[4].channel_cycles.sum()), rel=0.07
    )
    assert float(exact.tokens_per_second) == pytest.approx(
        float(closed[4].tokens_per_second), rel=0.05
    )


def test_products_and_tiles_are_conserved():
    """Pieces of whole rows: the same products and tiles; each piece has its own GWRITE."""
    whole, split = (
        attention_counts(Hardware(), MODEL, BATCH, spread, fidelity="intended")
        for spread in (Parallel(1, 1), FOUR)
    )
    assert (whole.products, whole.tiles, whole.results) == (
        split.products,
        split.tiles,
        split.results,
    )
    assert whole.gwrites < split.gwrites
    tiles, quarter = (
        request_tiles(Hardware(), MODEL, BATCH.seq_lens, spread, fidelity="intended")
        for spread in (Parallel(1, 1), FOUR)
    )
    assert (tiles == 4 * quarter).all()


def test_128k_tokens_fit_with_a_split():
    """A channel of the default machine has 1 GiB, a request of 131,072 tokens 16 GiB."""
    batch = make_batch([131072], [0])
    options = {"tp": 1, "pp": 1, "fidelity": "intended", "sub_batches": 1}
    with pytest.raises(ValueError, match="channel"):
        simulate_case(make_case("llama3-8b", batch, **options), path="closed")
    found = simulate_case(make_case("llama3-8b", batch, kv_split=32, **options), path="closed")
    assert found.iteration.tokens_per_second > 0


@pytest.mark.parametrize(
    ("parallel", "options", "sentence"),
    [
        (FOUR, {"fidelity": "simulator"}, "needs the fidelity intended"),
        (FOUR, {"fidelity": "intended", "system": "gpu"}, "leave it out with the system gpu"),
        (Parallel(1, 1, 5), {"fidelity": "intended"}, "must divide the 32 channels, but is 5"),
    ],
)
def test_impossible_splits_are_refused(parallel, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        simulate(Hardware(), MODEL, BATCH, parallel, **options)


def test_a_schedule_is_searched_without_a_split():
    case = make_case("llama3-8b", BATCH, tp=1, kv_split=4, fidelity="intended")
    with pytest.raises(ValueError, match="leave out kv_split"):
        search_schedule(case)


def test_the_split_is_a_knob_of_exploration():
    knobs = {"parallel.kv_split": [1, 4, 5]}
    options = {"method": "grid", "fidelity": "intended", "schedule": "trace"}
    small = dataclasses.replace(MODEL, layers=2)
    found = explore("neupims", small, BATCH, knobs, **options)
    assert (found.points, found.flagged) == (3, 1)  # 5 does not divide the 32 channels
    assert found.front[0].knobs["parallel.kv_split"] == 4
    with pytest.raises(ValueError, match="fidelity intended"):
        explore("neupims", small, BATCH, knobs, **options | {"fidelity": "simulator"})
