"""neupims/scheduling/: decisions of genomes, exported traces that are read back, and properties
that every strategy has.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims import make_case, search_schedule
from neupims.__main__ import main
from neupims.machine.config import load_model, load_parallel
from neupims.machine.hardware import Hardware
from neupims.machine.traces import read_trace
from neupims.machine.workload import Batch, halves, make_batch
from neupims.scheduling.baselines import PACKINGS, _baselines, baselines
from neupims.scheduling.decision import (
    CHANNELS_KNOB,
    Choices,
    HardwareKnob,
    decide,
    decision_batch,
    export_trace,
    make_genome,
    repair,
)
from neupims.scheduling.moves import mutate, random_genome
from neupims.scheduling.objective import Cost, Layer, make_problem
from neupims.scheduling.oracle import IntegerLayer
from neupims.scheduling.search import interval_of_mean, search
from neupims.scheduling.strategies import STRATEGIES, Moves, mutate_some
from neupims.timing.capacity import channel_tiles
from neupims.timing.iteration import simulate

HARDWARE, MODEL, PARALLEL_7B = Hardware(), load_model("gpt3-7b"), load_parallel("gpt3-7b")
LENGTHS = np.clip(np.random.default_rng(0).lognormal(5, 1, 48), 1, 2048).astype(int)


@pytest.fixture(scope="module")
def problem():
    return make_problem(HARDWARE, MODEL, PARALLEL_7B, LENGTHS)


def genomes(choices, problem, count=16, seed=0):
    return jax.jit(jax.vmap(partial(random_genome, choices, problem)))(
        jax.random.split(jax.random.key(seed), count)
    )


def decisions_of(choices, made):
    """The decisions of all genomes, as arrays of NumPy."""
    return jax.device_get(jax.jit(jax.vmap(partial(decide, choices)))(made))


def test_a_realisable_genome_obeys_the_rule_whatever_is_done_to_it(problem):
    choices = Choices(7, realisable=True, sub_batches=(2,), priorities=3)
    made = genomes(choices, problem)
    change = jax.jit(jax.vmap(partial(mutate, choices, problem)))
    for seed in range(5):
        made = change(jax.random.split(jax.random.key(seed), 16), made)
        decisions = decisions_of(choices, made)
        for index in range(16):
            rows = decision_batch(
                LENGTHS, jax.tree.map(lambda leaf, index=index: leaf[index], decisions)
            )
            assert halves(rows.channels, 7).tolist() == rows.sub_batches.tolist()


def test_a_repaired_list_is_cut_where_the_simulator_cuts_it(problem):
    """`repair` counts; here every channel's list is sorted, one request after the other."""
    free = Choices(7, sub_batches=(2,), priorities=3)
    made = genomes(free, problem, 8)
    wanted, priorities = np.asarray(made.places), np.asarray(made.priorities)
    bound = Choices(7, realisable=True, sub_batches=(2,), priorities=3)
    places = np.asarray(jax.vmap(partial(repair, bound, problem.resident))(made).places)
    for genome in range(8):
        odd = 0
        for channel in range(7):
            (own,) = np.nonzero(wanted[genome] // 2 == channel)
            keys = zip(wanted[genome, own], priorities[genome, own], own, strict=True)
            rows = [int(request) for *_, request in sorted(keys)]
            first = (len(rows) + 1 - odd % 2) // 2
            odd += len(rows) % 2
            assert (places[genome, rows[:first]] == 2 * channel).all()
            assert (places[genome, rows[first:]] == 2 * channel + 1).all()


@pytest.mark.parametrize("chosen", [[], [4], [0, 2, 3, 9], list(range(10))])
def test_only_some_genomes_are_mutated_and_as_all_are(problem, chosen):
    choices = Choices(7, sub_batches=(2,))
    made = genomes(choices, problem, 10)
    mutated = jax.jit(jax.vmap(partial(mutate, choices, problem)))
    moves = Moves(choices, None, mutated, None, len(LENGTHS), 10, 1)
    keys = jax.random.split(jax.random.key(1), 10)
    some = np.isin(np.arange(10), chosen)
    result = mutate_some(moves, keys, jnp.asarray(some), made)
    expected = np.where(some[:, None], mutated(keys, made).places, made.places)
    assert np.array_equal(result.places, expected)
    assert np.array_equal((expected != made.places).any(axis=1), some)


def test_an_exported_trace_comes_back_the_same(problem, tmp_path):
    choices = Choices(32, realisable=True, sub_batches=(2,), priorities=4)
    decisions = decisions_of(choices, genomes(choices, problem, 8))
    for index in range(8):
        batch = decision_batch(
            LENGTHS, jax.tree.map(lambda leaf, index=index: leaf[index], decisions)
        )
        export_trace(tmp_path / "trace.csv", batch)
        back = read_trace(tmp_path / "trace.csv")
        for name in ("seq_lens", "channels", "sub_batches"):
            assert getattr(back, name).tolist() == getattr(batch, name).tolist()
        assert sorted(back.seq_lens.tolist()) == sorted(LENGTHS.tolist())
    assert [path.name for path in tmp_path.iterdir()] == ["trace.csv"]


def test_a_trace_that_the_simulator_would_halve_otherwise_is_refused(tmp_path):
    with pytest.raises(ValueError, match="realisable"):
        export_trace(
            tmp_path / "trace.csv",
            make_batch([5, 6, 7, 8], [0, 0, 0, 0], [0, 0, 0, 1], num_channels=1),
            num_channels=1,
        )
    assert not list(tmp_path.iterdir())


def test_requests_of_sub_batch_0_come_first_in_the_trace(tmp_path):
    export_trace(
        tmp_path / "trace.csv",
        make_batch([5, 6, 7, 8], [1, 0, 1, 0], [1, 0, 0, 1], num_channels=2),
        num_channels=2,
    )
    assert (tmp_path / "trace.csv").read_text().split() == [
        "seq_len,ch_idx",
        "6,0",
        "8,0",
        "7,1",
        "5,1",
    ]


def test_residents_stay(problem):
    resident = np.where(np.arange(48) % 3 == 0, np.arange(48) % 5, -1)
    pinned = problem._replace(resident=jnp.asarray(resident))
    made = jax.jit(jax.vmap(partial(mutate, Choices(5), pinned)))(
        jax.random.split(jax.random.key(3), 16), genomes(Choices(5), pinned)
    )
    for places in np.asarray(made.places):
        assert (places[resident >= 0] // 2).tolist() == resident[resident >= 0].tolist()


@pytest.mark.parametrize(
    "fidelity", ["simulator", pytest.param("intended", marks=pytest.mark.slow)]
)
def test_the_objective_is_the_model(fidelity):
    """The work of the requests, computed once, against `simulate`, which computes it for each
    schedule.
    """
    choices = Choices(32, sub_batches=(1, 2) if fidelity == "simulator" else (2,))
    problem = make_problem(HARDWARE, MODEL, PARALLEL_7B, LENGTHS, fidelity=fidelity)
    made = genomes(choices, problem, 4)
    cost = jax.jit(
        jax.vmap(lambda genome: Layer(choices, fidelity)(problem, decide(choices, genome)))
    )(made)
    for index in range(4):
        decision = decide(choices, jax.tree.map(lambda leaf, index=index: leaf[index], made))
        batch = Batch(LENGTHS, decision.channels, decision.sub_batches)
        expected = simulate(
            HARDWARE,
            MODEL,
            batch,
            PARALLEL_7B,
            sub_batches=2 if decision.interleaved else 1,
            fidelity=fidelity,
        )
        assert float(cost.objective[index]) == pytest.approx(float(expected.layer_cycles), rel=2e-6)


def test_full_channels_and_empty_sub_batches_cost_infinity():
    choices = Choices(32, sub_batches=(2,))
    problem = make_problem(
        HARDWARE,
        MODEL,
        PARALLEL_7B,
        [2048] * 48,
        room=float(channel_tiles(HARDWARE, MODEL, PARALLEL_7B)),
    )
    spread, piled = np.arange(48) % 32, np.zeros(48, int)
    split = np.arange(48) % 2
    made = [
        make_genome(choices, *pair)
        for pair in ((spread, split), (piled, split), (spread, 0 * split))
    ]
    cost = jax.jit(lambda genome: Layer(choices)(problem, decide(choices, genome)))
    objectives = [float(cost(genome).objective) for genome in made]
    assert np.isfinite(objectives).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="tiles"):
        make_problem(HARDWARE, MODEL, PARALLEL_7B, [2048] * 48, room=10)


INTEGER = Choices(4, sub_batches=(2,))


def found(strategy, problem, seed=0, **options):
    return search(
        strategy,
        IntegerLayer(INTEGER),
        INTEGER,
        problem,
        jax.random.key(seed),
        **({"budget": 320, "population": 16, "seeds": 2} | options),
    )


@pytest.mark.parametrize(
    "strategy",
    [
        "evolution",
        *(pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES if name != "evolution"),
    ],
)
def test_every_strategy_uses_the_same_budget_is_repeatable_and_never_loses_its_best(
    strategy, problem
):
    if strategy == "evosax":
        pytest.importorskip("evosax")
    one, again, other = (found(strategy, problem, seed) for seed in (0, 0, 1))
    assert one.evaluations == 320
    assert one.curve.shape == (2, 20)
    assert jax.tree.map(np.array_equal, one, again) == jax.tree.map(lambda _: True, one)
    assert not np.array_equal(one.genome.places, other.genome.places)
    assert (np.diff(np.asarray(one.curve)) <= 0).all()
    assert one.curve[:, -1].tolist() == one.cost.objective.tolist()
    recomputed = jax.jit(
        jax.vmap(lambda genome: IntegerLayer(INTEGER)(problem, decide(INTEGER, genome)))
    )(one.genome)
    assert np.asarray(recomputed.objective).tolist() == one.cost.objective.tolist()


def test_searches_that_learn_beat_chance(problem):
    chance, evolved, annealed = (
        found(strategy, problem) for strategy in ("random", "evolution", "annealing")
    )
    assert (
        max(evolved.cost.objective.max(), annealed.cost.objective.max())
        <= chance.cost.objective.min()
    )
    assert (
        max(evolved.cost.busy.max(), annealed.cost.busy.max()) < chance.cost.busy.min()
    )  # the NPU hides the rest


def order_and_knob_cost(problem, decision):
    """The sum of ends of requests served one after the other (Smith: least with the shortest
    first), and two knobs' distance from 12.5 and 7.2.
    """
    lengths = problem.seq_lens[decision.order] * 1.0
    distance = (decision.knobs[0] - 12.5) ** 2 + (decision.knobs[1] - 7.2) ** 2
    return Cost(jnp.cumsum(lengths).sum() + distance + 10 * decision.channels.max(), jnp.float32(0))


@pytest.mark.slow
def test_order_and_knobs_are_found_with_the_channels_and_whole_knobs_stay_whole():
    """On channel 0 alone, 2 3 5 7 end after 2 + 5 + 10 + 17 = 34; the whole knob nearest to 7.2 is
    7.
    """
    choices = Choices(
        16,
        sub_batches=(2,),
        priorities=4,
        knobs=(
            HardwareKnob("hbm.tfaw_cycles", 10, 40),
            HardwareKnob(CHANNELS_KNOB, 4, 16, whole=True),
        ),
    )
    problem = make_problem(HARDWARE, MODEL, PARALLEL_7B, [5, 3, 7, 2])
    done = search(
        "evolution",
        order_and_knob_cost,
        choices,
        problem,
        jax.random.key(0),
        budget=8192,
        population=32,
    )
    assert done.genome.knobs[0].tolist() == pytest.approx([12.5, 7], abs=0.3)
    assert float(done.genome.knobs[0, 1]) == 7
    assert float(done.cost.objective[0]) == pytest.approx(34 + 0.2**2, abs=0.1)


def test_a_genome_on_more_channels_than_a_knob_gives_is_folded():
    choices = Choices(16, knobs=(HardwareKnob(CHANNELS_KNOB, 4, 16, whole=True),))
    genome = repair(
        choices, jnp.full(3, -1), make_genome(choices, [5, 3, 15], [0, 1, 1], knobs=[4.0])
    )
    assert genome.places.tolist() == [2, 7, 7]


def test_unknown_strategies_and_budgets_below_a_population_are_refused(problem):
    with pytest.raises(ValueError, match="one of evolution"):
        found("gradient", problem)
    with pytest.raises(ValueError, match="budget"):
        found("random", problem, budget=10)


def test_the_interval_of_a_mean_by_hand():
    """1 and 3: mean 2, deviation sqrt(2), half the interval 1.96 x sqrt(2) / sqrt(2)."""
    mean, half = interval_of_mean([[1.0], [3.0]])
    assert (mean[0], half[0]) == pytest.approx((2, 1.96))


COMMAND = [
    "search",
    "--model",
    "gpt3-7b",
    "--budget",
    "64",
    "--population",
    "16",
    "--seeds",
    "2",
    "--sub-batches",
    "2",
]


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "published.csv"
    path.write_text(
        "seq_len,ch_idx\n"
        + "".join(f"{length},{index % 9}\n" for index, length in enumerate(LENGTHS))
    )
    return str(path)


def test_the_command_exports_what_it_claims(trace, tmp_path, capsys):
    out = tmp_path / "better.csv"
    assert (
        main([*COMMAND, "--trace", trace, "--realisable", "--export-trace", str(out), "--json"])
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    back = read_trace(out)
    layer = float(simulate(HARDWARE, MODEL, back, PARALLEL_7B).layer_cycles)
    assert said["best"]["cost"] == pytest.approx(layer, rel=2e-6)
    assert said["lower_bound"] <= said["best"]["cost"] <= said["published"]
    assert said["best"]["gain"] == pytest.approx(1 - said["best"]["cost"] / said["published"])
    assert said["strategies"]["evolution"]["evaluations"] == 64
    assert said["expected_error"]["path"] == "closed"
    assert said["best"]["cost"] <= min(row["cost"] for row in said["baselines"].values())
    assert {
        "as published",
        "round robin, halves",
        "greedy (paper), halves",
        "longest first, snake",
    } <= set(said["baselines"])


def test_json_is_the_record_of_the_library(trace, capsys):
    # a single new request: the exact path follows lists of the same lengths before and after
    flags = ["--new-only", "1", "--exact", "--realisable", "--strategy", "evolution"]
    assert main([*COMMAND, "--trace", trace, *flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = search_schedule(
        make_case("gpt3-7b", trace),
        strategy="evolution",
        realisable=True,
        budget=64,
        population=16,
        seeds=2,
        sub_batches=(2,),
        new_only=1,
        exact=True,
    )
    assert json.loads(json.dumps(found.to_dict())) == said
    layer = simulate(HARDWARE, MODEL, found.best_batch, PARALLEL_7B).layer_cycles
    assert found.best.cost == pytest.approx(float(layer), rel=2e-6)


def test_a_policy_is_a_line_in_a_table(problem, monkeypatch):
    """A new packing appears in all baselines, and keeps its name."""
    monkeypatch.setitem(PACKINGS, "all on one", lambda problem, _: 0 * problem.seq_lens)
    choices = Choices(5)
    _baselines.clear_cache()
    found = baselines(choices, problem)
    _baselines.clear_cache()
    assert list(found) == [
        f"{packing}, {split}" for packing in PACKINGS for split in ("halves", "snake", "one batch")
    ]
    for name, genome in found.items():
        packed = PACKINGS[name.partition(", ")[0]](problem, 5)
        assert (genome.places // 2).tolist() == packed.tolist()
        assert bool(genome.interleaved) == (not name.endswith("one batch"))
    halved = found["round robin, halves"].places % 2
    assert halved.tolist() == halves(jnp.arange(48) % 5, 5).tolist()


@pytest.mark.parametrize(
    ("case", "options", "words"),
    [
        ({"system": "npu-only"}, {}, "neupims"),
        ({}, {"new_only": 49}, "from 0 to the 48 requests"),
        ({}, {"seeds": 0}, "seeds must be at least 1"),
        ({}, {"budget": 10}, "budget"),
        ({}, {"exact": True, "hardware_knobs": [HardwareKnob("hbm.tfaw_cycles", 9, 9)]}, "knobs"),
    ],
)
def test_the_library_refuses_what_cannot_work(trace, case, options, words):
    with pytest.raises(ValueError, match=words):
        search_schedule(make_case("gpt3-7b", trace, **case), **options)


def test_flags_that_cannot_work_are_one_sentence(trace, tmp_path, capsys):
    for flags, word in (
        (["--export-trace", str(tmp_path / "x.csv")], "--realisable"),
        (["--system", "npu-only", "--sub-batches", "1"], "neupims"),
        (["--new-only", "99"], "--new-only"),
        (["--hardware-knob", "hbm.nonsense=1:2"], "nonsense"),
        (["--strategy", "gradient"], "one of evolution"),
        (["--measure", "beauty"], "measure"),
    ):
        assert main([*COMMAND, "--trace", trace, *flags]) == 1
        assert word in capsys.readouterr().err
