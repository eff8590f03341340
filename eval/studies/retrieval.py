"""Compares poolings and rerankers on real images with real ground truth.

    python -m eval.studies.retrieval --data DIR

EfficientNet-Lite0 with its ImageNet weights describes three sets, in their zip files: places along
a corridor, handwritten characters (Omniglot), and ten photos of one landmark among 2,000
photographs (an easy test). The study evaluates every pooling with every reranker: recall@1 and mean
average precision with 95 % bootstrap intervals over queries, and paired differences to the average
and to no reranking. Pixels as descriptors are the reference point.

Prints the tables and writes `benchmarks/results/retrieval_study.csv`, which
`docs/retrieval_study.md` reports. Takes minutes on two CPU cores.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args

import jax
import numpy as np
from PIL import Image
from tyro.conf import arg

from eval.descriptors import POOLINGS, describe_images, make_extractor, vary_pooling
from eval.rerankers import Name, Rerank, rank_all, rerank_all
from eval.statistics import bootstrap
from eval.tables import format_cell, interval_columns, write_rows
from ggem_jax.descriptors.settings import DescriptorSettings
from ggem_jax.files.images import RGB, read_image
from ggem_jax.processors import count_processors
from ggem_jax.retrieval.expansion import augment_database
from ggem_jax.retrieval.metrics import Relevance, positive_ranks, recall_at, scores
from train.cli import Refused, one_sentence, parse

DRAWERS = 20  # of each character of Omniglot
RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "retrieval_study.csv"


@dataclass(frozen=True)
class Study:
    """Poolings and rerankers on real images with real ground truth."""

    # folder with corridor-vpr, omniglot-small, landmark-photos and imagenette-224-mini; None:
    # $GGEM_SHARED/data
    data: Path | None = None
    sets: tuple[str, ...] = ("corridor", "omniglot", "landmark")  # which of the three to run
    out: Path = RESULTS  # CSV file of the results
    # drawers whose drawings are queries, of Omniglot's 20; all drawings are in the database
    drawers: int = 5
    rerank: Annotated[Rerank, arg(name="")] = Rerank()  # noqa: RUF009

    def __post_init__(self):
        if not 1 <= self.drawers <= DRAWERS:
            raise ValueError(f"--drawers must be from 1 to {DRAWERS}, it is {self.drawers}")


def find_data(data: Path | None) -> Path:
    """Returns the folder of the sets.

    Args:
        data: The folder. None takes the folder `data` in the one that the variable GGEM_SHARED
            names.

    Raises:
        Refused: `data` is None and GGEM_SHARED is not set.
    """
    found = data or (
        Path(os.environ["GGEM_SHARED"]) / "data" if "GGEM_SHARED" in os.environ else None
    )
    if found is None:
        raise Refused(
            "--data must name the folder of the sets, or GGEM_SHARED the folder that has them in"
            " its folder data"
        )
    return found


@dataclass(frozen=True)
class Set:
    """Images, the queries among them, and the images that each query should find."""

    names: list[str]  # of all images
    read: Callable[[str], RGB]  # name -> image
    database: np.ndarray  # places in `names`
    queries: np.ndarray  # places in `names`
    relevance: list[Relevance]  # of each query, as places in `database`
    longest_side: int  # of the images that the network sees, in pixels
    pixels: Callable[[RGB], np.ndarray]  # a descriptor without a network, not yet normalised
    # expansion of queries and database for the reference point; None: no expansion
    pixels_expansion: Rerank | None = None
    # the same images with other queries, databases and relevance, by name
    views: "dict[str, Set]" = field(default_factory=dict)

    @property
    def own(self) -> np.ndarray:
        """The row `(queries,)` of each query in the database, or -1."""
        row = {place: i for i, place in enumerate(self.database.tolist())}
        return np.array([row.get(place, -1) for place in self.queries.tolist()])


def corridor(data: Path, study: Study) -> Set:
    """Returns two runs along one corridor: frames of the first are queries, the second is searched.

    About five frames are right for each query.

    Args:
        data: Folder of the sets.
        study: Settings of the study; this set does not depend on them.

    Raises:
        Refused: The zip file cannot be read.
    """
    archive, names = _open_zip(data / "corridor-vpr" / "corridor.zip")
    (truth_name,) = [name for name in archive.namelist() if name.endswith("ground_truth.json")]
    truth = json.loads(archive.read(truth_name))
    queries, references = (
        [i for i, name in enumerate(names) if name.split("/")[-2] == kind]
        for kind in ("query", "ref")
    )
    relevance = [Relevance(np.array(right, int), np.array([], int)) for right in truth]
    return Set(
        names,
        _make_reader(archive),
        np.array(references),
        np.array(queries),
        relevance,
        320,
        lambda image: _shrink_to_grey(image, 32),
    )


def omniglot(data: Path, study: Study) -> Set:
    """Returns 136 characters by 20 drawers: the other drawings of the query's character are right.

    The query's own image is left out. A second view has a database without the drawers of the
    queries, because database augmentation must not see a query among the neighbours.

    Args:
        data: Folder of the sets.
        study: Its `drawers` are those whose drawings are queries; with all of them there is no
            second view.

    Raises:
        Refused: The zip file cannot be read.
    """
    archive, names = _open_zip(data / "omniglot-small" / "images_background_small1.zip")
    character = np.unique([name.rpartition("/")[0] for name in names], return_inverse=True)[1]
    drawer = np.array([int(name.rpartition("_")[2].removesuffix(".png")) for name in names])
    queries = np.flatnonzero(drawer <= study.drawers)
    relevance = [
        Relevance(np.setdiff1d(np.flatnonzero(character == character[i]), [i]), np.array([i]))
        for i in queries
    ]
    expansion = Rerank(qe_neighbors=5, alpha=3.0)
    every = Set(
        names,
        _make_reader(archive),
        np.arange(len(names)),
        queries,
        relevance,
        160,
        lambda image: 255 - _shrink_to_grey(image, 28),
        expansion,
    )
    others = np.flatnonzero(drawer > study.drawers)
    right = [
        Relevance(np.flatnonzero(character[others] == character[i]), np.array([], int))
        for i in queries
    ]
    apart = dataclasses.replace(every, database=others, relevance=right)
    return (
        every
        if study.drawers == DRAWERS
        else dataclasses.replace(every, views={"omniglot, queries apart": apart})
    )


def landmark(data: Path, study: Study) -> Set:
    """Returns ten photos of one church, each a query for the others, among 2,000 photographs.

    Args:
        data: Folder of the sets.
        study: Settings of the study; this set does not depend on them.

    Raises:
        Refused: The zip file of the photographs cannot be read, or there are no photos of the
            church.
    """
    archive, distractors = _open_zip(data / "imagenette-224-mini" / "imagenette224_mini.zip")
    photos = sorted(str(path) for path in (data / "landmark-photos" / "sacre_coeur").glob("*.jpg"))
    if not photos:
        raise Refused(f"{data / 'landmark-photos' / 'sacre_coeur'} has no photos")
    own, inside = set(photos), _make_reader(archive)
    every = np.arange(len(photos))
    relevance = [Relevance(np.setdiff1d(every, [i]), np.array([i])) for i in every]
    names = photos + distractors

    def read(name: str) -> RGB:
        return read_image(Path(name)) if name in own else inside(name)

    return Set(
        names,
        read,
        np.arange(len(names)),
        every,
        relevance,
        224,
        lambda image: _shrink_to_grey(image, 32),
    )


SETS: dict[str, Callable[[Path, Study], Set]] = {
    "corridor": corridor,
    "omniglot": omniglot,
    "landmark": landmark,
}


def _open_zip(path: Path) -> tuple[zipfile.ZipFile, list[str]]:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise Refused(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    names = [
        name
        for name in archive.namelist()
        if name.lower().endswith((".png", ".jpg", ".jpeg")) and not name.startswith("__MACOSX")
    ]
    return archive, sorted(names)


def _make_reader(archive: zipfile.ZipFile) -> Callable[[str], RGB]:
    return lambda name: read_image(archive.read(name), name=name)


def _shrink_to_grey(image: RGB, side: int) -> np.ndarray:
    return np.asarray(
        Image.fromarray(image).convert("L").resize((side, side), Image.Resampling.BOX), np.float32
    )


@dataclass(frozen=True)
class Cell:
    """The measures of one pooling with one reranker."""

    average_precision: np.ndarray  # (queries,) by the trapezoid rule of the revisited protocol
    recall_at_1: np.ndarray  # (queries,) 0 or 1
    # mean average precision as others count it: the mean of the precisions at all positives, over
    # the queries that have one
    mean_of_precisions: float

    def make_columns(self, average: "Cell | None", none: "Cell | None") -> dict[str, Any]:
        """Returns both measures with their intervals, and their differences to two other cells.

        Args:
            average: The cell of average pooling with the same reranker; None leaves the difference
                empty.
            none: The cell of the same pooling without reranking; None leaves the difference empty.

        Returns:
            Text by column, with four decimals.
        """
        row: dict[str, Any] = {}
        for name in ("recall_at_1", "average_precision"):
            values = getattr(self, name)
            row |= interval_columns(name, bootstrap(values))
            for against, other in (("average", average), ("none", none)):
                difference = None if other is None else bootstrap(values - getattr(other, name))
                row |= interval_columns(f"{name}_less_{against}", difference)
        return {**row, "mean_of_precisions": f"{self.mean_of_precisions:.4f}"}


def measure(ids: np.ndarray, relevance: list[Relevance]) -> Cell:
    """Returns the measures of whole rankings.

    Args:
        ids: Rankings `(queries, n)` of all rows of the database, best first.
        relevance: The relevant and ignored rows of each query. Queries without a relevant row are
            left out of all means.
    """
    # the ranks of all positives: rankings are whole
    found = [
        positive_ranks(row, own)
        for row, own in zip(ids, relevance, strict=True)
        if len(own.positive)
    ]
    precisions = np.mean([np.mean((np.arange(len(ranks)) + 1) / (ranks + 1)) for ranks in found])
    return Cell(
        scores(ids, relevance).average_precision,
        recall_at(ids, relevance, kappas=(1,))[:, 0],
        float(precisions),
    )


def measure_rerankers(vectors: np.ndarray, own: Set, rerank: Rerank) -> dict[Name, Cell]:
    """Returns the measures of every reranker on the descriptors of one pooling, by name.

    Args:
        vectors: Unit vectors `(n, d)` of all images of the set.
        own: The set.
        rerank: Settings of the rerankers.
    """
    queries, database = vectors[own.queries], jax.device_put(vectors[own.database])
    initial = rank_all(queries, database, own=own.own)
    return {
        name: measure(
            rerank_all(name, queries, database, initial, rerank, own=own.own), own.relevance
        )
        for name in get_args(Name)
    }


def make_unit_pixels(own: Set, names: Sequence[str]) -> np.ndarray:
    """Returns small grey images less their mean, as unit vectors `(n, d)`.

    Args:
        own: The set, which reads the images and shrinks them.
        names: Names of the images.
    """
    pixels = np.stack([own.pixels(own.read(name)).ravel() for name in names])
    pixels -= pixels.mean(axis=1, keepdims=True)
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    return pixels


def measure_pixels(name: str, own: Set) -> Iterator[dict[str, Any]]:
    """Yields the rows of the reference points that need no network.

    Args:
        name: Name of the set in the rows.
        own: The set.
    """
    pixels = make_unit_pixels(own, own.names)
    initial = rank_all(pixels[own.queries], pixels[own.database], own=own.own)
    cells = {"none": measure(np.asarray(initial.ids), own.relevance)}
    if own.pixels_expansion is not None:
        cells["queries and database expanded, 5 neighbours"] = measure(
            _expand_both(pixels, own), own.relevance
        )
    for reranker, cell in cells.items():
        none = None if reranker == "none" else cells["none"]
        yield {
            "set": name,
            "queries": len(own.queries),
            "database": len(own.database),
            "longest_side": "",
            "pooling": "pixels",
            "reranker": reranker,
            **cell.make_columns(None, none),
        }


def _expand_both(vectors: np.ndarray, own: Set) -> np.ndarray:
    """Rankings after queries and database are replaced by means of themselves and their nearest."""
    how = own.pixels_expansion
    assert how is not None
    augmented = np.asarray(
        augment_database(
            jax.device_put(vectors[own.database]), num_neighbors=how.qe_neighbors, alpha=how.alpha
        )
    )
    return np.asarray(rank_all(augmented[own.own], augmented, own=own.own).ids)


def measure_set(name: str, own: Set, rerank: Rerank) -> Iterator[dict[str, Any]]:
    """Yields a row for each pooling and reranker, of the set and its other views.

    Args:
        name: Name of the set in the rows.
        own: The set.
        rerank: Settings of the rerankers.

    Raises:
        Refused: An image cannot be read or described, or the weights are missing.
    """
    settings = vary_pooling(DescriptorSettings(longest_side=own.longest_side))
    began = time.perf_counter()
    extractor = make_extractor(list(settings.values()))
    vectors = describe_images(extractor, map(own.read, own.names), own.names, name)
    print(
        f"{name}: {len(own.names)} images described in {time.perf_counter() - began:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    for view, one in {name: own, **own.views}.items():
        cells = {
            pooling: measure_rerankers(np.ascontiguousarray(vectors[:, i]), one, rerank)
            for i, pooling in enumerate(POOLINGS)
        }
        print(
            f"{view}: evaluated after {time.perf_counter() - began:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        for pooling, by_reranker in cells.items():
            for reranker, cell in by_reranker.items():
                average = None if pooling == "average" else cells["average"][reranker]
                none = None if reranker == "none" else by_reranker["none"]
                yield {
                    "set": view,
                    "queries": len(one.queries),
                    "database": len(one.database),
                    "longest_side": one.longest_side,
                    "pooling": pooling,
                    "reranker": reranker,
                    **cell.make_columns(average, none),
                }


def describe_machine() -> dict[str, str]:
    """Returns date, device and versions, as columns of a row."""
    device = jax.devices()[0]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": (
            f"{platform.machine()} CPU, {count_processors()} cores"
            if device.platform == "cpu"
            else device.device_kind
        ),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "pillow")},
    }


def main(argv: list[str] | None = None) -> None:
    """Runs the study."""
    with one_sentence("eval.studies.retrieval"):
        study = parse(Study, argv, "eval.studies.retrieval", default=Study())
        data = find_data(study.data)
        if unknown := set(study.sets) - set(SETS):
            raise Refused(
                f"--sets must be among {', '.join(SETS)}, not {', '.join(sorted(unknown))}"
            )
        rows = []
        for name in study.sets:
            every = SETS[name](
                data, dataclasses.replace(study, drawers=DRAWERS)
            )  # pixels are cheap: all queries
            own = [
                *measure_pixels(name, every),
                *measure_set(name, SETS[name](data, study), study.rerank),
            ]
            rows += [{**describe_machine(), **row} for row in own]
            for view in dict.fromkeys(row["set"] for row in own):
                print(make_set_tables([row for row in own if row["set"] == view]), flush=True)
        write_rows(study.out, rows)


def make_set_tables(rows: list[dict[str, Any]]) -> str:
    """Returns the tables of one set in Markdown: rows are poolings, columns are rerankers.

    Both measures are in percent.

    Args:
        rows: Rows of the set from `measure_set` and `measure_pixels`.
    """
    networks = [row for row in rows if row["pooling"] != "pixels"]
    first = networks[0]
    text = (
        f"## {first['set']}: {first['queries']} queries, {first['database']} images in the"
        " database\n"
    )
    rerankers = list(dict.fromkeys(row["reranker"] for row in networks))
    for title, measure in (
        ("Mean average precision", "average_precision"),
        ("Recall@1", "recall_at_1"),
    ):
        text += (
            f"\n{title}, %, with 95 % intervals:\n\n| | {' | '.join(rerankers)} |\n| ---"
            f" |{' --- |' * len(rerankers)}\n"
        )
        for pooling in dict.fromkeys(row["pooling"] for row in networks):
            cells = [format_cell(row, measure) for row in networks if row["pooling"] == pooling]
            text += f"| {pooling} | {' | '.join(cells)} |\n"
        for row in rows:
            if row["pooling"] == "pixels":
                text += (
                    f"\nPixels, {row['reranker']}, {row['queries']} queries:"
                    f" {format_cell(row, measure)}"
                )
                text += (
                    f"; by the mean of precisions {100 * float(row['mean_of_precisions']):.2f}.\n"
                    if title.startswith("Mean")
                    else ".\n"
                )
    for title, against in (
        ("less that of the average, same reranker", "average"),
        ("less that without reranking, same pooling", "none"),
    ):
        text += (
            f"\nMean average precision {title}, points:\n\n| | {' | '.join(rerankers)} |\n| ---"
            f" |{' --- |' * len(rerankers)}\n"
        )
        for pooling in dict.fromkeys(row["pooling"] for row in networks):
            cells = [
                format_cell(row, f"average_precision_less_{against}")
                for row in networks
                if row["pooling"] == pooling
            ]
            text += f"| {pooling} | {' | '.join(cells)} |\n" if any(cells) else ""
    return text


if __name__ == "__main__":
    main()
