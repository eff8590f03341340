"""The poolings of feature maps, and the pooling of normalised tokens, in plain JAX."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import draw_variables
from flax import linen as nn

from ggem_jax.models.vit import GGeM, ViT, ViTConfig
from ggem_jax.pooling import (
    avg_pool,
    gem_pool,
    ggem_pool,
    l2_normalize,
    norm_ggem_pool,
    regional_gem,
    relup,
    scale_gem,
    superglobal_pool,
)

# Compiled once for each shape, instead of operation by operation.
regional = jax.jit(regional_gem, static_argnames=("p", "window"))
of_scales = jax.jit(scale_gem, static_argnames="p")
superglobal = jax.jit(superglobal_pool, static_argnames=("p", "regional_p", "window"))


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def windowed(x, p, window):
    """The definition in float64, window by window."""
    b, h, w, d = x.shape
    half = window // 2
    padded = np.pad(
        np.maximum(x.astype(np.float64), 0),
        ((0, 0), (half, half), (half, half), (0, 0)),
        mode="reflect",
    )
    local = np.empty(x.shape)
    for i in range(h):
        for j in range(w):
            patch = padded[:, i : i + window, j : j + window].reshape(b, -1, d)
            top = np.maximum(patch.max(1, keepdims=True), 1e-300)
            local[:, i, j] = top[:, 0] * np.mean((patch / top) ** p, axis=1) ** (1 / p)
    return 0.5 * local + 0.5 * np.maximum(x, 0)


@pytest.mark.sampled
@pytest.mark.parametrize("shape", [(1, 3, 3, 1), (2, 7, 5, 4), (1, 12, 3, 2)])
@pytest.mark.parametrize(("p", "window"), [(2.5, 5), (1.0, 3), (40.0, 5), (1000.0, 3), (0.5, 1)])
def test_regional_gem_equals_the_float64_definition(shape, p, window):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(
        regional(x, p=p, window=window), windowed(x, p, window), rtol=2e-6, atol=1e-30
    )


def test_regional_gem_by_hand():
    """One row of the window sum at a corner: reflection gives 4, 2, 1, 2, 4 around the 1, so with p
    = 1 the mean of each axis is 13 / 5.
    """
    line = jnp.array([1.0, 2.0, 4.0, 8.0])
    got = regional(jnp.broadcast_to(line[None, :, None], (4, 4, 1)), p=1.0)
    assert float(got[0, 0, 0]) == pytest.approx(0.5 * 13 / 5 + 0.5 * 1, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_regional_gem_is_homogeneous(scale):
    x = jnp.abs(normal(0, (6, 5, 3)))
    np.testing.assert_allclose(regional(x * scale), regional(x) * scale, rtol=1e-5)


def test_constant_maps_are_unchanged_and_empty_ones_stay_empty():
    np.testing.assert_allclose(regional(jnp.full((4, 4, 2), 3.0)), 3.0, rtol=1e-6)
    assert not np.asarray(regional(jnp.zeros((4, 4, 2)))).any()


@pytest.mark.parametrize("pool", [regional_gem, superglobal_pool])
def test_gradients_are_finite_and_equal_differences(pool):
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(1, 5, 6, 3)), 0).astype(np.float32)
    x[..., 2] = 0
    weights = rng.normal(size=pool(x).shape).astype(np.float32)
    total = jax.jit(lambda x: jnp.sum(pool(x) * weights))
    slope = jax.jit(jax.grad(total))
    chex.assert_tree_all_finite(slope(jnp.asarray(x)))
    with jax.enable_x64(True):
        for index in [(0, 0, 0, 0), (0, 2, 3, 1), (0, 4, 5, 0)]:
            step = np.zeros(x.shape)
            step[index] = 1e-5
            at = x.astype(np.float64) + 0.1 * (x == 0)
            difference = (total(at + step) - total(at - step)) / 2e-5
            assert float(slope(at)[index]) == pytest.approx(float(difference), rel=1e-5, abs=1e-8)


def test_superglobal_is_regional_gem_then_gem():
    x = jnp.abs(normal(1, (2, 3, 7, 6, 5)))
    pooled = regional(x, p=2.0, window=3).reshape(2, 3, 42, 5)
    want = jax.jit(lambda x: gem_pool(x, 3.0, eps=1e-8))(pooled)
    np.testing.assert_allclose(superglobal(x, regional_p=2.0, window=3, p=3.0), want, rtol=1e-6)
    half = superglobal(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), superglobal(x), rtol=1e-2)


def test_nan_is_kept_and_negative_entries_count_as_zero():
    x = jnp.ones((5, 5, 2)).at[2, 2, 0].set(jnp.nan)
    assert np.isnan(superglobal(x)).tolist() == [True, False]
    x = normal(0, (5, 5, 2))
    np.testing.assert_array_equal(regional(x), regional(jnp.maximum(x, 0)))


@pytest.mark.parametrize("p", [0.02, 0.1, 1.0, 50.0])
def test_regional_gem_against_float64(p):
    """Zeros count as zeros also for small exponents, at which even the smallest number to the power
    p is not small.
    """
    x = np.maximum(np.random.default_rng(0).normal(size=(7, 6, 3)), 0)
    x[..., 2] = np.eye(7, 6) / 8
    padded = np.pad(x, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), (0, 1))
    top = np.maximum(windows.max((-2, -1), keepdims=True), 1e-300)
    local = top[..., 0, 0] * np.mean((windows / top) ** p, axis=(-2, -1)) ** (1 / p)
    np.testing.assert_allclose(
        regional(jnp.asarray(x, jnp.float32), p=p),
        (x + local) / 2,
        rtol=3e-5 if p < 0.1 else 3e-6,
        atol=1e-30,
    )


def test_no_maps_give_no_descriptors():
    assert superglobal(jnp.zeros((0, 5, 5, 2))).shape == (0, 2)


def test_relup():
    assert relup(jnp.ones(2, jnp.bfloat16), alpha=np.float64(0.014)).dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        relup(jnp.array([-1.0, 0.0, 0.01, 0.02])), jnp.array([0.014, 0.014, 0.014, 0.02])
    )
    np.testing.assert_array_equal(relup(jnp.array([-1.0, 1.0]), alpha=0.0), jnp.array([0.0, 1.0]))


def test_scale_gem_by_hand():
    """The larger of the unit vectors (0.6, -0.8) and (-1, 0); with p = 2 and the minimum -4:
    sqrt((7^2 + 1^2) / 2) - 4, sqrt((0 + 4^2) / 2) - 4.
    """
    scales = jnp.array([[3.0, -4.0], [-3.0, 0.0]])
    np.testing.assert_allclose(of_scales(scales), [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(of_scales(scales, p=2.0), [1.0, 8**0.5 - 4], rtol=1e-6)


@pytest.mark.sampled
@pytest.mark.parametrize("p", [1.0, 3.0, 10.0, 300.0])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_scale_gem_equals_the_float64_definition(p, scale):
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    lowest = x.astype(np.float64).min()
    want = np.mean((x.astype(np.float64) - lowest) ** p, axis=0) ** (1 / p) + lowest
    np.testing.assert_allclose(
        of_scales(x * np.float32(scale), p=p) / scale, want, rtol=0, atol=2e-6 * np.abs(want).max()
    )


@pytest.mark.parametrize("p", [np.inf, 1.0, 10.0, 1000.0])
def test_scale_gem_has_finite_gradients_and_takes_any_leading_axes(p):
    x = normal(0, (3, 2, 4, 6)).at[1, 0, 0].set(0.0)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(of_scales(x, p=p)))))(x)
    chex.assert_tree_all_finite(gradient)
    assert np.abs(gradient).max() > 0
    np.testing.assert_allclose(
        of_scales(x, p=p), of_scales(x.reshape(3, 8, 6), p=p).reshape(2, 4, 6), rtol=1e-6
    )
    order = of_scales(x[jnp.array([2, 0, 1])], p=p)
    np.testing.assert_allclose(order, of_scales(x, p=p), rtol=2e-6, atol=2e-6)
    assert of_scales(x.astype(jnp.bfloat16), p=p).dtype == jnp.bfloat16


def test_scale_gem_of_one_scale():
    x = normal(0, (1, 4, 6))
    np.testing.assert_allclose(of_scales(x), l2_normalize(x[0]), rtol=1e-6)
    np.testing.assert_allclose(of_scales(x, p=7.0), x[0], atol=1e-6)
    assert of_scales(jnp.zeros((3, 0, 6)), p=3.0).shape == (0, 6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_unit_vectors_of_any_length(scale):
    x = normal(0, (5, 7)) * scale
    got = l2_normalize(x, eps=1e-36)
    np.testing.assert_allclose(jnp.linalg.norm(got, axis=-1), 1, rtol=1e-6)
    assert not np.asarray(l2_normalize(jnp.zeros((2, 3)))).any()
    np.testing.assert_allclose(
        l2_normalize(jnp.full((1, 4), 1e-13)), 0.1, rtol=1e-5
    )  # shorter than eps: divided by it
    chex.assert_tree_all_finite(jax.grad(lambda x: l2_normalize(x).sum())(jnp.zeros((2, 3))))


@pytest.mark.parametrize("negatives", ["clamp", "abs", "shift", "signed"])
@pytest.mark.parametrize("masked", [False, True])
def test_norm_ggem_is_flax_layer_norm_then_ggem(negatives, masked):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(3 * rng.normal(size=(2, 9, 12)) + 1, jnp.float32)
    scale, bias, p = (
        jnp.asarray(rng.uniform(low, high, n), jnp.float32)
        for low, high, n in ((0.5, 1.5, 12), (-0.2, 0.2, 12), (2, 4, 3))
    )
    mask = jnp.asarray(rng.random((2, 9)) < 0.6).at[0].set(False) if masked else None
    norm = nn.LayerNorm(1e-6, use_fast_variance=False)

    def apart(tokens, scale, bias, p):
        kept = tokens if mask is None else jnp.where(mask[..., None], tokens, 0)
        return ggem_pool(
            norm.apply({"params": {"scale": scale, "bias": bias}}, kept),
            p,
            mask=mask,
            negatives=negatives,
        )

    joined = functools.partial(norm_ggem_pool, mask=mask, negatives=negatives)
    np.testing.assert_allclose(
        joined(tokens, scale, bias, p), apart(tokens, scale, bias, p), rtol=2e-6, atol=2e-6
    )
    gradients = [
        jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1, 2, 3))(tokens, scale, bias, p)
        for f in (joined, apart)
    ]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5 * np.abs(other).max())


def test_norm_ggem_pads_and_differentiates_twice():
    tokens = normal(0, (2, 4, 6))
    padded = jnp.concatenate([tokens, jnp.full((2, 3, 6), jnp.nan)], axis=1)
    mask = jnp.arange(7) < 4
    call = jax.jit(functools.partial(norm_ggem_pool, scale=jnp.ones(6), bias=jnp.zeros(6)))
    p = jnp.array([3.0, 2.0])
    np.testing.assert_allclose(
        call(padded, p=p, mask=jnp.broadcast_to(mask, (2, 7))), call(tokens, p=p), rtol=2e-6
    )
    gradient = jax.jit(jax.grad(lambda x: call(x, p=p, mask=jnp.broadcast_to(mask, (2, 7))).sum()))(
        padded
    )
    chex.assert_tree_all_finite(gradient)
    assert not np.asarray(gradient[:, 4:]).any()
    chex.assert_tree_all_finite(jax.jit(jax.hessian(lambda p: call(tokens, p=p).sum()))(p))
    half = call(tokens.astype(jnp.bfloat16), p=p)
    assert half.dtype == jnp.bfloat16


def test_a_vit_with_the_fused_norm_has_the_same_parameters_and_descriptors():
    config = ViTConfig(patch=8, width=24, depth=1, heads=3, mlp_width=32, image=32, registers=1)
    images = normal(0, (2, 32, 32, 3))
    models = [
        ViT(config, pooling=GGeM(), num_classes=4, fused_norm=fused) for fused in (False, True)
    ]
    variables = draw_variables(models[0], images)
    chex.assert_trees_all_equal_shapes(variables, draw_variables(models[1], images))
    apart, joined = (jax.jit(model.apply)(variables, images) for model in models)
    chex.assert_trees_all_close(apart, joined, rtol=1e-5, atol=1e-6)
    gradients = [
        jax.jit(jax.grad(lambda v, m=m: jnp.sum(m.apply(v, images).descriptor ** 2)))(variables)
        for m in models
    ]
    chex.assert_trees_all_close(*gradients, rtol=1e-3, atol=1e-4)


MAP, TOKENS = np.ones((4, 4, 2), np.float32), np.ones((2, 9, 12), np.float32)
REFUSED = {
    "true as a window": (
        ValueError,
        "window must be an odd whole number, not True",
        lambda: regional_gem(MAP, window=True),
    ),
    "even window": (
        ValueError,
        "window must be an odd whole number, not 4",
        lambda: regional_gem(MAP, window=4),
    ),
    "small map": (
        ValueError,
        "h and w of at least 3 for a window of 5",
        lambda: regional_gem(MAP[:2]),
    ),
    "flat map": (
        ValueError,
        r"feature_map must be \(\.\.\., h, w, d\)",
        lambda: superglobal_pool(MAP[0]),
    ),
    "integer map": (
        TypeError,
        "feature_map must be floating point",
        lambda: regional_gem(MAP.astype(int)),
    ),
    "exponent": (
        ValueError,
        "regional_p must be a positive Python number, not 0",
        lambda: superglobal_pool(MAP, regional_p=0),
    ),
    "array exponent": (
        ValueError,
        "p must be a positive Python number",
        lambda: regional_gem(MAP, p=np.ones(2)),
    ),
    "no scales": (
        ValueError,
        r"descriptors must be \(scales, \.\.\., d\)",
        lambda: scale_gem(np.ones((0, 2, 3), np.float32)),
    ),
    "one descriptor": (
        ValueError,
        r"descriptors must be \(scales, \.\.\., d\)",
        lambda: scale_gem(np.ones(3, np.float32)),
    ),
    "integer descriptors": (
        TypeError,
        "descriptors must be floating point",
        lambda: scale_gem(np.ones((3, 2), int)),
    ),
    "integers to normalise": (
        TypeError,
        "descriptors must be floating point, not int32",
        lambda: l2_normalize(np.array([[3, 4]], np.int32)),
    ),
    "no channels to normalise": (
        ValueError,
        r"descriptors must be \(\.\.\., d\) with at least one channel",
        lambda: l2_normalize(np.float32(3)),
    ),
    "exponent of scales": (
        ValueError,
        "p must be a positive Python number, not 0",
        lambda: scale_gem(np.ones((3, 2), np.float32), p=0),
    ),
    "eps": (ValueError, "eps must be a Python number", lambda: superglobal_pool(MAP, eps=0.0)),
    "scale": (
        ValueError,
        r"scale must be a scalar or \(12,\)",
        lambda: norm_ggem_pool(TOKENS, np.ones(3), np.ones(12), np.ones(3)),
    ),
    "norm_eps": (
        ValueError,
        "norm_eps must be a Python number from 1e-36",
        lambda: norm_ggem_pool(TOKENS, 1.0, 0.0, np.ones(3), norm_eps=0.0),
    ),
    "fused norm of another pooling": (
        ValueError,
        "fused_norm needs GGeM",
        lambda: ViT(ViTConfig(8, 24, 1, 3, 32, image=32), pooling=avg_pool, fused_norm=True).init(
            jax.random.key(0), jnp.ones((1, 32, 32, 3))
        ),
    ),
}


@pytest.mark.parametrize(("error", "sentence", "call"), REFUSED.values(), ids=REFUSED)
def test_mistakes_are_refused_in_one_sentence(error, sentence, call):
    with pytest.raises(error, match=sentence):
        call()
