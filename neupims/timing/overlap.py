"""NPU and PIM side by side: when the operations of a stage start and end.

Each side slows the other down until one ends. This is the only place that decides how compute and
memory overlap. Cycles are core cycles.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from neupims.machine.calibration import Calibration
from neupims.machine.hardware import Hardware
from neupims.timing.gemm import Work

BLOCKED = 1e4  # slow-down of the NPU's memory traffic while PIM owns the only row buffer
DRAINED = 100  # core cycles after which the bank queues hold no write of the operation before


class Side(NamedTuple):
    """When the operations of one side of a stage start and end, from the start of the stage."""

    starts: Float[Array, " operations"]  # core cycles
    ends: Float[Array, " operations"]  # core cycles
    cycles: Float[Array, " operations"]  # core cycles of each; free of the rounding of end - start


def side_by_side(
    hardware: Hardware,
    calibration: Calibration,
    npu: list[Work],
    alone: Float[Array, " p"],
    beside: Float[Array, " p"],
) -> tuple[Side, Side]:
    """Returns the start and end times of NPU and PIM operations that begin together.

    While PIM works, the NPU gets a share of its memory bandwidth (none with one row buffer). While
    the NPU works, PIM operations take `beside` instead of `alone`.

    Args:
        hardware: The machine; only its row buffers matter.
        calibration: The fitted constants; only `pim_slowdown` is used.
        npu: The operations of the NPU in their order; may be empty.
        alone: Core cycles of each PIM operation without the NPU, (p,).
        beside: Core cycles of each PIM operation beside the NPU, (p,).

    Returns:
        The side of the NPU and the side of PIM.
    """
    slowdown = jnp.where(
        jnp.asarray(hardware.pim.row_buffers) > 1, calibration.pim_slowdown, BLOCKED
    )
    solo = jnp.stack([work.cycles for work in npu]) if npu else jnp.zeros(0)
    slow = jnp.stack([work.cycles + work.memory_cycles * slowdown for work in npu]) if npu else solo
    both = npu and alone.shape[0]
    until = jnp.minimum(jnp.cumsum(slow)[-1], jnp.cumsum(beside)[-1]) if both else 0.0
    return _follow(solo, slow, until), _follow(alone, beside, until)


def _follow(solo, slow, until) -> Side:
    """Runs operations at the slow pace `until` the first side has ended, then at their own pace."""
    if not solo.shape[0]:
        return Side(solo, solo, solo)
    zero = jnp.zeros_like(solo[:1])
    slow_ends = jnp.cumsum(slow)
    spent = jnp.clip(until - jnp.concatenate([zero, slow_ends[:-1]]), 0, slow)
    left = 1 - spent / jnp.maximum(slow, 1e-9)  # the share of each that is done at its own pace
    cycles = jnp.where(slow_ends <= until, slow, spent + left * solo)
    ends = jnp.cumsum(cycles)
    return Side(jnp.concatenate([zero, ends[:-1]]), ends, cycles)
