"""Checkpoints of a run: written while training goes on, the newest two kept, never half written."""

import contextlib
import inspect
import logging
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ggem_jax.weights.folders import checkpoint_steps
from train.cli import Refused, first_line
from train.step import State, Steps


class Checkpoints:
    """The checkpoints of a run, in `RUN/checkpoints`, one sub-folder for each step.

    A sub-folder is renamed into place when it is complete. The newest two are kept.

    Args:
        run: Folder of the run.
        read_only: Whether nothing is written or deleted, for evaluations.
        keep: Checkpoints that are kept, the newest ones.
    """

    def __init__(self, run: Path, *, read_only: bool = False, keep: int = 2):
        self.read_only = read_only
        self._writing = 0  # the step of the write that began last; 0: there was none
        self.folder = (run / "checkpoints").absolute()
        for logger in ("absl", "asyncio"):  # a failed write is raised, too; one message is enough
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        sys.unraisablehook = _without_echoes
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep, read_only=read_only
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def complete(self) -> list[int]:
        """Returns the complete steps, newest first."""
        return checkpoint_steps(self.folder.parent)

    def latest(self) -> int | None:
        """Returns the newest complete step, or None."""
        return max(self.complete(), default=None)

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
                self._manager.wait_until_finished()  # an error is that of the earlier write
                self._writing = step
                # A copy: on CPU the writer reads the very memory that the next step is allowed to
                # overwrite.
                self._manager.save(step, args=ocp.args.StandardSave(jax.tree.map(jnp.copy, state)))

    def check(self) -> None:
        """Raises `Refused` if a write has failed since the last call; it waits for none.

        With several processes, errors show in `save` and `wait` alone.

        Raises:
            Refused: A write failed.
        """
        if self._writing and jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            self.wait()
            self._writing = 0

    def wait(self) -> None:
        """Returns when everything that was saved is on disk.

        Raises:
            Refused: A write failed.
        """
        with self._failing_in_one_sentence():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, steps: Steps) -> State:
        """Returns the newest sound state, laid out on the devices as `steps` expects it.

        A line on standard error names newer checkpoints that cannot be read. They are moved to the
        folder `damaged` of the run, unless it is only read.

        Args:
            steps: The compiled steps of the run.

        Raises:
            Refused: The newest checkpoint is of a model of another size, or none can be read.
        """
        shapes = jax.eval_shape(steps.init, 0)
        layout = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            steps.state_sharding,
        )
        damaged: dict[int, str] = {}
        for step in self.complete():
            try:
                state = self._manager.restore(step, args=ocp.args.StandardRestore(layout))
            except Exception as error:  # of many kinds: files that are missing, cut off or altered
                if other := self._difference(step, layout):
                    raise Refused(
                        f"the checkpoint of step {step} is of another model: {other}"
                    ) from None
                damaged[step] = first_line(error)[:200]
                continue
            if damaged:
                self._set_aside(damaged, step)
            return state
        step, reason = next(iter(damaged.items()), (0, "there is none"))
        older = f", nor those of {', '.join(map(str, [*damaged][1:]))}" * (len(damaged) > 1)
        advice = f" (without the folder {self.folder} the run starts again)"
        raise Refused(
            f"the checkpoint of step {step} cannot be read{older}: {reason}"
            f"{'' if self.read_only else advice}"
        )

    def _difference(self, step: int, layout: State) -> str:
        """Returns an array whose shape is another in a checkpoint, in words, or an empty string."""
        try:
            found = ocp.StandardCheckpointHandler().metadata(self.folder / str(step) / "default")
            there, here = _shapes(found.tree), _shapes(layout)
        except Exception:  # it is damaged
            return ""
        names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        if not names:
            return ""
        name = next((name for name in names if name.startswith("params/")), names[0])
        shapes = (shapes.get(name, "not") for shapes in (there, here))
        return "{} is {} there and {} here".format(name, *shapes)

    def _set_aside(self, damaged: dict[int, str], sound: int) -> None:
        """Names the damaged checkpoints and moves them away, so that their steps can be written."""
        for step, reason in damaged.items():
            print(
                f"the checkpoint of step {step} cannot be read: {reason}; that of step {sound} is"
                " taken in its place",
                file=sys.stderr,
                flush=True,
            )
        if self.read_only:
            return
        if jax.process_index() == 0:
            for step in damaged:
                place = self.folder.parent / "damaged" / str(step)
                shutil.rmtree(place, ignore_errors=True)
                place.parent.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(place)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are moved away")
        self._manager.reload()

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
                f"the checkpoint of step {self._writing} could not be written to {self.folder}:"
                f" {reason} ({good})"
            ) from error


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a tree of arrays by their names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _without_echoes(unraisable) -> None:
    """Silences reads and writes that the storage library still reports after a failure.

    Each would print a traceback about the event loop that the library has closed.
    """
    if str(unraisable.exc_value) != "Event loop is closed" and not inspect.iscoroutine(
        unraisable.object
    ):
        sys.__unraisablehook__(unraisable)
