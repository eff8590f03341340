"""Trains a Vision Transformer classifier: python -m train.classify --config NAME [flags].

A run lives in one folder (`--out`): `config.json`, `metrics.jsonl`, `checkpoints/`, `curves.png`. SIGTERM or Ctrl-C stops it after the step in hand.
Started again with the same command it goes on from there and ends, on the same machine, with the same bits as if it had never stopped.
"""

import contextlib
import sys
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ggem_jax.models.vit import used_exponents
from ggem_jax.optimizer import exponents
from train.batches import train_batches
from train.checkpoints import Checkpoints
from train.config import Config, Refused, load_config
from train.data import Pictures, open_data
from train.evaluate import Predictions, evaluate, on_devices
from train.log import Log
from train.pictures import draw_curves
from train.run import StopRequest, join_processes, one_sentence, run_folder
from train.step import State, Steps, make_steps
from train.throughput import Meter


@dataclass(frozen=True)
class Trained:
    """How a run ended."""

    state: State
    steps: Steps
    predictions: Predictions | None  # of the last evaluation
    finished: bool
    signal: int | None  # that stopped it


def main(argv: list[str] | None = None) -> None:
    with one_sentence("train.classify"):
        trained = train(load_config(sys.argv[1:] if argv is None else argv, "train.classify"))
    if trained.signal is not None and not trained.finished:
        sys.exit(128 + trained.signal)


def train(config: Config, *, quiet: bool = False) -> Trained:
    """Runs the training that the config describes, or goes on with it."""
    join_processes()
    train_set, eval_set = open_data(config.data)
    check(config)
    process, processes = jax.process_index(), jax.process_count()
    total = max(round(config.epochs * len(train_set) / config.batch), 1)
    evaluations, saves = (max(round(config.epochs / every), 1) for every in (config.eval_every, config.checkpoint_every))
    facts = {"classes": list(train_set.classes), "train": len(train_set), "eval": len(eval_set)}
    with run_folder(config, facts), StopRequest() as stop:
        steps = make_steps(config, len(train_set.classes), total)
        checkpoints = Checkpoints(config.out)
        state = steps.init(config.seed) if checkpoints.latest() is None else checkpoints.restore(steps)
        step = start = int(state.step)
        predictions = None
        with contextlib.closing(Log(None if process else config.out, total_steps=total, start=start, quiet=quiet)) as log:
            meter = Meter(config, len(train_set.classes))
            log.banner(banner(config, train_set, eval_set, state, start, total, meter))
            batches = train_batches(train_set, config, start=start, process=process, processes=processes)
            while step < total:
                with meter.waiting_for_input():
                    batch = on_devices(next(batches), steps)
                state, metrics = steps.train(state, batch, config.seed)
                meter.count(metrics)
                step += 1
                log.advance(step)
                stopping = stop.asked(step) or step == config.stop_after
                logs, evaluates, saving = (
                    step % config.log_every == 0 or step == total,
                    due(step, total, evaluations),
                    due(step, total, saves) or stopping,
                )
                if logs or evaluates or saving:
                    check_finite(step, metrics)
                if logs:
                    log_training(log, step, total, metrics, meter)
                if evaluates:
                    predictions = evaluate(steps, state.evaluated, eval_set, config)
                    log_evaluation(log, step, predictions, state)
                    meter.restart()
                if saving:
                    checkpoints.save(state)
                    meter.restart()
                if stopping:
                    break
            checkpoints.wait()
            if step < total:
                log.say(f"stopped after step {step} of {total}; the same command goes on from there")
            elif process == 0:
                draw_curves(config.out)
            if predictions is None and step == total:  # it had ended before
                predictions = evaluate(steps, state.evaluated, eval_set, config)
    return Trained(state, steps, predictions, step == total, stop.signal)


def due(step: int, total: int, times: int) -> bool:
    """Whether something that happens so many times in a run, evenly and for the last time at its end, happens after this step."""
    return step * times // total > (step - 1) * times // total


def check(config: Config) -> None:
    """Refuses a batch that cannot be divided among the devices."""
    devices, parts = jax.device_count(), config.optimizer.accumulate
    if config.batch % (parts * devices):
        raise Refused(f"--batch must be a multiple of {parts} part(s) x {devices} device(s), it is {config.batch}")


def check_finite(step: int, metrics: dict[str, jax.Array]) -> None:
    """Refuses to go on from, and to save, weights that are no longer numbers."""
    for name, value in metrics.items():
        if not np.isfinite(value):
            advice = "try a lower --optimizer.lr, a longer --optimizer.warmup or --optimizer.clip 1"
            raise Refused(f"the {name.replace('_', ' ')} is {float(value)} at step {step}: {advice}")


def banner(config: Config, train_set: Pictures, eval_set: Pictures, state: State, start: int, total: int, meter: Meter) -> dict[str, str]:
    """What is about to be trained, on what."""
    model, parameters = config.model, sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind} in {jax.process_count()} process(es), weights split over {config.fsdp}",
        "peak": f"{meter.peak / 1e12:.3g} TFLOP/s ({meter.peak_source})",
        "model": f"{model.image} px in patches of {model.patch}, width {model.width}, depth {model.depth}, {model.heads} heads, "
        f"pooling {config.pool.kind}; {parameters:,} parameters, computes in {model.dtype}",
        "data": f"{config.data.source}: {len(train_set):,} pictures to train, {len(eval_set):,} to evaluate, {len(train_set.classes)} classes",
        "steps": f"{total:,} of {config.batch} pictures ({config.epochs:g} epochs)" + (f", going on after step {start:,}" if start else ""),
        "folder": str(config.out),
    }


def log_training(log: Log, step: int, total: int, metrics: dict[str, jax.Array], meter: Meter) -> None:
    """Loss, gradient norm and speed."""
    values = {name: float(value) for name, value in metrics.items()} | meter.read()
    said = f"step {step}/{total}  loss {values['loss']:.4f}"
    if "steps_per_second" in values:
        said += f"  {values['images_per_second']:.0f} images/s  MFU {values['mfu']:.1%}  waiting for input {values['input_wait']:.1%}"
        said += f"  {(total - step) / values['steps_per_second']:.0f} s left"
    log.metrics("train", step, values, said)


def log_evaluation(log: Log, step: int, predictions: Predictions, state: State) -> None:
    """Accuracies and the learned exponents."""
    values = {"top1": float(predictions.top(1).mean()), "top5": float(predictions.top(5).mean()), "nll": predictions.nll()}
    p = learned_exponents(state.evaluated)
    learned = "".join(f"  p {' '.join(f'{x:.2f}' for x in value)}" for value in p.values())
    said = f"step {step}  top-1 {values['top1']:.2%}  top-5 {values['top5']:.2%}{learned}"
    log.metrics("eval", step, values | {"images": len(predictions.label), "p": p}, said)


def learned_exponents(params: Any) -> dict[str, list[float]]:
    """The exponents that the model pools with, by the path of their parameter."""
    return {name: np.asarray(used_exponents(value)).tolist() for name, value in exponents(params).items()}


if __name__ == "__main__":
    main()
