"""Query expansion and database augmentation against their formulas in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from ggem_jax.retrieval import (
    Ranking,
    alpha_query_expansion,
    augment_database,
    average_query_expansion,
    database_augmentation,
    search,
)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def example():
    rng = np.random.default_rng(0)
    queries, database = (
        unit(rng.normal(size=(70, 24))).astype(np.float32),
        unit(rng.normal(size=(130, 24))).astype(np.float32),
    )
    return queries, database, search(queries, database, k=30)


def ranked(queries, database, k):
    scores = queries.astype(np.float64) @ database.astype(np.float64).T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Ranking(np.take_along_axis(scores, ids, 1), ids)


def same(found, expected):
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
    assert np.mean(np.asarray(found.ids) == expected.ids) > 0.999


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_queries_are_averaged_with_their_first_results(example, kind):
    queries, database, ranking = example
    x = database[np.asarray(ranking.ids[:, :5])]
    same(
        average_query_expansion(queries, kind(database), ranking, num_neighbors=5),
        ranked(unit(queries + x.sum(1)), database, 30),
    )
    weights = np.maximum(np.einsum("qd,qkd->qk", queries, x), 0) ** 3
    expected = ranked(unit(queries + np.einsum("qk,qkd->qd", weights, x)), database, 30)
    same(alpha_query_expansion(queries, kind(database), ranking, num_neighbors=5), expected)


def test_a_callback_has_its_candidates_ordered_anew(example):
    queries, database, ranking = example
    found = average_query_expansion(queries, lambda ids: database[ids], ranking, num_neighbors=5)
    expanded = unit(queries + database[np.asarray(ranking.ids[:, :5])].sum(1))
    for i in range(len(queries)):
        own = np.asarray(ranking.ids[i])
        scores = database[own] @ expanded[i]
        np.testing.assert_array_equal(found.ids[i], own[np.argsort(-scores, kind="stable")])
    with pytest.raises(TypeError, match="callback"):
        database_augmentation(queries, lambda ids: database[ids], ranking)


@pytest.mark.parametrize(
    ("database", "error", "sentence"),
    [
        ([[1.0, 0.0]], TypeError, "database must be an array .* not <class 'list'>"),
        (np.ones(3, np.float32), ValueError, r"must be \(n, d\) .* not of shape \(3,\)"),
        (np.ones((3, 0), np.float32), ValueError, r"n and d at least 1, not of shape \(3, 0\)"),
        (np.ones((3, 2), int), ValueError, "database must be floating point, not int"),
    ],
)
def test_what_is_no_database_is_not_augmented(database, error, sentence):
    with pytest.raises(error, match=sentence):
        augment_database(database)


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_vectors_are_averaged_with_their_neighbours(example, kind):
    queries, database, ranking = example
    gram = database.astype(np.float64) @ database.T
    nearest = np.argsort(-gram, axis=1)[:, :5]
    weights = np.maximum(np.take_along_axis(gram, nearest, 1), 0) ** 3
    expected = unit(np.einsum("nk,nkd->nd", weights, database[nearest].astype(np.float64)))
    augmented = augment_database(kind(database), num_neighbors=4)
    assert isinstance(augmented, type(kind(database)))
    np.testing.assert_allclose(augmented, expected, atol=1e-6)
    same(
        database_augmentation(queries, kind(database), ranking, num_neighbors=4),
        ranked(queries, expected, 30),
    )


def test_no_neighbours_and_all_of_them(example):
    _, database, _ = example
    np.testing.assert_allclose(augment_database(database, num_neighbors=0), database, atol=1e-6)
    assert (
        augment_database(jnp.asarray(database), num_neighbors=1000, alpha=0).shape == database.shape
    )


def test_negative_similarities_have_no_weight_whatever_alpha(example):
    queries, _, _ = example
    database = np.concatenate([queries[:1], -queries[:1]])
    ranking = Ranking(np.array([[1.0, -1.0]]), np.array([[0, 1]]))
    for alpha in (0.0, 1e-6, 3.0):
        found = alpha_query_expansion(queries[:1], database, ranking, num_neighbors=2, alpha=alpha)
        np.testing.assert_allclose(found.scores, [[1, -1]], atol=1e-6)


def test_refuses(example):
    queries, database, ranking = example
    with pytest.raises(
        ValueError, match="num_neighbors must be a whole number of at least 1, not 0"
    ):
        average_query_expansion(queries, database, ranking, num_neighbors=0)
    with pytest.raises(ValueError, match="alpha must be a number of at least 0, not -1"):
        alpha_query_expansion(queries, database, ranking, alpha=-1)
