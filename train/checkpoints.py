"""Checkpoints of a run: written while the training goes on, two kept, never half there."""

import contextlib
import inspect
import logging
import re
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from train.cli import Refused
from train.step import State, Steps


class Checkpoints:
    """The folder `RUN/checkpoints` with one sub-folder per step, put in place by a rename once it
    is complete.
    """

    def __init__(self, run: Path, *, read_only: bool = False):
        self.folder = (run / "checkpoints").absolute()
        for logger in ("absl", "asyncio"):  # a failed write is raised as well, and said once
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        sys.unraisablehook = _without_echoes
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else 2, read_only=read_only
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The newest complete step."""
        return max(
            (
                int(path.name)
                for path in self.folder.glob("*")
                if re.fullmatch("[0-9]+", path.name) and path.is_dir()
            ),
            default=None,
        )

    def save(self, state: State) -> None:
        """Starts to write this state; returns when it has been copied and training may go on."""
        step = int(state.step)
        with self._failing_in_one_sentence():
            if self._manager.latest_step() != step:
                # A copy: on CPU the writer reads the very memory that the next step is allowed to
                # overwrite.
                self._manager.save(step, args=ocp.args.StandardSave(jax.tree.map(jnp.copy, state)))

    def wait(self) -> None:
        """Returns when what was saved is on disk."""
        with self._failing_in_one_sentence():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, steps: Steps) -> State:
        """The newest state, laid out on the devices as `steps` wants it."""
        shapes = jax.eval_shape(steps.init, 0)
        layout = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            steps.state_sharding,
        )
        step = self.latest()
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(layout))
        except (
            Exception
        ) as error:  # of many kinds again: files that are missing, cut off or altered
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            advice = (
                f"without the folder {self.folder / str(step)} the run goes on from the checkpoint"
                " before it, or from its start"
            )
            raise Refused(
                f"the checkpoint of step {step} cannot be read: {reason[:200]} ({advice})"
            ) from error

    @contextlib.contextmanager
    def _failing_in_one_sentence(self):
        try:
            yield
        except (
            Exception
        ) as error:  # of many kinds, from the operating system's up to the storage library's
            warnings.filterwarnings(
                "ignore", "coroutine .* was never awaited", RuntimeWarning
            )  # the writes that were given up
            system = re.search(r"([^:]+) \[os_error_code", str(error))
            reason = (
                system[1].strip()
                if system
                else (str(error).strip().splitlines() or [type(error).__name__])[0]
            )
            last = self.latest()
            good = "there is none yet" if last is None else f"the last good one is of step {last}"
            raise Refused(
                f"a checkpoint could not be written to {self.folder}: {reason} ({good})"
            ) from error


def _without_echoes(unraisable) -> None:
    """After a failure the storage library's other reads and writes still report, each with a
    traceback, to the event loop that it has closed.
    """
    if str(unraisable.exc_value) != "Event loop is closed" and not inspect.iscoroutine(
        unraisable.object
    ):
        sys.__unraisablehook__(unraisable)
