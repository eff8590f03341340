"""What each command of the tool does: pictures and vectors in, sentences, JSON and files out. Loads
JAX where pictures or vectors are worked on.
"""

import itertools
import json
import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from ggem_jax.descriptors.settings import DescriptorSettings, digest
from ggem_jax.descriptors.whitening import learn_whitening, save_whitening
from ggem_jax.files.atomic import replacing
from ggem_jax.files.images import RGB, UnreadableImage, crop, read_image
from ggem_jax.files.vectors import file_of, read_ranking, read_vectors, write_ranking
from ggem_jax.retrieval.index import index as indexes
from ggem_jax.retrieval.index.folder import shown
from ggem_jax.retrieval.index.index import Index, IndexRefused
from ggem_jax.retrieval.index.writing import Extract, Report
from ggem_jax.retrieval.metrics import Relevance, recall_at, scores
from ggem_jax.retrieval.tool.compilation import keep_compiled_programs
from ggem_jax.retrieval.tool.flags import Usage
from ggem_jax.retrieval.tool.methods import Method
from ggem_jax.retrieval.tool.methods import rerank as reranked
from ggem_jax.retrieval.tool.progress import progress
from ggem_jax.retrieval.tool.sheet import Answer, Box, Hit, write_sheet
from ggem_jax.retrieval.tool.truth import Query, read_truth, to_relevance

SOURCES = "sources.json"  # in an index: where its files of weights and of a whitening were
FILES = ("weights", "whitening")

_LEARNED_BYTES = 2**30  # of vectors, in float64, that a whitening is learned from at most


def index(arguments: Namespace) -> int:
    settings: DescriptorSettings = arguments.settings
    record = settings.record()  # reads the files, so that one that is not there is told at once
    with progress() as on_progress:
        report = indexes.build(
            arguments.photos,
            arguments.output,
            _extract(settings, arguments.batch),
            record,
            dtype=arguments.dtype,
            workers=arguments.workers,
            on_progress=on_progress,
        )
    _remember_files(Path(arguments.output), settings)
    return _told(arguments.output, report)


def add(arguments: Namespace) -> int:
    there = indexes.info(arguments.index)
    settings = settings_of(arguments.index, there["settings"], arguments)
    with progress() as on_progress:
        report = indexes.add(
            arguments.index,
            _extract(settings, arguments.batch),
            there["settings"],
            folder=arguments.photos,
            root=arguments.root,
            prune=arguments.prune,
            repair=arguments.repair,
            workers=arguments.workers,
            on_progress=on_progress,
        )
    _remember_files(Path(arguments.index), settings)
    return _told(arguments.index, report)


def remove(arguments: Namespace) -> int:
    return _told(arguments.index, indexes.remove(arguments.index, arguments.patterns))


def info(arguments: Namespace) -> int:
    facts = indexes.info(arguments.index)
    if arguments.json:
        return _print_json(facts)
    settings, versions = facts.pop("settings"), facts.pop("versions")
    for name, fact in (
        *facts.items(),
        *((f"settings.{name}", fact) for name, fact in settings.items()),
    ):
        print(f"{name:<22} {shown(fact) if isinstance(fact, str) else json.dumps(fact)}")
    print(
        f"{'versions':<22} {', '.join(f'{name} {version}' for name, version in versions.items())}"
    )
    return 0


def verify(arguments: Namespace) -> int:
    verdict = indexes.verify(arguments.index, deep=arguments.deep)
    if arguments.json:
        _print_json({"sound": not verdict.damage, **verdict._asdict()})
    else:
        for kind in ("damage", "notes"):
            for sentence in getattr(verdict, kind):
                print(f"{kind.removesuffix('s')}: {sentence}")
        print(f"{arguments.index} is {'damaged' if verdict.damage else 'sound'}")
    return 1 if verdict.damage else 0


def search(arguments: Namespace) -> int:
    opened = _opened(arguments.index)
    settings = settings_of(arguments.index, opened.settings, arguments)
    boxes: list[Box | None] = arguments.box or [None] * len(arguments.queries)
    if arguments.html:
        _check_output(arguments.html, (".html", ".htm"), arguments.queries)
    pictures = [_picture(query, box) for query, box in zip(arguments.queries, boxes, strict=True)]
    vectors = _described(settings, arguments.queries, pictures)
    method: Method = arguments.method
    k = min(arguments.k, len(opened))
    before, after = _ranked(method, vectors, opened.vectors(), depth=method.depth(k))
    answers = [
        Answer(query, box, _hits(opened.paths, before, after, row, k))
        for row, (query, box) in enumerate(zip(arguments.queries, boxes, strict=True))
    ]
    if arguments.html:
        facts = {
            "index": str(opened.folder.absolute()),
            "pictures": f"{len(opened)} under {opened.root}",
            "reranking": str(method),
            "descriptor": ", ".join(
                _spoken(name, value) for name, value in opened.settings.items() if value is not None
            ),
            "date": datetime.now().astimezone().isoformat(" ", "minutes"),
        }
        write_sheet(
            Path(arguments.html),
            answers,
            root=opened.root,
            reranked=method.name != "none",
            facts=facts,
        )
    if arguments.json:
        return _print_json(
            {
                "index": str(opened.folder.absolute()),
                "root": str(opened.root),
                "rerank": method.record(),
                "queries": [
                    {
                        "query": each.query,
                        "box": each.box,
                        "results": [asdict(hit) for hit in each.hits],
                    }
                    for each in answers
                ],
            }
        )
    for answer in answers:
        _print_answer(answer, opened.root, method)
    return 0


def rerank(arguments: Namespace) -> int:
    _check_output(
        arguments.output,
        (".npz", ".json"),
        [file_of(arguments.queries), file_of(arguments.database), arguments.ranking],
    )
    queries, database = (
        read_vectors(name, normalize=arguments.normalize)
        for name in (arguments.queries, arguments.database)
    )
    if queries.shape[1] != database.shape[1]:
        raise ValueError(
            f"{arguments.queries} has vectors of {queries.shape[1]} numbers, {arguments.database}"
            f" of {database.shape[1]}"
        )
    if arguments.ranking and arguments.k:
        raise Usage("-k is for the search, and --ranking takes its place: give one of them")
    method: Method = arguments.method
    vectors = np.concatenate([block for _, block in queries.blocks(len(queries.array))])
    if arguments.ranking:
        _, after = _reranked_file(arguments.ranking, method, vectors, database)
    else:
        _, after = _ranked(method, vectors, database, depth=arguments.k or method.candidates)
    if (
        not arguments.normalize
        and np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1).max() > 0.01
    ):
        sys.stderr.write(
            f"note: the vectors of {arguments.queries} are not of length 1; --normalize makes all"
            " so\n"
        )
    write_ranking(Path(arguments.output), *after)
    print(f"{arguments.output}: {after[1].shape[0]} queries, {after[1].shape[1]} results each")
    return 0


def evaluate(arguments: Namespace) -> int:
    opened = _opened(arguments.index)
    settings = settings_of(arguments.index, opened.settings, arguments)
    root = os.path.abspath(arguments.root or Path(arguments.truth).parent)
    queries = read_truth(arguments.truth, root=root)
    relevance = to_relevance(queries, [opened.root / path for path in opened.paths])
    vectors = _query_vectors(opened, queries, settings)
    method: Method = arguments.method
    before, after = _ranked(method, vectors, opened.vectors(), depth=arguments.k)
    measured = {"before": _measured(before[1], relevance, arguments.at)}
    if method.name != "none":
        measured["after"] = _measured(after[1], relevance, arguments.at)
    if arguments.json:
        counted = {
            "queries": len(queries),
            "without_relevant": sum(not len(each.positive) for each in relevance),
            "depth": before[1].shape[1],
        }
        return _print_json(
            {
                "index": str(opened.folder.absolute()),
                "truth": arguments.truth,
                **counted,
                "rerank": method.record(),
                **measured,
            }
        )
    print(
        f"{len(queries)} queries, {len(opened)} pictures, the first {before[1].shape[1]} results of"
        " each"
    )
    print(
        f"{'':<14}{''.join(f'{name:>12}' for name in (('search', method.name) if 'after' in measured else ('search',)))}"
    )
    for name in measured["before"]:
        print(f"{name:<14}{''.join(f'{_percent(own[name]):>12}' for own in measured.values())}")
    return 0


def whiten(arguments: Namespace) -> int:
    _check_output(arguments.output, (".npz",), [])
    opened = _opened(arguments.index)
    if opened.settings.get("whitening") is not None:
        raise IndexRefused(
            f"{arguments.index} holds vectors that are whitened already: learn from an index"
            " without --whitening"
        )
    rows = max(_LEARNED_BYTES // (8 * opened.dim), 1)
    ids = np.unique(np.linspace(0, len(opened) - 1, min(rows, len(opened))).astype(int))
    whitening = learn_whitening(opened.vectors().take(ids), dim=arguments.dim)
    save_whitening(arguments.output, whitening)
    print(
        f"{arguments.output}: from {opened.dim} to {whitening.projection.shape[1]} numbers, learned"
        f" from {len(ids)} of {len(opened)} pictures"
    )
    return 0


def settings_of(path: str, record: dict[str, Any], given: Namespace) -> DescriptorSettings:
    """The settings an index was made with. Files are those that are given, or else those of the
    build; their contents are compared.
    """
    remembered = _remembered_files(Path(path))
    values = dict(record)
    for name in FILES:
        file = getattr(given, name)
        if record.get(name) is None:
            if file is not None:
                raise Usage(f"{path} was made without a file of {name}: leave out --{name}")
            continue
        values[name] = file = file or remembered.get(name)
        if file is None or not os.path.exists(file):
            raise IndexRefused(
                f"{path} was made with a file of"
                f" {name}{f', {file}, which is not there' if file else ''}: name it with --{name}"
                " FILE"
            )
        if (found := digest(file)) != record[name]:
            raise IndexRefused(
                f"{file} is not the file of {name} that {path} was made with ({found}, not"
                f" {record[name]}): name that with --{name} FILE"
            )
    try:
        return DescriptorSettings(**values)
    except (TypeError, ValueError) as error:
        raise IndexRefused(
            f"{path} was made with settings that this tool does not know ({error}): it can be"
            " searched by what made it"
        ) from None


def make_extractor(settings: DescriptorSettings, batch: int | None = None):
    """The only place where a network is loaded."""
    keep_compiled_programs()
    from ggem_jax.descriptors.extract import Extractor

    return Extractor(settings, batch=batch)


def _extract(settings: DescriptorSettings, batch: int | None) -> Extract:
    """Loads the network when the first picture comes: a folder without news costs nothing."""

    def extract(pictures: Iterator[RGB]) -> Iterable[np.ndarray | UnreadableImage]:
        for first in pictures:
            yield from make_extractor(settings, batch)(itertools.chain([first], pictures))

    return extract


def _remembered_files(path: Path) -> dict[str, str]:
    try:
        values = json.loads((path / SOURCES).read_text())
        return {name: values[name] for name in FILES if isinstance(values[name], str)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # a convenience: without it the flags name them


def _remember_files(path: Path, settings: DescriptorSettings) -> None:
    files = {
        name: os.path.abspath(file) if (file := getattr(settings, name)) else None for name in FILES
    }
    if any(files.values()):
        with replacing(path / SOURCES) as temporary:
            temporary.write_text(json.dumps(files))


def _opened(path: str) -> Index:
    opened = Index.open(path)
    if not len(opened):
        raise IndexRefused(f"{path} holds no pictures: add some first")
    return opened


def _picture(query: str, box: Box | None) -> RGB:
    if not os.path.isfile(query):
        raise UnreadableImage(
            f"{query} is {'no file' if os.path.exists(query) else 'not there'}: name a picture"
        )
    picture = read_image(Path(query))
    try:
        return picture if box is None else crop(picture, box)
    except ValueError as error:
        raise ValueError(f"{query}: {error}") from None


def _described(settings: DescriptorSettings, names: list[str], pictures: list[RGB]) -> np.ndarray:
    vectors = list(make_extractor(settings)(pictures))
    for name, vector in zip(names, vectors, strict=True):
        if isinstance(vector, UnreadableImage):
            raise UnreadableImage(f"{name}: {vector}")
    return np.stack(vectors)


def _query_vectors(opened: Index, queries: list[Query], settings: DescriptorSettings) -> np.ndarray:
    """Of whole pictures that are in the index, what is stored there; of others, what is
    extracted.
    """
    ids = {opened.root / path: i for i, path in enumerate(opened.paths)}
    stored = {
        number: ids[query.path]
        for number, query in enumerate(queries)
        if query.box is None and query.path in ids
    }
    vectors = np.empty((len(queries), opened.dim), np.float32)
    vectors[list(stored)] = opened.vectors().take(np.array(list(stored.values()), int))
    others = [number for number in range(len(queries)) if number not in stored]
    if others:
        pictures = [_picture(str(queries[number].path), queries[number].box) for number in others]
        vectors[others] = _described(
            settings, [str(queries[number].path) for number in others], pictures
        )
    return vectors


Arrays = tuple[np.ndarray, np.ndarray]  # scores and ids, (q, k)


def _ranked(method: Method, queries: Any, database: Any, *, depth: int) -> tuple[Arrays, Arrays]:
    """Scores and ids of a search, and those after reranking."""
    keep_compiled_programs()
    from ggem_jax import retrieval

    before = retrieval.search(queries, database, k=min(depth, database.shape[0]))
    return _arrays(before), _arrays(reranked(method, queries, database, before))


def _reranked_file(
    file: str, method: Method, queries: np.ndarray, database: Any
) -> tuple[Arrays, Arrays]:
    keep_compiled_programs()
    from ggem_jax.retrieval.vectors import Ranking, checked_ranking, taken

    given, ids = read_ranking(file)
    known = np.zeros(ids.shape, np.float32) if given is None else given
    checked_ranking(Ranking(known, ids), queries, database)  # type: ignore[arg-type]
    if given is None:
        with np.errstate(over="ignore", invalid="ignore"):
            known = np.stack(
                [
                    taken(database, own, len(query)).astype(np.float32) @ query
                    for query, own in zip(queries, ids, strict=True)
                ]
            )
    before = Ranking(known, ids)  # type: ignore[arg-type]
    return _arrays(before), _arrays(reranked(method, queries, database, before))


def _arrays(ranking: Any) -> Arrays:
    scores = np.asarray(ranking.scores)
    if not np.isfinite(scores).all():
        raise ValueError(
            "scores come out that are not finite: the vectors, --beta or --alpha are too large"
        )
    return scores, np.asarray(ranking.ids)


def _hits(paths: list[str], before: Arrays, after: Arrays, row: int, k: int) -> list[Hit]:
    first = {int(own): rank for rank, own in enumerate(before[1][row])}
    hits = []
    for rank, (score, own) in enumerate(zip(after[0][row, :k], after[1][row, :k], strict=True)):
        was = first.get(int(own))
        hits.append(
            Hit(
                paths[own],
                rank + 1,
                float(score),
                None if was is None else was + 1,
                None if was is None else float(before[0][row, was]),
            )
        )
    return hits


def _measured(
    ids: np.ndarray, relevance: list[Relevance], at: tuple[int, ...]
) -> dict[str, float | None]:
    found = scores(ids, relevance, kappas=at)
    recall = recall_at(ids, relevance, kappas=at)[[len(each.positive) > 0 for each in relevance]]
    values = {"mAP": found.mean_average_precision} | {
        f"mP@{k}": value for k, value in found.mean_precision_at.items()
    }
    values |= {
        f"recall@{k}": float(recall[:, i].mean()) if len(recall) else math.nan
        for i, k in enumerate(at)
    }
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _spoken(name: str, value: Any) -> str:
    return f"{name} {('off', 'on')[value] if isinstance(value, bool) else value}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _check_output(file: str, endings: tuple[str, ...], inputs: Iterable[str | None]) -> None:
    """What is told before hours of work are done."""
    path = Path(file)
    if path.suffix.lower() not in endings:
        raise Usage(f"{file} must end with {' or '.join(endings)}")
    if not path.parent.is_dir() or path.is_dir():
        raise Usage(
            f"{file} cannot be written:"
            f" {f'{path.parent} is no folder' if not path.is_dir() else 'it is a folder'}"
        )
    for name in inputs:
        if (
            name is not None
            and path.exists()
            and os.path.exists(name)
            and os.path.samefile(path, name)
        ):
            raise Usage(f"{file} is read by this very command: write to another file")


def _told(path: str, report: Report) -> int:
    for skipped in report.skipped:
        sys.stderr.write(f"skipped: {skipped.why}\n")
    counts = {
        name: getattr(report, name)
        for name in ("added", "updated", "unchanged", "reused", "removed")
    } | {"skipped": len(report.skipped)}
    print(f"{path}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    return 0


def _print_json(values: Any) -> int:
    print(json.dumps(values, indent=1))
    return 0


def _print_answer(answer: Answer, root: Path, method: Method) -> None:
    print(f"{shown(answer.query)}: the first {len(answer.hits)} under {shown(str(root))}")
    with_before = method.name != "none"
    print(
        f"{'rank':>5}   {'score':>7}   {'before':>6}   {'score':>7}   path"
        if with_before
        else f"{'rank':>5}   {'score':>7}   path"
    )
    for hit in answer.hits:
        first = (
            f"{hit.rank_before or '-':>6}  "
            f" {'-' if hit.score_before is None else f'{hit.score_before:.4f}':>7}   "
            if with_before
            else ""
        )
        print(f"{hit.rank:>5}   {hit.score:>7.4f}   {first}{shown(hit.path)}")


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "index": index,
    "search": search,
    "add": add,
    "remove": remove,
    "info": info,
    "verify": verify,
    "rerank": rerank,
    "evaluate": evaluate,
    "whiten": whiten,
}
