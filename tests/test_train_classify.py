"""train/classify.py and its evaluation: what a run leaves, and every mistake in one line."""

import dataclasses
import json
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, one_line

from eval import classify as eval_classify
from ggem_jax.models.vit import ViTConfig, vit_config
from train import classify
from train.cli import load_config
from train.config import Config
from train.data import open_data
from train.digest import describe_data
from train.evaluate import Predictions
from train.log import read_metrics
from train.run import read_run
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


def test_a_damaged_checkpoint_is_one_line(tmp_path, capsys):
    flags = [*TINY, "--epochs", "2", "--stop-after", "9", "--out", str(tmp_path / "run")]
    classify.main(flags)
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for main, arguments in ((classify.main, flags), (eval_classify.main, [tmp_path / "run"])):
        said = one_line(capsys, main, *arguments)
        assert f"the checkpoint of step {folder.name} cannot be read" in said


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
