"""neupims/timing/columns.py: many designs side by side are each design alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.machine.calibration import DEFAULT
from neupims.machine.config import load_model, load_parallel
from neupims.machine.hardware import Hardware
from neupims.machine.layer_kinds import Mix
from neupims.machine.quantity import describe
from neupims.machine.record import replace, replace_all
from neupims.machine.workload import Batch, Parallel, make_batch
from neupims.timing.attention import attention_counts
from neupims.timing.columns import (
    designs_last,
    in_blocks,
    pack_pairs,
    reduce_requests,
    unpack_pairs,
)
from neupims.timing.gemv import channel_work, request_works
from neupims.timing.iteration import simulate
from neupims.timing.stage_attention import stage_attention

MODEL, PARALLEL = load_model("gpt3-7b"), load_parallel("gpt3-7b")
LENGTHS = np.append(np.random.default_rng(0).integers(1, 2048, 40), [0, 512, 1])
PLACES = np.random.default_rng(1).integers(0, 9, (4, len(LENGTHS)))
# The third design never starts a tile; a page of the last one has 256 commands.
DESIGNS = {
    "hbm.ranks": [2, 1, 4, 2],
    "hbm.banks_per_group": [4, 3, 4, 2],
    "hbm.tfaw_cycles": [30.0, 21.7, 300.0, 12.0],
    "pim.page_bytes": [1024, 512, 1024, 1024],
    "pim.macs_per_bank": [16, 5, 16, 2],
}


def sums(values, places, fidelity, lengths=LENGTHS):
    hardware = Hardware()
    for name, value in values.items():
        hardware = replace(hardware, name, value)

    @designs_last
    def side_by_side(hardware, lengths, places):
        options = {"fidelity": fidelity, "waits": (None, 12.0), "two_buffers": True}
        found = channel_work(hardware, MODEL, lengths, places, PARALLEL, count=10, **options)
        return found.cycles, found.requests, found.counts

    return side_by_side(hardware, lengths * 1.0, jnp.asarray(places))


@pytest.mark.parametrize("fidelity", ["simulator", "intended"])
@pytest.mark.parametrize("schedules", [1, 4])
def test_designs_side_by_side_are_each_design_alone(fidelity, schedules):
    knobs = {name: jnp.asarray(values) for name, values in DESIGNS.items()}
    places, axis = (PLACES, 0) if schedules > 1 else (PLACES[0], None)
    mapped = jax.vmap(lambda values, at: sums(values, at, fidelity), in_axes=(0, axis))
    works, requests, counts = jax.device_get(jax.jit(mapped)(knobs, jnp.asarray(places)))
    alone = jax.jit(lambda values, at: sums(values, at, fidelity))
    for design in range(4):
        values = {name: each[design] for name, each in knobs.items()}
        own = PLACES[design if schedules > 1 else 0]
        one, one_requests, one_counts = alone(values, jnp.asarray(own))
        np.testing.assert_allclose(works[design], one, rtol=1e-6)
        np.testing.assert_array_equal(requests[design], one_requests)
        np.testing.assert_array_equal(requests[design], np.bincount(own[LENGTHS > 0], minlength=10))
        for name, each in one_counts._asdict().items():
            assert getattr(counts, name)[design] == pytest.approx(float(each), rel=1e-6)
    assert np.isinf(works[2]).any()
    assert np.isfinite(works[[0, 1, 3]]).all()


@pytest.mark.parametrize("fidelity", ["simulator", "intended"])
def test_commands_are_counted_with_the_work_as_alone(fidelity):
    batch = make_batch(np.maximum(LENGTHS, 1), [0] * len(LENGTHS))
    counts = sums({}, PLACES[0], fidelity, np.asarray(batch.seq_lens))[2]
    expected = attention_counts(Hardware(), MODEL, batch, PARALLEL, fidelity=fidelity)
    for name, each in expected._asdict().items():
        assert getattr(counts, name) == pytest.approx(float(each), rel=1e-6)


OF_ATTENTION = [each.name for each in describe(Hardware()) if each.name[:3] in ("hbm", "pim")]


@pytest.mark.parametrize("field", ["npu.clock_hz", *OF_ATTENTION])
def test_any_field_may_be_the_only_one_that_differs(field):
    mapped = jax.vmap(lambda value: sums({field: value}, PLACES[0], "intended"))
    works, *_ = jax.eval_shape(mapped, jnp.array([1.0, 2.0, 3.0]))
    assert works.shape == (3, 2, 10, 2)


def test_schedules_alone_may_differ():
    each = jax.jit(lambda at: sums({}, at, "simulator")[0])
    works = jax.jit(jax.vmap(each))(jnp.asarray(PLACES))
    for design, places in enumerate(PLACES):
        np.testing.assert_allclose(works[design], each(jnp.asarray(places)), rtol=1e-6)


def test_the_work_of_a_place_is_that_of_its_requests():
    works, *_ = sums({}, PLACES[0], "simulator")
    each = request_works(Hardware(), MODEL, LENGTHS, PARALLEL, waits=(None, 12.0), two_buffers=True)
    expected = np.zeros(works.shape, np.float32)
    np.add.at(expected, (slice(None), PLACES[0]), np.asarray(each))
    np.testing.assert_allclose(works, expected, rtol=1e-6)
    assert not works[:, 9].any()


@pytest.mark.parametrize(
    ("system", "fidelity", "splits", "schedules"),
    [
        ("neupims", "simulator", [1, 1, 1, 1], 4),
        ("neupims", "intended", [1, 2, 4, 8], 1),
        ("neupims", "intended", [4, 1, 2, 8], 4),
        ("npu-pim", "simulator", [1, 1, 1, 1], 4),
    ],
)
def test_what_stages_know_of_attention_is_that_of_each_design(system, fidelity, splits, schedules):
    """Machines differ in channels, too, and requests in the number of channels that share them."""

    def find(design, places):
        hardware = replace(Hardware(), "hbm.num_channels", design["channels"])
        hardware = replace(hardware, "hbm.tfaw_cycles", design["tfaw"])
        batch = Batch(jnp.asarray(LENGTHS), places % 8, places % 2)
        return stage_attention(
            *(hardware, MODEL, batch, design["parallel"]),
            sub_batches=(0, 1),
            system=system,
            interleaved=system == "neupims",
            channels=16,
            fidelity=fidelity,
            calibration=DEFAULT,
        )

    designs = {
        "channels": jnp.array([8, 16, 16, 8]),
        "parallel": jax.tree.map(
            lambda *values: jnp.stack(values), *(Parallel(1, 1, split) for split in splits)
        ),
        "tfaw": jnp.array([30.0, 21.7, 300.0, 12.0]),
    }
    places = jnp.asarray(PLACES)
    if schedules == 1:
        places = places[:1].repeat(4, axis=0)
    axis = 0 if schedules > 1 else None
    mapped = jax.jit(jax.vmap(find, in_axes=(0, axis)))(designs, places if axis == 0 else places[0])
    alone = jax.jit(find)
    for number in range(4):
        one = alone(jax.tree.map(lambda each, at=number: each[at], designs), places[number])
        for found, want in zip(jax.tree.leaves(mapped), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(found[number], want, rtol=1e-6)


@pytest.mark.parametrize("macs", [2, 5, 16, 512])
@pytest.mark.parametrize("least", [1, 6, 9])
def test_classes_of_products_give_what_all_numbers_of_products_give(macs, least):
    """With two row buffers only the controller's estimate depends on the products of a tile."""
    changes = {"pim.macs_per_bank": macs, "pim.least_products": least}
    hardware = replace_all(Hardware(), changes)
    lengths = np.arange(1, 1025, 7)
    some, every = (
        request_works(hardware, MODEL, lengths, PARALLEL, waits=(None,), two_buffers=known)
        for known in (True, False)
    )
    np.testing.assert_array_equal(some, every)


@pytest.mark.parametrize("requests", [1, 16, 37])
def test_requests_are_reduced_in_steps(requests):
    lengths = jnp.asarray(np.random.default_rng(0).integers(1, 9, (requests, 3)) * 1.0)
    total = reduce_requests(jnp.add, lambda some: {"sum": 2 * some}, lengths)["sum"]
    np.testing.assert_array_equal(total, 2 * lengths.sum(axis=0))
    np.testing.assert_array_equal(
        reduce_requests(jnp.maximum, lambda some: some * some, lengths), lengths.max(axis=0) ** 2
    )


def test_mapped_axes_come_last_and_others_stay():
    shapes = []

    @designs_last
    def function(number, rows, shared):
        shapes.append((jnp.shape(number), rows.shape, shared.shape))
        return rows * number + shared

    numbers, rows, shared = jnp.arange(2.0), jnp.ones((2, 3)), jnp.arange(3.0)
    found = jax.vmap(function, in_axes=(0, 0, None))(numbers, rows, shared)
    assert shapes[-1] == ((2,), (3, 2), (3, 1))
    np.testing.assert_array_equal(found, rows * numbers[:, None] + shared)
    same = jax.vmap(function, in_axes=(0, None, None))(numbers, rows[0], shared)
    np.testing.assert_array_equal(same, found)


@pytest.mark.parametrize("designs", [0, 5, 40, 64, 70])
def test_designs_in_blocks_are_all_designs(designs):
    """At most 32 are computed together; the last block is filled up."""
    sizes = []

    def function(number, rows, shared):
        sizes.append(jnp.size(number))
        return (rows * number).sum(axis=0) + shared

    numbers, rows = jnp.arange(designs * 1.0), jnp.ones((designs, 3))
    found = jax.vmap(designs_last(function, together=32), in_axes=(0, 0, None))(numbers, rows, 2.0)
    np.testing.assert_array_equal(found, 3 * numbers + 2)
    assert not designs or max(sizes) == min(designs, 32)


def test_blocks_are_multiples_of_a_vector():
    sizes = []

    def double(rows):
        sizes.append(len(rows))
        return 2 * rows

    rows = jnp.arange(12.0)
    np.testing.assert_array_equal(in_blocks(double, rows, 5), 2 * rows)
    assert set(sizes) == {16}
    assert in_blocks(double, rows[:0], 0).shape == (0,)


@pytest.mark.parametrize("field", ["kv_heads", "heads", "layers", "kv_bits"])
@pytest.mark.parametrize("system", ["neupims", "npu-pim"])
def test_any_field_of_a_model_may_be_the_only_one_that_differs(system, field):
    batch = make_batch(np.maximum(LENGTHS, 1), [0] * len(LENGTHS))

    def run(value):
        model = dataclasses.replace(MODEL)
        object.__setattr__(model, field, value)
        found = simulate(Hardware(), model, batch, PARALLEL, system=system, mix=Mix())
        return found.iteration_seconds

    assert jax.eval_shape(jax.vmap(run), jnp.array([8, 16, 32])).shape == (3,)
    assert jax.eval_shape(jax.vmap(run), jnp.zeros(0, jnp.int32)).shape == (0,)


def test_the_wait_may_be_the_only_one_that_differs():
    def run(cycles):
        calibration = replace(DEFAULT, "reopen_cycles", cycles)
        batch = make_batch(np.maximum(LENGTHS, 1), [0] * len(LENGTHS))
        given = (Hardware(), MODEL, batch, PARALLEL)
        return simulate(*given, calibration=calibration).iteration_seconds

    assert jax.eval_shape(jax.vmap(run), jnp.array([5.0, 12.0])).shape == (2,)


def test_pairs_of_arrays_are_packed_and_unpacked():
    values = [jnp.arange(3.0), jnp.float32(7.0), jnp.array([jnp.inf, 1.0, 2.0])]
    pairs = pack_pairs(values)
    assert [pair.dtype for pair in pairs] == [jnp.complex64] * 2
    found = unpack_pairs(pairs, 3)
    for value, each in zip(found, jnp.broadcast_arrays(*values), strict=True):
        np.testing.assert_array_equal(value, each)
