"""Indexes whose vectors are the descriptors of `DescriptorSettings`: build, add, whiten.

The network is loaded when the first image has to be described, not before.
"""

import contextlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from ggem_jax.descriptors.settings import DescriptorSettings, digest, weights_as_file
from ggem_jax.descriptors.whitening import learn_whitening, save_whitening
from ggem_jax.files.atomic import replacing
from ggem_jax.files.images import MAX_MEGAPIXELS, RGB, UnreadableImage
from ggem_jax.retrieval.index import index as indexes
from ggem_jax.retrieval.index.reading import facts_of, is_built
from ggem_jax.retrieval.index.report import OnProgress, Report
from ggem_jax.retrieval.index.store import IndexRefused

if TYPE_CHECKING:
    from ggem_jax.descriptors.extract import Extractor

SOURCES = "sources.json"  # file in an index: where its files of weights and of a whitening were
NETWORK = "network.safetensors"  # file in an index: the network of the training run of the build
FILES = ("weights", "whitening")

_LEARNED_BYTES = 2**30  # most bytes of vectors, in float64, that a whitening is learned from


class SurplusFile(IndexRefused):
    """A file was given that the index was made without."""


@dataclass(frozen=True)
class LearnedWhitening:
    """The whitening that `whiten_index` wrote."""

    file: str  # path of the `.npz` file
    dim_before: int  # dimension of the vectors of the index
    dim: int  # dimension after whitening
    learned_from: int  # number of vectors used
    images: int  # number of images in the index

    def record(self) -> dict[str, Any]:
        """Returns JSON values."""
        return asdict(self)


def build_index(
    folder: Path | str,
    path: Path | str,
    settings: DescriptorSettings | None = None,
    *,
    dtype: str = "float16",
    shard: str | None = None,
    prune: bool = False,
    deep: bool = False,
    exclude: Iterable[str] = (),
    include: Iterable[str] = (),
    max_megapixels: float = MAX_MEGAPIXELS,
    batch: int | None = None,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Builds an index of all images in a folder tree, or brings an existing one up to date.

    The index appears when the build is complete. After an interruption the same call resumes.

    Args:
        folder: Folder of the images.
        path: Folder of the index. Anything else at this path is refused, never overwritten.
        settings: How an image becomes a vector; None takes the defaults. The network of a training
            run is copied into the index, so that a search describes images as the build did.
        dtype: Dtype of the vectors on disk, "float16" or "float32".
        shard: "I/N" indexes the I-th of N parts of the folder, for `merge`; None indexes all of it.
        prune: Whether entries whose files are gone are dropped. If not, they are reported as
            unreachable.
        deep: Whether the content of every file is compared, also where size, times and inode are as
            before.
        exclude: Patterns of files and folders that are left out, besides those that the index has
            and the defaults of `ggem_jax.retrieval.index.exclusions`. The index keeps them.
        include: Patterns that are no longer left out. The index keeps these too.
        max_megapixels: Larger images are skipped.
        batch: Images that go through the network together; None takes 1 on a CPU, else 16.
        workers: Threads that read images; None takes one for each core, at most 4.
        on_progress: Function that is called with the numbers of images done and of all images.

    Returns:
        Numbers of images that were added, updated, removed, left unchanged and reused; the skipped
        files, and notes on the settings.

    Raises:
        IndexRefused: The folder holds no images, or `path` is something else or an index of other
            settings; nothing is changed.
        ValueError: The settings' files cannot be read or hold no known network.
    """
    given = DescriptorSettings() if settings is None else settings
    if not isinstance(given, DescriptorSettings):
        raise ValueError(f"settings must be a DescriptorSettings, not {type(given).__name__}")
    with contextlib.ExitStack() as stack:
        run = given.is_run
        given = stack.enter_context(weights_as_file(given))
        settings = replace(given.resolve(), decoding=given.decoding or _decoding_of(Path(path)))
        record = settings.record()  # reads the files, so that a missing one raises at once
        report = indexes.build(
            folder,
            path,
            LazyExtract(settings, batch),
            record,
            dtype=dtype,
            shard=shard,
            prune=prune,
            deep=deep,
            exclude=exclude,
            include=include,
            max_megapixels=max_megapixels,
            workers=workers,
            on_progress=on_progress,
        )
        if run:
            kept = _keep_network(Path(path), Path(str(settings.weights)))
            settings = replace(settings, weights=str(kept))
        _remember_files(Path(path), settings)
        return replace(report, notes=_notes_of(given) + report.notes)


def add_images(
    path: Path | str,
    folder: Path | str | None = None,
    *,
    root: Path | str | None = None,
    prune: bool = False,
    repair: bool = False,
    deep: bool = False,
    exclude: Iterable[str] = (),
    include: Iterable[str] = (),
    max_megapixels: float = MAX_MEGAPIXELS,
    weights: str | None = None,
    whitening: str | None = None,
    batch: int | None = None,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Adds images that are new or have changed, with the settings that the index was made with.

    Args:
        path: Folder of the index.
        folder: A folder inside the root of the index; None takes the root itself.
        root: Folder that the images have been moved to; None takes the one in the index.
        prune: Whether entries whose files are gone are dropped.
        repair: Whether images whose entries or vectors are damaged are described again.
        deep, exclude, include, max_megapixels: As in `build_index`.
        weights, whitening: Where the files of the build are now; None takes their old places.
        batch, workers, on_progress: As in `build_index`.

    Returns:
        Numbers of images and skipped files, as in `build_index`, without notes on the settings.

    Raises:
        IndexRefused: There is no index, or it was made with other files; nothing is changed.
        ValueError: A file of the build cannot be read.
    """
    record = indexes.info(path)["settings"]
    settings = find_settings(path, record, weights=weights, whitening=whitening)
    report = indexes.add(
        path,
        LazyExtract(settings, batch),
        record,
        folder=folder,
        root=root,
        prune=prune,
        repair=repair,
        deep=deep,
        exclude=exclude,
        include=include,
        max_megapixels=max_megapixels,
        workers=workers,
        on_progress=on_progress,
    )
    _remember_files(Path(path), settings)
    return report


def whiten_index(
    path: Path | str, output: Path | str, *, dim: int | None = None
) -> LearnedWhitening:
    """Learns PCA whitening from the vectors of an index and writes it to a file.

    From more than 1 GiB of vectors (in float64), evenly spaced ones are taken.

    Args:
        path: Folder of the index.
        output: `.npz` file, which `DescriptorSettings(whitening=...)` takes.
        dim: Components to keep; None keeps all.

    Returns:
        The file, the numbers of components before and after, and of vectors used.

    Raises:
        IndexRefused: There is no index, it is empty, or its vectors are whitened already.
        ValueError: `dim` is out of range, or the vectors span fewer dimensions.
        OSError: The output cannot be written.
    """
    opened = open_filled(path)
    if opened.settings.get("whitening") is not None:
        raise IndexRefused(
            f"{path} holds vectors that are whitened already: learn from an index without"
            " --whitening"
        )
    rows = max(_LEARNED_BYTES // (8 * opened.dim), 1)
    ids = np.unique(np.linspace(0, len(opened) - 1, min(rows, len(opened))).astype(int))
    whitening = learn_whitening(opened.vectors().take(ids), dim=dim)
    save_whitening(output, whitening)
    width = whitening.projection.shape[1]
    return LearnedWhitening(str(output), opened.dim, width, len(ids), len(opened))


def open_filled(path: Path | str) -> indexes.Index:
    """Returns the opened index, and raises if it holds no images.

    Args:
        path: Folder of the index.

    Raises:
        IndexRefused: There is no index, or it is empty.
    """
    opened = indexes.Index.open(path)
    if not len(opened):
        raise IndexRefused(f"{path} holds no images: add some first")
    return opened


def find_settings(
    path: Path | str,
    record: dict[str, Any],
    *,
    weights: str | None = None,
    whitening: str | None = None,
) -> DescriptorSettings:
    """Returns the settings that an index was made with, from its record of them.

    Args:
        path: Folder of the index.
        record: Settings of the index, as `info` returns them.
        weights, whitening: Where the files of the build are now; None takes their old places. Their
            contents are compared with those of the build.

    Raises:
        SurplusFile: A file was given that the index was made without.
        IndexRefused: A file is missing or has other contents, or the settings are unknown because
            another program made the index.
        ValueError: A file cannot be read.
    """
    given, remembered = {"weights": weights, "whitening": whitening}, _remembered_files(Path(path))
    values = dict(record)
    for name, file in given.items():
        if record.get(name) is None:
            if file is not None:
                raise SurplusFile(f"{path} was made without a file of {name}: leave out --{name}")
            continue
        values[name] = file = file or remembered.get(name)
        if file is None or not os.path.exists(file):
            missing = f", {file}, which is not there" if file else ""
            raise IndexRefused(
                f"{path} was made with a file of {name}{missing}: name it with --{name} FILE"
            )
        if (found := digest(file)) != record[name]:
            raise IndexRefused(
                f"{file} is not the file of {name} that {path} was made with ({found}, not"
                f" {record[name]}): name that with --{name} FILE"
            )
    try:
        return DescriptorSettings(**{"decoding": "full", **values})
    except (TypeError, ValueError) as error:
        raise IndexRefused(
            f"{path} was made with unknown settings ({error}): only the program that made it can"
            " search it by image"
        ) from None


def make_extractor(settings: DescriptorSettings, batch: int | None = None) -> "Extractor":
    """Returns an extractor. Only this function loads a network here.

    Args:
        settings: How an image becomes a vector.
        batch: Images that go through the network together; None takes 1 on a CPU, else 16.
    """
    from ggem_jax.descriptors.extract import Extractor

    return Extractor(settings, batch=batch)


class LazyExtract:
    """An extractor that loads its network when there is an image to resize or to describe.

    Args:
        settings: How an image becomes a vector.
        batch: Images that go through the network together; None takes 1 on a CPU, else 16.
    """

    def __init__(self, settings: DescriptorSettings, batch: int | None = None):
        self.settings, self.batch, self.lock = settings, batch, threading.Lock()
        self.draft = settings.decoding == "draft"
        self.extractor: Extractor | None = None

    def load(self) -> "Extractor":
        """Returns the extractor; only one thread loads it."""
        with self.lock:
            self.extractor = self.extractor or make_extractor(self.settings, self.batch)
            return self.extractor

    def fit(self, height: int, width: int) -> tuple[int, int] | None:
        """Returns the height and width that an image is resized to, as `Extractor.fit`.

        Args:
            height, width: Sides of the image, pixels.

        Raises:
            UnreadableImage: The image is too thin for a descriptor.
        """
        return self.load().fit(height, width)

    def __call__(self, images: Iterator[RGB]) -> Iterable[np.ndarray | UnreadableImage]:
        """Yields a vector `(d,)` for each image, or `UnreadableImage` where it cannot have one.

        Args:
            images: Images of any sizes, `(height, width, 3)` uint8 each.
        """
        for first in images:
            yield from self.load()(itertools.chain([first], images))


def describe_images(
    extract: LazyExtract, images: list[RGB], names: list[str]
) -> Float[np.ndarray, "m d"]:
    """Returns the descriptors of images that each must have one.

    Args:
        extract: The extractor.
        images: Images, m arrays `(h, w, 3)` uint8 of any sizes.
        names: Name of each image for an error message.

    Returns:
        The descriptors, `(m, d)` in float32.

    Raises:
        UnreadableImage: An image cannot be described; the message names it.
    """
    vectors = []
    for name, vector in zip(names, extract(iter(images)), strict=True):
        if isinstance(vector, UnreadableImage):
            raise UnreadableImage(f"{name}: {vector}")
        vectors.append(vector)
    return np.stack(vectors)


def _decoding_of(path: Path) -> Literal["draft", "full"]:
    """How an existing index decodes large JPEGs; draft for a new one."""
    if not is_built(path):
        return "draft"
    return "draft" if facts_of(path).settings.get("decoding") == "draft" else "full"


def _notes_of(given: DescriptorSettings) -> tuple[str, ...]:
    """Notes for the user on a network that was found from its file alone."""
    if given.weights is None or given.mean is not None or not given.leaves_row_to_weights:
        return ()
    from ggem_jax.descriptors.backbones import identify

    note = identify(given.weights, given.given()).note
    return (note,) if note else ()


def _remembered_files(path: Path) -> dict[str, str]:
    try:
        values = json.loads((path / SOURCES).read_text())
        files = {name: values[name] for name in FILES if isinstance(values[name], str)}
        return {name: str(path / file) for name, file in files.items()}  # of a name, one in there
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # without it the caller has to name the files


def _keep_network(path: Path, file: Path) -> Path:
    """Keeps the network of a training run in the index: the run may go on, or be deleted."""
    kept = path / NETWORK
    if not kept.is_file() or digest(kept) != digest(file):
        with replacing(kept) as temporary:
            shutil.copyfile(file, temporary)
    return kept


def _remember_files(path: Path, settings: DescriptorSettings) -> None:
    files = {
        name: _place_of(path, file) if (file := getattr(settings, name)) else None for name in FILES
    }
    if any(files.values()):
        with replacing(path / SOURCES) as temporary:
            temporary.write_text(json.dumps(files))


def _place_of(path: Path, file: str) -> str:
    """Where a file is; the name alone of one in the index, which may move."""
    inside = Path(file).name == NETWORK and os.path.samefile(Path(file).parent, path)
    return NETWORK if inside else os.path.abspath(file)
