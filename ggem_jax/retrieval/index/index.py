"""An index of images on disk: the path and the vector `(dim,)` of each image under a root folder.

`build`, `add` and `remove` write. If one of them is interrupted, the index opens as it was before
or as it is after. A second writer is refused; readers keep what they opened. `Index.open` reads.

The extractor is an argument: `extract(images)` takes an iterable of images, `(height, width, 3)`
uint8 arrays of any sizes, and returns an iterable of vectors `(dim,)` in the same order. It may
take several images before it gives the first vector; images are decoded in threads meanwhile. An
`UnreadableImage` in place of a vector skips that image. If the extractor has the attribute `fit`, a
function from height and width in pixels to those that it resizes an image to, images are resized
where they are decoded, so that large ones take little memory; with a true attribute `draft`, large
JPEGs are decoded at a fraction of their size first. `settings` is a dictionary of JSON values
that describes how vectors are made: the model, a digest of its weights, the pooling. All vectors of
an index have the same settings. `ggem_jax.retrieval.index.describing` has the same functions with
our own extractor.

Errors are `IndexRefused`, a `ValueError`, with one sentence.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from ggem_jax.files.images import MAX_MEGAPIXELS
from ggem_jax.retrieval.index.agreement import (
    as_json,
    refuse_other_build,
    refuse_other_settings,
)
from ggem_jax.retrieval.index.damage import map_or_refuse
from ggem_jax.retrieval.index.exclusions import as_pattern
from ggem_jax.retrieval.index.folder import shown
from ggem_jax.retrieval.index.locking import locking
from ggem_jax.retrieval.index.publishing import change
from ggem_jax.retrieval.index.reading import facts_of, is_built, reading
from ggem_jax.retrieval.index.report import Extract, OnProgress, Report, Task
from ggem_jax.retrieval.index.store import DTYPES, INDEX, Damaged, Facts, IndexRefused, read_facts
from ggem_jax.retrieval.index.transactions import opening, reporting_failures, transaction
from ggem_jax.retrieval.index.writing import update
from ggem_jax.retrieval.parts import Part

if TYPE_CHECKING:
    from ggem_jax.retrieval.index.evaluation import Evaluation
    from ggem_jax.retrieval.index.search import Box, Query, Results
    from ggem_jax.retrieval.methods import Method


class Vectors:
    """The vectors of an index, `(n, dim)` on disk, read-only, in the order of `Index.paths`."""

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        shard: Int[np.ndarray, " n"],
        row: Int[np.ndarray, " n"],
        dim: int,
        dtype: np.dtype,
    ):
        self._shards, self._shard, self._row = shards, shard, row
        self.shape, self.dtype = (len(row), dim), dtype

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, ids: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m d"]:
        """Returns the vectors of ids in memory, in the dtype of the index.

        Args:
            ids: Rows of the index, whole numbers `(m,)` from 0 to n - 1.

        Returns:
            The vectors, `(m, dim)`.

        Raises:
            IndexRefused: The ids are not whole numbers `(m,)`, or do not exist.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
            raise IndexRefused(
                f"ids must be whole numbers (m,), not {ids.dtype} of shape {ids.shape}"
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexRefused(
                f"ids must be from 0 to {len(self) - 1}, not from {ids.min()} to {ids.max()}"
            )
        shard, row = self._shard[ids.astype(np.intp)], self._row[ids.astype(np.intp)]
        taken = np.empty((ids.size, self.shape[1]), self.dtype)
        for number in np.unique(shard):
            here = shard == number
            taken[here] = self._shards[number][row[here]]
        return taken

    def blocks(self, rows: int) -> Iterator[tuple[int, Float[np.ndarray, "m d"]]]:
        """Yields all vectors in blocks: the id of the first, and the vectors `(rows, dim)`.

        Vectors that are adjacent on disk are mapped, others copied.

        Args:
            rows: Vectors in a block, at least 1; the last block may have fewer.

        Raises:
            IndexRefused: `rows` is below 1.
        """
        if rows < 1:
            raise IndexRefused(f"a block must have at least one row, not {rows}")
        for start in range(0, len(self), rows):
            shard, row = self._shard[start : start + rows], self._row[start : start + rows]
            together = (shard == shard[0]).all() and (np.diff(row) == 1).all()
            yield (
                start,
                (
                    self._shards[shard[0]][row[0] : row[-1] + 1]
                    if together
                    else self.take(np.arange(start, start + len(row)))
                ),
            )


@dataclass(frozen=True)
class Index:
    """An index as it was when it was opened.

    Id i is the image `root / paths[i]` and row i of `vectors()`. Adding and changing images keeps
    the order of the ids; removing images closes the gaps.
    """

    folder: Path  # folder of the index
    root: Path  # folder of the images
    paths: list[str]  # paths of the n images, relative to the root
    settings: dict[str, Any]  # JSON values that describe how vectors are made
    dim: int  # dimension of a vector
    dtype: str  # dtype of the vectors on disk, float16 or float32
    _vectors: Vectors = field(repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def vectors(self) -> Vectors:
        """Returns the vectors `(n, dim)`, which stay on disk."""
        return self._vectors

    def search(
        self,
        queries: "Query | Sequence[Query] | Float[np.ndarray, 'q d']",
        k: int = 10,
        *,
        rerank: "Method | str | None" = None,
        boxes: "Sequence[Box | None] | None" = None,
        weights: str | None = None,
        whitening: str | None = None,
        use_stored: bool = True,
        store: str | None = None,
        collection: str | None = None,
    ) -> "Results":
        """Returns the k images that are most like each query, best first.

        Args:
            queries: One image or several (paths, `(h, w, 3)` uint8 arrays, PIL images), or vectors
                `(q, d)` of floating point.
            k: Results of each query; the size of the index if it is larger.
            rerank: Name of a reranker of `ggem_jax.retrieval.methods` with its defaults, such as
                "superglobal", or a `Method` with options of its own; None reranks nothing.
            boxes: For each image the part that is searched for, x1, y1, x2, y2 in pixels, or None;
                None takes all images whole.
            weights, whitening: Where the files that the index was made with are now; None takes
                their old places.
            use_stored: Whether a whole image whose path is in the index takes its stored vector.
                If not, it is described again, as the file may have changed.
            store: Address of a vector database that finds the candidates, which
                `ggem_jax.retrieval.index.push` filled; None searches the index itself.
            collection: Name of the collection there, as in `push`.

        Returns:
            Paths, scores and ranks `(q, k)`, and scores and ranks before reranking.

        Raises:
            IndexRefused: The index is empty, or its files of weights are not there.
            UnreadableImage: A query holds no image, or one that cannot be described.
            ValueError: The queries, k or the options do not fit.

        Example:
            >>> import numpy as np, tempfile
            >>> from PIL import Image
            >>> from ggem_jax.retrieval.index.index import Index, build
            >>> folder = tempfile.mkdtemp()
            >>> for red in (0, 100, 200):
            ...     Image.new("RGB", (8, 8), (red, 99, 9)).save(f"{folder}/{red}.png")
            >>> def mean_colour(images):
            ...     for image in images:
            ...         yield image.mean((0, 1)) / np.linalg.norm(image.mean((0, 1)))
            >>> report = build(folder, f"{folder}/my.index", mean_colour, {"model": "mean colour"})
            >>> vector = np.array([[200.0, 99, 9]]) / np.linalg.norm([200, 99, 9])
            >>> Index.open(f"{folder}/my.index").search(vector, k=2).paths.tolist()
            [['200.png', '100.png']]
        """
        from ggem_jax.retrieval.index.search import search_index

        return search_index(
            self,
            queries,
            k,
            rerank=rerank,
            boxes=boxes,
            weights=weights,
            whitening=whitening,
            use_stored=use_stored,
            store=store,
            collection=collection,
        )

    def evaluate(
        self,
        truth: str | Path,
        *,
        root: str | Path | None = None,
        k: int = 10_000,
        at: Sequence[int] = (1, 5, 10),
        rerank: "Method | str | None" = "superglobal",
        weights: str | None = None,
        whitening: str | None = None,
    ) -> "Evaluation":
        """Returns mAP, mP@k and recall@k against ground truth, before and after reranking.

        Args:
            truth: CSV file as `ggem_jax.retrieval.truth` reads it. Queries that are whole images
                of the index take the stored vector.
            root: Folder that its paths are relative to; None takes the folder of the file.
            k: Results of each query that count; the size of the index if it is larger.
            at: Ranks at which precision and recall are measured, at least 1.
            rerank, weights, whitening: As in `search`.

        Raises:
            IndexRefused: The index is empty, or its files of weights are not there.
            UnreadableImage: A query holds no image, or one that cannot be described.
            ValueError: The file cannot be read or names an image that is not in the index, or an
                argument does not fit.
        """
        from ggem_jax.retrieval.index.evaluation import evaluate_index

        return evaluate_index(
            self,
            truth,
            root=root,
            k=k,
            at=at,
            rerank=rerank,
            weights=weights,
            whitening=whitening,
        )

    @classmethod
    def open(cls, path: Path | str, settings: dict[str, Any] | None = None) -> "Index":
        """Returns an index opened for reading, without a lock.

        Args:
            path: Folder of an index, as `build` or `build_index` writes it.
            settings: JSON values that the index must have been made with; None accepts any.

        Raises:
            IndexRefused: The folder holds no index, a damaged one, or one of a newer version or of
                other settings.
        """
        folder, before = Path(path), None
        while True:
            with reading(folder) as database:
                facts = read_facts(database, folder / INDEX)
                if settings is not None:
                    refuse_other_settings(folder, facts.settings, settings)
                rows = database.execute(
                    "SELECT path, shard, row FROM images ORDER BY id"
                ).fetchall()
                numbers = {shard: number for number, shard in enumerate(facts.shards)}
                names, of_shard, of_row = zip(*rows, strict=True) if rows else ((), (), ())
                paths = list(map(os.fsdecode, names))
                shard, row = (
                    np.array([numbers[shard] for shard in of_shard], np.int32),
                    np.array(of_row, np.int32),
                )
                if (
                    len(rows) != facts.count
                    or (row < 0).any()
                    or (row >= np.array([*facts.shards.values(), 0])[shard]).any()
                ):
                    raise ValueError("its entries have been altered")
            try:
                shards = [map_or_refuse(folder, shard, facts) for shard in facts.shards]
            except Damaged:
                if facts == before:
                    raise
                before = facts  # a writer may have changed the index between the two readings
                continue
            vectors = Vectors(shards, shard, row, facts.dim, np.dtype(facts.dtype))
            return cls(
                folder, Path(facts.root), paths, facts.settings, facts.dim, facts.dtype, vectors
            )


def build(
    folder: Path | str,
    path: Path | str,
    extract: Extract,
    settings: dict[str, Any],
    *,
    dtype: str = "float16",
    shard: str | None = None,
    prune: bool = False,
    deep: bool = False,
    exclude: Iterable[str] = (),
    include: Iterable[str] = (),
    max_megapixels: float = MAX_MEGAPIXELS,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Builds an index of all images in a folder tree, or brings an existing one up to date.

    The index appears once the build is complete. After an interruption the same call resumes, and
    extracts at most the last `COMMIT_ROWS` images or `COMMIT_SECONDS` again. An existing index is
    brought up to date as by `add`.

    Args:
        folder: Folder of the images.
        path: Folder of the index. Anything else at this path is refused, never overwritten.
        extract: Function from images to vectors, as in the module's docstring.
        settings: JSON values that describe how vectors are made.
        dtype: Dtype of the vectors on disk, "float16" or "float32".
        shard: "I/N" indexes the I-th of N parts of the folder, for `merge`; None indexes all of it.
        prune, deep: As in `add`.
        exclude: Patterns of files and folders that are left out, besides those that the index has
            and the defaults of `ggem_jax.retrieval.index.exclusions`. The index keeps them.
        include: Patterns that are no longer left out. The index keeps these too.
        max_megapixels: Larger images are skipped.
        workers: Threads that read images; None takes one for each core, at most 4.
        on_progress: Function that is called with the numbers of images done and of all images.

    Returns:
        Numbers of images that were added, updated, removed, left unchanged and reused, and the
        skipped files.

    Raises:
        IndexRefused: The folder holds no images, `path` is something else or an index of other
            settings, another process writes to it, or the vectors do not fit.
        ValueError: `workers` or `max_megapixels` is out of range.
    """
    if dtype not in DTYPES:
        raise IndexRefused(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    part = Part.parse(shard)
    wanted = Facts(
        as_json(settings), dtype, str(_existing(folder)), part=None if part is None else str(part)
    )
    with locking(Path(path), new=True):
        if is_built(Path(path)):
            there = facts_of(Path(path))
            refuse_other_build(Path(path), there, wanted)
            wanted = there
        wanted = _excluding(wanted, exclude, include)
        task = Task(prune=prune, deep=deep, max_megapixels=max_megapixels, workers=workers)
        return update(Path(path), wanted, extract, task, on_progress)


def add(
    path: Path | str,
    extract: Extract,
    settings: dict[str, Any],
    *,
    folder: Path | str | None = None,
    root: Path | str | None = None,
    prune: bool = False,
    repair: bool = False,
    deep: bool = False,
    exclude: Iterable[str] = (),
    include: Iterable[str] = (),
    max_megapixels: float = MAX_MEGAPIXELS,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Adds images that are new or have changed.

    A file whose size, mtime, ctime and inode are as before counts as unchanged. The content of
    other files is compared: known contents, moved or copied, are not extracted again. An image that
    has become unreadable keeps its entry, and so does one that is not there, as its disk may not
    be. Entries of files that are excluded are dropped. After an interruption the next call resumes,
    as in `build`.

    Args:
        path: Folder of the index.
        extract: Function from images to vectors, as in the module's docstring.
        settings: JSON values that the index was made with.
        folder: A folder inside the root; None takes the root itself.
        root: Folder that the images have been moved to; None takes the one in the index.
        prune: Whether entries whose files are gone are dropped.
        repair: Whether images whose entries or vectors are damaged are extracted again.
        deep: Whether the content of every file is compared.
        exclude, include, max_megapixels, workers, on_progress: As in `build`.

    Returns:
        Numbers of images that were added, updated, removed, left unchanged and reused, and the
        skipped files.

    Raises:
        IndexRefused: There is no index, it is damaged, or it was made with other settings.
        ValueError: `workers` or `max_megapixels` is out of range.
    """
    path = Path(path)
    with locking(path):
        facts = facts_of(path)
        refuse_other_settings(path, facts.settings, settings)
        if root is None and not os.path.isdir(facts.root):
            raise IndexRefused(
                f"{facts.root}, where the images of the index were, is not a folder now: mount its"
                " disk, or name with --root the folder that they have been moved to"
            )
        wanted = replace(facts, root=str(_existing(facts.root if root is None else root)))
        wanted = _excluding(wanted, exclude, include)
        if repair and folder is not None:
            raise IndexRefused("repair concerns the whole index: leave out the sub-folder")
        start = "" if folder is None else _below(wanted.root, _existing(folder))
        task = Task(start, prune, repair, deep, max_megapixels, workers)
        return update(path, wanted, extract, task, on_progress)


def remove(path: Path | str, patterns: Iterable[str], *, exclude: bool = True) -> Report:
    """Removes entries; the images stay.

    Args:
        path: Folder of the index.
        patterns: Paths, folders or globs (`*` crosses folders), relative to the root or absolute.
        exclude: Whether the index keeps the patterns, so that later calls leave these images out
            until one includes the same pattern; if not, `add` finds them again. Patterns of the
            whole index are not kept.

    Returns:
        Numbers of entries that were removed and left unchanged.

    Raises:
        IndexRefused: A pattern matches nothing, or there is no index; nothing is removed.
    """
    path, removed, kept = Path(path), dict[str, None](), list[str]()
    with locking(path):
        with reading(path) as database:
            facts = read_facts(database, path / INDEX)
            paths = [
                os.fsdecode(name)
                for (name,) in database.execute("SELECT path FROM images ORDER BY id")
            ]
        for pattern in patterns:
            if not pattern:
                raise IndexRefused("a pattern must not be empty: '.' is the whole index")
            own = (
                _below(facts.root, Path(pattern))
                if os.path.isabs(pattern)
                else os.path.normpath(pattern)
            )
            whole = {name for name in paths if own in (name, ".", "") or name.startswith(f"{own}/")}
            matching = [
                name for name in paths if (name in whole if whole else fnmatchcase(name, own))
            ]
            if not matching:
                raise IndexRefused(
                    f"{shown(pattern)} matches no image of {path} (paths are relative to"
                    f" {facts.root}): nothing was removed"
                )
            removed |= dict.fromkeys(matching)
            if exclude and own not in (".", "", "*"):
                kept.append(as_pattern(own) if whole else f"/{own}")
        facts = replace(facts, exclusions=facts.exclusions.change(exclude=kept))
        with opening(path) as database, reporting_failures(path), transaction(database):
            change(database, path, facts, dropped=map(os.fsencode, removed))
    return Report(removed=len(removed), unchanged=len(paths) - len(removed))


def info(path: Path | str) -> dict[str, Any]:
    """Returns what an index holds and how it was made, as JSON values.

    Args:
        path: Folder of an index, as `build` or `build_index` writes it.

    Returns:
        By name: `path` of the index and `root` of its images, the numbers of images (`images`),
        of stored `vectors` and of those without an image (`unused_vectors`), `dim`, `dtype`, the
        number of `shards`, `vector_bytes` on disk, the patterns of `exclude` and `include`,
        `settings`, `versions` of the libraries, and `shard`: the part of the folder, or None for
        all of it.

    Raises:
        IndexRefused: There is no index, it is damaged, or of a newer version.
    """
    folder = Path(path)
    with reading(folder) as database:
        facts = read_facts(database, folder / INDEX)
        live = database.execute(
            "SELECT COUNT(*) FROM (SELECT DISTINCT shard, row FROM images)"
        ).fetchone()[0]
    rows = sum(facts.shards.values())
    return {
        "path": str(folder.absolute()),
        "root": facts.root,
        "images": facts.count,
        "dim": facts.dim,
        "dtype": facts.dtype,
        "shards": len(facts.shards),
        "vectors": rows,
        "unused_vectors": rows - live,
        "vector_bytes": rows * facts.row_bytes(),
        "exclude": list(facts.exclusions.exclude),
        "include": list(facts.exclusions.include),
        "settings": facts.settings,
        "versions": facts.versions,
        "shard": facts.part,
    }


def _excluding(facts: Facts, exclude: Iterable[str], include: Iterable[str]) -> Facts:
    """The facts with further exclusions; patterns that are absolute paths become relative."""
    lists = [list[str](), list[str]()]
    for patterns, own in zip((exclude, include), lists, strict=True):
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            inside = f"{pattern}/".startswith(f"{facts.root.rstrip('/')}/")
            relative = f"/{os.path.relpath(pattern, facts.root)}" if inside else pattern
            if relative.startswith("./"):
                relative = relative[1:]  # the path below the root
            if not relative.strip("/") or relative in (".", "/."):
                raise IndexRefused(
                    f"the pattern {pattern!r} would be the whole folder: name a part of it"
                )
            if {".", ".."}.intersection(relative.split("/")):
                raise IndexRefused(
                    f"the pattern {pattern!r} would match nothing: write it without . and .."
                )
            own.append(relative)
    return replace(facts, exclusions=facts.exclusions.change(*lists))


def _existing(folder: Path | str) -> Path:
    if not os.path.isdir(folder):
        raise IndexRefused(f"{folder} is not a folder: name the one that holds the images")
    return Path(os.path.abspath(folder))


def _below(root: str, path: Path) -> str:
    relative = os.path.relpath(path, root)
    if relative == ".." or relative.startswith("../"):
        raise IndexRefused(
            f"{path} is not inside {root}, the root folder of the index: move it there, or build an"
            " index of its own"
        )
    return "" if relative == "." else relative
