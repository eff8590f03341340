"""Knobs that do not act: equal designs that differ only in them, and knobs without any effect."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from neupims.exploration.points import Points
from neupims.exploration.sampling import sample
from neupims.exploration.space import Space

Evaluate = Callable[[np.ndarray], Points]

DESIGNS = 16  # in which each knob is changed alone
LEVELS = 4  # values of a knob that are tried, ends included


def check_effects(space: Space, *evaluations: Evaluate) -> None:
    """Raises if a knob changes neither a metric nor whether a design is possible.

    Each knob is changed alone, from the least to the greatest value, in some random designs of the
    space. Knobs with one value, and spaces without a possible design among those, pass.

    Args:
        space: The space.
        *evaluations: Each returns designs with their metrics, given values of the knobs, `(n, k)`.
            Later ones take only those knobs that have no effect on earlier ones.

    Raises:
        ValueError: A knob has no effect; the sentence names it.
    """
    idle = [column for column, knob in enumerate(space.knobs) if knob.count != 1]
    for evaluate in evaluations:
        idle = _find_idle(space, evaluate, idle)
    if idle:
        names = " and ".join(space.names[column] for column in idle)
        raise ValueError(
            f"{names} {'has' if len(idle) == 1 else 'have'} no effect in this space, neither on a"
            " metric nor on what is possible: leave it out"
        )


def _find_idle(space: Space, evaluate: Evaluate, tried: Sequence[int]) -> list[int]:
    """Those of the knobs that change nothing; none if no design of the sample is possible."""
    if not tried:
        return []
    designs = sample(space, "random", 0, DESIGNS)
    rows = [designs]
    for column in tried:
        for level in np.linspace(0, 1, LEVELS):
            changed = designs.copy()
            changed[:, column] = space.knobs[column].at(np.array([level]))
            rows.append(changed)
    found = evaluate(np.concatenate(rows))
    results = _results(found).reshape(len(rows), DESIGNS, -1)
    if (found.code != 0).all():
        return []
    return [
        column
        for place, column in enumerate(tried)
        if _same(results[1 + LEVELS * place : 1 + LEVELS * (place + 1)], results[:1]).all()
    ]


def merge_twins(
    front: Points, base: Float[np.ndarray, " k"], evaluate: Evaluate
) -> tuple[Points, Int[np.ndarray, " f"]]:
    """Returns a front with equal designs once, and how many others each one stands for.

    Two designs are equal if all their metrics are, and if no knob in which they differ acts: each
    of them, changed alone, leaves all metrics as they are. The design with the most values of the
    base design, and then the first one, stands for the others.

    Args:
        front: The designs of the front, each once.
        base: The values of the base design, `(k,)`.
        evaluate: Returns designs with their metrics, given values of the knobs, `(n, k)`.

    Returns:
        The front, and the number of further equal designs, `(f,)`.
    """
    if not len(front.place):
        return front, np.zeros(0, int)
    results = _results(front)
    group = np.unique(results, axis=0, return_inverse=True)[1].ravel()
    order = np.lexsort((front.place, (front.values != base).sum(axis=1), group))
    stands_for = np.arange(len(order))
    left = [row for row in order.tolist() if (group == group[row]).sum() > 1]
    while left:
        first: dict[int, int] = {}
        for row in left:
            first.setdefault(int(group[row]), row)
        others = [row for row in left if first[int(group[row])] != row]
        if not others:
            break
        pairs = [(row, first[int(group[row])]) for row in others]
        alike = _only_idle_knobs_differ(front, results, pairs, evaluate)
        for (row, one), same in zip(pairs, alike, strict=True):
            if same:
                stands_for[row] = one
        left = [row for row, same in zip(others, alike, strict=True) if not same]
    chosen = np.flatnonzero(stands_for == np.arange(len(order)))
    return front.take(chosen), np.bincount(stands_for, minlength=len(order))[chosen] - 1


def _only_idle_knobs_differ(front: Points, results, pairs, evaluate: Evaluate) -> list[bool]:
    """Whether each knob of a row, put into the other row of its pair alone, changes nothing."""
    rows, owners = [], []
    for place, (row, one) in enumerate(pairs):
        for column in np.flatnonzero(front.values[row] != front.values[one]):
            changed = front.values[one].copy()
            changed[column] = front.values[row, column]
            rows.append(changed)
            owners.append(place)
    found = _results(evaluate(np.stack(rows)))
    same = _same(found, results[[pairs[place][1] for place in owners]])
    return [bool(same[np.array(owners) == place].all()) for place in range(len(pairs))]


def _results(points: Points) -> np.ndarray:
    """All metrics of all workloads and the violation, (n, ...); one row for a flagged design."""
    columns = [np.asarray(each, np.float64) for each in points.metrics.values()]
    results = np.concatenate([*columns, points.violation[:, None]], axis=1)
    return np.where((points.code != 0)[:, None], np.inf, results)


def _same(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return ((one == other) | (np.isnan(one) & np.isnan(other))).all(axis=-1)
