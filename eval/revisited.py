"""Evaluates on Revisited Oxford and Paris, with or without distractors.

    python -m eval.revisited gnd_roxford5k.json --images jpg/

Prints mean average precision and mean precision at 1, 5 and 10 of the set-ups easy, medium and
hard, as the public protocol counts them. The ground truth is the original pickle, or the same as
JSON. Descriptors are computed from the images, queries cropped to their boxes, by default as in
SuperGlobal's paper. They can also be read from files (`--queries`, `--database`), in the order of
the ground truth. `--distractors` adds images that are right for no query. `--ablation` switches on
the parts of SuperGlobal one after the other.

Reference: Radenović et al., "Revisiting Oxford and Paris: Large-Scale Image Retrieval
Benchmarking", CVPR 2018, arXiv:1803.11285.
"""

import dataclasses
import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from eval.descriptors import describe_images, make_extractor, read_crop
from eval.rerankers import Name, Rerank, rank_all, rerank_all
from ggem_jax import __version__
from ggem_jax.descriptors.settings import DescriptorSettings
from ggem_jax.files.images import RGB, read_image
from ggem_jax.files.vectors import write_npz
from ggem_jax.retrieval.metrics import SETUPS, Difficulty, Scores, revisited
from ggem_jax.weights import read_pickle
from train.cli import Refused, one_sentence, parse

AS_IN_THE_PAPER = DescriptorSettings(sizes="exact", longest_side=0)

# Each step includes those before it. `relup` has an effect in a ResNet only.
ABLATION: dict[str, dict[str, Any]] = {
    "plain": {"pooling": "gem", "regional": False, "scale_gem": False, "relup": False},
    "+ GeM+": {"pooling": "gem+"},
    "+ Regional GeM": {"regional": True},
    "+ Scale GeM": {"scale_gem": True},
    "+ ReLU-P": {"relup": True},
}

_ON_DEVICE = 2**30  # bytes up to which a database is held in memory as float32
# what NumPy raises for files that are not arrays
_NO_ARRAYS = (ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile)
_SAMPLE = 4096  # rows of a file of descriptors whose lengths are checked


@dataclass(frozen=True)
class Revisited:
    """Revisited Oxford and Paris: mAP and mP@1, 5, 10 of the set-ups easy, medium and hard."""

    truth: Positional[Path]  # gnd_roxford5k or gnd_rparis6k, .json, .pkl or .pickle
    images: Path | None = None  # folder with the images: NAME.jpg for the names of the ground truth
    # descriptors of the queries instead of images: .npy or .npz with one array, float32 or
    # float16, a unit vector for each entry of qimlist
    queries: Path | None = None
    database: Path | None = None  # the same for each entry of imlist
    distractors: Path | None = None  # any number of them; an .npy is read in blocks
    rerank: tuple[Name, ...] = ("none",)  # rerankers, one line of the table each
    # switch on the parts of SuperGlobal one after the other, reranking last
    ablation: bool = False
    cache: Path | None = None  # folder that keeps the descriptors of the images for each setting
    json: bool = False  # print one JSON object
    how: Annotated[Rerank, arg(name="")] = Rerank()  # noqa: RUF009
    descriptor: Annotated[DescriptorSettings, arg(name="")] = AS_IN_THE_PAPER

    def __post_init__(self):
        files = [self.queries, self.database]
        if (self.images is None) == (files == [None, None]):
            raise ValueError("give either --images or both --queries and --database")
        if self.images is None and None in files:
            raise ValueError("--queries and --database go together")
        if self.ablation and self.images is None:
            raise ValueError(
                "--ablation makes descriptors under several settings: it needs --images"
            )
        if self.ablation and self.distractors is not None:
            raise ValueError("--distractors are of one setting and cannot go with --ablation")
        if self.cache is not None and self.images is None:
            raise ValueError("--cache keeps descriptors of images: it goes with --images")


@dataclass(frozen=True)
class Truth:
    """The ground truth of Revisited Oxford or Paris."""

    database: tuple[str, ...]  # names of the images
    queries: tuple[str, ...]  # names of the images
    boxes: tuple[tuple[float, ...], ...]  # (x1, y1, x2, y2) of each query, in pixels
    lists: tuple[Difficulty, ...]  # of each query, as places in `database`


@dataclass(frozen=True)
class Joined:
    """Arrays of descriptors one behind the other, as one store."""

    parts: tuple[np.ndarray, ...]  # (rows, d) each

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows of all parts, and of channels."""
        return sum(map(len, self.parts)), self.parts[0].shape[1]

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Returns the rows with these ids, `(m, d)`, in this order.

        Args:
            ids: Ids `(m,)` of rows, counted from 0 over all parts.
        """
        taken, first = np.empty((len(ids), self.shape[1]), np.result_type(*self.parts)), 0
        for part in self.parts:
            here = (ids >= first) & (ids < first + len(part))
            taken[here] = part[ids[here] - first]
            first += len(part)
        return taken

    def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields all rows in blocks: the number of a block's first row, and the block.

        Args:
            rows: Rows of a block; the last one may have fewer.
        """
        for start in range(0, self.shape[0], rows):
            pieces, first = [], 0
            for part in self.parts:
                pieces.append(part[max(start - first, 0) : max(start + rows - first, 0)])
                first += len(part)
            yield start, np.concatenate(pieces)


def main(argv: list[str] | None = None) -> None:
    """Runs the script."""
    with one_sentence("eval.revisited"):
        config = parse(Revisited, argv, "eval.revisited")
        truth = read_ground_truth(config.truth)
        distractors = (
            None
            if config.distractors is None
            else read_unit_vectors(config.distractors, "distractors")
        )
        results = (
            run_ablation(config, truth) if config.ablation else evaluate(config, truth, distractors)
        )
        count = 0 if distractors is None else len(distractors)
        if config.json:
            print(json.dumps(as_json(config, truth, count, results)))
        else:
            show(config, truth, count, results)


def read_ground_truth(path: Path) -> Truth:
    """Returns the ground truth of a pickle or a JSON file.

    Args:
        path: File with imlist, qimlist and gnd as the authors publish them: a pickle where its name
            ends in `.pkl` or `.pickle`, JSON where it ends in `.json`.

    Raises:
        Refused: The file has another ending, cannot be read, or holds something else.

    Reference: https://github.com/filipradenovic/revisitop.
    """
    ending = path.suffix.lower()
    if ending not in (".json", ".pkl", ".pickle"):
        raise Refused(f"{path} must end in .json, .pkl or .pickle, whichever it holds: rename it")
    try:
        values = json.loads(path.read_text("utf-8-sig")) if ending == ".json" else read_pickle(path)
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise Refused(f"{path} is not a ground truth: {error}") from None
    try:
        database, queries = (
            tuple(map(_require_text, values[name])) for name in ("imlist", "qimlist")
        )
        entries = list(values["gnd"])
        boxes = tuple(_require_box(entry["bbx"]) for entry in entries)
        lists = tuple(_require_lists(entry, len(database)) for entry in entries)
    except KeyError as error:
        raise Refused(
            f"{path} lacks {error}: a ground truth of revisited Oxford or Paris has imlist, qimlist"
            " and gnd, and gnd has bbx, easy, hard and junk for each query (the first edition, with"
            " ok in place of easy and hard, is another protocol)"
        ) from None
    except (TypeError, ValueError) as error:
        raise Refused(
            f"{path} is not a ground truth of imlist, qimlist and gnd with bbx, easy, hard and"
            f" junk: {error}"
        ) from None
    if not queries or len(entries) != len(queries):
        raise Refused(
            f"{path} must have an entry of gnd for each of qimlist: they are {len(entries)} and"
            f" {len(queries)}"
        )
    return Truth(database, queries, boxes, lists)


def _require_text(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a name must be text, not {name!r}")
    return name


def _require_box(values: Any) -> tuple[float, ...]:
    if np.shape(values) != (4,):
        raise ValueError(f"bbx must be four numbers, not {values!r}")
    return tuple(map(float, values))


def _require_lists(entry: dict[str, Any], count: int) -> Difficulty:
    lists = [_require_ids(entry[kind], count) for kind in ("easy", "hard", "junk")]
    ids, times = np.unique(np.concatenate([np.unique(each) for each in lists]), return_counts=True)
    if (twice := ids[times > 1]).size:
        raise ValueError(f"image {twice[0]} is in two of easy, hard and junk of one query")
    return Difficulty(*lists)


def _require_ids(values: Sequence[int], count: int) -> np.ndarray:
    ids = np.array(values)
    if (
        ids.ndim != 1
        or (ids.size and not np.issubdtype(ids.dtype, np.integer))
        or np.any((ids < 0) | (ids >= count))
    ):
        raise ValueError(f"ids must be whole numbers below {count}")
    return ids.astype(int)


def evaluate(
    config: Revisited, truth: Truth, distractors: np.ndarray | None
) -> dict[str, dict[str, Scores]]:
    """Returns the scores of each reranker: its name -> set-up -> scores.

    Args:
        config: The images or files of descriptors, the settings of the descriptors, and the
            rerankers.
        truth: The ground truth.
        distractors: Unit vectors `(n, d)` that are added to the database; None adds none.

    Raises:
        Refused: The descriptors do not fit the ground truth or each other, or an image cannot be
            read.
    """
    if config.images is not None:
        queries, database = describe_sets(config, truth, config.descriptor, {})
    else:
        assert config.queries is not None
        assert config.database is not None
        queries, database = (
            read_unit_vectors(path, flag)
            for path, flag in ((config.queries, "queries"), (config.database, "database"))
        )
        for flag, vectors, names in (
            ("queries", queries, truth.queries),
            ("database", database, truth.database),
        ):
            if len(vectors) != len(names):
                more = (
                    f"; what lies behind the {len(names)} may be given as --distractors"
                    if flag == "database"
                    else ""
                )
                raise Refused(
                    f"--{flag} must have a row for each of the {len(names)} images of"
                    f" {config.truth}, not {len(vectors)}{more}"
                )
    parts = [database] if distractors is None else [database, distractors]
    if len(dims := {part.shape[1] for part in [queries, *parts]}) > 1:
        raise Refused(
            "the descriptors of queries, database and distractors must have one length, not"
            f" {' and '.join(map(str, sorted(dims)))}"
        )
    searched = _as_store(parts)
    queries = np.asarray(queries, np.float32)
    initial = rank_all(queries, searched)
    return {
        name: revisited(rerank_all(name, queries, searched, initial, config.how), truth.lists)
        for name in config.rerank
    }


def run_ablation(config: Revisited, truth: Truth) -> dict[str, dict[str, Scores]]:
    """Returns the scores of each step of `ABLATION` and of reranking: its name -> set-up -> scores.

    Every step adds a part of SuperGlobal to the steps before it.

    Args:
        config: The images, the settings of the descriptors that the steps change, and the options
            of reranking.
        truth: The ground truth.

    Raises:
        Refused: The settings do not fit, or an image cannot be read.
    """
    memory: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    results = {}
    try:
        settings = config.descriptor.resolve()
    except ValueError as error:
        raise Refused(str(error)) from None
    is_resnet = str(settings.backbone).startswith("resnet")
    for step, changes in ABLATION.items():
        settings = dataclasses.replace(settings, **changes)
        own = settings if is_resnet else dataclasses.replace(settings, relup=True)
        queries, vectors = describe_sets(config, truth, own, memory)
        database = _as_store([vectors])
        initial = rank_all(queries, database)
        results[step] = revisited(np.asarray(initial.ids), truth.lists)
    results["+ reranking"] = revisited(
        rerank_all("superglobal", queries, database, initial, config.how), truth.lists
    )
    return results


def _as_store(parts: list[np.ndarray]) -> jax.Array | np.ndarray | Joined:
    if len(parts) > 1:
        return Joined(tuple(parts))
    return (
        jax.device_put(np.asarray(parts[0], np.float32))
        if 4 * parts[0].size <= _ON_DEVICE
        else parts[0]
    )


def read_unit_vectors(path: Path, flag: str) -> np.ndarray:
    """Returns the unit vectors `(n, d)` of a file, memory-mapped if it is an `.npy`.

    Only a sample of the rows is checked for its length.

    Args:
        path: An `.npy` or `.npz` file, in float32 or float16.
        flag: Flag that named the file, for errors. An `.npz` of several arrays must hold one of
            this name.

    Raises:
        Refused: The file cannot be read, or does not hold unit vectors.
    """
    try:
        if path.suffix == ".npz":
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
                names = [name for name in arrays.files if name == flag] or arrays.files
                if len(names) != 1:
                    raise ValueError(
                        f"it must hold one array, or one that is called {flag}, not"
                        f" {', '.join(arrays.files)}"
                    )
                found = arrays[names[0]]
        else:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise Refused(f"--{flag} {path} cannot be read: {error.strerror or error}") from None
    except _NO_ARRAYS as error:
        raise Refused(
            f"--{flag} {path} is not a file of descriptors: {str(error).partition(chr(10))[0]}"
        ) from None
    if found.ndim != 2 or 0 in found.shape or found.dtype not in (np.float32, np.float16):
        raise Refused(
            f"--{flag} must be float32 or float16 of shape (n, d), and {path} is {found.dtype} of"
            f" shape {found.shape}"
        )
    some = np.asarray(found[:: -(-len(found) // _SAMPLE)], np.float32)
    if not np.all(np.abs(np.linalg.norm(some, axis=1) - 1) < 1e-2):
        raise Refused(
            f"--{flag} must be unit vectors, and some rows of {path} are not: divide each by its"
            " length"
        )
    return found


def describe_sets(
    config: Revisited,
    truth: Truth,
    settings: DescriptorSettings,
    memory: dict[str, tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the descriptors of the queries' boxes and of the database, `(n, d)` each.

    They are read from the memory or from the cache where they are there.

    Args:
        config: Folders of the images and of the cache.
        truth: Names of the images, and boxes of the queries.
        settings: Settings of the descriptors.
        memory: Descriptors of earlier calls by settings; new ones are added.

    Raises:
        Refused: An image is missing or cannot be read, or the cache is damaged.
    """
    assert config.images is not None
    files = {name: config.images / f"{name}.jpg" for name in (*truth.queries, *truth.database)}
    try:
        key = json.dumps(
            [
                settings.record(),
                truth.queries,
                truth.boxes,
                truth.database,
                str(config.images.resolve()),
                __version__,
            ],
            sort_keys=True,
        )
    except ValueError as error:
        raise Refused(str(error)) from None
    if key in memory:
        return memory[key]
    path = (
        None
        if config.cache is None
        else config.cache / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.npz"
    )
    found = None if path is None else _read_cache(path)
    if found is None:
        if missing := [file for file in files.values() if not file.is_file()]:
            raise Refused(
                f"{len(missing)} of {len(files)} images of {config.truth} are not in"
                f" {config.images}, the first of them {missing[0].name}"
            )
        extractor = make_extractor(settings)
        crops = (
            read_crop(files[name], box)
            for name, box in zip(truth.queries, truth.boxes, strict=True)
        )
        wholes: Iterator[RGB] = (read_image(files[name]) for name in truth.database)
        found = (
            describe_images(extractor, crops, truth.queries, "queries"),
            describe_images(extractor, wholes, truth.database, "database"),
        )
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_npz(path, queries=found[0], database=found[1])
    memory[key] = found
    return found


def _read_cache(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    if not path.exists():
        return None
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            return arrays["queries"], arrays["database"]
    except (OSError, *_NO_ARRAYS) as error:
        raise Refused(
            f"{path} in the cache is damaged ({str(error).partition(chr(10))[0]}): delete it"
        ) from None


def as_json(
    config: Revisited, truth: Truth, distractors: int, results: dict[str, dict[str, Scores]]
) -> dict[str, Any]:
    """Returns the object that `--json` prints.

    Args:
        config: Settings of the evaluation.
        truth: The ground truth.
        distractors: Number of distractors.
        results: Scores by reranker or step, and by set-up.

    Returns:
        Counts, settings, and "results": reranker or step -> set-up -> "mAP" and "mP@k", from 0 to
        1.
    """
    return {
        "truth": str(config.truth),
        "queries": len(truth.queries),
        "database": len(truth.database),
        "distractors": distractors,
        "descriptor": None if config.images is None else config.descriptor.record(),
        "rerank": dataclasses.asdict(config.how),
        "results": {
            name: {
                setup: {
                    "mAP": own.mean_average_precision,
                    **{f"mP@{kappa}": value for kappa, value in own.mean_precision_at.items()},
                }
                for setup, own in by_setup.items()
            }
            for name, by_setup in results.items()
        },
    }


def show(
    config: Revisited, truth: Truth, distractors: int, results: dict[str, dict[str, Scores]]
) -> None:
    """Prints the scores as a table, in percent.

    Args:
        config: Settings of the evaluation.
        truth: The ground truth.
        distractors: Number of distractors.
        results: Scores by reranker or step, and by set-up.
    """
    title = (
        f"{config.truth.name}: {len(truth.queries)} queries, {len(truth.database):,} images and"
        f" {distractors:,} distractors"
    )
    table = Table("step" if config.ablation else "reranking", title=title, title_justify="left")
    for setup in SETUPS:
        for measure in ("mAP", "mP@1", "mP@5", "mP@10"):
            table.add_column(f"{setup[0].upper()} {measure}", justify="right")
    for name, by_setup in results.items():
        values = [
            value
            for own in by_setup.values()
            for value in (own.mean_average_precision, *own.mean_precision_at.values())
        ]
        table.add_row(name, *(f"{100 * value:.2f}" for value in values))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    backbone = str(config.descriptor.resolve().backbone)
    if config.ablation and not backbone.startswith("resnet"):
        print(f"ReLU-P is a part of ResNets: it changes nothing in {backbone}.")


if __name__ == "__main__":
    main()
