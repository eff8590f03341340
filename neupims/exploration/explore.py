"""Design points of a space and their Pareto front: sampled or evolved, evaluated chunk by chunk on
all devices, kept in a folder to go on from.

What a design is worth is a function that is passed in (`neupims.exploration.evaluation` makes the
usual one): from the columns of the knobs, {name: (n,)}, to metrics, {name: (n, workloads)}, and
`flagged`, (n, workloads), true where a design is none. Of a metric over workloads the geometric
mean counts. A flagged design, or one with a metric that is not finite, is in no front and spoils no
other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from neupims.exploration import evolution, pareto
from neupims.exploration.chunks import Chunks, chunks, code_digest
from neupims.exploration.sensitivity import Sensitivity, neighbours, sensitivities
from neupims.exploration.space import METHODS, Space, grid_size, sample, unit_sample

Evaluate = Callable[[dict[str, Array]], dict[str, Array]]
Report = Callable[[int, int], None]

CHUNK = 16384  # designs of a file of samples
POPULATION = 256  # designs of a generation
SAMPLED = 65536  # designs, about, from which sensitivities are computed
PICTURED = 4096  # designs, about, that a picture shows beside the front
WORSE = 4.0  # times than the base design, in each objective: where the hypervolume ends


class Objective(NamedTuple):
    """A metric, and whether more of it is better."""

    name: str
    largest: bool

    def __str__(self) -> str:
        return f"{self.name}:{'max' if self.largest else 'min'}"


class Points(NamedTuple):
    """Designs with what they are worth. `violation` is 0 where all constraints are kept, infinite
    where the design is flagged (or a constraint has no value).
    """

    place: np.ndarray  # (n,) in the run
    values: np.ndarray  # (n, knobs)
    metrics: dict[str, np.ndarray]  # (n, workloads)
    violation: np.ndarray  # (n,)

    def take(self, rows: np.ndarray) -> "Points":
        return Points(
            self.place[rows],
            self.values[rows],
            {name: each[rows] for name, each in self.metrics.items()},
            self.violation[rows],
        )


@dataclass(frozen=True)
class Exploration:
    """What was found."""

    objectives: tuple[Objective, ...]
    points: int
    kept: int  # of them, designs that keep all constraints
    flagged: int  # of them, impossible or not finite
    front: Points
    others: Points  # some of the other designs that keep all constraints, drawn by chance
    base: Points  # one design: the base values, moved into the space
    reference: dict[str, float]  # where the hypervolume ends
    hypervolume: (
        float | None
    )  # of the front, objectives in units of the base design; None for more than three
    sensitivities: dict[str, Sensitivity]
    sensitivity_of: str


def parse_objectives(text: str) -> tuple[Objective, ...]:
    """Objectives of a command line: NAME:max or NAME:min, with commas between them.

    Raises:
        ValueError: one is not of that form, or is there twice.
    """
    found = []
    for part in text.split(","):
        name, _, sense = part.strip().partition(":")
        if not name or sense not in ("max", "min"):
            raise ValueError(f"an objective is NAME:max or NAME:min, not {part.strip()!r}")
        found.append(Objective(name, sense == "max"))
    if len({each.name for each in found}) < len(found):
        raise ValueError(f"an objective is there twice in {text!r}")
    return tuple(found)


def overall(metric: Float[np.ndarray, "n w"]) -> Float[np.ndarray, " n"]:
    """The geometric mean over workloads."""
    with np.errstate(all="ignore"):
        return np.exp(np.log(np.asarray(metric, np.float64)).mean(axis=1))


def judged(points: Points, objectives: Sequence[Objective]) -> Float[np.ndarray, "n m"]:
    """The objectives, to be minimised; NaN for designs that break a constraint or are flagged."""
    columns = [
        overall(points.metrics[each.name]) * (-1 if each.largest else 1) for each in objectives
    ]
    return np.where(points.violation[:, None] <= 0, np.stack(columns, axis=1), np.nan)


class Evaluator:
    """`evaluate` on `rows` designs at a time, spread over all devices; fewer are filled up, so that
    there is one compilation.
    """

    def __init__(
        self,
        space: Space,
        evaluate: Evaluate,
        rows: int,
        devices: Sequence[jax.Device] | None = None,
    ):
        devices = jax.devices() if devices is None else devices
        self.space, self.rows = space, -(-rows // len(devices)) * len(devices)
        spread = PartitionSpec("designs")
        mesh = Mesh(np.array(devices), ("designs",))
        self.placed = NamedSharding(mesh, spread)
        self.run = jax.jit(
            jax.shard_map(evaluate, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False)
        )

    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        found = jax.eval_shape(self.run, self._columns(np.ones((1, len(self.space.knobs)))))
        return tuple(name for name in found if name != "flagged")

    def __call__(self, values: Float[np.ndarray, "n k"], first: int = 0) -> Points:
        """Evaluates designs, numbered from `first`."""
        parts = []
        for start in range(0, len(values), self.rows):
            part = values[start : start + self.rows]
            found = jax.device_get(self.run(self._columns(part)))
            parts.append({name: np.asarray(each)[: len(part)] for name, each in found.items()})
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        flagged = arrays.pop("flagged", np.zeros((len(values), 1), bool)).any(axis=1)
        for each in arrays.values():
            flagged |= ~np.isfinite(each).all(axis=1)
        known = self.space.columns(values) | {name: overall(each) for name, each in arrays.items()}
        violation = np.where(flagged, np.inf, self.space.violation(known))
        return Points(np.arange(first, first + len(values)), values, arrays, violation)

    def _columns(self, values: np.ndarray) -> dict[str, Array]:
        filled = np.concatenate(
            [values, np.broadcast_to(values[-1:], (self.rows - len(values), values.shape[1]))]
        )
        columns = {}
        for knob, column in zip(self.space.knobs, filled.T, strict=True):
            whole = knob.whole and np.abs(column).max() < 2**31
            columns[knob.name] = jax.device_put(
                column.astype(np.int32 if whole else np.float32), self.placed
            )
        return columns


def explore(
    space: Space,
    evaluate: Evaluate,
    objectives: Sequence[Objective],
    *,
    method: str = "sobol",
    points: int | None = None,
    seed: int = 0,
    chunk: int | None = None,
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    reference: Mapping[str, float] | None = None,
    sensitivity_of: str = "tokens_per_second",
    report: Report = lambda done, total: None,
) -> Exploration:
    """Evaluates `points` designs of a space ("grid": all of the grid) and keeps the best.

    With a `folder` every chunk is kept as it is done and read again by the next run of the same
    space, `settings` (what `evaluate` depends on) and code. `reference` gives, by objective, where
    the hypervolume ends; else it ends where designs are `WORSE` times worse than the base, which
    must be a machine. `report` is called with the designs done and in all. For evolution `chunk` is
    the population.

    Raises:
        ValueError: an unknown method, objective or number of points; the folder holds another
            exploration; the base design is impossible.
        OSError: the folder cannot be written to.
    """
    total, chunk = _sizes(space, method, points, chunk)
    objectives = tuple(objectives)
    evaluator = Evaluator(space, evaluate, min(chunk, total))
    metrics = evaluator.metrics()
    _check_names(metrics, objectives, reference or {}, sensitivity_of)
    run = {"method": method, "seed": seed, "chunk": chunk} | (
        {"objectives": list(map(str, objectives))} if method == "evolution" else {}
    )
    identity = {
        "space": space.described() | {"base": space.base},
        "settings": dict(settings or {}),
        "run": run,
        "code": code_digest(),
    }
    with chunks(Path(folder) if folder is not None else None, identity) as store:
        near = evaluator(neighbours(space))
        ends = _reference(near.take(np.array([0])), objectives, reference or {})
        if method == "evolution":
            parts = _evolved(evaluator, objectives, total, chunk, seed, store)
        else:
            parts = _sampled(evaluator, method, total, chunk, seed, store)
        done = kept = flagged = 0
        front: Points | None = None
        drawn: list[tuple[np.ndarray, np.ndarray]] = []
        others: list[Points] = []
        for number, part in enumerate(parts):
            front = _better(front, part, objectives)
            done += len(part.place)
            kept += int(np.sum(part.violation <= 0))
            flagged += int(np.sum(np.isinf(part.violation)))
            chance = np.random.default_rng((seed, number)).random(len(part.place))
            others.append(part.take((part.violation <= 0) & (chance < PICTURED / total)))
            if method != "evolution" or number == 0:  # what evolves is no sample of the space
                chosen = chance < SAMPLED / total
                drawn.append((part.values[chosen], _result(part, sensitivity_of)[chosen]))
            report(done, total)
    assert front is not None
    sampled = tuple(np.concatenate(each) for each in zip(*drawn, strict=True))
    return Exploration(
        objectives=objectives,
        points=total,
        kept=kept,
        flagged=flagged,
        front=front,
        others=_apart(reduce(_joined, others), front),
        base=near.take(np.array([0])),
        reference=ends,
        hypervolume=_volume(front, near, objectives, ends),
        sensitivities=sensitivities(space, (near.values, _result(near, sensitivity_of)), sampled),  # type: ignore[arg-type]
        sensitivity_of=sensitivity_of,
    )


def _result(points: Points, name: str) -> np.ndarray:
    """A metric over all workloads, NaN for designs that are none. Constraints do not matter."""
    return np.where(np.isinf(points.violation), np.nan, overall(points.metrics[name]))


def _sizes(space: Space, method: str, points: int | None, chunk: int | None) -> tuple[int, int]:
    if method not in (*METHODS, "evolution"):
        raise ValueError(
            f"the method must be one of {', '.join((*METHODS, 'evolution'))}, not {method!r}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk must have at least one design, not {chunk}")
    chunk = chunk or (POPULATION if method == "evolution" else CHUNK)
    if points is not None and points < 1:
        raise ValueError(f"at least one point must be evaluated, not {points}")
    if method == "grid":
        size = grid_size(space)
        if points is not None and size > points:
            raise ValueError(f"the grid has {size} points, more than the {points} allowed")
        return size, chunk
    total = points or 4096
    if method == "evolution":
        if chunk < 4 or chunk % 2:
            raise ValueError(
                f"a population must have an even number of designs, at least 4, not {chunk}"
            )
        total = -(-total // chunk) * chunk
    return total, chunk


def _check_names(
    metrics: Sequence[str],
    objectives: Sequence[Objective],
    reference: Mapping[str, float],
    sensitivity_of: str,
) -> None:
    for name in (*(each.name for each in objectives), sensitivity_of):
        if name not in metrics:
            raise ValueError(f"there is no metric {name!r}; there are {', '.join(metrics)}")
    if unknown := set(reference) - {each.name for each in objectives}:
        raise ValueError(f"the reference names {', '.join(sorted(unknown))}, which is no objective")


def _sampled(
    evaluator: Evaluator, method: str, total: int, chunk: int, seed: int, store: Chunks
) -> Iterator[Points]:
    for number, start in enumerate(range(0, total, chunk)):
        stop = min(start + chunk, total)
        yield _computed(
            store, number, stop - start, partial(_drawn, evaluator, method, start, stop, seed)
        )


def _drawn(evaluator: Evaluator, method: str, start: int, stop: int, seed: int) -> Points:
    return evaluator(sample(evaluator.space, method, start, stop, seed=seed), start)


def _computed(store: Chunks, number: int, rows: int, compute: Callable[[], Points]) -> Points:
    """The designs of a file, or else computed and kept there."""
    found = store.load(number, rows)
    if found is not None:
        named = {
            name.removeprefix("metric "): found[name]
            for name in found
            if name.startswith("metric ")
        }
        return Points(found["place"], found["values"], named, found["violation"])
    points = compute()
    named = {f"metric {name}": each for name, each in points.metrics.items()}
    store.save(
        number,
        {"place": points.place, "values": points.values, "violation": points.violation} | named,
    )
    return points


def _evolved(
    evaluator: Evaluator, objectives, total: int, population: int, seed: int, store: Chunks
) -> Iterator[Points]:
    """Generation by generation, the first a Sobol sample. All is drawn from the seed, so a run that
    goes on breeds the same again.
    """
    space = evaluator.space
    listed = jnp.array([bool(knob.values) for knob in space.knobs])
    units = jnp.asarray(
        unit_sample(len(space.knobs), "sobol", 0, population, seed=seed), jnp.float32
    )
    parents: tuple[Array, Points] | None = None
    for number in range(total // population):
        if parents is not None:
            fit = _fitness(parents[1], objectives)
            drawn = np.random.default_rng((seed, number)).random(
                (evolution.DRAWS, *units.shape), np.float32
            )
            units = evolution.offspring(jnp.asarray(drawn), parents[0], *fit, listed)
        values = space.values(np.asarray(units))
        children = _computed(
            store, number, population, partial(evaluator, values, number * population)
        )
        yield children
        if parents is None:
            parents = units, children
            continue
        both = _joined(parents[1], children)
        best = evolution.survivors(*_fitness(both, objectives))
        parents = jnp.concatenate([parents[0], units])[best], both.take(np.asarray(best))


def _fitness(points: Points, objectives: Sequence[Objective]):
    found = judged(points._replace(violation=np.zeros_like(points.violation)), objectives)
    return evolution.fitness(
        *(jnp.asarray(each, jnp.float32) for each in (points.values, found, points.violation))
    )


def _joined(first: Points, second: Points) -> Points:
    return jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second)


def _better(front: Points | None, part: Points, objectives: Sequence[Objective]) -> Points:
    both = part if front is None else _joined(front, part)
    return _distinct(both.take(pareto.front(judged(both, objectives))))


def _distinct(points: Points) -> Points:
    """The first of each design: one that is drawn again is the same."""
    return points.take(np.sort(np.unique(points.values, axis=0, return_index=True)[1]))


def _apart(points: Points, known: Points) -> Points:
    """The designs, each once, that are not among those known already."""
    both = _distinct(_joined(known, points))
    return both.take(~np.isin(both.place, known.place))


def _reference(
    base: Points, objectives: Sequence[Objective], given: Mapping[str, float]
) -> dict[str, float]:
    ends = {}
    for each in objectives:
        value = float(overall(base.metrics[each.name])[0])
        if not np.isfinite(value) or value <= 0:
            raise ValueError(
                f"{each.name} of the base design is {value:g}, so nothing can be compared with it:"
                " choose a base that is a machine"
            )
        ends[each.name] = float(
            given.get(each.name, value / WORSE if each.largest else value * WORSE)
        )
    return ends


def _volume(
    front: Points, near: Points, objectives: Sequence[Objective], ends: Mapping[str, float]
) -> float | None:
    if len(objectives) > 3:
        return None
    unit = np.array([float(overall(near.metrics[each.name])[0]) for each in objectives])
    sense = np.array([-1.0 if each.largest else 1.0 for each in objectives])
    reference = np.array([ends[each.name] for each in objectives])
    return pareto.hypervolume(judged(front, objectives) / unit, sense * reference / unit)
