"""Costs compared: the objective first, and `busy` between equals."""

import jax
import jax.numpy as jnp

from neupims.scheduling.decision import Genome
from neupims.scheduling.objective import Cost


def better(one: Cost, other: Cost):
    """Returns whether `one` is the lower cost, as a boolean array of the shape of the costs.

    Args:
        one: Costs of any shape.
        other: Costs of the same shape.
    """
    return (one.objective < other.objective) | (
        (one.objective == other.objective) & (one.busy < other.busy)
    )


def by_cost(costs: Cost):
    """Returns the indices of costs from the best to the worst, (n,).

    Args:
        costs: Costs of n schedules, (n,).
    """
    return jnp.lexsort((costs.busy, costs.objective))


def pick_best(genomes: Genome, costs: Cost) -> tuple[Genome, Cost]:
    """Returns the best genome of a population, and its cost.

    Args:
        genomes: Genomes with a leading axis, n of them.
        costs: Their costs, (n,).
    """
    index = jnp.argmin(jnp.where(costs.objective == costs.objective.min(), costs.busy, jnp.inf))
    return jax.tree.map(lambda leaf: leaf[index], (genomes, costs))


def better_of(one: tuple[Genome, Cost], other: tuple[Genome, Cost]) -> tuple[Genome, Cost]:
    """Returns the pair of genome and cost with the lower cost, or `one` if the costs are equal.

    Args:
        one: A genome and its cost, or many with a leading axis.
        other: The same of another one.
    """
    return choose(better(other[1], one[1]), other, one)


def choose(condition, yes, no):
    """Returns one of two pytrees; a condition with an axis chooses row by row.

    Args:
        condition: Boolean array, () or (n,).
        yes: Pytree for true; its leaves begin with the axes of the condition.
        no: Pytree for false, of the same structure.
    """
    return jax.tree.map(
        lambda a, b: jnp.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        ),
        yes,
        no,
    )
