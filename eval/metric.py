"""Evaluates trained descriptors: python -m eval.metric RUN [OTHER].

Prints recall@k, R-precision and mAP@R of the newest checkpoint of a run of `train.metric`, on
classes that it was not trained on. Every image is a query for all others. The 95 % intervals are
bootstrap intervals over queries, for these trained networks and these classes; they treat queries
as independent. With a second run it also prints the differences on the same images. `--json` prints
one JSON object instead, `--export FILE.npz` keeps the descriptors.
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
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
from eval.statistics import Interval, bootstrap
from ggem_jax.files.vectors import write_npz
from ggem_jax.retrieval.metrics import LabelScores
from train.cli import Refused, one_sentence, parse
from train.data import open_disjoint
from train.loop import read_exponents
from train.metric import LabelledDescriptors, MetricConfig, make_metric_steps, retrieve
from train.run import read_run


@dataclass(frozen=True)
class MetricOptions(RunOptions):
    """How good trained descriptors are, and which of two runs has the better ones."""

    # .npz file for descriptor (n, dim), label and index of the first run's images
    export: Path | None = None


@dataclass(frozen=True)
class MetricResult(RunResult):
    """One run on its evaluation images."""

    classes: tuple[str, ...]  # names, in the order of the labels
    images: LabelledDescriptors  # of the readable images, in the order of the split

    @cached_property
    def scores(self) -> LabelScores:
        """Recall@k, R-precision and mAP@R of every image as a query for all others."""
        return self.images.scores()

    def by_measure(self) -> dict[str, np.ndarray]:
        """Returns the values of each measure for every query, `(n,)`, by its name."""
        recalls = {
            f"recall@{kappa}": self.scores.recall_at[:, i]
            for i, kappa in enumerate(self.scores.kappas)
        }
        return recalls | {"R-precision": self.scores.r_precision, "mAP@R": self.scores.map_at_r}


def main(argv: list[str] | None = None) -> None:
    """Runs the script."""
    with one_sentence("eval.metric"):
        options = parse(MetricOptions, argv, "eval.metric")
        if options.export is not None and options.export.suffix != ".npz":
            raise Refused(f"--export must end in .npz, not {options.export}")
        results = [evaluate_run(run, options) for run in options.runs]
        differences = compare(*results) if len(results) == 2 else None
        if options.export is not None:
            export(results[0].images, options.export)
        if options.json:
            print(json.dumps(as_json(results, differences)))
        else:
            show(results, differences)


def evaluate_run(run: Path, options: MetricOptions) -> MetricResult:
    """Returns the descriptors of a run's newest checkpoint on classes that it was not trained on.

    Args:
        run: Folder of a run of `train.metric`.
        options: Source of the images, and what to do about unreadable ones. Its `run`, `other` and
            `export` are not used.

    Raises:
        Refused: The folder is not such a run or has no checkpoint, it was trained on one of the
            classes, or the images cannot be read.
    """
    config, facts = read_run(run, MetricConfig)
    config = replace_data(config, options.data_of(config.data))
    _, images = open_disjoint(config.data, config.metric.train_classes)
    if seen := sorted(set(images.classes) & set(facts["classes"])):
        raise Refused(
            f"{run} was trained on {', '.join(seen)}, which {config.data.source} has among the"
            " classes to evaluate on"
        )
    checkpoints = open_checkpoints(run)
    steps = make_metric_steps(config, len(facts["classes"]), total_steps=2)  # nothing is trained
    state = checkpoints.restore(steps)
    return MetricResult(
        run=run,
        step=int(state.step),
        p=read_exponents(state.evaluated),
        classes=images.classes,
        images=retrieve(steps, state.evaluated, images, config),
    )


def compare(first: MetricResult, second: MetricResult) -> dict[str, Interval]:
    """Returns each measure of the first run less that of the second, averaged over queries.

    Args:
        first: Result of one run.
        second: Result of the other run.

    Returns:
        Mean difference by the name of the measure, with its bootstrap interval over queries.

    Raises:
        Refused: The runs were not evaluated on the same images.
    """
    a, b = first.images, second.images
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
    other = second.by_measure()
    return {name: bootstrap(values - other[name]) for name, values in first.by_measure().items()}


def export(images: LabelledDescriptors, path: Path) -> None:
    """Writes descriptors as an .npz file, which is never half written.

    The file has `descriptor (n, dim)` in float32, and `label` and `index`, `(n,)` each.

    Args:
        images: Descriptors of the evaluation images.
        path: The file; it is replaced.

    Raises:
        Refused: The file cannot be written.
    """
    try:
        write_npz(path, descriptor=images.descriptor, label=images.label, index=images.index)
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror}") from None


def as_json(results: list[MetricResult], differences: dict[str, Interval] | None) -> dict[str, Any]:
    """Returns the object that `--json` prints.

    Args:
        results: One or two evaluated runs.
        differences: Differences of the measures as `compare` returns them; None where there is one
            run.

    Returns:
        "runs", a list with an entry for each run, and "paired", the differences or None. Measures
        are from 0 to 1.
    """
    entries = [
        {
            "run": str(result.run),
            "step": result.step,
            "images": len(result.images.label),
            "classes": len(result.classes),
            **{
                name: dataclasses.asdict(bootstrap(values))
                for name, values in result.by_measure().items()
            },
            "p": result.p,
        }
        for result in results
    ]
    paired = None
    if differences is not None:
        paired = {name: dataclasses.asdict(interval) for name, interval in differences.items()}
    return {"runs": entries, "paired": paired}


def show(results: list[MetricResult], differences: dict[str, Interval] | None) -> None:
    """Prints a table of measures for each run, and the differences.

    Args:
        results: One or two evaluated runs.
        differences: Differences as `compare` returns them; None prints none.
    """
    console = make_console()
    for result in results:
        title = (
            f"{result.run}, step {result.step}, {len(result.images.label):,} images of"
            f" {len(result.classes)} classes not trained on"
        )
        table = Table("measure", title=title, title_justify="left")
        table.add_column("mean over queries [95 % interval]", justify="right")
        for name, values in result.by_measure().items():
            table.add_row(name, str(bootstrap(values)))
        console.print(table)
        for line in say_exponents(result.p):
            console.print(line)
    if differences is not None:
        listed = "; ".join(f"{name} {interval}" for name, interval in differences.items())
        console.print(f"first less second: {listed}")


if __name__ == "__main__":
    main()
