"""The files of the images of an index, and nothing else: by id, inside the root, never by path."""

import functools
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from ggem_jax.files.images import UnreadableImage
from ggem_jax.files.thumbnails import make_thumbnail
from ggem_jax.retrieval.index.folder import shown
from ggem_jax.retrieval.index.index import Index

_KEPT = 512  # thumbnails in memory, about 20 kB each
_AT_ONCE = 2  # images that are decoded at the same time


class Originals:
    """Reads the images of an index by their ids.

    A file is read only if it lies inside the root when all links are resolved, so that neither a
    link nor an altered index leads to other files.

    Args:
        index: The opened index.
        follow_links: Whether images behind links that leave the root are read too.

    Attributes:
        decoding: Semaphore to hold while an image is decoded.
    """

    def __init__(self, index: Index, *, follow_links: bool = False):
        self._index, self._follow_links = index, follow_links
        self.decoding = threading.BoundedSemaphore(_AT_ONCE)
        self._thumbnail = functools.lru_cache(_KEPT)(self._make_thumbnail)

    def stamp(self, number: int) -> str:
        """Returns a text that changes with the file of an image.

        Args:
            number: Its id, a row of the index.

        Raises:
            UnreadableImage: The file is gone or outside the root.
        """
        with self.open(number) as file:
            found = os.fstat(file.fileno())
            return f"{number:x}-{found.st_mtime_ns:x}-{found.st_size:x}"

    def thumbnail(self, number: int, longest: int) -> bytes:
        """Returns a small JPEG file of an image.

        Args:
            number: Its id, a row of the index.
            longest: Most pixels of the longer side.

        Raises:
            UnreadableImage: The file is gone, outside the root, or no image.
        """
        return self._thumbnail(number, longest, self.stamp(number))

    def _make_thumbnail(self, number: int, longest: int, _stamp: str) -> bytes:
        name = shown(self._index.paths[number])
        with self.open(number) as file, self.decoding:
            return make_thumbnail(file, longest=longest, name=name)

    @contextmanager
    def open(self, number: int) -> Iterator[IO[bytes]]:
        """Opens the file of an image.

        Args:
            number: Its id, a row of the index.

        Yields:
            The file, open for reading.

        Raises:
            UnreadableImage: The file is gone or outside the root.
        """
        path = self._index.paths[number]
        root = os.path.realpath(self._index.root)
        strange = os.path.isabs(path) or ".." in path.split("/") or "\0" in path
        file = os.path.realpath(os.path.join(root, "" if strange else path))
        if strange or not (self._follow_links or os.path.commonpath([root, file]) == root):
            raise UnreadableImage(f"{shown(path)} is outside the folder of the index")
        try:
            # a pipe is opened without waiting, and a link that appears now is not followed
            handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UnreadableImage(f"{shown(path)} cannot be read: {reason}") from None
        with os.fdopen(handle, "rb") as opened:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UnreadableImage(f"{shown(path)} is no regular file")
            yield opened
