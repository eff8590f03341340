"""train/dry_run.py: what a training would take, without its data."""

import dataclasses
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY

from train import classify, contrastive, dry_run, metric, topologies
from train.cli import load_config
from train.collectives import find_transfers
from train.config import Config, Optimizer
from train.step import make_steps
from train.throughput import PEAK_FLOPS


def run(capsys, *flags):
    """The exit message (None: success) and the lines that are printed."""
    try:
        classify.main(["--dry-run", *map(str, flags)])
        code = None
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr().out.splitlines()


def test_sizes_come_from_the_data_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, lines = run(capsys, *TINY, "--on", "none")
    assert code is None
    assert lines[0].split()[1:3] == ["5,148", "parameters,"]
    assert any("images a step" in line or "32 images" in line for line in lines)
    assert any(line.startswith("the run ") and "1,438 images" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_needs_no_data(capsys):
    sizes = ["--classes", 1000, "--images", 1_281_167, "--on=none"]
    code, lines = run(capsys, "--config", "imagenet_vit_s16", *sizes)
    assert code is None
    assert "21,974,632 parameters" in lines[0]
    # 27.4 GFLOP an image, 112,603 steps of 1,024 images, 40 % of 989 TFLOP/s
    assert any("1 x NVIDIA H200 2.2 hours" in line for line in lines)


# of the images: 16 + 1 tokens of 16 channels; of the texts: 12 ids
TOWERS = [
    *("--embed", "8", "--text.width", "24", "--text.depth", "2", "--text.heads", "2"),
    *("--text.mlp-width", "40", "--text.context", "12", "--text.vocabulary", "300"),
]
TASKS = {
    "classify": (classify, Config, []),
    "metric": (metric, metric.MetricConfig, ["--metric.dim", "24"]),
    "contrastive": (contrastive, contrastive.ContrastiveConfig, TOWERS),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_step_of_each_script_is_compiled_and_what_it_sends_is_counted(capsys, name):
    script, _, flags = TASKS[name]
    sizes = ["--images", "1000", *([] if name == "contrastive" else ["--classes", "40"])]
    script.main(["--dry-run", *TINY, *flags, *sizes])
    lines = capsys.readouterr().out.splitlines()
    (compiled,) = (line.split() for line in lines if line.startswith("compiled"))
    assert compiled[2] in ("MB", "GB")
    assert float(compiled[1]) > 0.1
    (sent,) = (line.split() for line in lines if line.startswith("a step sends"))
    assert sent[4:7] == ["MB", "from", "each"]
    assert float(sent[3]) == pytest.approx(float(sent[8]), abs=0.011)


def compile_tiny(name, count, fsdp, *flags, where="here"):
    """The plan, the shapes of the state, and the program of a small step."""
    script, record, own = TASKS[name]
    flags = [*TINY, *own, "--fsdp", str(fsdp), "--batch", str(4 * count), *flags]
    config = load_config(record, flags, "test")
    plan = script.plan(config, 40, 10, dry_run.find_devices(where))
    state = jax.eval_shape(plan.steps.init, 0)
    return plan, state, dry_run.compile_step(config, plan.steps, state, where, plan.text)


def check_transfers(name, devices, fsdp):
    """Only whole parameters are collected; sums are of gradients and a few numbers beside them.

    Pairs of images and texts meet by passing the texts from device to device.
    """
    plan, state, program = compile_tiny(name, devices, fsdp)
    transfers = find_transfers(program.as_text(), devices)
    sizes = {leaf.size for leaf in jax.tree.leaves(state.params)}
    for kind in ("all-gather", "all-to-all", "reduce-scatter"):
        moved = [shape for each in transfers if each.kind == kind for shape in each.shapes]
        assert {math.prod(shape) for shape in moved} <= sizes, (kind, moved)
    passed = [each for each in transfers if each.kind == "collective-permute"]
    assert math.fsum(each.sent_bytes for each in passed) == plan.sent_bytes
    summed = math.fsum(each.sent_bytes for each in transfers if each.kind == "all-reduce")
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert summed == pytest.approx(2 * (devices - 1) / devices * 4 * count, abs=1000)


@pytest.mark.parametrize("fsdp", [1, 8])
@pytest.mark.parametrize("name", TASKS)
def test_a_step_moves_weights_and_gradients_and_no_tokens(name, fsdp):
    check_transfers(name, 8, fsdp)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 64])
def test_a_step_on_64_devices_moves_weights_and_gradients_and_no_tokens(fsdp):
    code = (
        "import jax; jax.config.update('jax_num_cpu_devices', 64); import test_train_dry_run as t"
        f"; [t.check_transfers(name, 64, {fsdp}) for name in t.TASKS]"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("fsdp", [1, 8])
@pytest.mark.parametrize("name", TASKS)
def test_a_step_on_a_tpu_moves_weights_and_gradients_and_no_tokens(name, fsdp):
    """Gradients of a convolution that is split pass between neighbours, in pieces of weights, and
    the descriptors of a batch may be collected for proxies that are split.
    """
    pytest.importorskip("libtpu", reason="make .venv/tpu, PYTHONPATH=.venv/tpu")
    plan, state, program = compile_tiny(name, 8, fsdp, where="v5e:8")
    transfers = find_transfers(program.as_text(), 8)
    sizes = {leaf.size for leaf in jax.tree.leaves(state.params)}
    if (name, fsdp) == ("metric", 8):
        sizes.add(4 * 8 * 24)
    sent = dict.fromkeys(("all-gather", "all-reduce", "collective-permute"), 0.0)
    for each in transfers:
        sent[each.kind] += each.sent_bytes
        if each.kind == "all-gather":
            assert {math.prod(shape) for shape in each.shapes} <= sizes, each
    count = 7 / 8 * 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert (sent["all-gather"] > 0) == (fsdp == 8)
    assert sent["all-gather"] < count
    assert sent["all-reduce"] < 2 * count + 1000
    assert sent["collective-permute"] <= plan.sent_bytes + 2000 * (fsdp == 8)
    assert 0 < dry_run.used_bytes(program) < 16 * 2**30


def test_images_that_are_mixed_travel_as_they_are():
    """The opposite of an image is on another device: 4 images of 8 x 8 x 3 bytes of each."""
    _, _, program = compile_tiny("classify", 8, 1, "--augment.mixup", "0.2")
    passed = {
        each.shapes: each.sent_bytes
        for each in find_transfers(program.as_text(), 8)
        if each.kind == "collective-permute"
    }
    assert passed[((4, 8, 8, 3),)] == 4 * 8 * 8 * 3


class Program:
    """Stands for a compiled program, with round sizes."""

    argument_size_in_bytes, output_size_in_bytes = 1000, 900
    alias_size_in_bytes, temp_size_in_bytes = 800, 7

    def memory_analysis(self):
        return self

    def as_text(self):
        return ""


def test_a_compiled_program_holds_its_state_once():
    """Its outputs take the place of the arguments that they alias."""
    assert dry_run.used_bytes(Program()) == 1000 + (900 - 800) + 7


def test_devices_that_are_not_there_need_their_compiler(capsys, monkeypatch):
    monkeypatch.setattr(topologies, "_found", lambda name: name == "jax_plugins.xla_cuda13")
    assert topologies.available()
    monkeypatch.setattr(topologies, "_found", lambda name: False)
    code, _ = run(capsys, *TINY, "--on", "h200:8")
    assert "--on h200:8 needs XLA's compiler for NVIDIA GPUs: install jax[cuda12]" in code
    code, _ = run(capsys, *TINY, "--on", "v5e:8")
    assert "--on v5e:8 needs XLA's compiler for TPUs: install jax[tpu], which works without" in code


def pretend_described(monkeypatch, compiled):
    """`--on h200:8` finds its compiler, which does this for the devices here."""
    monkeypatch.setattr(topologies, "available", lambda name: True)
    monkeypatch.setattr(topologies, "h200s", lambda count: np.array(jax.devices()[:count]))
    monkeypatch.setattr(topologies, "compile_described", compiled)


def test_a_described_device_has_its_memory_time_and_bounds(capsys, monkeypatch):
    pretend_described(monkeypatch, lambda *_: Program())
    monkeypatch.setattr(Program, "temp_size_in_bytes", 2_400_000_000 - 1100)
    monkeypatch.setattr(dry_run, "find_transfers", lambda *_: [])
    code, lines = run(capsys, *TINY, "--on", "h200:4", "--classes=9", "--images=989000")
    assert code is None
    assert any(line.startswith("  4 x NVIDIA H200") for line in lines)
    assert "compiled      2.40 GB for h200:4, of 141.00 GB each" in lines
    (flops,) = (float(line.split()[3]) for line in lines if line.startswith("model"))
    products = flops * 1e9 * 32 / 4 / 989e12 * 1e3
    (bound,) = (line.split() for line in lines if line.startswith("a step  "))
    assert float(bound[4]) == pytest.approx(products, rel=0.01)
    assert " ".join(bound[12:15]) == "and 1 ms"  # 2 x 2.4 GB at 4,800 GB/s


def test_a_step_that_does_not_fit_is_one_sentence(capsys, monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory (17.91G).\nmore")

    pretend_described(monkeypatch, refuse)
    code, lines = run(capsys, *TINY, "--on", "h200:8")
    assert "--on h200:8: the step does not fit. XLA: Ran out of memory (17.91G). Take a" in code
    assert "\n" not in code
    assert any("in all" in line for line in lines)


def test_tpus_are_slices_of_their_size():
    """The arrangement of a slice has as many chips as it says, and a peak is known for each."""
    for accelerator in topologies.ACCELERATORS.values():
        assert accelerator.kind in PEAK_FLOPS
        for chips, arrangement in accelerator.slices.items():
            assert math.prod(map(int, arrangement.split("x"))) == chips


def small(**changes):
    return dataclasses.replace(load_config(Config, [*TINY], "test"), **changes)


def test_memory_is_split_as_the_devices_split_it():
    def memory(config):
        steps = make_steps(config, 10, 5)
        return dry_run.estimate_memory(config, steps, jax.eval_shape(steps.init, 0))

    whole, split = memory(small()), memory(small(fsdp=8))
    assert whole.gradients == whole.weights
    assert 2 * whole.weights < whole.optimizer < 2.1 * whole.weights
    assert split.weights < whole.weights
    assert whole.collected == 0
    assert whole.weights - split.weights == split.collected * 7 // 8
    assert split.total - split.collected - split.activations == (
        split.weights + split.optimizer + split.gradients + split.images
    )
    assert (split.images, split.activations) == (whole.images, whole.activations)
    assert whole.images == 32 // 8 * 8 * 8 * 3
    assert memory(small(optimizer=Optimizer(ema=0.9))).average == whole.weights
    parts = whole.weights + whole.average + whole.optimizer + whole.gradients
    assert whole.total == parts + whole.images + whole.activations


def test_activations_by_hand():
    """A step of 8 images on 2 devices; 4 x 4 patches and a class token, in float32."""
    config = small(batch=8)
    model = config.model
    tokens = (model.image // model.patch) ** 2 + 1
    token = 10 * 16 * 4 + 2 * 32 * 4 + 2 * tokens * 6
    assert dry_run.activation_bytes(config, 2, remat=False) == 2 * 4 * tokens * token
    recomputed = 4 * tokens * (2 * 16 * 4 + token)
    assert dry_run.activation_bytes(config, 2, remat=True) == recomputed
    halves = dataclasses.replace(config, optimizer=Optimizer(accumulate=2))
    half = dry_run.activation_bytes(halves, 2, remat=False)
    assert 2 * half == dry_run.activation_bytes(config, 2, remat=False)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--on", "a100:8"], "h200:N, v5e:N, v5p:N, v6e:N, such as h200:8, not a100:8"),
        (["--on", "h200:0"], "--on must be here, none or one of h200:N, v5e:N"),
        (["--on", "v5e:6"], "v5e comes in slices of 1, 4, 8, 16, 32, 64, 128, 256 chips, not 6"),
        (["--classes", "ten"], "--classes must be a whole number of at least 1, not ten"),
        (["--images", "0"], "--images must be a whole number of at least 1, not 0"),
        (["--images"], "--images needs a value"),
        (["--batch", "1448"], "--batch 1448 is more than the 1438 images to train on"),
        (["--batch", "12"], "--batch must be a multiple of the 8 device"),
        (["--data", "folder:none"], "a dry run without the data needs --classes N and --images N"),
    ],
)
def test_mistakes_are_one_sentence(capsys, flags, words):
    code, _ = run(capsys, *TINY, *flags)
    assert words in code
    assert "\n" not in code
