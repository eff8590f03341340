"""The best evaluation of a run: its checkpoint is kept, and training stops when none is better."""

import math
import shutil
from typing import Any

import jax

from train.checkpoints import Checkpoints
from train.cli import Refused
from train.config import Config
from train.log import read_metrics
from train.step import State

LOWER_IS_BETTER = ("nll",)
FOLDER = "best"  # in the folder of the run; a run of its own for evaluations


class Best:
    """The best evaluation so far, by one of its measures.

    It is read from `metrics.jsonl`, so that a run that resumes stops where it would have stopped.

    Args:
        config: The settings of the run, with `keep` and `patience`.
        start: The step after which the run resumes; later evaluations are forgotten.
    """

    def __init__(self, config: Config, start: int):
        self.run, self.measure, self.patience = config.out, config.kept_measure, config.patience
        if self.measure is None:
            return
        self.step, self.value, self.since = 0, math.nan, 0
        if start and (self.run / "metrics.jsonl").is_file():
            for line in read_metrics(self.run, "eval"):
                if line["step"] <= start:
                    self._improves(line["step"], line[self.measure])

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` evaluations were no better than the best one."""
        return (
            self.measure is not None and self.patience is not None and (self.since >= self.patience)
        )

    def add(self, step: int, values: dict[str, Any], state: State) -> None:
        """Notes an evaluation, and keeps the state where it is the best one so far.

        Args:
            step: The step that was evaluated.
            values: The measures of the evaluation by name.
            state: The state that was evaluated.

        Raises:
            Refused: The state cannot be written.
        """
        if self.measure is None or not self._improves(step, values[self.measure]):
            return
        folder = self.run / FOLDER
        if jax.process_index() == 0:
            folder.mkdir(exist_ok=True)
            for path in (*self.run.glob("*.json"), *self.run.glob("*.crc32")):
                shutil.copy2(path, folder)
            for path in (folder / "checkpoints").glob("*"):  # of steps that are repeated now
                if path.name.isdigit() and int(path.name) > step:
                    shutil.rmtree(path)
        kept = Checkpoints(folder, keep=1)
        kept.save(state)
        kept.wait()

    def say(self) -> str:
        """Returns the best evaluation in words, or an empty string."""
        if self.measure is None or not self.step:
            return ""
        return (
            f"best {self.measure} {self.value:.4g} after step {self.step:,}, kept in"
            f" {self.run / FOLDER}"
        )

    def _improves(self, step: int, value: float) -> bool:
        sign = -1 if self.measure in LOWER_IS_BETTER else 1
        better = math.isfinite(value) and not sign * value <= sign * self.value
        if better:
            self.step, self.value = step, value
        self.since = 0 if better else self.since + 1
        return better


def check_keep(config: Config, measures: tuple[str, ...]) -> None:
    """Raises `Refused` if `--keep best:MEASURE` names no measure of the evaluations.

    Args:
        config: The settings of the run.
        measures: The measures of its evaluations.

    Raises:
        Refused: It does not.
    """
    if config.kept_measure not in (None, *measures):
        raise Refused(
            f"--keep best:{config.kept_measure} must name a measure of the evaluations:"
            f" {', '.join(measures)}"
        )
