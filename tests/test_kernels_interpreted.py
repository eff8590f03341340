"""The kernels themselves, run by Triton's interpreter on the CPU, against the formulas in float64;
in processes of their own.

Outputs start as 0xCD bytes, so an element that is never written shows. Tolerances are relative:
values 5e-6, gradients 2e-5 + 5e-7 p of the row's largest for float32; what the tokens' own dtype
rounds to is added for bfloat16 (8e-3) and float16 (2e-3).
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.kernel_numerics import checks
from ggem_jax import pooling
from ggem_jax.pooling import ggem_pool, norm_ggem_pool, superglobal_pool

pytestmark = pytest.mark.interpreter

VALUE = {"float32": 5e-6, "bfloat16": 8e-3, "float16": 2e-3}
SHAPES = [
    (1, 1, 1, 1),
    (2, 7, 12, 3),
    (1, 50, 33, 11),
    (3, 1, 6, 2),
    (1, 197, 130, 13),
    (2, 37, 64, 64),
    (1, 300, 5, 5),
]  # b, n, d, groups
EXPONENTS = [1.0, 1.5, 3.0, 20.0, 1000.0]
RULES = ["clamp", "abs", "signed", "shift"]


def test_the_interpreter_runs():
    from triton.runtime.interpreter import InterpretedFunction

    from ggem_jax.kernels import ggem

    assert os.environ["TRITON_INTERPRET"] == "1"
    assert isinstance(ggem.pool_kernel, InterpretedFunction)


def draw(seed, b, n, d, groups, exponent, dtype="float32", rule="clamp", masked=False):
    """Tokens with a dead channel, exponents around `exponent`, a cotangent, and a mask that leaves
    one row empty if there are several.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(b, n, d))
    if rule == "signed":
        tokens = tokens + 1.5  # sums of both signs that do not cancel to rounding
    elif d > 2:
        tokens[..., 2] = -np.abs(tokens[..., 2])
    p = exponent * np.linspace(1, 1.3, groups)
    mask = None
    if masked:
        mask = rng.random((b, n)) < 0.7
        mask[:, rng.integers(n)] = True
        mask[0] &= b == 1
    cotangent = jnp.asarray(rng.normal(size=(b, d)), dtype).astype(jnp.float32)
    return jnp.asarray(tokens, dtype), jnp.asarray(p, jnp.float32), cotangent, mask


def rooted(tokens, p, eps=1e-6, rule="clamp", xp=jnp):
    """The power mean of one row `(n, d)` in float64, largest power first; p is `(d,)`."""
    low = xp.min(tokens, axis=0)
    x = {
        "clamp": xp.where(tokens > eps, tokens, eps),
        "abs": xp.where(xp.abs(tokens) > eps, xp.abs(tokens), eps),
        "shift": tokens - low + eps,
    }.get(rule, xp.where(tokens < 0, -tokens, tokens))
    top = jax.lax.stop_gradient(xp.max(x, axis=0))
    sign = xp.where(tokens < 0, -1.0, 1.0) if rule == "signed" else 1.0
    logs = xp.log(xp.where(x > 0, x / top, 1e-300))
    s = xp.mean(sign * xp.exp(p * logs), axis=0)
    return xp.sign(s) * top * xp.exp(xp.log(xp.abs(s)) / p) + (
        low - eps if rule == "shift" else 0.0
    )


def normed(tokens, scale, bias, eps=1e-6):
    far = tokens - jnp.mean(tokens, axis=-1, keepdims=True)
    return far / jnp.sqrt(jnp.mean(far * far, axis=-1, keepdims=True) + eps) * scale + bias


def oracle(row, arrays, mask, cotangent):
    """Values and gradients of `row(tokens (n, d), *parameters)` in float64, row by row over the
    kept tokens; empty rows are zeros.
    """
    tokens, *parameters = (np.asarray(a, np.float64) for a in arrays)
    values = np.zeros((len(tokens), tokens.shape[-1]))
    by_tokens, by_parameters = np.zeros_like(tokens), [np.zeros_like(p) for p in parameters]
    with jax.enable_x64(True):
        for i in range(len(tokens)):
            keep = np.ones(tokens.shape[1], bool) if mask is None else mask[i]
            if keep.any():
                values[i], pull = jax.vjp(jax.jit(row), tokens[i, keep], *parameters)
                by_tokens[i, keep], *rest = pull(np.asarray(cotangent[i], np.float64))
                by_parameters = [
                    a + np.asarray(b) for a, b in zip(by_parameters, rest, strict=True)
                ]
    return values, by_tokens, *by_parameters


def interpreted(function, arrays, cotangent):
    value, pull = jax.vjp(
        lambda *a: function(*a, implementation="interpret").astype(jnp.float32), *arrays
    )
    return value, *pull(cotangent)


def check(got, want, dtype, exponent, cotangent):
    """The gradient of p is compared on the scale of its parts, cotangent * value / p, because it is
    zero for a single token.
    """
    (value, *gradients), (true_value, *true_gradients) = (
        [np.asarray(a, np.float64) for a in side] for side in (got, want)
    )
    own = VALUE[dtype] if dtype != "float32" else 0
    np.testing.assert_allclose(
        value, true_value, rtol=max(own, 5e-6), atol=5e-6 * np.abs(true_value).max()
    )
    for i, (gradient, true_gradient) in enumerate(zip(gradients, true_gradients, strict=True)):
        limit = max(2e-5 + 5e-7 * exponent, own)
        size = max(
            np.abs(true_gradient).max(), 0.02 * np.abs(cotangent * true_value).max() / exponent
        )
        assert np.isfinite(gradient).all()
        assert np.abs(gradient - true_gradient).max() <= limit * size, i


def ggem_case(shape, exponent, dtype="float32", rule="clamp", layout="contiguous", masked=False):
    tokens, p, cotangent, mask = draw(sum(shape), *shape, exponent, dtype, rule, masked)
    d = tokens.shape[-1]

    def row(tokens, p):
        q = jnp.repeat(p, d // len(p)) if layout == "contiguous" else jnp.tile(p, d // len(p))
        return rooted(tokens, q, rule=rule)

    function = functools.partial(ggem_pool, mask=mask, negatives=rule, layout=layout)
    check(
        interpreted(function, (tokens, p), cotangent),
        oracle(row, (tokens, p), mask, cotangent),
        dtype,
        1.3 * exponent,
        cotangent,
    )


@pytest.mark.sampled
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_ggem(shape, exponent):
    ggem_case(shape, exponent)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES[1:6], ids=str)
def test_ggem_in_half_precision(shape, dtype):
    ggem_case(shape, 3.0, dtype)
    ggem_case(shape, 20.0, dtype)


@pytest.mark.sampled
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_ggem_under_each_sign_rule(shape, rule, masked):
    ggem_case(shape, 2.5, rule=rule, masked=masked, layout="interleaved")


@pytest.mark.sampled
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("exponent", [1.0, 7.0, 100.0])
def test_ggem_with_more_tokens_than_a_program_holds(exponent, masked):
    ggem_case((2, 290, 8, 2), exponent, masked=masked)


def norm_case(shape, exponent, dtype="float32", rule="clamp", masked=False):
    tokens, p, cotangent, mask = draw(sum(shape), *shape, exponent, dtype, rule, masked)
    tokens = 3 * tokens + 1
    d = tokens.shape[-1]
    rng = np.random.default_rng(1)
    scale, bias = (
        jnp.asarray(rng.normal(mean, 0.2, d), jnp.float32)
        for mean in (1, 1.5 if rule == "signed" else 0)
    )

    def row(tokens, scale, bias, p):
        return rooted(normed(tokens, scale, bias), jnp.repeat(p, d // len(p)), rule=rule)

    function = functools.partial(norm_ggem_pool, mask=mask, negatives=rule)
    arrays = (tokens, scale, bias, p)
    check(
        interpreted(function, arrays, cotangent),
        oracle(row, arrays, mask, cotangent),
        dtype,
        1.3 * exponent,
        cotangent,
    )


NORM_SHAPES = [(2, 7, 12, 3), (1, 50, 33, 11), (3, 1, 6, 2), (1, 197, 130, 13), (2, 150, 64, 4)]


@pytest.mark.sampled
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_norm_ggem(shape, exponent):
    norm_case(shape, exponent)


@pytest.mark.sampled
@pytest.mark.parametrize("rule", ["clamp", "abs", "signed"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("shape", NORM_SHAPES[:4], ids=str)
def test_norm_ggem_under_each_sign_rule(shape, rule, masked):
    norm_case(shape, 2.5, rule=rule, masked=masked)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", NORM_SHAPES[:2], ids=str)
def test_norm_ggem_in_half_precision(shape, dtype):
    norm_case(shape, 3.0, dtype)


def superglobal_oracle(x, regional_p, window, p, eps):
    x = np.maximum(np.asarray(x, np.float64), 0)
    h, w, half = *x.shape[1:3], window // 2
    powers = np.pad(x**regional_p, ((0, 0), (half, half), (half, half), (0, 0)), mode="reflect")
    sums = sum(powers[:, i : i + h, j : j + w] for i in range(window) for j in range(window))
    mixed = 0.5 * (sums / window**2) ** (1 / regional_p) + 0.5 * x
    return np.mean(np.maximum(mixed, eps) ** p, axis=(1, 2)) ** (1 / p)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "window", "regional_p", "p"),
    [
        ((1, 3, 3, 1), 5, 2.5, 4.6),
        ((2, 7, 5, 12), 5, 2.5, 4.6),
        ((1, 9, 11, 70), 3, 3.3, 2.0),
        ((1, 4, 6, 9), 7, 1.0, 1.0),
        ((2, 6, 4, 3), 1, 4.0, 8.0),
    ],
    ids=str,
)
def test_superglobal(shape, window, regional_p, p, dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype).at[..., -1].set(0.0)
    got = superglobal_pool(x, regional_p=regional_p, window=window, p=p, implementation="interpret")
    want = superglobal_oracle(x, regional_p, window, p, 1e-8)
    assert got.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=VALUE[dtype], atol=0 if dtype != "float16" else 1e-7
    )  # eps is below float16


@pytest.mark.parametrize(
    "scale", [1e-30, 1e-6, 1e30, 4e37]
)  # above 2^126 a reciprocal is subnormal: GPUs keep those, this CPU's callbacks do not
def test_superglobal_at_any_scale(scale):
    x = jnp.abs(jax.random.normal(jax.random.key(0), (1, 5, 5, 4))) / 4 * scale
    got = superglobal_pool(x, eps=1e-36, implementation="interpret")
    np.testing.assert_allclose(
        got,
        superglobal_oracle(np.asarray(x, np.float64) / scale, 2.5, 5, 4.6, 0) * scale,
        rtol=5e-6,
    )


@pytest.mark.sampled
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [1e-30, 1e30, 4e37])
def test_ggem_at_any_scale(scale, rule):
    x = np.random.default_rng(0).uniform(0.1, 1, size=(2, 40, 6)).astype(np.float32) * np.float32(
        scale
    )
    got = ggem_pool(
        jnp.asarray(x),
        jnp.array([3.0, 40.0]),
        negatives=rule,
        eps=1e-36,
        implementation="interpret",
    )
    want = ggem_pool(
        jnp.asarray(x), jnp.array([3.0, 40.0]), negatives=rule, eps=1e-36, implementation="xla"
    )
    np.testing.assert_allclose(got, want, rtol=5e-6)


@pytest.mark.parametrize("pool", ["ggem", "norm_ggem"])
def test_nan_is_kept_and_padding_is_not(pool):
    function = {
        "ggem": ggem_pool,
        "norm_ggem": lambda x, p, **o: norm_ggem_pool(x, jnp.ones(8), jnp.zeros(8), p, **o),
    }[pool]
    tokens = jax.random.normal(jax.random.key(0), (2, 9, 8)).at[0, 3].set(jnp.nan)
    p, mask = jnp.array([3.0, 5.0]), jnp.ones((2, 9), bool).at[:, 3].set(False)
    value = function(tokens, p, implementation="interpret")
    assert np.isnan(value[0]).all()
    assert np.isfinite(value[1]).all()
    gradient = jax.grad(
        lambda x, p: function(x, p, mask=mask, implementation="interpret").sum(), (0, 1)
    )(tokens, p)
    assert all(np.isfinite(g).all() for g in gradient)
    assert not np.asarray(gradient[0][:, 3]).any()


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("operation", ["ggem", "norm", "shift"])
def test_skipped_tokens_are_as_if_sliced_off(operation, masked):
    """Bit by bit; the gradient of a skipped token is zero, whatever it holds."""
    tokens = jax.random.normal(jax.random.key(0), (2, 72, 8)).at[:, :2].set(jnp.nan)
    p, scale = jnp.array([2.0, 3.5]), jnp.linspace(0.5, 1.5, 8)
    mask = np.random.default_rng(0).random((2, 72)) < 0.7 if masked else None

    def pool(tokens, p, **options):
        if operation == "norm":
            return norm_ggem_pool(tokens, scale, 0.1, p, implementation="interpret", **options)
        negatives = "shift" if operation == "shift" else "clamp"
        return ggem_pool(tokens, p, negatives=negatives, implementation="interpret", **options)

    value, pull = jax.vjp(lambda x, p: pool(x, p, mask=mask, skip=2), tokens, p)
    rest = None if mask is None else mask[:, 2:]
    want, pull_rest = jax.vjp(lambda x, p: pool(x, p, mask=rest), tokens[:, 2:], p)
    np.testing.assert_array_equal(value, want)
    (by_tokens, by_p), (by_rest, want_p) = pull(want), pull_rest(want)
    np.testing.assert_array_equal(by_tokens[:, 2:], by_rest)
    np.testing.assert_array_equal(by_p, want_p)
    assert not np.asarray(by_tokens[:, :2]).any()


def test_second_derivatives_do_not_see_the_padding():
    tokens = jax.random.normal(jax.random.key(0), (2, 9, 8)).at[:, 3].set(jnp.nan)
    p, mask = jnp.array([3.0, 5.0]), jnp.ones((2, 9), bool).at[:, 3].set(False)

    def total(scale, implementation):
        return jnp.sum(
            norm_ggem_pool(tokens, scale, 0.1, p, mask=mask, implementation=implementation) ** 2
        )

    got, want = (
        jax.jit(jax.hessian(functools.partial(total, implementation=i)))(jnp.linspace(0.5, 1.5, 8))
        for i in ("interpret", "xla")
    )
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def test_one_large_entry_and_a_large_exponent():
    """The mixed map reaches little more than half of the largest entry, whose 90th power the mean
    has to represent.
    """
    spike = jnp.zeros((8, 8, 2)).at[3, 4].set(jnp.array([1.0, 1e-3]))
    for settings in (
        {"p": 90.0},
        {"p": 90.0, "regional_p": 1.0, "window": 7},
        {"regional_p": 0.05},
    ):
        got, want = (
            superglobal_pool(spike, implementation=i, **settings) for i in ("interpret", "xla")
        )
        np.testing.assert_allclose(got, want, rtol=5e-6)


def test_nothing_mapped_gives_nothing():
    empty = jnp.zeros((0, 2, 7, 12))
    assert jax.vmap(functools.partial(pooled, implementation="interpret"), (0, None))(
        empty, EXPONENT
    ).shape == (0, 2, 12)


TOKENS, EXPONENT = jax.random.normal(jax.random.key(0), (8, 7, 12)), jnp.array([2.0, 3.0, 4.0])


def pooled(tokens, p, implementation):
    return ggem_pool(tokens, p, implementation=implementation)


def total(tokens, p, implementation):
    return jnp.sum(jnp.sin(pooled(tokens, p, implementation)))


TRANSFORMED = {
    "jit": lambda f, g: jax.jit(f)(TOKENS, EXPONENT),
    "grad": lambda f, g: jax.jit(jax.grad(g, (0, 1)))(TOKENS, EXPONENT),
    "vmap over tokens": lambda f, g: jax.vmap(f, (0, None))(TOKENS.reshape(2, 4, 7, 12), EXPONENT),
    "vmap over p": lambda f, g: jax.vmap(f, (None, 0))(
        TOKENS[:2], jnp.stack([EXPONENT, EXPONENT + 1])
    ),
    "vmap over both": lambda f, g: jax.vmap(f)(
        TOKENS.reshape(4, 2, 7, 12), EXPONENT + jnp.arange(4.0)[:, None]
    ),
    "vmap of vmap": lambda f, g: jax.vmap(jax.vmap(f, (None, 0)), (0, None))(
        TOKENS.reshape(4, 2, 7, 12)[:2], jnp.stack([EXPONENT, EXPONENT + 1])
    ),
    "vmap over another axis": lambda f, g: jax.vmap(f, (2, 1))(
        TOKENS.reshape(4, 1, 2, 7, 12), jnp.stack([EXPONENT, EXPONENT + 1], 1)
    ),
    "vmap of grad": lambda f, g: jax.vmap(jax.grad(g, (0, 1)), (0, None))(
        TOKENS.reshape(2, 4, 7, 12), EXPONENT
    ),
    "vmap of grad over both": lambda f, g: jax.vmap(jax.grad(g, (0, 1)))(
        TOKENS.reshape(4, 2, 7, 12), EXPONENT + jnp.arange(4.0)[:, None]
    ),
    "grad of vmap": lambda f, g: jax.grad(lambda x, p: jax.vmap(g, (0, None))(x, p).sum(), (0, 1))(
        TOKENS.reshape(2, 4, 7, 12), EXPONENT
    ),
    "jacrev": lambda f, g: jax.jacrev(lambda p: f(TOKENS[:1], p))(EXPONENT),
    "hessian": lambda f, g: jax.hessian(lambda p: g(TOKENS[:2], p))(EXPONENT),
    "scan": lambda f, g: jax.lax.scan(
        lambda c, x: (c + f(x, EXPONENT), None), jnp.zeros((4, 12)), TOKENS.reshape(2, 4, 7, 12)
    )[0],
    "leading axes": lambda f, g: f(TOKENS.reshape(2, 2, 2, 7, 12), EXPONENT),
    "no leading axis": lambda f, g: f(TOKENS[0], EXPONENT),
    "checkpoint": lambda f, g: jax.grad(jax.checkpoint(g), (0, 1))(TOKENS, EXPONENT),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations(name):
    sides = [
        [functools.partial(f, implementation=i) for f in (pooled, total)]
        for i in ("interpret", "xla")
    ]
    got, want = (TRANSFORMED[name](*side) for side in sides)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)


def test_norm_and_superglobal_under_vmap_and_grad():
    scale, bias = jnp.linspace(0.5, 1.5, 12), jnp.linspace(-0.1, 0.1, 12)

    def norm_total(tokens, scale, p, implementation):
        return jnp.sum(norm_ggem_pool(tokens, scale, bias, p, implementation=implementation) ** 2)

    got, want = (
        jax.jit(
            jax.vmap(
                jax.grad(functools.partial(norm_total, implementation=i), (0, 1, 2)), (0, None, 0)
            )
        )(TOKENS.reshape(2, 4, 7, 12), scale, jnp.stack([EXPONENT, EXPONENT + 1]))
        for i in ("interpret", "xla")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, want)
    maps = jnp.abs(jax.random.normal(jax.random.key(1), (2, 2, 5, 4, 6)))
    got, want = (
        jax.jit(jax.vmap(functools.partial(superglobal_pool, implementation=i)))(maps)
        for i in ("interpret", "xla")
    )
    np.testing.assert_allclose(got, want, rtol=5e-6)
    got, want = (
        jax.jit(jax.grad(lambda x, i=i: superglobal_pool(x, implementation=i).sum()))(maps[0])
        for i in ("interpret", "xla")
    )
    np.testing.assert_allclose(got, want, rtol=5e-6)


MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    spread = jax.shard_map(
        functools.partial(pooled, implementation="interpret"),
        mesh=MESH,
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    np.testing.assert_allclose(
        jax.jit(spread)(TOKENS, EXPONENT), pooled(TOKENS, EXPONENT, "xla"), rtol=5e-6
    )
    got = jax.jit(jax.grad(lambda x, p: jnp.sum(jnp.sin(spread(x, p))), (0, 1)))(TOKENS, EXPONENT)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
        got,
        jax.grad(total, (0, 1))(TOKENS, EXPONENT, "xla"),
    )


def test_jit_with_sharded_tokens():
    tokens = jax.device_put(TOKENS, NamedSharding(MESH, P("data")))
    got = jax.jit(jax.value_and_grad(total, (0, 1)), static_argnums=2)(
        tokens, EXPONENT, "interpret"
    )
    want = jax.value_and_grad(total, (0, 1))(TOKENS, EXPONENT, "xla")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)


@triton.jit
def log2_too_large(x, FAST: tl.constexpr):
    return tl.where(
        x > 0, tl.log2(x) + 2.0**-22 * tl.maximum(tl.abs(tl.log2(x)), 1.0), float("-inf")
    )


@triton.jit
def log2_too_small(x, FAST: tl.constexpr):
    return tl.where(
        x > 0, tl.log2(x) - 2.0**-22 * tl.maximum(tl.abs(tl.log2(x)), 1.0), float("-inf")
    )


@pytest.mark.sampled
@pytest.mark.parametrize("wrong", [log2_too_large, log2_too_small], ids=["too large", "too small"])
@pytest.mark.parametrize("exponent", [1.0, 3.0, 100.0, 1000.0])
def test_tolerances_hold_with_the_worst_error_of_the_fast_logarithm(monkeypatch, exponent, wrong):
    """The interpreter's logarithm gets the largest error that the GPU's may have: 2^-22 where its
    value is below 1, 2^-22 of the value elsewhere, always in one direction.
    """
    from ggem_jax.kernels import powers

    right = pooled(TOKENS, EXPONENT, "interpret")
    monkeypatch.setattr(powers, "log2", wrong)
    assert not np.array_equal(
        pooled(TOKENS, EXPONENT, "interpret"), right
    )  # the wrong logarithm is in use
    for shape in [(2, 50, 12, 3)] + [(1, 196, 160, 4)] * (
        exponent > 10
    ):  # the more entries, the larger their largest error
        ggem_case(shape, exponent)
        norm_case(shape, exponent)


def test_what_the_kernels_refuse_is_said():
    tokens = jnp.ones((2, 3, 4))
    with pytest.raises(NotImplementedError, match="not shift"):
        norm_ggem_pool(
            tokens,
            jnp.ones(4),
            jnp.ones(4),
            jnp.ones(2),
            negatives="shift",
            implementation="interpret",
        )
    with pytest.raises(NotImplementedError, match="regional_p up to 4, not 5"):
        superglobal_pool(jnp.ones((3, 3, 4)), regional_p=5.0, implementation="interpret")
    with pytest.raises(NotImplementedError, match="p up to 90, not 91"):
        superglobal_pool(jnp.ones((3, 3, 4)), p=91.0, implementation="interpret")
    with pytest.raises(NotImplementedError, match="at most 16384 tokens, not 16385"):
        ggem_pool(jnp.ones((16385, 1)), jnp.ones(1), implementation="interpret")
    with pytest.raises(NotImplementedError, match="float64"), jax.enable_x64(True):
        ggem_pool(np.ones((3, 4)), np.ones(2), implementation="interpret")
    assert pooling.ggem_pool(jnp.ones((16385, 1)), jnp.ones(1)).shape == (1,)


def test_the_checks_of_the_gpu_benchmark_pass():
    rows = list(checks("interpret", small=True))
    assert len(rows) > 60
    assert [row for row in rows if not row["passed"]] == []
