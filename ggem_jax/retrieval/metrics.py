"""Quality of a ranking: average precision with ignored images, precision and recall at k.

Scores are computed by NumPy in float64. Rankings are `(q, k)`, best first, and ids count from 0;
each query has its own lists of ids. A ranking may be shorter than the database: positives that it
does not reach count as misses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Relevance:
    """The ids that a query should find, and those that count neither way."""

    positive: Int[np.ndarray, " p"]  # ids that the query should find
    ignored: Int[np.ndarray, " i"]  # ids that are removed from a ranking before it is scored


@dataclass(frozen=True)
class Scores:
    """Scores of all queries. A query without positives has NaN and is left out of the means."""

    average_precision: Float[np.ndarray, " q"]  # from 0 to 1
    precision_at: Float[np.ndarray, "q kappas"]  # from 0 to 1
    kappas: tuple[int, ...]  # ranks from 1 at which the precision is measured

    @property
    def mean_average_precision(self) -> float:
        """Mean of the average precision over the queries with positives, NaN if there are none."""
        return _mean(self.average_precision)

    @property
    def mean_precision_at(self) -> dict[int, float]:
        """Mean precision at each kappa over the queries with positives, NaN if there are none."""
        return {kappa: _mean(self.precision_at[:, i]) for i, kappa in enumerate(self.kappas)}


@dataclass(frozen=True)
class Difficulty:
    """The three lists of a query in the revisited Oxford and Paris ground truth."""

    easy: Int[np.ndarray, " e"]  # ids of positives that are easy to find
    hard: Int[np.ndarray, " h"]  # ids of positives that are hard to find
    junk: Int[np.ndarray, " j"]  # ids that are ignored in all set-ups


# set-up -> a function that returns the relevance of a query under it
SETUPS = {
    "easy": lambda query: Relevance(query.easy, np.concatenate([query.junk, query.hard])),
    "medium": lambda query: Relevance(np.concatenate([query.easy, query.hard]), query.junk),
    "hard": lambda query: Relevance(query.hard, np.concatenate([query.junk, query.easy])),
}


def revisited(
    ids: Int[np.ndarray, "q k"],
    queries: Sequence[Difficulty],
    *,
    kappas: Sequence[int] = (1, 5, 10),
) -> dict[str, Scores]:
    """Returns the scores of the set-ups easy, medium and hard, by name.

    Args:
        ids: Rankings `(q, k)`, best first.
        queries: The lists of each query.
        kappas: Ranks at which the precision is measured.

    Raises:
        ValueError: As in `scores`.

    Reference: Radenović et al., "Revisiting Oxford and Paris: Large-Scale Image Retrieval
        Benchmarking", CVPR 2018, arXiv:1803.11285.
    """
    return {
        name: scores(ids, [setup(query) for query in queries], kappas=kappas)
        for name, setup in SETUPS.items()
    }


def scores(
    ids: Int[np.ndarray, "q k"],
    relevance: Sequence[Relevance],
    *,
    kappas: Sequence[int] = (1, 5, 10),
) -> Scores:
    """Returns average precision and precision at kappa, after ignored images have been removed.

    Average precision follows the trapezoid rule. Precision at kappa divides by min(kappa, rank of
    the last positive that was found), as the revisited protocol does.

    Args:
        ids: Rankings `(q, k)`, best first.
        relevance: The lists of each query.
        kappas: Ranks at which the precision is measured, at least 1.

    Raises:
        ValueError: The ids are not whole numbers with a row for each query, a kappa is below 1, an
            id is negative or occurs twice in a ranking, or an id is both positive and ignored.

    Reference: Radenović et al., CVPR 2018, arXiv:1803.11285, and its code.
    """
    ids = np.asarray(ids)
    if ids.ndim != 2 or len(ids) != len(relevance) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"ids must be whole numbers ({len(relevance)}, k), a row for each query, not"
            f" {ids.dtype} of shape {ids.shape}"
        )
    kappas = tuple(int(kappa) for kappa in kappas)
    if not kappas or min(kappas) < 1:
        raise ValueError(f"kappas must be whole numbers of at least 1, not {kappas}")
    ranks = [positive_ranks(row, query) for row, query in zip(ids, relevance, strict=True)]
    counts = [len(np.unique(query.positive)) for query in relevance]
    return Scores(
        np.array(
            [average_precision(found, count) for found, count in zip(ranks, counts, strict=True)]
        ),
        np.array(
            [
                [precision(found, kappa) if count else np.nan for kappa in kappas]
                for found, count in zip(ranks, counts, strict=True)
            ]
        ),
        kappas,
    )


def positive_ranks(ids: Int[np.ndarray, " k"], query: Relevance) -> Int[np.ndarray, " found"]:
    """Returns the ranks of the positives in a ranking without its ignored images.

    Args:
        ids: Ranking of one query, `(k,)`, best first.
        query: The lists of the query.

    Returns:
        Ranks from 0, ascending, `(found,)`.

    Raises:
        ValueError: An id is negative, occurs twice, or is both positive and ignored.
    """
    if _any_twice(ids):
        raise ValueError("a ranking must have each id once, from 0 up")
    if len(both := np.intersect1d(query.positive, query.ignored)):
        raise ValueError(f"id {both[0]} is both positive and ignored")
    kept = ids[~np.isin(ids, query.ignored)]
    return np.flatnonzero(np.isin(kept, query.positive))


def average_precision(ranks: Int[np.ndarray, " found"], positives: int) -> float:
    """Returns the area under precision over recall by the trapezoid rule, NaN without positives.

    It is the sum of (j / r + (j + 1) / (r + 1)) / 2 over the positives that were found, divided by
    `positives`. r is the rank of positive j, both count from 0, and j / r is 1 at r = 0.

    Args:
        ranks: Ranks from 0 of the positives that were found, ascending, `(found,)`.
        positives: Number of positives in the ground truth.

    Reference: The code of Radenović et al., CVPR 2018, arXiv:1803.11285.
    """
    if positives == 0:
        return float("nan")
    j = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, j / np.maximum(ranks, 1))
    return float(np.sum((before + (j + 1) / (ranks + 1)) / 2) / positives)


def precision(ranks: Int[np.ndarray, " found"], kappa: int) -> float:
    """Returns the share of positives among the first min(kappa, rank of the last positive) results.

    Args:
        ranks: Ranks from 0 of the positives that were found, ascending, `(found,)`.
        kappa: Rank at which the precision is measured, at least 1.

    Returns:
        A number from 0 to 1; 0 if no positive was found.
    """
    if not len(ranks):
        return 0.0
    reach = min(kappa, int(ranks[-1]) + 1)
    return float(np.sum(ranks < reach) / reach)


def recall_at(
    ids: Int[np.ndarray, "q k"],
    relevance: Sequence[Relevance],
    *,
    kappas: Sequence[int] = (1, 5, 10),
) -> Float[np.ndarray, "q kappas"]:
    """Returns whether a positive is among the first kappa results of each query.

    Place recognition and metric learning count in this way.

    Args:
        ids: Rankings `(q, k)`, best first.
        relevance: The lists of each query.
        kappas: How many of the first results count.

    Returns:
        1 or 0 for each query and kappa, `(q, kappas)`; NaN for a query without positives.

    Raises:
        ValueError: As in `positive_ranks`, or there is not one ranking for each query.
    """
    found = [
        positive_ranks(row, query) for row, query in zip(np.asarray(ids), relevance, strict=True)
    ]
    return np.array(
        [
            [float(np.any(ranks < kappa)) if len(query.positive) else np.nan for kappa in kappas]
            for ranks, query in zip(found, relevance, strict=True)
        ]
    )


@dataclass(frozen=True)
class LabelScores:
    """Scores of all queries; a result is right if it has the label of the query.

    A query without any right image has NaN. R is the number of right images of a query.
    """

    recall_at: Float[np.ndarray, "q kappas"]  # 1 if one of the first kappa is right, else 0
    # share of right results among the first R
    r_precision: Float[np.ndarray, " q"]
    # mean over the first R ranks of the precision at the rank, or 0 if the result there is wrong
    map_at_r: Float[np.ndarray, " q"]
    kappas: tuple[int, ...]  # how many of the first results count for recall

    def means(self) -> dict[str, float]:
        """Returns means over queries by name: `recall@1`, ..., `r_precision`, `map@r`."""
        recalls = {
            f"recall@{kappa}": _mean(self.recall_at[:, i]) for i, kappa in enumerate(self.kappas)
        }
        return recalls | {"r_precision": _mean(self.r_precision), "map@r": _mean(self.map_at_r)}


def label_scores(
    ids: Int[np.ndarray, "q k"],
    query_labels: Int[np.ndarray, " q"],
    labels: Int[np.ndarray, " n"],
    *,
    own: Int[np.ndarray, " q"] | None = None,
    kappas: Sequence[int] = (1, 5, 10),
) -> LabelScores:
    """Returns scores of rankings by labels, as metric learning counts them.

    Args:
        ids: Rankings `(q, k)`, best first. k must be at least the number of images with the most
            frequent label of a query; kappas beyond k count as misses.
        query_labels: Label of each query, `(q,)`.
        labels: Label of each image of the database, `(n,)`.
        own: Ids of the queries in the database, `(q,)`, which are left out of the rankings; None
            if the queries are not in the database.
        kappas: How many of the first results count for recall, at least 1.

    Raises:
        ValueError: Shapes or ids do not fit, or the rankings are too short.

    Reference: Musgrave et al., "A Metric Learning Reality Check", 2020, arXiv:2003.08505, section
        3.2.
    """
    ids, query_labels, labels = (np.asarray(array) for array in (ids, query_labels, labels))
    if (
        ids.ndim != 2
        or query_labels.shape != ids.shape[:1]
        or labels.ndim != 1
        or (own is not None and np.shape(own) != ids.shape[:1])
    ):
        shapes = f"{ids.shape}, {query_labels.shape}, {labels.shape}" + (
            "" if own is None else f" and {np.shape(own)}"
        )
        raise ValueError(
            "ids (q, k), query labels (q,), labels (n,) and own (q,) are needed, not shapes"
            f" {shapes}"
        )
    kappas = tuple(int(kappa) for kappa in kappas)
    if not kappas or min(kappas) < 1:
        raise ValueError(f"kappas must be whole numbers of at least 1, not {kappas}")
    if any(_any_twice(row) for row in ids) or ids.max(initial=-1) >= len(labels):
        raise ValueError(f"a ranking must have each id once, from 0 up to the {len(labels)} labels")
    if own is not None:  # own ids are moved to the end and cut off
        is_own = ids == np.asarray(own)[:, None]
        ids = np.take_along_axis(ids, np.argsort(is_own, axis=1, kind="stable"), axis=1)[:, :-1]
    values, there = np.unique(labels, return_counts=True)
    place = np.searchsorted(values, query_labels).clip(max=len(values) - 1)
    count = np.where(values[place] == query_labels, there[place], 0) - (own is not None)
    if count.max(initial=0) > ids.shape[1]:
        raise ValueError(
            f"the rankings have {ids.shape[1]} places where a query has {count.max()} right"
            " answers: rank further"
        )
    right = labels[ids] == query_labels[:, None]
    within = np.arange(ids.shape[1]) < count[:, None]
    precision_there = np.cumsum(right, axis=1) / (np.arange(ids.shape[1]) + 1)
    divisor = np.where(count > 0, count, np.nan)
    recall = np.stack(
        [np.where(count > 0, right[:, :kappa].any(axis=1), np.nan) for kappa in kappas], axis=1
    )
    return LabelScores(
        recall,
        (right & within).sum(axis=1) / divisor,
        (precision_there * right * within).sum(axis=1) / divisor,
        kappas,
    )


def found_at(
    queries: Float[np.ndarray, "q d"],
    items: Float[np.ndarray, "n d"],
    pairs: Int[np.ndarray, "m 2"],
    *,
    kappas: Sequence[int] = (1, 5, 10),
    block: int = 1024,
) -> Bool[np.ndarray, "q kappas"]:
    """Returns whether a right item of each query is among the kappa most similar items.

    The mean over the queries is recall@kappa. Wrong items that are exactly as similar as the best
    right one count as more similar, and descriptors with NaN or infinity find nothing.

    Args:
        queries: Descriptors of the queries, `(q, d)`.
        items: Descriptors of the items, `(n, d)`; the similarity is the inner product.
        pairs: (query, right item) in each row, `(m, 2)`. A query may have several right items, and
            an item several queries.
        kappas: How many of the most similar items count.
        block: Queries that are compared at a time.

    Returns:
        Whether each query succeeds at each kappa, `(q, kappas)`.

    Raises:
        ValueError: The pairs are not whole numbers, or name queries or items that do not exist.
    """
    _check_pairs(pairs, len(queries), len(items))
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    found = np.zeros((len(queries), len(kappas)), bool)
    columns = np.asarray(items, np.float64).T
    for start in range(0, len(queries), block):
        similarity = np.asarray(queries[start : start + block], np.float64) @ columns
        right = _right(similarity.shape, pairs, start)
        best = np.max(similarity, axis=1, where=right, initial=-np.inf)
        before = np.sum((similarity >= best[:, None]) & ~right, axis=1)
        possible = right.any(axis=1) & np.all(np.isfinite(similarity), axis=1)
        found[start : start + block] = (before[:, None] < np.asarray(kappas)) & possible[:, None]
    return found


def chance_at(
    pairs: Int[np.ndarray, "m 2"], queries: int, items: int, *, kappas: Sequence[int] = (1, 5, 10)
) -> Float[np.ndarray, " kappas"]:
    """Returns the mean of `found_at` if every query sees the items in a random order.

    A query with r right items of n misses them all with probability (n - r choose kappa) / (n
    choose kappa).

    Args:
        pairs: (query, right item) in each row, `(m, 2)`.
        queries: The number of queries.
        items: The number of items.
        kappas: How many of the first items count.

    Returns:
        The share of queries that succeed by chance, `(kappas,)`.

    Raises:
        ValueError: The pairs are not whole numbers, or name queries or items that do not exist.
    """
    _check_pairs(pairs, queries, items)
    right = np.bincount(np.unique(pairs, axis=0)[:, 0], minlength=queries)
    missed = [
        np.prod(
            [
                np.clip((items - right - j) / max(items - j, 1), 0, 1)
                for j in range(min(kappa, items))
            ],
            axis=0,
        )
        for kappa in kappas
    ]
    return np.array([np.mean(1 - np.broadcast_to(each, right.shape)) for each in missed])


def class_descriptors(
    prompts: Float[np.ndarray, "classes templates d"],
) -> Float[np.ndarray, "classes d"]:
    """Returns one descriptor for each class: the normalised mean of its normalised prompts.

    Args:
        prompts: Descriptors of the prompts of each class, `(classes, templates, d)`.

    Returns:
        The descriptors, `(classes, d)`, of length 1.

    Raises:
        ValueError: The prompts have another shape, or there are none.

    Reference: Radford et al. (CLIP), 2021, arXiv:2103.00020, section 3.1.4.
    """
    prompts = np.asarray(prompts)
    if prompts.ndim != 3 or not prompts.shape[1]:
        raise ValueError(
            "prompts must be (classes, templates, d) with at least one template, not of shape"
            f" {prompts.shape}"
        )
    mean = (prompts / np.linalg.norm(prompts, axis=-1, keepdims=True)).mean(axis=1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def _right(shape, pairs, start: int) -> Bool[np.ndarray, "block n"]:
    """Which items are right for the queries of a block; `pairs` are sorted by query."""
    first, last = np.searchsorted(pairs[:, 0], (start, start + shape[0]))
    right = np.zeros(shape, bool)
    right[pairs[first:last, 0] - start, pairs[first:last, 1]] = True
    return right


def _check_pairs(pairs, queries: int, items: int) -> None:
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(
            f"pairs must be whole numbers (m, 2), not {pairs.dtype} of shape {pairs.shape}"
        )
    if len(pairs) and not ((pairs >= 0) & (pairs < (queries, items))).all():
        raise ValueError(f"pairs must name queries below {queries} and items below {items}")


def _any_twice(ids):
    """Whether an id occurs twice or is negative.

    Where ids are not far above their number, a table is faster than sorting a million of them.
    """
    if not len(ids) or ids.min() < 0:
        return bool(len(ids))
    if ids.max() < 8 * len(ids):
        return bool(np.bincount(ids).max() > 1)
    ascending = np.sort(ids)
    return bool(np.any(ascending[1:] == ascending[:-1]))


def _mean(values):
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
