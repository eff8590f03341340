"""Batches of images for training and evaluation.

For a seed the batches are the same, in the same order, for any number of processes and wherever a
run is resumed.
"""

import functools
import os
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from ggem_jax.files.crops import Part
from ggem_jax.files.fast import require_fast
from ggem_jax.files.images import Choose, UnreadableImage
from ggem_jax.files.preprocessing import Preprocessing
from train.augment import augment, choose_part
from train.cli import Refused
from train.config import Config
from train.images import Images, Label
from train.samplers import Draw

# image (b, side, side, 3) uint8, label (b,) or (b, classes) int32; for evaluation also weight (b,)
# float32, index (b,) int32 and digest (b,) uint32 of the image as it was read
Batch = dict[str, np.ndarray]


ENDLESS = 2**62  # length of a stream that no run reaches the end of
_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # handled by the process that trains alone


def label_only(label: Label, rng: np.random.Generator) -> dict[str, Any]:
    """Returns the entry of a batch that a classifier needs beside an image: its label.

    Args:
        label: The label of the image, from 0, or a row with 1 for each class that it shows.
        rng: Random numbers of the image, which are not used.

    Returns:
        "label" as int32.
    """
    return {"label": np.int32(label)}


def train_batches(
    images: Images,
    config: Config,
    *,
    start: int,
    process: int = 0,
    processes: int = 1,
    draw: Draw | None = None,
    same_class: bool = True,
    beside: Callable[[Any, np.random.Generator], dict[str, Any]] = label_only,
) -> Iterator[Batch]:
    """Yields endless shuffled and augmented batches, this process's rows of each.

    Batch k holds the images k * batch ... (k + 1) * batch - 1 of the shuffled stream. Each image
    draws its random numbers from its own place in the stream, so nothing depends on where the
    stream was entered.

    Args:
        images: The training images.
        config: The settings of the run: batch size, seed, augmentation and threads.
        start: Step of the first batch, from 0.
        process: Number of this process, from 0.
        processes: Number of all processes; it divides the batch.
        draw: Function from a step to the numbers of the images of its batch, `(batch,)`; None takes
            the shuffled stream. With one, an unreadable image is replaced by one that the
            batch lacks.
        same_class: Whether that is another of its class, so that every class keeps its count.
        beside: Function from a label and random numbers to the other entries of a batch for this
            image, by name.

    Raises:
        Refused: An image cannot be read and `config.data.corrupt` is "refuse", or none can be read
            that could replace it; a package of `--data.fast` is missing.
    """
    if config.data.fast:
        try:
            require_fast()
        except ModuleNotFoundError as error:
            raise Refused(f"--data.fast: {error}") from None
    local = config.batch // processes
    reader = Reader(images, config.data.corrupt, same_class)
    side = config.model.image

    def example(
        index: int, rng: np.random.Generator, batch: np.ndarray | None = None
    ) -> dict[str, Any]:
        def choose(height: int, width: int) -> Part:
            part = choose_part(height, width, side, config.augment, rng)
            return part._replace(shrink=config.data.shrink, fast=config.data.fast)

        image, label = reader(index, batch, choose)
        return {
            "image": augment(image, side, config.augment, rng),
            **beside(label, rng),
        }

    def drawn(place: int, rng: np.random.Generator) -> dict[str, Any]:
        assert draw is not None
        batch = draw(place // config.batch)
        return example(int(batch[place % config.batch]), rng, batch)

    if draw is None:
        stream = (
            grain.MapDataset.range(len(images))
            .seed(config.seed)
            .shuffle()
            .repeat(None)
            .random_map(example)
            .batch(local)
        )
    else:
        stream = grain.MapDataset.range(ENDLESS).seed(config.seed).random_map(drawn).batch(local)
    mine = stream[start * processes + process :: processes].to_iter_dataset(
        grain.ReadOptions(
            num_threads=config.data.workers, prefetch_buffer_size=4 * config.data.workers
        )
    )
    if config.data.processes:
        if not flags.FLAGS.is_parsed():  # grain looks its own flags up
            flags.FLAGS.mark_as_parsed()
        mine = mine.mp_prefetch(
            grain.MultiprocessingOptions(config.data.processes, per_worker_buffer_size=2),
            functools.partial(_start_process, os.getpid()),
        )
        return _read_with_processes(mine, reader)
    return iter(mine)


def _read_with_processes(stream: grain.IterDataset[Batch], reader: "Reader") -> Iterator[Batch]:
    """Yields the batches that other processes read, which end when the generator is closed.

    They start with blocked signals: Ctrl-C reaches them before `_start_process` has run, too.
    Each has a copy of the reader, and of the folder where it finds what the others have reported.
    """
    with tempfile.TemporaryDirectory() as folder:
        reader.reported = Path(folder)
        yield from _read_stream(iter(stream))


def _read_stream(batches: Any) -> Iterator[Batch]:
    try:
        resource_tracker.ensure_running()  # its start would unblock the signals
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            batch = _next_of_processes(batches)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        while True:
            yield batch
            del batch  # its shared memory can be freed
            batch = _next_of_processes(batches)
    finally:
        batches.close()


def _next_of_processes(batches: Iterator[Batch]) -> Batch:
    try:
        return next(batches)
    except RuntimeError as error:
        if "Worker process" not in str(error):
            raise
        raise Refused(
            "a process of --data.processes was killed, perhaps because memory ran out; run the same"
            " command again to resume, with fewer processes if it happens again"
        ) from None


def _start_process(parent: int, number: int, count: int) -> None:
    """Prepares a process that reads images: it ends with its parent, which handles the signals."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def eval_batches(
    images: Images, config: Config, *, process: int = 0, processes: int = 1
) -> Iterator[Batch]:
    """Yields all images once, in order, this process's rows of each batch.

    The last batch is filled up with images of weight 0; an image that is skipped because it cannot
    be read has weight 0 as well.

    Args:
        images: The evaluation images.
        config: The settings of the run: batch size, crop and threads.
        process: Number of this process, from 0.
        processes: Number of all processes; it divides the batch.

    Raises:
        Refused: An image cannot be read and `config.data.corrupt` is "refuse".
    """
    local = config.batch // processes
    reader = Reader(images, config.data.corrupt)
    side = config.model.image
    preprocessing = Preprocessing(side, config.data.eval_crop, config.data.eval_zoom)
    no_label: Any = np.zeros(len(images.classes), bool) if images.several else 0

    def example(index: int) -> dict[str, Any]:
        found = reader.or_none(index) if index < len(images) else None
        image, label = found or (np.zeros((side, side, 3), np.uint8), no_label)
        digest = np.uint32(zlib.crc32(np.ascontiguousarray(image).data))
        return {
            "image": preprocessing.square(image),
            "label": np.int32(label),
            "weight": np.float32(found is not None),
            "index": np.int32(index),
            "digest": digest,
        }

    steps = -(-len(images) // config.batch)
    stream = (
        grain.MapDataset.range(steps * config.batch).map(example).batch(local)[process::processes]
    )
    return iter(
        stream.to_iter_dataset(
            grain.ReadOptions(
                num_threads=config.data.workers, prefetch_buffer_size=4 * config.data.workers
            )
        )
    )


class Reader:
    """Loads images; an unreadable one is refused, or reported once and replaced."""

    def __init__(self, images: Images, corrupt: str, same_class: bool = False):
        self.images, self.corrupt, self.same_class = images, corrupt, same_class
        self.named: set[int] = set()
        # of processes that read together: a file for each image that one of them has reported
        self.reported: Path | None = None

    def __call__(self, index: int, batch: np.ndarray | None, choose: Choose):
        """A part of the image or, where it cannot be read, of the next one.

        `batch` holds the images that the next one should not be among.
        """
        if (found := self.or_none(index, choose)) is not None:
            return found
        for other in self._others(index, batch):
            if (found := self.or_none(int(other), choose)) is not None:
                return found
        of_class = (
            ""
            if batch is None or not self.same_class
            else f" of {self.images.classes[self.labels[index]]}"
        )
        raise Refused(f"no image{of_class} of the training split can be read")

    def _others(self, index: int, batch: np.ndarray | None) -> np.ndarray:
        """The images that may replace one, those that the batch has already last."""
        others = np.roll(np.arange(len(self.images)), -index)[1:]
        if batch is None:
            return others
        if self.same_class:
            others = others[self.labels[others] == self.labels[index]]
        return others[np.argsort(np.isin(others, batch), kind="stable")]

    @functools.cached_property
    def labels(self) -> np.ndarray:
        return self.images.labels()

    def or_none(self, index: int, choose: Choose | None = None) -> tuple[Any, Label] | None:
        """Returns an image, or the part of it that is chosen, and its label; None: it is skipped.

        Args:
            index: Number of the image.
            choose: Function from height and width in pixels to the part; None takes the whole.

        Raises:
            Refused: It cannot be read, and is not to be skipped.
        """
        try:
            return self.images.load(index, choose)
        except UnreadableImage as error:
            if self.corrupt == "refuse":
                raise Refused(
                    f"{error} (--data.corrupt skip, or --corrupt skip of the evaluation, leaves it"
                    " out)"
                ) from None
            if self._is_new(index):
                print(f"skipped: {error}", file=sys.stderr, flush=True)
            return None

    def _is_new(self, index: int) -> bool:
        if index in self.named:
            return False
        self.named.add(index)
        if self.reported is None:
            return True
        try:
            (self.reported / str(index)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
