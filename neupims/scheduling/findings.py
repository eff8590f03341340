"""Records of the results of a schedule search.

Costs are in the unit of the measure: core cycles of a layer for "time", joules for "energy", joules
times cycles for "energy-delay". Gains are shares of the cost of the published schedule.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from neupims.envelope import ExpectedError
from neupims.machine.case import Case
from neupims.machine.effects import idle_changes
from neupims.machine.record import to_values
from neupims.machine.systems import FIDELITY_ANSWERS
from neupims.machine.workload import Batch


class Score(NamedTuple):
    """A schedule's cost."""

    cost: float  # in the unit of the measure
    gain: float  # over the published schedule, as a share of its cost
    gap_to_bound: float | None  # above the lower bound, as a share of it; None without a bound


class Curve(NamedTuple):
    """The best cost so far, mean over seeds, with its 95 % interval."""

    evaluations: list[int]  # so far, of one seed
    best: list[float]  # mean of the best cost so far
    low: list[float]  # lower end of the interval
    high: list[float]  # upper end of the interval


class StrategyResult(NamedTuple):
    """The best schedule of a strategy."""

    cost: float  # in the unit of the measure; the best of all seeds
    gain: float  # as in `Score`
    gap_to_bound: float | None  # as in `Score`
    mean_cost: float  # over seeds
    evaluations: int  # of one seed
    seeds: int  # number of independent searches
    curve: Curve  # over the rounds


class Best(NamedTuple):
    """The best schedule of all."""

    cost: float  # in the unit of the measure
    gain: float  # as in `Score`
    gap_to_bound: float | None  # as in `Score`
    found_by: str  # the strategy, or the simple schedule
    sub_batches: int  # 1 or 2
    # Of predicted gains like this one against measured ones, `envelope.gain_error`; None where none
    # was measured.
    gain_error: dict[str, Any] | None
    knobs: dict[str, float]  # values of the hardware knobs by name


class ExactScores(NamedTuple):
    """Layer cycles by the exact path."""

    published: float  # core cycles
    best: float  # core cycles
    gain: float  # as a share of the published cycles


@dataclass(frozen=True)
class ScheduleSearch:
    """The result of a search for schedules."""

    case: Case  # its batch is the published schedule
    realisable: bool  # whether the public simulator can execute all schedules that were searched
    measure: str  # "time", "energy" or "energy-delay"
    overflow: tuple[str, ...]  # of schedules that do not fit the memory, one sentence each
    published: float  # cost of the published schedule
    lower_bound: float | None  # core cycles; None unless the measure is "time" without knobs
    baselines: dict[str, Score]  # the published schedule and the simple ones, by name
    strategies: dict[str, StrategyResult]  # by name
    best: Best  # of the simple schedules and all strategies
    best_batch: Batch  # the best schedule
    exact: ExactScores | None  # None unless it was asked for
    expected_error: ExpectedError  # of the best schedule's layer, or why none is known
    # Core cycles of attention of each sub-batch on each channel, "before" and "after" the search.
    channel_cycles: dict[str, list[list[float]]]
    trace: Path | None  # the file to which the best schedule was written

    @property
    def warnings(self) -> list[str]:
        """Sentences on memory that does not suffice, and on changes without effect."""
        case = self.case
        idle = idle_changes(case.hardware, case.system, case.fidelity, [case.model])
        return [*self.overflow, *idle]

    def to_dict(self) -> dict[str, Any]:
        """Returns the values of JSON, as `search --json` prints them."""
        return {
            "model": self.case.model_name,
            "batch": len(self.case.batch.seq_lens),
            "fidelity": self.case.fidelity,
            "realisable": self.realisable,
            "measure": self.measure,
            "warnings": self.warnings,
            "published": self.published,
            "lower_bound": self.lower_bound,
            "baselines": to_values(self.baselines),
            "strategies": to_values(self.strategies),
            "best": to_values(self.best),
            "exact": to_values(self.exact),
            "fidelity_answers": FIDELITY_ANSWERS[self.case.fidelity],
            **self.expected_error.to_dict(),
            "channel_cycles": self.channel_cycles,
            "trace": str(self.trace) if self.trace else None,
        }
