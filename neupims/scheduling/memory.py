"""The memory in a search for schedules: the room of a channel, and what overflows it."""

from pathlib import Path

import numpy as np

from neupims.machine.case import Case
from neupims.machine.workload import Batch
from neupims.scheduling.objective import Problem, make_problem
from neupims.timing.capacity import channel_tiles, find_overflow, request_tiles
from neupims.timing.memory_check import check_memory

PUBLISHED = "as published"


def pose_problem(
    case: Case, new_only: int | None = None, *, allow_overflow: bool = False
) -> tuple[Problem, tuple[str, ...]]:
    """Returns the problem of a case, and warnings about the memory that its own schedule needs.

    Its own schedule may overflow a channel in either fidelity, because another one may fit. A
    channel has no limit where requests that stay overflow it already.

    Args:
        case: The case; its batch is the published schedule.
        new_only: Number of the last requests that may choose their channel (default: all).
        allow_overflow: Whether a batch that no schedule fits into the memory is searched too.

    Raises:
        ValueError: The memory holds no schedule of the batch.
    """
    records = (case.hardware, case.model, case.batch, case.parallel)
    over = find_overflow(*records, fidelity=case.fidelity)
    another_may_fit = not (over.weights or over.request or over.batch)
    warnings = check_memory(
        *records, fidelity=case.fidelity, allow_overflow=allow_overflow or another_may_fit
    )
    channels, lengths = np.asarray(case.batch.channels), np.asarray(case.batch.seq_lens)
    movable = len(lengths) if new_only is None else new_only
    stays = np.arange(len(lengths)) < len(lengths) - movable
    room = float(channel_tiles(case.hardware, case.model, case.parallel, len(lengths)))
    tiles = np.asarray(
        request_tiles(case.hardware, case.model, lengths, case.parallel, fidelity=case.fidelity)
    )
    held = np.bincount(channels, weights=tiles * stays).max()
    problem = make_problem(
        case.hardware,
        case.model,
        case.parallel,
        lengths,
        resident=np.where(stays, channels, -1),
        room=np.inf if warnings and (allow_overflow or held > room) else room,
        fidelity=case.fidelity,
    )
    return problem, tuple(f"{PUBLISHED}, {each}" for each in warnings)


def check_best(case: Case, batch: Batch, export: str | Path | None = None) -> tuple[str, ...]:
    """Returns warnings about the memory that the best schedule needs.

    Args:
        case: The case.
        batch: The best schedule.
        export: The trace to which it is written, if any.
    """
    records = (case.hardware, case.model, batch, case.parallel)
    found = check_memory(*records, fidelity=case.fidelity, allow_overflow=True)
    which = f"in {export}, the best schedule" if export else "in the best schedule"
    return tuple(f"{which}, {each}" for each in found)
