"""Rotary positions of ggem_jax/models: angles and rotations, and a ViT that has them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ggem_jax.models.position import rope_angles, rope_periods, rotate
from ggem_jax.models.vit import MAP, GGeM, ViT, ViTConfig
from ggem_jax.pooling import cls_pool

SMALL = ViTConfig(
    patch=4, width=32, depth=2, heads=2, mlp_width=40, image=16, registers=3, position="rope",
    layer_scale=0.5, norm_eps=1e-5,
)  # fmt: skip
IMAGES = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))


def drawn(model, images=IMAGES):
    """Variables of which no leaf is 0 or 1 throughout."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return tree.unflatten(
        [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )


def test_periods_and_angles_by_hand():
    np.testing.assert_allclose(rope_periods(16, 100.0), [1, 10**0.5, 10, 1000**0.5], rtol=1e-6)
    # the buffer of the published files, rounded to 8 bits: 100^(1/16) = 1.3335 lies between
    # 170/128 and 171/128
    periods = rope_periods(64, 100.0, "bfloat16")
    assert periods[:5].tolist() == [1.0, 1.3359375, 1.78125, 2.375, 3.15625]
    assert periods[-3:].tolist() == [42.25, 56.25, 75.0]
    # two rows and four columns: y = -1/2, 1/2 and x = -3/4, -1/4, 1/4, 3/4
    angles = rope_angles(2, 4, np.array([1.0, 4.0]), prefix=2) / (2 * np.pi)
    assert angles.shape == (10, 4)
    np.testing.assert_array_equal(angles[:2], np.zeros((2, 4)))
    np.testing.assert_allclose(angles[2], [-1 / 2, -1 / 8, -3 / 4, -3 / 16], rtol=1e-6)
    np.testing.assert_allclose(angles[9], [1 / 2, 1 / 8, 3 / 4, 3 / 16], rtol=1e-6)
    np.testing.assert_allclose(angles[3], [-1 / 2, -1 / 8, -1 / 4, -1 / 16], rtol=1e-6)


def test_a_rotation_turns_pairs_of_channels():
    heads = jnp.asarray([[[1.0, 2.0, 3.0, 4.0]]])  # pairs (1, 3) and (2, 4)
    turned = rotate(heads, np.array([[np.pi / 2, np.pi]]))
    np.testing.assert_allclose(turned, [[[-3.0, -2.0, 1.0, -4.0]]], atol=1e-6)
    np.testing.assert_array_equal(rotate(heads, np.zeros((1, 2))), heads)
    lengths = [np.linalg.norm(x, axis=-1) for x in (heads, turned)]
    np.testing.assert_allclose(*lengths, rtol=1e-6)


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (2, 3)])
def test_logits_depend_on_relative_offsets_only(shift):
    """One query and one key at every place: a pair and the pair shifted by rows and columns."""
    rows, columns = 5, 7
    periods = rope_periods(16, 100.0)
    query, key = np.random.default_rng(0).normal(size=(2, 1, 16)).astype(np.float32)
    everywhere = np.ones((rows * columns, 1, 1), np.float32)
    turned = [rotate(everywhere * x, rope_angles(rows, columns, periods)) for x in (query, key)]
    logits = np.einsum("qhc,khc->qk", *turned).reshape(rows, columns, rows, columns)
    down, right = shift
    kept, moved = logits[: rows - down, : columns - right], logits[down:, right:]
    np.testing.assert_allclose(
        kept[:, :, : rows - down, : columns - right], moved[:, :, down:, right:], atol=1e-5
    )
    assert np.ptp(logits) > 1  # and they do depend on them


def without_rope(variables, places):
    """The same variables for a ViT with learned positions, which are 0: it tells no places apart.

    Its keys have a bias, of zeros.
    """
    params = variables["params"] | {"position": jnp.zeros((1 + places, 32))}
    for i in range(2):
        attention = params[f"blocks_{i}"]["attention"]
        key = attention["key"] | {"bias": jnp.zeros((2, 16))}
        params[f"blocks_{i}"] |= {"attention": attention | {"key": key}}
    return {"params": params}


def test_a_rope_tells_places_apart():
    """The class token of an image with its rows of patches in the opposite order."""
    images = (IMAGES, IMAGES.reshape(2, 4, 4, 16, 3)[:, ::-1].reshape(IMAGES.shape))
    variables = drawn(ViT(SMALL, cls_pool))
    before, after = (ViT(SMALL, cls_pool).apply(variables, x).descriptor for x in images)
    assert np.abs(before - after).max() > 1e-2
    plain = ViT(dataclasses.replace(SMALL, position="learned"), cls_pool)
    before, after = (plain.apply(without_rope(variables, 16), x).descriptor for x in images)
    np.testing.assert_allclose(before, after, atol=1e-5)


def test_prefix_tokens_are_not_rotated():
    """One patch, at the centre with angles of 0, and four prefix tokens: as without a rope."""
    config, images = dataclasses.replace(SMALL, image=4), IMAGES[:, :4, :4]
    variables = drawn(ViT(config, cls_pool), images)
    plain = ViT(dataclasses.replace(config, position="learned"), cls_pool)
    np.testing.assert_allclose(
        ViT(config, cls_pool).apply(variables, images).tokens,
        plain.apply(without_rope(variables, 1), images).tokens,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("shape", [(16, 16), (4, 24), (20, 12)], ids=str)
def test_every_size_of_an_image_under_jit_remat_and_bfloat16(shape):
    images = jax.random.normal(jax.random.key(3), (2, *shape, 3))
    model = ViT(SMALL, cls_pool)
    variables = drawn(model)
    expected = jax.jit(model.apply)(variables, images)
    patches = shape[0] * shape[1] // 16
    assert expected.tokens.shape == (2, 4 + patches, 32)
    remat = ViT(dataclasses.replace(SMALL, remat=True), cls_pool)
    np.testing.assert_allclose(
        jax.jit(remat.apply)(variables, images).tokens, expected.tokens, rtol=1e-5, atol=1e-5
    )
    short = ViT(dataclasses.replace(SMALL, dtype="bfloat16"), cls_pool)
    tokens = jax.jit(short.apply)(variables, images).tokens
    assert tokens.dtype == jnp.bfloat16
    cosines = np.sum(tokens.astype(np.float32) * expected.tokens, -1) / (
        np.linalg.norm(tokens.astype(np.float32), axis=-1)
        * np.linalg.norm(expected.tokens, axis=-1)
    )
    assert cosines.min() > 0.999


def test_gradients_of_a_rotation_are_those_of_finite_differences():
    angles = rope_angles(2, 2, rope_periods(8, 100.0), prefix=1)
    heads = jax.random.normal(jax.random.key(4), (5, 2, 8))
    weights = jax.random.normal(jax.random.key(5), (5, 2, 8))
    jax.test_util.check_grads(
        lambda x: jnp.sum(weights * jnp.sin(rotate(x, angles))), (heads,), order=1, rtol=1e-2
    )


@pytest.mark.parametrize("remat", [False, True])
def test_a_rope_vit_learns(remat):
    """Which half of an image is bright, from the class token: the loss falls, all leaves move."""
    config = dataclasses.replace(SMALL, remat=remat, drop_path=0.1, dropout=0.1)
    model = ViT(config, GGeM(), num_classes=2)
    labels = jnp.arange(16) % 2
    rows = jnp.arange(16)[None, :, None, None] // 8
    images = jnp.where(rows == labels[:, None, None, None], 1.0, -1.0) * jnp.ones((16, 16, 16, 3))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            rngs = {"dropout": key}
            logits = model.apply({"params": params}, images, train=True, rngs=rngs).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value, gradients

    state, losses, start = optimizer.init(params), [], params
    for i in range(40):
        params, state, value, _ = step(params, state, jax.random.key(i))
        losses.append(float(value))
    assert losses[-1] < 0.1 < 0.6 < losses[0]
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), start, params)
    assert all(jax.tree.leaves(moved))


def test_keys_of_a_rope_have_no_bias_and_map_may_pool_its_tokens():
    params = drawn(ViT(SMALL, MAP()))["params"]
    for attention in (params["blocks_1"]["attention"], params["pool"]["attention"]):
        assert {name: set(part) for name, part in attention.items()} == {
            "query": {"kernel", "bias"},
            "key": {"kernel"},
            "value": {"kernel", "bias"},
            "out": {"kernel", "bias"},
        }
    without = drawn(ViT(dataclasses.replace(SMALL, qkv_bias=False), MAP()))["params"]
    assert set(without["blocks_1"]["attention"]["query"]) == {"kernel"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 16}, "heads of a multiple of 4 channels, not width 32 with 16 heads"),
        ({"position": "rotary"}, "position must be one of learned, sincos, rope"),
        ({"rope_base": 0.0}, "rope_base must be a positive number, not 0.0"),
        ({"rope_base": float("nan")}, "rope_base must be a positive number, not nan"),
        ({"rope_dtype": "int8"}, "rope_dtype must be one of float32, bfloat16, float16"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_fields_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **changes)


def test_periods_in_bfloat16_change_the_tokens_a_little():
    model = ViT(SMALL, cls_pool)
    variables = drawn(model)
    rounded = ViT(dataclasses.replace(SMALL, rope_dtype="bfloat16"), cls_pool)
    tokens, others = (each.apply(variables, IMAGES).tokens for each in (model, rounded))
    difference = np.abs(tokens - others).max()
    assert 1e-5 < difference < 0.1
