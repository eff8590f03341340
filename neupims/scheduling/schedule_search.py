"""Searches better schedules for a case and says how good they are, as `neupims search` prints it.

Costs are core cycles of a layer, or in the unit of the measure. Gains are shares of the cost of the
schedule that the case has ("as published").
"""

import numbers
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from neupims.envelope import expected_error, gain_error
from neupims.machine.case import Case
from neupims.machine.layer_kinds import find_mix
from neupims.machine.quantity import describe
from neupims.machine.record import check_seed
from neupims.machine.workload import Batch, check_batch
from neupims.scheduling.baselines import baselines
from neupims.scheduling.decision import (
    CHANNELS_KNOB,
    Choices,
    Decision,
    Genome,
    HardwareKnob,
    decide,
    decision_batch,
    export_trace,
    make_genome,
    repair,
)
from neupims.scheduling.findings import (
    Best,
    Curve,
    ExactScores,
    ScheduleSearch,
    Score,
    StrategyResult,
)
from neupims.scheduling.memory import PUBLISHED, check_best, pose_problem
from neupims.scheduling.objective import Layer, Problem, with_knobs
from neupims.scheduling.oracle import gap, lower_bound
from neupims.scheduling.search import Found, interval_of_mean, search
from neupims.scheduling.strategies import STRATEGIES
from neupims.simulation import run_case


def search_schedule(
    case: Case,
    *,
    strategy: str = "evolution",
    budget: int = 20_000,
    population: int = 64,
    seeds: int = 4,
    seed: int = 0,
    from_scratch: bool = False,
    realisable: bool = False,
    sub_batches: tuple[int, ...] = (1, 2),
    new_only: int | None = None,
    order_levels: int = 1,
    hardware_knobs: Sequence[HardwareKnob] = (),
    measure: str = "time",
    exact: bool = False,
    export: str | Path | None = None,
    allow_overflow: bool = False,
) -> ScheduleSearch:
    """Returns better schedules of a case, and a bound that no schedule can beat.

    Args:
        case: The case (`make_case`); its batch is the published schedule.
        strategy: "evolution", "random", "annealing", "evosax" or "all".
        budget: The schedules that each strategy evaluates for each seed.
        population: The schedules of one round.
        seeds: The number of independent searches of each strategy.
        seed: The seed of the random numbers of all searches.
        from_scratch: Whether to start from random schedules instead of the simple ones.
        realisable: Whether to search only schedules that the public simulator can execute.
        sub_batches: The numbers of sub-batches that may be chosen.
        new_only: Number of the last requests that may choose their channel; the others stay on
            theirs (default: all may choose).
        order_levels: Priorities that order a channel's list; 1 keeps the order of the requests.
        hardware_knobs: Fields of the hardware that are searched with the schedule.
        measure: "time", "energy" or "energy-delay" of a layer.
        exact: Whether to score the published and the best schedule by the exact path too.
        export: File to which the best schedule is written, as a trace of the simulator (default:
            none).
        allow_overflow: Whether to search schedules of a batch that no schedule fits into the
            memory, with a warning.

    Returns:
        The published schedule, the simple ones, those of each strategy, and the best.

    Raises:
        ValueError: The case is of another system or has a single request, the memory holds no
            schedule of it, an option is impossible, or options exclude each other.
        OSError: The trace cannot be written.

    Example:
        >>> from neupims import make_batch, make_case, search_schedule
        >>> case = make_case("gpt3-7b", make_batch([300, 512, 40, 77], channels=[0, 0, 0, 1]))
        >>> search_schedule(case, budget=64, population=16, seeds=1).best.gain > 0
        True
    """
    _check(case, new_only)
    counts = {
        "budget": budget,
        "population": population,
        "seeds": seeds,
        "order_levels": order_levels,
    }
    _check_counts(counts, seed)
    sub_batches = _check_sub_batches(sub_batches)
    if hardware_knobs and (exact or export):
        raise ValueError("exact scores and traces are for the given hardware: leave out its knobs")
    _check_knobs(case, hardware_knobs)
    names = list(STRATEGIES) if strategy == "all" else [strategy]
    channels = int(case.hardware.hbm.num_channels)
    choices = _choose(channels, realisable, sub_batches, order_levels, hardware_knobs, new_only)
    problem, warnings = pose_problem(case, new_only, allow_overflow=allow_overflow)
    objective = Layer(choices, case.fidelity, measure, find_mix(case.model))
    published = make_genome(
        choices,
        case.batch.channels,
        case.batch.sub_batches,
        interleaved=case.sub_batches == 2,
        knobs=_given_knobs(case, choices),
    )
    known = {PUBLISHED: published} | baselines(choices, problem, np.asarray(published.knobs))
    starts = jax.tree.map(lambda *parts: jnp.stack(parts), *known.values())
    # Simple schedules are timed as in the public simulator, whether or not they fit the memory.
    roomy = problem._replace(room=jnp.float32(np.inf))
    evaluate = jax.jit(jax.vmap(objective, in_axes=(None, 0)))
    decisions = jax.vmap(partial(decide, choices))(starts)
    times = (np.asarray(evaluate(of, decisions).objective, float) for of in (roomy, problem))
    costs, fitting = (dict(zip(known, each.tolist(), strict=True)) for each in times)
    if not np.isfinite(list(fitting.values())).any():
        problem, fitting = roomy, costs  # no simple schedule fits: the search need not either
    bounded = measure == "time" and not choices.knobs
    bound = float(lower_bound(choices, problem)) if bounded else None

    def score(cost: float) -> Score:
        return Score(cost, 1 - cost / costs[PUBLISHED], gap(cost, bound) if bound else None)

    found = {
        name: search(
            name,
            objective,
            choices,
            problem,
            jax.random.key(seed),
            budget=budget,
            population=population,
            seeds=seeds,
            starts=None if from_scratch else starts,
        )
        for name in names
    }
    candidates = [(fitting[name], genome, name) for name, genome in known.items()]
    candidates += [(*_best_of_seeds(each), name) for name, each in found.items()]
    cost, genome, found_by = min(candidates, key=lambda candidate: candidate[0])
    genome = repair(choices, problem.resident, genome)
    decision = decide(choices, genome)
    batch = decision_batch(problem.seq_lens, decision)
    if not choices.knobs:
        warnings += check_best(case, batch, export)
    if export:
        export_trace(export, batch, num_channels=channels)
    interleaved = _is_interleaved(choices, genome)
    after = case._replace(
        hardware=with_knobs(case.hardware, choices, genome.knobs),
        batch=batch,
        sub_batches=2 if interleaved else 1,
    )
    knobs = zip(choices.knobs, np.asarray(genome.knobs).tolist(), strict=True)
    before = decide(choices, published)
    return ScheduleSearch(
        case=case,
        realisable=realisable,
        measure=measure,
        overflow=warnings,
        published=costs[PUBLISHED],
        lower_bound=bound,
        baselines={name: score(cost) for name, cost in costs.items()},
        strategies={
            name: StrategyResult(
                *score(_best_of_seeds(each)[0]),
                mean_cost=float(np.asarray(each.cost.objective, np.float64).mean()),
                evaluations=each.evaluations,
                seeds=seeds,
                curve=_draw_curve(each, population),
            )
            for name, each in found.items()
        },
        best=Best(
            *score(cost),
            found_by=found_by,
            sub_batches=2 if interleaved else 1,
            gain_error=gain_error(case, after) if bounded else None,
            knobs={knob.name: value for knob, value in knobs},
        ),
        best_batch=batch,
        exact=_score_exactly(case, batch, interleaved) if exact else None,
        expected_error=expected_error(after, path="closed"),
        channel_cycles={
            "before": _sum_loads(problem, before, channels, case.sub_batches == 2),
            "after": _sum_loads(problem, decision, channels, interleaved),
        },
        trace=Path(export) if export else None,
    )


def _check(case: Case, new_only: int | None) -> None:
    if case.system != "neupims":
        raise ValueError(f"schedules are searched for the system neupims, not {case.system}")
    if case.prefill:
        raise ValueError("schedules are searched for a decode step, not for a prefill")
    check_batch(case.batch, int(case.hardware.hbm.num_channels))
    requests = len(case.batch.seq_lens)
    if requests < 2:
        raise ValueError("a schedule needs at least 2 requests")
    if new_only is not None and not 0 <= new_only <= requests:
        raise ValueError(f"new_only must be from 0 to the {requests} requests, not {new_only}")


def _check_counts(counts: dict[str, int], seed: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, numbers.Integral):
            raise ValueError(f"{name} must be a whole number, not {value!r}")
        if int(value) < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    check_seed(seed)


def _check_sub_batches(sub_batches: Sequence[int]) -> tuple[int, ...]:
    """Returns the numbers of sub-batches in order, each once."""
    given = sub_batches if isinstance(sub_batches, list | tuple) else ()
    if not given or not all(count in (1, 2) for count in given):
        raise ValueError(f"sub_batches must be (1,), (2,) or (1, 2), not {sub_batches!r}")
    return tuple(sorted(set(given)))


def _check_knobs(case: Case, knobs: Sequence[HardwareKnob]) -> None:
    known = {each.name: each for each in describe(case.hardware)}
    for knob in knobs:
        if not isinstance(knob, HardwareKnob) or knob.name not in known:
            raise ValueError(
                "hardware_knobs must be HardwareKnob records of fields of the hardware, such as"
                f" hbm.num_channels, not {knob!r}"
            )
        field = known[knob.name]
        for end in (knob.low, knob.high):
            if fault := field.fault(end):
                raise ValueError(f"{knob.name} {fault}")
        if field.effect == "none":
            raise ValueError(f"{knob.name} has no effect in this model: leave it out")
        if knob.low > knob.high:
            raise ValueError(
                f"low of {knob.name} must be at most high, but {knob.low:g} is above {knob.high:g}"
            )
        if field.whole and not knob.whole:
            raise ValueError(f"{knob.name} must be searched with whole=True: it is a whole number")
    if len({knob.name for knob in knobs}) < len(knobs):
        raise ValueError(f"a knob is repeated in {', '.join(knob.name for knob in knobs)}")


def _choose(channels, realisable, sub_batches, order_levels, knobs, new_only) -> Choices:
    """Returns what the search may choose."""
    most = [int(knob.high) for knob in knobs if knob.name == CHANNELS_KNOB]
    if most and new_only is not None:
        raise ValueError(
            f"new_only keeps requests on their channels, so {CHANNELS_KNOB} cannot be searched"
        )
    return Choices(max([channels, *most]), realisable, sub_batches, order_levels, tuple(knobs))


def _given_knobs(case: Case, choices: Choices) -> list[float]:
    """Returns the values of the knobs in the given hardware."""
    numbers = {each.name: float(each.value) for each in describe(case.hardware)}
    return [numbers[knob.name] for knob in choices.knobs]


def _best_of_seeds(found: Found) -> tuple[float, Genome]:
    ends = np.asarray(found.cost.objective, np.float64)
    first = int(ends.argmin())
    return float(ends[first]), jax.tree.map(lambda leaf: leaf[first], found.genome)


def _draw_curve(found: Found, population: int) -> Curve:
    mean, half = interval_of_mean(found.curve)
    evaluations = [population * (index + 1) for index in range(len(mean))]
    return Curve(evaluations, mean.tolist(), (mean - half).tolist(), (mean + half).tolist())


def _is_interleaved(choices: Choices, genome: Genome) -> bool:
    if len(choices.sub_batches) == 2:
        return bool(genome.interleaved)
    return choices.sub_batches == (2,)


def _score_exactly(case: Case, best: Batch, interleaved: bool) -> ExactScores:
    after_case = case._replace(batch=best, sub_batches=2 if interleaved else 1)
    before, after = (float(run_case(each).layer_cycles) for each in (case, after_case))
    return ExactScores(before, after, 1 - after / before)


def _sum_loads(
    problem: Problem, decision: Decision, channels: int, interleaved: bool
) -> list[list[float]]:
    """Returns the attention cycles of each sub-batch on each channel; one batch is sub-batch 0."""
    loads = np.zeros((2, max(channels, int(np.asarray(decision.channels).max()) + 1)))
    np.add.at(
        loads,
        (np.asarray(decision.sub_batches) * interleaved, np.asarray(decision.channels)),
        np.asarray(problem.work).sum(axis=1),
    )
    return loads.tolist()
