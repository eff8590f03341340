"""How far a build is: a bar on a terminal, a line now and then elsewhere; on standard error."""

import contextlib
import sys
import time
from collections.abc import Iterator

from ggem_jax.retrieval.index.writing import OnProgress

SECONDS = 30.0  # between lines


@contextlib.contextmanager
def progress() -> Iterator[OnProgress]:
    """Gives the function that is told how many pictures are done, of how many; with the time that
    is left, once it can be told.
    """
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("pictures"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def on_progress(done: int, total: int) -> None:
            if not bar.task_ids:  # what was done before says nothing about the speed
                bar.add_task("pictures", total=total, completed=done)
            bar.update(bar.task_ids[0], completed=done)

        yield on_progress


class Lines:
    """Says how far it is every `SECONDS`."""

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None
        self.last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.last = (done, now), now
        elif done < total and now - self.last >= SECONDS:
            before, start = self.first
            left = (
                f", {spoken((now - start) / (done - before) * (total - done))} left"
                if done > before
                else ""
            )
            sys.stderr.write(f"{done} of {total} pictures{left}\n")
            sys.stderr.flush()
            self.last = now


def spoken(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`"""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
