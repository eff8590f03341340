"""neupims/timing/vector.py: element-wise work, worked by hand."""

import numpy as np
import pytest

from neupims.machine.calibration import DEFAULT
from neupims.machine.hardware import Hardware
from neupims.machine.record import replace
from neupims.timing.vector import (
    LATENCY_CYCLES,
    activation,
    layer_norm,
    residual_sum,
    softmax_cycles,
)

CODED, MEANT = (
    {"calibration": DEFAULT, "fidelity": fidelity} for fidelity in ("simulator", "intended")
)


@pytest.mark.parametrize(
    ("length", "cycles"),
    # 2 x tree + 3 x passes of 128 lanes; the tree of 512 is its 4 partial sums and then 1, of
    # 20,000 it is 157 + 2 + 1
    [
        (1, 2 * 1 + 3),
        (128, 2 * 1 + 3),
        (512, 2 * 5 + 3 * 4),
        (1024, 2 * 9 + 3 * 8),
        (20_000, 2 * 160 + 3 * 157),
        (0, 0),
    ],
)
def test_softmax_by_hand(length, cycles):
    assert float(softmax_cycles(Hardware(), length)) == cycles


def test_traffic_by_hand():
    """64 tokens of 4096 channels are 512 KiB; the norm also reads two rows of parameters."""
    array = 2 * 64 * 4096
    norm, total, gelu, gated = (
        layer_norm(Hardware(), 64, 4096, **CODED),
        residual_sum(Hardware(), 64, 4096, **CODED),
        activation(Hardware(), 64, 4096, 1, **CODED),
        activation(Hardware(), 64, 4096, 2, **CODED),
    )
    assert [float(work.read_bytes) for work in (norm, total, gelu, gated)] == [
        array + 2 * 2 * 4096,
        2 * array,
        array,
        2 * array,
    ]
    assert [float(work.write_bytes) for work in (norm, total, gelu, gated)] == [array] * 4
    assert float(total.cycles) == pytest.approx((2 * array + array / 2) / 1024 + LATENCY_CYCLES)


def test_rows_take_no_time_as_coded_and_their_own_as_meant():
    """With memory that never delays: a row a cycle in `simulator` fidelity; in `intended` fidelity
    GELU takes 32 passes over 4096 channels on one of 8 units.
    """
    fast = replace(Hardware(), "hbm.clock_hz", np.asarray(1e15))
    assert float(activation(fast, 64, 4096, 1, **CODED).cycles) == 64 + LATENCY_CYCLES
    assert float(activation(fast, 64, 4096, 1, **MEANT).cycles) == 64 * 32 / 8 + LATENCY_CYCLES
    assert (
        float(layer_norm(fast, 64, 4096, **MEANT).cycles)
        == 64 * (2 * 33 + 3 + 5 * 32) / 8 + LATENCY_CYCLES
    )


def test_what_was_left_to_write_delays_the_next_operation_as_coded():
    alone, after = (
        residual_sum(Hardware(), 64, 4096, inherited_bytes=left, **CODED) for left in (0, 2**20)
    )
    assert float(after.cycles - alone.cycles) == pytest.approx(2**20 / 2 / 1024)


@pytest.mark.parametrize("options", [CODED, MEANT])
def test_no_token_takes_no_time(options):
    for work in (
        layer_norm(Hardware(), 0, 64, **options),
        residual_sum(Hardware(), 0, 64, **options),
        activation(Hardware(), 0, 64, 1, **options),
    ):
        assert float(work.cycles) == 0
