"""The kernels on an NVIDIA GPU: python -m pytest -m gpu"""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.kernel_numerics import checks
from ggem_jax.pooling import ggem_pool

pytestmark = pytest.mark.gpu


def test_numerics_determinism_and_large_arrays():
    assert [row for row in checks("triton", small=False) if not row["passed"]] == []


def test_the_kernel_is_chosen_without_being_asked_for():
    text = jax.jit(ggem_pool).lower(jnp.ones((8, 196, 768)), jnp.full(12, 3.0)).compile().as_text()
    assert "triton_kernel_call" in text
