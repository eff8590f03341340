"""Images in a folder tree: a list of them, and their pixels, decoded in threads.

Paths are relative to the root, with `/`. Names that are not UTF-8 keep their bytes as surrogate
escapes. A file is an image by its content; a file with the ending of an image that holds none is
listed too, and named when it cannot be decoded.
"""

import hashlib
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ggem_jax.files.images import (
    EXTENSIONS,
    MAX_MEGAPIXELS,
    RGB,
    Decoded,
    Fit,
    UnfitImage,
    UnreadableImage,
    decode_image,
    is_image,
    is_read_otherwise,
)
from ggem_jax.retrieval.index.exclusions import Exclusions
from ggem_jax.retrieval.parts import Part

# Endings by which a file is an image before it is opened; some formats have no mark in their
# content, or need a package that may be missing.
ENDINGS = (
    *EXTENSIONS, ".avif", ".heic", ".heif", ".hif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpx",
    ".mpo", ".pbm", ".pcx", ".pgm", ".pnm", ".ppm", ".psd", ".qoi", ".sgi", ".tga",
)  # fmt: skip
MEMORY = 1 << 29  # bytes that the workers may need together for images that are decoded
_LONGEST_ENDING = 12  # letters of an ending that is counted by its name


class File(NamedTuple):
    """A file as the folder lists it. Its stamp is all but the path: equal stamps, equal content."""

    path: str  # relative to the root
    size: int  # bytes
    mtime_ns: int  # time of the last change of the content, nanoseconds since 1970
    ctime_ns: int  # time of the last change of the content or of the inode, likewise
    inode: int  # number of the file on its disk

    @classmethod
    def of(cls, path: str, status: os.stat_result) -> "File":
        """Returns the record of a file; its numbers fit into 64 bits (times to the year 2262).

        Args:
            path: Path relative to the root.
            status: What `os.stat` returns for it.
        """
        times = (status.st_mtime_ns, status.st_ctime_ns)
        mtime_ns, ctime_ns = (max(-(2**63), min(each, 2**63 - 1)) for each in times)
        return cls(path, status.st_size, mtime_ns, max(ctime_ns, 0), status.st_ino & (2**63 - 1))

    @property
    def stamp(self) -> tuple[int, int, int, int]:
        """Size, times and inode."""
        return self[1:]


class Skipped(NamedTuple):
    """A file or folder that could not be used, and why: a sentence that names it."""

    path: str  # relative to the root
    why: str


class DecodedImage(NamedTuple):
    """A file that was read: the hash of its bytes, its pixels and its size.

    If the hash was known already, the pixels are None and the size is 0 x 0.
    """

    file: File
    content: bytes  # hash of the file, 16 bytes
    pixels: RGB | None  # (height, width, 3) uint8
    width: int = 0  # pixels, in the file
    height: int = 0  # pixels
    frames: bool = False  # whether it has more frames or pages
    truncated: bool = False  # whether its last bytes are missing


@dataclass(frozen=True)
class Listing:
    """What `walk` found. Every entry that is no folder is in one of the fields but the last."""

    files: list[File] = field(default_factory=list)  # images, in the order of their names
    skipped: list[Skipped] = field(default_factory=list)  # what could not be listed or opened
    others: Counter[str] = field(default_factory=Counter)  # ending -> files that are no images
    excluded: Counter[str] = field(default_factory=Counter)  # pattern -> files
    # links that lead nowhere, or to a folder that is listed elsewhere; pipes, sockets and devices
    special: int = 0
    opened: list[File] = field(default_factory=list)  # files that were opened and are no images

    def count(self) -> int:
        """Returns the number of files; a folder that cannot be listed counts as one."""
        found = len(self.files) + len(self.skipped) + self.special
        return found + self.others.total() + self.excluded.total()


# file -> whether it is an image, None where nothing is known
Known = Callable[[File], bool | None]


def walk(
    root: Path,
    start: str = "",
    *,
    apart: Path,
    exclusions: Exclusions | None = None,
    known: Known = lambda file: None,
    part: Part | None = None,
) -> Listing:
    """Returns the images under `root / start`, and counts all other files.

    A linked folder is followed if it lies outside the root. Every folder is read once, so that
    loops of links end.

    Args:
        root: Folder that paths are relative to.
        start: Folder below it where the walk begins, relative to it; empty for the root itself.
        apart: Folder that is left out: the index.
        exclusions: What is left out too; None takes the defaults.
        known: Whether a file is an image, so that it is not opened; None where this is not known.
        part: The share of the files that is listed and counted; None takes all. What cannot be read
            is listed in every part, as it may be a folder.

    Returns:
        The files in the order of their names, those that could not be used, and the rest by kind.
    """
    return _Walk(root, apart, exclusions or Exclusions(), known, part).run(start)


class _Walk:
    def __init__(
        self, root: Path, apart: Path, exclusions: Exclusions, known: Known, part: Part | None
    ):
        self.root, self.exclusions, self.known, self.part = root, exclusions, known, part
        self.inside = f"{os.path.realpath(root).rstrip('/')}/"
        self.apart = os.path.realpath(apart)
        self.seen = set[tuple[int, int]]()
        self.listing, self.special = Listing(), 0

    def run(self, start: str) -> Listing:
        stack = [start]
        while stack:
            path = stack.pop()
            try:
                stack += self._visit(path, path == start)
            except OSError as error:
                self._skip(path, error)
        return Listing(**{**vars(self.listing), "special": self.special})

    def _visit(self, path: str, first: bool) -> list[str]:
        """Sorts an entry in; returns the paths in it, last one first."""
        full = os.path.join(self.root, path) if path else os.fspath(self.root)
        if not first and (pattern := self.exclusions.find(path)) is not None:
            if self._holds(path):
                self.listing.excluded[pattern] += _count_files(full)
            return []
        try:
            found = os.stat(full)
        except OSError:
            if not path.lower().endswith(ENDINGS) and _is_link(full):
                self.special += self._holds(path)
                return []
            raise
        if stat.S_ISDIR(found.st_mode):
            return self._enter(path, full, found, first)
        if not self._holds(path):
            return []
        if not stat.S_ISREG(found.st_mode):
            if path.lower().endswith(ENDINGS):
                self.listing.skipped.append(Skipped(path, f"{shown(path)} is no regular file"))
            else:
                self.special += 1
            return []
        self._take(File.of(path, found), full)
        return []

    def _enter(self, path: str, full: str, found: os.stat_result, first: bool) -> list[str]:
        real, linked = os.path.realpath(full), not first and _is_link(full)
        if real == self.apart:
            self.listing.excluded["the index"] += _count_files(full)
        elif (linked and f"{real}/".startswith(self.inside)) or (
            (found.st_dev, found.st_ino) in self.seen
        ):
            self.special += linked and self._holds(path)
        else:
            self.seen.add((found.st_dev, found.st_ino))
            names = sorted(os.listdir(full), reverse=True)
            return [f"{path}/{name}" if path else name for name in names]
        return []

    def _holds(self, path: str) -> bool:
        return self.part is None or self.part.holds(path)

    def _take(self, file: File, full: str) -> None:
        is_one = file.path.lower().endswith(ENDINGS) or self.known(file)
        if is_one is None:
            with open(full, "rb") as handle:
                is_one = is_image(handle)
            if not is_one:
                self.listing.opened.append(file)
        if is_one:
            self.listing.files.append(file)
        else:
            self.listing.others[_ending(file.path)] += 1

    def _skip(self, path: str, error: OSError) -> None:
        named = shown(path) or self.root
        why = f"{named} cannot be read: {error.strerror or error}"
        self.listing.skipped.append(Skipped(path, why))


def _is_link(full: str) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(full).st_mode)
    except OSError:
        return False


def _count_files(full: str) -> int:
    """Files in a folder that is left out, without opening one; one for all else."""
    if _is_link(full) or not os.path.isdir(full):
        return 1
    unread: list[OSError] = []
    found = os.walk(full, onerror=unread.append)
    count = sum(
        len(files) + sum(os.path.islink(os.path.join(at, each)) for each in folders)
        for at, folders, files in found
    )
    return count + len(unread)


def _ending(path: str) -> str:
    ending = os.path.splitext(path)[1].lower()
    return ending if ending.isprintable() and len(ending) <= _LONGEST_ENDING else "other"


@dataclass(frozen=True)
class Reading:
    """How files become pixels."""

    fit: Fit | None = None  # as in `decode_image`
    draft: bool = False  # likewise
    max_megapixels: float = MAX_MEGAPIXELS  # likewise
    # contents that earlier versions may have decoded differently: these are decoded again
    outdated: Container[bytes] = frozenset()


def decode(
    root: Path,
    files: Iterable[File],
    known: Container[bytes],
    *,
    workers: int,
    reading: Reading | None = None,
) -> Iterator[DecodedImage | Skipped]:
    """Yields the images of files, in their order; a few files are read ahead.

    A file that cannot be read or decoded yields `Skipped`. Images that need more than their
    worker's part of `MEMORY` are decoded one after the other; at most one image for each worker and
    one more are held.

    Args:
        root: Folder of the files.
        files: Files to read, as `walk` lists them.
        known: Hashes of contents that are not decoded again.
        workers: Threads that read and decode.
        reading: How files become pixels; None takes the defaults.

    Raises:
        BaseException: `reading.fit` raised anything other than `UnreadableImage`.
    """
    with (
        ThreadPoolExecutor(1, thread_name_prefix="decode large") as large,
        ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool,
    ):
        read = _Reader(root, known, reading or Reading(), MEMORY // workers, large)
        ahead: deque[Future[DecodedImage | Skipped]] = deque()
        try:
            for file in files:
                ahead.append(pool.submit(read, file))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except _Unfit as carrier:
            error = carrier.error
            raise error from None
        finally:
            for future in ahead:
                future.cancel()


def hash_file(path: Path) -> bytes:
    """Returns the blake2b hash of a file's contents, 16 bytes; the file is read in blocks.

    Args:
        path: The file.

    Raises:
        OSError: The file cannot be read.
    """
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, _blake2b).digest()


def shown(path: str) -> str:
    """Returns a path as text on one line; names with unprintable characters are quoted and escaped.

    Args:
        path: Path of a file, in which surrogate escapes may stand for bytes that are not UTF-8.
    """
    return path if path.isprintable() else repr(path)


class _Unfit(BaseException):
    """Carries an error of `fit` that is no fault of the image past the handlers of those."""

    def __init__(self, error: BaseException):
        self.error = error


class _Reader:
    """Reads and decodes one file a call, from any thread.

    Images that need more bytes than `small` are decoded by the one thread of `large`: the memory
    that a thread has freed is not always given back, so that a thread each would keep it.
    """

    def __init__(
        self,
        root: Path,
        known: Container[bytes],
        reading: Reading,
        small: int,
        large: ThreadPoolExecutor,
    ):
        self.root, self.known, self.reading = root, known, reading
        self.small, self.large = small, large

    def __call__(self, file: File) -> DecodedImage | Skipped:
        name = shown(file.path)
        try:
            with open(self.root / file.path, "rb") as handle:
                now = File.of(file.path, os.fstat(handle.fileno()))
                content = hashlib.file_digest(handle, _blake2b).digest()
                if content in self.known or (
                    content in self.reading.outdated and not is_read_otherwise(handle)
                ):
                    return DecodedImage(now, content, None)
                found = decode_image(
                    handle,
                    name=name,
                    fit=self._fit,
                    draft=self.reading.draft,
                    max_megapixels=self.reading.max_megapixels,
                    run=self._run,
                )
                if File.of(file.path, os.fstat(handle.fileno())).stamp != now.stamp:
                    return Skipped(file.path, f"{name} changed while it was read: run again")
            return DecodedImage(now, content, *found)
        except UnfitImage as error:
            return Skipped(file.path, f"{name} cannot be described: {_one_line(error)}")
        except UnreadableImage as error:
            return Skipped(file.path, _one_line(error))
        except OSError as error:
            return Skipped(file.path, f"{name} cannot be read: {error.strerror or error}")
        except Exception as error:  # a decoder may raise anything, and hours of work must go on
            return Skipped(
                file.path,
                f"{name} is not a readable image: {type(error).__name__}: {_one_line(error)}",
            )

    def _fit(self, height: int, width: int) -> tuple[int, int] | None:
        try:
            return self.reading.fit(height, width) if self.reading.fit else None
        except UnreadableImage:
            raise
        except BaseException as error:
            raise _Unfit(error) from error

    def _run(self, size: int, decode: Callable[[], Decoded]) -> Decoded:
        return decode() if size <= self.small else self.large.submit(decode).result()


def _blake2b() -> Any:
    return hashlib.blake2b(digest_size=16)


def _one_line(error: Exception) -> str:
    return " ".join(re.sub(r" <_io\.\w+ [^>]*>", "", str(error)).split())
