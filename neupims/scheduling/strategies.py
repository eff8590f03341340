"""Search strategies without gradients. All work on populations.

A strategy is a function of `Moves` that returns a `Strategy`; `STRATEGIES` has them by name.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Key

from neupims.scheduling.comparison import better, by_cost, choose
from neupims.scheduling.decision import Choices, Genome
from neupims.scheduling.moves import cross, genome_hash, knob_ranges, set_knobs
from neupims.scheduling.objective import Cost

# Mutations of a child; more than one only if the first gives a genome that was evaluated before.
MOST_TRIES = 2
CHUNKS = 4  # parts of a population that are mutated further, as many as are needed
KEY_STEP = 0.1  # first standard deviation of evosax's random keys, in turns of the circle of places
HOT, COLD = 3e-2, 1e-5  # first and last temperature of annealing, as shares of the first cost


class Strategy(NamedTuple):
    """A search by asking and telling.

    `start` returns its state, `tell` takes the costs of genomes, and `ask` returns the genomes to
    evaluate next.
    """

    start: Callable[[Genome], Any]  # first population -> state
    tell: Callable[[Key[Array, ""], Any, Genome, Cost], Any]  # key, state, genomes, costs -> state
    ask: Callable[[Key[Array, ""], Any], tuple[Any, Genome]]  # key, state -> state, genomes


class Moves(NamedTuple):
    """The ways to make genomes of one problem; all work on populations."""

    choices: Choices  # what may be chosen
    random: Callable[[Key[Array, ""]], Genome]  # a random population
    mutate: Callable[[Key[Array, " n"], Genome], Genome]  # a key each, n genomes -> n mutants
    repair: Callable[[Genome], Genome]  # the valid form of each genome
    requests: int  # of the problem
    population: int  # genomes of a round
    rounds: int  # of a search


def random_search(moves: Moves) -> Strategy:
    """Returns the strategy that draws new random genomes each round.

    Args:
        moves: The ways to make genomes.
    """
    return Strategy(
        lambda genomes: (),
        lambda key, state, genomes, costs: state,
        lambda key, state: (state, moves.random(key)),
    )


def evolution(moves: Moves) -> Strategy:
    """Returns the strategy that breeds as many children as there are parents, and keeps the best.

    Parents win a tournament of two. Of genomes with the same cost, a young one is kept, and the
    others only if there are not enough genomes, because a population of twins no longer searches. A
    child that was evaluated before is mutated further, so that small spaces are not searched twice.
    A table marks evaluated genomes by a hash; two genomes that share a mark cost one further
    mutation.

    Args:
        moves: The ways to make genomes, and the numbers of genomes and rounds.
    """
    size = moves.population
    bits = 3 + (moves.population * moves.rounds).bit_length()

    def start(genomes):
        return (
            genomes,
            Cost(jnp.full(size, jnp.inf), jnp.full(size, jnp.inf)),
            jnp.zeros(1 << bits, bool),
        )

    def tell(key, state, genomes, costs):
        parents, theirs, seen = state
        everyone = jax.tree.map(
            lambda young, old: jnp.concatenate([young, old]), (genomes, costs), (parents, theirs)
        )
        order = by_cost(everyone[1])
        objective, busy = (cost[order] for cost in everyone[1])
        twin = jnp.concatenate(
            [jnp.array([False]), (objective[1:] == objective[:-1]) & (busy[1:] == busy[:-1])]
        )
        chosen = order[jnp.argsort(twin, stable=True)][:size]
        return *jax.tree.map(lambda leaf: leaf[chosen], everyone), seen.at[marks(genomes)].set(True)

    def marks(genomes):
        return (jax.vmap(genome_hash)(genomes) >> (32 - bits)).astype(jnp.int32)

    def ask(key, state):
        parents, _, seen = state
        pairs_key, cross_key, key = jax.random.split(key, 3)
        # Parents stand in the order of their costs.
        winners = jax.random.randint(pairs_key, (2, 2, size), 0, size).min(axis=1)
        mother, father = (jax.tree.map(lambda leaf, who=who: leaf[who], parents) for who in winners)
        crossed = jax.vmap(cross)(jax.random.split(cross_key, size), mother, father)

        def keys(tries):
            return jax.random.split(jax.random.fold_in(key, tries), size)

        children = moves.mutate(keys(0), crossed)
        for tries in range(1, MOST_TRIES):
            own = marks(children)
            elder = jnp.tril(own[:, None] == own, -1).any(axis=1)
            children = mutate_some(moves, keys(tries), seen[own] | elder, children)
        return state, children

    return Strategy(start, tell, ask)


def mutate_some(
    moves: Moves, keys: Key[Array, " n"], some: Bool[Array, " n"], genomes: Genome
) -> Genome:
    """Returns genomes with some of them mutated. Only so many are computed, rounded up to a chunk.

    Args:
        moves: The ways to make genomes.
        keys: The source of randomness of each genome, (n,).
        some: Whether to mutate each, (n,).
        genomes: Genomes with a leading axis, n of them.
    """
    size = some.shape[0]
    chunk = -(-size // CHUNKS)
    first = jnp.argsort(~some, stable=True)  # those to mutate come first

    def step(carry):
        done, genomes = carry
        who = jnp.take(first, done + jnp.arange(chunk), mode="clip")
        mutants = moves.mutate(keys[who], jax.tree.map(lambda leaf: leaf[who], genomes))
        where = jnp.where(some[who], who, size)
        return done + chunk, jax.tree.map(
            lambda leaf, new: leaf.at[where].set(new, mode="drop"), genomes, mutants
        )

    return jax.lax.while_loop(lambda carry: carry[0] < some.sum(), step, (0, genomes))[1]


def annealing(moves: Moves) -> Strategy:
    """Returns simulated annealing, with each genome as a chain of its own.

    A mutant is accepted if it is not worse, or with a probability that falls with the temperature
    (Metropolis).

    Args:
        moves: The ways to make genomes, and the number of rounds.
    """

    def start(genomes):
        nothing = jnp.full(moves.population, jnp.inf)
        return genomes, Cost(nothing, nothing), jnp.float32(0), jnp.float32(jnp.inf)

    def tell(key, state, mutants, theirs):
        now, costs, rounds, scale = state
        scale = jnp.where(rounds == 0, theirs.objective.min(), scale)
        temperature = scale * HOT * (COLD / HOT) ** (rounds / moves.rounds)
        worse = theirs.objective > costs.objective
        loss = jnp.where(worse, theirs.objective - costs.objective, 0)
        lucky = worse & (jax.random.uniform(key, loss.shape) < jnp.exp(-loss / temperature))
        now, costs = choose(lucky | ~better(costs, theirs), (mutants, theirs), (now, costs))
        return now, costs, rounds + 1, scale

    def ask(key, state):
        return state, moves.mutate(jax.random.split(key, moves.population), state[0])

    return Strategy(start, tell, ask)


def evosax_search(moves: Moves) -> Strategy:
    """Returns separable CMA-ES of evosax on random keys.

    The key of a request is a number. Its fractional part, as a share of a circle, selects the place
    of the request. The search starts around the best genome of the first population.

    Args:
        moves: The ways to make genomes, and their number.

    Raises:
        ModuleNotFoundError: evosax is not installed.

    Reference:
        Ros and Hansen, "A Simple Modification in CMA-ES Achieving Linear Time and Space
        Complexity", 2008.
    """
    try:
        from evosax.algorithms import Sep_CMA_ES
    except ImportError:
        raise ModuleNotFoundError(
            "this strategy needs evosax: pip install 'ggem-jax[neupims]'"
        ) from None
    choices = moves.choices
    places, levels = 2 * choices.channels, choices.priorities
    low, high, _ = knob_ranges(choices)

    def encode(genome: Genome) -> dict[str, Array]:
        return {
            "places": (genome.places + 0.5) / places,
            "priorities": (genome.priorities + 0.5) / levels,
            "interleaved": jnp.where(genome.interleaved, 0.75, 0.25),
            "knobs": (genome.knobs - low) / jnp.maximum(high - low, 1e-30),
        }

    def decode(keys: dict[str, Array]) -> Genome:
        turned = jax.tree.map(lambda key: key - jnp.floor(key), keys)
        return Genome(
            jnp.minimum((turned["places"] * places).astype(jnp.int32), places - 1),
            jnp.minimum((turned["priorities"] * levels).astype(jnp.int32), levels - 1),
            (
                turned["interleaved"] > 0.5
                if len(choices.sub_batches) == 2
                else jnp.full(turned["interleaved"].shape, 2 in choices.sub_batches)
            ),
            jax.vmap(partial(set_knobs, choices))(jnp.clip(keys["knobs"], 0, 1)),
        )

    example = {
        "places": jnp.zeros(moves.requests),
        "priorities": jnp.zeros(moves.requests),
        "interleaved": jnp.float32(0),
        "knobs": low,
    }
    strategy = Sep_CMA_ES(population_size=moves.population, solution=example)
    parameters = strategy.default_params.replace(std_init=jnp.float32(KEY_STEP))

    def start(genomes):
        keys = jax.vmap(encode)(genomes)
        return keys, strategy.init(
            jax.random.key(0), jax.tree.map(lambda key: key[0], keys), parameters
        )

    def tell(key, state, genomes, costs):
        keys, inner = state
        best = ravel_pytree(jax.tree.map(lambda each: each[by_cost(costs)[0]], keys))[0]
        told, _ = strategy.tell(key, keys, _rank_costs(costs), inner, parameters)
        # The first population is not the strategy's own: only its best is taken over.
        first = inner.generation_counter == 0
        return keys, jax.tree.map(
            partial(jnp.where, first),
            inner.replace(mean=best, generation_counter=told.generation_counter),
            told,
        )

    def ask(key, state):
        keys, inner = strategy.ask(key, state[1], parameters)
        return (keys, inner), moves.repair(decode(keys))

    return Strategy(start, tell, ask)


def _rank_costs(costs: Cost):
    """Returns the ranks of costs, best 0, for a strategy that takes one number for each genome."""
    return (
        jnp.zeros(costs.objective.shape)
        .at[by_cost(costs)]
        .set(jnp.arange(costs.objective.shape[0]) * 1.0)
    )


STRATEGIES: dict[str, Callable] = {
    "evolution": evolution,
    "random": random_search,
    "annealing": annealing,
    "evosax": evosax_search,
}
