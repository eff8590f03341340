"""Trains a Vision Transformer classifier: python -m train.classify --config NAME [flags].

`--init FILE` starts from a published ViT (`ggem_jax.weights.vit`). `train.loop` describes the run's
folder, and how a run stops and resumes. `--dry-run` says what a run would take (`train.dry_run`).
"""

import sys
from typing import Any

import jax
import numpy as np

from train import dry_run
from train.batches import train_batches
from train.cli import Refused, load_config, one_sentence
from train.config import Config
from train.data import open_data
from train.digest import describe_data
from train.evaluate import evaluate
from train.images import Images
from train.loop import Evaluation, Task, TrainedRun, check_batch, check_devices, run, run_tool
from train.run import join_processes
from train.samplers import draw_evenly
from train.step import make_steps
from train.stopping import check_keep
from train.throughput import training_flops

TOOL = "train.classify"


def main(argv: list[str] | None = None) -> None:
    """Runs the script."""
    flags = sys.argv[1:] if argv is None else argv
    if dry_run.is_asked(flags):
        with one_sentence(TOOL):
            dry_run.main(flags, Config, plan, open_sizes)
    else:
        run_tool(TOOL, lambda flags: train(load_config(Config, flags)), flags)


def plan(config: Config, classes: int, total: int, devices: dry_run.Devices) -> dry_run.Plan:
    """Returns what a dry run needs to know.

    Args:
        config: The settings of the run.
        classes: Classes of the data.
        total: Steps of the run.
        devices: The devices; None: all.
    """
    return dry_run.Plan(
        make_steps(config, classes, total, devices=devices), training_flops(config.model, classes)
    )


def open_sizes(config: Config) -> dry_run.Sizes:
    """Returns the numbers of classes and of training images of the data.

    Args:
        config: The settings of the run.
    """
    images, _ = open_data(config.data)
    return len(images.classes), len(images)


def train(
    config: Config, *, data: tuple[Images, Images] | None = None, quiet: bool = False
) -> TrainedRun:
    """Trains the classifier that a config describes, or resumes its run.

    Args:
        config: The settings of the run.
        data: Training and evaluation images to use instead of the config's source; None reads the
            source.
        quiet: Whether nothing is printed.

    Returns:
        The run; its result is the `Predictions` of the last evaluation.

    Raises:
        Refused: The settings, the data or the run's folder do not fit.
    """
    join_processes()
    train_set, eval_set = open_data(config.data) if data is None else data
    check_devices(config)
    check_batch(config, len(train_set))
    if len(train_set.classes) < 2 and not train_set.several:
        raise Refused(
            f"--data {config.data.source} holds one class, {train_set.classes[0]}: a classifier"
            " needs two or more"
        )
    if config.data.balance != "none" and train_set.several:
        raise Refused("--balance needs one label of each image, and an image may have several")
    draw = None
    if config.data.balance == "sampling":
        draw = draw_evenly(train_set.labels(), config.batch, config.seed)
    classes = train_set.classes
    total = max(round(config.epochs * len(train_set) / config.batch), 1)
    facts = describe_data(config, train_set, eval_set)
    measures = {"map": "mAP"} if train_set.several else {"top1": "top-1", "top5": "top-5"}
    check_keep(config, (*measures, "nll"))

    def task() -> Task:
        weights = weigh_classes(train_set) if config.data.balance == "weights" else None
        steps = make_steps(
            config, len(classes), total, several=train_set.several, class_weights=weights
        )

        def evaluation(state) -> Evaluation:
            predictions = evaluate(steps, state.evaluated, eval_set, config)
            values: dict[str, Any] = predictions.measures()
            said = "  ".join(f"{words} {values[name]:.2%}" for name, words in measures.items())
            return Evaluation(predictions, values | {"images": len(predictions.label)}, said)

        places = {"process": jax.process_index(), "processes": jax.process_count()}
        return Task(
            about=(
                f"{len(train_set):,} images to train, {len(eval_set):,} to evaluate,"
                f" {len(classes)} classes"
            ),
            total=total,
            steps=steps,
            flops=training_flops(config.model, len(classes)),
            batches=lambda start: train_batches(
                train_set, config, start=start, draw=draw, **places
            ),
            evaluate=evaluation,
            curves=tuple(measures),
        )

    return run(config, task, facts, quiet=quiet)


def weigh_classes(images: Images) -> tuple[float, ...]:
    """Returns a weight of each class, inverse to its number of images and 1 on average over images.

    Args:
        images: The training images; a class without any has the weight 0.
    """
    counts = np.bincount(images.labels(), minlength=len(images.classes))
    shown = np.count_nonzero(counts)
    return tuple(np.where(counts, len(images) / (shown * np.maximum(counts, 1)), 0.0).tolist())


if __name__ == "__main__":
    main()
