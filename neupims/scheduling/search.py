"""Searches without gradients: populations of genomes, evaluated by `vmap` inside `lax.scan`, many
seeds at once.

Every strategy evaluates `population` genomes in each of `budget // population` rounds, the first
ones included, so that equal budgets are equal counts of evaluations. The objective is an argument.
Costs compare as `objective.Cost` does. The same key gives the same result.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from neupims.scheduling.decision import Genome, Space, decide, make_genome, repair
from neupims.scheduling.objective import Cost, Objective, Problem
from neupims.scheduling.policies import (
    estimated_cycles,
    halving_split,
    pack_longest_first,
    round_robin,
    snake_split,
)

CROSSED = 0.3  # share of an evolution's children that have two parents
INHERITED = 0.25  # share of the second parent's places in such a child
MUTATIONS = 2  # at most, of one child
# share of mutations that touch the order, the number of sub-batches or a knob, where those are
# searched
RELOCATIONS = 0.1
KNOB_STEP = 0.2  # standard deviation of a knob's mutation, as a share of its range
MOST_TRIES = (
    2  # mutations of a child, more than one only if the first gives what has been evaluated before
)
KEY_STEP = 0.1  # first standard deviation of evosax's random keys, in turns of the circle of places
HOT, COLD = 3e-2, 1e-5  # first and last temperature of annealing, as shares of the first cost


class Found(NamedTuple):
    """The best of a search, for each seed."""

    genome: Genome
    cost: Cost
    curve: Float[Array, "seeds rounds"]  # the best objective after each round
    evaluations: int  # of one seed


class Strategy(NamedTuple):
    """A search by asking and telling: `start` gives its state, `tell` what genomes cost, `ask` the
    genomes to evaluate next.
    """

    start: Callable[[Genome], Any]
    tell: Callable[[Key[Array, ""], Any, Genome, Cost], Any]
    ask: Callable[[Key[Array, ""], Any], tuple[Any, Genome]]


class Moves(NamedTuple):
    """How genomes of one problem are made; all on populations."""

    space: Space
    random: Callable[[Key[Array, ""]], Genome]
    mutate: Callable[[Key[Array, ""], Genome], Genome]
    repair: Callable[[Genome], Genome]
    requests: int
    population: int
    rounds: int


def search(
    strategy: str,
    objective: Objective,
    space: Space,
    problem: Problem,
    key: Key[Array, ""],
    *,
    budget: int,
    population: int = 64,
    seeds: int = 1,
    starts: Genome | None = None,
) -> Found:
    """The best schedules that `seeds` independent searches find.

    `starts`, if given, are genomes with a leading axis that the first population holds, with
    mutants of them. The objective must be hashable, so that searches of one shape compile once.

    Raises:
        ValueError: the strategy is none of `STRATEGIES`, or the budget is below one population.
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
        space,
        population,
        rounds,
        problem,
        starts,
        jax.random.split(key, seeds),
    )
    return Found(genome, cost, curve, rounds * population)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _search(make_strategy, objective, space, population, rounds, problem, starts, keys):
    """One key is one seed. The objective is traced once: it is most of the time to compile."""

    def each(function):
        return lambda key, *genomes: jax.vmap(partial(function, space, problem))(
            jax.random.split(key, population), *genomes
        )

    moves = Moves(
        space,
        each(random_genome),
        each(mutate),
        jax.vmap(partial(repair, space, problem.resident)),
        problem.seq_lens.shape[0],
        population,
        rounds,
    )
    strategy: Strategy = make_strategy(moves)
    evaluate = jax.vmap(lambda genome: objective(problem, decide(space, genome)))

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


PACKINGS = ("round robin", "greedy (paper)", "longest first")
SPLITS = {2: ("halves", "snake"), 1: ("one batch",)}


def baselines(space: Space, problem: Problem, knobs=None) -> dict[str, Genome]:
    """The simple schedules by name, with residents where they are; each with every number of
    sub-batches that the space has.
    """
    names = [
        f"{packing}, {split}"
        for packing in PACKINGS
        for count in (2, 1)
        if count in space.sub_batches
        for split in SPLITS[count]
    ]
    values = (
        jnp.array([knob.low for knob in space.knobs], jnp.float32)
        if knobs is None
        else jnp.asarray(knobs, jnp.float32)
    )
    return dict(zip(names, _baselines(space, problem, values), strict=True))


@partial(jax.jit, static_argnums=0)
def _baselines(space: Space, problem: Problem, knobs) -> list[Genome]:
    work = problem.work.sum(axis=1)
    estimate = estimated_cycles(problem.hardware, problem.model, problem.seq_lens, problem.parallel)
    packings = [
        jnp.where(
            problem.resident >= 0, problem.resident, round_robin(work.shape[0], space.channels)
        ),
        pack_longest_first(estimate, space.channels, resident=problem.resident),
        pack_longest_first(work, space.channels, resident=problem.resident),
    ]
    made = []
    for channels in packings:
        snake = snake_split(work, channels, space.channels)
        if 2 in space.sub_batches:
            made += [
                make_genome(space, channels, split, knobs=knobs)
                for split in (halving_split(channels, space.channels), snake)
            ]
        if 1 in space.sub_batches:
            made.append(make_genome(space, channels, snake, interleaved=False, knobs=knobs))
    return [repair(space, problem.resident, genome) for genome in made]


def better(one: Cost, other: Cost):
    """Whether `one` is the lower cost."""
    return (one.objective < other.objective) | (
        (one.objective == other.objective) & (one.busy < other.busy)
    )


def by_cost(costs: Cost):
    """Indices from the best."""
    return jnp.lexsort((costs.busy, costs.objective))


def pick_best(genomes: Genome, costs: Cost) -> tuple[Genome, Cost]:
    index = jnp.argmin(jnp.where(costs.objective == costs.objective.min(), costs.busy, jnp.inf))
    return jax.tree.map(lambda leaf: leaf[index], (genomes, costs))


def better_of(one: tuple[Genome, Cost], other: tuple[Genome, Cost]) -> tuple[Genome, Cost]:
    return choose(better(other[1], one[1]), other, one)


def choose(condition, yes, no):
    """One of two trees; a condition with an axis chooses row by row."""
    return jax.tree.map(
        lambda a, b: jnp.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        ),
        yes,
        no,
    )


def random_genome(space: Space, problem: Problem, key) -> Genome:
    """A genome drawn evenly from the space."""
    requests = problem.seq_lens.shape[0]
    place_key, priority_key, mode_key, knob_key = jax.random.split(key, 4)
    genome = Genome(
        jax.random.randint(place_key, (requests,), 0, 2 * space.channels),
        jax.random.randint(priority_key, (requests,), 0, space.priorities),
        (
            jax.random.bernoulli(mode_key)
            if len(space.sub_batches) == 2
            else jnp.array(2 in space.sub_batches)
        ),
        _knobs(space, jax.random.uniform(knob_key, (len(space.knobs),))),
    )
    return repair(space, problem.resident, genome)


def first_population(moves: Moves, starts: Genome | None, key) -> Genome:
    """Random genomes; or the given ones, as many as fit, then mutants of them."""
    if starts is None:
        return moves.random(key)
    given = starts.places.shape[0]
    genomes = moves.repair(
        jax.tree.map(lambda leaf: leaf[jnp.arange(moves.population) % given], starts)
    )
    return choose(jnp.arange(moves.population) < given, genomes, moves.mutate(key, genomes))


def mutate(space: Space, problem: Problem, key, genome: Genome) -> Genome:
    """The genome with 1 to MUTATIONS changes, small numbers more often. Each is a move, a swap or a
    flip; or, where those are searched, of a request's order, the number of sub-batches or a knob.
    """
    count_key, other_key, key = jax.random.split(key, 3)
    count = jnp.minimum(1 + jnp.floor(jax.random.exponential(count_key)), MUTATIONS)
    keys = jax.random.split(key, MUTATIONS)
    genome = jax.lax.fori_loop(
        0,
        MUTATIONS,
        lambda index, genome: choose(
            index < count, relocate(space, problem, keys[index], genome), genome
        ),
        genome,
    )
    changeable = (space.priorities > 1, len(space.sub_batches) == 2, len(space.knobs) > 0)
    if any(changeable):
        genome = _change_others(space, other_key, genome)
    return repair(space, problem.resident, genome)


def relocate(space: Space, problem: Problem, key, genome: Genome) -> Genome:
    """One request moved to another place, exchanged with a request there, or put into the other
    sub-batch of its channel; seldom two channels exchanged with all they hold, or the sub-batches.

    Half of the times the request comes from the fullest channel of a sub-batch (by logit, attend or
    both), half of the times the place is the
    emptiest: only such changes make the slowest channel faster.
    """
    places = genome.places
    numbers = 2 * space.channels
    draws = jax.random.bits(key, (8,), jnp.uint32)
    half = (draws[0] % 2).astype(jnp.int32)
    loads = jax.ops.segment_sum(problem.work, places, numbers)
    load = loads @ jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[draws[1] % 3]
    parity = jnp.arange(numbers) % 2
    fullest = jnp.argmax(jnp.where(parity == half, load, -1.0))
    request = jnp.where(
        draws[2] % 2 == 0, _somewhere(places == fullest, draws[3]), draws[3] % places.shape[0]
    ).astype(jnp.int32)
    here = places[request]
    emptiest = jnp.argmin(jnp.where(parity == draws[4] % 2, load, jnp.inf))
    elsewhere = (here + 1 + (draws[5] % (numbers - 1)).astype(jnp.int32)) % numbers
    there = jnp.where((draws[4] % 4 < 2) & (emptiest != here), emptiest, elsewhere)
    kind = draws[6] % 8
    there = jnp.where(kind == 0, here ^ 1, there).astype(places.dtype)  # flip
    moved = places.at[request].set(there)
    partner = _somewhere(places == there, draws[7])
    swapped = moved.at[partner].set(jnp.where(places[partner] == there, here, moved[partner]))
    one, other = here // 2, elsewhere // 2
    channel = places // 2
    exchanged = (
        2 * jnp.where(channel == one, other, jnp.where(channel == other, one, channel)) + places % 2
    )
    exchanged = jnp.where(one == other, places ^ 1, exchanged)
    wholesale = draws[7] // 65536 % 8 == 0
    return genome._replace(
        places=jnp.where(
            wholesale, exchanged, jnp.where((kind < 3) | (partner == request), moved, swapped)
        )
    )


def _somewhere(mask, draw):
    """The index of one of the true elements, 0 if there is none."""
    size = mask.shape[0]
    turned = (jnp.arange(size) + (draw % size).astype(jnp.int32)) % size
    return jnp.argmax(jnp.where(mask, turned + 1, 0))


def _change_others(space: Space, key, genome: Genome) -> Genome:
    keys = jax.random.split(key, 6)
    if space.priorities > 1:
        changes = jax.random.bernoulli(keys[0], RELOCATIONS, genome.priorities.shape)
        genome = genome._replace(
            priorities=jnp.where(
                changes,
                jax.random.randint(keys[1], genome.priorities.shape, 0, space.priorities),
                genome.priorities,
            )
        )
    if len(space.sub_batches) == 2:
        genome = genome._replace(
            interleaved=genome.interleaved ^ jax.random.bernoulli(keys[2], RELOCATIONS)
        )
    if space.knobs:
        low, high, _ = _ranges(space)
        step = KNOB_STEP * (high - low) * jax.random.normal(keys[3], genome.knobs.shape)
        wants = jax.random.bernoulli(keys[4], 0.5, genome.knobs.shape)
        moved = jnp.clip((genome.knobs + step - low) / jnp.maximum(high - low, 1e-30), 0, 1)
        genome = genome._replace(knobs=jnp.where(wants, _knobs(space, moved), genome.knobs))
    return genome


def _ranges(space: Space):
    columns = [[knob.low, knob.high, knob.whole] for knob in space.knobs]
    return jnp.asarray(np.array(columns, np.float32).reshape(-1, 3)).T


def _knobs(space: Space, shares):
    """Knobs at these shares of their ranges, whole ones rounded."""
    low, high, whole = _ranges(space)
    values = low + shares * (high - low)
    return jnp.where(whole > 0, jnp.clip(jnp.round(values), jnp.ceil(low), jnp.floor(high)), values)


def random_search(moves: Moves) -> Strategy:
    """New random genomes each round."""
    return Strategy(
        lambda genomes: (),
        lambda key, state, genomes, costs: state,
        lambda key, state: (state, moves.random(key)),
    )


def evolution(moves: Moves) -> Strategy:
    """Each round as many children as there are parents; the best of both go on. Parents win a
    tournament of two.

    Of genomes with the same cost one goes on, a young one; the others only where there are not
    enough: a population of twins has stopped to search. A child that has been evaluated before is
    mutated further, so that small spaces are not searched twice. What has been is marked in a table
    by a
    hash: two genomes that share a mark cost one mutation more, no more.
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
        winners = jax.random.randint(pairs_key, (2, 2, size), 0, size).min(
            axis=1
        )  # parents stand in the order of their costs
        mother, father = (jax.tree.map(lambda leaf, who=who: leaf[who], parents) for who in winners)
        crossed = jax.vmap(cross)(jax.random.split(cross_key, size), mother, father)

        def again(carry):
            tries, _, fresh = carry
            return (tries < MOST_TRIES) & ~fresh.all()

        def further(carry):
            tries, children, fresh = carry
            children = choose(
                fresh, children, moves.mutate(jax.random.fold_in(key, tries), children)
            )
            own = marks(children)
            elder = jnp.tril(own[:, None] == own, -1).any(axis=1)
            return tries + 1, children, ~seen[own] & ~elder

        _, children, _ = jax.lax.while_loop(again, further, (0, crossed, jnp.zeros(size, bool)))
        return state, children

    return Strategy(start, tell, ask)


def genome_hash(genome: Genome):
    """32 bits that depend on all of a genome."""
    parts = [
        genome.places,
        genome.priorities,
        genome.interleaved[None],
        jax.lax.bitcast_convert_type(genome.knobs, jnp.int32),
    ]
    numbers = jnp.concatenate([part.astype(jnp.uint32) for part in parts])
    odd = np.random.default_rng(0).integers(0, 2**31, numbers.shape[0], np.uint32) * 2 + 1
    mixed = (numbers + 1) * odd
    return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32) * jnp.uint32(2654435769)


def cross(key, mother: Genome, father: Genome) -> Genome:
    """The mother's genome, in some children with some of the father's places."""
    whether_key, which_key = jax.random.split(key)
    share = jnp.where(jax.random.bernoulli(whether_key, CROSSED), INHERITED, 0.0)
    theirs = jax.random.bernoulli(which_key, share, mother.places.shape)
    return mother._replace(
        places=jnp.where(theirs, father.places, mother.places),
        priorities=jnp.where(theirs, father.priorities, mother.priorities),
    )


def annealing(moves: Moves) -> Strategy:
    """Each genome a chain of its own: a mutant is taken if it is not worse, or by chance while the
    chain is hot (Metropolis).
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

    return Strategy(start, tell, lambda key, state: (state, moves.mutate(key, state[0])))


def evosax_search(moves: Moves) -> Strategy:
    """Separable CMA-ES of evosax on random keys: a number for each request, whose share of the way
    round the unit circle is its place.

    It starts around the best of the first population. Reference: Ros and Hansen, "A Simple
    Modification in CMA-ES Achieving Linear Time and Space Complexity", 2008.
    """
    try:
        from evosax.algorithms import Sep_CMA_ES
    except ImportError:
        raise ModuleNotFoundError(
            "this strategy needs evosax: pip install 'ggem-jax[neupims]'"
        ) from None
    space = moves.space
    places, levels = 2 * space.channels, space.priorities
    low, high, _ = _ranges(space)

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
                if len(space.sub_batches) == 2
                else jnp.full(turned["interleaved"].shape, 2 in space.sub_batches)
            ),
            jax.vmap(partial(_knobs, space))(jnp.clip(keys["knobs"], 0, 1)),
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
        told, _ = strategy.tell(key, keys, _shaped(costs), inner, parameters)
        first = (
            inner.generation_counter == 0
        )  # the first population is not the strategy's own: only its best is taken over
        return keys, jax.tree.map(
            partial(jnp.where, first),
            inner.replace(mean=best, generation_counter=told.generation_counter),
            told,
        )

    def ask(key, state):
        keys, inner = strategy.ask(key, state[1], parameters)
        return (keys, inner), moves.repair(decode(keys))

    return Strategy(start, tell, ask)


def _shaped(costs: Cost):
    """Ranks, best 0: so a strategy that takes one number compares costs as we do."""
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


def interval_of_mean(values, *, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The mean over seeds, and half the width of its 95 % interval (normal approximation; 0 for one
    seed).
    """
    values = np.asarray(values, np.float64)
    count = values.shape[axis]
    spread = values.std(axis=axis, ddof=1) if count > 1 else np.zeros(values.mean(axis=axis).shape)
    return values.mean(axis=axis), 1.96 * spread / np.sqrt(count)
