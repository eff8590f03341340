"""Which implementation runs, and how the partitioner spreads it: without kernels, which need
triton.
"""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lax.control_flow import conditionals
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ggem_jax.kernels import launch
from ggem_jax.pooling import dispatch, ggem_pool, norm_ggem_pool, power_mean

MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
TOKENS = jax.random.normal(jax.random.key(0), (16, 9, 12))
P3 = jnp.full((1, 12), 3.0)


def fit():
    """The check of a kernel that refuses nothing."""
    return


def value(tokens, p):
    return power_mean.pooled_and_root(tokens, p[0], None, eps=1e-6, negatives="clamp")


def cotangents(tokens, p, root, cotangent):
    return power_mean.cotangents(tokens, p[0], None, root, cotangent, eps=1e-6, negatives="clamp")


def test_rows_stay_on_their_devices_in_value_and_gradient():
    """The rule of the kernels, around the plain bodies: a program for 8 devices gathers nothing."""
    rows = NamedSharding(MESH, P("data"))
    tokens = jax.device_put(TOKENS, rows)

    @jax.jit
    def step(tokens, p):
        pooled, root = dispatch.over_rows(value, (tokens, p), sets=[1])
        by_tokens, by_p = dispatch.over_rows(
            cotangents, (tokens, p, root, jnp.cos(pooled)), sets=[1]
        )
        return pooled, by_tokens, by_p.sum(0)

    text = step.lower(tokens, P3).compile().as_text()
    assert "all-gather" not in text
    assert text.count("all-reduce(") == 1  # of the gradient of p
    pooled, by_tokens, by_p = step(tokens, P3)
    assert pooled.sharding.is_equivalent_to(rows, 2)
    assert by_tokens.sharding.is_equivalent_to(rows, 3)
    want, pull = jax.vjp(lambda x, p: ggem_pool(x, p), TOKENS, P3[0])
    want_tokens, want_p = pull(jnp.cos(want))
    np.testing.assert_allclose(pooled, want, rtol=1e-6)
    np.testing.assert_allclose(by_tokens, want_tokens, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(by_p, want_p, rtol=1e-5, atol=1e-6)


def test_an_operation_with_more_than_ten_axes_is_partitioned():
    """The partitioner wants axes by number: the tenth after the ninth, not after the first."""
    rows = NamedSharding(MESH, P("data"))
    tokens, others = jax.device_put(TOKENS, rows), [jnp.full((1, 12), i) for i in range(12)]

    def body(tokens, *others):
        return (tokens * sum(others)[:, None],)

    step = jax.jit(lambda *arrays: dispatch.over_rows(body, arrays, sets=range(1, 13))[0])
    assert "all-gather" not in step.lower(tokens, *others).compile().as_text()
    np.testing.assert_allclose(step(tokens, *others), 66 * TOKENS, rtol=1e-6)


def test_several_sets_are_not_separated_from_their_rows():
    tokens = jax.device_put(TOKENS, NamedSharding(MESH, P("data")))
    p = jnp.linspace(1, 5, 4)[:, None] * jnp.ones((4, 12))

    def body(tokens, p):
        return (jnp.mean(tokens**2, axis=1) ** jnp.repeat(p, len(tokens) // len(p), axis=0),)

    (got,) = jax.jit(lambda x, p: dispatch.over_rows(body, (x, p), sets=[1]))(tokens, p)
    np.testing.assert_allclose(got, body(TOKENS, p)[0], rtol=1e-6)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 1)])
def test_a_mapped_axis_is_folded_into_the_rows(axes):
    tokens = (
        TOKENS
        if axes[0] is None
        else TOKENS.reshape((2, 8, 9, 12) if axes[0] == 0 else (8, 2, 9, 12))
    )
    p = P3 if axes[1] is None else jnp.stack([P3, P3 + 1], axis=axes[1])

    def plain(tokens, p):
        return value(tokens, p)[0], jnp.sum(tokens, 1)

    def body(tokens, p):
        largest = jnp.maximum(tokens, 1e-6)
        q = jnp.repeat(p, len(tokens) // len(p), axis=0)
        return jnp.mean(largest ** q[:, None], axis=1) ** (1 / q), jnp.sum(tokens, 1)

    got = jax.vmap(lambda x, p: dispatch.over_rows(body, (x, p), sets=[1]), axes)(tokens, p)
    want = jax.vmap(plain, axes)(tokens, p)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_without_kernels_the_plain_body_is_all_there_is(monkeypatch):
    for there, cases in ((False, 0), (True, 1)):
        monkeypatch.setattr(launch, "available", lambda there=there: there)
        body = jax.make_jaxpr(
            lambda x, p: dispatch.run_implementation(
                dispatch.choose_implementation(None, x, fit), lambda _, *a: value(*a), value, x, p
            )
        )(TOKENS, P3)
        assert str(body).count("platform_index") == cases


def test_the_body_of_the_platform_runs_and_its_derivative_is_that_of_the_formula(monkeypatch):
    """On a CPU the default body runs, though another one is there for CUDA; derivatives of any
    order are those of the plain body.
    """
    monkeypatch.setattr(launch, "available", lambda: True)
    calls = []

    def kernel(implementation, x):
        calls.append(implementation)
        return (x * 0,)

    def plain(x):
        return (x**3,)

    assert dispatch.choose_implementation(None, TOKENS, fit) is None
    f = functools.partial(dispatch.run_implementation, None, kernel, plain)
    assert float(jax.jit(f)(2.0)[0]) == 8
    assert calls == ["triton"]
    assert float(jax.grad(lambda x: f(x)[0])(2.0)) == 12
    assert float(jax.hessian(lambda x: f(x)[0])(2.0)) == 12


def test_eager_calls_choose_for_the_device_of_their_arrays(monkeypatch):
    """If the default device is a GPU, JAX answers "cuda" outside of jit, wherever arrays are."""
    monkeypatch.setattr(conditionals.platform_index_p, "impl", lambda *, platforms: np.int32(0))
    on_cpu = jax.device_put(jnp.ones(3), jax.devices("cpu")[0])
    assert float(jax.lax.platform_dependent(on_cpu, cuda=jnp.min, default=lambda x: 0 * x[0])) == 1

    def kernel(implementation, x):
        return (x * 0,)

    f = functools.partial(dispatch.run_implementation, None, kernel, lambda x: (x**3,))
    assert float(f(on_cpu)[0].sum()) == 3
    assert float(jax.grad(lambda x: f(x)[0].sum())(on_cpu).sum()) == 9
    assert float(jax.vmap(f)(on_cpu)[0].sum()) == 3


def test_eager_calls_with_the_same_options_are_compiled_once():
    traced = []

    def body(*arrays, power):
        traced.append(power)
        return (arrays[-1] ** power,)

    for power in (2, 2, 3):
        bodies = [functools.partial(body, power=power)] * 2
        assert float(dispatch.run_implementation(None, *bodies, jnp.float32(2))[0]) == 2**power
    assert sorted(set(traced)) == [2, 3]
    assert len(traced) == 4  # kernel and plain body, each once for 2 and for 3


def test_one_jitted_function_is_traced_for_each_gpu():
    """The cache does not return what was traced for one GPU, or for that of this machine, for
    another.
    """

    def kernel(implementation, x):
        return (x * (launch.capability() or 0),)

    body = functools.partial(dispatch.run_implementation, "triton", kernel, lambda x: (x,))
    pools = body, jax.jit(body), jax.jit(jax.vmap(body)), jax.jit(lambda x: jax.jvp(body, [x], [x]))
    for pool in pools:
        for capability in (80, 90, None, 80):
            with launch.compiled_for(capability):
                (got, *_) = jax.tree.leaves(pool(jnp.ones(3)))
            np.testing.assert_array_equal(got, capability or 0)


def test_the_partitioner_compiles_for_the_gpu_that_was_lowered_for():
    """The partitioner traces the body once more, after the context of the lowering has ended."""
    seen = []

    def body(tokens):
        seen.append((len(tokens), launch.capability()))
        return (2 * tokens,)

    tokens = jax.device_put(TOKENS, NamedSharding(MESH, P("data")))
    with launch.compiled_for(90):
        step = jax.jit(lambda x: dispatch.over_rows(body, (x,))[0]).lower(tokens)
    step.compile()
    assert (2, 90) in seen  # the rows of one device
    assert {capability for _, capability in seen} == {90}


def test_who_asks_for_a_kernel_gets_it_or_the_reason(monkeypatch):
    with pytest.raises(NotImplementedError, match="cast the tokens, or pass implementation=None"):
        dispatch.choose_implementation(
            "triton", TOKENS, lambda: "the kernels take float32: cast the tokens"
        )
    assert dispatch.choose_implementation(None, TOKENS, lambda: "the kernels take float32") == "xla"
    assert (
        dispatch.choose_implementation("xla", TOKENS, lambda: "the kernels take float32") == "xla"
    )
    with pytest.raises(ValueError, match="one of xla, triton, interpret, not 'cuda'"):
        dispatch.choose_implementation("cuda", TOKENS, fit)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="TRITON_INTERPRET=1"):
        norm_ggem_pool(TOKENS, jnp.ones(12), jnp.ones(12), jnp.ones(3), implementation="interpret")


def test_a_mesh_with_explicit_axis_types_takes_the_plain_body(monkeypatch):
    monkeypatch.setattr(launch, "available", lambda: True)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("data")))
        assert dispatch.choose_implementation(None, tokens, fit) == "xla"
        with pytest.raises(NotImplementedError, match=r"jax.shard_map or jax.sharding.auto_axes"):
            dispatch.choose_implementation("triton", tokens, fit)
        assert jax.jit(ggem_pool)(tokens, jnp.ones(3)).shape == (16, 12)


def test_shard_map_over_some_axes_takes_the_plain_body(monkeypatch):
    """Otherwise the partitioner would be asked to spread a kernel over the other axes."""
    monkeypatch.setattr(launch, "available", lambda: True)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    seen = []

    def pool(tokens, p):
        seen.append(dispatch.choose_implementation(None, tokens, fit))
        with pytest.raises(NotImplementedError, match="give it all of them"):
            dispatch.choose_implementation("triton", tokens, fit)
        return ggem_pool(tokens, p)

    spread = jax.jit(
        jax.shard_map(
            pool, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"}
        )
    )
    want = ggem_pool(TOKENS, P3[0], implementation="xla")
    np.testing.assert_allclose(spread(TOKENS, P3[0]), want, rtol=1e-6)
    assert set(seen) == {"xla"}


@pytest.mark.parametrize("sizes", ["b, 9, 12", "b, n, 12"])
def test_sizes_may_be_symbols(monkeypatch, sizes):
    monkeypatch.setattr(launch, "available", lambda: True)
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape(sizes), "float32")
    for implementation in (None, "xla"):
        exported = jax.export.export(
            jax.jit(functools.partial(ggem_pool, implementation=implementation)), platforms=("cpu",)
        )(shape, P3[0])
        want = ggem_pool(TOKENS, P3[0], implementation="xla")
        np.testing.assert_allclose(exported.call(TOKENS, P3[0]), want, rtol=1e-6)
    with pytest.raises(NotImplementedError, match="shapes that are known"):
        jax.export.export(
            jax.jit(functools.partial(ggem_pool, implementation="triton")), platforms=("cpu",)
        )(shape, P3[0])
