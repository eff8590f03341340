"""How the designs of an exploration are chosen: samples, NSGA-II, and MAP-Elites.

Each method yields evaluated designs chunk by chunk, and keeps each chunk in the folder of the run.
All random numbers depend on the seed and the number of the chunk, so a run that resumes evaluates
the same designs.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce

import jax.numpy as jnp
import numpy as np

from neupims.exploration import evolution
from neupims.exploration.chunks import BESIDE, POINTS, Chunks
from neupims.exploration.elites import Elites
from neupims.exploration.evaluator import Evaluator
from neupims.exploration.points import Objective, Points, costs
from neupims.exploration.sampling import METHODS as SAMPLERS
from neupims.exploration.sampling import sample, unit_sample

BREEDERS = ("evolution", "map-elites")  # their first generation samples the space, later ones not
KEPT = ("place", "values", "violation", "code")  # fields of `Points` in a file, beside metrics
METHODS = (*SAMPLERS, *BREEDERS)


def sample_chunks(
    evaluator: Evaluator, method: str, total: int, chunk: int, seed: int, store: Chunks
) -> Iterator[Points]:
    """Yields the designs of a sampler.

    Args:
        evaluator: Evaluates the designs.
        method: One of `sampling.METHODS`.
        total: Number of designs.
        chunk: Designs of a chunk.
        seed: Seed of all random numbers.
        store: Where the chunks are kept.
    """

    def evaluate(start: int, stop: int) -> Points:
        return evaluator(sample(evaluator.space, method, start, stop, seed=seed), start)

    for number, start in enumerate(range(0, total, chunk)):
        stop = min(start + chunk, total)
        yield _load_or_compute(
            store, f"{POINTS}/{number:06d}", stop - start, partial(evaluate, start, stop)
        )


def keep(evaluator: Evaluator, store: Chunks, chunk: int) -> Callable[[np.ndarray], Points]:
    """Returns a function that evaluates given designs, `(n, k)`, and keeps what it found.

    It is for designs beside those of the method. Their files are named after their values.

    Args:
        evaluator: Evaluates the designs.
        store: Where they are kept.
        chunk: Designs of a file.
    """

    def evaluate(values: np.ndarray) -> Points:
        starts = range(0, len(values), chunk)
        return reduce(Points.join, (of_file(values[each : each + chunk], each) for each in starts))

    def of_file(values: np.ndarray, first: int) -> Points:
        described = f"{evaluator.measured} {first} ".encode() + values.tobytes()
        name = f"{BESIDE}/{hashlib.sha256(described).hexdigest()[:32]}"
        return _load_or_compute(store, name, len(values), partial(evaluator, values, first))

    return evaluate


def _load_or_compute(store: Chunks, name: str, rows: int, compute: Callable[[], Points]) -> Points:
    """The designs of a file; if there is none, they are computed and kept."""
    found = store.load(name, rows, KEPT)
    if found is not None:
        metrics = {
            name.removeprefix("metric "): each
            for name, each in found.items()
            if name.startswith("metric ")
        }
        return Points(
            *(found["place"], found["values"], metrics, found["violation"], found["code"])
        )
    points = compute()
    named = {f"metric {name}": each for name, each in points.metrics.items()}
    arrays = {name: getattr(points, name) for name in KEPT}
    store.save(name, arrays | named)
    return points


def evolve(
    evaluator: Evaluator,
    objectives: Sequence[Objective],
    total: int,
    population: int,
    seed: int,
    store: Chunks,
) -> Iterator[Points]:
    """Yields the generations of NSGA-II, the first a Sobol sample.

    Args:
        evaluator: Evaluates the designs.
        objectives: Metrics to be minimised or maximised.
        total: Number of designs, a multiple of the population.
        population: Designs of a generation, an even number.
        seed: Seed of all random numbers.
        store: Where the generations are kept.
    """
    listed, units = _listed(evaluator), _start(evaluator, 0, population, seed)
    parents: tuple[np.ndarray, Points] | None = None
    for number in range(total // population):
        if parents is not None:
            fitness = _fitness(parents[1], objectives)
            rng = np.random.default_rng((seed, number))
            units = _breed(rng, listed, parents[0], *fitness)
        children = _evaluate(evaluator, units, number, store)
        yield children
        if parents is None:
            parents = units, children
            continue
        both = parents[1].join(children)
        best = evolution.select_survivors(*_fitness(both, objectives))
        parents = np.concatenate([parents[0], units])[best], both.take(best)


def illuminate(
    evaluator: Evaluator, elites: Elites, total: int, population: int, seed: int, store: Chunks
) -> Iterator[Points]:
    """Yields the generations of MAP-Elites.

    The first one is a Sobol sample, and so are further ones while no design meets the constraints.
    Parents are drawn uniformly from the cells of the map that have a design.

    Args:
        evaluator: Evaluates the designs.
        elites: The map; it holds each generation that was yielded.
        total: Number of designs, a multiple of the population.
        population: Designs of a generation, an even number.
        seed: Seed of all random numbers.
        store: Where the generations are kept.
    """
    listed = _listed(evaluator)
    equal = np.zeros(population, int), np.zeros(population)  # in rank and in crowding distance
    for number in range(total // population):
        if not len(elites.units):
            units = _start(evaluator, number * population, population, seed)
        else:
            rng = np.random.default_rng((seed, number))
            chosen = rng.integers(len(elites.units), size=population)
            units = _breed(rng, listed, elites.units[chosen], *equal)
        children = _evaluate(evaluator, units, number, store)
        elites.update(children, units)
        yield children


def _listed(evaluator: Evaluator) -> jnp.ndarray:
    """Which knobs have a list of values, `(k,)`."""
    return jnp.array([bool(knob.values) for knob in evaluator.space.knobs])


def _start(evaluator: Evaluator, first: int, population: int, seed: int) -> np.ndarray:
    """The coordinates of a Sobol sample, from the given point on."""
    knobs = len(evaluator.space.knobs)
    units = unit_sample(knobs, "sobol", first, first + population, seed=seed)
    return np.asarray(units, np.float32)


def _breed(rng: np.random.Generator, listed, units, rank, distance) -> np.ndarray:
    drawn = rng.random((evolution.DRAWS, *units.shape), np.float32)
    return np.asarray(evolution.breed(drawn, units, rank, distance, listed))


def _evaluate(evaluator: Evaluator, units: np.ndarray, number: int, store: Chunks) -> Points:
    """The designs of a generation with their metrics."""
    compute = partial(evaluator, evaluator.space.values(units), number * len(units))
    return _load_or_compute(store, f"{POINTS}/{number:06d}", len(units), compute)


def _fitness(points: Points, objectives: Sequence[Objective]):
    """Rank and crowding distance, with the objectives of designs that violate constraints too."""
    found = costs(points._replace(violation=np.zeros_like(points.violation)), objectives)
    columns = (points.values, found, points.violation)
    return evolution.fitness(*(np.asarray(each, np.float32) for each in columns))
