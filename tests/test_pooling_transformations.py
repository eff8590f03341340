"""ggem_jax/pooling/tokens.py under the transformations of JAX: vmap, scan, sharding, lowering."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ggem_jax.pooling import avg_pool, gem_pool, ggem_pool, max_pool

NEGATIVES = ("clamp", "abs", "shift", "signed")


def draw(rng, b, n, d):
    return rng.normal(size=(b, n, d)).astype(np.float32)


@pytest.mark.parametrize(
    "negatives",
    [
        "clamp",
        pytest.param("abs", marks=pytest.mark.slow),
        "shift",  # has a second result, the lowest tokens
        pytest.param("signed", marks=pytest.mark.slow),
    ],
)
def test_vmap_over_tokens_p_and_both_equals_the_loop(negatives):
    rng = np.random.default_rng(11)
    tokens, ps = jnp.array(draw(rng, 4, 9, 6)), jnp.array(rng.uniform(1, 9, (4, 3)), jnp.float32)
    pool = functools.partial(ggem_pool, negatives=negatives)
    gradient = jax.grad(lambda t, p: pool(t, p).sum(), (0, 1))
    for axes in ((0, None), (None, 0), (0, 0)):
        calls = [
            (tokens[i] if axes[0] == 0 else tokens[0], ps[i] if axes[1] == 0 else ps[0])
            for i in range(4)
        ]
        arguments = (tokens if axes[0] == 0 else tokens[0], ps if axes[1] == 0 else ps[0])
        for f in (pool, gradient):
            want = jax.tree.map(lambda *parts: jnp.stack(parts), *[f(*call) for call in calls])
            chex.assert_trees_all_close(jax.vmap(f, axes)(*arguments), want, rtol=1e-5, atol=1e-6)
    batch_of_masks = jnp.array(rng.random((4, 9)) < 0.6)
    want = jnp.stack([pool(tokens[0], ps[0], mask=m) for m in batch_of_masks])
    chex.assert_trees_all_close(
        jax.vmap(lambda m: pool(tokens[0], ps[0], mask=m))(batch_of_masks),
        want,
        rtol=1e-5,
        atol=1e-6,
    )
    whole = jax.grad(lambda t, p: jax.vmap(pool)(t, p).sum(), (0, 1))(tokens, ps)
    chex.assert_trees_all_close(whole, jax.vmap(gradient)(tokens, ps), rtol=1e-5, atol=1e-6)


def test_scan_learns_an_exponent():
    """Gradient descent on p inside `lax.scan` finds the exponent that made the target."""
    tokens = jnp.abs(jnp.array(draw(np.random.default_rng(12), 2, 30, 8)))
    target = gem_pool(tokens, 5.0)

    def step(p, _):
        loss, slope = jax.value_and_grad(lambda p: jnp.sum((gem_pool(tokens, p) - target) ** 2))(p)
        return p - 2.0 * slope, loss

    p, losses = jax.lax.scan(step, jnp.float32(3.0), length=300)
    assert abs(p - 5.0) < 0.01
    assert losses[-1] < 1e-5 * losses[0]


def test_gradient_keeps_only_tokens_p_and_the_pooled_value():
    tokens, p = jnp.ones((4, 10, 6)), jnp.array([3.0, 2.0])
    residuals = jax.tree.leaves(jax.vjp(lambda t, p: ggem_pool(t, p), tokens, p)[1])
    assert sum(leaf.size for leaf in residuals if leaf.ndim >= 2) <= tokens.size + 4 * 6
    assert sum(leaf.shape == tokens.shape for leaf in residuals) == 1


def mesh_of_eight():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def test_sharded_batch_stays_sharded_under_jit():
    """Value and gradient of a batch over 8 devices: equal to one device, and no device gathers
    tokens.
    """
    tokens, p = jnp.array(draw(np.random.default_rng(13), 16, 20, 12)), jnp.array([1.0, 3.0, 9.0])
    sharding = NamedSharding(mesh_of_eight(), P("data"))

    def loss(tokens, p):
        return jnp.sum(ggem_pool(tokens, p) ** 2)

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    sharded = jax.device_put(tokens, sharding)
    value, (by_tokens, by_p) = step(sharded, p)
    chex.assert_trees_all_close((value, (by_tokens, by_p)), step(tokens, p), rtol=1e-5, atol=1e-6)
    assert by_tokens.sharding.is_equivalent_to(sharding, 3)
    text = step.lower(sharded, p).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text


@pytest.mark.sampled
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_shard_map_with_and_without_checks(check_vma, masked):
    """Each device pools its part of the batch; the gradient of the shared exponents is the sum over
    the devices.
    """
    rng = np.random.default_rng(14)
    tokens, p = jnp.array(draw(rng, 16, 20, 12)), jnp.array([1.0, 3.0, 9.0])
    mask = jnp.array(rng.random((16, 20)) < 0.7) if masked else jnp.ones((16, 20), bool)
    pool = jax.shard_map(
        lambda t, p, m: ggem_pool(t, p, mask=m if masked else None),
        mesh=mesh_of_eight(), in_specs=(P("data"), P(), P("data")), out_specs=P("data"),
        check_vma=check_vma,
    )  # fmt: skip

    def loss(pool):
        return lambda tokens, p: jnp.sum(pool(tokens, p, mask) ** 2)

    got = jax.jit(jax.value_and_grad(loss(pool), (0, 1)))(tokens, p)
    want = jax.value_and_grad(loss(lambda t, p, m: ggem_pool(t, p, mask=m)), (0, 1))(tokens, p)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


def test_exponents_that_are_variables_of_nnx_are_taken_under_jit_and_grad():
    tokens, p = draw(np.random.default_rng(18), 2, 9, 6), nnx.Param(jnp.array([3.0, 2.0]))
    gradient = nnx.jit(nnx.grad(lambda p: ggem_pool(tokens, p).sum()))(p)
    np.testing.assert_allclose(
        gradient[...],
        jax.grad(lambda p: ggem_pool(tokens, p).sum())(jnp.array([3.0, 2.0])),
        rtol=1e-6,
    )


def test_padding_that_is_no_number_does_not_trip_the_nan_checks_of_jax():
    tokens, mask = jnp.array([[1.0, 2.0], [jnp.nan, jnp.nan]]), jnp.array([True, False])
    with jax.debug_nans(True):
        for call in (
            lambda t: ggem_pool(t, [3.0, 2.0], mask=mask),
            lambda t: avg_pool(t, mask=mask),
            lambda t: max_pool(t, mask=mask),
        ):
            np.testing.assert_allclose(call(tokens), [1.0, 2.0], rtol=1e-6)


@pytest.mark.sampled
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize(
    "axes", [("data", None, None), (None, None, "model"), ("data", None, "model")]
)
def test_explicitly_sharded_tokens_have_the_same_gradients(negatives, axes):
    mesh = jax.make_mesh(
        (2, 4), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Explicit)
    )
    tokens, p = jnp.array(draw(np.random.default_rng(20), 8, 5, 12)), jnp.array([3.0, 2.0, 1.5])
    gradient = jax.jit(
        jax.grad(lambda t, p: gem_pool(t, jnp.repeat(p, 4), negatives=negatives).sum(), (0, 1))
    )
    grouped = jax.jit(jax.grad(lambda t, p: ggem_pool(t, p, negatives=negatives).sum(), (0, 1)))
    want = gradient(tokens, p)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(tokens, NamedSharding(mesh, P(*axes)))
        whole = jax.device_put(p, NamedSharding(mesh, P()))
        for found in (gradient(sharded, whole), grouped(sharded, whole)):
            chex.assert_trees_all_close(
                jax.device_get(found), jax.device_get(want), rtol=1e-5, atol=1e-6
            )


def test_lowers_for_tpu_without_a_custom_call():
    tokens, p = jnp.zeros((2, 9, 6)), jnp.array([3.0, 2.0])
    step = jax.jit(jax.value_and_grad(lambda t, p: ggem_pool(t, p).sum(), (0, 1)))
    text = step.trace(tokens, p).lower(lowering_platforms=("tpu",)).as_text()
    assert "custom_call" not in text
