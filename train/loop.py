"""The loop of every training: steps, evaluations, checkpoints, and the lines that are printed.

A run lives in one folder (`--out`): `config.json`, `metrics.jsonl`, `checkpoints/`, `curves.png`.
SIGTERM or Ctrl-C stops it after the current step. Started again with the same settings it resumes
there and ends, on the same machine, with the same bits as an uninterrupted run.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ggem_jax.models.vit import used_exponents
from ggem_jax.optimizer import exponents
from train.batches import Batch
from train.checkpoints import Checkpoints
from train.cli import Refused, one_sentence
from train.config import Config
from train.continuing import check_folder, continue_from
from train.curves import draw_curves
from train.evaluate import put_on_devices
from train.log import Log
from train.published import start_from
from train.randaugment import augment_on_device, augments_on_device
from train.run import StopRequest, run_folder
from train.step import State, Steps
from train.stopping import Best
from train.throughput import Meter


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluation."""

    result: Any  # for the caller, such as `Predictions`
    values: dict[str, Any]  # for `metrics.jsonl`
    said: str  # the same for people, in words


@dataclass(frozen=True)
class Task:
    """One training as the loop sees it: its steps, batches and evaluation."""

    about: str  # the data in a few words
    total: int  # steps of the run
    steps: Steps  # the compiled steps
    flops: float  # of training on one example
    batches: Callable[[int], Iterator[Batch]]  # first step -> this process's rows of each batch
    evaluate: Callable[[State], Evaluation]  # state -> its evaluation
    curves: tuple[str, ...]  # values of evaluations that are drawn, in [0, 1]


@dataclass(frozen=True)
class TrainedRun:
    """A run that has ended or was stopped."""

    state: State  # after the last step
    steps: Steps  # the compiled steps
    result: Any  # of the last evaluation; None: the run was stopped before one
    finished: bool  # whether all steps are done, or --patience has ended it
    signal: int | None  # number of the signal that asked it to stop; None: there was none


def run_tool(tool: str, train: Callable[[list[str]], TrainedRun], argv: list[str] | None) -> None:
    """Runs a training script; a signal that stopped the run becomes the exit code.

    Args:
        tool: Name of the script.
        train: Function from flags to the run.
        argv: The flags; None takes those of the process.

    Raises:
        SystemExit: The run was stopped by a signal, or something went wrong (`one_sentence`).
    """
    # Kernels on several devices can then be found in JAX's compilation cache, if it is on. Other
    # partitioning rules are not in these programs: see `ggem_jax.pooling.dispatch.partition_rows`.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    with one_sentence(tool):
        trained = train(sys.argv[1:] if argv is None else argv)
    if trained.signal is not None and not trained.finished:
        sys.exit(128 + trained.signal)


def run(
    config: Config, task_of: Callable[[], Task], facts: dict[str, Any], *, quiet: bool = False
) -> TrainedRun:
    """Runs a training or resumes it.

    Args:
        config: The settings of the run.
        task_of: Makes the task, once the folder belongs to this run.
        facts: A description of the data; a run with other facts is not resumed.
        quiet: Whether nothing is printed.

    Returns:
        The end of the run. Its result is that of the last evaluation, or None if the run was
        stopped before one.

    Raises:
        Refused: The folder belongs to another run, or the weights are no longer finite.
    """
    process = jax.process_index()
    check_folder(config)
    with run_folder(config, facts), StopRequest() as stop:
        task = task_of()
        steps, total = task.steps, task.total
        evaluations, saves = (
            max(round(config.epochs / every), 1)
            for every in (config.eval_every, config.checkpoint_every)
        )
        checkpoints, continued = Checkpoints(config.out), ""
        if checkpoints.latest() is not None:
            state = checkpoints.restore(steps)
        elif config.resume_from is not None:
            state, continued = continue_from(config.resume_from, config, facts, steps, total)
        else:
            state = make_first_state(steps, config)
        step = start = int(state.step)
        best = Best(config, start)
        evaluation = None
        with (
            contextlib.closing(
                Log(None if process else config.out, total_steps=total, start=start, quiet=quiet)
            ) as log,
            contextlib.ExitStack() as ended,
        ):
            meter = Meter(config.batch, task.flops)
            described = describe_run(config, task, state, 0 if continued else start, meter)
            log.banner(described | ({"continues": continued} if continued else {}))
            batches = task.batches(start)
            ended.callback(getattr(batches, "close", lambda: None))  # its threads and processes
            while step < total and not best.exhausted:
                with meter.waiting_for_input():
                    batch = put_on_devices(next(batches), steps)
                if augments_on_device(config.augment):
                    batch["image"] = augment_on_device(
                        batch["image"],
                        config.seed,
                        step,
                        how=config.augment,
                        sharding=steps.batch_sharding,
                    )
                state, metrics = steps.train(state, batch, config.seed)
                meter.count(metrics)
                step += 1
                log.advance(step)
                checkpoints.check()
                stopping = stop.is_asked(step) or step == config.stop_after
                logs, evaluates, saving = (
                    step % config.log_every == 0 or step == total,
                    is_due(step, total, evaluations),
                    is_due(step, total, saves) or stopping,
                )
                if logs or evaluates or saving:
                    check_finite(step, metrics)
                if logs:
                    log_training(log, step, total, metrics, meter)
                if evaluates:
                    evaluation = task.evaluate(state)
                    log_evaluation(log, step, evaluation, state)
                    best.add(step, evaluation.values, state)
                    meter.restart()
                if saving or best.exhausted:
                    checkpoints.save(state)
                    meter.restart()
                if stopping:
                    break
            batch = {}  # may be in shared memory, which is freed before its processes end
            checkpoints.wait()
            finished = step == total or best.exhausted
            if best.exhausted and step < total:
                log.say(
                    f"stopped after step {step} of {total}: {best.since} evaluations in a row were"
                    " not the best (--patience)"
                )
            if said := best.say():
                log.say(said)
            if not finished:
                log.say(
                    f"stopped after step {step} of {total}; run the same command again to resume"
                )
            elif process == 0:
                draw_curves(config.out, task.curves)
            if evaluation is None and finished:  # it had ended before
                evaluation = task.evaluate(state)
    return TrainedRun(
        state, steps, None if evaluation is None else evaluation.result, finished, stop.signal
    )


def make_first_state(steps: Steps, config: Config) -> State:
    """Returns the state before the first step, with published weights where the config names some.

    Args:
        steps: The compiled steps of the run.
        config: The settings of the run: seed, and the file to start from.

    Raises:
        Refused: The file cannot be read or does not fit the model.
    """
    state = steps.init(config.seed)
    return state if config.init is None else start_from(config.init, config.model, state, steps)


def is_due(step: int, total: int, times: int) -> bool:
    """Returns whether an event follows this step.

    Args:
        step: The step, from 1.
        total: Steps of the run.
        times: How often the event happens in the run, evenly spaced, the last time at its end.
    """
    return step * times // total > (step - 1) * times // total


def check_devices(config: Config) -> None:
    """Raises `Refused` if the batch cannot be divided among the devices.

    Args:
        config: The settings of the run.

    Raises:
        Refused: The batch is no multiple of devices times the parts that gradients are accumulated
            over.
    """
    devices, parts = jax.device_count(), config.optimizer.accumulate
    if config.batch % (parts * devices):
        raise Refused(
            f"--batch must be a multiple of {parts} part(s) x {devices} device(s), it is"
            f" {config.batch}"
        )


def check_batch(config: Config, size: int) -> None:
    """Raises `Refused` if a batch is larger than the training set.

    Args:
        config: The settings of the run.
        size: Number of training images.

    Raises:
        Refused: It is, so that a batch would hold an image twice.
    """
    if config.batch > size:
        raise Refused(
            f"--batch {config.batch} is more than the {size} images to train on: a batch would hold"
            f" some twice; give at most {size}"
        )


def check_finite(step: int, metrics: dict[str, jax.Array]) -> None:
    """Raises `Refused` if a metric of a step is not finite, so that bad weights are not saved.

    Args:
        step: The step, for the sentence.
        metrics: Loss and norm of the gradient, scalars by name.

    Raises:
        Refused: A metric is NaN or infinite.
    """
    for name, value in metrics.items():
        if not np.isfinite(value):
            advice = "try a lower --optimizer.lr, a longer --optimizer.warmup or --optimizer.clip 1"
            raise Refused(
                f"the {name.replace('_', ' ')} is {float(value)} at step {step}: {advice}"
            )


def describe_run(
    config: Config, task: Task, state: State, start: int, meter: Meter
) -> dict[str, str]:
    """Returns the model, the data and the machine of a run, as lines of a banner by name.

    Args:
        config: The settings of the run.
        task: The training.
        state: The state it starts from, whose parameters are counted.
        start: The step after which it resumes; 0 for a new run.
        meter: The meter, which knows the peak of the devices.
    """
    model, parameters = config.model, sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return {
        "devices": (
            f"{jax.device_count()} x {jax.devices()[0].device_kind} in {jax.process_count()}"
            f" process(es), weights split over {config.fsdp}"
        ),
        "peak": f"{meter.peak / 1e12:.3g} TFLOP/s ({meter.peak_source})",
        "model": (
            f"{model.image} px in patches of {model.patch}, width {model.width}, depth"
            f" {model.depth}, {model.heads} heads, pooling {config.pool.kind}; {parameters:,}"
            f" parameters, computes in {model.dtype}"
            + (f", started from {config.init}" if config.init else "")
        ),
        "data": f"{config.data.source}: {task.about}",
        "steps": (
            f"{task.total:,} of {config.batch} images ({config.epochs:g} epochs)"
            + (f", resuming after step {start:,}" if start else "")
        ),
        "folder": str(config.out),
    }


def log_training(
    log: Log, step: int, total: int, metrics: dict[str, jax.Array], meter: Meter
) -> None:
    """Reports loss, gradient norm and speed.

    Args:
        log: The log of the run.
        step: The step, from 1.
        total: Steps of the run.
        metrics: Loss and norm of the gradient, scalars by name.
        meter: The meter, which starts a new reading.
    """
    values = {name: float(value) for name, value in metrics.items()} | meter.read()
    said = f"step {step}/{total}  loss {values['loss']:.4f}"
    if "steps_per_second" in values:
        said += (
            f"  {values['images_per_second']:.0f} images/s  MFU {values['mfu']:.1%}  waiting for"
            f" input {values['input_wait']:.1%}"
        )
        said += f"  {(total - step) / values['steps_per_second']:.0f} s left"
    log.metrics("train", step, values, said)


def log_evaluation(log: Log, step: int, evaluation: Evaluation, state: State) -> None:
    """Reports the measures of an evaluation and the learned exponents.

    Args:
        log: The log of the run.
        step: The step, from 1.
        evaluation: The outcome of the evaluation.
        state: The state that was evaluated.
    """
    p = read_exponents(state.evaluated)
    learned = "".join(f"  p {' '.join(f'{x:.2f}' for x in value)}" for value in p.values())
    log.metrics(
        "eval", step, evaluation.values | {"p": p}, f"step {step}  {evaluation.said}{learned}"
    )


def read_exponents(params: Any) -> dict[str, list[float]]:
    """Returns the exponents that the model pools with, by the path of their parameter.

    Args:
        params: The parameters of the model, with or without other networks beside it.
    """
    return {
        name: np.asarray(used_exponents(value)).tolist()
        for name, value in exponents(params).items()
    }
