"""Indexes whose vectors are the descriptors of `DescriptorSettings`: build, add, whiten.

The network is loaded when the first image has to be described, not before.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from ggem_jax.descriptors.settings import DescriptorSettings, digest
from ggem_jax.descriptors.whitening import learn_whitening, save_whitening
from ggem_jax.files.atomic import replacing
from ggem_jax.files.images import RGB, UnreadableImage
from ggem_jax.retrieval.index import index as indexes
from ggem_jax.retrieval.index.store import IndexRefused
from ggem_jax.retrieval.index.writing import Extract, OnProgress, Report

if TYPE_CHECKING:
    from ggem_jax.descriptors.extract import Extractor

SOURCES = "sources.json"  # in an index: where its files of weights and of a whitening were
FILES = ("weights", "whitening")

_LEARNED_BYTES = 2**30  # of vectors, in float64, that a whitening is learned from at most


class SurplusFile(IndexRefused):
    """A file was given that the index was made without."""


@dataclass(frozen=True)
class LearnedWhitening:
    """What `whiten_index` wrote."""

    file: str
    dim_before: int  # numbers in a vector of the index
    dim: int  # numbers that are left of them
    learned_from: int  # vectors
    images: int  # in the index

    def record(self) -> dict[str, Any]:
        """Returns JSON values."""
        return asdict(self)


def build_index(
    folder: Path | str,
    path: Path | str,
    settings: DescriptorSettings | None = None,
    *,
    dtype: str = "float16",
    batch: int | None = None,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Builds an index of all images in a folder tree, or brings an existing one up to date.

    The index appears when the build is complete. After an interruption the same call resumes.

    Args:
        folder: with the images; hidden files and folders are left out.
        path: folder of the index. Anything else that stands there is refused, never overwritten.
        settings: how an image becomes a vector; None takes the defaults.
        dtype: of the vectors on disk, "float16" or "float32".
        batch: images that go through the network together; None: 1 on a CPU, else 16.
        workers: threads that read images; None: one a core, at most 4.
        on_progress: is called with the images done and the images in all.

    Returns:
        Numbers of images that were added, updated, left alone and skipped.

    Raises:
        IndexRefused: the folder or the path is not what it should be; nothing is changed.
        ValueError: the settings' files cannot be read or hold no known network.
    """
    given = DescriptorSettings() if settings is None else settings
    if not isinstance(given, DescriptorSettings):
        raise ValueError(f"settings must be a DescriptorSettings, not {type(given).__name__}")
    settings = given.resolve()
    record = settings.record()  # reads the files, so that a missing one is told at once
    extract = _lazy_extract(settings, batch)
    report = indexes.build(
        folder, path, extract, record, dtype=dtype, workers=workers, on_progress=on_progress
    )
    _remember_files(Path(path), settings)
    return replace(report, notes=_notes_of(given))


def add_images(
    path: Path | str,
    folder: Path | str | None = None,
    *,
    root: Path | str | None = None,
    prune: bool = False,
    repair: bool = False,
    weights: str | None = None,
    whitening: str | None = None,
    batch: int | None = None,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Adds images that are new or have changed, with the settings that the index was made with.

    Args:
        path: folder of the index.
        folder: a folder inside its root; None is the root itself.
        root: where the images of the index have been moved to.
        prune: drops the entries whose files are gone.
        repair: describes again what `verify` finds damaged.
        weights, whitening: where the files of the build are now; None: where they were.
        batch, workers, on_progress: as in `build_index`.

    Returns:
        Numbers of images that were added, updated, removed, left alone and skipped.

    Raises:
        IndexRefused: there is no index, or it was made with other files; nothing is changed.
    """
    record = indexes.info(path)["settings"]
    settings = find_settings(path, record, weights=weights, whitening=whitening)
    report = indexes.add(
        path,
        _lazy_extract(settings, batch),
        record,
        folder=folder,
        root=root,
        prune=prune,
        repair=repair,
        workers=workers,
        on_progress=on_progress,
    )
    _remember_files(Path(path), settings)
    return report


def whiten_index(
    path: Path | str, output: Path | str, *, dim: int | None = None
) -> LearnedWhitening:
    """Learns PCA whitening from the vectors of an index and writes it to a file.

    Args:
        path: folder of the index. Of vectors beyond 1 GiB in float64, an even part is taken.
        output: `.npz` file, which `DescriptorSettings(whitening=...)` takes.
        dim: components to keep; None keeps all.

    Raises:
        IndexRefused: the index is empty, or its vectors are whitened already.
        ValueError: the vectors span fewer than `dim` dimensions.
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
    """Returns the opened index. Raises `IndexRefused` where it holds no images."""
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
        path: folder of the index.
        record: its settings, as `info` tells them.
        weights, whitening: where the files of the build are now; None: where they were. Their
            contents are compared with those of the build.

    Raises:
        SurplusFile: a file was given that the index was made without.
        IndexRefused: a file is missing or another one, or the index is of another program.
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
        return DescriptorSettings(**values)
    except (TypeError, ValueError) as error:
        raise IndexRefused(
            f"{path} was made with unknown settings ({error}): only the program that made it can"
            " search it by image"
        ) from None


def make_extractor(settings: DescriptorSettings, batch: int | None = None) -> "Extractor":
    """Returns an extractor. The only place here where a network is loaded."""
    from ggem_jax.descriptors.extract import Extractor

    return Extractor(settings, batch=batch)


def describe_images(
    settings: DescriptorSettings, images: list[RGB], names: list[str]
) -> Float[np.ndarray, "m d"]:
    """Returns the descriptors `(m, d)` of images; one that cannot have one raises by its name."""
    vectors = []
    for name, vector in zip(names, make_extractor(settings)(images), strict=True):
        if isinstance(vector, UnreadableImage):
            raise UnreadableImage(f"{name}: {vector}")
        vectors.append(vector)
    return np.stack(vectors)


def _lazy_extract(settings: DescriptorSettings, batch: int | None) -> Extract:
    """Loads the network when the first image comes: a folder without news costs nothing."""

    def extract(images: Iterator[RGB]) -> Iterable[np.ndarray | UnreadableImage]:
        for first in images:
            yield from make_extractor(settings, batch)(itertools.chain([first], images))

    return extract


def _notes_of(given: DescriptorSettings) -> tuple[str, ...]:
    """What a network that was found from its file alone should be told about."""
    if given.weights is None or given.mean is not None or not given.leaves_row_to_weights:
        return ()
    from ggem_jax.descriptors.backbones import identify

    note = identify(given.weights).note
    return (note,) if note else ()


def _remembered_files(path: Path) -> dict[str, str]:
    try:
        values = json.loads((path / SOURCES).read_text())
        return {name: values[name] for name in FILES if isinstance(values[name], str)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # a convenience: without it the caller names the files


def _remember_files(path: Path, settings: DescriptorSettings) -> None:
    files = {
        name: os.path.abspath(file) if (file := getattr(settings, name)) else None for name in FILES
    }
    if any(files.values()):
        with replacing(path / SOURCES) as temporary:
            temporary.write_text(json.dumps(files))
