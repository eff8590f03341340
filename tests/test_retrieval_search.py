"""Exact search against NumPy in float64: order, ties, memory-mapped files, stores, several devices,
a TPU's lowering.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ggem_jax.retrieval import search
from ggem_jax.retrieval.vectors import Ranking, Store, ahead

module = sys.modules[search.__module__]  # the function has the name of its module


class Halves:
    """A store in two arrays."""

    def __init__(self, vectors):
        self.parts = np.array_split(vectors, 2)
        self.shape = vectors.shape

    def take(self, ids):
        return np.concatenate(self.parts)[ids]

    def blocks(self, rows):
        vectors = np.concatenate(self.parts)
        return ((start, vectors[start : start + rows]) for start in range(0, len(vectors), rows))


def unit(rng, *shape):
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def brute(queries, database, k):
    """By decreasing score in float64, then by id."""
    scores = queries.astype(np.float64) @ database.astype(np.float64).T
    ids = np.argsort(-scores.astype(np.float32), axis=1, kind="stable")[:, :k]
    return Ranking(np.take_along_axis(scores, ids, 1), ids)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that small arrays have many, and no search by NumPy. Compiled
    programs of other block sizes are dropped.
    """
    monkeypatch.setattr(module, "_NUMPY_NUMBERS", 0)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4096)
    monkeypatch.setattr(module, "_READ_BYTES", 16 * 37)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("kind", "dtype", "n", "k"),
    [
        ("jax", "float32", 1, 1),
        ("jax", "float16", 61, 5),
        ("jax", "float32", 300, 300),
        ("numpy", "float32", 1, 1),
        ("numpy", "float16", 300, 300),
        ("store", "float32", 61, 5),
        ("mapped", "float16", 61, 5),
    ],
)
def test_equals_brute_force(kind, dtype, n, k, tmp_path, small_blocks):
    rng = np.random.default_rng(n)
    queries, database = unit(rng, 4, 24), unit(rng, n, 24).astype(dtype)
    given = database
    if kind == "jax":
        given = jnp.asarray(database)
    elif kind == "store":
        given = Halves(database)
        assert isinstance(given, Store)
    elif kind == "mapped":
        np.save(tmp_path / "vectors.npy", database)
        given = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    found, expected = search(queries, given, k=k), brute(queries, database, k)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.scores, expected.scores, atol=3e-7)


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_equal_scores_are_ordered_by_id(kind, small_blocks):
    rng = np.random.default_rng(0)
    database = np.repeat(unit(rng, 10, 8), 30, axis=0)[rng.permutation(300)]
    found = search(unit(rng, 3, 8), kind(database), k=300)
    scores, ids = np.asarray(found.scores), np.asarray(found.ids)
    assert np.sum(scores[:, 1:] == scores[:, :-1]) > 500
    assert np.all((scores[:, 1:] < scores[:, :-1]) | (ids[:, 1:] > ids[:, :-1]))


def test_zeros_of_both_signs_are_equal_and_what_is_no_number_comes_last():
    database = np.array([[-0.0], [0.0], [np.nan], [-1.0], [np.inf], [-np.inf]], np.float32)
    assert search(np.ones((1, 1), np.float32), database, k=6).ids.tolist() == [[4, 0, 1, 3, 2, 5]]
    assert search(np.ones((1, 1), np.float32), jnp.asarray(database), k=2).ids.tolist() == [[4, 0]]


@pytest.mark.parametrize(
    ("kind", "n"), [("jax", 61), ("sharded", 8), ("sharded", 640), ("numpy", 61), ("numpy", 640)]
)
def test_several_devices_find_the_same(n, kind, small_blocks):
    rng = np.random.default_rng(1)
    queries, database = unit(rng, 3, 24), unit(rng, n, 24)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    given = {"jax": jnp.asarray, "numpy": np.asarray}.get(
        kind, lambda a: jax.device_put(a, NamedSharding(mesh, P(("data", "model"))))
    )
    k = min(n, 20)  # more than one device holds
    found, expected = search(queries, given(database), k=k, mesh=mesh), brute(queries, database, k)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.scores, expected.scores, atol=3e-7)


def test_sharded_vectors_are_not_gathered():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    database = jax.device_put(jnp.ones((4096, 16)), NamedSharding(mesh, P("data")))
    text = (
        jax.jit(lambda q, x: search(q, x, k=3, mesh=mesh))
        .lower(jnp.ones((2, 16)), database)
        .compile()
        .as_text()
    )
    gathered = [
        line for line in text.splitlines() if " all-gather(" in line or " all-reduce(" in line
    ]
    assert gathered  # the results of each device
    assert not any("4096" in line or "512,16" in line for line in gathered)


def test_is_a_pure_function_that_lowers_for_a_tpu():
    lowered = (
        jax.jit(lambda q, x: search(q, x, k=5))
        .trace(jnp.ones((3, 64)), jnp.ones((5000, 64), jnp.float16))
        .lower(lowering_platforms=("tpu",))
    )
    assert "custom_call" not in lowered.as_text()


def test_lower_precision_is_a_choice():
    rng = np.random.default_rng(2)
    queries, database = unit(rng, 20, 256), unit(rng, 500, 256)
    exact, rounded = (
        search(queries, jnp.asarray(database), k=10, precision=p) for p in ("float32", "bfloat16")
    )
    error = np.abs(np.asarray(exact.scores) - np.asarray(rounded.scores)).max()
    assert 1e-5 < error < 4e-3  # 2^-8 is the rounding of bfloat16
    assert np.mean(np.asarray(exact.ids[:, 0]) == np.asarray(rounded.ids[:, 0])) > 0.9


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"queries": np.ones(4, np.float32)}, ValueError, r"queries must be \(q, d\)"),
        ({"queries": np.ones((2, 4), int)}, ValueError, "floating point"),
        ({"database": np.ones((5, 3), np.float32)}, ValueError, r"database must be \(n, 4\)"),
        ({"database": np.ones((0, 4), np.float32)}, ValueError, "at least 1"),
        ({"database": np.ones((5, 4), int)}, ValueError, "floating point"),
        ({"database": [[1.0] * 4]}, TypeError, "an array"),
        ({"database": lambda ids: ids}, TypeError, "callback"),
        ({"k": 0}, ValueError, "from 1 to the 5 rows"),
        ({"k": 6}, ValueError, "from 1 to the 5 rows"),
        ({"k": 2.0}, ValueError, "whole number"),
        ({"precision": "float16"}, ValueError, "float32, bfloat16"),
    ],
)
def test_refuses(change, error, words):
    given = {
        "queries": np.ones((2, 4), np.float32),
        "database": np.ones((5, 4), np.float32),
        "k": 2,
    } | change
    with pytest.raises(error, match=words):
        search(given.pop("queries"), given.pop("database"), **given)


def test_an_error_of_the_reader_is_the_error_of_the_search():
    class Broken(Halves):
        def blocks(self, rows):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        search(np.ones((1, 4), np.float32), Broken(np.ones((5, 4), np.float32)), k=1)


def test_more_vectors_than_the_margin_may_be_too_close_for_float32():
    """The true best ten, where 300 vectors have nearly equal scores and some others higher ones."""
    rng = np.random.default_rng(4)
    query = unit(rng, 1, 512)
    database = np.concatenate([np.repeat(unit(rng, 1, 512), 300, axis=0), unit(rng, 300, 512)])[
        rng.permutation(600)
    ]
    database[:, 0] += 1e-7 * rng.normal(size=600).astype(np.float32) / query[0, 0]
    found, expected = search(query, database, k=10), brute(query, database, 10)
    np.testing.assert_array_equal(found.ids, expected.ids)


def test_reading_ahead_keeps_order_and_ends_early():
    made = []
    items = ahead(made.append(i) or i for i in range(100))
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    items.close()
    assert len(made) < 10


def test_scores_that_float32_cannot_tell_apart_come_in_their_true_order():
    """Pairs of vectors whose scores differ by less than the rounding of a sum in float32: stored
    ones are ordered as in float64.
    """
    rng = np.random.default_rng(3)
    query = unit(rng, 1, 2048)
    database = np.repeat(unit(rng, 50, 2048), 2, axis=0)
    database[1::2, 0] += 2e-7 * rng.normal(size=50).astype(np.float32) / query[0, 0]
    found, expected = search(query, database, k=100), brute(query, database, 100)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.scores, expected.scores.astype(np.float32))


BLOCKS = {
    "short": lambda x, rows: ((i, x[i : i + 7]) for i in range(0, len(x), 7)),
    "none": lambda x, rows: iter(()),
    "the first alone": lambda x, rows: iter([(0, x[:rows])]),
    "twice": lambda x, rows: iter([(0, x[:rows]), (0, x[:rows])]),
    "before the first": lambda x, rows: iter([(-5, x[:rows])]),
    "too wide": lambda x, rows: (
        (i, np.pad(x[i : i + rows], ((0, 0), (0, 1)))) for i in range(0, len(x), rows)
    ),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_store_whose_blocks_do_not_hold_together_is_refused(kind, monkeypatch):
    monkeypatch.setattr(module, "_READ_BYTES", 16 * 20 * 4)

    class Odd(Halves):
        dtype = np.dtype(np.float32)

        def blocks(self, rows):
            return BLOCKS[kind](np.concatenate(self.parts), rows)

    with pytest.raises(ValueError, match="the store's blocks must"):
        search(np.ones((1, 16), np.float32), Odd(np.ones((50, 16), np.float32)), k=3)


def test_meshes_with_explicit_axis_types_are_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ValueError, match="explicit axis types"):
        search(np.ones((1, 4), np.float32), np.ones((8, 4), np.float32), k=1, mesh=mesh)
    with pytest.raises(ValueError, match="explicit axis types"), jax.set_mesh(mesh):
        search(
            jnp.ones((1, 4)), jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("data"))), k=1
        )
