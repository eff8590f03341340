"""Trains a Vision Transformer classifier: python -m train.classify --config NAME [flags].

A run lives in one folder (`--out`): `config.json`, `metrics.jsonl`, `checkpoints/`, `curves.png`. SIGTERM or Ctrl-C stops it after the step in hand.
Started again with the same command it goes on from there and ends, on the same machine, with the same bits as if it had never stopped.
"""

import contextlib
import sys
from dataclasses import dataclass

import jax
import numpy as np

from ggem_jax.models.vit import GGeM
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
    with run_folder(config, train_set.classes), StopRequest() as stop:
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
                if step % config.log_every == 0 or step == total:
                    log_training(log, step, total, metrics, meter)
                if due(step, total, evaluations):
                    predictions = evaluate(steps, state.evaluated, eval_set, config)
                    log_evaluation(log, step, predictions, state)
                    meter.restart()
                if due(step, total, saves) or stopping:
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
    devices, parts = jax.device_count(), config.optimizer.accumulate
    if config.batch < 1 or parts < 1 or config.batch % (parts * devices):
        raise Refused(f"--batch must be a positive multiple of {parts} part(s) x {devices} device(s), it is {config.batch}")
    for name in ("epochs", "eval_every", "checkpoint_every", "log_every"):
        if not getattr(config, name) > 0:
            raise Refused(f"--{name} must be positive, it is {getattr(config, name)}")


def banner(config: Config, train_set: Pictures, eval_set: Pictures, state: State, start: int, total: int, meter: Meter) -> dict[str, str]:
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
    values = {name: float(value) for name, value in metrics.items()} | meter.read()
    if not np.isfinite(values["loss"]):
        raise Refused(f"the loss is {values['loss']} at step {step}: try a lower --optimizer.lr, a longer --optimizer.warmup or --optimizer.clip 1")
    said = f"step {step}/{total}  loss {values['loss']:.4f}"
    if values["steps_per_second"]:  # not right after the first step, which compiles
        said += f"  {values['images_per_second']:.0f} images/s  MFU {values['mfu']:.1%}  waiting for input {values['input_wait']:.1%}"
        said += f"  {(total - step) / values['steps_per_second']:.0f} s left"
    log.metrics("train", step, values, said)


def log_evaluation(log: Log, step: int, predictions: Predictions, state: State) -> None:
    values = {"top1": float(predictions.top(1).mean()), "top5": float(predictions.top(5).mean()), "nll": predictions.nll()}
    p = {name: np.clip(np.asarray(value), *GGeM.p_range).tolist() for name, value in exponents(state.evaluated).items()}
    learned = "".join(f"  p {' '.join(f'{x:.2f}' for x in value)}" for value in p.values())
    said = f"step {step}  top-1 {values['top1']:.2%}  top-5 {values['top5']:.2%}{learned}"
    log.metrics("eval", step, values | {"images": len(predictions.label), "p": p}, said)


if __name__ == "__main__":
    main()
