"""Checkpoints of a run: written while training goes on, the newest two kept, never half written."""

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

from train.cli import Refused, first_line
from train.step import State, Steps


class Checkpoints:
    """The checkpoints of a run, in `RUN/checkpoints`, one sub-folder for each step.

    A sub-folder is renamed into place when it is complete. The newest two are kept.

    Args:
        run: Folder of the run.
        read_only: Whether nothing is written or deleted, for evaluations.
    """

    def __init__(self, run: Path, *, read_only: bool = False):
        self.folder = (run / "checkpoints").absolute()
        for logger in ("absl", "asyncio"):  # a failed write is raised, too; one message is enough
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        sys.unraisablehook = _without_echoes
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else 2, read_only=read_only
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Returns the newest complete step, or None."""
        return max(
            (
                int(path.name)
                for path in self.folder.glob("*")
                if re.fullmatch("[0-9]+", path.name) and path.is_dir()
            ),
            default=None,
        )

    def save(self, state: State) -> None:
        """Starts to write a state and returns once it is copied, so that training may go on.

        A state whose step was the last to be saved is not written again.

        Args:
            state: The state after a step, on the devices.

        Raises:
            Refused: An earlier write failed, or this one cannot start.
        """
        step = int(state.step)
        with self._failing_in_one_sentence():
            if self._manager.latest_step() != step:
                # A copy: on CPU the writer reads the very memory that the next step is allowed to
                # overwrite.
                self._manager.save(step, args=ocp.args.StandardSave(jax.tree.map(jnp.copy, state)))

    def wait(self) -> None:
        """Returns when everything that was saved is on disk.

        Raises:
            Refused: A write failed.
        """
        with self._failing_in_one_sentence():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, steps: Steps) -> State:
        """Returns the newest state, laid out on the devices as `steps` expects it.

        Args:
            steps: The compiled steps of the run.

        Raises:
            Refused: The checkpoint cannot be read.
        """
        shapes = jax.eval_shape(steps.init, 0)
        layout = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            steps.state_sharding,
        )
        step = self.latest()
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(layout))
        except Exception as error:  # of many kinds: files that are missing, cut off or altered
            reason = first_line(error)
            advice = (
                f"without the folder {self.folder / str(step)} the run resumes from the checkpoint"
                " before it, or from its start"
            )
            raise Refused(
                f"the checkpoint of step {step} cannot be read: {reason[:200]} ({advice})"
            ) from error

    @contextlib.contextmanager
    def _failing_in_one_sentence(self):
        try:
            yield
        except Exception as error:  # of the operating system up to those of the storage library
            # of the writes that were given up
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            system = re.search(r"([^:]+) \[os_error_code", str(error))
            reason = system[1].strip() if system else first_line(error)
            last = self.latest()
            good = "there is none yet" if last is None else f"the last good one is of step {last}"
            raise Refused(
                f"a checkpoint could not be written to {self.folder}: {reason} ({good})"
            ) from error


def _without_echoes(unraisable) -> None:
    """Silences reads and writes that the storage library still reports after a failure.

    Each would print a traceback about the event loop that the library has closed.
    """
    if str(unraisable.exc_value) != "Event loop is closed" and not inspect.iscoroutine(
        unraisable.object
    ):
        sys.__unraisablehook__(unraisable)
