"""Exploration of a space on functions whose answers are known: grids, chunks, folders, kills,
devices and constraints.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.exploration.evaluator import Evaluator
from neupims.exploration.explore_space import explore_space
from neupims.exploration.points import Objective, costs, overall, parse_objectives
from neupims.exploration.sampling import sample
from neupims.exploration.space import make_space

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


def test_a_metric_that_all_workloads_share_is_itself():
    shared = np.array([7.0, 1.9, 0, -1, np.nan, np.inf])
    expected = [7.0, 1.9, 0, np.nan, np.nan, np.inf]
    for columns in (1, 2, 3):
        found = overall(np.stack([shared] * columns, axis=1))
        np.testing.assert_array_equal(found, expected)
    assert overall(np.array([[2.0, 8.0], [-1, -1], [-1, 1]])) == pytest.approx(
        [4, np.nan, np.nan], nan_ok=True
    )


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
    with (tmp_path / "points" / "000001.npz").open("wb") as file:
        np.save(file, np.zeros(16))
    np.savez(tmp_path / "points" / "000004.npz", speed=np.zeros(16))
    (tmp_path / "points" / "000003.npz.part").write_bytes(b"")
    again = run(method="random", points=100, chunk=16, folder=tmp_path)
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "points").iterdir()}
    damaged = {"000001.npz", "000002.npz", "000004.npz"}
    assert {name for name in now if now[name] != stamps.get(name)} == damaged
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
import test_neupims_explore_space as case
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
    limits = "goodput@ttft<2s,tpot<100ms"
    assert parse_objectives(f"{limits}:max,b:min") == (
        Objective(limits, True),
        Objective("b", False),
    )
    assert parse_objectives("a:max, b:min") == (Objective("a", True), Objective("b", False))
    for text in ("a", "a:best", "a:max,a:min", ""):
        with pytest.raises(ValueError, match="objective"):
            parse_objectives(text)
    with pytest.raises(ValueError, match="'tokens'; there are cost, speed"):
        explore_space(SPACE, speed_and_cost, (Objective("tokens", True),), points=4)
