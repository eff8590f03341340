"""tests/shape_checks.py: a wrong shape fails a test, and a function's own error is unchanged."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CHECKED_MODULES
from jaxtyping import Array, Float, TypeCheckError, jaxtyped
from shape_checks import check_arrays

from ggem_jax import pooling


@jaxtyped(typechecker=check_arrays)
def first_rows(x: Float[Array, "n d"], count: int, *, scale: float = 1) -> Float[Array, "m d"]:
    if x.ndim == 1:
        raise ValueError("x must be (n, d)")
    return jnp.asarray(x * scale)[:count]


@jaxtyped(typechecker=check_arrays)
def wrong(x: Float[Array, "n d"]) -> tuple[Float[Array, " n"], Float[Array, "n n"] | None]:
    return x.sum(0), None


@pytest.mark.parametrize("kind", [np.ones, jnp.ones])
def test_right_shapes_pass_whichever_library_the_array_is_of(kind):
    assert first_rows(kind((3, 2), np.float32), 2).shape == (2, 2)
    assert wrong(kind((3, 3), np.float32))[0].shape == (3,)


def test_wrong_shapes_and_dtypes_of_arguments_and_results_are_errors():
    with pytest.raises(TypeCheckError, match=r"return value of .*wrong"):
        wrong(jnp.ones((3, 2)))
    for x in (jnp.ones((1, 3, 2)), jnp.ones((3, 2), int)):
        with pytest.raises(TypeCheckError, match="first_rows"):
            first_rows(x, 1)


def test_what_a_function_refuses_keeps_its_message():
    with pytest.raises(ValueError, match=r"x must be \(n, d\)"):
        first_rows(jnp.ones(3), 1)


def test_the_modules_with_annotated_arrays_are_checked():
    assert {"ggem_jax.pooling.tokens", "neupims.timing.gemv", "train.step"} <= set(CHECKED_MODULES)
    assert not [name for name in CHECKED_MODULES if "kernels" in name]
    assert pooling.ggem_pool.__wrapped__.__module__ == "ggem_jax.pooling.tokens"
