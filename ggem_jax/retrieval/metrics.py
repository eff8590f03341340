"""How good a ranking is: average precision with ignored images, precision and recall at k. NumPy,
in float64.

Rankings are `(q, k)`, best first, ids from 0; each query has its own lists of ids. A ranking may be
shorter than the database: what it does not reach counts as a miss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Relevance:
    """What a query should find, and what is neither right nor wrong."""

    positive: Int[np.ndarray, " p"]
    ignored: Int[np.ndarray, " i"]


@dataclass(frozen=True)
class Scores:
    """Of all queries; a query without positives has NaN and is left out of the means."""

    average_precision: Float[np.ndarray, " q"]
    precision_at: Float[np.ndarray, "q kappas"]
    kappas: tuple[int, ...]

    @property
    def mean_average_precision(self) -> float:
        return _mean(self.average_precision)

    @property
    def mean_precision_at(self) -> dict[int, float]:
        return {kappa: _mean(self.precision_at[:, i]) for i, kappa in enumerate(self.kappas)}


@dataclass(frozen=True)
class Difficulty:
    """The three lists of a query in the revisited Oxford and Paris ground truth."""

    easy: Int[np.ndarray, " e"]
    hard: Int[np.ndarray, " h"]
    junk: Int[np.ndarray, " j"]


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
    """Scores of the set-ups easy, medium and hard.

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
    """Average precision by the trapezoid rule, and precision at each of `kappas`, after the ignored
    images have been taken out.

    Precision at kappa divides by min(kappa, rank of the last positive that was found), as the
    revisited protocol does. An id that appears twice in a ranking, or a list that names one id as
    positive and as ignored, is a `ValueError`.
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
    """Ranks from 0 of the positives in a ranking out of which the ignored images have been
    taken.
    """
    if _any_twice(ids):
        raise ValueError("a ranking must have each id once, from 0 up")
    if len(both := np.intersect1d(query.positive, query.ignored)):
        raise ValueError(f"id {both[0]} is both positive and ignored")
    kept = ids[~np.isin(ids, query.ignored)]
    return np.flatnonzero(np.isin(kept, query.positive))


def average_precision(ranks: Int[np.ndarray, " found"], positives: int) -> float:
    """Area under precision over recall by the trapezoid rule: the mean of (j / r + (j + 1) / (r +
    1)) / 2, r the rank of positive j, both from 0.
    """
    if positives == 0:
        return float("nan")
    j = np.arange(len(ranks))
    before = np.where(ranks == 0, 1.0, j / np.maximum(ranks, 1))
    return float(np.sum((before + (j + 1) / (ranks + 1)) / 2) / positives)


def precision(ranks: Int[np.ndarray, " found"], kappa: int) -> float:
    """Positives among the first min(kappa, rank from 1 of the last positive found); 0 where none
    was found.
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
    """Whether at least one positive is among the first kappa results, as place recognition and
    metric learning count; NaN without positives.
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
    """Of all queries, where what has the query's label is right; a query that is alone with its
    label has NaN.
    """

    recall_at: Float[np.ndarray, "q kappas"]  # whether one of the first kappa is right
    r_precision: Float[
        np.ndarray, " q"
    ]  # share of right ones among the first R, R as many as are right at all
    map_at_r: Float[
        np.ndarray, " q"
    ]  # mean over the first R of precision where it is right, 0 where it is not
    kappas: tuple[int, ...]

    def means(self) -> dict[str, float]:
        """Means over queries by name: `recall@1`, ..., `r_precision`, `map@r`."""
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
    """Scores of rankings by the labels of queries and database, as metric learning counts them.

    `own` are the ids of the queries where they are in the database themselves: these are left out.
    Rankings must reach as far as the most frequent label is there, and one further with `own`; what
    they do not reach of the kappas counts as a miss.

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
    if own is not None:  # own ids to the end, and off
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


def _any_twice(ids):
    """Whether an id occurs twice, or is below 0; a table is faster than sorting a million of them,
    where ids are not far above their number.
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
