"""Files -> pixels -> vectors -> journal: what is new in a folder, in batches."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np

from ggem_jax.files.images import RGB, UnreadableImage
from ggem_jax.retrieval.index.damage import some
from ggem_jax.retrieval.index.folder import DecodedImage, File, Reading, Skipped, decode, shown
from ggem_jax.retrieval.index.journal import Journal, Placed
from ggem_jax.retrieval.index.report import Extract
from ggem_jax.retrieval.index.store import Facts, IndexRefused

# images and seconds after which a batch is committed: a killed writer loses no more than that
COMMIT_ROWS, COMMIT_SECONDS = 1024, 30.0


class Extraction:
    """The extraction of new images.

    Args:
        journal: The journal that the images are added to.
        known: Contents that have a vector.
        tell: Function that is called with the number of files done.
    """

    def __init__(self, journal: Journal, known: set[bytes], tell: Callable[[int], None]):
        self.journal, self.known, self.tell = journal, known, tell
        self.waiting: deque[Placed] = deque()  # images that the extractor has
        self.copies: list[Placed] = []  # copies of images that are known or being extracted
        self.batch: list[tuple[Placed, np.ndarray]] = []
        self.skipped: list[Skipped] = []
        self.of_frames: list[str] = []  # paths of images with several frames
        self.truncated: list[str] = []
        self.done, self.exhausted, self.last_commit = 0, False, time.monotonic()

    def run(
        self, extract: Extract, files: Sequence[tuple[int, File]], reading: Reading, workers: int
    ) -> None:
        """Extracts the images of files; the journal keeps what was done if it fails.

        Args:
            extract: Function from images to vectors.
            files: Files and their places in the listing.
            reading: How files become pixels.
            workers: Threads that read and decode.

        Raises:
            IndexRefused: The vectors do not fit, or the folder cannot be written.
        """
        images = self._images(files, reading, workers)
        try:
            for vector in extract(images):
                self._take(vector)
                self.tell(self.done)
            if self.waiting or not self.exhausted:
                raise IndexRefused(
                    "the extractor must give a vector for each image, and stopped"
                    f" {len(self.waiting)} short of what it took"
                )
        except BaseException:
            with contextlib.suppress(IndexRefused):
                self._commit()
            raise
        finally:
            images.close()
        self._commit()
        for _, copy in self.copies:
            path = copy.file.path
            why = f"{shown(path)} has the content of an image that was skipped"
            self.skipped.append(Skipped(path, why))

    def notes(self) -> list[str]:
        """Returns what the user should know about the files."""
        notes = []
        if self.of_frames:
            taken = some(self.of_frames)
            notes.append(f"the first frame was taken of files with several: {taken}")
        if self.truncated:
            read = some(self.truncated)
            notes.append(f"files that lack their last bytes were read as far as they go: {read}")
        return notes

    def _images(
        self, files: Sequence[tuple[int, File]], reading: Reading, workers: int
    ) -> Generator[RGB, None, None]:
        """The images that the extractor reads, in any thread: SQLite is not used here."""
        root = Path(self.journal.facts.root)
        found = decode(
            root, (file for _, file in files), self.known, workers=workers, reading=reading
        )
        for (place, _), image in zip(files, found, strict=True):
            if isinstance(image, Skipped):
                self._skip(image)
                continue
            placed = Placed(place, image._replace(pixels=None))
            if image.pixels is None or image.content in self.known:
                self.copies.append(placed)
                self.done += 1
            else:
                self.known.add(image.content)
                self.waiting.append(placed)
                self.of_frames += [image.file.path] * image.frames
                self.truncated += [image.file.path] * image.truncated
                yield image.pixels
        self.exhausted = True

    def _skip(self, skipped: Skipped) -> None:
        self.skipped.append(skipped)
        self.done += 1

    def _take(self, vector: np.ndarray | UnreadableImage) -> None:
        if not self.waiting:
            raise IndexRefused(
                "the extractor must give a vector for each image, and gave more than it took images"
            )
        placed = self.waiting.popleft()
        dim = len(self.batch[0][1]) if self.batch else self.journal.facts.dim
        stored = store_vector(vector, placed.image, dim, self.journal.facts)
        if isinstance(stored, Skipped):
            return self._skip(stored)
        self.batch.append((placed, stored))
        self.done += 1
        if len(self.batch) >= COMMIT_ROWS or time.monotonic() - self.last_commit >= COMMIT_SECONDS:
            self._commit()
        return None

    def _commit(self) -> None:
        self.copies = self.journal.add(self.batch, self.copies)
        self.batch, self.last_commit = [], time.monotonic()


def store_vector(
    vector: np.ndarray | UnreadableImage, image: DecodedImage, dim: int, facts: Facts
) -> np.ndarray | Skipped:
    """Returns a vector as it is stored, or why an image has none.

    Args:
        vector: What the extractor gave for the image.
        image: The image.
        dim: Dimension of the vectors so far; 0 before the first one.
        facts: Facts of the index, with `dtype`.

    Raises:
        IndexRefused: It is no vector `(dim,)` of real numbers.
    """
    path = image.file.path
    if isinstance(vector, UnreadableImage):
        why = f"{shown(path)} cannot be described: {' '.join(str(vector).split())}"
        return Skipped(path, why)
    vector = np.asarray(vector)
    if (
        vector.ndim != 1
        or not vector.size
        or (dim and vector.size != dim)
        or not np.issubdtype(vector.dtype, np.floating)
    ):
        expected = f"({dim},)" if dim else "(dim,)"
        raise IndexRefused(
            f"the extractor must give vectors {expected} of real numbers, and gave"
            f" {vector.dtype} of shape {vector.shape} for {shown(path)}"
        )
    with np.errstate(over="ignore"):
        stored = vector.astype(facts.stored())
    if not np.isfinite(stored).all():
        why = f"{shown(path)} has a descriptor that is not finite in {facts.dtype}"
        return Skipped(path, why)
    return stored
