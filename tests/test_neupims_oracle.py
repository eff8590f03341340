"""neupims/scheduling/oracle.py: enumeration, a solver and bounds agree, and evolution reaches the
optimum.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.machine.config import load_model, load_parallel
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.workload import Decoder, Parallel
from neupims.scheduling.baselines import baselines
from neupims.scheduling.decision import Choices, decide
from neupims.scheduling.objective import Layer, make_problem
from neupims.scheduling.oracle import IntegerLayer, cp_sat, exhaustive, gap, lower_bound
from neupims.scheduling.search import search

TINY = Decoder(layers=1, width=1024, heads=8, kv_heads=8, mlp_width=4096)


def case(seed, channels, requests):
    """Requests whose attention takes about as long as the NPU's work, so that assignment and split
    both matter.
    """
    lengths = np.clip(np.random.default_rng(seed).lognormal(7, 1, requests), 16, 8192).astype(int)
    return make_problem(
        replace(Hardware(), "hbm.num_channels", channels), TINY, Parallel(1, 1), lengths
    )


def test_exhaustive_search_by_hand():
    """Work 5, 3, 3, 1 on two channels, nothing on the NPU: 5 hides a 3 in its sub-batch, and the
    other 3 hides the 1 in the other; 5 + 3.

    Better: 5 hides 3 + 1, again 5 + 3; or 3 and 3 together, 5 over 1: 3 + 5; or 5 hides 3 + ... and
    nothing is below 12 / 2. All but 1 together: 5 next to 3 + 3, and 1: 6 + 1 = 7.
    """
    problem = case(0, 2, 4)._replace(work=jnp.array([[5.0, 0], [3, 0], [3, 0], [1, 0]]))
    problem = problem._replace(layer_npu=jnp.zeros_like(problem.layer_npu))
    choices = Choices(2, sub_batches=(2,))
    proof = exhaustive(IntegerLayer(choices), choices, problem)
    assert (proof.cost, proof.points) == (7.0, 256)


def test_exhaustive_search_of_too_many_points_is_refused():
    with pytest.raises(ValueError, match="too many"):
        exhaustive(IntegerLayer(Choices(32)), Choices(32), case(0, 32, 8))


@pytest.mark.slow
@pytest.mark.parametrize(("realisable", "sub_batches"), [(False, (2,)), (True, (1, 2))])
def test_the_solver_proves_what_enumeration_finds(realisable, sub_batches):
    pytest.importorskip("ortools")
    choices = Choices(2, realisable, sub_batches)
    for seed in range(3):
        problem = case(seed, 2, 5)
        proof, enumerated = (
            cp_sat(choices, problem),
            exhaustive(IntegerLayer(choices), choices, problem),
        )
        assert proof.cost == proof.bound == enumerated.cost
        again = IntegerLayer(choices)(problem, decide(choices, proof.genome))
        assert float(again.objective) == proof.cost


def test_no_schedule_of_the_full_model_beats_the_bounds():
    """The optimum by enumeration against the bound in closed form and the one that the solver
    proves.
    """
    pytest.importorskip("ortools")
    choices = Choices(2, realisable=True)
    for seed in range(4):
        problem = case(seed, 2, 5)
        best = exhaustive(Layer(choices), choices, problem).cost
        assert 0 <= gap(best, float(lower_bound(choices, problem))) < 0.25
        assert 0 <= gap(best, cp_sat(choices, problem).bound) < 0.25


@pytest.mark.parametrize("realisable", [False, True])
def test_the_bound_holds_where_one_request_is_longer_than_all_others(realisable):
    lengths = np.array([8192, 16, 16, 40, 16])
    problem = make_problem(
        replace(Hardware(), "hbm.num_channels", 2), TINY, Parallel(1, 1), lengths
    )
    choices = Choices(2, realisable, sub_batches=(2,))
    assert (
        0
        <= gap(
            exhaustive(Layer(choices), choices, problem).cost, float(lower_bound(choices, problem))
        )
        < 0.05
    )


@pytest.mark.slow
def test_the_bound_of_a_large_batch_is_near_the_best():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.9, 256), 1, 2048).astype(int)
    choices = Choices(32, realisable=True, sub_batches=(2,))
    problem = make_problem(Hardware(), load_model("gpt3-7b"), load_parallel("gpt3-7b"), lengths)
    starts = jax.tree.map(lambda *parts: jnp.stack(parts), *baselines(choices, problem).values())
    costs = jax.jit(
        jax.vmap(lambda genome: Layer(choices)(problem, decide(choices, genome)).objective)
    )(starts)
    assert 0 < gap(float(costs.min()), float(lower_bound(choices, problem))) < 0.05


@pytest.mark.slow
def test_evolution_reaches_the_optimum_of_small_cases():
    """6 requests, 3 channels, 2 sub-batches: 46,656 points, of which a search may evaluate a tenth;
    12 cases, 2 seeds of each.
    """
    choices = Choices(3, sub_batches=(2,))
    hits = []
    for seed in range(12):
        problem = case(seed, 3, 6)
        proof = exhaustive(Layer(choices), choices, problem)
        starts = jax.tree.map(
            lambda *parts: jnp.stack(parts), *baselines(choices, problem).values()
        )
        done = search(
            "evolution",
            Layer(choices),
            choices,
            problem,
            jax.random.key(seed),
            budget=proof.points // 10,
            population=8,
            seeds=2,
            starts=starts,
        )
        assert done.evaluations <= 0.1 * proof.points
        hits += (np.asarray(done.cost.objective) <= proof.cost * (1 + 1e-6)).tolist()
    assert np.mean(hits) >= 0.95
