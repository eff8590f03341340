"""Average precision and precision at k against hand-worked cases and a slow implementation of the
protocol.
"""

import json

import numpy as np
import pytest

from ggem_jax.retrieval.metrics import (
    Difficulty,
    Relevance,
    average_precision,
    chance_at,
    class_descriptors,
    found_at,
    label_scores,
    recall_at,
    revisited,
    scores,
)


def slowly(ids, positive, ignored, kappas):
    """The protocol step by step: walk down the list, skip ignored images, note precision before and
    after each hit.
    """
    hits, seen, area, last = 0, 0, 0.0, None
    precision_at, flags = [], []
    for i in ids:
        if i in ignored:
            continue
        if i in positive:
            before = hits / seen if seen else 1.0
            hits += 1
            area += (before + hits / (seen + 1)) / 2
            last = seen + 1
        flags.append(i in positive)
        seen += 1
    for kappa in kappas:
        reach = min(kappa, last) if last else 1
        precision_at.append(sum(flags[:reach]) / reach if last else 0.0)
    return (
        (area / len(positive), precision_at)
        if positive
        else (float("nan"), [float("nan")] * len(kappas))
    )


def test_worked_by_hand():
    """Hits at ranks 0 and 3 of two: ((1 + 1) / 2 + (1/3 + 2/4) / 2) / 2 = 17 / 24."""
    assert average_precision(np.array([0, 3]), 2) == pytest.approx(17 / 24, abs=1e-15)
    found = scores(
        np.array([[7, 1, 2, 9, 4]]), [Relevance(np.array([7, 4]), np.array([1]))], kappas=(1, 2, 10)
    )
    # without the ignored 1: 7, 2, 9, 4: hits at ranks 0 and 3 again; the last positive has rank 4,
    # which is what 10 divides by
    assert found.mean_average_precision == pytest.approx(17 / 24, abs=1e-15)
    assert found.mean_precision_at == {1: 1.0, 2: 0.5, 10: 0.5}


def test_a_short_ranking_misses_what_it_does_not_reach():
    found = scores(np.array([[3, 0]]), [Relevance(np.array([3, 5]), np.array([], int))])
    assert found.mean_average_precision == pytest.approx(0.5)
    assert scores(
        np.array([[1, 0]]), [Relevance(np.array([5]), np.array([], int))]
    ).mean_precision_at == {1: 0.0, 5: 0.0, 10: 0.0}


def test_a_query_without_positives_is_left_out():
    found = scores(
        np.array([[0, 1], [0, 1]]),
        [Relevance(np.array([0]), np.array([], int)), Relevance(np.array([], int), np.array([1]))],
    )
    assert np.isnan(found.average_precision[1])
    assert found.mean_average_precision == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_the_slow_walk(seed):
    rng = np.random.default_rng(seed)
    n, queries, kappas = 90, 12, (1, 5, 10, 1000)
    lists = [
        np.array_split(rng.permutation(n)[: rng.integers(0, 40)], np.sort(rng.integers(0, 20, 2)))
        for _ in range(queries)
    ]
    ids = np.stack([rng.permutation(n)[:70] for _ in range(queries)])
    found = revisited(ids, [Difficulty(*three) for three in lists], kappas=kappas)
    for name, own in found.items():
        for i, (easy, hard, junk) in enumerate(lists):
            positive = {"easy": easy, "medium": np.concatenate([easy, hard]), "hard": hard}[name]
            ignored = {
                "easy": np.concatenate([junk, hard]),
                "medium": junk,
                "hard": np.concatenate([junk, easy]),
            }[name]
            area, precision_at = slowly(
                ids[i], set(positive.tolist()), set(ignored.tolist()), kappas
            )
            np.testing.assert_allclose(own.average_precision[i], area, atol=1e-12)
            np.testing.assert_allclose(own.precision_at[i], precision_at, atol=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["roxford5k", "rparis6k"])
def test_agrees_with_the_slow_walk_on_the_real_ground_truth(name, shared):
    """The rankings are simulated: positives are drawn towards the front."""
    folder = shared / "data" / "revisitop"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    truth = json.loads((folder / f"gnd_{name}.json").read_text())
    rng, n, kappas = np.random.default_rng(0), len(truth["imlist"]), (1, 5, 10)
    queries = [
        Difficulty(*(np.array(query[kind], int) for kind in ("easy", "hard", "junk")))
        for query in truth["gnd"]
    ]
    ids = []
    for query in queries:
        score = rng.normal(size=n)
        score[query.easy] += 3
        score[query.hard] += 1.5
        score[query.junk] += 2
        ids.append(np.argsort(-score))
    found = revisited(np.stack(ids), queries, kappas=kappas)
    for i, query in enumerate(queries):
        lists = {
            "easy": (query.easy, [*query.junk, *query.hard]), "medium": ([*query.easy, *query.hard],
            query.junk),
            "hard": (query.hard, [*query.junk, *query.easy]),
        }  # fmt: skip
        for setup, (positive, ignored) in lists.items():
            area, precision_at = slowly(
                ids[i].tolist(), set(map(int, positive)), set(map(int, ignored)), kappas
            )
            np.testing.assert_allclose(found[setup].average_precision[i], area, atol=1e-12)
            np.testing.assert_allclose(found[setup].precision_at[i], precision_at, atol=1e-12)
    assert (
        found["easy"].mean_average_precision
        > found["medium"].mean_average_precision
        > found["hard"].mean_average_precision
        > 0
    )


def test_recall_at():
    relevance = [
        Relevance(np.array([4]), np.array([], int)),
        Relevance(np.array([0, 1]), np.array([2])),
    ]
    assert recall_at(np.array([[3, 4, 0], [2, 1, 0]]), relevance, kappas=(1, 2)).tolist() == [
        [0, 1],
        [1, 1],
    ]


def test_refuses():
    nothing = np.array([], int)
    with pytest.raises(ValueError, match="each id once"):
        scores(np.array([[1, 1]]), [Relevance(np.array([1]), nothing)])
    with pytest.raises(ValueError, match="id 1 is both positive and ignored"):
        scores(np.array([[1, 2]]), [Relevance(np.array([1]), np.array([1]))])
    with pytest.raises(ValueError, match="a row for each query"):
        scores(np.array([[1, 2]]), [])
    with pytest.raises(ValueError, match="kappas"):
        scores(np.array([[1, 2]]), [Relevance(np.array([1]), nothing)], kappas=())


def test_label_scores_by_hand():
    """Two right answers for query 0 (label 7): found at places 1 and 3; one for query 1 (label 8):
    at place 2; none for query 2.
    """
    labels = np.array([7, 7, 8, 9, 9, 9])
    ids = np.array([[0, 3, 1, 2], [4, 2, 0, 1], [0, 1, 2, 3]])
    found = label_scores(ids, np.array([7, 8, 5]), labels, kappas=(1, 2, 3))
    np.testing.assert_allclose(found.recall_at, [[1, 1, 1], [0, 1, 1], [np.nan] * 3])
    np.testing.assert_allclose(
        found.r_precision, [1 / 2, 0, np.nan]
    )  # the first two of query 0 hold one right; the first of query 1 none
    np.testing.assert_allclose(found.map_at_r, [(1 / 1) / 2, 0, np.nan])
    assert found.means() == {
        "recall@1": 0.5,
        "recall@2": 1.0,
        "recall@3": 1.0,
        "r_precision": 0.25,
        "map@r": 0.25,
    }


def test_label_scores_leave_the_query_itself_out_wherever_it_stands():
    """All images query each other. Own ids at the front, in the middle and out of reach give the
    scores of rankings without them.
    """
    rng = np.random.default_rng(0)
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    rows = [np.array([j for j in rng.permutation(8) if j != i]) for i in range(8)]
    without = [
        label_scores(row[None], labels[[i]], np.delete(labels, i), kappas=(1, 3))
        for i, row in enumerate([np.where(row > i, row - 1, row) for i, row in enumerate(rows)])
    ]
    for place in (0, 4, 7):
        ids = np.array([np.insert(row, place, i) for i, row in enumerate(rows)])
        found = label_scores(ids, labels, labels, own=np.arange(8), kappas=(1, 3))
        for name in ("recall_at", "r_precision", "map_at_r"):
            np.testing.assert_allclose(
                getattr(found, name), np.concatenate([getattr(each, name) for each in without])
            )
    short = label_scores(
        np.array(rows)[:, :4], labels, labels, own=np.arange(8), kappas=(1,)
    )  # the own id is not among them, so the last id is dropped
    np.testing.assert_allclose(
        short.recall_at[:, 0], [labels[row[0]] == labels[i] for i, row in enumerate(rows)]
    )


def test_the_query_itself_is_no_right_answer_of_its_own():
    found = label_scores(
        np.array([[2, 0], [2, 1], [0, 1]]),
        np.array([0, 0, 1]),
        np.array([0, 0, 1]),
        own=np.arange(3),
        kappas=(1, 2),
    )
    np.testing.assert_array_equal(found.recall_at, [[0, 0], [0, 0], [np.nan, np.nan]])


def test_label_scores_equal_the_definition_of_map_at_r():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 5, 40)
    queries = rng.integers(0, 5, 9)
    ids = np.array([rng.permutation(40) for _ in queries])
    found = label_scores(ids, queries, labels)
    for row, query, got in zip(ids, queries, found.map_at_r, strict=True):
        r = int(np.sum(labels == query))
        right = labels[row[:r]] == query
        assert got == pytest.approx(sum(right[: i + 1].mean() for i in range(r) if right[i]) / r)


def test_label_scores_refuse_short_rankings_and_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="have 1 places where a query has 2 right answers"):
        label_scores(np.array([[0]]), np.array([7]), np.array([7, 7]))
    for wrong in ([[0, 0]], [[0, -1]], [[0, 2]]):
        with pytest.raises(ValueError, match="each id once, from 0 up to the 2 labels"):
            label_scores(np.array(wrong), np.array([7]), np.array([7, 7]))
    with pytest.raises(ValueError, match="kappas"):
        label_scores(np.array([[0, 1]]), np.array([7]), np.array([7, 7]), kappas=(1, 0))
    with pytest.raises(ValueError, match="query labels"):
        label_scores(np.array([[0, 1]]), np.array([7, 8]), np.array([7, 7]))


def test_found_by_hand():
    """Angles on a circle: query 0 at 0 degrees, items at 10 (wrong), 20 (right), 90 (right); query
    1 at 90.
    """

    def circle(*degrees):
        return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)

    pairs = np.array([[0, 1], [1, 2], [0, 2]])
    found = found_at(circle(0, 90), circle(10, 20, 90), pairs, kappas=(1, 2, 3))
    assert found.tolist() == [[False, True, True], [True, True, True]]
    assert (
        found_at(circle(0, 90), circle(10, 20, 90), pairs, kappas=(1, 2, 3), block=1).tolist()
        == found.tolist()
    )


def test_ties_and_what_is_no_number_count_against():
    same = np.ones((4, 2))
    pairs = np.array([[0, 0], [1, 0], [1, 1]])
    assert found_at(same, same, pairs, kappas=(1, 3, 4)).tolist() == [
        [False, False, True],
        [False, True, True],
        [False] * 3,
        [False] * 3,
    ]
    broken = np.array([[np.nan, 1.0]])
    assert not found_at(broken, same, np.array([[0, 0]]), kappas=(1, 4)).any()


def test_chance_is_what_random_descriptors_find():
    rng = np.random.default_rng(0)
    pairs = np.array([[0, 0], [0, 1], [1, 2], [2, 2], [2, 2]])
    by_hand = [np.mean([2 / 6, 1 / 6, 1 / 6]), np.mean([1 - 4 / 6 * 3 / 5, 2 / 6, 2 / 6]), 1.0]
    np.testing.assert_allclose(chance_at(pairs, 3, 6, kappas=(1, 2, 9)), by_hand)
    found = np.mean(
        [
            found_at(rng.normal(size=(3, 4)), rng.normal(size=(6, 4)), pairs, kappas=(1, 2))
            for _ in range(4000)
        ],
        axis=(0, 1),
    )
    np.testing.assert_allclose(found, by_hand[:2], atol=0.02)


def test_pairs_out_of_range_are_refused():
    for pairs in (
        np.array([[0, 3]]),
        np.array([[-1, 0]]),
        np.array([[0.0, 1.0]]),
        np.array([0, 1]),
    ):
        with pytest.raises(ValueError, match="pairs must"):
            found_at(np.ones((2, 2)), np.ones((3, 2)), pairs)


def test_prompts_of_a_class_count_alike_whatever_their_length():
    prompts = np.array([[[2.0, 0.0], [0.0, 5.0]], [[0.0, -1.0], [0.0, -1.0]]])
    np.testing.assert_allclose(class_descriptors(prompts), [[0.5**0.5, 0.5**0.5], [0, -1]])
    with pytest.raises(ValueError, match=r"\(classes, templates, d\)"):
        class_descriptors(prompts[0])
