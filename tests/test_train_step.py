"""train/step.py: one step against optax, the optimizer, mixing, and the layout on the devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY
from jax.sharding import PartitionSpec as P

from train import classify
from train.build import build_model
from train.cli import load_config
from train.config import Augment, Config, Data, Optimizer
from train.step import (
    accumulate_gradient,
    make_optimizer,
    make_steps,
    mix,
    normalise,
    split_over_fsdp,
)

STEPS = 90  # as in test_train_classify.py, so that both use the same compiled programs


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

    def products(*flags):
        steps = make_steps(load_config(Config, [*TINY, *flags], "test"), 10, STEPS)
        traced = steps.train.trace(jax.eval_shape(steps.init, 0), batch, 0)
        return str(traced.jaxpr).count("dot_general")

    assert products("--model.remat") > products()


def test_configs_of_every_pooling_find_their_compiled_steps_again():
    for kind in ("cls", "relu-avg", "lse", "ggem"):
        config = load_config(Config, [*TINY, "--pool.kind", kind], "test")
        assert make_steps(config, 10, STEPS) is make_steps(
            load_config(Config, [*TINY, "--pool.kind", kind, "--seed", "3"], "test"), 10, STEPS
        )


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


def test_pixels_are_normalised_as_published_models_expect():
    data = Data()
    image = np.zeros((1, 1, 1, 3), np.uint8) + np.array([255, 0, 128], np.uint8)
    want = [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
    np.testing.assert_allclose(normalise(jnp.array(image), data)[0, 0, 0], want, rtol=1e-5)


@pytest.mark.parametrize("name", ["lion", "muon", "sgd"])
def test_every_optimizer_resumes_to_the_last_bit_and_splits_its_state(tmp_path, name):
    flags = [*TINY, "--epochs", "0.2", "--optimizer.name", name, "--fsdp", "4"]

    def end(folder, *more):
        config = load_config(Config, [*flags, "--out", str(tmp_path / folder), *more], "test")
        return classify.train(config, quiet=True).state

    whole = end("whole")
    end("parts", "--stop-after", "4")
    resumed = end("parts")
    chex.assert_trees_all_equal(jax.device_get(resumed), jax.device_get(whole))
    matrices = [leaf for leaf in jax.tree.leaves(whole.opt_state) if leaf.ndim > 1]
    assert len(matrices) > 10
    assert any("fsdp" in leaf.sharding.spec for leaf in matrices)
