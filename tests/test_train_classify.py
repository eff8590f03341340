"""train/classify.py and the modules below it: configs, the step, the log, and every mistake in one
line.
"""

import dataclasses
import functools
import json
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, one_line
from jax.sharding import PartitionSpec as P

from eval import classify as eval_classify
from ggem_jax.models.vit import ViTConfig, vit_config
from train import classify
from train.build import build_model
from train.cli import Refused, configs_of, from_dict, known_configs, load_config, to_dict
from train.config import Augment, Config, Data, Optimizer
from train.data import open_data
from train.digest import describe_data
from train.evaluate import Predictions
from train.log import Log, drop_lines_after, read_metrics
from train.run import read_run
from train.step import (
    accumulate_gradient,
    make_optimizer,
    make_steps,
    mix,
    normalise,
    split_over_fsdp,
)
from train.throughput import forward_flops


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two finished runs that differ in their pooling."""
    root = tmp_path_factory.mktemp("runs")
    for pool in ("ggem", "avg"):
        classify.main([*TINY, "--epochs", "2", "--pool.kind", pool, "--out", str(root / pool)])
    return root


def test_a_run_leaves_its_config_metrics_checkpoint_and_image(trained):
    run = trained / "ggem"
    config, facts = read_run(run)
    assert config == load_config(Config, [*TINY, "--epochs", "2", "--out", str(run)], "test")
    assert facts == describe_data(config, *open_data(config.data))
    assert (facts["classes"], facts["train"], facts["eval"]) == (list("0123456789"), 1438, 359)
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
        load_config(
            Config,
            [
                *TINY,
                "--model.dtype",
                "bfloat16",
                "--model.remat",
                "--epochs",
                "4",
                "--out",
                str(tmp_path / "run"),
            ],
            "test",
        ),
        quiet=True,
    )
    chex.assert_type(jax.tree.leaves(trained.state.params), jnp.float32)
    assert read_metrics(tmp_path / "run", "train")[-1]["loss"] < 2
    assert trained.result.top(1).mean() > 0.3


def test_a_finished_run_started_again_changes_nothing(trained, capsys):
    before = (trained / "ggem" / "metrics.jsonl").read_bytes()
    classify.main([*TINY, "--epochs", "2", "--out", str(trained / "ggem")])
    assert (trained / "ggem" / "metrics.jsonl").read_bytes() == before
    assert "resuming after step 90" in capsys.readouterr().err


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
    assert result["paired"]["only_first"] - result["paired"]["only_second"] == pytest.approx(
        359 * difference
    )


def test_the_evaluation_tool_prints_tables(trained, capsys):
    eval_classify.main([str(trained / "ggem"), str(trained / "avg")])
    said = capsys.readouterr().out
    assert "step 90, 359 images" in said
    assert "McNemar" in said
    assert "learned pool/p" in said


MISTAKES = {
    "unknown config": (["--config", "imagenet"], "--config must be one of .*digits"),
    "missing value": (["--config"], "--config needs a value"),
    "no config file": (
        ["--config-file", "nowhere.toml"],
        "the config file nowhere.toml cannot be read: No such file",
    ),
    "unknown flag": (
        ["--model.widht", "3"],
        "Unrecognized options: --model.widht, 3; perhaps --model.width",
    ),
    "wrong type": (["--batch", "many"], "--batch"),
    "wrong choice": (["--pool.kind", "sum"], "invalid choice 'sum'"),
    "unknown variant": (["--variant", "XXL/16"], "variant must be one of Ti, S, B, L, H"),
    "impossible model": (["--model.heads", "5"], "width must be a multiple of heads"),
    "class token": (["--pool.kind", "cls", "--model.no-class-token"], "cls_pool needs"),
    "groups": (["--pool.groups", "5"], "groups dividing the 16 channels"),
    "unknown data": (
        ["--data", "mnist"],
        "unknown data source 'mnist'; known are digits, folder:DIR, tfds:NAME",
    ),
    "missing folder": (["--data", "folder:nowhere"], "there is no folder nowhere"),
    "unprepared data": (
        ["--data", "tfds:mnist", "--data-dir", "nowhere"],
        "mnist is not prepared in nowhere .*--download",
    ),
    "batch": (
        ["--batch", "33"],
        r"--batch must be a multiple of 1 part\(s\) x 8 device\(s\), it is 33",
    ),
    "epochs": (["--epochs", "0"], "--epochs must be from 1e-6 to 1e9"),
    "fsdp": (["--fsdp", "3"], "--fsdp must divide the number of devices, 8"),
    "holdout": (["--data.holdout", "1.5"], "--data.holdout must be between 0 and 1, it is 1.5"),
    "warmup": (["--optimizer.warmup", "-1"], "--optimizer.warmup must be at least 0, it is -1"),
    "negative seed": (["--seed", "-1"], "--seed must be from 0 to 2147483647, it is -1"),
    "large seed": (["--seed", "3000000000"], "--seed must be from 0"),
    "registers": (["--model.registers", "-1"], "registers must be a whole number of at least 0"),
    "drop path": (["--model.drop-path", "2"], "drop_path must be a probability"),
    "float16": (["--model.dtype", "float16"], "--model.dtype must be float32 or bfloat16"),
    "bfloat16 weights": (
        ["--model.param-dtype", "bfloat16"],
        "--model.param-dtype must be float32",
    ),
    "pad": (["--augment.crop", "pad", "--augment.pad", "-1"], "--augment.pad must be at least 0"),
    "area": (
        ["--augment.crop", "resized", "--augment.min-area", "2"],
        "--augment.min-area must be above 0",
    ),
    "mixup": (["--augment.mixup", "-1"], "--augment.mixup must be at least 0"),
    "workers": (["--data.workers", "-1"], "--data.workers must be at least 1"),
    "split": (
        ["--data", "digits", "--data.eval-split", "val"],
        "--data.eval-split val is not in digits",
    ),
    "ema": (
        ["--optimizer.ema", "2"],
        "--optimizer.ema must be at least 0 and below 1, or None, it is 2",
    ),
    "layer decay": (["--optimizer.layer-decay", "-1"], "--optimizer.layer-decay must be above 0"),
    "parts": (["--optimizer.accumulate", "0"], "--optimizer.accumulate must be at least 1"),
    "nan": (["--optimizer.lr", "nan"], "--optimizer.lr must be at least 0, it is nan"),
    "no groups": (["--pool.groups", "0"], "--pool.groups must be a whole number"),
    "exponent": (["--pool.p", "-1"], "--pool.p must be from 1 to 1000"),
    "loss": (
        ["--optimizer.lr", "1e30", "--optimizer.clip", "None", "--log-every", "1"],
        "the (loss|grad norm) is (nan|inf) at step",
    ),
    "weights": (
        ["--optimizer.lr", "1e30", "--optimizer.clip", "None", "--stop-after", "5"],
        "the (loss|grad norm) is (nan|inf) at step 5",
    ),
}


@pytest.mark.parametrize(("flags", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line(tmp_path, capsys, flags, sentence):
    out = tmp_path / "run"
    said = one_line(capsys, classify.main, *TINY, "--out", out, *flags)
    assert said.startswith("train.classify: ")
    assert re.search(sentence, said), said
    assert not (out / "checkpoints").is_dir() or not any((out / "checkpoints").iterdir())


def test_other_settings_on_the_same_folder_are_refused(trained, capsys):
    said = one_line(
        capsys, classify.main, *TINY, "--epochs", "3", "--seed", "1", "--out", trained / "ggem"
    )
    assert (
        "holds a run with other settings (seed 0 there, 1 now; epochs 2.0 there, 3.0 now)" in said
    )


def test_a_refused_start_leaves_the_folder_free(tmp_path, capsys):
    one_line(capsys, classify.main, *TINY, "--pool.groups", "5", "--out", tmp_path / "run")
    classify.main([*TINY, "--epochs", "2", "--stop-after", "9", "--out", str(tmp_path / "run")])


def test_other_data_under_the_same_name_are_refused(tmp_path, capsys, class_folders):
    flags = [
        *TINY,
        "--data",
        f"folder:{class_folders}",
        "--batch",
        "8",
        "--epochs",
        "4",
        "--out",
        str(tmp_path / "run"),
    ]
    classify.main([*flags, "--stop-after", "5"])
    (class_folders / "train" / "ants" / "ants0.png").unlink()
    assert "data_found.train 30 there, 29 now" in one_line(capsys, classify.main, *flags)


def test_runs_on_other_images_are_not_compared_in_pairs(tmp_path, capsys, class_folders):
    other = class_folders.with_name("other")
    shutil.copytree(class_folders, other)
    for source in (class_folders, other):
        classify.main(
            [
                *TINY,
                "--data",
                f"folder:{source}",
                "--batch",
                "8",
                "--epochs",
                "4",
                "--stop-after",
                "1",
                "--out",
                str(tmp_path / source.name),
            ]
        )
    runs = [tmp_path / "pictures", tmp_path / "other"]
    eval_classify.main([*map(str, runs)])
    assert "McNemar" in capsys.readouterr().out
    shutil.copy(other / "test" / "ants" / "ants1.png", other / "test" / "ants" / "ants0.png")
    assert "were not evaluated on the same images" in one_line(capsys, eval_classify.main, *runs)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = one_line(capsys, classify.main, *TINY, "--out", tmp_path / "file" / "run")
    assert "Not a directory" in said


def test_mistakes_of_the_evaluation_tool_end_in_one_line(trained, tmp_path, capsys, class_folders):
    assert "is not a run of train.classify" in one_line(capsys, eval_classify.main, tmp_path)
    (tmp_path / "config.json").write_text((trained / "ggem" / "config.json").read_text())
    assert "has no checkpoint yet" in one_line(capsys, eval_classify.main, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for values, lacking in (
        ({**settings, "data_found": {"train": 3, "eval": 3}}, "classes"),
        ({name: settings[name] for name in settings if name != "data_found"}, "data_found"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert one_line(capsys, eval_classify.main, tmp_path).endswith(
            f"config.json is not that of a run of train.classify: it has no {lacking}, which the"
            " training writes when it starts: name the folder of a run, or train it again"
        )
    said = one_line(
        capsys, eval_classify.main, trained / "ggem", "--data", f"folder:{class_folders}"
    )
    assert said.endswith(
        "must have the same classes; only images to evaluate on are of ants, bees, cows"
    )


def test_broken_config_files_are_refused(tmp_path):
    for name, text, sentence in (
        ("a.toml", "batch = ", "is not TOML"),
        ("a.json", "{", "is not JSON"),
        ("d.json", "[1]", "is not JSON: settings by name are needed, not a list"),
        (
            "b.toml",
            "[model]\nwidht = 3",
            "in the config file .*b.toml: Unrecognized options: --model.widht",
        ),
        ("c.toml", 'variant = "XXL/4"', "variant must be one of"),
        ("e.toml", "variant = [3]", "variant must be one of"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(Refused, match=sentence):
            load_config(Config, ["--config-file", str(tmp_path / name)], "test")


def test_defaults_then_config_then_file_then_variant_then_flags(tmp_path):
    lines = (
        'variant = "S/2"',
        "batch = 96",
        "[optimizer]",
        "clip = 2.0",
        "[augment]",
        "flip = true",
        "[data]",
        "mean = [0.1, 0.2, 0.3]",
    )
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    config = load_config(
        Config,
        [
            "--config",
            "digits",
            "--config-file",
            str(tmp_path / "mine.toml"),
            "--batch",
            "32",
            "--model.depth",
            "5",
        ],
        "test",
    )
    assert (config.model.width, config.model.depth, config.model.image) == (384, 5, 8)
    assert (config.batch, config.optimizer.clip, config.optimizer.lr, config.augment.flip) == (
        32,
        2.0,
        3e-3,
        True,
    )
    assert config.data.mean == (0.1, 0.2, 0.3)
    other = load_config(
        Config,
        [
            "--config-file",
            str(tmp_path / "mine.toml"),
            "--variant",
            "B/16",
            "--augment.no-flip",
            "--optimizer.clip",
            "None",
        ],
        "test",
    )
    assert (other.model, other.augment.flip, other.optimizer.clip) == (
        vit_config("B/16"),
        False,
        None,
    )
    assert from_dict(Config, to_dict(other)) == other


def test_layers_only_have_to_fit_together(tmp_path):
    config = load_config(
        Config, ["--config", "digits", "--variant", "S/16", "--model.image", "224"], "test"
    )
    assert (config.model, config.data.source) == (vit_config("S/16"), "digits")
    (tmp_path / "mine.toml").write_text("[model]\nimage = 30\n")
    assert (
        load_config(
            Config, ["--config-file", str(tmp_path / "mine.toml"), "--model.patch", "5"], "test"
        ).model.image
        == 30
    )
    with pytest.raises(
        Refused, match="image must be a multiple of patch, not 8 with patches of 16"
    ) as caught:
        load_config(Config, ["--config", "digits", "--variant", "S/16"], "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", known_configs(Config))
def test_every_config_loads_and_says_its_command_and_what_to_expect(name):
    config = load_config(Config, ["--config", name], "test")
    assert isinstance(config, Config)
    header = (configs_of(Config) / f"{name}.toml").read_text()
    assert f"python -m train.classify --config {name}" in header
    assert "Expect" in header


STEPS = 90  # as in the runs of `trained`, whose compiled programs these tests use again
PLAIN = Optimizer(lr=1e-2, warmup=0, weight_decay=0.1, clip=None, exponent_lr=1.0, ema=0.25)


def small_config(**changes):
    config = load_config(Config, [*TINY], "test")
    return config if not changes else Config(**{**vars(config), **changes})


def batch_of(config, count=16):
    rng = np.random.default_rng(0)
    side = config.model.image
    return {
        "image": rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8),
        "label": rng.integers(0, 10, count).astype(np.int32),
    }


def test_one_step_is_adamw_on_the_mean_cross_entropy():
    """The jitted, sharded step against the same step written out with optax."""
    config = small_config(optimizer=PLAIN)
    steps, batch = make_steps(config, 10, STEPS), batch_of(config)
    state = steps.init(0)
    params = jax.tree.map(np.asarray, state.params)
    model = build_model(config, 10)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits = model.apply(
            {"params": params}, normalise(jnp.array(batch["image"]), config.data)
        ).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    value, slope = loss(params)
    state, metrics = steps.train(
        state, {name: jnp.array(array) for name, array in batch.items()}, 0
    )
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(slope)), rel=1e-4)
    moved = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, params)
    kernel, bias = moved["head"]["kernel"], moved["head"]["bias"]
    np.testing.assert_allclose(
        kernel, -1e-2 * np.sign(slope["head"]["kernel"]), atol=2e-4
    )  # the head starts at 0, so nothing decays yet
    np.testing.assert_allclose(bias, -1e-2 * np.sign(slope["head"]["bias"]), atol=2e-4)
    # Gradients reach the blocks from the second step on, through the head; until then only their
    # decay moves them.
    block = ("blocks_0", "mlp", "in", "kernel")
    np.testing.assert_allclose(
        at(moved, block), -1e-2 * 0.1 * at(params, block), rtol=1e-3, atol=1e-7
    )
    assert not at(moved, ("norm", "scale")).any()
    chex.assert_trees_all_close(
        state.ema,
        jax.tree.map(lambda old, new: 0.1 * old + 0.9 * np.asarray(new), params, state.params),
        rtol=1e-5,
        atol=1e-7,
    )
    assert state.evaluated is state.ema
    assert int(state.step) == 1


def at(tree, path):
    return functools.reduce(lambda branch, name: branch[name], path, tree)


def test_the_moving_average_starts_fast_and_ends_at_its_decay():
    """At step t the decay is (1 + t) / (10 + t) until that exceeds the given decay: here from t = 2
    on.
    """
    config = small_config(optimizer=PLAIN)
    steps, batch = make_steps(config, 10, STEPS), batch_of(config)
    state = steps.init(0)
    ema = jax.device_get(state.params)
    for decay in (0.1, 2 / 11, 0.25, 0.25):
        state, _ = steps.train(state, batch, 0)
        ema = jax.tree.map(
            lambda old, new, decay=decay: decay * old + (1 - decay) * np.asarray(new),
            ema,
            state.params,
        )
        chex.assert_trees_all_close(state.ema, ema, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_equal(
        make_steps(small_config(), 10, STEPS).init(0).evaluated,
        make_steps(small_config(), 10, STEPS).init(0).params,
    )


def test_the_optimizer_is_the_chain_that_its_settings_say():
    """Three steps against optax written out, with no setting at its default."""
    settings = Optimizer(
        lr=2e-2,
        warmup=2,
        weight_decay=0.3,
        beta1=0.8,
        beta2=0.9,
        clip=0.5,
        exponent_lr=3.0,
        layer_decay=0.5,
    )
    rng = np.random.default_rng(0)
    leaf = {
        "kernel": jnp.array(rng.normal(size=(3, 4)), jnp.float32),
        "bias": jnp.array(rng.normal(size=4), jnp.float32),
    }
    params = {
        "blocks_0": leaf,
        "blocks_1": leaf,
        "head": leaf,
        "pool": {"p": jnp.array([3.0, 2.0])},
    }
    scale = {"blocks_0": 0.25, "blocks_1": 0.5, "head": 1.0, "pool": 3.0}
    schedule = [0.0, 1e-2, 2e-2]  # a warm-up of two steps; the cosine starts with the third
    found, want = params, params
    transform = make_optimizer(settings, 10)
    state = transform.init(found)
    adam, adam_state = optax.scale_by_adam(b1=0.8, b2=0.9), optax.scale_by_adam().init(want)
    for rate in schedule:
        gradient = jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape), jnp.float32), params)
        updates, state = transform.update(gradient, state, found)
        found = optax.apply_updates(found, updates)
        norm = optax.tree.norm(gradient)
        clipped = jax.tree.map(lambda g, norm=norm: g * 0.5 / norm, gradient)
        direction, adam_state = adam.update(clipped, adam_state)
        want = {
            part: {
                name: value
                - rate
                * scale[part]
                * (direction[part][name] + (0.3 * value if name == "kernel" else 0))
                for name, value in leaves.items()
            }
            for part, leaves in want.items()
        }
        chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-6)
    last = transform.update(
        gradient, jax.tree.map(lambda x: x * 0 + 10 if x.dtype == jnp.int32 else x, state), found
    )[0]
    chex.assert_trees_all_close(
        last, jax.tree.map(jnp.zeros_like, last), atol=1e-9
    )  # after the last step the cosine is zero


def test_labels_are_smoothed():
    """With a head of zeros every class has the same logit: each smoothed target gives the same
    loss, log 10; the gradient tells them apart.
    """
    plain, smooth = (
        make_steps(small_config(optimizer=PLAIN, augment=Augment(label_smoothing=s)), 10, STEPS)
        for s in (0.0, 0.5)
    )
    batch, bias = batch_of(small_config()), []
    for steps in (plain, smooth):
        state = steps.init(0)
        _, metrics = steps.train(state, batch, 0)
        assert metrics["loss"] == pytest.approx(np.log(10), rel=1e-5)
        bias.append(float(metrics["grad_norm"]))
    assert bias[1] == pytest.approx(
        bias[0] / 2, rel=1e-4
    )  # targets half as far from the uniform prediction


def test_blocks_are_recomputed_when_asked_to():
    batch = batch_of(small_config())
    for remat in (False, True):
        config = load_config(Config, [*TINY, *(["--model.remat"] if remat else [])], "test")
        steps = make_steps(config, 10, STEPS)
        assert (
            "remat" in str(steps.train.trace(jax.eval_shape(steps.init, 0), batch, 0).jaxpr)
        ) == remat


def test_configs_of_every_pooling_find_their_compiled_steps_again():
    for kind in ("cls", "relu-avg", "lse", "ggem"):
        config = load_config(Config, [*TINY, "--pool.kind", kind], "test")
        assert make_steps(config, 10, STEPS) is make_steps(
            load_config(Config, [*TINY, "--pool.kind", kind, "--seed", "3"], "test"), 10, STEPS
        )


def test_predictions_that_are_no_numbers_are_wrong():
    probability = np.array(
        [[0.7, 0.2, 0.1], [np.nan] * 3, [0.5, 0.5, 0.0], [0.1, 0.2, 0.7]], np.float32
    )
    predictions = Predictions(
        np.arange(4), np.array([0, 0, 0, 1]), np.zeros(4, np.uint32), probability
    )
    assert predictions.top(1).tolist() == [
        True,
        False,
        False,
        False,
    ]  # ties count against the model
    assert predictions.top(2).tolist() == [True, False, True, True]
    assert predictions.top(5).tolist() == [True, False, True, True]


def test_without_any_choice_of_data_the_config_is_digits():
    assert load_config(Config, [], "test") == load_config(Config, ["--config", "digits"], "test")
    assert load_config(Config, ["--variant", "Ti/4"], "test").data.source == "digits"
    for flags in (["--data", "folder:x"], ["--data=folder:x"], ["--data.source", "folder:x"]):
        assert load_config(Config, flags, "test").model == vit_config("Ti/16")


def test_a_damaged_checkpoint_is_one_line(tmp_path, capsys):
    flags = [*TINY, "--epochs", "2", "--stop-after", "9", "--out", str(tmp_path / "run")]
    classify.main(flags)
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for main, arguments in ((classify.main, flags), (eval_classify.main, [tmp_path / "run"])):
        said = one_line(capsys, main, *arguments)
        assert f"the checkpoint of step {folder.name} cannot be read" in said


def test_parts_of_a_batch_give_the_gradient_of_the_whole():
    rng = np.random.default_rng(0)
    images, targets = rng.normal(size=(12, 4)), rng.normal(size=(12, 2))
    params = {"w": jnp.array(rng.normal(size=(4, 2)), jnp.float32)}

    def loss_of(params, batch, key):
        return jnp.mean((batch["image"] @ params["w"] - batch["target"]) ** 2)

    batch = {"image": jnp.float32(images), "target": jnp.float32(targets)}
    whole = accumulate_gradient(loss_of, params, batch, jax.random.key(0), 1)
    parts = accumulate_gradient(loss_of, params, batch, jax.random.key(0), 3)
    chex.assert_trees_all_close(parts, whole, rtol=1e-5)


def test_mixing_keeps_the_share_of_the_labels_equal_to_that_of_the_pixels():
    """Black images of class 0 and white ones of class 1: the mean brightness is the weight of
    class 1.
    """
    images = jnp.concatenate([jnp.zeros((4, 16, 16, 3)), jnp.ones((4, 16, 16, 3))])
    targets = jax.nn.one_hot(jnp.array([0] * 4 + [1] * 4), 2)
    for augment in (Augment(mixup=0.8), Augment(cutmix=1.0), Augment(mixup=0.8, cutmix=1.0)):
        kinds = set()
        for seed in range(12):
            mixed, labels = mix(images, targets, augment, jax.random.key(seed))
            np.testing.assert_allclose(mixed.mean((1, 2, 3)), labels[:, 1], atol=1e-5)
            kinds.add("cut" if set(np.unique(mixed)) <= {0.0, 1.0} else "up")
        assert kinds == {
            kind for kind, alpha in (("up", augment.mixup), ("cut", augment.cutmix)) if alpha
        }
    np.testing.assert_array_equal(mix(images, targets, Augment(), jax.random.key(0))[0], images)


def test_weights_are_split_along_their_longest_axis():
    assert split_over_fsdp((48, 192), 4) == P(None, "fsdp")
    assert split_over_fsdp((192, 3, 16), 4) == P("fsdp")
    assert split_over_fsdp((3, 5), 4) == P()
    assert split_over_fsdp((192,), 4) == P()
    assert split_over_fsdp((48, 192), 1) == P()


def test_fsdp_state_takes_the_share_of_a_device():
    steps = make_steps(small_config(fsdp=8), 10, STEPS)
    state = steps.init(0)
    kernel = state.params["blocks_0"]["mlp"]["in"]["kernel"]
    assert kernel.shape == (16, 32)
    assert kernel.addressable_shards[0].data.shape == (16, 4)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (16, 32)]
    assert moments
    assert all(leaf.addressable_shards[0].data.shape == (16, 4) for leaf in moments)


@pytest.mark.parametrize("pool", ["cls", "avg", "max", "lse", "gem", "ggem", "map"])
def test_the_training_step_lowers_for_tpu_without_a_custom_call_of_ours(pool):
    config = load_config(Config, [*TINY, "--pool.kind", pool, "--augment.mixup", "0.2"], "test")
    steps, batch = make_steps(config, 10, STEPS), batch_of(config)
    text = (
        steps.train.trace(jax.eval_shape(steps.init, 0), batch, 0)
        .lower(lowering_platforms=("tpu",))
        .as_text()
    )
    calls = {
        line.split("custom_call @")[1].split("(")[0]
        for line in text.splitlines()
        if "custom_call @" in line
    }
    assert calls <= {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}


def test_flops_of_a_published_model():
    """ViT-B/16 at 224 px takes 17.56 GFLOPs of multiply-adds in torchvision's table, where the
    attention products are counted too.
    """
    assert forward_flops(vit_config("B/16"), 1000) / 2 == pytest.approx(17.56e9, rel=0.01)
    hand = ViTConfig(patch=2, width=4, depth=1, heads=1, mlp_width=8, image=4, class_token=False)
    tokens = 4
    macs = tokens * 12 * 4 + 4 * tokens * 16 + 2 * tokens**2 * 4 + 2 * tokens * 4 * 8 + 4 * 3
    assert forward_flops(hand, 3) == 2 * macs
    assert forward_flops(dataclasses.replace(hand, mlp="swiglu"), 3) == 2 * (macs + tokens * 4 * 8)


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for torn in (
        '{"kind": "eval", "ste',
        '{"kind": "eval", "step": 2, "p": {"pool/p": [1.0]}',
        "\\udce2",
    ):
        path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 3}\n' + torn)
        drop_lines_after(path, 2)
        assert path.read_text() == '{"kind": "train", "step": 1}\n'


def test_the_log_writes_json_lines_and_speaks(tmp_path, capsys):
    log = Log(tmp_path, total_steps=3, start=0)
    log.banner({"model": "small"})
    log.metrics("train", 1, {"loss": 0.5}, "step 1")
    log.close()
    assert read_metrics(tmp_path, "train") == [{"kind": "train", "step": 1, "loss": 0.5}]
    assert capsys.readouterr().err == "model  small\nstep 1\n"


def test_a_cut_last_line_is_left_out_and_other_damage_is_one_sentence(tmp_path):
    path, whole = tmp_path / "metrics.jsonl", '{"kind": "train", "step": 1}\n'
    for cut in ('{"kind": "tra', '{"kind": "train", "step": 2', "3", "\udce2"):
        path.write_bytes((whole + cut).encode(errors="surrogateescape"))
        assert read_metrics(tmp_path, "train") == [{"kind": "train", "step": 1}]
    path.write_text(whole + whole.strip())  # complete, without its end
    assert len(read_metrics(tmp_path, "train")) == 2
    for damaged, number in (('{"kind"\n' + whole, 1), (whole + "3\n", 2), (whole + "{}\n", 2)):
        path.write_text(damaged)
        with pytest.raises(Refused, match=rf"line {number} of .*metrics.jsonl is damaged: delete"):
            read_metrics(tmp_path, "train")


def test_pixels_are_normalised_as_published_models_expect():
    data = Data()
    image = np.zeros((1, 1, 1, 3), np.uint8) + np.array([255, 0, 128], np.uint8)
    want = [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
    np.testing.assert_allclose(normalise(jnp.array(image), data)[0, 0, 0], want, rtol=1e-5)
