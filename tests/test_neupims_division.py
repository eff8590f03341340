"""neupims/machine/division.py: whole quotients in compiled code, over all of them up to 4,096."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neupims.machine.division import ceil_divide, divide, floor_divide

MOST = 4096
NUMBERS = np.arange(1, MOST + 1)
ROOMS = Path(__file__).parents[1] / "neupims"


def compiled(function, dividends, divisors):
    """Quotients of all dividends by each divisor, one row for each divisor.

    The divisor is the same for a whole row, as a knob of a design is for all its requests: there
    XLA multiplies by the reciprocal.
    """
    dividends = jnp.asarray(dividends, jnp.float32)

    @jax.jit
    def rows(divisors):
        return jax.lax.map(lambda divisor: function(dividends, divisor), divisors)

    return np.asarray(rows(jnp.asarray(divisors, jnp.float32)))


def test_every_quotient_of_whole_numbers_up_to_4096():
    a, b = NUMBERS[None, :], NUMBERS[:, None]
    assert np.array_equal(compiled(ceil_divide, NUMBERS, NUMBERS), -(-a // b))
    assert np.array_equal(compiled(floor_divide, NUMBERS, NUMBERS), a // b)
    exact = compiled(divide, NUMBERS, NUMBERS)
    assert np.array_equal(exact[a % b == 0], (a / b)[a % b == 0])
    np.testing.assert_allclose(exact, a / b, rtol=3e-7)


def test_the_plain_quotient_is_wrong():
    """What the module is for: if this fails, XLA divides exactly and the module can go."""
    plain = compiled(lambda a, b: jnp.ceil(a / b), NUMBERS, NUMBERS)
    assert plain[104, 734] == 8  # 735 / 105
    assert (plain != -(-NUMBERS[None, :] // NUMBERS[:, None])).sum() > 1000


def test_negative_dividends_and_numbers_up_to_2_to_the_24():
    rng = np.random.default_rng(0)
    divisors = rng.integers(1, 5000, 500)
    multiples = divisors * (2**24 // divisors - rng.integers(0, 50, 500))
    dividends = np.unique(np.concatenate([multiples - 1, multiples, multiples + 1]))
    dividends = np.concatenate([-dividends, dividends])[np.abs(np.tile(dividends, 2)) < 2**24]
    a, b = dividends[None, :], divisors[:, None]
    assert np.array_equal(compiled(ceil_divide, dividends, divisors), -(-a // b))
    assert np.array_equal(compiled(floor_divide, dividends, divisors), a // b)


@pytest.mark.parametrize("function", [divide, ceil_divide, floor_divide])
def test_infinite_and_undefined_quotients_are_those_of_a_division(function):
    for a, b, expected in (
        (np.inf, 3.0, np.inf),
        (3.0, np.inf, 0),
        (3.0, 0.0, np.inf),
        (0.0, 0.0, np.nan),
        (np.nan, 3.0, np.nan),
        (3.0, np.nan, np.nan),
    ):
        np.testing.assert_equal(float(jax.jit(function)(a, b)), expected)


def test_plain_numbers_of_python_of_any_size():
    assert float(ceil_divide(2**40 + 2**20, 2**20)) == 2**20 + 1
    assert float(divide(2**40, 2**33)) == 2**7


def test_no_quotient_is_rounded_without_them():
    """`jnp.ceil(a / b)` and `jnp.floor(a / b)` stand nowhere in the model."""
    found = []
    for path in sorted(ROOMS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) in ("jnp.ceil", "jnp.floor")
                and any(
                    isinstance(part, ast.BinOp) and isinstance(part.op, ast.Div | ast.FloorDiv)
                    for part in ast.walk(node)
                )
            ):
                found.append(path.name)
    assert found == ["capacity.py"]  # bytes, beyond 2^24
