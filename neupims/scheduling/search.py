"""Searches without gradients: populations of genomes, evaluated by `vmap` inside `lax.scan`.

Many seeds run at once. Every strategy evaluates `population` genomes in each of
`budget // population` rounds, the first ones included, so that equal budgets are equal counts of
evaluations. The objective is an argument. The same key gives the same result.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from neupims.scheduling.comparison import better_of, choose, pick_best
from neupims.scheduling.decision import Choices, Genome, decide, repair
from neupims.scheduling.moves import draw_genome, mutate
from neupims.scheduling.objective import Cost, Objective, Problem
from neupims.scheduling.strategies import STRATEGIES, Moves, Strategy


class Found(NamedTuple):
    """The best schedule of each seed."""

    genome: Genome  # with a leading axis for the seeds
    cost: Cost  # (seeds,)
    curve: Float[Array, "seeds rounds"]  # the best objective after each round
    evaluations: int  # of one seed


def search(
    strategy: str,
    objective: Objective,
    choices: Choices,
    problem: Problem,
    key: Key[Array, ""],
    *,
    budget: int,
    population: int = 64,
    seeds: int = 1,
    starts: Genome | None = None,
) -> Found:
    """Returns the best schedules that independent searches find.

    Args:
        strategy: A name of `STRATEGIES`.
        objective: The cost of a decision; hashable, so that searches of one shape compile once.
        choices: What may be chosen.
        problem: The problem.
        key: The source of randomness.
        budget: The schedules that each seed evaluates, rounded down to whole populations.
        population: The schedules of one round, at least 2.
        seeds: The number of independent searches.
        starts: Genomes with a leading axis that the first population holds, with mutants of them
            (default: the first population is random).

    Raises:
        ValueError: The strategy is unknown, the population is below 2, or the budget is below one
            population.
        ModuleNotFoundError: The strategy is "evosax", which is not installed.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"the strategy must be one of {', '.join(STRATEGIES)}, not {strategy!r}")
    if not 1 < population <= budget:
        raise ValueError(
            f"the budget of {budget} evaluations must be at least the population of {population},"
            " and that at least 2"
        )
    rounds = budget // population
    genome, cost, curve = _search(
        STRATEGIES[strategy],
        objective,
        choices,
        population,
        rounds,
        problem,
        starts,
        jax.random.split(key, seeds),
    )
    return Found(genome, cost, curve, rounds * population)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _search(make_strategy, objective, choices, population, rounds, problem, starts, keys):
    """Searches once for each key. The objective, most of the compilation, is traced once."""

    def repair_all(genomes):
        # A loop, because its input is computed once: XLA would fuse the numbers drawn for genomes
        # into `repair`, and compute them again wherever it reads a place.
        def places(index):
            genome = jax.tree.map(lambda leaf: leaf[index], genomes)
            return repair(choices, problem.resident, genome).places

        half = -(-population // 2)
        return genomes._replace(places=jax.lax.map(places, jnp.arange(population), batch_size=half))

    def draw_all(key):
        draw = partial(draw_genome, choices, problem)
        return repair_all(jax.vmap(draw)(jax.random.split(key, population)))

    moves = Moves(
        choices,
        draw_all,
        jax.vmap(partial(mutate, choices, problem)),
        repair_all,
        problem.seq_lens.shape[0],
        population,
        rounds,
    )
    strategy: Strategy = make_strategy(moves)
    evaluate = jax.vmap(lambda genome: objective(problem, decide(choices, genome)))

    def one(key):
        first_key, key = jax.random.split(key)
        asked = first_population(moves, starts, first_key)
        nothing = (
            jax.tree.map(lambda leaf: leaf[0], asked),
            Cost(jnp.float32(jnp.inf), jnp.float32(jnp.inf)),
        )

        def round_(carry, key):
            state, asked, best = carry
            tell_key, ask_key = jax.random.split(key)
            costs = evaluate(asked)
            best = better_of(best, pick_best(asked, costs))
            state = strategy.tell(tell_key, state, asked, costs)
            return (*strategy.ask(ask_key, state), best), best[1].objective

        (_, _, (genome, cost)), curve = jax.lax.scan(
            round_, (strategy.start(asked), asked, nothing), jax.random.split(key, rounds)
        )
        return genome, cost, curve

    return jax.vmap(one)(keys)


def first_population(moves: Moves, starts: Genome | None, key) -> Genome:
    """Returns the first genomes of a search: random ones, or the given ones and mutants of them.

    Args:
        moves: The ways to make genomes, and the size of the population.
        starts: Genomes with a leading axis, of which as many are taken as fit; None for random
            ones.
        key: The source of randomness.
    """
    if starts is None:
        return moves.random(key)
    given = starts.places.shape[0]
    genomes = moves.repair(
        jax.tree.map(lambda leaf: leaf[jnp.arange(moves.population) % given], starts)
    )
    mutants = moves.mutate(jax.random.split(key, moves.population), genomes)
    return choose(jnp.arange(moves.population) < given, genomes, mutants)


def interval_of_mean(values, *, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean over seeds, and half the width of its 95 % interval.

    The interval is the normal approximation, and 0 for one seed.

    Args:
        values: The values of the seeds, of any shape.
        axis: The axis of the seeds.
    """
    values = np.asarray(values, np.float64)
    count = values.shape[axis]
    spread = values.std(axis=axis, ddof=1) if count > 1 else np.zeros(values.mean(axis=axis).shape)
    return values.mean(axis=axis), 1.96 * spread / np.sqrt(count)
