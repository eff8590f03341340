"""train/freezing.py and --balance: parts that do not learn, and classes with few images."""

import jax
import numpy as np
import pytest
from conftest import TINY

from train import classify
from train.classify import weigh_classes
from train.cli import Refused, load_config
from train.config import Config, Data
from train.freezing import learning_mask
from train.images import hold_in_memory
from train.metric import MetricConfig
from train.step import make_steps


def config_of(*flags):
    return load_config(Config, [*TINY, "--batch", "8", *map(str, flags)], "test")


def batch_of(config, seed=0):
    rng, side = np.random.default_rng(seed), config.model.image
    return {
        "image": rng.integers(0, 256, (8, side, side, 3), np.uint8),
        "label": rng.integers(0, 10, 8).astype(np.int32),
    }


@pytest.mark.parametrize(
    ("freeze", "learns"),
    [
        ("0", {"blocks_0", "blocks_1", "class_token", "head", "norm", "patch_embedding", "pool",
               "position"}),
        ("1", {"blocks_1", "head", "norm", "pool"}),
        ("all", {"head"}),
    ],
)  # fmt: skip
def test_frozen_parts_stay_as_they_are_to_the_last_bit(freeze, learns):
    """With weight decay and a moving average. A head of zeros passes no gradient on at first."""
    flags = ["--optimizer.weight-decay", 0.5, "--optimizer.ema", 0.5, "--optimizer.warmup", 0]
    config = config_of(*flags, "--freeze", freeze, "--pool.kind", "ggem")
    steps = make_steps(config, 10, 10)
    state = steps.init(0)
    before = jax.tree.map(np.asarray, state.params)
    for seed in range(3):
        state, _ = steps.train(state, batch_of(config, seed), 0)

    def changed(after):
        return {
            name
            for name in before
            for a, b in zip(
                jax.tree.leaves(before[name]), jax.tree.leaves(after[name]), strict=True
            )
            if not np.array_equal(a, b)
        }

    assert changed(state.params) == changed(state.ema) == learns


def test_only_image_towers_are_frozen_among_other_networks():
    vit = {"patch_embedding": {"kernel": 1}, "blocks_0": {"w": 1}, "norm": 1, "head": {"w": 1}}
    mask = learning_mask({"network": {"vit": vit, "projection": 1}, "proxies": 1}, "all")
    assert mask == {
        "network": {
            "vit": {
                "patch_embedding": {"kernel": False},
                "blocks_0": {"w": False},
                "norm": False,
                "head": {"w": True},
            },
            "projection": True,
        },
        "proxies": True,
    }
    assert learning_mask(vit, 0) == jax.tree.map(lambda _: True, vit)


def test_weights_of_classes_are_inverse_to_their_images_and_average_one():
    labels = np.array([0] * 6 + [1] * 3 + [3], np.int32)
    images = hold_in_memory(np.zeros((10, 4, 4, 3), np.uint8), labels, tuple("abcd"))
    weights = np.array(weigh_classes(images))
    np.testing.assert_allclose(weights, [10 / 18, 10 / 9, 0, 10 / 3])
    assert weights[labels].mean() == pytest.approx(1)


def test_a_weighted_loss_is_that_of_each_image_times_the_weight_of_its_class():
    config, weights = config_of(), tuple(np.linspace(0.5, 1.5, 10).tolist())
    plain, weighted = (make_steps(config, 10, 10, class_weights=each) for each in (None, weights))
    batch = batch_of(config)
    probability = np.asarray(plain.evaluate(plain.init(0).params, batch)["probability"])
    each = -np.log(probability[np.arange(8), batch["label"]])
    for steps, factors in ((plain, np.ones(10)), (weighted, np.array(weights))):
        _, metrics = steps.train(steps.init(0), batch, 0)
        want = (factors[batch["label"]] * each).mean()
        np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)


@pytest.mark.parametrize("balance", ["weights", "sampling"])
def test_a_run_with_few_images_of_a_class_is_balanced(balance, tmp_path):
    labels = np.array([0] * 36 + [1] * 4, np.int32)
    rng = np.random.default_rng(0)
    pixels = (rng.integers(0, 60, (40, 8, 8, 3)) + 40 * labels[:, None, None, None]).astype(
        np.uint8
    )
    images = hold_in_memory(pixels, labels, ("common", "rare"))
    flags = ["--epochs", 1, "--balance", balance, "--out", tmp_path, "--model.depth", 1]
    trained = classify.train(config_of(*flags), data=(images, images), quiet=True)
    assert trained.finished
    with pytest.raises(ValueError, match=r"--data.balance must be none in train.metric"):
        MetricConfig(data=Data(balance=balance))


def test_more_blocks_than_there_are_cannot_be_frozen():
    with pytest.raises(Refused, match=r"--optimizer.freeze must be at most the 2 blocks"):
        config_of("--freeze", 3)
