"""NPU and PIM side by side: when the operations of a stage start and end.

Each side slows the other down until one ends. This is the only place that decides how compute and
memory overlap. Cycles are core cycles.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from neupims.machine.calibration import Calibration
from neupims.machine.hardware import Hardware
from neupims.machine.record import Number
from neupims.timing.gemm import Work

BLOCKED = 1e4  # slow-down of the NPU's memory traffic while PIM owns the only row buffer
DRAINED = 100  # core cycles after which the bank queues hold no write of the operation before


class Side(NamedTuple):
    """The operations of one side of a stage, which follow each other from its start."""

    cycles: Float[Array, " operations"]  # core cycles of each operation
    end: Number  # core cycles until the last operation ends; 0 where there is none

    @property
    def starts(self) -> Float[Array, " operations"]:
        """The core cycles until each operation starts."""
        return _starts(self.cycles)


def side_by_side(
    hardware: Hardware,
    calibration: Calibration,
    npu: Sequence[Work],
    alone: Iterable[Number],
    beside: Iterable[Number],
) -> tuple[Side, Side]:
    """Returns the times of NPU and PIM operations that begin together.

    While PIM works, the NPU gets a share of its memory bandwidth (none with one row buffer). While
    the NPU works, PIM operations take `beside` instead of `alone`.

    Args:
        hardware: The machine; only its row buffers matter.
        calibration: The fitted constants; only `pim_slowdown` is used.
        npu: The operations of the NPU in their order; may be empty.
        alone: Core cycles of each PIM operation without the NPU.
        beside: Core cycles of each PIM operation beside the NPU.

    Returns:
        The side of the NPU and the side of PIM.
    """
    slowdown = jnp.where(
        jnp.asarray(hardware.pim.row_buffers) > 1, calibration.pim_slowdown, BLOCKED
    )
    solo = [work.cycles for work in npu]
    slow = [work.cycles + work.memory_cycles * slowdown for work in npu]
    own, shared = list(alone), list(beside)
    until = jnp.minimum(sum(slow), sum(shared)) if npu and own else 0.0
    return _follow(solo, slow, until), _follow(own, shared, until)


def _follow(solo: Sequence[Number], slow: Sequence[Number], until: Number) -> Side:
    """Runs operations at the slow pace `until` the first side has ended, then at their own pace."""
    if not solo:
        return Side(jnp.zeros(0), 0.0)
    paces = jnp.stack(slow)
    begin = _starts(paces)
    spent = jnp.clip(until - begin, 0, paces)
    left = 1 - spent / jnp.maximum(paces, 1e-9)  # the share of each that is done at its own pace
    cycles = jnp.where(begin + paces <= until, paces, spent + left * jnp.stack(solo))
    return Side(cycles, cycles.sum())


def _starts(cycles: Float[Array, " operations"]) -> Float[Array, " operations"]:
    """When operations start that follow each other."""
    return jnp.concatenate([jnp.zeros_like(cycles[:1]), jnp.cumsum(cycles)[:-1]])
