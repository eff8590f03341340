"""ggem_jax/losses/contrastive.py: the losses against NumPy in float64, the sharded against the
plain.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_expit, log_softmax

from ggem_jax.losses.contrastive import (
    clip_loss,
    sharded_clip_loss,
    sharded_siglip_loss,
    siglip_loss,
)

AXES = ("data", "fsdp")
SHAPES = {"8 x 1": (8, 1), "4 x 2": (4, 2), "1 device": (1, 1)}


def mesh_of(shape):
    return jax.make_mesh(
        shape,
        AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[: shape[0] * shape[1]],
    )


def descriptors(b, d, seed=0, dtype=np.float32):
    """Two lots of unit vectors, each similar to its partner."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(b, d))
    texts = images + rng.normal(size=(b, d))
    return tuple(
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype) for x in (images, texts)
    )


def plain(kind, images, texts, scale, bias):
    return (
        clip_loss(images, texts, scale)
        if kind == "softmax"
        else siglip_loss(images, texts, scale, bias)
    )


def sharded(kind, mesh, axes=AXES):
    def loss(images, texts, scale, bias):
        if kind == "softmax":
            return sharded_clip_loss(images, texts, scale, mesh=mesh, axes=axes)
        return sharded_siglip_loss(images, texts, scale, bias, mesh=mesh, axes=axes)

    return loss


def oracle(kind, images, texts, scale, bias):
    """The pseudo-code of the papers in float64."""
    logits = scale * images.astype(np.float64) @ texts.astype(np.float64).T
    if kind == "softmax":
        return (
            -(
                np.diag(log_softmax(logits, axis=1)).mean()
                + np.diag(log_softmax(logits, axis=0)).mean()
            )
            / 2
        )
    labels = 2 * np.eye(len(images)) - 1
    return -log_expit(labels * (logits + bias)).sum() / len(images)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("b", "d"), [(1, 4), (3, 5), (16, 8)], ids=str)
def test_losses_are_the_papers(kind, b, d):
    images, texts = descriptors(b, d)
    want = oracle(kind, images, texts, 14.0, -9.0)
    assert float(plain(kind, images, texts, 14.0, -9.0)) == pytest.approx(want, rel=1e-5, abs=1e-6)
    with jax.enable_x64(True):
        wide = descriptors(b, d, dtype=np.float64)
        assert float(plain(kind, *wide, 14.0, -9.0)) == pytest.approx(
            oracle(kind, *wide, 14.0, -9.0), rel=1e-12, abs=1e-12
        )


def test_two_pairs_by_hand():
    """Similarities 1 on the diagonal and 0 beside it, scale 1: log(1 + 1/e) = 0.31326 each way;
    with the sigmoid 2 (log(1 + 1/e) + log 2) / 2.
    """
    unit = jnp.eye(2)
    assert float(clip_loss(unit, unit, 1.0)) == pytest.approx(0.313262, abs=1e-6)
    assert float(siglip_loss(unit, unit, 1.0, 0.0)) == pytest.approx(0.313262 + 0.693147, abs=1e-6)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sharded_value_and_gradients_are_the_plain_ones(kind, shape):
    arguments = (*map(jnp.asarray, descriptors(24, 6)), jnp.float32(20.0), jnp.float32(-8.0))
    every = (0, 1, 2, 3)
    want_value, want = jax.jit(jax.value_and_grad(lambda *a: plain(kind, *a), every))(*arguments)
    value, got = jax.jit(jax.value_and_grad(sharded(kind, mesh_of(shape)), every))(*arguments)
    assert float(value) == pytest.approx(float(want_value), rel=1e-5)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert bool(np.any(want[3])) == (kind == "sigmoid")


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_sharded_in_float64_is_the_papers(kind):
    with jax.enable_x64(True):
        images, texts = descriptors(16, 5, dtype=np.float64)
        value = jax.jit(sharded(kind, mesh_of((4, 2))))(images, texts, 30.0, -9.0)
        assert float(value) == pytest.approx(oracle(kind, images, texts, 30.0, -9.0), rel=1e-12)


def test_one_axis_of_the_mesh_leaves_the_other_alone():
    images, texts = descriptors(8, 6)
    mesh = mesh_of((4, 2))
    for axes in ("data", ("data",)):
        value = jax.jit(sharded("softmax", mesh, axes))(images, texts, 9.0, 0.0)
        assert float(value) == pytest.approx(float(clip_loss(images, texts, 9.0)), rel=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_no_device_holds_the_matrix_of_all_similarities(kind):
    """The compiled forward and backward pass has a block of 16 x 16, and nothing of 128 x 128 or of
    16 x 128.
    """
    arguments = (*map(jnp.asarray, descriptors(128, 6)), jnp.float32(20.0), jnp.float32(-8.0))

    def largest(loss):
        text = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3))).lower(*arguments).compile().as_text()
        shapes = [
            [int(n) for n in shape.split(",")] for shape in re.findall(r"\bf32\[([0-9,]+)\]", text)
        ]
        assert [16, 16] in shapes or [128, 128] in shapes
        return max(np.prod(shape) for shape in shapes)

    assert largest(lambda *a: plain(kind, *a)) == 128 * 128
    assert (
        largest(sharded(kind, mesh_of((4, 2)))) <= 128 * 6
    )  # the texts of the whole batch, which the backward pass keeps


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("case", ["all equal", "one pair", "opposite"])
def test_extremes_stay_finite(kind, case):
    same = jnp.ones((8, 4)) / 2
    images, texts = {
        "all equal": (same, same),
        "one pair": (same[:1], same[:1]),
        "opposite": (same, -same),
    }[case]
    mesh = mesh_of((1, 1) if case == "one pair" else (4, 2))
    for loss, dtype in (
        (lambda *a: plain(kind, *a), jnp.float32),
        (sharded(kind, mesh), jnp.bfloat16),
    ):
        arguments = (
            images.astype(dtype),
            texts.astype(dtype),
            jnp.float32(100.0),
            jnp.float32(-10.0),
        )
        value, slopes = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*arguments)
        assert value.dtype == jnp.float32
        assert np.isfinite(value)
        assert all(np.isfinite(slope).all() for slope in slopes)
    if kind == "softmax":
        assert float(value) == pytest.approx(0 if case == "one pair" else np.log(8), abs=1e-4)


def test_what_are_no_pairs_is_refused():
    images, texts = descriptors(6, 4)
    with pytest.raises(ValueError, match=r"both be \(b, d\)"):
        clip_loss(images, texts[:3], 1.0)
    with pytest.raises(ValueError, match=r"both be \(b, d\)"):
        siglip_loss(images[0], texts[0], 1.0, 0.0)
    with pytest.raises(
        ValueError, match="the 8 devices along data, fsdp must divide the number of pairs, 6"
    ):
        sharded_clip_loss(images, texts, 1.0, mesh=mesh_of((4, 2)), axes=AXES)
    with pytest.raises(
        ValueError, match="axes must be some of the mesh's, data, fsdp, not 'model'"
    ):
        sharded_siglip_loss(images, texts, 1.0, 0.0, mesh=mesh_of((4, 2)), axes="model")


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_gradients_of_bfloat16_descriptors_are_as_good_around_a_mesh(kind):
    """Compared with float32 on the same numbers, the ring loses no more than the plain loss does,
    which rounds once.
    """
    images, texts = (jnp.asarray(x, jnp.bfloat16) for x in descriptors(32, 8))
    exact = jax.grad(lambda x: plain(kind, x, texts.astype(jnp.float32), 20.0, -5.0))(
        images.astype(jnp.float32)
    )
    loss = jax.jit(jax.grad(lambda x: sharded(kind, mesh_of((8, 1)))(x, texts, 20.0, -5.0)))
    error = np.abs(np.asarray(loss(images), np.float32) - exact).max() / np.abs(exact).max()
    assert error < 0.004
