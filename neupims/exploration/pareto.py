"""Fronts of several objectives, all to be minimised: (n, m) arrays, one design a row. A row that is
not finite is no design: it is in no front.

Of equal rows none dominates another, so all are in the front.
"""

import bisect

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

BLOCK = 1024  # rows compared with as many others at once: 1 MiB of answers


def front(objectives: Float[np.ndarray, "n m"]) -> Int[np.ndarray, " f"]:
    """Rows that no other row dominates, in rising order. Memory is bounded by BLOCK^2 and the
    front.

    Rows are visited by the sum of the ranks of their objectives, which no dominated row has less of
    than a row that dominates it. So each block is compared with the front found so far and with
    itself, never with later rows.
    """
    objectives = np.asarray(objectives, np.float64)
    rows = np.flatnonzero(np.isfinite(objectives).all(axis=1))
    if not len(rows):
        return rows
    places = [
        np.unique(objectives[rows, column], return_inverse=True)[1]
        for column in range(objectives.shape[1])
    ]
    rows = rows[np.argsort(np.sum(places, axis=0), kind="stable")]
    kept: list[np.ndarray] = []
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        for earlier in kept:
            block = block[~_dominated(objectives[block], objectives[earlier])]
            if not len(block):
                break
        else:
            kept.append(block[~_dominated(objectives[block], objectives[block])])
            kept = _packed(kept)
    return np.sort(np.concatenate(kept))


def _packed(blocks: list[np.ndarray]) -> list[np.ndarray]:
    """The last two blocks as one where both are small, so that there are few."""
    if len(blocks) > 1 and len(blocks[-2]) + len(blocks[-1]) <= BLOCK:
        return [*blocks[:-2], np.concatenate(blocks[-2:])]
    return blocks


def _dominated(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which rows any of the others dominates: not worse in any objective, better in one."""
    no_worse = np.ones((len(rows), len(others)), bool)
    better = np.zeros_like(no_worse)
    for column in range(rows.shape[1]):
        no_worse &= others[None, :, column] <= rows[:, None, column]
        better |= others[None, :, column] < rows[:, None, column]
    return np.any(no_worse & better, axis=1)


def in_plane(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], *, most_x: bool, most_y: bool
) -> Bool[np.ndarray, " n"]:
    """Which designs are in the front of these two alone; `most_x`, `most_y`: more of it is
    better.
    """
    chosen = front(np.stack([-x if most_x else x, -y if most_y else y], axis=1))
    return np.isin(np.arange(len(x)), chosen)


@jax.jit
def ranks(objectives: Float[Array, "n m"]) -> Int[Array, " n"]:
    """Front of each row: 0 is not dominated, 1 only by rows of front 0, and so on; n for a row that
    is not finite.

    Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", 2002, section III.A.
    Fronts are peeled off one by one, each by comparing blocks of rows with all, so memory is n
    times a block.
    """
    n = objectives.shape[0]
    finite = jnp.isfinite(objectives).all(axis=1)

    def dominated(left: Bool[Array, " n"]) -> Bool[Array, " n"]:
        def one(row):
            return (left & (objectives <= row).all(axis=1) & (objectives < row).any(axis=1)).any()

        return jax.lax.map(one, objectives, batch_size=min(n, BLOCK))

    def peel(state):
        rank, left, number = state
        now = left & ~dominated(left)
        return jnp.where(now, number, rank), left & ~now, number + 1

    start = (jnp.full(n, n, jnp.int32), finite, jnp.int32(0))
    return jax.lax.while_loop(lambda state: state[1].any(), peel, start)[0]


@jax.jit
def crowding(objectives: Float[Array, "n m"], rank: Int[Array, " n"]) -> Float[Array, " n"]:
    """How far each row's neighbours in its front lie apart, in shares of the front's extent, added
    over the objectives; infinite at its ends.

    Deb et al., 2002, section III.B.
    """
    n = objectives.shape[0]

    def along(values):
        order = jnp.lexsort((values, rank))
        placed, fronts = values[order], rank[order]
        same_before = jnp.concatenate([jnp.array([False]), fronts[1:] == fronts[:-1]])
        same_after = jnp.concatenate([fronts[1:] == fronts[:-1], jnp.array([False])])
        extent = (
            jax.ops.segment_max(values, rank, n + 1) - jax.ops.segment_min(values, rank, n + 1)
        )[fronts]
        gap = (jnp.roll(placed, -1) - jnp.roll(placed, 1)) / jnp.where(extent > 0, extent, 1)
        return (
            jnp.zeros(n)
            .at[order]
            .set(jnp.where(same_before & same_after, jnp.where(extent > 0, gap, 0.0), jnp.inf))
        )

    distance = jax.vmap(along, in_axes=1)(objectives).sum(axis=0)
    return jnp.where(jnp.isfinite(objectives).all(axis=1), distance, 0.0)


def hypervolume(objectives: Float[np.ndarray, "n m"], reference: Float[np.ndarray, " m"]) -> float:
    """Volume that the rows dominate below the reference point, exactly, for one to three
    objectives. Rows not below it in all add nothing.

    Zitzler and Thiele, "Multiobjective Optimization Using Evolutionary Algorithms", 1998. Three
    objectives: slabs along the third, each the area below a staircase that grows row by row.

    Raises:
        ValueError: another number of objectives, or a reference that is not finite or of another
            length.
    """
    objectives, reference = np.asarray(objectives, np.float64), np.asarray(reference, np.float64)
    if objectives.ndim != 2 or reference.shape != objectives.shape[1:]:
        raise ValueError(
            f"the reference must have one number for each objective, not {reference.shape} for"
            f" {objectives.shape}"
        )
    if not np.isfinite(reference).all():
        raise ValueError(f"the reference must be finite, not {reference.tolist()}")
    m = objectives.shape[1]
    if not 1 <= m <= 3:
        raise ValueError(f"the hypervolume is computed for one to three objectives, not {m}")
    inside = np.isfinite(objectives).all(axis=1) & (objectives < reference).all(axis=1)
    gains = (reference - objectives[inside]).tolist()
    depths = [gain[2] if m == 3 else 1.0 for gain in gains]
    stairs = _Staircase()
    volume, order = 0.0, sorted(range(len(gains)), key=lambda row: -depths[row])
    for place, row in enumerate(order):
        stairs.add(gains[row][0], gains[row][1] if m > 1 else 1.0)
        below = depths[order[place + 1]] if place + 1 < len(order) else 0.0
        volume += stairs.area * (depths[row] - below)
    return volume


class _Staircase:
    """The area of the union of rectangles from 0 to (x, y): steps of rising x and falling y."""

    def __init__(self) -> None:
        self.x: list[float] = []
        self.y: list[float] = []
        self.area = 0.0

    def add(self, x: float, y: float) -> None:
        place = bisect.bisect_left(self.x, x)
        if place < len(self.x) and self.y[place] >= y:
            return
        upper = self.y[place] if place < len(self.x) else 0.0  # what is covered just left of x
        first = place
        while first and self.y[first - 1] <= y:
            first -= 1
        start = self.x[first - 1] if first else 0.0
        covered, left = (
            0.0,
            start,
        )  # between the last step that stays and x, by the steps that vanish
        for step in range(first, place):
            covered += (self.x[step] - left) * self.y[step]
            left = self.x[step]
        covered += (x - left) * upper
        self.area += (x - start) * y - covered
        last = place + (place < len(self.x) and self.x[place] == x)
        self.x[first:last] = [x]
        self.y[first:last] = [y]
