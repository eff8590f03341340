"""train/contrastive.py: batches, towers and step; exact resuming; every mistake in one line."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TINY_PAIR, one_line
from test_train_tokenizer import CAPTIONS

from ggem_jax.losses.contrastive import clip_loss, siglip_loss
from ggem_jax.weights import write_safetensors
from ggem_jax.weights.vit import read_vit
from train import contrastive
from train.batches import train_batches
from train.checkpoints import Checkpoints
from train.cli import Refused, configs_of, from_dict, known_configs, load_config, to_dict
from train.config import Data
from train.contrastive import (
    ContrastiveConfig,
    caption_sampler,
    make_steps,
    make_towers,
    open_pairs,
)
from train.log import read_metrics
from train.loop import make_first_state
from train.pairs import read_csv
from train.step import normalise
from train.tokenizer import read_tokenizer, train_tokenizer
from train.towers import clip_from_above


def config_of(*flags):
    return load_config(ContrastiveConfig, [*TINY_PAIR, *map(str, flags)], "test")


def test_shuffled_captions_are_those_of_other_images(captioned_folder):
    pairs = read_csv(f"{captioned_folder}/pairs.csv", Data())
    shuffled = pairs.shuffled(3)
    assert sorted(shuffled.captions) == sorted(pairs.captions)
    assert all(one != other for one, other in zip(shuffled.captions, pairs.captions, strict=True))
    assert shuffled.captions == pairs.shuffled(3).captions != pairs.shuffled(4).captions
    assert (
        shuffled.digest()
        != pairs.digest()
        == read_csv(f"{captioned_folder}/pairs.csv", Data()).digest()
    )
    plain, control = (open_pairs(config_of(*flags)) for flags in ([], ["--text.shuffle-captions"]))
    assert plain[0].captions != control[0].captions
    assert plain[1].captions == control[1].captions  # evaluation captions are unchanged


def test_batches_draw_a_caption_of_their_image(captioned_folder):
    pairs = read_csv(f"{captioned_folder}/pairs.csv", Data())
    config = config_of(
        "--data", f"csv:{captioned_folder}/pairs.csv", "--batch", "8", "--model.image", "8"
    )
    tokenizer = train_tokenizer(CAPTIONS, 280)
    beside = caption_sampler(pairs, tokenizer, 30)
    batches = [
        next_
        for next_, _ in zip(
            train_batches(pairs.images, config, start=0, beside=beside), range(12), strict=False
        )
    ]
    drawn = [row.tobytes() for batch in batches for row in batch["ids"]]
    shown = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches]) // 20
    texts, places = pairs.texts()
    rows = tokenizer.encode(texts, 30)
    own = {
        image: {rows[text].tobytes() for one, text in places if one == image} for image in range(12)
    }
    assert all(row in own[image] for image, row in zip(shown, drawn, strict=True))
    assert {row for image, row in zip(shown, drawn, strict=True) if image == 0} == own[0], (
        "both captions of image 0"
    )
    entered = next(train_batches(pairs.images, config, start=7, beside=beside))
    np.testing.assert_array_equal(entered["ids"], batches[7]["ids"])


def test_the_scale_is_cut_but_can_come_back():
    assert [float(clip_from_above(jnp.float32(x), 2.0)) for x in (1, 3)] == [1, 2]
    slopes = [
        float(jax.grad(lambda x, sign=sign: sign * clip_from_above(x, 2.0))(jnp.float32(x)))
        for x in (1, 3)
        for sign in (-5, 5)
    ]
    assert slopes == [-5, 5, 0, 5]  # at 3, descent along -5 would push it further out


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer of the digits, so that tests share their compiled steps."""
    captions = (caption for each in open_pairs(config_of())[0].captions for caption in each)
    return train_tokenizer(captions, config_of().text.vocabulary)


LEARN = [*TINY_PAIR, "--epochs", "3", "--log-every", "1"]
STEPS = 135  # of this run


@pytest.fixture(scope="module")
def learned(tool, tmp_path_factory):
    """A finished run on one device, and its output."""
    run = tmp_path_factory.mktemp("learned")
    process = tool("train.contrastive", *LEARN, "--out", run, devices=1)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    return run, said


def test_a_run_learns_to_name_digits_and_leaves_its_tokenizer(learned):
    run, said = learned
    final = read_metrics(run, "eval")[-1]
    assert (final["images"], final["texts"], final["step"]) == (359, 10, STEPS)
    assert (
        0.35
        < final["image_to_text@1"]
        <= final["image_to_text@5"]
        <= final["image_to_text@10"]
        == 1
    )  # chance 10 %
    assert len(final["p"]["image/pool/p"]) == 2
    assert 10 < final["scale"] < 20
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert read_tokenizer(run / "tokenizer.json").size <= 320
    assert (
        "1,438 images to train, of which an epoch shows 97.9%, none twice in a batch; 359 with 10"
        " texts to evaluate"
    ) in said


@pytest.mark.slow
def test_eight_devices_with_split_weights_train_as_one(learned, tmp_path):
    config = load_config(
        ContrastiveConfig,
        [*LEARN, "--fsdp", "8", "--stop-after", "12", "--out", str(tmp_path)],
        "test",
    )
    contrastive.train(config, quiet=True)
    losses, want = (
        [line["loss"] for line in read_metrics(run, "train")] for run in (tmp_path, learned[0])
    )
    assert (len(losses), len(want)) == (12, STEPS)
    np.testing.assert_allclose(losses, want[:12], rtol=1e-4)


@pytest.mark.parametrize("loss", ["softmax", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_the_loss_of_a_step_is_that_of_the_whole_batch(tokenizer, loss):
    """On eight devices, with the weights split over them, the loss equals that of descriptors
    computed without a mesh.
    """
    config = config_of("--loss", loss, "--fsdp", "8")
    towers = make_towers(config, tokenizer)
    steps = make_steps(config, towers, STEPS)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
    ids = tokenizer.encode([f"digit {i}" for i in range(32)], config.text.context)
    state = steps.init(0)
    params = jax.tree.map(np.asarray, state.params)
    assert params["log_scale"] == pytest.approx(
        np.log(1 / 0.07 if loss == "softmax" else 10), rel=1e-6
    )
    assert ("bias" in params) == (loss == "sigmoid")
    described = jax.jit(towers.describe_images)(params, normalise(jnp.array(images), config.data))
    texts = jax.jit(towers.describe_texts)(params, ids)
    np.testing.assert_allclose(np.linalg.norm(described, axis=1), 1, rtol=1e-5)
    want = (
        clip_loss(described, texts, 1 / 0.07)
        if loss == "softmax"
        else siglip_loss(described, texts, 10.0, -10.0)
    )
    state, metrics = steps.train(state, {"image": jnp.array(images), "ids": jnp.array(ids)}, 0)
    assert float(metrics["loss"]) == pytest.approx(float(want), rel=1e-4)
    assert (
        make_steps(dataclasses.replace(config, seed=3), make_towers(config, tokenizer), STEPS)
        is steps
    )


def states(config):
    steps = make_steps(
        config, make_towers(config, read_tokenizer(config.out / "tokenizer.json")), 8
    )
    return jax.tree.leaves(
        jax.tree.map(np.asarray, Checkpoints(config.out, read_only=True).restore(steps))
    )


def test_a_stopped_run_ends_with_the_same_bits_and_takes_no_other_data(
    captioned_folder, tmp_path, tokenizer
):
    """The run has several captions of an image, a given tokenizer, augmentation, dropout and a
    moving average.
    """
    given, table = tmp_path / "given.json", captioned_folder / "pairs.csv"
    given.write_text(tokenizer.text, encoding="utf-8")
    captions = table.read_text()
    flags = ["--data", f"csv:{table}", "--batch", "8", "--epochs", "6", "--log-every", "1",
    "--augment.crop", "pad", "--model.dropout", "0.1",
             "--optimizer.ema", "0.9", "--loss", "sigmoid", "--text.tokenizer", given]  # fmt: skip
    one, other = (config_of(*flags, "--out", tmp_path / name) for name in ("one", "other"))
    assert contrastive.train(one, quiet=True).finished
    assert not contrastive.train(dataclasses.replace(other, stop_after=3), quiet=True).finished
    assert (other.out / "tokenizer.json").read_text(encoding="utf-8") == tokenizer.text
    table.write_text(captions.replace("number 3", "number three"))
    with pytest.raises(Refused, match=r"data_found.captions \d+ there, \d+ now"):
        contrastive.train(other, quiet=True)
    table.write_text(captions)
    given.write_text(train_tokenizer(CAPTIONS, 280).text, encoding="utf-8")
    with pytest.raises(Refused, match=r"data_found.tokenizer \d+ there, \d+ now"):
        contrastive.train(other, quiet=True)
    given.write_text(tokenizer.text, encoding="utf-8")
    assert contrastive.train(other, quiet=True).finished
    for a, b in zip(states(one), states(other), strict=True):
        np.testing.assert_array_equal(a, b)
    losses = [
        [(line["step"], line["loss"]) for line in read_metrics(config.out, "train")]
        for config in (one, other)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
    assert read_metrics(one.out, "eval")[-1] == read_metrics(other.out, "eval")[-1]
    (other.out / "tokenizer.json").unlink()
    with pytest.raises(Refused, match=r"the tokenizer .*tokenizer.json cannot be read"):
        contrastive.train(other, quiet=True)


def test_the_image_tower_starts_from_a_published_file(tmp_path, tokenizer):
    with np.load(ROOT / "tests" / "data" / "vit" / "timm-deit-distilled.npz") as file:
        arrays = {
            key.removeprefix("weights/"): file[key].astype(np.float32)
            for key in file.files
            if key.startswith("weights/")
        }
    write_safetensors(tmp_path / "deit.safetensors", arrays)
    flags = [
        "--data",
        "digits",
        "--init",
        str(tmp_path / "deit.safetensors"),
        "--model.heads",
        "2",
        "--text.width",
        "16",
        "--text.depth",
        "1",
    ]
    config = load_config(ContrastiveConfig, flags, "test")
    steps = make_steps(config, make_towers(config, tokenizer), 10)
    state = make_first_state(steps, config)
    theirs = read_vit(tmp_path / "deit.safetensors", heads=2).variables["params"]
    for name in ("patch_embedding", "blocks_1", "norm", "position"):
        jax.tree.map(
            lambda own, file: np.testing.assert_array_equal(own, np.reshape(file, own.shape)),
            state.params["image"][name],
            theirs[name],
        )
    np.testing.assert_array_equal(state.params["image"]["pool"]["p"], np.full(2, 3.0))
    np.testing.assert_array_equal(
        state.params["text"]["position"], steps.init(0).params["text"]["position"]
    )


MISTAKES = {
    "unknown config": (["--config", "coco"], "--config must be one of .*digits"),
    "parts": (
        ["--optimizer.accumulate", "2"],
        "--optimizer.accumulate must be 1: the negatives of a pair are those of its batch",
    ),
    "mixup": (["--augment.mixup", "0.2"], "--augment.mixup must be 0: there are no labels to mix"),
    "label smoothing": (
        ["--augment.label-smoothing", "0.1"],
        "--augment.label-smoothing must be 0",
    ),
    "loss": (["--loss", "hinge"], "invalid choice 'hinge'"),
    "heads": (["--text.heads", "3"], "--text.width must be a multiple of its 3 heads, it is 16"),
    "context": (["--text.context", "2"], "--text.context must be at least 3"),
    "vocabulary": (
        ["--text.vocabulary", "100"],
        (
            "--text.vocabulary must be at least 258: all bytes, start and end, and at most"
            " 16777216, it is 100"
        ),
    ),
    "template": (
        ["--text.templates", "a digit"],
        "--text.templates must be texts with {} where the name of the class goes",
    ),
    "scale": (
        ["--init-scale", "200"],
        "--init-scale must be above 0 and at most --max-scale 100, it is 200",
    ),
    "embed": (["--embed", "0"], "--embed must be at least 1"),
    "data": (
        ["--data", "coco"],
        (
            "unknown data source 'coco'; known are digits, folder:DIR, tfds:NAME, csv:FILE,"
            " wds:PATTERN"
        ),
    ),
    "no file": (["--data", "csv:"], "unknown data source 'csv:'"),
    "csv": (
        ["--data", "csv:nowhere.csv"],
        "the captions: nowhere.csv cannot be read: No such file",
    ),
    "templates": (
        ["--data", "csv:a.csv", "--text.templates", "{}"],
        "csv:a.csv has captions of its own",
    ),
    "names": (["--text.names", "nowhere.txt"], "--text.names: nowhere.txt cannot be read"),
    "tokenizer": (
        ["--text.tokenizer", "nowhere.json"],
        "the tokenizer nowhere.json cannot be read: No such file",
    ),
    "batch": (
        ["--batch", "33"],
        r"--batch must be a multiple of 1 part\(s\) x 8 device\(s\), it is 33",
    ),
}


@pytest.mark.parametrize(("flags", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_in_one_line(tmp_path, capsys, flags, sentence):
    said = one_line(capsys, contrastive.main, *TINY_PAIR, "--out", tmp_path / "run", *flags)
    assert said.startswith("train.contrastive: ")
    assert re.search(sentence, said), said
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", known_configs(ContrastiveConfig))
def test_every_config_loads_and_says_its_command_and_what_to_expect(name):
    config = load_config(ContrastiveConfig, ["--config", name], "test")
    assert isinstance(config, ContrastiveConfig)
    assert from_dict(ContrastiveConfig, to_dict(config)) == config
    header = (configs_of(ContrastiveConfig) / f"{name}.toml").read_text()
    assert f"python -m train.contrastive --config {name}" in header
    assert "Expect" in header


def test_a_tokenizer_that_was_replaced_in_the_folder_of_a_run_is_refused(
    tmp_path, captioned_folder, monkeypatch
):
    pairs = read_csv(f"{captioned_folder}/pairs.csv", Data())
    config = config_of("--data", f"csv:{captioned_folder}/pairs.csv", "--out", tmp_path)
    own = contrastive.open_tokenizer(config, None, pairs)
    monkeypatch.setattr(contrastive, "has_checkpoint", lambda run: True)
    assert contrastive.open_tokenizer(config, None, pairs).vocabulary == own.vocabulary
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(["zzz zzz yyy yyy"] * 9, 300).text)
    with pytest.raises(Refused, match="is not the one that the run began with"):
        contrastive.open_tokenizer(config, None, pairs)
