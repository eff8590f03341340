"""Exploration of a space with any evaluation.

It samples or evolves designs, evaluates them in chunks on all devices, and keeps the Pareto front.
`neupims.exploration.explore` calls it with the accelerator model.
"""

import numbers
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from neupims.exploration.ablation import Ablation, ablate
from neupims.exploration.chunks import digest_code, open_chunks
from neupims.exploration.elites import AXES, Axis, Elites, parse_axes
from neupims.exploration.evaluator import Evaluate, Evaluator, Measure, Measured
from neupims.exploration.impossible import REASONS
from neupims.exploration.methods import (
    BREEDERS,
    METHODS,
    evolve,
    illuminate,
    keep,
    sample_chunks,
)
from neupims.exploration.points import (
    Objective,
    Points,
    hypervolume,
    overall,
    parse_objectives,
    result,
    update_front,
)
from neupims.exploration.sampling import grid_size
from neupims.exploration.sensitivity import Sensitivity, neighbours, sensitivities
from neupims.exploration.sobol import Indices, draw_rows, sobol_indices
from neupims.exploration.space import Space
from neupims.exploration.twins import check_effects, merge_twins

Report = Callable[[int, int], None]

CHUNK = 16384  # designs in a file of samples
POPULATION = 256  # designs in a generation
SAMPLED = 65536  # designs, approximately, from which sensitivities are computed
PLOTTED = 4096  # designs, approximately, that a plot shows beside the front
WORSE = 4.0  # times worse than the base design in each objective: where the hypervolume ends


@dataclass(frozen=True)
class SpaceResult:
    """The result of an exploration of a space."""

    objectives: tuple[Objective, ...]  # metrics to be minimised or maximised
    points: int  # designs that were evaluated
    kept: int  # designs that meet all constraints
    flagged: int  # designs that are impossible or not finite
    flagged_by_code: dict[int, int]  # their number by the code that `evaluate` gave
    front: Points  # designs that no other one dominates, equal ones once
    twins: np.ndarray  # (f,) further designs that each one of the front stands for
    others: Points  # a random part of the other designs that meet all constraints
    base: Points  # one design: the base values, moved into the space
    reference: dict[str, float]  # where the hypervolume ends, by objective
    hypervolume: float  # of the front, objectives in units of the base design
    sensitivities: dict[str, Sensitivity]  # by knob
    sensitivity_of: str  # name of the metric
    elites: Elites | None  # the map of the method "map-elites"
    indices: Indices | None  # Sobol indices of all metrics; None if there are no rows for them
    ablations: tuple[Ablation, ...]  # of the best design of each objective


def explore_space(
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
    measures: Sequence[Measure] = (),
    axes: Sequence[Axis] | None = None,
    index_rows: int = 0,
    report: Report = lambda done, total: None,
) -> SpaceResult:
    """Returns the Pareto front of designs of a space, with hypervolume and sensitivities.

    Args:
        space: Knobs and constraints.
        evaluate: Function from `{knob: (n,)}` to `{metric: (n, workloads)}`, see `Evaluator`.
        objectives: Metrics to be minimised or maximised.
        method: "grid", "random", "sobol", "evolution" (NSGA-II) or "map-elites".
        points: Designs to evaluate; 4096 if not given, and the whole grid for "grid". The last two
            methods round up to whole generations.
        seed: Seed of all random numbers.
        chunk: Designs of a file, or of a generation; 16384 and 256 if not given.
        folder: Keeps each finished chunk; a later run with the same space, settings and code reads
            it. None keeps nothing.
        settings: Values on which `evaluate` depends, as values that JSON can hold.
        reference: Where the hypervolume ends, by objective; if not given, where designs are `WORSE`
            times worse than the base design.
        sensitivity_of: The metric whose sensitivities are computed.
        measures: Further metrics, which `evaluate` does not return.
        axes: The two axes of the map of "map-elites", which keeps the best design by the first
            objective in each cell; `AXES` if not given.
        index_rows: Rows of designs from which Sobol indices are computed, each with two more
            designs than knobs, best a power of 2; 0 for no indices.
        report: Called with the number of finished designs, and of all designs.

    Raises:
        ValueError: The method, an objective or the number of points is unknown or impossible; a
            knob has no effect; the folder holds another exploration; the base design is
            impossible.
        OSError: The folder cannot be written to.
    """
    total, chunk = _sizes(space, method, points, chunk)
    if not isinstance(index_rows, numbers.Integral) or index_rows < 0:
        raise ValueError(f"index_rows must be a whole number of at least 0, not {index_rows!r}")
    objectives = parse_objectives(objectives)
    evaluator = Evaluator(space, evaluate, min(chunk, total), measures=measures)
    run: dict[str, Any] = {"method": method, "seed": seed, "chunk": chunk}
    elites = None
    if method == "evolution":
        run["objectives"] = list(map(str, objectives))
    if method == "map-elites":
        elites = Elites(parse_axes(AXES) if axes is None else axes, objectives[0])
        run |= {"objective": str(objectives[0]), "axes": list(map(str, elites.axes))}
    elif axes is not None:
        raise ValueError(f"the axes of a map are for the method map-elites, not for {method}")
    _check_names(
        evaluator.metrics(),
        objectives,
        reference or {},
        (sensitivity_of, *(axis.name for axis in (elites.axes if elites else ()))),
    )
    # Designs that violate a constraint need no measure, unless sensitivities are of one, an axis of
    # the map is one, or evolution ranks designs by what they violate.
    shown = sensitivity_of in evaluator.further
    mapped = any(axis.name in evaluator.further for axis in (elites.axes if elites else ()))
    ranked = method == "evolution" and any(
        each.names & set(evaluator.further) for each in space.constraints
    )
    measured: Measured = "possible" if shown or mapped or ranked else "kept"
    if measures:
        run["measured"] = measured
    identity = {
        "space": space.describe() | {"base": space.base},
        "settings": dict(settings or {}) | _describe_measures(measures),
        "run": run,
        "code": digest_code(),
    }
    with open_chunks(Path(folder) if folder is not None else None, identity) as store:
        every = keep(evaluator, store, chunk)
        unmeasured = keep(evaluator.measuring("none"), store, CHUNK)
        check_effects(space, unmeasured, every)
        around = neighbours(space)
        near = (every if shown else unmeasured)(around)
        base = near.take(np.array([0])) if shown else every(around[:1])
        ends = _reference(base, objectives, reference or {}, measures)
        chosen = evaluator.measuring(measured)
        if elites is not None:
            parts = illuminate(chosen, elites, total, chunk, seed, store)
        elif method == "evolution":
            parts = evolve(chosen, objectives, total, chunk, seed, store)
        else:
            parts = sample_chunks(chosen, method, total, chunk, seed, store)
        done = kept = 0
        codes: Counter[int] = Counter()
        front: Points | None = None
        drawn: list[tuple[np.ndarray, np.ndarray]] = []
        others: list[Points] = []
        for number, part in enumerate(parts):
            front = update_front(front, part, objectives)
            done += len(part.place)
            kept += int(np.sum(part.violation <= 0))
            codes.update(part.code[part.code != 0].tolist())
            chance = np.random.default_rng((seed, number)).random(len(part.place))
            others.append(part.take((part.violation <= 0) & (chance < PLOTTED / total)))
            if method not in BREEDERS or number == 0:  # later generations do not sample the space
                sampled = chance < SAMPLED / total
                drawn.append((part.values[sampled], result(part, sensitivity_of)[sampled]))
            report(done, total)
        assert front is not None
        indices = None
        if index_rows:
            indices = sobol_indices(space, every(draw_rows(space, index_rows, seed)), seed=seed)
        merged, twins = merge_twins(front, base.values[0], keep(chosen, store, chunk))
        ablations = ablate(space, merged, objectives, every)
    values, results = (np.concatenate(each) for each in zip(*drawn, strict=True))
    near_results = result(near, sensitivity_of)
    return SpaceResult(
        objectives=objectives,
        points=total,
        kept=kept,
        flagged=codes.total(),
        flagged_by_code=dict(codes),
        front=merged,
        twins=twins,
        others=reduce(Points.join, others).exclude(front),
        base=base,
        reference=ends,
        hypervolume=hypervolume(front, base, objectives, ends),
        sensitivities=sensitivities(space, (near.values, near_results), (values, results)),
        sensitivity_of=sensitivity_of,
        elites=elites,
        indices=indices,
        ablations=ablations,
    )


def _sizes(space: Space, method: str, points: int | None, chunk: int | None) -> tuple[int, int]:
    """Designs of the run and of a chunk."""
    if method not in METHODS:
        raise ValueError(f"the method must be one of {', '.join(METHODS)}, not {method!r}")
    for name, count in (("points", points), ("chunk", chunk)):
        if count is not None and not isinstance(count, numbers.Integral):
            raise ValueError(f"{name} must be a whole number, not {count!r}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk must have at least one design, not {chunk}")
    chunk = chunk or (POPULATION if method in BREEDERS else CHUNK)
    if points is not None and points < 1:
        raise ValueError(f"at least one point must be evaluated, not {points}")
    if method == "grid":
        size = grid_size(space)
        if points is not None and size > points:
            raise ValueError(f"the grid has {size} points, more than the {points} allowed")
        return size, chunk
    total = points or 4096
    if method in BREEDERS:
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
    others: Sequence[str],
) -> None:
    for name in (*(each.name for each in objectives), *others):
        if name not in metrics:
            raise ValueError(f"there is no metric {name!r}; there are {', '.join(metrics)}")
    if unknown := set(reference) - {each.name for each in objectives}:
        raise ValueError(
            f"the reference names {', '.join(sorted(unknown))}, which is not an objective; there"
            f" are {', '.join(each.name for each in objectives)}"
        )


def _describe_measures(measures: Sequence[Measure]) -> dict[str, Any]:
    """What the results of further metrics depend on, as the folder of a run keeps it."""
    described = {", ".join(each.names): each.settings for each in measures}
    return {"measures": described} if described else {}


def _reference(
    base: Points,
    objectives: Sequence[Objective],
    given: Mapping[str, float],
    measures: Sequence[Measure],
) -> dict[str, float]:
    """Where the hypervolume ends, by objective."""
    ends, zeros = {}, {name: each.zero for each in measures for name in each.names if each.zero}
    for each in objectives:
        value = float(overall(base.metrics[each.name])[0])
        if base.code[0] > 0 and not np.isfinite(value):
            raise ValueError(
                f"the base design has no {each.name}, so nothing can be compared with it:"
                f" {REASONS[int(base.code[0])]}; choose a base design that is possible"
            )
        if not np.isfinite(value) or value <= 0:
            why = f" ({zeros[each.name]})" if value == 0 and each.name in zeros else ""
            raise ValueError(
                f"{each.name} of the base design is {value:g}{why}, so nothing can be compared"
                " with it: choose a base design, or limits, for which it is above 0"
            )
        worst = value / WORSE if each.largest else value * WORSE
        ends[each.name] = float(given.get(each.name, worst))
    return ends
