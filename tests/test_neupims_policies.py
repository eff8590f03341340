"""neupims/scheduling/policies.py: packing and splitting by hand-worked cases, against the reader of
traces, and Graham's bound.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.machine.config import load_model, load_parallel
from neupims.machine.hardware import Hardware
from neupims.machine.workload import halves
from neupims.scheduling.policies import (
    estimate_cycles,
    first_halves,
    halving_split,
    pack_longest_first,
    rank_by_number,
    round_robin,
    snake_split,
)


def test_round_robin_deals():
    assert round_robin(5, 3).tolist() == [0, 1, 2, 0, 1]


def test_the_estimate_of_the_paper_by_hand():
    """GPT-3 7B on 4 devices: 8 heads, 1024 channels, 2 rows of 512. 300 tokens: 10 tiles of keys,
    one row of values, 4 tiles a head.

    2 x (100 + 10 x 184) + 1 x 8 x (100 + 4 x 184) = 3,880 + 6,688; 513 tokens: 2 x (100 + 17 x 184)
    + 2 x 8 x 836.
    """
    found = estimate_cycles(
        Hardware(), load_model("gpt3-7b"), jnp.array([300, 513, 0]), load_parallel("gpt3-7b")
    )
    assert found.tolist() == [10568.0, 2 * (100 + 17 * 184) + 16 * 836, 0.0]


def test_the_longest_goes_first_onto_the_least_loaded():
    """8 -> 0; 7 -> 1; 6 -> 2; 5 -> 2 (6); 4 -> 1 (7); 3 -> 0 (8): loads 11, 11, 11."""
    assert pack_longest_first(jnp.array([3.0, 8, 4, 7, 5, 6]), 3).tolist() == [0, 0, 1, 1, 2, 2]


def test_loads_that_are_there_count():
    """Channel 0 holds 10: 4, 3 and 2 go to channel 1 until it holds 9, the last 2 too."""
    assert pack_longest_first(
        jnp.array([2.0, 4, 3, 2]), 2, loads=jnp.array([10.0, 0])
    ).tolist() == [1, 1, 1, 1]


def test_residents_stay_and_load_their_channel():
    packed = pack_longest_first(jnp.array([9.0, 4, 3, 2]), 2, resident=jnp.array([0, -1, -1, 0]))
    assert packed.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("channels", [2, 3])
def test_longest_first_keeps_its_bound(channels):
    """Graham: at most 4/3 - 1/(3m) of the least makespan, by enumeration; 7 requests, 30 draws."""
    rng = np.random.default_rng(channels)
    assignments = np.array(list(itertools.product(range(channels), repeat=7)))
    onto = (assignments[..., None] == np.arange(channels)).astype(float)
    worst = 0.0
    for work in np.round(rng.lognormal(3, 1, (30, 7))):
        best = np.einsum("arc,r->ac", onto, work).max(axis=1).min()
        loads = np.bincount(np.asarray(pack_longest_first(work, channels)), weights=work)
        worst = max(worst, loads.max() / best)
    assert 1 <= worst <= 4 / 3 - 1 / (3 * channels) + 1e-9


def test_the_bound_is_met_by_its_worst_case():
    """3, 3, 2, 2, 2 on two channels: longest first 3 + 2 + 2 = 7, the best 6, and 7/6 = 4/3 -
    1/6.
    """
    work = jnp.array([3.0, 3, 2, 2, 2])
    assert np.bincount(np.asarray(pack_longest_first(work, 2)), weights=work).max() == 7


def test_halves_take_turns_on_odd_lists():
    assert first_halves(jnp.array([3, 2, 5, 0, 1, 1])).tolist() == [2, 1, 2, 0, 1, 0]


def test_the_halving_split_is_the_one_of_the_reader():
    rng = np.random.default_rng(0)
    for channels in rng.integers(0, 7, (20, 33)):
        assert halving_split(channels, 7).tolist() == halves(channels, 7).tolist()


def test_the_split_maps_over_schedules():
    channels = np.random.default_rng(1).integers(0, 5, (8, 20))
    mapped = jax.jit(jax.vmap(lambda each: halving_split(each, 5)))(channels)
    assert mapped.tolist() == [halves(each, 5).tolist() for each in channels]


def test_the_snake_by_hand():
    """One channel, work 9 8 7 6: 9 and 6 against 8 and 7."""
    assert snake_split(jnp.array([9.0, 8, 7, 6]), jnp.zeros(4, int), 1).tolist() == [0, 1, 1, 0]


def test_the_snake_has_the_sizes_of_the_rule_and_the_better_balance():
    rng = np.random.default_rng(2)
    for _ in range(20):
        work, channels = rng.lognormal(6, 1, 60), rng.integers(0, 8, 60)
        order = np.lexsort((-work, channels))
        work, channels = work[order], channels[order]
        by_rule, snake = (
            np.asarray(split)
            for split in (halving_split(channels, 8), snake_split(work, channels, 8))
        )
        per_channel = [
            np.bincount(channels[split == 0], minlength=8).tolist() for split in (by_rule, snake)
        ]
        assert per_channel[0] == per_channel[1]
        assert abs(np.dot(work, 1 - 2 * snake)) < abs(np.dot(work, 1 - 2 * by_rule))


@pytest.mark.parametrize("requests", [1, 32, 33, 100])
def test_the_place_in_a_list_is_the_number_of_requests_before(requests):
    lists = np.random.default_rng(requests).integers(0, 5, requests)
    rank, lengths = rank_by_number(jnp.asarray(lists), 6)
    before = [int((lists[:request] == lists[request]).sum()) for request in range(requests)]
    assert rank.tolist() == before
    assert lengths.tolist() == np.bincount(lists, minlength=6).tolist()
