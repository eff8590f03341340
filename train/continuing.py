"""Starts a new run from the last checkpoint of another: `--resume-from RUN`."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.checkpoints import Checkpoints
from train.cli import Refused
from train.config import Config
from train.run import has_checkpoint, list_changes, read_run
from train.step import State, Steps


def continue_from(
    run: Path, config: Config, facts: dict[str, Any], steps: Steps, total: int
) -> tuple[State, str]:
    """Returns the last state of another run as one of a new run, and what has changed, in words.

    Weights, moving average and optimizer state are kept. The new run begins where the other one
    stands, counted in epochs, so that its learning rate is that of its own schedule there.

    Args:
        run: Folder of the other run, of the same script.
        config: The settings of the new run.
        facts: A description of the data of the new run.
        steps: The compiled steps of the new run.
        total: Steps of the new run.

    Raises:
        Refused: The folder is no such run or has no checkpoint, its state does not fit the new
            settings, or no epoch is left to train.
    """
    before, facts_before = read_run(run, type(config))
    if not has_checkpoint(run):
        raise Refused(f"--resume-from {run}: it has no checkpoint yet")
    changes = list_changes(config, facts, before, facts_before)
    said = "; ".join(changes) or "nothing but the folder"
    try:
        state = Checkpoints(run, read_only=True).restore(steps)
    except Refused as error:
        raise Refused(
            f"--resume-from {run}: {error}; changed: {said} (--init {run} takes its weights for"
            " another model)"
        ) from None
    there = int(state.step)
    epochs = there * before.batch / facts_before["train"]
    step = round(epochs * facts["train"] / config.batch)
    if step >= total:
        raise Refused(
            f"--resume-from {run}: it has trained {epochs:.4g} epochs, and --epochs"
            f" {config.epochs:g} leaves none: give the number of all epochs together"
        )
    return set_step(state, step), (
        f"from step {there:,} of {run} ({epochs:.4g} epochs), here step {step:,}; changed: {said}"
    )


def check_folder(config: Config) -> None:
    """Raises `Refused` if a run would continue itself as another.

    Args:
        config: The settings of the new run.

    Raises:
        Refused: Its folder is that of `--resume-from`.
    """
    run = config.resume_from
    if run is not None and run.resolve() == config.out.resolve():
        raise Refused(
            f"--resume-from {run} starts a new run and needs another --out; the command that"
            " started the run resumes it"
        )


def set_step(state: State, step: int) -> State:
    """Returns a state whose counts of steps, also those of the optimizer, are others.

    Args:
        state: A state on the devices.
        step: The new count.
    """

    def place(leaf: jax.Array) -> jax.Array:
        counts = leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer)
        if not counts:
            return leaf
        value = np.asarray(step, leaf.dtype)
        return jax.make_array_from_callback((), leaf.sharding, lambda _: value)

    return dataclasses.replace(
        state, step=place(state.step), opt_state=jax.tree.map(place, state.opt_state)
    )
