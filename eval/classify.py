"""Evaluates trained classifiers: python -m eval.classify RUN [OTHER].

Prints top-1 and top-5 accuracy with 95 % intervals and a table by class, from the newest checkpoint
of a run of `train.classify`; with a second run, also a paired comparison on the same images.
`--json` prints one JSON object instead.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from eval.runs import (
    RunOptions,
    RunResult,
    make_console,
    open_checkpoints,
    replace_data,
    require_same_images,
    say_exponents,
)
from eval.statistics import Interval, PairedTest, compare_paired, proportion
from train.cli import Refused, one_sentence, parse
from train.config import Config
from train.data import join_classes, open_data
from train.evaluate import Predictions, evaluate
from train.loop import read_exponents
from train.run import read_run
from train.step import make_steps


@dataclass(frozen=True)
class ClassifyOptions(RunOptions):
    """How good a trained classifier is, and which of two is better."""

    split: str | None = None  # evaluate on another split than the run did, such as test


@dataclass(frozen=True)
class ClassifyResult(RunResult):
    """One run on its evaluation images."""

    classes: tuple[str, ...]  # names, in the order of the labels
    predictions: Predictions  # of the readable images, in the order of the split

    @property
    def top1(self) -> Interval:
        """Share of images whose most probable class is the label."""
        return proportion(self.predictions.top(1))

    @property
    def top5(self) -> Interval:
        """Share of images whose label is among the five most probable classes."""
        return proportion(self.predictions.top(5))

    def by_class(self) -> list[tuple[str, int, Interval]]:
        """Returns name, number of images and top-1 accuracy of each class that has images.

        Where an image may have several labels, the average precision of the class, which has no
        interval, stands for the accuracy.
        """
        label = self.predictions.label
        if self.predictions.several:
            precisions = self.predictions.precisions()
            return [
                (name, int(label[:, i].sum()), Interval(float(precisions[i]), math.nan, math.nan))
                for i, name in enumerate(self.classes)
                if label[:, i].any()
            ]
        correct = self.predictions.top(1)
        return [
            (name, int(np.sum(label == i)), proportion(correct[label == i]))
            for i, name in enumerate(self.classes)
            if np.any(label == i)
        ]


def main(argv: list[str] | None = None) -> None:
    """Runs the script."""
    with one_sentence("eval.classify"):
        options = parse(ClassifyOptions, argv, "eval.classify")
        results = [evaluate_run(run, options) for run in options.runs]
        comparison = compare(*results) if len(results) == 2 else None
        if options.json:
            print(json.dumps(as_json(results, comparison)))
        else:
            show(results, comparison)


def evaluate_run(run: Path, options: ClassifyOptions) -> ClassifyResult:
    """Returns the predictions of a run's newest checkpoint on its evaluation images.

    Args:
        run: Folder of a run of `train.classify`.
        options: Source and split of the images, and what to do about unreadable ones. Its `run` and
            `other` are not used.

    Raises:
        Refused: The folder is not such a run or has no checkpoint, the images have other classes
            than the run, or they cannot be read.
    """
    config, facts = read_run(run, Config)
    classes = tuple(facts["classes"])
    data = options.data_of(config.data)
    data = dataclasses.replace(data, eval_split=options.split or data.eval_split)
    config = replace_data(config, data)
    _, images = open_data(data)
    images = join_classes(images, classes, f"{run} and {data.source}")
    several = facts.get("several_labels", False)
    if images.several != several:
        raise Refused(
            f"{run} was trained on images with {'several labels' if several else 'one label'} each,"
            f" and those of {data.source} have {'one' if several else 'several'}"
        )
    checkpoints = open_checkpoints(run)
    # any number of steps: nothing is trained
    steps = make_steps(config, len(classes), total_steps=2, several=several)
    state = checkpoints.restore(steps)
    return ClassifyResult(
        run=run,
        step=int(state.step),
        p=read_exponents(state.evaluated),
        classes=images.classes,
        predictions=evaluate(steps, state.evaluated, images, config),
    )


def compare(first: ClassifyResult, second: ClassifyResult) -> PairedTest:
    """Compares the top-1 answers of two runs on the same images.

    Args:
        first: Result of one run.
        second: Result of the other run.

    Returns:
        Accuracy of the first less that of the second with its interval, and McNemar's test.

    Raises:
        Refused: The runs were not evaluated on the same images, labels and classes, or images have
            several labels.
    """
    a, b = first.predictions, second.predictions
    if a.several or b.several:
        raise Refused(
            "runs on images with several labels are not compared in pairs: evaluate one at a time"
        )
    require_same_images(
        first.run,
        second.run,
        [
            (first.classes, second.classes),
            (a.index, b.index),
            (a.label, b.label),
            (a.digest, b.digest),
        ],
    )
    return compare_paired(a.top(1), b.top(1))


def as_json(results: list[ClassifyResult], comparison: PairedTest | None) -> dict[str, Any]:
    """Returns the object that `--json` prints.

    Args:
        results: One or two evaluated runs.
        comparison: Paired test of the two; None where there is one run.

    Returns:
        "runs", a list with an entry for each run, and "paired", the test or None. Accuracies are
        from 0 to 1. Where an image may have several labels, "map" and "ap" of each class stand for
        them.
    """
    entries = [
        {
            "run": str(result.run),
            "step": result.step,
            "images": len(result.predictions.label),
            **(
                {"map": result.predictions.measures()["map"]}
                if result.predictions.several
                else {
                    "top1": dataclasses.asdict(result.top1),
                    "top5": dataclasses.asdict(result.top5),
                }
            ),
            "nll": result.predictions.nll(),
            "p": result.p,
            "by_class": [
                {"name": name, "images": count}
                | (
                    {"ap": found.value}
                    if result.predictions.several
                    else {"top1": dataclasses.asdict(found)}
                )
                for name, count, found in result.by_class()
            ],
        }
        for result in results
    ]
    return {
        "runs": entries,
        "paired": None if comparison is None else dataclasses.asdict(comparison),
    }


def show(results: list[ClassifyResult], comparison: PairedTest | None) -> None:
    """Prints a table by class for each run, its accuracies, and the paired test.

    Args:
        results: One or two evaluated runs.
        comparison: Paired test of the two; None prints no test.
    """
    console = make_console()
    for result in results:
        count = len(result.predictions.label)
        title = f"{result.run}, step {result.step}, {count:,} images"
        table = Table("class", title=title, title_justify="left")
        table.add_column("images", justify="right")
        several = result.predictions.several
        measure = "average precision" if several else "top-1 [95 % interval]"
        table.add_column(measure, justify="right")
        for name, images, found in result.by_class():
            table.add_row(name, f"{images:,}", f"{found.value:.2%}" if several else str(found))
        console.print(table)
        measured = (
            f"mAP {result.predictions.measures()['map']:.2%}"
            if several
            else f"top-1 {result.top1}   top-5 {result.top5}"
        )
        console.print(f"{measured}   negative log-likelihood {result.predictions.nll():.4f}")
        for line in say_exponents(result.p):
            console.print(line)
    if comparison is not None:
        console.print(
            f"first less second: {comparison.difference}; only the first is right on"
            f" {comparison.only_first} images, only the second on {comparison.only_second};"
            f" McNemar's exact test p = {comparison.p_value:.3g}"
        )


if __name__ == "__main__":
    main()
