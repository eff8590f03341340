"""How good trained descriptors are: python -m eval.metric RUN [OTHER].

Prints recall@k, R-precision and mAP@R of the newest checkpoint of a run of `train.metric` on
classes it was not trained on, every image a query for all others, with 95 % bootstrap intervals
over queries; with a second run also the differences on the same images. The intervals are those
of these trained networks and these classes: queries are taken for independent. `--json` prints one
JSON object instead, `--export FILE.npz` keeps the descriptors.
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from eval.runs import RunOptions, open_checkpoints, replace_data
from eval.statistics import Interval, bootstrap
from ggem_jax.files.atomic import replacing
from ggem_jax.retrieval.metrics import LabelScores
from train.cli import Refused, one_sentence, parse
from train.data import open_disjoint
from train.loop import read_exponents
from train.metric import LabelledDescriptors, MetricConfig, make_metric_steps, retrieve
from train.run import read_run


@dataclass(frozen=True)
class Evaluate(RunOptions):
    """How good trained descriptors are, and which of two runs has the better ones."""

    export: Path | None = (
        None  # .npz file for descriptor (n, dim), label and index of the first run's images
    )


@dataclass(frozen=True)
class Evaluated:
    """One run on its evaluation images."""

    run: Path
    step: int
    classes: tuple[str, ...]
    retrieved: LabelledDescriptors
    p: dict[str, list[float]]  # learned exponents

    @cached_property
    def scores(self) -> LabelScores:
        return self.retrieved.scores()

    def by_measure(self) -> dict[str, np.ndarray]:
        """Of each query, by the name of the measure."""
        recalls = {
            f"recall@{kappa}": self.scores.recall_at[:, i]
            for i, kappa in enumerate(self.scores.kappas)
        }
        return recalls | {"R-precision": self.scores.r_precision, "mAP@R": self.scores.map_at_r}


def main(argv: list[str] | None = None) -> None:
    with one_sentence("eval.metric"):
        config = parse(Evaluate, argv, "eval.metric")
        if config.export is not None and config.export.suffix != ".npz":
            raise Refused(f"--export must end in .npz, not {config.export}")
        runs = [load(run, config) for run in (config.run, config.other) if run is not None]
        differences = compare(*runs) if len(runs) == 2 else None
        if config.export is not None:
            export(runs[0].retrieved, config.export)
        if config.json:
            print(json.dumps(as_json(runs, differences)))
        else:
            show(runs, differences)


def load(run: Path, how: Evaluate) -> Evaluated:
    """Evaluates the newest checkpoint of a run."""
    config, facts = read_run(run, MetricConfig)
    config = replace_data(config, how.data_of(config.data))
    _, images = open_disjoint(config.data, config.metric.train_classes)
    if seen := sorted(set(images.classes) & set(facts["classes"])):
        raise Refused(
            f"{run} was trained on {', '.join(seen)}, which {config.data.source} has among the"
            " classes to evaluate on"
        )
    checkpoints = open_checkpoints(run)
    steps = make_metric_steps(
        config, len(facts["classes"]), total_steps=2
    )  # any number: the schedule does not matter here
    state = checkpoints.restore(steps)
    return Evaluated(
        run,
        int(state.step),
        images.classes,
        retrieve(steps, state.evaluated, images, config),
        read_exponents(state.evaluated),
    )


def compare(first: Evaluated, second: Evaluated) -> dict[str, Interval]:
    """Each measure of the first less that of the second, query by query."""
    a, b = first.retrieved, second.retrieved
    if first.classes != second.classes or not all(
        np.array_equal(*pair)
        for pair in ((a.index, b.index), (a.label, b.label), (a.digest, b.digest))
    ):
        raise Refused(
            f"{first.run} and {second.run} were not evaluated on the same images, so they cannot"
            " be compared in pairs"
        )
    other = second.by_measure()
    return {name: bootstrap(values - other[name]) for name, values in first.by_measure().items()}


def export(retrieved: LabelledDescriptors, path: Path) -> None:
    """Writes the descriptors."""
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file, descriptor=retrieved.descriptor, label=retrieved.label, index=retrieved.index
            )
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror}") from None


def as_json(runs: list[Evaluated], differences: dict[str, Interval] | None) -> dict[str, Any]:
    """What `--json` prints."""
    entries = [
        {
            "run": str(run.run),
            "step": run.step,
            "images": len(run.retrieved.label),
            "classes": len(run.classes),
            **{
                name: dataclasses.asdict(bootstrap(values))
                for name, values in run.by_measure().items()
            },
            "p": run.p,
        }
        for run in runs
    ]
    paired = (
        None
        if differences is None
        else {name: dataclasses.asdict(interval) for name, interval in differences.items()}
    )
    return {"runs": entries, "paired": paired}


def show(runs: list[Evaluated], differences: dict[str, Interval] | None) -> None:
    """Prints the tables for people."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    for run in runs:
        title = (
            f"{run.run}, step {run.step}, {len(run.retrieved.label):,} images of"
            f" {len(run.classes)} classes not trained on"
        )
        table = Table("measure", title=title, title_justify="left")
        table.add_column("mean over queries [95 % interval]", justify="right")
        for name, values in run.by_measure().items():
            table.add_row(name, str(bootstrap(values)))
        console.print(table)
        for name, exponents in run.p.items():
            console.print(f"learned {name}: {' '.join(f'{p:.2f}' for p in exponents)}")
    if differences is not None:
        console.print(
            "first less second: "
            + "; ".join(f"{name} {interval}" for name, interval in differences.items())
        )


if __name__ == "__main__":
    main()
