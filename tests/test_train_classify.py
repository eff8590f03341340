"""train/classify.py and what it stands on: configs, the step, the log, and every mistake in one line."""

import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY
from jax.sharding import PartitionSpec as P

from eval import classify as eval_classify
from ggem_jax.models.vit import ViTConfig, vit_config
from train import classify
from train.config import Augment, Config, Data, Optimizer, Refused, build_model, from_dict, known_configs, load_config, to_dict
from train.log import Log, keep_until, read_metrics
from train.run import read_run
from train.step import accumulated_gradient, make_steps, mix, normalise, split_over_fsdp
from train.throughput import forward_flops


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two finished runs that differ in their pooling."""
    root = tmp_path_factory.mktemp("runs")
    for pool in ("ggem", "avg"):
        classify.main([*TINY, "--epochs", "2", "--pool.kind", pool, "--out", str(root / pool)])
    return root


def test_a_run_leaves_its_config_metrics_checkpoint_and_picture(trained):
    run = trained / "ggem"
    assert read_run(run) == (load_config([*TINY, "--epochs", "2", "--out", str(run)], "test"), tuple("0123456789"))
    lines = read_metrics(run, "train")
    assert lines[-1]["step"] == 90
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"images_per_second", "mfu", "input_wait", "grad_norm"} <= lines[-1].keys()
    final = read_metrics(run, "eval")[-1]
    assert (final["step"], final["images"]) == (90, 359)
    assert 0.3 < final["top1"] <= final["top5"] <= 1
    assert len(final["p"]["pool/p"]) == 2
    assert all(p != 3 for p in final["p"]["pool/p"])
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["90"]
    assert any((run / "tensorboard").iterdir())


def test_a_run_in_bfloat16_that_recomputes_its_blocks_learns(tmp_path):
    trained = classify.train(
        load_config([*TINY, "--model.dtype", "bfloat16", "--model.remat", "--epochs", "4", "--out", str(tmp_path / "run")], "test"), quiet=True
    )
    chex.assert_type(jax.tree.leaves(trained.state.params), jnp.float32)
    assert read_metrics(tmp_path / "run", "train")[-1]["loss"] < 2
    assert trained.predictions.top(1).mean() > 0.3


def test_a_finished_run_started_again_changes_nothing(trained, capsys):
    before = (trained / "ggem" / "metrics.jsonl").read_bytes()
    classify.main([*TINY, "--epochs", "2", "--out", str(trained / "ggem")])
    assert (trained / "ggem" / "metrics.jsonl").read_bytes() == before
    assert "going on after step 90" in capsys.readouterr().err


def test_the_evaluation_tool_repeats_the_last_evaluation_of_the_run(trained, capsys):
    eval_classify.main([str(trained / "ggem"), str(trained / "avg"), "--json"])
    result = json.loads(capsys.readouterr().out)
    for run, entry in zip(("ggem", "avg"), result["runs"], strict=True):
        final = read_metrics(trained / run, "eval")[-1]
        assert entry["top1"]["value"] == pytest.approx(final["top1"], abs=1e-9)
        assert entry["nll"] == pytest.approx(final["nll"], rel=1e-5)
        assert entry["top1"]["low"] < entry["top1"]["value"] < entry["top1"]["high"]
        assert sum(row["images"] for row in entry["by_class"]) == 359
        right = sum(row["images"] * row["top1"]["value"] for row in entry["by_class"])
        assert right == pytest.approx(359 * entry["top1"]["value"])
    difference = result["runs"][0]["top1"]["value"] - result["runs"][1]["top1"]["value"]
    assert result["paired"]["difference"]["value"] == pytest.approx(difference)
    assert result["paired"]["only_first"] - result["paired"]["only_second"] == pytest.approx(359 * difference)


def test_the_evaluation_tool_prints_tables(trained, capsys):
    eval_classify.main([str(trained / "ggem"), str(trained / "avg")])
    said = capsys.readouterr().out
    assert "step 90, 359 pictures" in said
    assert "McNemar" in said
    assert "learned pool/p" in said


def one_line(capsys, main, *flags):
    """The sentence that a tool ends with."""
    with pytest.raises(SystemExit) as caught:
        main([*map(str, flags)])
    assert isinstance(caught.value.code, str), "the exit code of a sentence is 1"
    assert "\n" not in caught.value.code
    assert "Traceback" not in capsys.readouterr().err
    return caught.value.code


MISTAKES = {
    "unknown config": (["--config", "imagenet"], "--config must be one of .*digits"),
    "missing value": (["--config"], "--config needs a value"),
    "no config file": (["--config-file", "nowhere.toml"], "the config file nowhere.toml cannot be read: No such file"),
    "unknown flag": (["--model.widht", "3"], "Unrecognized options: --model.widht, 3; perhaps --model.width"),
    "wrong type": (["--batch", "many"], "--batch"),
    "wrong choice": (["--pool.kind", "sum"], "invalid choice 'sum'"),
    "unknown variant": (["--variant", "XXL/16"], "variant must be one of Ti, S, B, L, H"),
    "impossible model": (["--model.heads", "5"], "width must be a multiple of heads"),
    "class token": (["--pool.kind", "cls", "--model.no_class_token"], "cls_pool needs"),
    "groups": (["--pool.groups", "5"], "groups dividing the 16 channels"),
    "unknown data": (["--data", "mnist"], "unknown data source 'mnist'; known are digits, folder:DIR, tfds:NAME"),
    "missing folder": (["--data", "folder:nowhere"], "there is no folder nowhere"),
    "unprepared data": (["--data", "tfds:mnist", "--data-dir", "nowhere"], "mnist is not prepared in nowhere .*--download"),
    "batch": (["--batch", "33"], r"--batch must be a positive multiple of 1 part\(s\) x 8 device\(s\), it is 33"),
    "epochs": (["--epochs", "0"], "--epochs must be positive"),
    "fsdp": (["--fsdp", "3"], "--fsdp must divide the number of devices, 8"),
    "holdout": (["--data.holdout", "1.5"], "data.holdout must lie between 0 and 1"),
    "warmup": (["--optimizer.warmup", "-1"], "warmup must not be negative"),
    "loss": (["--optimizer.lr", "1e30", "--optimizer.clip", "None", "--log_every", "1"], "the loss is nan at step"),
}


@pytest.mark.parametrize(("flags", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line(tmp_path, capsys, flags, sentence):
    out = tmp_path / "run"
    said = one_line(capsys, classify.main, *TINY, "--out", out, *flags)
    assert said.startswith("train.classify: ")
    assert re.search(sentence, said), said
    assert not (out / "checkpoints").is_dir() or not any((out / "checkpoints").iterdir())


def test_other_settings_on_the_same_folder_are_refused(trained, capsys):
    said = one_line(capsys, classify.main, *TINY, "--epochs", "3", "--seed", "1", "--out", trained / "ggem")
    assert "holds a run with other settings (seed 0 there, 1 now; epochs 2.0 there, 3.0 now)" in said


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = one_line(capsys, classify.main, *TINY, "--out", tmp_path / "file" / "run")
    assert "Not a directory" in said


def test_mistakes_of_the_evaluation_tool_end_in_one_line(trained, tmp_path, capsys, class_folders):
    assert "is no run of train.classify" in one_line(capsys, eval_classify.main, tmp_path)
    (tmp_path / "config.json").write_text((trained / "ggem" / "config.json").read_text())
    assert "has no checkpoint yet" in one_line(capsys, eval_classify.main, tmp_path)
    said = one_line(capsys, eval_classify.main, trained / "ggem", "--data", f"folder:{class_folders}")
    assert "was trained on the classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, but folder:" in said


def test_broken_config_files_are_refused(tmp_path):
    for name, text, sentence in (
        ("a.toml", "batch = ", "is not TOML"),
        ("a.json", "{", "is not JSON"),
        ("b.toml", "[model]\nwidht = 3", "in the config file .*b.toml: Unrecognized options: --model.widht"),
        ("c.toml", 'variant = "XXL/4"', "variant must be one of"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(Refused, match=sentence):
            load_config(["--config-file", str(tmp_path / name)], "test")


def test_defaults_then_config_then_file_then_variant_then_flags(tmp_path):
    lines = 'variant = "S/2"', "batch = 96", "[optimizer]", "clip = 2.0", "[augment]", "flip = true", "[data]", "mean = [0.1, 0.2, 0.3]"
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    config = load_config(["--config", "digits", "--config-file", str(tmp_path / "mine.toml"), "--batch", "32", "--model.depth", "5"], "test")
    assert (config.model.width, config.model.depth, config.model.image) == (384, 5, 8)
    assert (config.batch, config.optimizer.clip, config.optimizer.lr, config.augment.flip) == (32, 2.0, 3e-3, True)
    assert config.data.mean == (0.1, 0.2, 0.3)
    other = load_config(["--config-file", str(tmp_path / "mine.toml"), "--variant", "B/16", "--augment.no-flip", "--optimizer.clip", "None"], "test")
    assert (other.model, other.augment.flip, other.optimizer.clip) == (vit_config("B/16"), False, None)
    assert from_dict(to_dict(other)) == other


@pytest.mark.parametrize("name", known_configs())
def test_every_config_loads_and_says_its_command_and_what_to_expect(name):
    config = load_config(["--config", name], "test")
    assert isinstance(config, Config)
    header = (Path(classify.__file__).parent / "configs" / f"{name}.toml").read_text()
    assert f"python -m train.classify --config {name}" in header
    assert "Expect" in header


def small_config(**changes):
    config = load_config([*TINY], "test")
    return config if not changes else Config(**{**vars(config), **changes})


def batch_of(config, count=16):
    rng = np.random.default_rng(0)
    side = config.model.image
    return {"image": rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8), "label": rng.integers(0, 10, count).astype(np.int32)}


def test_one_step_is_adamw_on_the_mean_cross_entropy():
    """The jitted, sharded step against the same step written out with optax."""
    config = small_config(optimizer=Optimizer(lr=1e-2, warmup=0, weight_decay=0.1, clip=None, exponent_lr=1.0, ema=0.75))
    steps, batch = make_steps(config, 10, 100), batch_of(config)
    state = steps.init(0)
    params = jax.tree.map(np.asarray, state.params)
    model = build_model(config, 10)

    def loss(params):
        logits = model.apply({"params": params}, normalise(jnp.array(batch["image"]), config.data)).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    value, slope = jax.value_and_grad(loss)(params)
    state, metrics = steps.train(state, {name: jnp.array(array) for name, array in batch.items()}, 0)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(slope)), rel=1e-4)
    moved = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, params)
    kernel, bias = moved["head"]["kernel"], moved["head"]["bias"]
    np.testing.assert_allclose(kernel, -1e-2 * np.sign(slope["head"]["kernel"]), atol=2e-4)  # the head starts at 0, so nothing decays yet
    np.testing.assert_allclose(bias, -1e-2 * np.sign(slope["head"]["bias"]), atol=2e-4)
    np.testing.assert_allclose(moved["norm"]["scale"], -1e-2 * np.sign(slope["norm"]["scale"]), atol=2e-2)
    chex.assert_trees_all_close(state.ema, jax.tree.map(lambda old, new: 0.75 * old + 0.25 * np.asarray(new), params, state.params), rtol=1e-6)
    assert int(state.step) == 1


def test_parts_of_a_batch_give_the_gradient_of_the_whole():
    rng = np.random.default_rng(0)
    images, targets = rng.normal(size=(12, 4)), rng.normal(size=(12, 2))
    params = {"w": jnp.array(rng.normal(size=(4, 2)), jnp.float32)}

    def loss_of(params, images, targets, key):
        return jnp.mean((images @ params["w"] - targets) ** 2)

    whole = accumulated_gradient(loss_of, params, jnp.float32(images), jnp.float32(targets), jax.random.key(0), 1)
    parts = accumulated_gradient(loss_of, params, jnp.float32(images), jnp.float32(targets), jax.random.key(0), 3)
    chex.assert_trees_all_close(parts, whole, rtol=1e-5)


def test_mixing_keeps_the_share_of_the_labels_equal_to_that_of_the_pixels():
    """Black pictures of class 0 and white ones of class 1: the mean brightness is the weight of class 1."""
    images = jnp.concatenate([jnp.zeros((4, 16, 16, 3)), jnp.ones((4, 16, 16, 3))])
    targets = jax.nn.one_hot(jnp.array([0] * 4 + [1] * 4), 2)
    for augment in (Augment(mixup=0.8), Augment(cutmix=1.0), Augment(mixup=0.8, cutmix=1.0)):
        kinds = set()
        for seed in range(12):
            mixed, labels = mix(images, targets, augment, jax.random.key(seed))
            np.testing.assert_allclose(mixed.mean((1, 2, 3)), labels[:, 1], atol=1e-5)
            kinds.add("cut" if set(np.unique(mixed)) <= {0.0, 1.0} else "up")
        assert kinds == {kind for kind, alpha in (("up", augment.mixup), ("cut", augment.cutmix)) if alpha}
    np.testing.assert_array_equal(mix(images, targets, Augment(), jax.random.key(0))[0], images)


def test_weights_are_split_along_their_longest_axis():
    assert split_over_fsdp((48, 192), 4) == P(None, "fsdp")
    assert split_over_fsdp((192, 3, 16), 4) == P("fsdp")
    assert split_over_fsdp((3, 5), 4) == P()
    assert split_over_fsdp((192,), 4) == P()
    assert split_over_fsdp((48, 192), 1) == P()


def test_fsdp_state_takes_the_share_of_a_device():
    steps = make_steps(small_config(fsdp=8), 10, 100)
    state = steps.init(0)
    kernel = state.params["blocks_0"]["mlp"]["in"]["kernel"]
    assert kernel.shape == (16, 32)
    assert kernel.addressable_shards[0].data.shape == (16, 4)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (16, 32)]
    assert moments
    assert all(leaf.addressable_shards[0].data.shape == (16, 4) for leaf in moments)


@pytest.mark.parametrize("pool", ["cls", "avg", "max", "lse", "gem", "ggem", "map"])
def test_the_training_step_lowers_for_tpu_without_a_custom_call_of_ours(pool):
    config = load_config([*TINY, "--pool.kind", pool, "--augment.mixup", "0.2"], "test")
    steps, batch = make_steps(config, 10, 100), batch_of(config)
    text = steps.train.trace(jax.eval_shape(steps.init, 0), batch, 0).lower(lowering_platforms=("tpu",)).as_text()
    calls = {line.split("custom_call @")[1].split("(")[0] for line in text.splitlines() if "custom_call @" in line}
    assert calls <= {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}


def test_flops_of_a_published_model():
    """ViT-B/16 at 224 px takes 17.56 GFLOPs of multiply-adds in torchvision's table, where the attention products are counted too."""
    assert forward_flops(vit_config("B/16"), 1000) / 2 == pytest.approx(17.56e9, rel=0.01)
    hand = ViTConfig(patch=2, width=4, depth=1, heads=1, mlp_width=8, image=4, class_token=False)
    tokens = 4
    macs = tokens * 12 * 4 + 4 * tokens * 16 + 2 * tokens**2 * 4 + 2 * tokens * 4 * 8 + 4 * 3
    assert forward_flops(hand, 3) == 2 * macs


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 3}\n{"kind": "eval", "ste')
    keep_until(path, 2)
    assert path.read_text() == '{"kind": "train", "step": 1}\n'


def test_the_log_writes_json_lines_and_speaks(tmp_path, capsys):
    log = Log(tmp_path, total_steps=3, start=0)
    log.banner({"model": "small"})
    log.metrics("train", 1, {"loss": 0.5}, "step 1")
    log.close()
    assert read_metrics(tmp_path, "train") == [{"kind": "train", "step": 1, "loss": 0.5}]
    assert capsys.readouterr().err == "model  small\nstep 1\n"


def test_pixels_are_normalised_as_published_models_expect():
    data = Data()
    image = np.zeros((1, 1, 1, 3), np.uint8) + np.array([255, 0, 128], np.uint8)
    want = [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
    np.testing.assert_allclose(normalise(jnp.array(image), data)[0, 0, 0], want, rtol=1e-5)
