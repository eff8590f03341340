"""ggem_jax/pooling/tokens.py against a float64 oracle, its closed-form gradient, and the
invariances of power means.
"""

import functools
import itertools
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from ggem_jax import pooling
from ggem_jax.pooling import avg_pool, cls_pool, gem_pool, ggem_pool, lse_pool, max_pool

NEGATIVES = ("clamp", "abs", "shift", "signed")
EXPONENTS = (1, 1.5, 3, 7, 20, 100, 1000)
SHAPES = (
    (1, 1, 1, 1),
    (2, 7, 12, 3),
    (3, 1, 6, 2),
    (2, 50, 33, 11),
    (1, 197, 40, 8),
    (4, 13, 5, 5),
)  # b, n, d, groups


def draw(rng, b, n, d, scale=1.0):
    return (scale * rng.normal(size=(b, n, d))).astype(np.float32)


def oracle(tokens, p, *, mask=None, eps=1e-6, negatives="clamp", layout="contiguous"):
    """The formulas of the module docstring in float64, with the largest power factored out; rows
    without a kept token are zero.
    """
    x = np.asarray(tokens, np.float64)
    b, n, d = x.shape
    p = np.asarray(p, np.float64)
    p = np.repeat(p, d // len(p)) if layout == "contiguous" else np.tile(p, d // len(p))
    keep = np.ones((b, n), bool) if mask is None else mask
    out = np.zeros((b, d))
    for i in range(b):
        rows = x[i, keep[i]]
        if not len(rows):
            continue
        low = rows.min(0)
        base = {
            "clamp": np.maximum(rows, eps),
            "abs": np.maximum(np.abs(rows), eps),
            "shift": rows - low + eps,
            "signed": np.abs(rows),
        }[negatives]
        sign = np.sign(rows) if negatives == "signed" else 1
        top = np.maximum(base.max(0), 1e-300)
        s = np.mean(sign * (base / top) ** p, axis=0)
        out[i] = np.sign(s) * top * np.abs(s) ** (1 / p) + (
            low - eps if negatives == "shift" else 0
        )
    return out


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.max(np.abs(got - want) / np.maximum(np.abs(want), 1e-30))


def row_error(got, want):
    """Compares with an error relative to the largest entry: for rules whose entries may cancel to
    almost nothing.
    """
    return np.max(np.abs(np.asarray(got, np.float64) - want)) / np.max(np.abs(want))


@functools.cache
def jitted(**options):
    return jax.jit(functools.partial(ggem_pool, **options))


@pytest.mark.sampled
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "interleaved"])
def test_ggem_equals_the_float64_formula(shape, layout):
    b, n, d, groups = shape
    rng = np.random.default_rng(sum(shape))
    for exponent in EXPONENTS:
        for scale in (1e-3, 1.0, 1e3):
            tokens = draw(rng, b, n, d, scale)
            p = np.full(groups, exponent, np.float32) * np.linspace(
                1, 1.5, groups, dtype=np.float32
            )
            got = jitted(layout=layout)(tokens, p)
            assert relative_error(got, oracle(tokens, p, layout=layout)) <= 2e-6, (exponent, scale)


@pytest.mark.parametrize("negatives", NEGATIVES[1:])
def test_other_sign_rules_equal_the_float64_formula(negatives):
    rng = np.random.default_rng(1)
    for exponent in EXPONENTS:
        for scale in (1e-3, 1.0, 1e3):
            tokens = draw(rng, 2, 50, 12, scale)
            p = np.array([exponent, exponent, exponent + 1], np.float32)
            error = row_error if negatives in ("shift", "signed") else relative_error
            assert (
                error(
                    jitted(negatives=negatives)(tokens, p), oracle(tokens, p, negatives=negatives)
                )
                <= 2e-6
            ), (exponent, scale)


def closed_form(tokens, p, cotangent, eps=1e-6):
    """Gradient of sum(cotangent * ggem) for the clamp rule in float64: f/p^2 (p sum(x^p ln
    x)/sum(x^p) - ln mean x^p) for p.
    """
    tokens, p = np.asarray(tokens, np.float64), np.asarray(p, np.float64)
    b, n, d = tokens.shape
    x, groups = np.maximum(tokens, eps), len(p)
    q = np.repeat(p, d // groups)
    y = oracle(tokens, p)[:, None]
    weight = (x / y) ** q  # x^p / mean x^p
    by_tokens = np.where(tokens > eps, cotangent[:, None] * (x / y) ** (q - 1) / n, 0)
    by_p = cotangent * y[:, 0] / q**2 * (q * np.mean(weight * np.log(x), 1) - q * np.log(y[:, 0]))
    return by_tokens, by_p.reshape(b, groups, -1).sum((0, 2))


def ggem_gradient(tokens, p, cotangent, **options):
    return jax.grad(
        lambda tokens, p: jnp.sum(ggem_pool(tokens, p, **options).astype(jnp.float32) * cotangent),
        (0, 1),
    )(tokens, p)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_gradient_equals_the_closed_form(exponent):
    rng = np.random.default_rng(2)
    tokens, cotangent = draw(rng, 3, 50, 12), rng.normal(size=(3, 12)).astype(np.float32)
    p = np.full(3, exponent, np.float32)
    by_tokens, by_p = ggem_gradient(tokens, p, cotangent)
    want_tokens, want_p = closed_form(tokens, p, cotangent)
    assert row_error(by_tokens, want_tokens) <= 2e-6 + 5e-7 * exponent
    assert row_error(by_p, want_p) <= 2e-5 + 5e-7 * exponent


@pytest.mark.sampled
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("exponent", [1, 1.5, 3, 7, 20])
def test_gradient_equals_finite_differences_of_the_oracle(negatives, exponent):
    rng = np.random.default_rng(3)
    tokens = draw(rng, 2, 9, 6).astype(np.float64)
    cotangent, p = rng.normal(size=(2, 6)), np.array([exponent, exponent + 0.5])

    def loss(tokens, p):
        return np.sum(cotangent * oracle(tokens, p, negatives=negatives))

    def difference(f, x, i, h):
        step = np.zeros_like(x)
        step[i] = h
        return (f(x + step) - f(x - step)) / (2 * h)

    want_tokens = np.array(
        [difference(lambda t: loss(t, p), tokens, i, 1e-6) for i in np.ndindex(tokens.shape)]
    ).reshape(tokens.shape)
    want_p = np.array([difference(lambda q: loss(tokens, q), p, i, 1e-6) for i in range(2)])
    by_tokens, by_p = ggem_gradient(
        jnp.float32(tokens), jnp.float32(p), cotangent, negatives=negatives
    )
    assert row_error(by_tokens, want_tokens) <= 2e-5
    assert row_error(by_p, want_p) <= 2e-5


def test_lowest_tokens_share_the_gradient_of_the_shift():
    """Two tokens tie for the minimum; p = 1 makes the shifted mean the mean, so every token has
    1/4.
    """
    tokens = jnp.array([[-2.0], [1.0], [-2.0], [3.0]])
    by_tokens = jax.grad(lambda t: gem_pool(t, 1.0, negatives="shift").sum())(tokens)
    np.testing.assert_allclose(by_tokens, np.full((4, 1), 0.25), rtol=1e-6)


def test_signed_mean_of_opposite_tokens_is_zero_with_zero_gradient():
    tokens = jnp.array([[2.0, 1.0], [-2.0, 1.0]])
    value, gradient = jax.value_and_grad(lambda t: gem_pool(t, 3.0, negatives="signed").sum())(
        tokens
    )
    assert value == 1.0
    np.testing.assert_allclose(gradient, [[0, 0.5], [0, 0.5]], rtol=1e-6)


def test_signed_with_p_one_is_the_mean_zeros_included():
    tokens = jnp.array([[0.0], [0.0], [3.0], [-1.0]])
    value, gradient = jax.value_and_grad(lambda t: gem_pool(t, 1.0, negatives="signed").sum())(
        tokens
    )
    assert value == pytest.approx(0.5)
    np.testing.assert_allclose(gradient, np.full((4, 1), 0.25), rtol=1e-6)


POOLS = {
    "avg": lambda t, mask: avg_pool(t, mask=mask),
    "max": lambda t, mask: max_pool(t, mask=mask),
    "lse": lambda t, mask: lse_pool(t, 10.0, mask=mask),
    "gem per channel": lambda t, mask: gem_pool(t, jnp.linspace(1, 9, t.shape[-1]), mask=mask),
    **{
        f"ggem {rule}": lambda t, mask, rule=rule: ggem_pool(
            t, jnp.array([1.0, 3, 40]), mask=mask, negatives=rule
        )
        for rule in NEGATIVES
    },
}


@pytest.mark.sampled
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("filling", [0.0, 1e30, -1e30, np.nan, np.inf, -np.inf])
def test_padding_changes_neither_value_nor_gradient(pool, filling):
    rng = np.random.default_rng(4)
    tokens, cotangent = draw(rng, 2, 11, 6), rng.normal(size=(2, 6)).astype(np.float32)
    mask = np.ones((2, 17), bool)
    mask[:, [0, 3, 4, 9, 15, 16]] = False
    padded = np.full((2, 17, 6), filling, np.float32)
    padded[mask] = tokens.reshape(-1, 6)

    def both(tokens, mask):
        return jax.value_and_grad(lambda t: jnp.sum(pool(t, mask) * cotangent))(tokens)

    np.testing.assert_allclose(pool(padded, mask), pool(tokens, None), rtol=2e-6, atol=1e-7)
    by_tokens, by_padded = both(tokens, None)[1], both(jnp.array(padded), mask)[1]
    np.testing.assert_allclose(
        np.asarray(by_padded)[mask].reshape(by_tokens.shape), by_tokens, rtol=2e-5, atol=1e-7
    )
    assert not np.asarray(by_padded)[~mask].any()


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_a_row_with_nothing_to_keep_gives_zeros(pool):
    tokens = jnp.array(draw(np.random.default_rng(5), 2, 5, 6)).at[1].set(jnp.nan)
    mask = jnp.array([[True] * 5, [False] * 5])
    value, gradient = jax.value_and_grad(lambda t: jnp.sum(pool(t, mask)))(tokens)
    chex.assert_tree_all_finite((value, gradient))
    assert not np.asarray(pool(tokens, mask))[1].any()
    assert not np.asarray(gradient)[1].any()
    assert np.asarray(gradient)[0].any()


def random_cases(rng, count, n, d, groups, dtype):
    """Tokens of every size the dtype has: normal, tiny, huge, constant, zero, negative (dead) and
    equal-and-opposite channels.
    """
    top = float(jnp.finfo(dtype).max)
    scale = np.exp(rng.uniform(np.log(1e-8), np.log(0.4 * top), (count, 1, d)))
    x = rng.normal(size=(count, n, d)) * np.where(rng.random((count, 1, d)) < 0.5, 1.0, scale)
    kind = rng.integers(0, 8, (count, 1, d))
    x = np.where(kind == 1, -np.abs(x), x)
    x = np.where(kind == 2, 0.0, x)
    x = np.where(kind == 3, x[:, :1], x)
    x = np.where(kind == 4, np.where(np.arange(n)[:, None] % 2, -x[:, :1], x[:, :1]), x)
    x = np.where(kind == 5, np.sign(x) * top, x)
    p = np.exp(rng.uniform(0, np.log(1000), (count, groups)))
    return (
        jnp.asarray(np.clip(x, -top, top), dtype),
        jnp.asarray(p, jnp.float32),
        jnp.asarray(rng.random((count, n)) < rng.uniform(0, 1.2, (count, 1))),
    )


def test_ten_thousand_random_cases_are_finite():
    """12 compiled functions (sign rule x dtype) over 840 cases each: 10,080 values with their
    gradients for tokens and p.
    """
    rng, failures, cases = np.random.default_rng(6), [], 0
    for negatives in NEGATIVES:
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            tokens, p, mask = random_cases(rng, 840, 9, 8, 2, dtype)

            def value(tokens, p, mask, negatives=negatives):
                return ggem_pool(tokens, p, mask=mask, negatives=negatives)

            def sum_of_value(tokens, p, mask, value=value):
                return jnp.sum(value(tokens, p, mask).astype(jnp.float32) * 1e-3)

            results = jax.jit(
                lambda *a, f=value, g=sum_of_value: (
                    jax.vmap(f)(*a),
                    jax.vmap(jax.grad(g, (0, 1)))(*a),
                )
            )(tokens, p, mask)
            finite = jax.tree.map(lambda a: jnp.isfinite(a).reshape(len(a), -1).all(1), results)
            bad = ~functools.reduce(jnp.logical_and, jax.tree.leaves(finite))
            failures += [(negatives, dtype.__name__, int(i)) for i in np.flatnonzero(bad)]
            cases += len(tokens)
    assert cases >= 10_000
    assert failures == []


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.bfloat16, 2**-8), (jnp.float16, 2**-11), (jnp.float32, 2e-6)]
)
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_results_have_the_dtype_of_the_tokens_and_float32_accuracy(pool, dtype, tolerance):
    tokens = jnp.abs(jnp.asarray(draw(np.random.default_rng(7), 2, 197, 6), dtype)) + 1
    pooled = pool(tokens, None)
    chex.assert_type(pooled, dtype)
    np.testing.assert_allclose(
        pooled.astype(jnp.float32), pool(tokens.astype(jnp.float32), None), rtol=tolerance
    )


def test_float64_tokens_are_pooled_in_float64():
    tokens = draw(np.random.default_rng(8), 2, 9, 6).astype(np.float64)
    with jax.enable_x64(True):
        pooled = ggem_pool(jnp.asarray(tokens), jnp.array([1.0, 3, 40]))
    assert pooled.dtype == np.float64
    assert relative_error(pooled, oracle(tokens, [1.0, 3, 40])) <= 1e-13


class Variants(chex.TestCase):
    """Definitions that hold with and without jit."""

    def setUp(self):
        super().setUp()
        self.tokens = jnp.abs(jnp.array(draw(np.random.default_rng(9), 2, 20, 12))) + 0.1

    @chex.variants(with_jit=True, without_jit=True)
    def test_one_group_is_gem_and_d_groups_are_gem_per_channel(self):
        ggem, gem = self.variant(ggem_pool), self.variant(gem_pool)
        chex.assert_trees_all_close(
            ggem(self.tokens, jnp.array([3.0])), gem(self.tokens, 3.0), rtol=1e-6
        )
        p = jnp.linspace(1, 9, 12)
        chex.assert_trees_all_close(ggem(self.tokens, p), gem(self.tokens, p), rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_p_one_is_the_mean_of_positive_tokens_and_a_large_p_the_maximum(self):
        gem = self.variant(gem_pool)
        chex.assert_trees_all_close(gem(self.tokens, 1.0), avg_pool(self.tokens), rtol=1e-6)
        chex.assert_trees_all_close(gem(self.tokens, 1000.0), max_pool(self.tokens), rtol=4e-3)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*NEGATIVES)
    def test_order_of_tokens_does_not_matter(self, negatives):
        pool = self.variant(functools.partial(ggem_pool, negatives=negatives))
        tokens, p = self.tokens - 0.5, jnp.array([1.0, 3.0, 9.0])
        chex.assert_trees_all_close(pool(tokens, p), pool(tokens[:, ::-1], p), rtol=1e-5, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_power_mean_grows_with_p_and_scales_with_the_tokens(self):
        gem = self.variant(gem_pool)
        pooled = [gem(self.tokens, p) for p in (1.0, 1.5, 2.0, 5.0, 30.0, 400.0)]
        assert all(bool(jnp.all(b >= a * (1 - 1e-6))) for a, b in itertools.pairwise(pooled))
        chex.assert_trees_all_close(
            gem(7 * self.tokens, 3.0),
            7 * pooled[0] * (gem(self.tokens, 3.0) / pooled[0]),
            rtol=1e-6,
        )

    @chex.variants(with_jit=True, without_jit=True)
    def test_layouts_are_one_permutation_of_the_channels_apart(self):
        p = jnp.array([1.0, 3.0, 9.0])
        contiguous, interleaved = (
            self.variant(functools.partial(ggem_pool, layout=layout))
            for layout in ("contiguous", "interleaved")
        )
        order = (
            jnp.arange(12).reshape(3, 4).T.reshape(-1)
        )  # interleaved channel c takes contiguous channel order[c]
        chex.assert_trees_all_close(
            interleaved(self.tokens[..., order], p),
            contiguous(self.tokens, p)[..., order],
            rtol=1e-6,
        )

    @chex.variants(with_jit=True, without_jit=True)
    def test_plain_poolings(self):
        tokens = self.tokens
        chex.assert_trees_all_equal(self.variant(cls_pool)(tokens), tokens[:, 0])
        chex.assert_trees_all_equal(self.variant(max_pool)(tokens), tokens.max(1))
        chex.assert_trees_all_close(self.variant(avg_pool)(tokens), tokens.mean(1), rtol=1e-6)
        want = jax.scipy.special.logsumexp(10 * tokens, axis=1, b=1 / 20) / 10
        chex.assert_trees_all_close(self.variant(lse_pool)(tokens, 10.0), want, rtol=1e-6)


@pytest.mark.parametrize("r", [1e-8, 1e-4, 1e-2, 1.0, 10.0, 1000.0])
def test_lse_is_exact_from_the_average_to_the_maximum(r):
    tokens = draw(np.random.default_rng(17), 2, 50, 6)
    wide = tokens.astype(np.float64)
    top = wide.max(1, keepdims=True)
    want = top[:, 0] + np.log1p(np.expm1(r * (wide - top)).mean(1)) / r
    np.testing.assert_allclose(lse_pool(tokens, r), want, rtol=0, atol=2e-6 * np.abs(tokens).max())


def test_lse_of_the_widest_tokens_has_finite_gradients():
    tokens = jnp.array([[3.4e38], [-3.4e38]])
    chex.assert_tree_all_finite(
        jax.value_and_grad(lambda t, r: lse_pool(t, r)[0], (0, 1))(tokens, 1.0)
    )


def test_lse_lies_between_average_and_maximum_and_takes_any_sign():
    tokens = draw(np.random.default_rng(10), 2, 20, 6)
    np.testing.assert_allclose(lse_pool(tokens, 1e-3), avg_pool(tokens), atol=2e-3)
    np.testing.assert_allclose(lse_pool(tokens, 1e4), max_pool(tokens), atol=2e-3)
    per_channel = lse_pool(tokens, jnp.full(6, 5.0))
    np.testing.assert_allclose(per_channel, lse_pool(tokens, 5.0), rtol=1e-6)


def test_numpy_arrays_lists_and_integer_exponents_are_taken():
    tokens = draw(np.random.default_rng(15), 2, 9, 6)
    want = ggem_pool(jnp.array(tokens), jnp.array([3.0, 2.0]))
    np.testing.assert_array_equal(ggem_pool(tokens, [3, 2]), want)
    np.testing.assert_array_equal(
        ggem_pool(tokens, np.array([3, 2]), mask=np.ones((2, 9), bool)), want
    )
    np.testing.assert_array_equal(ggem_pool(tokens, np.array([3, 2]), mask=[[True] * 9] * 2), want)
    np.testing.assert_allclose(gem_pool(tokens, 3), gem_pool(tokens, 3.0), rtol=0)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_a_kept_nan_is_not_hidden(negatives):
    tokens = jnp.array([[jnp.nan, 1.0], [1.0, 2.0]])
    pooled = gem_pool(tokens, 3.0, negatives=negatives)
    assert jnp.isnan(pooled).tolist() == [True, False]


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_the_gradient_of_p_is_finite_up_to_the_widest_tokens(negatives):
    for values in ([3.4e38, -3.4e38], [2.05e38, 3.37e38, -2.36e38, -3.01e38, -1.84e38]):
        tokens = jnp.array(values)[:, None]
        chex.assert_tree_all_finite(
            [
                jax.grad(lambda p, x=tokens: gem_pool(x, p, negatives=negatives)[0])(p)
                for p in (1.0, 3.0, 20.0)
            ]
        )


def test_the_sign_of_the_smallest_numbers_is_that_of_the_rest():
    gradient = jax.grad(lambda t: gem_pool(t, 1.0, negatives="signed")[0])(
        jnp.array([[-5e-38], [1.0], [2.0]])
    )
    np.testing.assert_allclose(gradient, jnp.full((3, 1), 1 / 3), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_runs_without_rank_or_dtype_promotion(dtype):
    tokens, p, mask = (
        jnp.array(draw(np.random.default_rng(19), 2, 9, 6), dtype),
        jnp.array([3.0, 2.0]),
        jnp.arange(18).reshape(2, 9) % 3 > 0,
    )
    calls = [lambda t, n=n: ggem_pool(t, p, mask=mask, negatives=n) for n in NEGATIVES]
    calls += [
        lambda t: lse_pool(t, 10.0, mask=mask),
        lambda t: avg_pool(t, mask=mask),
        lambda t: max_pool(t, mask=mask),
    ]
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for call in calls:
            chex.assert_tree_all_finite(jax.grad(lambda t: call(t).sum())(tokens))  # noqa: B023


def test_xla_by_name_is_the_same_code():
    tokens, p = draw(np.random.default_rng(16), 2, 9, 6), np.array([3.0, 2.0])
    np.testing.assert_array_equal(ggem_pool(tokens, p, implementation="xla"), ggem_pool(tokens, p))


def test_spread_over_channels_by_hand():
    p = jnp.array([1.0, 2.0, 3.0])
    assert pooling.spread_over_channels(p, 6).tolist() == [1, 1, 2, 2, 3, 3]
    assert pooling.spread_over_channels(p, 6, layout="interleaved").tolist() == [1, 2, 3, 1, 2, 3]


def test_a_signed_mean_that_only_rounding_is_left_of_is_zero_with_zero_gradients():
    tokens = jnp.array([[1.0], [-1.0], [1e-16]])
    value, slopes = jax.value_and_grad(lambda t, p: gem_pool(t, p, negatives="signed")[0], (0, 1))(
        tokens, 2.0
    )
    assert value == 0
    chex.assert_trees_all_equal(slopes, jax.tree.map(jnp.zeros_like, slopes))


def test_a_new_sign_rule_is_one_entry(monkeypatch):
    """With m the maximum, (mean (m - x)^p)^(1/p): values and gradients follow from the record, and
    the kernels refuse the rule.
    """

    def below(x, mask, eps):
        highest = jnp.max(x, axis=-2)
        return highest[..., None, :] - x + eps, jnp.zeros_like(highest)

    monkeypatch.setitem(pooling.sign_rules.RULES, "below", pooling.sign_rules.SignRule(below))
    tokens, p = jnp.asarray(draw(np.random.default_rng(17), 1, 5, 4)), jnp.array([2.0, 3.0])

    def plain(tokens, p):
        gaps = jnp.max(tokens, -2, keepdims=True) - tokens + 1e-6
        return jnp.mean(gaps ** jnp.repeat(p, 2), -2) ** (1 / jnp.repeat(p, 2))

    pool = functools.partial(ggem_pool, negatives="below")
    for order, tolerance in ((lambda f: f, 1e-5), (lambda f: jax.jacrev(f, (0, 1)), 1e-4)):
        chex.assert_trees_all_close(
            order(pool)(tokens, p), order(plain)(tokens, p), rtol=tolerance, atol=1e-6
        )
    for call in (
        pool,
        lambda *a, **k: pooling.norm_ggem_pool(a[0], 1, 0, a[1], negatives="below", **k),
    ):
        with pytest.raises(NotImplementedError, match="do not have the sign rule below"):
            call(tokens, p, implementation="interpret")


def test_every_sign_rule_has_a_type_and_a_record():
    assert tuple(pooling.sign_rules.RULES) == typing.get_args(pooling.Negatives) == NEGATIVES


@pytest.mark.parametrize("pool", ["ggem", "norm"])
def test_skipped_tokens_are_as_if_sliced_off(pool):
    """The gradient of a skipped token is zero, whatever it holds."""
    function = {
        "ggem": ggem_pool,
        "norm": lambda x, p, **options: pooling.norm_ggem_pool(x, 1.5, 0.1, p, **options),
    }[pool]
    tokens = jax.random.normal(jax.random.key(0), (2, 9, 8)).at[:, 0].set(jnp.nan)
    p, mask = jnp.array([2.0, 3.5]), jnp.arange(9) != 4
    mask = jnp.broadcast_to(mask, (2, 9))
    value, pull = jax.vjp(lambda x, p: function(x, p, mask=mask, skip=1), tokens, p)
    want, pull_rest = jax.vjp(lambda x, p: function(x, p, mask=mask[:, 1:]), tokens[:, 1:], p)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    (by_tokens, by_p), (by_rest, want_p) = pull(want), pull_rest(want)
    np.testing.assert_allclose(by_tokens[:, 1:], by_rest, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(by_p, want_p, rtol=1e-5)
    assert not np.asarray(by_tokens[:, 0]).any()
