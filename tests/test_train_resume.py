"""A killed run ends with the same bits once resumed; several devices and processes end with the
same weights.
"""

import json
import re
import signal
import socket
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import TINY

EVERYTHING = [*TINY, "--optimizer.ema", "0.9", "--augment.mixup", "0.2", "--augment.cutmix", "1",
"--augment.crop", "pad", "--augment.pad", "1",
              "--augment.randaugment-ops", "1", "--augment.erase", "0.2",
              "--augment.on-device", "--model.dropout", "0.1",
              "--model.drop-path", "0.1",
              "--log-every", "1", "--epochs", "3", "--eval-every", "1", "--checkpoint-every",
              "1"]  # fmt: skip
SHORT = [*TINY, "--epochs", "0.7", "--log-every", "1", "--augment.erase", "0.5",
"--augment.on-device"]  # fmt: skip


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err[-3000:]
    return out, err


def lines(run, kind="train"):
    path = run / "metrics.jsonl"
    found = (
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if path.exists()
        else []
    )
    return [line for line in found if line["kind"] == kind]


def final_state(run):
    step = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    folder = run / "checkpoints" / str(step) / "default"
    with ocp.PyTreeCheckpointer() as checkpointer:
        arrays = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            checkpointer.metadata(folder).item_metadata.tree,
        )
        return step, checkpointer.restore(folder, restore_args=arrays)


@pytest.fixture(scope="module")
def uninterrupted(tool, tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted")
    finish(tool("train.classify", *EVERYTHING, "--out", run))
    return run


@pytest.mark.parametrize(
    ("number", "code", "kills"),
    [
        pytest.param(signal.SIGTERM, 143, 5, marks=pytest.mark.slow, id="SIGTERM"),
        pytest.param(signal.SIGKILL, -9, 2, id="SIGKILL"),
    ],
)
def test_kills_at_random_steps_change_no_bit(tool, tmp_path, uninterrupted, number, code, kills):
    """Parameters, moving average, optimiser state and the loss of every single step, which depends
    on the order of the data.
    """
    total = len(lines(uninterrupted))
    rng = np.random.default_rng(number)
    for target in np.sort(rng.choice(np.arange(1, total - 40), kills, replace=False)):
        process = tool("train.classify", *EVERYTHING, "--out", tmp_path)
        while len(lines(tmp_path)) < target and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        assert process.returncode == code, err[-3000:]
    finish(tool("train.classify", *EVERYTHING, "--out", tmp_path))
    (steps, want), (got_steps, got) = final_state(uninterrupted), final_state(tmp_path)
    assert got_steps == steps == total
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (line["step"], line["loss"]) for line in lines(uninterrupted)
    ]
    assert lines(tmp_path, "eval") == lines(uninterrupted, "eval")


def test_a_second_process_on_the_same_folder_is_refused(tool, tmp_path):
    flags = [*TINY, "--log-every", "1", "--epochs", "500", "--out", tmp_path]
    first = tool("train.classify", *flags)
    while not lines(tmp_path) and first.poll() is None:
        time.sleep(0.01)
    _, err = finish(tool("train.classify", *flags), code=1)
    first.send_signal(signal.SIGTERM)
    finish(first, code=143)
    assert (
        err.strip()
        == f"train.classify: another process is training in {tmp_path}: wait for it, or choose"
        " another --out"
    )


def test_a_full_disk_leaves_the_last_checkpoint_intact(tool, tmp_path):
    """Files may grow to 40 KiB only, as if the disk filled up while the checkpoint is written."""
    flags = [*SHORT, "--out", tmp_path]
    finish(tool("train.classify", *flags, "--stop-after", 5))
    # compiled programs are read from the cache and none is written, which would not fit either
    read_only = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
    _, err = finish(tool("train.classify", *flags, file_blocks=80, environment=read_only), code=1)
    assert "Traceback" not in err
    assert re.search(r"the checkpoint of step \d+ could not be written", err.splitlines()[-1])
    assert "the last good one is of step 5" in err.splitlines()[-1]
    assert final_state(tmp_path)[0] == 5
    _, err = finish(tool("train.classify", *flags))
    assert "resuming after step 5" in err


@pytest.fixture(scope="module")
def one_device(tool, tmp_path_factory):
    run = tmp_path_factory.mktemp("one_device")
    finish(tool("train.classify", *SHORT, "--out", run))
    return run


def assert_same_training(run, reference):
    losses, want = ([line["loss"] for line in lines(folder)] for folder in (run, reference))
    assert len(want) >= 30
    np.testing.assert_allclose(losses, want, rtol=1e-4)
    params, want = (final_state(folder)[1]["params"] for folder in (run, reference))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["--fsdp", 8], marks=pytest.mark.slow),
        ["--fsdp", 2, "--optimizer.accumulate", 2],
    ],
    ids=str,
)
def test_eight_devices_train_as_one(tool, tmp_path, one_device, flags):
    finish(tool("train.classify", *SHORT, "--out", tmp_path, *flags, devices=8))
    assert_same_training(tmp_path, one_device)


def two_processes(tool, *flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    return [
        tool("train.classify", *flags, devices=2, environment=both | {"JAX_PROCESS_ID": str(i)})
        for i in range(2)
    ]


@pytest.mark.slow
def test_two_processes_train_to_the_same_weights_which_one_can_evaluate(tool, tmp_path, one_device):
    for process in two_processes(tool, *SHORT, "--out", tmp_path, "--fsdp", 2):
        finish(process)
    assert_same_training(tmp_path, one_device)
    said, _ = finish(tool("eval.classify", tmp_path, "--json"))
    assert json.loads(said)["runs"][0]["top1"]["value"] == pytest.approx(
        lines(tmp_path, "eval")[-1]["top1"], abs=1e-9
    )


def test_two_processes_are_refused_in_one_line_each(tool, tmp_path, one_device):
    first, second = (
        finish(process, code=1)[1].strip()
        for process in two_processes(tool, *SHORT, "--out", one_device, "--seed", 9)
    )
    assert first.splitlines()[-1].startswith(
        f"train.classify: {one_device} holds a run with other settings (seed"
    )
    assert second.splitlines()[-1] == "train.classify: the first process refused the run"
    assert "Traceback" not in first + second
