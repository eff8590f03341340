"""Compares descriptors that are learned with different poolings and losses.

    python -m eval.studies.metric --data DIR

The classes that are searched are not trained on. There are two real sets, in their zip files.
Omniglot has 136 characters by 20 drawers; half of the characters are trained on, and every drawing
of the other half is a query for the rest. Corridor has two runs along one corridor; places of the
first half are trained on. Frames of the second half are searched, those of one run by those of the
other; a frame is right within about two frames of the query.

Small ViTs are trained from scratch by `train.metric`, several seeds each, and compared with raw
pixels and with the same networks untrained. The measures are recall@1 and mean average precision
(mAP@R, and by the trapezoid rule on the corridor), with 95 % intervals over seeds and differences
seed by seed.

Prints the tables and writes `benchmarks/results/metric_study.csv`. An interrupted study resumes.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.runs import train_in_study
from eval.statistics import mean
from eval.studies.retrieval import SETS, Set, Study, describe_machine, find_data, make_unit_pixels
from eval.tables import format_cell, interval_columns, make_table, write_rows
from ggem_jax.retrieval import search
from ggem_jax.retrieval.metrics import Relevance, recall_at, scores
from train.cli import Refused, load_config, one_sentence, parse
from train.images import Images, hold_in_memory
from train.loop import make_first_state
from train.metric import MetricConfig, make_metric_steps, retrieve, score_descriptors, train

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "metric_study.csv"

# name -> pooling, loss; relu-avg is the control: what GeM and GGeM owe to clamping negative values
ARMS = {
    "average": ("avg", "normalised-softmax"),
    "positive average": ("relu-avg", "normalised-softmax"),
    "GeM": ("gem", "normalised-softmax"),
    "GGeM": ("ggem", "normalised-softmax"),
    "GGeM, ArcFace": ("ggem", "arcface"),
    "GGeM, Proxy-Anchor": ("ggem", "proxy-anchor"),
}
SMALL = [
    "--model.width", "64", "--model.depth", "3", "--model.heads", "4", "--model.mlp-width", "256",
    "--metric.dim", "64",
]  # fmt: skip
RHYTHM = [
    "--eval-every", "1000000", "--checkpoint-every", "1000000", "--optimizer.lr", "2e-3",
    "--optimizer.warmup", "100",
]  # fmt: skip
FLAGS = {
    "omniglot": [
        "--model.image", "28", "--model.patch", "7", "--data.eval-crop", "squash", "--batch", "128",
        "--epochs", "50", "--metric.per-class", "4",
        "--augment.crop", "resized", "--augment.min-area", "0.6",
    ],
    "corridor": [
        "--model.image", "48", "--model.patch", "8", "--data.eval-crop", "squash", "--batch", "44",
        "--epochs", "120", "--metric.per-class", "4",
        "--augment.crop", "resized", "--augment.min-area", "0.5",
    ],
}  # fmt: skip
PLACE = 5  # successive frames of the corridor that count as one place
GAP = 2  # frames at the end of each place that training leaves out


@dataclass(frozen=True)
class MetricStudy:
    """Descriptors learned with different poolings and losses, on classes that are not searched."""

    data: Path | None = None  # folder with omniglot-small and corridor-vpr; None: $GGEM_SHARED/data
    sets: tuple[str, ...] = ("omniglot", "corridor")  # which of the two to run
    seeds: int = 4  # trainings of each arm
    runs: Path = Path("runs/metric_study")  # folder of the trainings
    out: Path = RESULTS  # CSV file of the results
    epochs: float | None = None  # epochs of each training; None: 50 (Omniglot), 120 (corridor)


@dataclass(frozen=True)
class Apart:
    """Images to train on and others to search, and how well descriptors find the latter."""

    train: Images  # with the labels of the classes to train on
    test: Images  # of other classes or places
    # unit vectors (n, d) of the test images -> recall@1 and precision of each query
    score: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    pixels: np.ndarray  # (n, d) of the test images, unit vectors


def main(argv: list[str] | None = None) -> None:
    """Runs the study."""
    with one_sentence("eval.studies.metric"):
        study = parse(MetricStudy, argv, "eval.studies.metric", default=MetricStudy())
        check_study(study)
        rows = [row for name in study.sets for row in measure_set(name, study)]
        write_rows(study.out, rows)
        for name in study.sets:
            print(make_set_table([row for row in rows if row["set"] == name]))


def check_study(study: MetricStudy) -> None:
    """Raises `Refused` for settings that no study can be made of.

    Args:
        study: Settings of the study.

    Raises:
        Refused: A set is unknown, there is none, or there are fewer than 2 seeds.
    """
    unknown = [name for name in study.sets if name not in APART]
    if unknown or not study.sets:
        raise Refused(
            f"--sets must be among {', '.join(APART)}, not {', '.join(unknown) or 'none'}"
        )
    if study.seeds < 2:
        raise Refused(f"--seeds must be at least 2, it is {study.seeds}")


def measure_set(name: str, study: MetricStudy) -> list[dict[str, Any]]:
    """Trains and measures every arm on a set, and returns a row for each.

    Args:
        name: Name of the set, a key of `APART`.
        study: Settings of the study.

    Returns:
        Rows for raw pixels, untrained networks and trained ones, by column.

    Raises:
        Refused: The set cannot be read, or a training is refused.
    """
    data = find_data(study.data)
    apart = APART[name](SETS[name](data, Study()))
    values = {"raw pixels": [average(apart.score(apart.pixels))]}
    for arm in ARMS:
        configs = [make_config(name, arm, seed, study) for seed in range(study.seeds)]
        if ARMS[arm][1] == "normalised-softmax":
            values[f"{arm}, untrained"] = [
                average(apart.score(describe_untrained(config, apart))) for config in configs
            ]
        values[arm] = []
        for config in configs:
            trained = train_in_study(train, config, data=(apart.train, apart.test))
            values[arm].append(average(apart.score(trained.result.descriptor)))
            print(
                f"{name}, {arm}, seed {config.seed}: recall@1 {values[arm][-1][0]:.2%}",
                file=sys.stderr,
                flush=True,
            )
    counts = {
        "set": name,
        "train": len(apart.train),
        "train_classes": len(apart.train.classes),
        "test": len(apart.test),
    }
    return [
        {
            **counts,
            "arm": arm,
            "seeds": len(found),
            **make_columns(arm, np.array(found), values),
            **describe_machine(),
        }
        for arm, found in values.items()
    ]


def make_config(name: str, arm: str, seed: int, study: MetricStudy) -> MetricConfig:
    """Returns the settings of one training.

    Args:
        name: Name of the set.
        arm: Name of the arm, a key of `ARMS`.
        seed: Seed of the training.
        study: Settings of the study.
    """
    pool, loss = ARMS[arm]
    # margins for images, not faces: ArcFace's 0.5 at scale 64 is for millions of them
    own = ["--metric.scale", "20", "--metric.margin", "0.2"] if loss == "arcface" else []
    flags = [
        *SMALL, *RHYTHM, *FLAGS[name], "--pool.kind", pool, "--metric.loss", loss, *own,
        "--data", name, "--seed", str(seed),
    ]  # fmt: skip
    folder = study.runs / name / f"{pool}-{loss}-{seed}"
    epochs = [] if study.epochs is None else ["--epochs", str(study.epochs)]
    return load_config(MetricConfig, [*flags, *epochs, "--out", str(folder)], "eval.studies.metric")


def describe_untrained(config: MetricConfig, apart: Apart) -> np.ndarray:
    """Returns the descriptors `(n, dim)` of the test images by a network before its training.

    Args:
        config: Settings of the training, with its seed.
        apart: Images of the set.
    """
    steps = make_metric_steps(
        config,
        len(apart.train.classes),
        max(round(config.epochs * len(apart.train) / config.batch), 1),
    )
    return retrieve(steps, make_first_state(steps, config).params, apart.test, config).descriptor


def average(scored: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """Returns the means of both measures over the queries that have a right answer.

    Args:
        scored: Recall@1 and precision of each query, `(q,)` each; NaN is left out.
    """
    recall, precision = (float(np.nanmean(values)) for values in scored)
    return recall, precision


def omniglot(whole: Set) -> Apart:
    """Divides the characters with a fixed seed: one half to train on, the other to search.

    Args:
        whole: The set, as `eval.studies.retrieval.omniglot` returns it.

    Returns:
        The images, scored by recall@1 and mAP@R with every test image as a query.
    """
    names = np.array([name.rpartition("/")[0] for name in whole.names])
    classes, labels = np.unique(names, return_inverse=True)
    images = hold_images(
        whole, np.arange(len(labels)), tuple(str(name) for name in classes), labels.astype(np.int32)
    )
    order = np.random.default_rng(0).permutation(len(classes))
    half = np.isin(np.arange(len(classes)), order[: len(classes) // 2])
    test = images.of_classes(np.flatnonzero(~half), labels)
    test_labels = test.labels()

    def score(descriptors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = score_descriptors(descriptors, test_labels)
        return found.recall_at[:, 0], found.map_at_r

    places = np.flatnonzero(~half[labels])
    return Apart(
        images.of_classes(np.flatnonzero(half), labels),
        test,
        score,
        make_unit_pixels(whole, [whole.names[place] for place in places]),
    )


def corridor(whole: Set) -> Apart:
    """Divides the corridor: places of its first half to train on, frames of the second to search.

    The frames of one run are the queries, those of the other the database.

    Args:
        whole: The set, as `eval.studies.retrieval.corridor` returns it.

    Returns:
        The images, scored by recall@1 and average precision; the test images are first the queries,
        then the database.
    """
    count = len(whole.queries)
    half = count // 2
    frame = np.full(len(whole.names), -1)
    frame[whole.queries], frame[whole.database] = np.arange(count), np.arange(len(whole.database))
    shown = np.flatnonzero((frame < half) & (frame % PLACE < PLACE - GAP))
    places = frame // PLACE
    kept = np.unique(places[shown])
    labels = np.searchsorted(kept, places[shown]).astype(np.int32)
    train_set = hold_images(whole, shown, tuple(f"place {place}" for place in kept), labels)
    # neither these frames nor the right answers to them have been trained on
    first = half + 2 * GAP
    queries, database = whole.queries[first:], whole.database[first:]
    relevance = [
        Relevance(own.positive[own.positive >= first] - first, np.array([], int))
        for own in whole.relevance[first:]
    ]
    tested = np.concatenate([queries, database])
    test = hold_images(whole, tested, ("unseen",), np.zeros(len(tested), np.int32))

    def score(descriptors: Any) -> tuple[np.ndarray, np.ndarray]:
        ids = np.asarray(
            search(descriptors[: len(queries)], descriptors[len(queries) :], k=len(database)).ids
        )
        return (
            recall_at(ids, relevance, kappas=(1,))[:, 0],
            scores(ids, relevance).average_precision,
        )

    return Apart(
        train_set, test, score, make_unit_pixels(whole, [whole.names[place] for place in tested])
    )


APART: dict[str, Callable[[Set], Apart]] = {"omniglot": omniglot, "corridor": corridor}


def hold_images(
    whole: Set, places: np.ndarray, classes: tuple[str, ...], labels: np.ndarray
) -> Images:
    """Returns some of the images of a set, read once into memory.

    Args:
        whole: The set.
        places: Places `(n,)` of the images in `whole.names`.
        classes: Names of the classes.
        labels: Labels `(n,)` of the images, int32.
    """
    return hold_in_memory([whole.read(whole.names[place]) for place in places], labels, classes)


def make_columns(
    arm: str, found: np.ndarray, values: dict[str, list[tuple[float, float]]]
) -> dict[str, Any]:
    """Returns both measures with intervals over seeds, and differences of recall@1 seed by seed.

    Args:
        arm: Name of the arm.
        found: Recall@1 and precision of the arm, `(seeds, 2)`.
        values: The same of all arms, by name.

    Returns:
        Text by column; a difference that does not apply is empty.
    """
    row: dict[str, Any] = {}
    for i, name in enumerate(("recall_at_1", "average_precision")):
        row |= interval_columns(name, mean(found[:, i]))
    for other in ("raw pixels", f"{arm}, untrained", "average", "positive average", "GeM"):
        against = (
            np.array(values[other])[:, 0]
            if other in values and other != arm and "untrained" not in arm and len(found) > 1
            else None
        )
        label = "untrained" if other.endswith("untrained") else other.replace(" ", "_")
        row |= interval_columns(
            f"recall_at_1_less_{label}", None if against is None else mean(found[:, 0] - against)
        )
    return row


def make_set_table(rows: list[dict[str, Any]]) -> str:
    """Returns the table of one set in Markdown, in percent.

    Args:
        rows: Rows of the set, as `measure_set` returns them.
    """
    first = rows[0]
    title = (
        f"## {first['set']}: {first['train']} images of {first['train_classes']} classes trained"
        f" on, {first['test']} others searched\n\n"
    )
    heads = (
        "",
        "recall@1",
        "average precision",
        "recall@1 less raw pixels",
        "less the same untrained",
        "less the average",
    )
    names = (
        "recall_at_1",
        "average_precision",
        *(f"recall_at_1_less_{other}" for other in ("raw_pixels", "untrained", "average")),
    )
    return title + make_table(
        heads, [(row["arm"], *(format_cell(row, name) for name in names)) for row in rows]
    )


if __name__ == "__main__":
    main()
