"""Exploration of a space on functions whose answers are known (chunks, devices, kills, evolution,
sensitivities), the evaluation of accelerator designs, and `explore` with its command.
"""

import dataclasses
import doctest
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.__main__ import main
from neupims.exploration import evolution
from neupims.exploration.evaluation import make_evaluate, map_blocks
from neupims.exploration.evaluator import Evaluator
from neupims.exploration.explore import Exploration, explore
from neupims.exploration.explore_space import explore_space
from neupims.exploration.impossible import REASONS
from neupims.exploration.points import Objective, costs, overall, parse_objectives
from neupims.exploration.sampling import sample
from neupims.exploration.sensitivity import first_order, neighbours, rank_correlation
from neupims.exploration.space import make_space
from neupims.exploration.workloads import Workload, deal, make_workloads
from neupims.machine.config import load_model, load_parallel
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.machine.workload import Parallel, make_batch
from neupims.timing.iteration import simulate

ROOT = Path(__file__).resolve().parent.parent
SPEED_AND_COST = parse_objectives("speed:max,cost:min")


def speed_and_cost(columns):
    """Speed is the product of two knobs over tRCD, cost their sum. 3 arrays are flagged as
    impossible, and 5 have a speed of NaN.
    """
    arrays, channels = columns["npu.num_arrays"] * 1.0, columns["hbm.num_channels"] * 1.0
    speed = jnp.where(arrays == 5, jnp.nan, arrays * channels / columns["hbm.trcd_read_cycles"])
    flagged = (arrays == 3)[:, None] & jnp.array([[False, True]])
    return {
        "speed": jnp.stack([speed, 4 * speed], axis=1),
        "cost": jnp.stack([arrays + channels] * 2, axis=1),
        "flagged": flagged,
    }


SPACE = make_space(
    {
        "npu.num_arrays": {"low": 2, "high": 9},
        "hbm.num_channels": [1, 2, 4, 8],
        "hbm.trcd_read_cycles": {"low": 10.0, "high": 20.0},
    }
)


def run(**options):
    return explore_space(SPACE, speed_and_cost, SPEED_AND_COST, sensitivity_of="speed", **options)


def arrays_of(result):
    return [result.front.place, result.front.values, *result.front.metrics.values()]


def test_a_grid_finds_the_front_by_hand():
    """At tRCD 10, over 2 to 9 arrays and 1 to 8 channels, the product is best for its sum if there
    are as many channels as arrays, or nearly.
    """
    result = run(method="grid", chunk=37)
    found = {(int(a), int(c), t) for a, c, t in result.front.values}
    best = set()
    every = [(a, c) for a in (2, 4, 6, 7, 8, 9) for c in (1, 2, 4, 8)]
    for a, c in every:
        if not any(
            b * d >= a * c and b + d <= a + c and (b * d, b + d) != (a * c, a + c) for b, d in every
        ):
            best.add((a, c, 10.0))
    assert found == best
    assert (result.points, result.flagged) == (8 * 4 * 5, 2 * 4 * 5)
    assert result.kept == result.points - result.flagged


def test_of_workloads_the_geometric_mean_counts():
    result = run(method="sobol", points=16)
    values, metrics = result.front.values, result.front.metrics
    assert overall(metrics["speed"]) == pytest.approx(
        2 * values[:, 0] * values[:, 1] / values[:, 2], rel=1e-5
    )
    assert costs(result.front, SPEED_AND_COST)[:, 0] == pytest.approx(-overall(metrics["speed"]))


def test_chunks_do_not_change_what_is_found(tmp_path):
    whole = run(method="sobol", points=100, chunk=100)
    parts = run(method="sobol", points=100, chunk=23, folder=tmp_path / "out")
    for one, two in zip(arrays_of(whole), arrays_of(parts), strict=True):
        assert np.array_equal(one, two)
    assert whole.hypervolume == parts.hypervolume > 0


def test_one_compilation_for_all_chunks():
    traced = []

    def counted(columns):
        traced.append(1)
        return speed_and_cost(columns)

    explore_space(
        SPACE, counted, SPEED_AND_COST, method="sobol", points=100, chunk=30, sensitivity_of="speed"
    )
    assert len(traced) == 1


def test_a_second_run_reads_what_the_first_has_done(tmp_path):
    """This also holds if a file is damaged, and if more points are asked for."""
    first = run(method="random", points=100, chunk=16, folder=tmp_path)
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "points").iterdir()}
    (tmp_path / "points" / "000002.npz").write_bytes(b"PK half a file")
    (tmp_path / "points" / "000003.npz.part").write_bytes(b"")
    again = run(method="random", points=100, chunk=16, folder=tmp_path)
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "points").iterdir()}
    assert {name for name in now if now[name] != stamps.get(name)} == {"000002.npz"}
    assert all(
        np.array_equal(one, two)
        for one, two in zip(arrays_of(first), arrays_of(again), strict=True)
    )
    more = run(method="random", points=200, chunk=16, folder=tmp_path)
    fresh = run(method="random", points=200, chunk=16)
    assert all(
        np.array_equal(one, two) for one, two in zip(arrays_of(more), arrays_of(fresh), strict=True)
    )


def test_another_exploration_in_the_folder_is_refused(tmp_path):
    run(points=8, folder=tmp_path)
    other = make_space(
        {"npu.num_arrays": [2, 4], "hbm.num_channels": [1], "hbm.trcd_read_cycles": [10]}
    )
    with pytest.raises(ValueError, match=r"another space \(knobs\)"):
        explore_space(
            other, speed_and_cost, SPEED_AND_COST, points=8, folder=tmp_path, sensitivity_of="speed"
        )
    with pytest.raises(ValueError, match=r"another run \(seed\)"):
        run(points=8, seed=1, folder=tmp_path)
    with pytest.raises(ValueError, match=r"another settings \(model\)"):
        run(points=8, settings={"model": 1}, folder=tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"code": "older"}))
    with pytest.raises(ValueError, match="another code"):
        run(points=8, folder=tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        run(points=8, folder=tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not empty"):
        run(points=8, folder=tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        run(points=8, folder=tmp_path / "points" / "000000.npz")


SLOW = """
import sys, time
sys.path.insert(0, {tests!r})
import test_neupims_explore as case
def report(done, total):
    print(done, flush=True)
    time.sleep(0.2)
case.run(method={method!r}, points=128, chunk=16, folder={folder!r}, report=report)
"""


@pytest.mark.parametrize("method", ["random", "evolution"])
def test_a_killed_run_goes_on(tmp_path, method):
    code = SLOW.format(tests=str(ROOT / "tests"), method=method, folder=str(tmp_path))
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(3)]
    with pytest.raises(ValueError, match="another process"):
        run(method=method, points=128, chunk=16, folder=tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    done = len(list((tmp_path / "points").glob("*.npz")))
    assert seen[0] == "16\n"
    assert 3 <= done < 8
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "points").glob("*.npz")}
    resumed, fresh = (
        run(method=method, points=128, chunk=16, folder=tmp_path),
        run(method=method, points=128, chunk=16),
    )
    assert all(
        (tmp_path / "points" / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items()
    )
    assert all(
        np.array_equal(one, two)
        for one, two in zip(arrays_of(resumed), arrays_of(fresh), strict=True)
    )


def test_nothing_half_written_stays_where_the_disk_refuses(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run(points=8, folder=tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"] == []


def test_designs_are_spread_over_all_devices():
    """The tests run on eight devices. One, three and eight give the same results, whatever the
    number of designs.
    """
    assert jax.device_count() == 8
    values = sample(SPACE, "random", 0, 21)
    every = [
        Evaluator(SPACE, speed_and_cost, rows, jax.devices()[:count])
        for count, rows in ((1, 21), (3, 5), (8, 21))
    ]
    found = [evaluator(values) for evaluator in every]
    assert [evaluator.rows for evaluator in every] == [21, 6, 24]
    assert len(every[2].run(every[2]._columns(values))["cost"].sharding.device_set) == 8
    for other in found[1:]:
        assert all(
            np.array_equal(one, two, equal_nan=True)
            for one, two in zip(jax.tree.leaves(found[0]), jax.tree.leaves(other), strict=True)
        )


def test_constraints_of_knobs_and_metrics():
    constraints = ["npu.num_arrays * hbm.num_channels <= 16", "cost < 11"]
    space = make_space(
        {name: _choice(name) for name in SPACE.names}, constraints, metrics=["cost", "speed"]
    )
    result = explore_space(
        space, speed_and_cost, SPEED_AND_COST, method="grid", sensitivity_of="speed"
    )
    arrays, channels = result.front.values[:, 0], result.front.values[:, 1]
    assert (arrays * channels <= 16).all()
    assert (arrays + channels < 11).all()
    assert (arrays * channels == 16).any()
    kept = [(a, c) for a in (2, 4, 6, 7, 8, 9) for c in (1, 2, 4, 8) if a * c <= 16 and a + c < 11]
    assert result.kept == 5 * len(kept)


def _choice(name):
    return SPACE.describe()["knobs"][name]


def test_evolution_nears_a_known_front_and_beats_chance():
    """ZDT1 (Zitzler, Deb and Thiele, 2000) moved up by 1 so that all is positive: the front is f2 =
    2 - sqrt(f1 - 1), where all other knobs are 0.
    """
    names = [
        "hbm.trp_cycles",
        "hbm.tccd_s_cycles",
        "hbm.tfaw_cycles",
        "hbm.trfc_cycles",
        "hbm.tccd_l_cycles",
        "hbm.trtp_cycles",
    ]
    space = make_space({name: {"low": 0.0, "high": 1.0} for name in names})

    def zdt1(columns):
        x = [columns[name] for name in names]
        g = 1 + 9 * sum(x[1:]) / (len(x) - 1)
        return {"one": (1 + x[0])[:, None], "two": (1 + g * (1 - jnp.sqrt(x[0] / g)))[:, None]}

    objectives = (Objective("one", False), Objective("two", False))
    reference = {"one": 2.0, "two": 3.0}
    options = {"points": 3200, "chunk": 64, "reference": reference, "sensitivity_of": "two"}
    evolved, drawn = (
        explore_space(space, zdt1, objectives, method=method, seed=1, **options)
        for method in ("evolution", "random")
    )
    base = [float(overall(evolved.base.metrics[name])[0]) for name in ("one", "two")]
    most = (1 + 2 / 3) / (base[0] * base[1])  # the area above 1 - sqrt(x) up to 2, from 0 to 1
    assert drawn.hypervolume < 0.9 * most
    assert 0.97 * most < evolved.hypervolume <= most


def test_children_stay_in_the_cube_and_lists_keep_their_values():
    units = (
        jnp.asarray(np.random.default_rng(0).random((64, 3)), jnp.float32)
        .at[:, 1]
        .set(jnp.arange(64) % 4 / 4)
    )
    drawn = jnp.asarray(np.random.default_rng(1).random((evolution.DRAWS, 64, 3)), jnp.float32)
    children = evolution.breed(
        drawn, units, jnp.zeros(64, int), jnp.ones(64), jnp.array([False, True, False])
    )
    assert children.shape == (64, 3)
    assert float(children.min()) >= 0
    assert float(children.max()) <= 1
    kept = np.isin(np.asarray(children[:, 1]), np.arange(4) / 4)
    redrawn = np.asarray(drawn[6, :, 1]) < 1 / 3  # one knob of three, on average
    assert kept[~redrawn].all()
    assert not kept[redrawn].any()
    assert not np.isin(np.asarray(children[:, 0]), np.asarray(units[:, 0])).all()


def test_fitness_puts_violations_behind_and_repeats_behind_these():
    values = np.array([[1.0], [2], [3], [1], [4], [5]])
    objectives = np.array([[2.0, 2], [1, 3], [3, 3], [2, 2], [0, 0], [np.nan, 0]])
    rank, _ = evolution.fitness(values, objectives, np.array([0, 0, 0, 0, 0.5, np.inf]))
    assert rank.tolist() == [0, 0, 1, 12, 6, 12]
    assert evolution.select_survivors(rank, np.zeros(6)).tolist() == [0, 1, 2]


def test_sensitivities_by_hand():
    """speed = a c / t: elasticities 1, 1 and -1 (between steps, nearly); of c alone ln varies
    most.
    """
    result = run(method="random", points=8192)
    found = result.sensitivities
    assert [found[name].elasticity for name in SPACE.names] == [
        pytest.approx(1, rel=1e-5),
        pytest.approx(1, rel=1e-5),
        pytest.approx(-1, rel=1e-5),
    ]
    assert (
        found["npu.num_arrays"].rank_correlation
        > 0
        > found["hbm.trcd_read_cycles"].rank_correlation
    )
    shares = [found[name].first_order for name in SPACE.names]
    assert max(shares) == shares[1]
    assert 0.8 < sum(shares) < 1


def test_first_order_index_of_a_sum_and_of_chance():
    """y = 2a + b of independent uniform a and b: 4/5 and 1/5 of the variance; c has none."""
    rng = np.random.default_rng(0)
    a, b, c = rng.random((3, 20000))
    y = 2 * a + b
    assert first_order(a, y) == pytest.approx(0.8, abs=0.01)
    assert first_order(b, y) == pytest.approx(0.2, abs=0.01)
    assert first_order(c, y) == pytest.approx(0, abs=0.005)
    assert first_order(np.round(3 * a), y) < 0.8
    assert np.isnan(first_order(np.ones(100), y[:100]))
    few = [
        first_order(*rng.random((2, 256))) for _ in range(40)
    ]  # 32 bins of 8 show 31 / 255 of the variance by chance, which is taken away
    assert np.mean(few) == pytest.approx(0, abs=0.03)


def test_rank_correlation_by_hand():
    """Ranks 1 2.5 2.5 4 and 1 3 2 4: covariance 4.5 / 4, variances 4.5 / 4 and 5 / 4."""
    found = rank_correlation(np.array([1.0, 5, 5, 9]), np.array([1.0, 30, 20, 4000]))
    assert found == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(rank_correlation(np.ones(5), np.arange(5.0)))
    assert np.isnan(rank_correlation(np.arange(5.0), np.ones(5)))
    assert np.isnan(rank_correlation(np.arange(2.0), np.arange(2.0)))


def test_neighbours_are_the_next_values():
    space = make_space(
        {
            "npu.num_arrays": {"low": 2, "high": 8},
            "hbm.num_channels": [16, 64, 32],
            "hbm.tfaw_cycles": {"low": 40, "high": 60},
        }
    )
    base, *others = neighbours(space).tolist()
    assert base == [8, 32, 40]  # tFAW is 30, below the range
    assert others == [[7, 32, 40], [8, 32, 40], [8, 16, 40], [8, 64, 40], [8, 32, 40], [8, 32, 44]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "annealing"}, "annealing"),
        ({"method": "grid", "points": 100}, "160 points"),
        ({"points": 0}, "at least one point"),
        ({"chunk": 0}, "at least one design"),
        ({"method": "evolution", "chunk": 2}, "at least 4"),
        ({"method": "evolution", "chunk": 5}, "even"),
        ({"reference": {"area": 1.0}}, "area"),
    ],
)
def test_impossible_runs_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        run(**options)


def test_objectives_of_a_command_line():
    assert parse_objectives("a:max, b:min") == (Objective("a", True), Objective("b", False))
    for text in ("a", "a:best", "a:max,a:min", ""):
        with pytest.raises(ValueError, match="objective"):
            parse_objectives(text)
    with pytest.raises(ValueError, match="'tokens'; there are cost, speed"):
        explore_space(SPACE, speed_and_cost, (Objective("tokens", True),), points=4)


LENGTHS = np.random.default_rng(0).integers(1, 512, 64)
BATCH = make_batch(LENGTHS, np.arange(64) % 32)
WORKLOADS = [
    Workload(name, load_model(name), load_parallel(name), BATCH) for name in ("gpt3-7b", "gpt3-13b")
]
MACHINES = make_space(
    {
        "pim.page_bytes": [512, 1024, 2048],
        "hbm.tfaw_cycles": {"low": 12, "high": 40},
        "parallel.tp": [4, 8, 3],
    }
)


def test_the_usual_evaluation_is_a_loop_over_simulate():
    """The last three are impossible: 3 devices for 32 heads, a tFAW of NaN, and pages longer
    than rows.
    """
    pages, faw = np.array([512, 1024, 1024, 1024, 2048]), np.array([12.5, 30, 30, np.nan, 30])
    columns = {"pim.page_bytes": pages, "hbm.tfaw_cycles": faw, "parallel.tp": [4, 4, 3, 4, 4]}
    found = jax.jit(make_evaluate(WORKLOADS, schedule="trace", most_channels=32))(
        {name: jnp.asarray(each) for name, each in columns.items()}
    )
    reasons = [[REASONS[code] for code in each] for each in found["flagged"].tolist()]
    assert reasons == [[""] * 2] * 2 + [
        ["heads do not divide over the devices of a layer"] * 2,
        ["not timed: a time or an energy is not finite"] * 2,
        ["pages longer than a row"] * 2,
    ]
    for place, each in enumerate(WORKLOADS):
        alone = simulate(Hardware(), each.model, each.batch, each.parallel, most_channels=32)
        assert found["tokens_per_second"][1, place] == pytest.approx(
            float(alone.tokens_per_second), rel=1e-4
        )
        assert found["energy_joules_per_token"][1, place] == pytest.approx(
            float(alone.energy_joules) * each.parallel.tp / 64, rel=1e-4
        )
    assert np.isfinite(found["tokens_per_second"][:3]).all()


@pytest.mark.parametrize("block", [None, 2])
def test_no_designs_have_no_metrics(block):
    for rows, found in ((0, (0, 3)), (5, (5, 3))):
        columns = {"a": jnp.arange(rows), "b": jnp.ones(rows)}
        result = map_blocks(lambda row: {"c": row["a"] * jnp.ones(3)}, columns, block)
        assert result["c"].shape == found


@pytest.mark.parametrize("channels", [1, 5, 32, 64])
def test_dealt_requests_are_balanced(channels):
    """Each channel gets one request of every lap, so counts differ by one at most, and so do the
    halves; long and short requests are paired.
    """
    lengths = jnp.sort(jnp.asarray(np.random.default_rng(1).integers(1, 2048, 256)))[::-1]
    batch = deal(lengths, channels)
    counts = np.bincount(batch.channels, minlength=channels)
    halves = np.bincount(batch.sub_batches, minlength=2)
    loads = np.bincount(batch.channels, weights=lengths, minlength=channels)
    assert np.ptp(counts) <= 1
    assert abs(halves[0] - halves[1]) <= max(1, channels // 32)
    if 256 % (2 * channels) == 0:
        assert loads.max() <= 1.03 * loads.mean()


def test_the_command_prints_one_object_and_writes_its_files(tool, tmp_path):
    (tmp_path / "trace.csv").write_text(
        "seq_len,ch_idx\n" + "".join(f"{length},{i % 32}\n" for i, length in enumerate(LENGTHS))
    )
    flags = [
        "--knob",
        "npu.num_arrays=2:16",
        "--knob",
        "hbm.tfaw_cycles=12,30",
        "--constraint",
        "npu.num_arrays <= 8",
    ]
    flags += ["--trace", tmp_path / "trace.csv"]
    process = tool(
        "neupims",
        "explore",
        *flags,
        "--points",
        64,
        "--out",
        tmp_path / "out",
        "--html",
        tmp_path / "page.html",
        "--json",
    )
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    found = json.loads(out)
    assert found["points"] == 64
    assert found["expected_error"]["path"] == "closed"
    assert found["devices"].startswith(f"{os.cpu_count()} x")
    assert 1 <= len(found["front"]) <= found["kept"] < 64
    assert all(design["knobs"]["npu.num_arrays"] <= 8 for design in found["front"])
    speeds = [design["metrics"]["tokens_per_second"] for design in found["front"]]
    assert speeds == sorted(speeds, reverse=True)
    assert found["sensitivities"]["hbm.tfaw_cycles"]["rank_correlation"] < 0
    assert (tmp_path / "out" / "front.csv").read_text().count("\n") == len(found["front"]) + 1
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == found
    page = (tmp_path / "page.html").read_text()
    assert [
        page.count(f"<h2>tokens_per_second against {name}")
        for name in ("energy_joules_per_token", "area_mm2")
    ] == [1, 1]
    assert (
        page.count(" of 14 designs are on the Pareto front") == 2
    )  # 2 to 8 arrays, two timings: so few that all are drawn, each once
    assert (
        len({tuple(design["knobs"].values()) for design in found["front"]})
        == len(found["front"])
        <= 14
    )
    assert "hbm.tfaw_cycles" in page[page.index("<h2>Sensitivity") :]
    chart = page[
        page.index("<h2>tokens_per_second against area_mm2") : page.index("<h2>Pareto front")
    ]
    assert {*re.findall(r'<td class="words">(\d+)</td>', chart)} <= {
        str(design["index"]) for design in found["front"]
    }


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    rows = (f"{length},{place % 32}\n" for place, length in enumerate(LENGTHS))
    path.write_text("seq_len,ch_idx\n" + "".join(rows))
    return path


def test_the_command_prints_the_record_of_the_library(capsys, tmp_path, trace):
    """The flags of the command and the arguments of the call give the same result."""
    flags = [
        *("--knob", "npu.num_arrays=2:16", "--knob", "pim.row_buffers=1,2"),
        *("--knob", "npu.clock_hz=0.7e9:1.5e9:log", "--constraint", "npu.num_arrays <= 12"),
        *("--models", "gpt3-7b,GPT3-13B", "--set", "hbm.num_channels=64", "--points", "24"),
        *("--objectives", "tokens_per_second:max,area_mm2:min", "--reference", "area_mm2=9e4"),
        *("--schedule", "trace", "--sub-batches", "1", "--fidelity", "intended", "--seed", "3"),
        *("--method", "random", "--chunk", "16", "--trace", str(trace), "--json"),
    ]
    assert main(["explore", *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = explore(
        replace(Hardware(), "hbm.num_channels", 64),
        ["gpt3-7b", "gpt3-13b"],
        trace,
        {
            "npu.num_arrays": (2, 16),
            "pim.row_buffers": [1, 2],
            "npu.clock_hz": (0.7e9, 1.5e9, "log"),
        },
        constraints=["npu.num_arrays <= 12"],
        objectives="tokens_per_second:max,area_mm2:min",
        reference={"area_mm2": 9e4},
        method="random",
        points=24,
        seed=3,
        sub_batches=1,
        fidelity="intended",
        schedule="trace",
        chunk=16,
        folder=tmp_path / "out",
    )
    record = found.to_dict()
    assert printed.pop("seconds") > 0 < record.pop("seconds")
    assert printed == json.loads(json.dumps(record))
    assert (found.reference["area_mm2"], found.points, found.sub_batches) == (9e4, 24, 1)
    assert all(each.knobs["npu.num_arrays"] <= 12 for each in found.front)
    assert (tmp_path / "out" / "front.csv").read_text() == found.front_csv()
    assert [each.index for each in found.front] != sorted(each.index for each in found.front)


def test_records_and_names_are_the_same_exploration():
    """A machine, a model and a batch as records, and two objectives as records."""
    knobs, batch = {"npu.num_arrays": [4, 8]}, make_batch([300, 40], [0, 1])
    objectives = (Objective("tokens_per_second", True), Objective("area_mm2", False))
    options = {"method": "grid", "parallel": Parallel(2, 1), "objectives": objectives}
    model = load_model("gpt3-7b")
    one = explore(Hardware(), model, batch, knobs, **options)
    two = explore("neupims", "gpt3-7b", [batch], knobs, **options)
    assert (one.workloads, two.workloads) == (("model/batch",), ("gpt3-7b/batch",))
    assert (one.front, one.hypervolume) == (two.front, two.hypervolume)
    assert isinstance(one, Exploration)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.seed = 1


def test_workloads_are_named_and_checked(trace):
    batch = make_batch([5], [0])
    found = make_workloads(["gpt3-7b", load_model("gpt3-7b")], [trace, batch])
    names = ["gpt3-7b/trace", "gpt3-7b/batch 2", "model 2/trace", "model 2/batch 2"]
    assert [each.name for each in found] == names
    assert (found[0].parallel.tp, found[2].parallel.tp) == (4, 1)
    for models, batches in (([], batch), ("gpt3-7b", []), ("gpt3-8b", batch)):
        with pytest.raises(ValueError, match=r"at least one|gpt3-8b"):
            make_workloads(models, batches)
    with pytest.raises(ValueError, match="tp must divide"):
        make_workloads("gpt3-7b", batch, parallel=Parallel(3, 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"system": "npu-pim", "sub_batches": 2}, "need the system neupims, not npu-pim"),
        ({"schedule": "sorted"}, "dealt, trace, not 'sorted'"),
        ({"system": "tpu"}, "tpu"),
        ({"objectives": "speed:max"}, "no metric 'speed'"),
    ],
)
def test_impossible_calls_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        explore("neupims", "gpt3-7b", make_batch([5], [0]), {"npu.num_arrays": [4]}, **options)


def test_the_example_of_the_documentation_runs():
    found = doctest.testmod(importlib.import_module("neupims.exploration.explore"))
    assert (found.attempted, found.failed) == (5, 0)


def test_the_expected_error_is_that_of_the_row_buffers(capsys, tmp_path):
    (tmp_path / "trace.csv").write_text("seq_len,ch_idx\n600,0\n40,1\n513,0\n300,2\n")
    for flags, known in (
        ([], True),
        (["--row-buffers", "single"], False),
        (["--knob", "pim.row_buffers=1,2"], False),
    ):
        assert (
            main(
                [
                    "explore",
                    "--trace",
                    str(tmp_path / "trace.csv"),
                    "--knob",
                    "npu.num_arrays=4,8",
                    "--points",
                    "4",
                    "--json",
                    *flags,
                ]
            )
            == 0
        )
        found = json.loads(capsys.readouterr().out)
        assert (found["expected_error"] is not None) == known == (not found["not_validated"])
        # Only designs of 8 arrays were measured.
        inside = sum(design["knobs"]["npu.num_arrays"] == 8 for design in found["front"])
        assert found["front_validated"] == (inside if known else None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--knob", "hbm.chanels=1,2"], "hbm.chanels"),
        ([], "--knob"),
        (["--knob", "npu.num_arrays=2:4", "--constraint", "npu.arrays < 3"], "npu.arrays"),
        (["--knob", "npu.num_arrays=2:4", "--objectives", "speed:max"], "speed"),
        (["--knob", "sub_batches=1,2", "--system", "npu-pim"], "sub_batches"),
    ],
)
def test_the_command_refuses_in_one_line(monkeypatch, capsys, tmp_path, flags, words):
    (tmp_path / "trace.csv").write_text("seq_len,ch_idx\n5,0\n")
    assert main(["explore", "--trace", str(tmp_path / "trace.csv"), "--points", "4", *flags]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
