"""Evolution of designs for several objectives: NSGA-II on the coordinates of a space.

A population is `(n, knobs)` coordinates from 0 to 1; `Space.values` turns them into whole numbers
and list values. Knobs with a list have no order: crossover exchanges their values and mutation
draws them again. All other knobs are crossed and mutated as numbers.

References: Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", 2002 (the
settings are those of section IV); Deb and Agrawal, "Simulated binary crossover for continuous
search space", 1995.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from neupims.exploration.pareto import crowding, ranks

CROSSED = 0.9  # probability that two parents are crossed at all
NEAR_PARENTS = 20.0  # distribution index of crossover: larger is nearer
NEAR_SELF = 20.0  # distribution index of mutation
DRAWS = 8  # random numbers for each knob of each child


@jax.jit
def breed(
    drawn: Float[Array, "8 n k"],
    units: Float[Array, "n k"],
    rank: Int[Array, " n"],
    distance: Float[Array, " n"],
    listed: Bool[Array, " k"],
) -> Float[Array, "n k"]:
    """Returns as many children as there are parents.

    Winners of tournaments of two are crossed in pairs; then each child is mutated in one knob on
    average.

    Args:
        drawn: `(DRAWS, n, k)` independent uniform numbers; the function is otherwise
            deterministic.
        units: `(n, k)` coordinates of the parents; n is even.
        rank: `(n,)` rank of each parent, lower is better.
        distance: `(n,)` crowding distance of each parent, larger is better.
        listed: `(k,)` true for knobs with a list of values.

    Returns:
        `(n, k)` coordinates of the children.
    """
    n, k = units.shape
    a, b = jnp.floor(drawn[:2, :, 0] * n).astype(int)
    wins = (rank[a] < rank[b]) | ((rank[a] == rank[b]) & (distance[a] >= distance[b]))
    first, second = units[jnp.where(wins, a, b)].reshape(2, n // 2, k)
    children = jnp.concatenate(_cross(drawn[2:6, : n // 2], first, second, listed))
    return _mutate(drawn[6:], children, listed, 1 / k)


def _cross(drawn, first, second, listed):
    """Simulated binary crossover within 0 and 1; each knob is crossed with probability 1/2, and a
    knob with a list exchanges the values of the parents.
    """
    all_knobs, one_knob, draw, swap = drawn
    now = (all_knobs[:, :1] < CROSSED) & (one_knob < 0.5)
    low, high = jnp.minimum(first, second), jnp.maximum(first, second)
    apart = jnp.maximum(high - low, 1e-9)

    def spread(room):
        alpha = 2 - (1 + 2 * room / apart) ** -(NEAR_PARENTS + 1)
        scaled = draw * alpha
        return jnp.where(scaled <= 1, scaled, 1 / jnp.maximum(2 - scaled, 1e-9)) ** (
            1 / (NEAR_PARENTS + 1)
        )

    middle = (low + high) / 2
    lower = jnp.clip(middle - spread(low) * apart / 2, 0, 1)
    upper = jnp.clip(middle + spread(1 - high) * apart / 2, 0, 1)
    one, two = jnp.where(swap < 0.5, upper, lower), jnp.where(swap < 0.5, lower, upper)
    one, two = jnp.where(listed, second, one), jnp.where(listed, first, two)
    return jnp.where(now, one, first), jnp.where(now, two, second)


def _mutate(drawn, units, listed, probability):
    """Polynomial mutation within 0 and 1; a knob with a list takes a new draw."""
    now, draw = drawn
    power = NEAR_SELF + 1
    down = (2 * draw + (1 - 2 * draw) * (1 - units) ** power) ** (1 / power) - 1
    up = 1 - (2 * (1 - draw) + (2 * draw - 1) * units**power) ** (1 / power)
    moved = jnp.clip(units + jnp.where(draw < 0.5, down, up), 0, 1)
    return jnp.where(now < probability, jnp.where(listed, draw, moved), units)


def fitness(
    values: Float[np.ndarray, "n k"],
    objectives: Float[np.ndarray, "n m"],
    violation: Float[np.ndarray, " n"],
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Returns the rank and the crowding distance of each design.

    Designs that meet the constraints come first, by front; then the others by their violation; then
    repeated designs, of which a space of few values has many; then flagged designs.

    Args:
        values: `(n, k)` knob values.
        objectives: `(n, m)` values to be minimised.
        violation: `(n,)` 0 where all constraints hold, infinite where the design is flagged.

    Returns:
        `(n,)` ranks, lower is better, and `(n,)` crowding distances, larger is better.
    """
    n = len(values)
    repeated = ~np.isin(np.arange(n), np.unique(values, axis=0, return_index=True)[1])
    sound = (violation <= 0) & np.isfinite(objectives).all(axis=1) & ~repeated
    costs = np.where(sound[:, None], objectives, np.nan)
    order = np.argsort(np.where(sound | repeated, np.inf, violation), kind="stable")
    place = np.argsort(order, kind="stable")
    behind = np.where(repeated | ~np.isfinite(violation), 2 * n, n + place)
    rank = np.where(sound, ranks(costs), behind)
    return rank, crowding(costs, rank)


def select_survivors(
    rank: Int[np.ndarray, " n"], distance: Float[np.ndarray, " n"]
) -> Int[np.ndarray, " half"]:
    """Returns the better half of parents and children together, `(n // 2,)` rows, best first.

    Args:
        rank: `(n,)` ranks, lower is better, as `fitness` returns them.
        distance: `(n,)` crowding distances; of equal ranks, larger is better.
    """
    return np.lexsort((-distance, rank))[: len(rank) // 2]
