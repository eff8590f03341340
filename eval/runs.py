"""Trained runs as evaluations and studies use them.

One or two runs on the same images, their newest checkpoint, what is printed of both, and the
trainings of a study.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from tyro.conf import Positional

from train.checkpoints import Checkpoints
from train.cli import Refused
from train.config import C, Data
from train.loop import TrainedRun
from train.run import has_checkpoint


@dataclass(frozen=True)
class RunOptions:
    """One run, or two to compare, on the run's own images or on others."""

    run: Positional[Path]  # folder of a run
    other: Positional[Path | None] = None  # folder of another run to compare it with
    json: bool = False  # print one JSON object
    # what to do about an image that cannot be read; None: as in the run
    corrupt: Literal["refuse", "skip"] | None = None
    # evaluate on another source than the run's, written as --data of the training
    data: str | None = None
    data_dir: Path | None = None  # folder of the prepared tfds data sets; None: as in the run

    @property
    def runs(self) -> list[Path]:
        """The folders of the one or two runs."""
        return [run for run in (self.run, self.other) if run is not None]

    def data_of(self, trained: Data) -> Data:
        """Returns where the images come from, for a run that was trained with these settings."""
        data = dataclasses.replace(
            trained, source=self.data or trained.source, data_dir=self.data_dir or trained.data_dir
        )
        return dataclasses.replace(data, corrupt=self.corrupt or data.corrupt)


@dataclass(frozen=True)
class RunResult:
    """What every evaluation of a run knows."""

    run: Path
    step: int  # of the checkpoint
    p: dict[str, list[float]]  # learned exponents, by the path of their parameter


def say_exponents(p: dict[str, list[float]]) -> list[str]:
    """Returns a line for each parameter of learned exponents."""
    return [
        f"learned {name}: {' '.join(f'{value:.2f}' for value in values)}"
        for name, values in p.items()
    ]


def require_same_images(
    first: Path, second: Path, pairs: Sequence[tuple[Any, Any]], what: str = "images"
) -> None:
    """Checks that two runs were evaluated on the same images.

    Args:
        first: folder of the one run.
        second: folder of the other.
        pairs: arrays or values that must be equal, one of each run.
        what: what the sentence says they differ in.

    Raises:
        Refused: some pair is not equal.
    """
    if not all(
        np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other
        for one, other in pairs
    ):
        raise Refused(
            f"{first} and {second} were not evaluated on the same {what}, so they cannot be"
            " compared in pairs"
        )


def make_console() -> Console:
    """Returns a console that prints text as it is, in lines of any length."""
    return Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def replace_data(config: C, data: Data) -> C:
    """Returns the settings of a run with other data, for the devices that are here."""
    devices = jax.device_count()
    return dataclasses.replace(
        config, data=data, fsdp=1, batch=-(-config.batch // devices) * devices
    )


def open_checkpoints(run: Path) -> Checkpoints:
    """Returns the checkpoints of a run; raises `Refused` where there is none."""
    if not has_checkpoint(run):
        raise Refused(f"{run} has no checkpoint yet")
    return Checkpoints(run, read_only=True)


def train_in_study(train: Callable[..., TrainedRun], config: Any, **options: Any) -> TrainedRun:
    """Runs a training of a study, or resumes it, without printing.

    Raises:
        Refused: the training is refused; the sentence names the study's flag --runs for its folder.
        KeyboardInterrupt: a signal stopped the training.
    """
    try:
        trained = train(config, quiet=True, **options)
    except Refused as error:
        raise Refused(str(error).replace("choose another --out", "choose another --runs")) from None
    if trained.signal is not None:
        raise KeyboardInterrupt
    return trained
