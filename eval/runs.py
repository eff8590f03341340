"""Trained runs as evaluations and studies use them: what is asked of one or two of them, their
newest checkpoint, trainings of a study.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
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
    corrupt: Literal["refuse", "skip"] | None = (
        None  # what to do about an image that cannot be read; None: as in the run
    )
    data: str | None = (
        None  # evaluate on another source than the run's, as --data of the training takes it
    )
    data_dir: Path | None = None  # folder of the prepared tfds data sets; None: as in the run

    def data_of(self, trained: Data) -> Data:
        """Where the images come from, of a run with these settings."""
        data = dataclasses.replace(
            trained, source=self.data or trained.source, data_dir=self.data_dir or trained.data_dir
        )
        return dataclasses.replace(data, corrupt=self.corrupt or data.corrupt)


def replace_data(config: C, data: Data) -> C:
    """The config of a run with other data, whatever devices it was trained on."""
    devices = jax.device_count()
    return dataclasses.replace(
        config, data=data, fsdp=1, batch=-(-config.batch // devices) * devices
    )


def open_checkpoints(run: Path) -> Checkpoints:
    """The checkpoints of a run, at least one."""
    if not has_checkpoint(run):
        raise Refused(f"{run} has no checkpoint yet")
    return Checkpoints(run, read_only=True)


def train_in_study(train: Callable[..., TrainedRun], config: Any, **options: Any) -> TrainedRun:
    """Runs a training of a study, or goes on with it, in silence; the study's flag for its folder
    is --runs.
    """
    try:
        trained = train(config, quiet=True, **options)
    except Refused as error:
        raise Refused(str(error).replace("choose another --out", "choose another --runs")) from None
    if trained.signal is not None:
        raise KeyboardInterrupt
    return trained
