"""SuperGlobal's reranking against its formulas in float64, and its requests to a database."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ggem_jax.retrieval import Ranking, search, superglobal_rerank
from ggem_jax.retrieval.rerank import _GRAM_ROWS, neighbourhood


def unit(rng, *shape):
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def formulas(query, vectors, ids, num_neighbors, beta, variant="code"):
    """Scores and ids of one query by the equations of the module, with every refined vector
    computed.
    """
    x, q = vectors[ids].astype(np.float64), query.astype(np.float64)
    k = min(num_neighbors + 1, len(ids))
    gram = x @ x.T
    nearest = np.argsort(-gram, axis=1, kind="stable")[:, :k]
    weights = beta * np.take_along_axis(gram, nearest, 1)
    weights[:, 0] = 1
    refined = np.einsum("mk,mkd->md", weights, x[nearest]) / weights.sum(1, keepdims=True)
    s1 = refined @ q
    best = np.argsort(-s1, kind="stable")[:k]
    expanded = refined[best].max(axis=0)
    s2 = refined @ expanded if variant == "code" else x @ np.maximum(expanded, q)
    score = (s1 + s2) / 2
    order = np.lexsort((ids, -score))
    return score[order], ids[order]


@pytest.fixture(scope="module")
def example():
    """Ten places of 30 images each, 5 queries, a full ranking."""
    rng = np.random.default_rng(0)
    places = unit(rng, 10, 48)
    database = np.repeat(places, 30, axis=0) + 0.12 * rng.normal(size=(300, 48)).astype(np.float32)
    database = (database / np.linalg.norm(database, axis=1, keepdims=True)).astype(np.float32)
    queries = places[:5] + 0.15 * rng.normal(size=(5, 48)).astype(np.float32)
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    return queries, database, search(queries, jnp.asarray(database), k=300)


@pytest.mark.sampled
@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize(
    ("m", "neighbors", "beta"),
    [(400, 9, 0.15), (60, 4, 0.5), (12, 20, 1.0), (40, 0, 0.15), (40, 5, 0.0), (1, 9, 0.15)],
)
def test_equals_the_formulas(example, variant, m, neighbors, beta):
    queries, database, ranking = example
    settings = {"num_candidates": m, "num_neighbors": neighbors, "beta": beta, "variant": variant}
    found = superglobal_rerank(queries, jnp.asarray(database), ranking, **settings)
    m = min(m, 300)
    for i, query in enumerate(queries):
        scores, ids = formulas(
            query, database, np.asarray(ranking.ids[i, :m]), neighbors, beta, variant
        )
        np.testing.assert_array_equal(found.ids[i, :m], ids)
        np.testing.assert_allclose(found.scores[i, :m], scores, atol=1e-6)
    np.testing.assert_array_equal(found.ids[:, m:], ranking.ids[:, m:])
    np.testing.assert_array_equal(found.scores[:, m:], ranking.scores[:, m:])


def test_the_database_may_be_an_array_a_file_a_store_or_a_callback(example, tmp_path):
    queries, database, ranking = example
    expected = superglobal_rerank(queries, jnp.asarray(database), ranking, num_candidates=50)
    np.save(tmp_path / "vectors.npy", database)
    asked = []

    def callback(ids):
        asked.append(ids)
        return database[ids]

    for given in (database, np.load(tmp_path / "vectors.npy", mmap_mode="r"), callback):
        found = superglobal_rerank(queries, given, ranking, num_candidates=50)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.scores, expected.scores)
    assert [len(ids) for ids in asked] == [50] * 5  # and nothing else is requested
    assert [set(ids) for ids in asked] == [
        set(row) for row in np.asarray(ranking.ids[:, :50]).tolist()
    ]


def test_a_short_ranking_keeps_its_length(example):
    queries, database, ranking = example
    short = Ranking(ranking.scores[:, :20], ranking.ids[:, :20])
    found = superglobal_rerank(queries, database, short)
    assert found.ids.shape == (5, 20)
    assert [set(row) for row in np.asarray(found.ids).tolist()] == [
        set(row) for row in np.asarray(short.ids).tolist()
    ]


def test_more_candidates_than_one_block_of_dot_products():
    rng = np.random.default_rng(1)
    vectors = unit(rng, 2 * _GRAM_ROWS + 77, 16)
    neighbours, weights = neighbourhood(jnp.asarray(vectors), num_neighbors=3, beta=0.2)
    gram = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    expected = np.argsort(-gram, axis=1)[:, :4]
    similar = np.take_along_axis(gram, np.asarray(neighbours), 1)
    np.testing.assert_allclose(similar, np.take_along_axis(gram, expected, 1), atol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)


def test_equal_scores_are_ordered_by_id():
    rng = np.random.default_rng(2)
    database = np.repeat(unit(rng, 6, 8), 5, axis=0)[rng.permutation(30)]
    queries = unit(rng, 2, 8)
    shuffled = np.stack([rng.permutation(30) for _ in range(2)])
    found = superglobal_rerank(
        queries, database, Ranking(np.zeros((2, 30), np.float32), shuffled), num_neighbors=4
    )
    scores, ids = np.asarray(found.scores), np.asarray(found.ids)
    assert np.sum(scores[:, 1:] == scores[:, :-1]) > 30
    assert np.all((scores[:, 1:] < scores[:, :-1]) | (ids[:, 1:] > ids[:, :-1]))


def test_no_array_of_all_neighbours_is_made():
    """The largest array of 400 candidates is their vectors or their dot products, and queries go
    one after the other.
    """
    q, m, n, d = 16, 400, 1000, 512
    ranking = Ranking(jnp.zeros((q, m)), jnp.broadcast_to(jnp.arange(m), (q, m)))
    lowered = jax.jit(superglobal_rerank).lower(jnp.ones((q, d)), jnp.ones((n, d)), ranking)
    analysis = lowered.compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 8 * 4 * m * max(m, d)


def test_lowers_for_a_tpu_without_a_custom_call():
    ranking = Ranking(jnp.zeros((3, 500)), jnp.broadcast_to(jnp.arange(500), (3, 500)))
    lowered = (
        jax.jit(superglobal_rerank)
        .trace(jnp.ones((3, 64)), jnp.ones((1000, 64)), ranking)
        .lower(lowering_platforms=("tpu",))
    )
    assert "custom_call" not in lowered.as_text()


def test_works_inside_jit_and_its_strength_may_be_traced(example):
    queries, database, ranking = example
    rerank = jax.jit(
        lambda beta: superglobal_rerank(queries, jnp.asarray(database), ranking, beta=beta)
    )
    for beta in (0.0, 0.4):
        np.testing.assert_array_equal(
            rerank(beta).ids,
            superglobal_rerank(queries, jnp.asarray(database), ranking, beta=beta).ids,
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": np.array([[0, 1, -1], [0, 1, 2]])}, "from 0 to 4, not from -1 to 2"),
        ({"ids": np.array([[0, 1, 5], [0, 1, 2]])}, "from 0 to 4, not from 0 to 5"),
        ({"ids": np.array([[0, 1, 2], [3, 1, 3]])}, "query 1 has one twice"),
        ({"ids": np.array([[0, 1], [0, 1]])}, "scores and ids of one shape"),
        ({"ids": np.array([[0.0, 1, 2], [0, 1, 2]])}, "whole numbers"),
        ({"num_candidates": 0}, "num_candidates must be a whole number of at least 1"),
        ({"num_neighbors": -1}, "num_neighbors must be a whole number of at least 0"),
        ({"variant": "books"}, "code, paper"),
        ({"beta": np.nan}, "beta must be a number from 0 to 1e6, not nan"),
        ({"beta": -0.5}, "beta must be a number from 0 to 1e6, not -0.5"),
        ({"beta": "much"}, "beta must be a number from 0 to 1e6, not 'much'"),
        (
            {"database": lambda ids: np.ones((len(ids), 4), complex)},
            "floating-point numbers, not complex128",
        ),
        (
            {"database": lambda ids: np.full((len(ids), 4), None)},
            "floating-point numbers, not object",
        ),
        ({"database": lambda ids: np.ones((len(ids), 3))}, r"\(3, 4\), not \(3, 3\)"),
    ],
)
def test_refuses(change, words):
    given = {
        "database": np.ones((5, 4), np.float32),
        "ids": np.array([[0, 1, 2], [0, 1, 2]]),
    } | change
    ranking = Ranking(np.zeros((2, 3), np.float32), given.pop("ids"))
    with pytest.raises(ValueError, match=words):
        superglobal_rerank(np.ones((2, 4), np.float32), given.pop("database"), ranking, **given)


def test_a_callback_may_use_its_memory_again_and_change_its_ids(example):
    queries, database, ranking = example
    memory = np.empty((50, database.shape[1]), np.float32)

    def callback(ids):
        np.take(database, ids, axis=0, out=memory)
        ids += 1000
        return memory

    found, expected = (
        superglobal_rerank(queries, given, ranking, num_candidates=50)
        for given in (callback, database)
    )
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_a_callback_is_asked_in_the_thread_of_the_call(example):
    queries, database, ranking = example
    threads = set()
    superglobal_rerank(
        queries,
        lambda ids: threads.add(threading.get_ident()) or database[ids],
        ranking,
        num_candidates=20,
    )
    assert threads == {threading.get_ident()}


def test_other_byte_orders(example):
    queries, database, ranking = example
    found, expected = (
        superglobal_rerank(queries, given, ranking, num_candidates=50)
        for given in (database.astype(">f4"), database)
    )
    np.testing.assert_array_equal(found.ids, expected.ids)
