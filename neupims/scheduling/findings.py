"""Records of what a search for schedules found.

Costs are core cycles of a layer, or what the measure says; gains are shares of the cost of the
published schedule.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from neupims.machine.case import Case
from neupims.machine.record import to_values
from neupims.machine.workload import Batch


class Score(NamedTuple):
    """A schedule's cost."""

    cost: float
    gain: float  # over the published schedule, as a share
    gap_to_bound: float | None  # above the lower bound, as a share


class Curve(NamedTuple):
    """The best cost so far, mean over seeds, with its 95 % interval."""

    evaluations: list[int]
    best: list[float]
    low: list[float]
    high: list[float]


class StrategyResult(NamedTuple):
    """The best schedule of a strategy."""

    cost: float
    gain: float
    gap_to_bound: float | None
    mean_cost: float  # over seeds
    evaluations: int  # of one seed
    seeds: int
    curve: Curve


class Best(NamedTuple):
    """The best schedule of all."""

    cost: float
    gain: float
    gap_to_bound: float | None
    found_by: str
    sub_batches: int
    gain_plus_minus: float | None  # the expected error of the gain
    knobs: dict[str, float]


class ExactScores(NamedTuple):
    """Layer cycles by the exact path."""

    published: float
    best: float
    gain: float


@dataclass(frozen=True)
class ScheduleSearch:
    """The result of a search for schedules."""

    case: Case
    realisable: bool
    measure: str
    warning: str  # that the requests of a channel do not fit its memory, else empty
    published: float
    lower_bound: float | None  # of the measure "time" without knobs
    baselines: dict[str, Score]
    strategies: dict[str, StrategyResult]
    best: Best
    best_batch: Batch  # the best schedule
    exact: ExactScores | None
    expected_error: dict[str, Any] | None  # of the best schedule's layer
    # Attention cycles of each sub-batch on each channel, "before" and "after" the search.
    channel_cycles: dict[str, list[list[float]]]
    trace: Path | None  # where the best schedule was written

    def to_dict(self) -> dict[str, Any]:
        """Returns the values of JSON, as `search --json` prints them."""
        return {
            "model": self.case.model_name,
            "batch": len(self.case.batch.seq_lens),
            "fidelity": self.case.fidelity,
            "realisable": self.realisable,
            "measure": self.measure,
            "warning": self.warning or None,
            "published": self.published,
            "lower_bound": self.lower_bound,
            "baselines": to_values(self.baselines),
            "strategies": to_values(self.strategies),
            "best": to_values(self.best),
            "exact": to_values(self.exact),
            "expected_error": self.expected_error,
            "channel_cycles": self.channel_cycles,
            "trace": str(self.trace) if self.trace else None,
        }
