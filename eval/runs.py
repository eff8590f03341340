"""Trained runs in evaluations and studies.

An evaluation takes one or two runs on the same images and restores their newest checkpoints. This
module has what all of them share, and runs the trainings of a study.
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
    # of csv:FILE, wds:PATTERN and tfds:NAME, as in the training; None: as in the run
    separator: str | None = None
    quoting: Literal["auto", "csv", "none"] | None = None
    image_key: str | None = None
    caption_key: str | None = None
    label_key: str | None = None
    label_separator: str | None = None

    @property
    def runs(self) -> list[Path]:
        """The folders of the one or two runs."""
        return [run for run in (self.run, self.other) if run is not None]

    def data_of(self, trained: Data) -> Data:
        """Returns the data settings of an evaluation: those of the training, changed by the flags.

        Args:
            trained: Data settings of the training. Those of the fields `data` to
                `label_separator` and `corrupt` that are given replace its own.

        Raises:
            Refused: A flag is wrong.
        """
        names = (
            "corrupt", "data_dir", "separator", "quoting", "image_key", "caption_key", "label_key",
            "label_separator",
        )  # fmt: skip
        given = {"source": self.data} | {name: getattr(self, name) for name in names}
        try:
            return dataclasses.replace(
                trained, **{name: value for name, value in given.items() if value is not None}
            )
        except ValueError as error:
            raise Refused(str(error).replace("--data.", "--")) from None


@dataclass(frozen=True)
class RunResult:
    """The fields that the result of every evaluation has."""

    run: Path  # its folder
    step: int  # of the checkpoint
    p: dict[str, list[float]]  # learned exponents, by the path of their parameter


def say_exponents(p: dict[str, list[float]]) -> list[str]:
    """Returns a line of text for each parameter of learned exponents.

    Args:
        p: Exponents by the path of their parameter, as `train.loop.read_exponents` returns them.
    """
    return [
        f"learned {name}: {' '.join(f'{value:.2f}' for value in values)}"
        for name, values in p.items()
    ]


def require_same_images(
    first: Path, second: Path, pairs: Sequence[tuple[Any, Any]], what: str = "images"
) -> None:
    """Raises `Refused` unless two runs were evaluated on the same images.

    Args:
        first: Folder of one run, for the error.
        second: Folder of the other run.
        pairs: Pairs of arrays or values, one of each run, that must be equal.
        what: What the runs differ in, for the error.

    Raises:
        Refused: The members of a pair are not equal.
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
    """Returns the settings of a run with other data, fitted to the devices of this machine.

    The batch is rounded up to a multiple of the devices, and the weights are not split over them.

    Args:
        config: Settings of the run.
        data: The data to evaluate on.
    """
    devices = jax.device_count()
    return dataclasses.replace(
        config, data=data, fsdp=1, batch=-(-config.batch // devices) * devices
    )


def open_checkpoints(run: Path) -> Checkpoints:
    """Returns the checkpoints of a run, opened for reading.

    Args:
        run: Folder of the run.

    Raises:
        Refused: The run has no checkpoint.
    """
    if not has_checkpoint(run):
        raise Refused(
            f"{run} has no checkpoint yet: its training must reach one first (--checkpoint-every)"
        )
    return Checkpoints(run, read_only=True)


def train_in_study(train: Callable[..., TrainedRun], config: Any, **options: Any) -> TrainedRun:
    """Runs a training of a study, or resumes it, without printing.

    Args:
        train: The function `train` of a training script, such as `train.classify.train`.
        config: Settings of the training.
        **options: Further arguments of `train`, such as `data`.

    Returns:
        The run with its last evaluation.

    Raises:
        Refused: The training is refused. The sentence advises another --runs, which is the study's
            flag for the folder.
        KeyboardInterrupt: A signal stopped the training.
    """
    try:
        trained = train(config, quiet=True, **options)
    except Refused as error:
        raise Refused(str(error).replace("choose another --out", "choose another --runs")) from None
    if trained.signal is not None:
        raise KeyboardInterrupt
    return trained
