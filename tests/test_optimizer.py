"""ggem_jax/optimizer.py: which parameters decay, and how fast each moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import draw_variables
from flax import nnx

from ggem_jax.models.text import TextConfig, TextTransformer
from ggem_jax.models.vit import GGeM, ViT, ViTConfig
from ggem_jax.optimizer import (
    adamw,
    exponents,
    is_exponent,
    learning_rate_scales,
    optimizer,
    scale_by_muon_and_adam,
    weight_decay_mask,
)


@pytest.fixture(scope="module")
def params():
    model = ViT(
        ViTConfig(
            patch=4, width=12, depth=3, heads=2, mlp_width=16, image=8, registers=1, layer_scale=0.1
        ),
        GGeM(),
        5,
    )
    return draw_variables(model, jnp.zeros((1, 8, 8, 3)))["params"]


def by_path(tree):
    return {
        "/".join(str(key.key) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_only_kernels_decay(params):
    mask = by_path(weight_decay_mask(params))
    assert {name for name, decays in mask.items() if decays} == {
        name for name in mask if name.endswith("kernel")
    }
    for name in (
        "pool/p",
        "norm/scale",
        "class_token",
        "registers",
        "position",
        "head/bias",
        "blocks_0/layer_scale_1",
    ):
        assert mask[name] is False


def test_layers_further_from_the_head_learn_slower(params):
    scales = by_path(learning_rate_scales(params, exponent_lr=20, layer_decay=0.5))
    expected = {"head/kernel": 1, "norm/scale": 1, "pool/p": 20, "blocks_2/mlp/in/kernel": 0.5,
    "blocks_1/norm_1/bias": 0.25,
                "blocks_0/attention/query/kernel": 0.125, "position": 0.0625, "class_token": 0.0625,
                "patch_embedding/kernel": 0.0625}  # fmt: skip
    assert {name: scales[name] for name in expected} == expected


def test_the_two_towers_of_a_tree_have_depths_of_their_own(params):
    """The table of ids is an embedding: it learns as slowly as positions, and neither decays."""
    text = TextTransformer(
        TextConfig(vocabulary=7, width=8, depth=2, heads=2, mlp_width=8, context=5), outputs=4
    )
    both = {
        "image": params,
        "text": draw_variables(text, jnp.zeros((1, 5), jnp.int32))["params"],
        "log_scale": jnp.zeros(()),
    }
    scales, mask = (
        by_path(learning_rate_scales(both, layer_decay=0.5)),
        by_path(weight_decay_mask(both)),
    )
    expected = {"text/head/kernel": 1, "text/blocks_1/mlp/in/kernel": 0.5,
    "text/blocks_0/norm_1/scale": 0.25, "text/position": 0.125,
                "text/token_embedding/embedding": 0.125, "image/blocks_2/mlp/in/kernel": 0.5,
                "image/position": 0.0625, "log_scale": 1}  # fmt: skip
    assert {name: scales[name] for name in expected} == expected
    assert not any(
        mask[name]
        for name in (
            "text/token_embedding/embedding",
            "text/position",
            "text/norm/scale",
            "log_scale",
        )
    )
    assert mask["text/head/kernel"]


def test_exponents_are_found_by_their_path(params):
    found = exponents({"params": params})
    assert list(found) == ["pool/p"]
    np.testing.assert_array_equal(found["pool/p"], params["pool"]["p"])
    assert sum(is_exponent(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)) == 1


def test_first_step_by_hand():
    """Adam's first step is the sign of the gradient: the kernel moves by lr (1 + decay * value), p
    by 10 lr, the bias by lr.
    """
    params = {"kernel": jnp.array([[2.0]]), "bias": jnp.array([2.0]), "p": jnp.array([3.0])}
    transform = adamw(0.01, weight_decay=0.5)
    updates, _ = transform.update(
        jax.tree.map(jnp.ones_like, params), transform.init(params), params
    )
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(moved["kernel"], [[2 - 0.01 * (1 + 0.5 * 2)]], rtol=1e-5)
    np.testing.assert_allclose(moved["bias"], [2 - 0.01], rtol=1e-5)
    np.testing.assert_allclose(moved["p"], [3 - 0.1], rtol=1e-5)


def test_without_its_own_rate_an_exponent_hardly_moves():
    """200 steps towards p = 8 with the rate of the weights, and with ten times that rate."""
    tokens = jnp.abs(jax.random.normal(jax.random.key(0), (4, 30, 6)))
    pool = GGeM(groups=2)
    target = pool.apply({"params": {"p": jnp.full(2, 8.0)}}, tokens)

    def learned(exponent_lr):
        transform = adamw(1e-3, exponent_lr=exponent_lr)

        def step(carry, _):
            params, state = carry
            slope = jax.grad(
                lambda params: jnp.sum((pool.apply({"params": params}, tokens) - target) ** 2)
            )(params)
            updates, state = transform.update(slope, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = {"p": jnp.full(2, 3.0)}
        (params, _), _ = jax.lax.scan(step, (start, transform.init(start)), length=200)
        return float(params["p"].mean())

    assert learned(1.0) < 3.21
    assert 4.5 < learned(10.0) < 8


def test_a_part_of_a_model_and_two_models_in_one_tree_keep_their_depths():
    leaf = {"kernel": jnp.ones((2, 2))}
    part = {"blocks_10": leaf, "blocks_11": leaf, "head": leaf}
    scales = learning_rate_scales(part, layer_decay=0.5)
    assert [scales[name]["kernel"] for name in part] == [0.25, 0.5, 1.0]
    towers = {
        "a": {"blocks_0": leaf, "blocks_1": leaf, "position": jnp.ones(2)},
        "b": {"blocks_0": leaf, "blocks_norm": leaf},
    }
    scales = learning_rate_scales(towers, layer_decay=0.5)
    assert scales == {
        "a": {"blocks_0": {"kernel": 0.25}, "blocks_1": {"kernel": 0.5}, "position": 0.125},
        "b": {"blocks_0": {"kernel": 0.5}, "blocks_norm": {"kernel": 1.0}},
    }


def test_parameters_of_flax_nnx_are_recognised():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(2, 3, rngs=rngs)
            self.p = nnx.Param(jnp.full(3, 3.0))

    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    assert list(exponents(state)) == ["p"]
    assert jax.tree.leaves(weight_decay_mask(state)) == [
        False,
        True,
        False,
    ]  # dense.bias, dense.kernel, p
    assert jax.tree.leaves(learning_rate_scales(state, exponent_lr=7.0)) == [1.0, 1.0, 7.0]


def test_muon_makes_the_matrices_of_blocks_orthogonal_and_adam_moves_the_rest(params):
    """All singular values are near 0.2 sqrt(max(inputs, outputs)) after a step of the first."""
    direction = scale_by_muon_and_adam()
    slopes = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).normal(size=leaf.shape)), params
    )
    got, _ = direction.update(slopes, direction.init(params), params)
    attention = got["blocks_1"]["attention"]
    matrices = {
        "query": attention["query"]["kernel"].reshape(12, 12),  # (width, heads, channels)
        "out": attention["out"]["kernel"].reshape(12, 12),  # (heads, channels, width)
        "in": got["blocks_1"]["mlp"]["in"]["kernel"],
    }
    for name, matrix in matrices.items():
        values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
        assert values.min() > 0.5, name
        assert values.max() < 1.3, name
    for part in ("head", "patch_embedding"):
        signs = jnp.sign(slopes[part]["kernel"])
        np.testing.assert_allclose(got[part]["kernel"], signs, rtol=1e-3)
    np.testing.assert_allclose(got["pool"]["p"], jnp.sign(slopes["pool"]["p"]), rtol=1e-3)


def test_any_direction_gets_decay_of_matrices_and_a_rate_for_exponents():
    """The first step of Lion is a sign as well: the same numbers as `test_first_step_by_hand`."""
    params = {"kernel": jnp.array([[2.0]]), "bias": jnp.array([2.0]), "p": jnp.array([3.0])}
    transform = optimizer(optax.scale_by_lion(), 0.01, weight_decay=0.5)
    updates, _ = transform.update(
        jax.tree.map(jnp.ones_like, params), transform.init(params), params
    )
    expected = {"kernel": [[-0.01 * (1 + 0.5 * 2)]], "bias": [-0.01], "p": [-0.1]}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)
