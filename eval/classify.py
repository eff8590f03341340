"""How good a trained classifier is: python -m eval.classify RUN [OTHER].

Prints top-1 and top-5 accuracy with 95 % intervals and a table by class from the newest checkpoint
of a run of `train.classify`; with a second run, also a paired comparison on the same images.
`--json` prints one JSON object instead.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from eval.runs import RunOptions, open_checkpoints, replace_data
from eval.statistics import Interval, Paired, paired, proportion
from train.cli import Refused, one_sentence, parse
from train.config import Config
from train.data import open_data
from train.evaluate import Predictions, evaluate
from train.loop import read_exponents
from train.run import read_run
from train.step import make_steps


@dataclass(frozen=True)
class Evaluate(RunOptions):
    """How good a trained classifier is, and which of two is better."""

    split: str | None = None  # evaluate on another split than the run did, such as test


@dataclass(frozen=True)
class Evaluated:
    """One run on its evaluation images."""

    run: Path
    step: int
    classes: tuple[str, ...]
    predictions: Predictions
    p: dict[str, list[float]]  # learned exponents

    @property
    def top1(self) -> Interval:
        return proportion(self.predictions.top(1))

    @property
    def top5(self) -> Interval:
        return proportion(self.predictions.top(5))

    def by_class(self) -> list[tuple[str, int, Interval]]:
        """Name, number of images and top-1 accuracy of each class that has images."""
        correct, label = self.predictions.top(1), self.predictions.label
        return [
            (name, int(np.sum(label == i)), proportion(correct[label == i]))
            for i, name in enumerate(self.classes)
            if np.any(label == i)
        ]


def main(argv: list[str] | None = None) -> None:
    with one_sentence("eval.classify"):
        config = parse(Evaluate, argv, "eval.classify")
        runs = [load(run, config) for run in (config.run, config.other) if run is not None]
        comparison = compare(*runs) if len(runs) == 2 else None
        if config.json:
            print(json.dumps(as_json(runs, comparison)))
        else:
            show(runs, comparison)


def load(run: Path, how: Evaluate) -> Evaluated:
    """Evaluates the newest checkpoint of a run."""
    config, facts = read_run(run, Config)
    classes = tuple(facts["classes"])
    data = how.data_of(config.data)
    data = dataclasses.replace(data, eval_split=how.split or data.eval_split)
    config = replace_data(config, data)
    _, images = open_data(data)
    if images.classes != classes:
        raise Refused(
            f"{run} was trained on the classes {', '.join(classes)}, but {data.source} has"
            f" {', '.join(images.classes)}"
        )
    checkpoints = open_checkpoints(run)
    steps = make_steps(
        config, len(classes), total_steps=2
    )  # any number: the schedule does not matter here
    state = checkpoints.restore(steps)
    return Evaluated(
        run,
        int(state.step),
        images.classes,
        evaluate(steps, state.evaluated, images, config),
        read_exponents(state.evaluated),
    )


def compare(first: Evaluated, second: Evaluated) -> Paired:
    """The two on the same images."""
    a, b = first.predictions, second.predictions
    if first.classes != second.classes or not all(
        np.array_equal(*pair)
        for pair in ((a.index, b.index), (a.label, b.label), (a.digest, b.digest))
    ):
        raise Refused(
            f"{first.run} and {second.run} were not evaluated on the same images, so they cannot"
            " be compared in pairs"
        )
    return paired(a.top(1), b.top(1))


def as_json(runs: list[Evaluated], comparison: Paired | None) -> dict[str, Any]:
    """What `--json` prints."""
    entries = [
        {
            "run": str(run.run),
            "step": run.step,
            "images": len(run.predictions.label),
            "top1": dataclasses.asdict(run.top1),
            "top5": dataclasses.asdict(run.top5),
            "nll": run.predictions.nll(),
            "p": run.p,
            "by_class": [
                {"name": name, "images": count, "top1": dataclasses.asdict(top1)}
                for name, count, top1 in run.by_class()
            ],
        }
        for run in runs
    ]
    return {
        "runs": entries,
        "paired": None if comparison is None else dataclasses.asdict(comparison),
    }


def show(runs: list[Evaluated], comparison: Paired | None) -> None:
    """Prints the tables for people."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    for run in runs:
        table = Table(
            "class",
            title=f"{run.run}, step {run.step}, {len(run.predictions.label):,} images",
            title_justify="left",
        )
        table.add_column("images", justify="right")
        table.add_column("top-1 [95 % interval]", justify="right")
        for name, count, top1 in run.by_class():
            table.add_row(name, f"{count:,}", str(top1))
        console.print(table)
        console.print(
            f"top-1 {run.top1}   top-5 {run.top5}   negative log-likelihood"
            f" {run.predictions.nll():.4f}"
        )
        for name, values in run.p.items():
            console.print(f"learned {name}: {' '.join(f'{value:.2f}' for value in values)}")
    if comparison is not None:
        console.print(
            f"first less second: {comparison.difference}; only the first is right on"
            f" {comparison.only_first} images, only the second on {comparison.only_second};"
            f" McNemar's exact test p = {comparison.p_value:.3g}"
        )


if __name__ == "__main__":
    main()
