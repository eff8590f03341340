"""Tolerances of the kernels: what their derivation takes for granted of the tokens."""

import numpy as np
import pytest

from benchmarks.kernel_numerics import EXPONENTS, SHAPES
from benchmarks.kernel_tolerances import rescaled_shares, slope_error, value_error


def shares(x, p, step):
    """How often the sum of (x / largest)^p over tokens `(b, n, d)` is rescaled, weighted by the
    share of the final sum, when a kernel takes `step` tokens at a time.
    """
    whole = x.shape[1] // step * step
    steps = x[:, :whole].reshape(len(x), -1, step, x.shape[2])
    largest = np.maximum.accumulate(steps.max(axis=2), axis=1)
    sums = np.cumsum(np.sum((steps / largest[:, -1:, None]) ** p, axis=2), axis=1)
    grows = largest[:, 1:] > largest[:, :-1]
    return np.sum(sums[:, :-1] / sums[:, -1:] * grows, axis=1)


@pytest.mark.parametrize("p", EXPONENTS)
def test_sums_are_rescaled_no_oftener_than_the_tolerances_assume(p):
    rng = np.random.default_rng(0)
    for _, n, d, _ in SHAPES:
        tokens = np.clip(rng.normal(0.5, 1, (1, n, d)), 1e-6, 3)
        for step in (1, 8, 64):
            assert shares(tokens, p, step).max() < rescaled_shares(p)


def test_a_hand_worked_share():
    """After 1 and 1, a 2 comes: at p = 1, half of the final sum is rescaled once."""
    assert shares(np.array([1.0, 1.0, 2.0]).reshape(1, 3, 1), 1.0, 1).item() == 0.5


@pytest.mark.parametrize("operation", ["ggem", "norm_ggem"])
def test_tolerances_are_within_reach_of_float32(operation):
    for p in EXPONENTS:
        assert 2.0**-22 < value_error(operation, 196, p, "float32") < 1e-5
        assert slope_error("ggem", 196, p, "float32") < 1e-5
        assert slope_error(operation, 196, p, "bfloat16") < 0.05
