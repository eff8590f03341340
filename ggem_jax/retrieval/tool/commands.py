"""The commands: each makes one library call, whose record is printed or written to files.

The keyword arguments come from `ggem_jax.retrieval.tool.flags`; the return value is the exit code.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ggem_jax.descriptors.settings import DescriptorSettings
from ggem_jax.retrieval import index as indexes
from ggem_jax.retrieval.index import Duplicates, Evaluation, Index, Report, Results
from ggem_jax.retrieval.index.damage import some
from ggem_jax.retrieval.index.describing import SurplusFile
from ggem_jax.retrieval.index.folder import shown
from ggem_jax.retrieval.index.report import COUNTS
from ggem_jax.retrieval.methods import Method
from ggem_jax.retrieval.rerank_files import rerank_files
from ggem_jax.retrieval.tool.compilation import keep_compiled_programs
from ggem_jax.retrieval.tool.flags import Usage
from ggem_jax.retrieval.tool.progress import progress
from ggem_jax.retrieval.tool.sheet import (
    Answer,
    Hit,
    format_bytes,
    write_duplicates_sheet,
    write_sheet,
)


def run(command: str, **options: Any) -> int:
    """Runs a command by its name and returns the exit code.

    Args:
        command: One of `COMMANDS`.
        **options: Keyword arguments of the command.

    Raises:
        Usage: A file was given that the index was made without.
    """
    try:
        return COMMANDS[command](**options)
    except SurplusFile as error:
        raise Usage(str(error)) from None


def index(*, photos: str, output: str, as_json: bool, **options: Any) -> int:
    """Builds an index or brings one up to date, and prints the report.

    Args:
        photos: Folder of the images.
        output: Folder of the index.
        as_json: Whether the report is printed as JSON.
        **options: The `settings`, and keyword arguments of `build_index`.

    Returns:
        The exit code 0.
    """
    settings: DescriptorSettings = options.pop("settings")
    keep_compiled_programs()
    with progress() as on_progress:
        report = indexes.build_index(photos, output, settings, on_progress=on_progress, **options)
    return _print_report(output, report, as_json)


def add(*, index: str, photos: str | None, as_json: bool, **options: Any) -> int:
    """Adds images that are new or have changed, and prints the report.

    Args:
        index: Folder of the index.
        photos: A folder inside its root; None takes the root itself.
        as_json: Whether the report is printed as JSON.
        **options: Keyword arguments of `add_images`.

    Returns:
        The exit code 0.
    """
    keep_compiled_programs()
    with progress() as on_progress:
        report = indexes.add_images(index, photos, on_progress=on_progress, **options)
    return _print_report(index, report, as_json)


def remove(*, index: str, patterns: Sequence[str], exclude: bool, as_json: bool) -> int:
    """Removes entries from an index, and prints the report.

    Args:
        index: Folder of the index.
        patterns: Paths, folders or globs, as `ggem_jax.retrieval.index.remove` takes them.
        exclude: Whether later calls leave these images out.
        as_json: Whether the report is printed as JSON.

    Returns:
        The exit code 0.
    """
    return _print_report(index, indexes.remove(index, patterns, exclude=exclude), as_json)


def info(*, index: str, as_json: bool) -> int:
    """Prints what an index holds and how it was made.

    Args:
        index: Folder of the index.
        as_json: Whether the facts are printed as JSON, else one on each line.

    Returns:
        The exit code 0.
    """
    facts = indexes.info(index)
    if as_json:
        return _print_json(facts)
    settings, versions = facts.pop("settings"), facts.pop("versions")
    flat = facts | {f"settings.{name}": value for name, value in settings.items()}
    flat["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    for name, fact in flat.items():
        print(f"{name:<22} {shown(fact) if isinstance(fact, str) else json.dumps(fact)}")
    return 0


def verify(*, index: str, deep: bool, as_json: bool) -> int:
    """Prints the damage of an index.

    Args:
        index: Folder of the index.
        deep: Whether every image is read too.
        as_json: Whether the verdict is printed as JSON.

    Returns:
        The exit code: 1 if the index is damaged, else 0.
    """
    verdict = indexes.verify(index, deep=deep)
    if as_json:
        _print_json(verdict.record())
    else:
        for kind, sentences in (("damage", verdict.damage), ("note", verdict.notes)):
            for sentence in sentences:
                print(f"{kind}: {sentence}")
        print(f"{index} is {'damaged' if verdict.damage else 'sound'}")
    return 1 if verdict.damage else 0


def search(
    *,
    index: str,
    queries: Sequence[str],
    words: Sequence[str],
    box: list,
    as_json: bool,
    html: str | None,
    **options: Any,
) -> int:
    """Searches an index by image or by words, prints the results and writes them as a page.

    Args:
        index: Folder of the index.
        queries: Paths of the images; empty for a search by words.
        words: Queries as `search_by_words` takes them; empty for a search by image.
        box: The box of each query, x1, y1, x2, y2 in pixels; empty for whole images.
        as_json: Whether the results are printed as JSON, else as tables.
        html: File of the page; None writes none.
        **options: The reranking `method`, and keyword arguments of `Index.search`.

    Returns:
        The exit code 0.
    """
    keep_compiled_programs()
    opened, options["rerank"] = Index.open(index), options.pop("method")
    if words:
        del options["whitening"]
        results = indexes.search_by_words(opened, words, **options)
    else:
        # a file may have changed since it was indexed
        results = opened.search(list(queries), boxes=box or None, use_stored=False, **options)
    if html:
        _write_html(html, results)
    if as_json:
        return _print_json(results.record())
    for answer in _answers(results):
        _print_answer(answer, results.root, results.method)
    return 0


def rerank(*, queries: str, database: str, output: str, as_json: bool, **options: Any) -> int:
    """Reranks vectors in files, writes the ranking and prints its size.

    A note on standard error says if the queries are not of length 1.

    Args:
        queries: File of the queries, as `rerank_files` takes it.
        database: File of the database, likewise.
        output: File of the ranking.
        as_json: Whether the record is printed as JSON.
        **options: The `method`, and keyword arguments of `rerank_files`.

    Returns:
        The exit code 0.
    """
    keep_compiled_programs()
    found = rerank_files(queries, database, output, rerank=options.pop("method"), **options)
    if not found.unit_length:
        sys.stderr.write(
            f"note: the vectors of {queries} are not of length 1; --normalize makes all vectors so"
            "\n"
        )
    if as_json:
        return _print_json(found.record())
    print(f"{output}: {found.ids.shape[0]} queries, {found.ids.shape[1]} results each")
    return 0


def evaluate(*, index: str, truth: str, as_json: bool, **options: Any) -> int:
    """Prints the quality of an index against ground truth, before and after reranking.

    Args:
        index: Folder of the index.
        truth: CSV file of the ground truth.
        as_json: Whether the values are printed as JSON, else as a table.
        **options: The reranking `method`, and keyword arguments of `Index.evaluate`.

    Returns:
        The exit code 0.
    """
    keep_compiled_programs()
    found = Index.open(index).evaluate(truth, rerank=options.pop("method"), **options)
    if as_json:
        return _print_json(found.record())
    _print_evaluation(found)
    return 0


def whiten(*, index: str, output: str, dim: int | None, as_json: bool) -> int:
    """Learns whitening from the vectors of an index, writes it and prints its size.

    Args:
        index: Folder of the index.
        output: `.npz` file of the whitening.
        dim: Components to keep; None keeps all.
        as_json: Whether the record is printed as JSON.

    Returns:
        The exit code 0.
    """
    found = indexes.whiten_index(index, output, dim=dim)
    if as_json:
        return _print_json(found.record())
    print(
        f"{output}: from {found.dim_before} to {found.dim} numbers, learned from"
        f" {found.learned_from} of {found.images} images"
    )
    return 0


def push(*, index: str, store: str, collection: str | None, as_json: bool) -> int:
    """Brings a collection of a vector database in line with an index, and prints the numbers.

    Args:
        index: Folder of the index.
        store: Address of the database.
        collection: Name of the collection; None takes that of the index's folder.
        as_json: Whether the record is printed as JSON.

    Returns:
        The exit code 0.
    """
    with progress() as on_progress:
        found = indexes.push(index, store, collection=collection, on_progress=on_progress)
    if as_json:
        return _print_json(found.record())
    print(
        f"{found.collection} in {store}: {found.added} added, {found.unchanged} unchanged,"
        f" {found.removed} removed"
    )
    return 0


def merge(*, output: str, parts: Sequence[str], as_json: bool) -> int:
    """Joins the parts of a folder into one index, and prints its size.

    Args:
        output: Folder of the new index.
        parts: Folders of all parts.
        as_json: Whether the record is printed as JSON.

    Returns:
        The exit code 0.
    """
    found = indexes.merge(output, parts)
    if as_json:
        return _print_json(found.record())
    print(f"{output}: {found.images} images of {found.parts} parts")
    return 0


def duplicates(*, index: str, threshold: float, as_json: bool, html: str | None) -> int:
    """Prints the near duplicates of an index, and writes them as a page.

    Args:
        index: Folder of the index.
        threshold: Least cosine of a pair.
        as_json: Whether the groups are printed as JSON, else as tables.
        html: File of the page; None writes none.

    Returns:
        The exit code 0.
    """
    found = indexes.find_duplicates(index, threshold=threshold)
    if html:
        facts = _facts_of(found.folder, found.root, found.size) | {
            "duplicates": _count_duplicates(found)
        }
        write_duplicates_sheet(Path(html), found, facts=facts)
    if as_json:
        return _print_json(found.record())
    print(f"{index}: {_count_duplicates(found)}")
    for group in found.groups:
        print(f"{'width':>7} x {'height':<6}   {'size':>9}   {'score':>7}   path")
        for each in group:
            file = each.file
            print(
                f"{file.width:>7} x {file.height:<6}   {format_bytes(file.bytes):>9}"
                f"   {each.score:>7.4f}   {shown(file.path)}"
            )
    return 0


def serve(*, index: str, **options: Any) -> int:
    """Serves the page of an index, and prints its address, until Ctrl-C.

    Args:
        index: Folder of the index.
        **options: Keyword arguments of `ggem_jax.retrieval.page.serve`.

    Returns:
        The exit code 0.
    """
    from ggem_jax.retrieval.page import serve as serve_page

    def print_address(url: str, images: int) -> None:
        print(f"{index}: {images} images at {url} (Ctrl-C ends)", flush=True)

    keep_compiled_programs()
    with contextlib.suppress(KeyboardInterrupt):  # the usual end
        serve_page(index, on_start=print_address, **options)
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "index": index,
    "search": search,
    "add": add,
    "remove": remove,
    "info": info,
    "verify": verify,
    "rerank": rerank,
    "evaluate": evaluate,
    "whiten": whiten,
    "push": push,
    "merge": merge,
    "duplicates": duplicates,
    "serve": serve,
}


def _print_report(path: str, report: Report, as_json: bool) -> int:
    for note in report.notes:
        sys.stderr.write(f"note: {note}\n")
    for skipped in report.skipped:
        sys.stderr.write(f"skipped: {skipped.why}\n")
    if as_json:
        return _print_json(report.record())
    counts = {name: getattr(report, name) for name in COUNTS} | {"skipped": len(report.skipped)}
    print(f"{path}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    for name, kinds in (("not images", report.not_images), ("excluded", report.excluded)):
        if kinds:
            largest = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
            told = ", ".join(f"{shown(kind) or 'no ending'} {count}" for kind, count in largest)
            print(f"{name}: {sum(kinds.values())} files ({told})")
    if report.special:
        print(f"links, pipes and devices: {report.special}")
    if report.unreachable:
        print(f"not reachable now: {some(report.unreachable)}; kept until --prune")
    return 0


def _print_json(values: Any) -> int:
    print(json.dumps(values, indent=1))
    return 0


def _answers(results: Results) -> list[Answer]:
    return [
        Answer(each["query"], each["box"], [Hit(**hit) for hit in each["results"]])
        for each in results.record()["queries"]
    ]


def _write_html(file: str, results: Results) -> None:
    settings = [
        f"{name} {('off', 'on')[value] if isinstance(value, bool) else value}"
        for name, value in results.settings.items()
        if value is not None
    ]
    facts = _facts_of(results.folder, results.root, results.size) | {
        "reranking": str(results.method),
        "descriptor": ", ".join(settings),
    }
    reranks = results.method.name != "none"
    write_sheet(Path(file), _answers(results), root=results.root, reranked=reranks, facts=facts)


def _facts_of(folder: Path, root: Path, size: int) -> dict[str, str]:
    return {
        "index": str(folder.absolute()),
        "images": f"{size} under {root}",
        "date": datetime.now().astimezone().isoformat(" ", "minutes"),
    }


def _count_duplicates(found: Duplicates) -> str:
    if not found.groups:
        return f"no images with cosines of {found.threshold:g} or more"
    surplus = sum(each.file.bytes for each in found.surplus)
    return (
        f"{len(found.groups)} group{'s' * (len(found.groups) != 1)} of images with cosines of"
        f" {found.threshold:g} or more; all but the first of each:"
        f" {len(found.surplus)} image{'s' * (len(found.surplus) != 1)}, {format_bytes(surplus)}"
    )


def _print_answer(answer: Answer, root: Path, method: Method) -> None:
    print(f"{shown(answer.query)}: the first {len(answer.hits)} under {shown(str(root))}")
    with_before = method.name != "none"
    between = f"{'before':>6}   {'score':>7}   " if with_before else ""
    print(f"{'rank':>5}   {'score':>7}   {between}path")
    for hit in answer.hits:
        if with_before:
            score = "-" if hit.score_before is None else f"{hit.score_before:.4f}"
            between = f"{hit.rank_before or '-':>6}   {score:>7}   "
        print(f"{hit.rank:>5}   {hit.score:>7.4f}   {between}{shown(hit.path)}")


def _print_evaluation(found: Evaluation) -> None:
    columns = {"search": found.before}
    if found.after is not None:
        columns[found.method.name] = found.after
    print(f"{found.queries} queries, {found.size} images, the first {found.depth} results of each")
    print(f"{'':<14}{''.join(f'{name:>12}' for name in columns)}")
    for name in found.before:
        values = [own[name] for own in columns.values()]
        cells = ["-" if value is None else f"{100 * value:.2f} %" for value in values]
        print(f"{name:<14}{''.join(f'{cell:>12}' for cell in cells)}")
