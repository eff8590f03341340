"""The best possible schedules: optima of small cases, and lower bounds of large ones.

Exhaustive search takes any objective, the full model too. OR-Tools CP-SAT takes the integer closed
form: whole cycles, no slow-down between NPU and PIM, no tail of softmax instructions
(`IntegerLayer`). Each of these only makes a schedule slower, so a bound that CP-SAT proves holds
for the full model as well. The bounds of `lower_bound` need no solver.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neupims.machine.calibration import DEFAULT
from neupims.scheduling.decision import Choices, Decision, Genome, decide, repair
from neupims.scheduling.objective import Cost, Objective, Problem
from neupims.scheduling.search import better_of, pick_best

MOST_POINTS = 10**8
SHARES = 512  # parts into which the bound cuts the division of PIM work between sub-batches


class Proof(NamedTuple):
    """An optimum, or the best known schedule and a bound that no schedule can beat."""

    genome: Genome  # the schedule
    cost: float  # its objective, such as core cycles
    bound: float  # equal to the cost at an optimum
    points: int  # schedules that were evaluated; 0 for a solver


def gap(cost, bound):
    """Returns how far a cost is above a bound, as a share of the bound.

    Args:
        cost: A number or an array.
        bound: The lower bound of the cost, in the same unit.
    """
    return cost / bound - 1


def exhaustive(
    objective: Objective, choices: Choices, problem: Problem, *, chunk: int = 4096
) -> Proof:
    """Returns the best of all assignments of requests to channels and sub-batches.

    Every number of sub-batches of the choices is tried. Equals compare by `busy`.

    Args:
        objective: The cost of a decision.
        choices: What may be chosen; neither knobs nor orders.
        problem: The problem.
        chunk: Schedules that are evaluated at a time.

    Raises:
        ValueError: There are more than MOST_POINTS schedules, or the choices have knobs or orders.
    """
    requests, numbers = problem.seq_lens.shape[0], 2 * choices.channels
    points = numbers**requests
    if choices.knobs or choices.priorities > 1:
        raise ValueError(
            "exhaustive search enumerates assignments and sub-batches, not knobs or orders"
        )
    if points * len(choices.sub_batches) > MOST_POINTS:
        raise ValueError(f"{numbers}^{requests} points are too many: {MOST_POINTS} at most")
    genome, cost = _exhaustive(objective, choices, chunk, points, problem)
    return Proof(
        genome, float(cost.objective), float(cost.objective), points * len(choices.sub_batches)
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _exhaustive(objective, choices, chunk, points, problem):
    requests, numbers = problem.seq_lens.shape[0], 2 * choices.channels
    weights = numbers ** np.arange(requests)

    def evaluate(code, interleaved):
        places = (code // weights % numbers).astype(jnp.int32)
        genome = Genome(places, jnp.zeros_like(places), interleaved, jnp.zeros(0))
        genome = repair(choices, problem.resident, genome)
        return genome, objective(problem, decide(choices, genome))

    def step(best, first):
        codes = jnp.minimum(first + jnp.arange(chunk), points - 1)
        for count in choices.sub_batches:
            best = better_of(
                best,
                pick_best(*jax.vmap(partial(evaluate, interleaved=jnp.array(count == 2)))(codes)),
            )
        return best, None

    nothing = (
        jax.tree.map(jnp.zeros_like, evaluate(jnp.array(0), jnp.array(True))[0]),
        Cost(jnp.float32(jnp.inf), jnp.float32(jnp.inf)),
    )
    best, _ = jax.lax.scan(step, nothing, jnp.arange(0, points, chunk))
    return best


class Whole(NamedTuple):
    """The integer closed form of a problem, all in cycles rounded down."""

    work: Int[np.ndarray, "r 2"]  # logit and attend of each request
    npu: Int[np.ndarray, " tokens"]  # stage C or D, the NPU alone
    serial_npu: int  # stages A and E with all tokens


def round_down(problem: Problem) -> Whole:
    """Returns the integer closed form of a problem, with all cycles rounded down.

    Args:
        problem: The problem.
    """
    npu = np.asarray(problem.layer_npu[0, ..., 0].sum(axis=-1))
    work, npu = (np.floor(np.asarray(part)).astype(np.int64) for part in (problem.work, npu))
    return Whole(work, npu, int(problem.serial_npu))


@dataclass(frozen=True)
class IntegerLayer:
    """The integer closed form as an objective.

    cost = C + D,  C = max(NPU of sub-batch 0, logit + attend of sub-batch 1),  D the converse
    """

    choices: Choices  # what may be chosen

    def __call__(self, problem: Problem, decision: Decision) -> Cost:
        work = jnp.floor(problem.work)
        npu = jnp.floor(problem.layer_npu[0, ..., 0].sum(axis=-1))
        place = decision.sub_batches * self.choices.channels + decision.channels
        loads = jax.ops.segment_sum(work, place, 2 * self.choices.channels).reshape(
            2, self.choices.channels, 2
        )
        pim = loads.max(axis=1).sum(axis=-1)
        second = decision.sub_batches.sum()
        first = decision.sub_batches.shape[0] - second
        two = jnp.maximum(npu[first], pim[1]) + jnp.maximum(npu[second], pim[0])
        two = jnp.where((first == 0) | (second == 0), jnp.inf, two)
        together = loads.sum(axis=0).max(axis=0).sum()
        one = jnp.floor(problem.serial_npu) + together
        interleaved = (
            decision.interleaved
            if len(self.choices.sub_batches) == 2
            else 2 in self.choices.sub_batches
        )
        return Cost(jnp.where(interleaved, two, one), jnp.where(interleaved, pim.sum(), together))


def cp_sat(choices: Choices, problem: Problem, *, seconds: float = 30.0, workers: int = 1) -> Proof:
    """Returns the optimum of `IntegerLayer` by OR-Tools CP-SAT, or the best schedule and a bound.

    Args:
        choices: What may be chosen; knobs and orders are ignored.
        problem: The problem.
        seconds: The time limit, shared by the numbers of sub-batches.
        workers: The threads of the solver.

    Returns:
        The best schedule, its cost and the proven bound in core cycles; they are equal at an
        optimum.

    Raises:
        ModuleNotFoundError: OR-Tools is not installed.
        RuntimeError: The solver found no schedule in the time.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        raise ModuleNotFoundError(
            "the solver needs OR-Tools: pip install 'ggem-jax[oracle]'"
        ) from None
    proofs = [
        _solve(cp_model, choices, problem, count, seconds / len(choices.sub_batches), workers)
        for count in choices.sub_batches
    ]
    best = min(proofs, key=lambda proof: proof.cost)
    return best._replace(bound=min(proof.bound for proof in proofs))


def _solve(
    cp_model, choices: Choices, problem: Problem, sub_batches: int, seconds: float, workers: int
) -> Proof:
    form, resident = round_down(problem), np.asarray(problem.resident)
    requests, channels = len(form.work), choices.channels
    model = cp_model.CpModel()
    chosen = np.array(
        [
            [[model.new_bool_var("") for _ in range(sub_batches)] for _ in range(channels)]
            for _ in range(requests)
        ]
    )
    for request in range(requests):
        model.add_exactly_one(chosen[request].ravel().tolist())
        if resident[request] >= 0:
            model.add(sum(chosen[request, resident[request]]) == 1)
    longest = np.argsort(-form.work.sum(axis=1), kind="stable")
    if (resident < 0).all() and not (choices.realisable and sub_batches == 2):
        # Channels are interchangeable: the k-th longest request needs only the first k.
        for rank, request in enumerate(longest[:channels]):
            for channel in range(rank + 1, channels):
                for variable in chosen[request, channel]:
                    model.add(variable == 0)
    most = int(form.work.sum())
    pim: list[list[Any]] = []
    for which in range(sub_batches):
        pim.append([])
        for operation in range(2):
            slowest = model.new_int_var(0, most, "")
            for channel in range(channels):
                model.add(
                    slowest
                    >= sum(
                        int(form.work[request, operation]) * chosen[request, channel, which]
                        for request in range(requests)
                    )
                )
            pim[which].append(slowest)
    if sub_batches == 1:
        total = form.serial_npu + sum(pim[0])
    else:
        total = _two_stages(model, choices, form, chosen, pim)
    model.minimize(total)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = workers
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise RuntimeError(
            f"CP-SAT found no schedule in {seconds:g} s: {solver.status_name(status)}"
        )
    values = np.vectorize(solver.value, otypes=[int])(chosen)
    channel, which = values.sum(axis=2).argmax(axis=1), values.sum(axis=1).argmax(axis=1)
    places = jnp.asarray(2 * channel + which, jnp.int32)
    genome = Genome(places, jnp.zeros_like(places), jnp.array(sub_batches == 2), jnp.zeros(0))
    return Proof(
        repair(choices, problem.resident, genome),
        solver.objective_value,
        solver.best_objective_bound,
        0,
    )


def _two_stages(model, choices: Choices, form: Whole, chosen, pim):
    """Returns the sum of stages C and D, and adds its constraints to the model."""
    requests = len(form.work)
    npu = []
    for which in range(2):
        tokens = model.new_int_var(1, requests - 1, "")
        model.add(tokens == sum(chosen[:, :, which].ravel().tolist()))
        cycles = model.new_int_var(0, int(form.npu.max()), "")
        model.add_element(tokens, form.npu.tolist(), cycles)
        npu.append(cycles)
    if choices.realisable:
        _halve(model, chosen)
    stages = []
    for which in range(2):
        stage = model.new_int_var(0, int(form.work.sum() + form.npu.max()), "")
        model.add(stage >= npu[which])
        model.add(stage >= sum(pim[1 - which]))
        stages.append(stage)
    return sum(stages)


def _halve(model, chosen) -> None:
    """Adds the simulator's rule: equal halves; of odd lists the larger one to 0 and 1 in turn."""
    channels = chosen.shape[1]
    odd_before = 0  # whether an odd number of the channels so far is odd
    for channel in range(channels):
        first, second = (sum(chosen[:, channel, which].tolist()) for which in range(2))
        larger_first, larger_second = model.new_bool_var(""), model.new_bool_var("")
        model.add(first - second == larger_first - larger_second)
        model.add(larger_first + larger_second <= 1)
        model.add(larger_first <= 1 - odd_before)
        model.add(larger_second <= odd_before)
        after = model.new_bool_var("")
        model.add(after == odd_before + larger_first - larger_second)
        odd_before = after


def lower_bound(choices: Choices, problem: Problem) -> Float[Array, ""]:
    """Returns the layer cycles that no schedule can beat, by the closed form with its slow-downs.

    The bound is for the measure "time" without knobs. The fullest channel of a sub-batch has at
    least the mean load of all channels, the loads of the two sub-batches add up to that of the
    batch, and one of them holds the largest request. Over every division of the load between
    sub-batches and every number of tokens (halves, if realisable) the least sum of stages is a
    bound; divisions are cut into parts, each taken at its cheapest end.

    Args:
        choices: What may be chosen.
        problem: The problem.
    """
    bounds = []
    alone = problem.work
    if 1 in choices.sub_batches:
        together = jnp.maximum(alone.sum() / choices.channels, alone.sum(axis=1).max())
        bounds.append(problem.serial_npu + together)
    if 2 in choices.sub_batches:
        bounds.append(_two_stage_bound(choices, problem))
    return jnp.stack(bounds).min()


@partial(jax.jit, static_argnums=0)
def _two_stage_bound(choices, problem):
    requests = problem.seq_lens.shape[0]
    beside = problem.beside
    ratios = jnp.where(problem.work > 0, beside / problem.work, 1)
    slower = jnp.maximum(jnp.max(ratios), 1)  # at most, beside the NPU
    total, largest = beside.sum() / choices.channels, beside.sum(axis=1).max()
    low = jnp.arange(SHARES) / SHARES * total
    rest = (1 - (jnp.arange(SHARES) + 1) / SHARES) * total
    counts = jnp.array([(requests + 1) // 2]) if choices.realisable else jnp.arange(1, requests)

    def stage(tokens, load):
        """Returns the least time of the NPU on these tokens beside at least this PIM work."""
        cycles, memory = problem.layer_npu[0, tokens].T
        slow = jnp.cumsum(cycles + memory * DEFAULT.pim_slowdown)
        both = jnp.minimum(slow[-1], load)
        origin = jnp.zeros(1)
        done = jnp.interp(
            both, jnp.concatenate([origin, slow]), jnp.concatenate([origin, jnp.cumsum(cycles)])
        )
        return jnp.maximum(both + cycles.sum() - done, both + (load - both) / slower)

    stage = jax.vmap(jax.vmap(stage, (None, 0)), (0, None))
    first, second = counts, requests - counts
    holding = [(jnp.maximum(low, largest), rest), (low, jnp.maximum(rest, largest))]
    return jnp.stack(
        [(stage(first, one) + stage(second, other)).min() for one, other in holding]
    ).min()
