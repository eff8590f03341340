"""Evolution of designs for several objectives: NSGA-II on the coordinates of a space.

A population is (n, knobs) coordinates from 0 to 1; `Space.values` makes whole numbers and list
values of them. Knobs with a list have no order: they are exchanged and drawn anew; all others are
crossed and mutated as numbers.

Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", 2002; Deb and Agrawal,
"Simulated binary crossover for continuous search space", 1995. Settings are those of the first
paper, section IV.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from neupims.exploration.pareto import crowding, ranks

CROSSED = 0.9  # chance that two parents are crossed at all
NEAR_PARENTS = 20.0  # distribution index of crossover: larger is nearer
NEAR_SELF = 20.0  # distribution index of mutation


DRAWS = 8  # numbers that one knob of one child takes


@jax.jit
def offspring(
    drawn: Float[Array, "8 n k"],
    units: Float[Array, "n k"],
    rank: Int[Array, " n"],
    distance: Float[Array, " n"],
    listed: Bool[Array, " k"],
) -> Float[Array, "n k"]:
    """As many children as parents, an even number: pairs of winners of tournaments of two are
    crossed, then each child is mutated in one knob on average. `drawn` are independent uniform
    numbers, all the chance there is.
    """
    n, k = units.shape
    a, b = jnp.floor(drawn[:2, :, 0] * n).astype(int)
    wins = (rank[a] < rank[b]) | ((rank[a] == rank[b]) & (distance[a] >= distance[b]))
    first, second = units[jnp.where(wins, a, b)].reshape(2, n // 2, k)
    children = jnp.concatenate(_crossed(drawn[2:6, : n // 2], first, second, listed))
    return _mutated(drawn[6:], children, listed, 1 / k)


def _crossed(drawn, first, second, listed):
    """Simulated binary crossover within 0 and 1, each knob with even chances; where a knob is a
    list the parents' values change places.
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


def _mutated(drawn, units, listed, chance):
    """Polynomial mutation within 0 and 1 of each knob with this chance; where a knob is a list,
    another draw.
    """
    now, draw = drawn
    power = NEAR_SELF + 1
    down = (2 * draw + (1 - 2 * draw) * (1 - units) ** power) ** (1 / power) - 1
    up = 1 - (2 * (1 - draw) + (2 * draw - 1) * units**power) ** (1 / power)
    moved = jnp.clip(units + jnp.where(draw < 0.5, down, up), 0, 1)
    return jnp.where(now < chance, jnp.where(listed, draw, moved), units)


@jax.jit
def fitness(
    values: Float[Array, "n k"], objectives: Float[Array, "n m"], violation: Float[Array, " n"]
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """Rank, the lower the better, and distance from neighbours, the larger the better.

    Designs that keep the constraints come first, by front; then the others by what they break; then
    second copies of a design, which a space of few values makes in plenty; then designs that are
    none.
    """
    n = values.shape[0]
    same = (values[:, None, :] == values[None, :, :]).all(axis=-1)
    copy = (same & (jnp.arange(n)[None, :] < jnp.arange(n)[:, None])).any(axis=1)
    sound = (violation <= 0) & jnp.isfinite(objectives).all(axis=1) & ~copy
    judged = jnp.where(sound[:, None], objectives, jnp.nan)
    front = ranks(judged)
    breaking = jnp.argsort(jnp.argsort(jnp.where(sound | copy, jnp.inf, violation)))
    behind = jnp.where(copy | ~jnp.isfinite(violation), 2 * n, n + breaking)
    rank = jnp.where(sound, front, behind).astype(jnp.int32)
    return rank, crowding(judged, jnp.where(sound, front, n))


@jax.jit
def survivors(rank: Int[Array, " n"], distance: Float[Array, " n"]) -> Int[Array, " half"]:
    """The better half of parents and children together, best first."""
    return jnp.lexsort((-distance, rank))[: rank.shape[0] // 2]
