"""The kernels as Triton compiles them, run by an interpreter of their PTX (`tests/ptx`) on the CPU.

Other than Triton's own interpreter, this runs what a GPU gets: fused multiply-adds, special
functions, shared memory, masks that became predicates. Results are compared with float64.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx.arithmetic import LARGEST_ERRORS, TYPES, compute, drawn, no_error
from ptx.code import PtxError, parse
from ptx.simulate import simulated

from benchmarks import kernel_numerics
from ggem_jax.pooling import ggem_pool, norm_ggem_pool

pytestmark = pytest.mark.ptx

CAPABILITIES = [80, 90, 100, 120]
ODD, WIDE = (2, 33, 100, 4), (2, 37, 384, 6)  # images, tokens, channels, exponents
CASES = {
    "ggem, float32": ("ggem", ODD, "float32", 1000.0, {}),
    "ggem, float16, p = 1": ("ggem", WIDE, "float16", 1.0, {}),
    "ggem, bfloat16, masked": ("ggem", WIDE, "bfloat16", 3.0, {"masked": True}),
    "ggem, bfloat16, abs": ("ggem", ODD, "bfloat16", 3.0, {"negatives": "abs"}),
    "ggem, float32, signed": ("ggem", ODD, "float32", 3.0, {"negatives": "signed"}),
    "ggem, float32, shift, masked": (
        "ggem", WIDE, "float32", 3.0, {"negatives": "shift", "masked": True},
    ),
    "ggem, float32, near the largest number": ("ggem", ODD, "float32", 3.0, {"size": 1e38}),
    "ggem, one token of one channel": ("ggem", (2, 1, 1, 1), "bfloat16", 3.0, {}),
    "ggem, float32, two tokens": ("ggem", (2, 2, 128, 4), "float32", 3.0, {}),
    "ggem, float32, few channels, shift": (
        "ggem", (2, 33, 20, 4), "float32", 3.0, {"negatives": "shift"},
    ),
    "norm, float32": ("norm_ggem", ODD, "float32", 1000.0, {}),
    "norm, bfloat16, masked": ("norm_ggem", WIDE, "bfloat16", 3.0, {"masked": True}),
    "norm, float16, signed": ("norm_ggem", ODD, "float16", 3.0, {"negatives": "signed"}),
    "norm, float32, abs": ("norm_ggem", WIDE, "float32", 3.0, {"negatives": "abs"}),
    "norm, few channels": ("norm_ggem", (3, 9, 8, 2), "bfloat16", 3.0, {}),
}  # fmt: skip
# The ends of published networks, of few images each.
REAL = [
    ("ggem", (2, 196, 768, 12), "bfloat16", 3.0, {}),
    ("ggem", (1, 1369, 1152, 16), "bfloat16", 3.0, {}),
    ("norm_ggem", (2, 197, 768, 12), "bfloat16", 3.0, {"masked": True}),
    ("norm_ggem", (1, 196, 1024, 16), "float32", 1000.0, {}),
    ("norm_ggem", (300, 5, 8, 2), "bfloat16", 3.0, {}),
    ("norm_ggem", (1, 3, 4000, 4), "bfloat16", 3.0, {}),
]


def failures(operation, shape, dtype, p, options):
    rows = kernel_numerics.against_float64(operation, shape, dtype, p, "triton", **options)
    return [row for row in rows if not row["passed"]]


@pytest.mark.sampled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name, capability):
    with simulated(capability) as runs:
        assert failures(*CASES[name]) == []
    assert len(runs) == 2


@pytest.mark.sampled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_maps(dtype, capability):
    with simulated(capability) as runs:
        rows = [*kernel_numerics.maps_against_float64((1, 9, 7, 20), dtype, "triton")]
    assert [row for row in rows if not row["passed"]] == []
    assert [run.kernel for run in runs] == ["regional_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", REAL, ids=str)
def test_real_shapes(case, capability):
    with simulated(capability):
        assert failures(*case) == []


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_checks_of_the_gpu_benchmark(capability):
    with simulated(capability):
        rows = list(kernel_numerics.checks("triton", small=True))
    assert len(rows) > 60
    assert [row for row in rows if not row["passed"]] == []


# What is changed in the PTX, and what then goes wrong.
FAULTS = {
    "a missing barrier": (r"bar\.sync\s+0;", "", "race: shared memory is"),
    "a missing store": (r"(@%p\d+ )?st\.global[^;]*;", "", "bytes of an output .* never written"),
    "a store without its mask": (r"@%p\d+ st\.global", "st.global", "outside of the outputs"),
    "a load without its mask": (r"@%p\d+ ld\.global", "ld.global", "outside of the inputs"),
    "a store two channels further on": (
        r"(st\.global\S* \[ %rd\d+ \+ )0", r"\g<1>4", "outside of the outputs|never written",
    ),
    "one place for the numbers of all threads": (
        r"(st\.shared\S*\s+\[)%r\d+", r"\g<1>global_smem", "different values to one place",
    ),
    "an unknown instruction": (r"lg2\.approx", "lg2.exact", "unknown instruction lg2.exact"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault):
    pattern, instead, message = FAULTS[fault]

    def edit(text):
        changed = re.sub(pattern, instead, text)
        assert changed != text
        return changed

    tokens = jnp.asarray(np.random.default_rng(0).normal(size=ODD[:3]), "float32")
    with simulated(90, edit=edit), pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(ggem_pool(tokens, jnp.full(4, 3.0), implementation="triton"))


def test_a_mask_the_wrong_way_round_gives_other_numbers():
    """The kernel skips the tokens to keep, and breaks no rule of memory."""

    def edit(text):
        changed = re.sub(r"setp\.(eq|ne)\.b16", lambda m: f"setp.{_OTHER[m[1]]}.b16", text)
        assert changed != text
        return changed

    case = CASES["norm, bfloat16, masked"]
    with simulated(90, edit=edit):
        assert "value" in {row["what"] for row in failures(*case)}


_OTHER = {"eq": "ne", "ne": "eq"}


ERRORS = {
    "all too large": lambda name, exact: 1.0,
    "all too small": lambda name, exact: -1.0,
    **{f"drawn, {seed}": drawn(seed) for seed in (1, 2)},
    **{
        f"{own} {sign:+.0f}": lambda name, exact, own=own, sign=sign: sign * (name == own)
        for own in LARGEST_ERRORS
        for sign in (1.0, -1.0)
    },
}
OPERATIONS = {"ggem": "ggem, float32", "norm_ggem": "norm, float32"}  # at p = 1000


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", [*ERRORS][:3])
def test_tolerances_hold_with_the_largest_documented_errors(name, operation):
    with simulated(90, error=ERRORS[name]):
        assert failures(*CASES[OPERATIONS[operation]]) == []


@pytest.mark.slow
@pytest.mark.parametrize("p", [1.0, 3.0, 100.0, 1000.0])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ERRORS)
def test_tolerances_hold_with_each_error_alone_and_for_every_exponent(name, operation, p):
    with simulated(90, error=ERRORS[name]):
        assert failures(operation, (2, 196, 96, 4), "float32", p, {}) == []


# Wrong kernels, by what is wrong: what is changed in the PTX, other constants, and a factor of the
# error of an instruction.
WRONG = {
    "the mean counts one token too many": ((r"0f42040000", "0f42080000"), {}, {}),  # 33 and 34
    "no series of logarithms near 1": (None, {"SERIES": False}, {}),
    "a power of two with 6 bits less": (None, {}, {"ex2.approx": 64.0}),
    "a logarithm with 6 bits less": (None, {}, {"lg2.approx": 64.0}),
}


@pytest.mark.parametrize("name", WRONG)
def test_tolerances_are_narrow_enough_for_wrong_kernels(name):
    replaced, constants, factors = WRONG[name]

    def edit(text):
        return re.sub(*replaced, text) if replaced else text

    for seed in (1, 2):

        def error(name, exact, seed=seed):
            return factors.get(name, 1.0) * drawn(seed)(name, exact)

        with simulated(90, error=error, edit=edit, constants=constants):
            assert failures(*CASES["ggem, float32"])


def test_what_the_interpreter_cannot_parse_is_named():
    with pytest.raises(PtxError, match="no entry point"):
        parse(".version 8.8")


@pytest.mark.parametrize(("kind", "want"), [("u32", 1), ("s32", -1), ("s64", -1)])
def test_extracted_bits_have_a_sign_where_the_type_has(kind, want):
    operands = {1: 0b1000000, 2: 6, 3: 1}  # one bit from bit 6 on
    found = compute(
        ("bfe", kind), 4, lambda i, as_kind: np.array([operands[i]], TYPES[as_kind]), no_error
    )
    assert found == want


def test_a_part_of_a_name_that_the_interpreter_does_not_know_is_named():
    with pytest.raises(PtxError, match=r"unknown instruction add\.sat\.s32"):
        compute(("add", "sat", "s32"), 3, lambda i, kind: np.array([1], TYPES[kind]), no_error)


def test_one_image_gives_the_same_bits_among_many():
    """Programs run in groups; the groups share the memory."""
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(70, 5, 8)), "bfloat16")
    pool = functools.partial(norm_ggem_pool, implementation="triton")
    scale, p = jnp.ones(8), jnp.full(2, 3.0)
    with simulated(90) as runs:
        many = np.asarray(pool(tokens, scale, scale, p), np.float32)
        again = np.asarray(pool(jnp.tile(tokens, (2, 1, 1)), scale, scale, p), np.float32)
    assert runs[0].programs == 70
    np.testing.assert_array_equal(again, np.concatenate([many, many]))


@pytest.mark.parametrize("operation", ["ggem", "norm_ggem"])
def test_skipped_tokens_are_as_if_sliced_off(operation):
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(2, 68, 8)), "bfloat16")
    p = jnp.array([2.0, 3.5])

    def pool(tokens, **options):
        if operation == "ggem":
            return ggem_pool(tokens, p, implementation="triton", **options)
        return norm_ggem_pool(tokens, 1.5, 0.1, p, implementation="triton", **options)

    with simulated(90):
        value, pull = jax.vjp(functools.partial(pool, skip=1), tokens)
        want, pull_rest = jax.vjp(pool, tokens[:, 1:])
        (by_tokens,), (by_rest,) = pull(want), pull_rest(want)
        arrays = [np.asarray(a, np.float32) for a in (value, want, by_tokens, by_rest)]
    np.testing.assert_array_equal(arrays[0], arrays[1])
    np.testing.assert_array_equal(arrays[2][:, 1:], arrays[3])
    assert not arrays[2][:, 0].any()
