"""Pareto fronts, ranks and hypervolumes of designs, with moocore.

Objectives are `(n, m)` float arrays, one design a row, all to be minimised, for any number m of
objectives. A row that is not finite is not a design: it is in no front and dominates nothing. Equal
rows do not dominate each other, so all of them are in the front.
"""

from types import ModuleType

import numpy as np
from jaxtyping import Bool, Float, Int, Real

MOST_EXACT = 5  # objectives; with 6 the exact hypervolume of 2000 designs takes 17 s


def front(objectives: Real[np.ndarray, "n m"]) -> Int[np.ndarray, " f"]:
    """Returns the rows that no other row dominates, in rising order.

    Args:
        objectives: `(n, m)` values to be minimised.

    Returns:
        `(f,)` row numbers.

    Raises:
        ImportError: moocore is not installed.
    """
    objectives, rows = _finite_rows(objectives)
    return rows[_moocore().is_nondominated(objectives[rows], keep_weakly=True)]


def in_plane(
    x: Real[np.ndarray, " n"], y: Real[np.ndarray, " n"], *, most_x: bool, most_y: bool
) -> Bool[np.ndarray, " n"]:
    """Returns which designs are in the front of two objectives alone.

    Args:
        x: `(n,)` values of the first objective.
        y: `(n,)` values of the second objective.
        most_x: Whether more of the first objective is better.
        most_y: Whether more of the second objective is better.

    Returns:
        `(n,)` true in the front.
    """
    chosen = front(np.stack([-x if most_x else x, -y if most_y else y], axis=1))
    return np.isin(np.arange(len(x)), chosen)


def ranks(objectives: Real[np.ndarray, "n m"]) -> Int[np.ndarray, " n"]:
    """Returns the number of the front of each row.

    Rows of front 0 are not dominated, rows of front 1 only by rows of front 0, and so on.

    Args:
        objectives: `(n, m)` values to be minimised.

    Returns:
        `(n,)` front numbers; n for a row that is not finite.

    Reference:
        Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", 2002,
        section III.A.
    """
    objectives, rows = _finite_rows(objectives)
    found = np.full(len(objectives), len(objectives))
    found[rows] = _moocore().pareto_rank(objectives[rows])
    return found


def crowding(
    objectives: Real[np.ndarray, "n m"], rank: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Returns how far apart the neighbours of each row in its front are.

    For each objective, the distance between the two neighbours is a share of the extent of the
    front; the crowding distance is the sum over the objectives.

    Args:
        objectives: `(n, m)` values to be minimised.
        rank: `(n,)` front of each row, as `ranks` returns it.

    Returns:
        `(n,)` distances; infinite at the ends of a front, 0 for a row that is not finite.

    Reference:
        Deb et al., 2002, section III.B.
    """
    objectives = np.asarray(objectives)
    finite = np.isfinite(objectives).all(axis=1)
    distance = np.zeros(len(objectives), objectives.dtype)
    for number in np.unique(rank[finite]):
        rows = np.flatnonzero(finite & (rank == number))
        for values in objectives[rows].T:
            order = np.argsort(values, kind="stable")
            placed, members = values[order], rows[order]
            if placed[-1] > placed[0]:
                distance[members[1:-1]] += (placed[2:] - placed[:-2]) / (placed[-1] - placed[0])
            distance[members[[0, -1]]] = np.inf
    return distance


def hypervolume(objectives: Real[np.ndarray, "n m"], reference: Real[np.ndarray, " m"]) -> float:
    """Returns the volume that the rows dominate below the reference point.

    The volume is exact for up to `MOST_EXACT` objectives; for more it is approximated from 262144
    directions, with a relative error of about 1e-4.

    Args:
        objectives: `(n, m)` values to be minimised. Rows that are not below the reference in all
            objectives add nothing.
        reference: `(m,)` upper end of the volume.

    Raises:
        ValueError: The reference is not finite, or has another length than a row.
        ImportError: moocore is not installed.

    Reference:
        Zitzler and Thiele, "Multiobjective Optimization Using Evolutionary Algorithms",
        1998.
    """
    reference = np.asarray(reference, np.float64)
    if np.ndim(objectives) != 2 or reference.shape != np.shape(objectives)[1:]:
        raise ValueError(
            f"the reference must have one number for each objective, not {reference.shape} for"
            f" {np.shape(objectives)}"
        )
    if not np.isfinite(reference).all():
        raise ValueError(f"the reference must be finite, not {reference.tolist()}")
    objectives, rows = _finite_rows(objectives)
    exact = objectives.shape[1] <= MOST_EXACT
    volume = _moocore().hypervolume if exact else _moocore().hv_approx
    return float(volume(objectives[rows], ref=reference))


def _finite_rows(objectives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The objectives in float64, and the numbers of the rows that are designs."""
    objectives = np.asarray(objectives, np.float64)
    return objectives, np.flatnonzero(np.isfinite(objectives).all(axis=1))


def _moocore() -> ModuleType:
    try:
        import moocore
    except ImportError:
        raise ImportError("Pareto fronts need moocore: pip install 'ggem-jax[neupims]'") from None
    return moocore
