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
    solo = jnp.cumsum(jnp.stack([work.cycles for work in npu])) if npu else jnp.zeros(0)
    slow = (
        jnp.cumsum(jnp.stack([work.cycles + work.memory_cycles * slowdown for work in npu]))
        if npu
        else solo
    )
    pim_solo, pim_slow = jnp.cumsum(alone), jnp.cumsum(beside)
    until = jnp.minimum(slow[-1], pim_slow[-1]) if npu and alone.shape[0] else 0.0
    return _follow(solo, slow, until), _follow(pim_solo, pim_slow, until)


def _follow(solo, slow, until) -> Side:
    """Runs operations at the slow pace `until` the first side has ended, then at their own pace."""
    if not solo.shape[0]:
        return Side(solo, solo)
    zero = jnp.zeros_like(solo[:1])
    begins, took = jnp.concatenate([zero, slow[:-1]]), jnp.diff(slow, prepend=0.0)
    # The share of each operation that is done at the slow pace.
    shares = jnp.clip(until - begins, 0, took) / jnp.maximum(took, 1e-9)
    done = (shares * jnp.diff(solo, prepend=0.0)).sum()
    ends = jnp.where(slow <= until, slow, until + solo - done)
    return Side(jnp.concatenate([zero, ends[:-1]]), ends)
