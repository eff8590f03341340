"""train/continuing.py, stopping.py and checkpoints.py: new runs from others, the best checkpoint,
early stopping, damaged checkpoints and failed writes.
"""

import contextlib
import dataclasses
import json
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, TINY_PAIR

from eval import classify as eval_classify
from train import classify, contrastive
from train.checkpoints import Checkpoints
from train.cli import Refused, load_config
from train.config import Config
from train.log import read_metrics
from train.metric import MetricConfig
from train.step import make_steps
from train.stopping import Best

SMALL = [*TINY, "--log-every", "40", "--checkpoint-every", "1", "--optimizer.ema", "0.9"]


def run(*flags):
    return classify.train(load_config(Config, list(map(str, flags)), "test"))


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs with checkpoints after 45 and 90 steps."""
    out = tmp_path_factory.mktemp("finished")
    return out, run(*SMALL, "--epochs", 2, "--out", out)


def steps_of(path):
    return sorted(int(each.name) for each in path.iterdir() if each.name.isdigit())


def test_a_new_run_goes_on_with_other_settings_and_says_them(finished, tmp_path, capsys):
    old, ended = finished
    flags = ["--resume-from", old, "--batch", 16, "--epochs", 3, "--optimizer.lr", "0.002"]
    flags += ["--log-every", 5]
    first = run(*flags, "--stop-after", 185, "--out", tmp_path / "new")
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"continues from step 90 of {old} (2.003 epochs), here step 180; changed: batch 32 there,"
        " 16 now; epochs 2.0 there, 3.0 now; log_every 40 there, 5 now; optimizer.lr 0.003 there,"
        " 0.002 now"
    ) in said
    assert [line["step"] for line in read_metrics(tmp_path / "new", "train")] == [185]
    assert not first.finished
    assert run(*flags, "--out", tmp_path / "new").finished
    whole = run(*flags, "--out", tmp_path / "whole")
    assert int(whole.state.step) == 270
    assert_same(whole.state, Checkpoints(tmp_path / "new", read_only=True).restore(whole.steps))
    counts = [leaf for leaf in jax.tree.leaves(whole.state.opt_state) if leaf.ndim == 0]
    assert {int(leaf) for leaf in counts} == {270}  # the steps of this run, not of the other
    # without a step of learning everything is as it ended there
    still = run("--resume-from", old, "--epochs", 3, "--optimizer.lr", 0, "--optimizer.ema", 0.9,
                "--stop-after", 91, "--out", tmp_path / "still")  # fmt: skip
    assert_same(still.state.params, ended.state.params)
    counts = [leaf for leaf in jax.tree.leaves(still.state.opt_state) if leaf.ndim == 0]
    assert counts
    assert {int(leaf) for leaf in counts} == {91}


def test_runs_that_cannot_be_continued_are_refused(finished, tmp_path):
    old, _ = finished
    for flags, sentence in (
        (["--epochs", 3, "--out", old], "starts a new run and needs another --out"),
        ([], "has trained 2.003 epochs, and --epochs 2 leaves none"),
        (
            ["--epochs", 3, "--model.width", 32],
            r"of another model: params/\S+ is \(\d.*\) there"
            r" and \(.*\) here; changed: .*model.width 16 there, 32 now .--init",
        ),
        (["--epochs", 3, "--optimizer.ema", None], r"ema/\S+ is \(.*\) there and not here"),
        (["--init", old], "exclude each other"),
    ):
        with pytest.raises(Refused, match=sentence):
            run("--resume-from", old, "--out", tmp_path / "x", *flags)
    with pytest.raises(Refused, match=r"is a run of train.classify, not of train.metric"):
        load_config(MetricConfig, ["--resume-from", str(old)])
    with pytest.raises(Refused, match="is not the folder of a run"):
        run("--resume-from", tmp_path / "nowhere")


@pytest.mark.slow
def test_an_image_text_run_goes_on_with_its_tokenizer(tmp_path):
    contrastive.main([*TINY_PAIR, "--epochs", "1", "--out", str(tmp_path / "old")])
    contrastive.main(
        ["--resume-from", str(tmp_path / "old"), "--epochs", "2", "--out", str(tmp_path / "new")]
    )
    one, other = ((tmp_path / name / "tokenizer.json").read_text() for name in ("old", "new"))
    assert one == other


@pytest.fixture(scope="module")
def steps():
    return make_steps(load_config(Config, TINY, "test"), 10, 100)


def at(state, step):
    return dataclasses.replace(state, step=jnp.int32(step))


def test_the_best_checkpoint_is_kept_and_patience_counts_from_it(steps, tmp_path):
    config = dataclasses.replace(
        load_config(Config, TINY, "test"), out=tmp_path, keep="best:top1", patience=2
    )
    (tmp_path / "config.json").write_text("{}")
    kept, state, lines = tmp_path / "best" / "checkpoints", steps.init(0), []
    best = Best(config, 0)
    for step, value, expected in (
        (10, 0.5, 10), (20, 0.7, 20), (30, float("nan"), 20), (40, 0.6, 20), (50, 0.8, 50),
    ):  # fmt: skip
        best.add(step, {"top1": value}, at(state, step))
        lines.append(json.dumps({"kind": "eval", "step": step, "top1": value, "nll": value}))
        assert best.exhausted == (step == 40)
        assert steps_of(kept) == [expected]
    assert best.say() == f"best top1 0.8 after step 50, kept in {tmp_path}/best"
    assert (tmp_path / "best" / "config.json").is_file()
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    again = Best(config, 40)
    assert (again.step, again.value, again.exhausted) == (20, 0.7, True)
    again.add(45, {"top1": 0.75}, at(state, 45))  # the checkpoint of step 50 will come again
    assert steps_of(kept) == [45]
    low = Best(dataclasses.replace(config, keep="best:nll"), 50)
    assert (low.step, low.since) == (10, 4)
    with pytest.raises(Refused, match="must name a measure of the evaluations: top1, top5, nll"):
        run(*SMALL, "--keep", "best:map", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for wrong in ({"keep": "first"}, {"keep": "last", "patience": 2}):
        with pytest.raises(ValueError, match=r"--keep must be|--patience must be with --keep"):
            dataclasses.replace(config, **{"patience": None} | wrong)


def test_a_run_that_does_not_get_better_stops_and_stays_stopped(tmp_path, capsys):
    flags = [*SMALL, "--epochs", 6, "--eval-every", 0.2, "--optimizer.lr", 0, "--keep", "best:top1"]
    flags += ["--patience", 2, "--out", tmp_path]
    ended = run(*flags)
    evaluations = [line["step"] for line in read_metrics(tmp_path, "eval")]
    assert ended.finished
    assert len(evaluations) == 3
    said = capsys.readouterr().err
    assert f"stopped after step {evaluations[-1]} of 270: 2 evaluations in a row" in said
    assert f"after step {evaluations[0]}, kept in" in said
    again = run(*flags)
    assert_same(ended.state, again.state)
    assert [line["step"] for line in read_metrics(tmp_path, "eval")] == evaluations
    capsys.readouterr()
    eval_classify.main([str(tmp_path / "best"), "--json"])
    assert json.loads(capsys.readouterr().out)["runs"][0]["step"] == evaluations[0]


def cut(folder):
    for path in (path for path in folder.rglob("*") if path.is_file()):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(finished, tmp_path, capsys):
    _, whole = finished
    flags = [*SMALL, "--epochs", 2, "--out", tmp_path]
    run(*flags)
    assert steps_of(tmp_path / "checkpoints") == [45, 90]
    cut(tmp_path / "checkpoints" / "90")
    capsys.readouterr()
    eval_classify.main([str(tmp_path), "--json"])
    found = capsys.readouterr()
    assert json.loads(found.out)["runs"][0]["step"] == 45
    assert found.err.startswith("the checkpoint of step 90 cannot be read: ")
    assert found.err.endswith("; that of step 45 is taken in its place\n")
    assert steps_of(tmp_path / "checkpoints") == [45, 90]
    assert_same(run(*flags).state, whole.state)
    assert steps_of(tmp_path / "checkpoints") == [45, 90]
    assert steps_of(tmp_path / "damaged") == [90]
    assert "that of step 45 is taken" in capsys.readouterr().err
    for step in (45, 90):
        cut(tmp_path / "checkpoints" / str(step))
    with pytest.raises(Refused, match="step 90 cannot be read, nor those of 45: "):
        run(*flags)
    assert steps_of(tmp_path / "checkpoints") == [45, 90]


@contextlib.contextmanager
def small_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_is_told_without_waiting_for_the_next(steps, tmp_path):
    checkpoints, state = Checkpoints(tmp_path), steps.init(0)
    checkpoints.save(at(state, 3))
    checkpoints.wait()
    checkpoints.check()
    with small_files():
        checkpoints.save(at(state, 7))
        said = next(filter(None, (failure(checkpoints) for _ in range(600))))
    assert "checkpoint of step 7 could not be written" in said
    assert "the last good one is of step 3" in said


def failure(checkpoints):
    try:
        checkpoints.check()
    except Refused as error:
        return str(error)
    time.sleep(0.05)
    return None
