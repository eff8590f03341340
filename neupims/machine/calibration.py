"""The constants that the timing formulas cannot derive.

`python -m benchmarks.fit_neupims` fits them to runs of the public simulator.
"""

from neupims.machine.quantity import quantity
from neupims.machine.record import record

FIT = (
    "benchmarks/fit_neupims.py, on the runs of the public simulator whose identifier ends in an"
    " even digit"
)


@record
class Calibration:
    """The fitted constants: eight numbers for all systems."""

    queued_efficiency: float = quantity(
        0.954,
        'of the peak bandwidth, all reads in "intended" fidelity',
        "an earlier fit of this model to the same runs: reads that the bank queues hold at once",
    )
    streaming_efficiency: float = quantity(
        0.983, "of the peak bandwidth, reads of weights in the simulator", FIT
    )
    shallow_efficiency: float = quantity(
        0.867, "of the peak bandwidth with the 96 reads in flight of the NPU-only memory", FIT
    )
    backlog_bytes: float = quantity(
        2.5e6,
        "bytes of weights in which a bank falls behind by a row; by the square root in others",
        FIT,
    )
    stuck_after_norm: float = quantity(
        0.48,
        "share of products after a layer norm of few tokens that find a write stuck in a bank's"
        " queue",
        FIT,
    )
    stuck_after_activation: float = quantity(0.82, "the same after an activation", FIT)
    pim_slowdown: float = quantity(
        0.300, "more time for the NPU's memory traffic while PIM works beside it", FIT
    )
    reopen_cycles: float = quantity(
        60.0,
        "memory cycles that a GWRITE waits for reads in flight to close the row that they opened",
        FIT,
    )


DEFAULT = Calibration()
