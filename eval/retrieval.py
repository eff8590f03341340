"""Evaluates retrieval on your own images: python -m eval.retrieval TRUTH

TRUTH is a CSV file with the columns query and relevant, and optionally ignored, x1, y1, x2, y2 (see
`ggem_jax.retrieval.truth`), or a folder with a sub-folder for each class, in which the other
images of a folder are relevant for each of its images. The database is every image under the root;
a query's own image is left out of its results unless it is listed as relevant. Prints mean average
precision, mean precision at k, and recall at k (whether at least one relevant image is among the
first k), with 95 % bootstrap intervals over queries. `--table` compares all poolings with all
rerankers.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from eval.descriptors import describe_images, make_extractor, read_crop, vary_pooling
from eval.rerankers import Name, Rerank, rank_all, rerank_all
from eval.statistics import Interval, bootstrap
from ggem_jax.descriptors.settings import DescriptorSettings
from ggem_jax.retrieval.index.folder import shown, walk
from ggem_jax.retrieval.metrics import Relevance, recall_at, scores
from ggem_jax.retrieval.truth import Query, read_truth, to_relevance
from train.cli import Refused, one_sentence, parse


@dataclass(frozen=True)
class Retrieval:
    """Retrieval on your own images, with ground truth from a CSV file or from class folders."""

    truth: Positional[Path]  # CSV file of queries, or folder with a sub-folder for each class
    root: Path | None = None  # what the paths in the CSV file are relative to; None: its folder
    database: Path | None = None  # folder of the images that are searched; None: the root
    rerank: tuple[Name, ...] = ("none",)  # rerankers, one line of the table each
    # all poolings with all rerankers, whatever --rerank, --pooling, --regional, --scales and
    # --scale-gem say
    table: bool = False
    k: tuple[int, ...] = (1, 5, 10)  # numbers of results for precision and recall
    json: bool = False  # print one JSON object
    how: Annotated[Rerank, arg(name="")] = Rerank()  # noqa: RUF009
    descriptor: Annotated[DescriptorSettings, arg(name="")] = DescriptorSettings()  # noqa: RUF009

    def __post_init__(self):
        if not self.k or min(self.k) < 1:
            raise ValueError(
                f"--k must be whole numbers of at least 1, not {' '.join(map(str, self.k))}"
            )
        if self.truth.is_dir() and (self.root is not None or self.database is not None):
            raise ValueError(
                "--root and --database go with a CSV file: a folder of classes is its own database"
            )


@dataclass(frozen=True)
class RetrievalTask:
    """The images of the database, the queries, and the images that each query should find."""

    database: list[Path]
    # image, and the box (x1, y1, x2, y2) in pixels that it is cropped to; None: the whole image
    queries: list[tuple[Path, tuple[float, ...] | None]]
    relevance: list[Relevance]  # of each query, as places in `database`

    @property
    def own(self) -> np.ndarray:
        """The row `(queries,)` of each query's own image where that is ignored, otherwise -1."""
        row = {path: i for i, path in enumerate(self.database)}
        return np.array(
            [
                row[path] if row.get(path, -1) in each.ignored else -1
                for (path, _), each in zip(self.queries, self.relevance, strict=True)
            ]
        )


@dataclass(frozen=True)
class Result:
    """The measures of one pooling with one reranker."""

    pooling: str  # in words
    rerank: Name  # of the reranker
    measures: dict[str, Interval]  # by name, from 0 to 1


def main(argv: list[str] | None = None) -> None:
    """Runs the script."""
    with one_sentence("eval.retrieval"):
        config = parse(Retrieval, argv, "eval.retrieval")
        task = read_class_folders(config.truth) if config.truth.is_dir() else read_csv(config)
        if not any(len(each.positive) for each in task.relevance):
            raise Refused(f"no query of {config.truth} has a relevant image")
        results = evaluate(config, task)
        if config.json:
            print(json.dumps(as_json(config, task, results)))
        else:
            show(config, task, results)


def read_csv(config: Retrieval) -> RetrievalTask:
    """Returns the queries of a CSV file over all images under a folder.

    Args:
        config: The CSV file (`truth`), the folder of its paths (`root`, None: that of the file),
            and the folder of the database (`database`, None: the root).

    Raises:
        Refused: The file or the folder cannot be read, the folder has no image, or an image that
            the file lists is not in it.
    """
    root = Path(os.path.abspath(config.truth.parent if config.root is None else config.root))
    try:
        queries: list[Query] = read_truth(config.truth, root=root)
        database = list_images(
            root if config.database is None else Path(os.path.abspath(config.database))
        )
        return RetrievalTask(
            database,
            [(query.path, query.box) for query in queries],
            to_relevance(queries, database),
        )
    except ValueError as error:
        raise Refused(str(error)) from None


def read_class_folders(folder: Path) -> RetrievalTask:
    """Returns the task in which every image is a query for the others in its folder.

    Args:
        folder: Folder with a sub-folder of images for each class. All images under it are the
            database.

    Raises:
        Refused: There are no images, or one of the folders cannot be read.
    """
    database = list_images(folder)
    members: dict[Path, list[int]] = {}
    for i, path in enumerate(database):
        members.setdefault(path.parent, []).append(i)
    relevance = [
        Relevance(np.setdiff1d(members[path.parent], [i]), np.array([i]))
        for i, path in enumerate(database)
    ]
    return RetrievalTask(database, [(path, None) for path in database], relevance)


def list_images(folder: Path) -> list[Path]:
    """Returns the paths of all images under a folder, in the order of their names.

    Args:
        folder: The folder; hidden files and folders are left out.

    Raises:
        Refused: There are no images, or something under the folder cannot be read.
    """
    listing = walk(folder, apart=folder / ".none")
    if listing.skipped:
        raise Refused(listing.skipped[0].why)
    if not listing.files:
        raise Refused(f"there are no images in {folder}")
    return [folder / file.path for file in listing.files]


def evaluate(config: Retrieval, task: RetrievalTask) -> list[Result]:
    """Returns the measures of each pooling with each reranker.

    Args:
        config: Settings of the descriptors and rerankers. With `table` they are all of `POOLINGS`
            and all rerankers.
        task: Database, queries and relevance.

    Raises:
        Refused: An image cannot be read or described, or the settings of the descriptors do not
            fit.
    """
    settings = (
        vary_pooling(config.descriptor)
        if config.table
        else {name_pooling(config.descriptor): config.descriptor}
    )
    queries, database = describe_task(list(settings.values()), task)
    results = []
    for i, pooling in enumerate(settings):
        vectors = jax.device_put(np.ascontiguousarray(database[:, i]))
        initial = rank_all(queries[:, i], vectors, own=task.own)
        for name in get_args(Name) if config.table else config.rerank:
            ids = rerank_all(name, queries[:, i], vectors, initial, config.how, own=task.own)
            results.append(Result(pooling, name, measure(ids, task.relevance, config.k)))
    return results


def name_pooling(settings: DescriptorSettings) -> str:
    """Returns the pooling in words, such as `gem+, regional, 3 scales`.

    Args:
        settings: Settings of the descriptors.
    """
    parts = [
        settings.pooling,
        "regional" if settings.regional else "",
        f"{settings.scales} scales" if settings.scales > 1 else "",
    ]
    return ", ".join(filter(None, parts))


def describe_task(
    settings: Sequence[DescriptorSettings], task: RetrievalTask
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the descriptors of queries and database, `(n, settings, d)` each.

    A query that has no box and is in the database is described once.

    Args:
        settings: Settings of the descriptors, which share a network as in `SharedExtractor`.
        task: Database and queries.

    Raises:
        Refused: An image cannot be read or described, or the settings do not fit.
    """
    extractor = make_extractor(settings if len(settings) > 1 else settings[0])
    names = [shown(str(path)) for path in task.database]
    database = describe_images(
        extractor, (read_crop(path, None) for path in task.database), names, "database"
    )
    row = {path: i for i, path in enumerate(task.database)}
    apart = [i for i, (path, box) in enumerate(task.queries) if box is not None or path not in row]
    queries = np.empty((len(task.queries), *database.shape[1:]), database.dtype)
    for i, (path, _) in enumerate(task.queries):
        queries[i] = database[row.get(path, 0)]
    if apart:
        crops = (read_crop(*task.queries[i]) for i in apart)
        queries[apart] = describe_images(
            extractor, crops, [shown(str(task.queries[i][0])) for i in apart], "queries"
        )
    return (queries, database) if len(settings) > 1 else (queries[:, None], database[:, None])


def measure(
    ids: np.ndarray, relevance: Sequence[Relevance], kappas: Sequence[int]
) -> dict[str, Interval]:
    """Returns the means over the queries that have relevant images, by the name of the measure.

    Args:
        ids: Rankings `(queries, n)`, as rows of the database, best first.
        relevance: The relevant and ignored rows of each query.
        kappas: Numbers of results for precision and recall.

    Returns:
        "mAP", and "mP@k" and "recall@k" for each number, from 0 to 1, with bootstrap intervals over
        queries.
    """
    found, recall = scores(ids, relevance, kappas=kappas), recall_at(ids, relevance, kappas=kappas)
    measures = {"mAP": bootstrap(found.average_precision)}
    measures |= {
        f"mP@{kappa}": bootstrap(found.precision_at[:, i]) for i, kappa in enumerate(found.kappas)
    }
    return measures | {
        f"recall@{kappa}": bootstrap(recall[:, i]) for i, kappa in enumerate(found.kappas)
    }


def as_json(config: Retrieval, task: RetrievalTask, results: list[Result]) -> dict[str, Any]:
    """Returns the object that `--json` prints.

    Args:
        config: Settings of the evaluation.
        task: Database, queries and relevance.
        results: The measures, as `evaluate` returns them.

    Returns:
        Counts, settings, and "results", a list with an entry for each pooling and reranker.
        Measures are from 0 to 1.
    """
    return {
        "truth": str(config.truth),
        "database": len(task.database),
        "queries": len(task.queries),
        "queries_without_relevant": _count_without_relevant(task),
        "descriptor": config.descriptor.record(),
        "rerank": dataclasses.asdict(config.how),
        "results": [
            {
                "pooling": own.pooling,
                "rerank": own.rerank,
                **{name: dataclasses.asdict(value) for name, value in own.measures.items()},
            }
            for own in results
        ],
    }


def show(config: Retrieval, task: RetrievalTask, results: list[Result]) -> None:
    """Prints the measures as a table, a line for each pooling and reranker.

    Args:
        config: Settings of the evaluation.
        task: Database, queries and relevance.
        results: The measures, as `evaluate` returns them.
    """
    title = (
        f"{config.truth}: {len(task.queries):,} queries, {len(task.database):,} images in"
        " the database; mean [95 % interval]"
    )
    table = Table("pooling", "reranking", title=title, title_justify="left")
    for name in results[0].measures:
        table.add_column(name, justify="right")
    for own in results:
        table.add_row(own.pooling, own.rerank, *map(str, own.measures.values()))
    Console(width=None if sys.stdout.isatty() else 240).print(table)
    if without := _count_without_relevant(task):
        print(f"{without} queries have no relevant image and are left out of the means.")


def _count_without_relevant(task: RetrievalTask) -> int:
    return sum(not len(each.positive) for each in task.relevance)


if __name__ == "__main__":
    main()
