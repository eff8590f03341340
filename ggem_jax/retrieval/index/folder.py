"""Images in a folder tree: a list of them, and their pixels, decoded in threads.

Paths are relative to the root, with `/`. Names that are not UTF-8 keep their bytes as surrogate
escapes.
"""

import hashlib
import os
import re
import stat
from collections import deque
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ggem_jax.files.images import EXTENSIONS, RGB, UnreadableImage, read_image


class File(NamedTuple):
    """A file with the extension of an image, as the folder lists it."""

    path: str  # relative to the root
    size: int  # bytes
    mtime_ns: int  # time of the last change, nanoseconds since 1970


class Skipped(NamedTuple):
    """A file or folder that could not be used, and why: a sentence that names it."""

    path: str  # relative to the root
    why: str


class DecodedImage(NamedTuple):
    """A file that was read: the hash of its bytes, its pixels and their size.

    If the hash was known already, the pixels are None and the size is 0 x 0.
    """

    file: File
    content: bytes  # hash of the file, 16 bytes
    pixels: RGB | None  # (height, width, 3) uint8
    width: int = 0  # pixels
    height: int = 0  # pixels


@dataclass(frozen=True)
class Listing:
    """The files that `walk` found, in the order of their names, and those it could not read."""

    files: list[File]
    skipped: list[Skipped]


def walk(root: Path, start: str = "", *, apart: Path) -> Listing:
    """Returns the images under `root / start`, found by their extensions.

    Hidden files and folders are left out. A linked folder is followed if it lies outside the root.
    Every folder is read once, so that loops of links end.

    Args:
        root: Folder that paths are relative to.
        start: Folder below it where the walk begins, relative to it; empty for the root itself.
        apart: Folder that is left out: the index.

    Returns:
        The files in the order of their names, and those that could not be used.
    """
    inside, apart = os.path.realpath(root), Path(os.path.realpath(apart))
    listing, seen, stack = Listing([], []), set[tuple[int, int]](), [start]
    while stack:
        path = stack.pop()
        full = root / path
        try:
            found = full.stat()
            if stat.S_ISDIR(found.st_mode):
                real = os.path.realpath(full)
                doubled = (
                    full.is_symlink()
                    and path != start
                    and f"{real}/".startswith(f"{inside.rstrip('/')}/")
                )
                if not doubled and (found.st_dev, found.st_ino) not in seen and Path(real) != apart:
                    seen.add((found.st_dev, found.st_ino))
                    names = (name for name in os.listdir(full) if not name.startswith("."))
                    stack += sorted(
                        (f"{path}/{name}" if path else name for name in names), reverse=True
                    )
            elif path.lower().endswith(EXTENSIONS):
                if stat.S_ISREG(found.st_mode):
                    listing.files.append(File(path, found.st_size, _mtime(found)))
                else:
                    listing.skipped.append(Skipped(path, f"{shown(path)} is no regular file"))
        except OSError as error:
            if full.is_symlink() and not path.lower().endswith(EXTENSIONS):
                continue  # a dangling link without the name of an image
            listing.skipped.append(
                Skipped(path, f"{shown(path) or root} cannot be read: {error.strerror}")
            )
    return listing


def decode(
    root: Path, files: Iterable[File], known: Container[bytes], *, workers: int
) -> Iterator[DecodedImage | Skipped]:
    """Yields the images of files, in their order; a few files are read ahead.

    A file that cannot be read or decoded yields `Skipped`.

    Args:
        root: Folder of the files.
        files: Files to read, as `walk` lists them.
        known: Hashes of contents that are not decoded again.
        workers: Threads that read and decode.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        ahead: deque[Future[DecodedImage | Skipped]] = deque()
        try:
            for file in files:
                ahead.append(pool.submit(_read, root, file, known))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def hash_content(data: bytes) -> bytes:
    """Returns the blake2b hash of a file's contents, 16 bytes.

    Args:
        data: All bytes of the file.
    """
    return hashlib.blake2b(data, digest_size=16).digest()


def shown(path: str) -> str:
    """Returns a path as text on one line; names with unprintable characters are quoted and escaped.

    Args:
        path: Path of a file, in which surrogate escapes may stand for bytes that are not UTF-8.
    """
    return path if path.isprintable() else repr(path)


def _read(root: Path, file: File, known: Container[bytes]) -> DecodedImage | Skipped:
    try:
        with open(root / file.path, "rb") as handle:
            now = os.fstat(handle.fileno())
            data = handle.read()
        content = hash_content(data)
        pixels = None if content in known else read_image(data, name=shown(file.path))
    except UnreadableImage as error:
        return Skipped(file.path, _one_line(error))
    except OSError as error:
        return Skipped(file.path, f"{shown(file.path)} cannot be read: {error.strerror}")
    except Exception as error:  # a decoder may raise anything, and hours of work must go on
        return Skipped(
            file.path,
            f"{shown(file.path)} is not a readable image: {type(error).__name__}:"
            f" {_one_line(error)}",
        )
    height, width = (0, 0) if pixels is None else pixels.shape[:2]
    return DecodedImage(File(file.path, now.st_size, _mtime(now)), content, pixels, width, height)


def _mtime(status: os.stat_result) -> int:
    """Nanoseconds that fit into 64 bits, to the year 2262."""
    return max(-(2**63), min(status.st_mtime_ns, 2**63 - 1))


def _one_line(error: Exception) -> str:
    return " ".join(re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error)).split())
