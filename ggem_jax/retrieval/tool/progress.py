"""Progress of a build on standard error: a bar on a terminal, elsewhere a line every 30 seconds."""

import contextlib
import sys
import time
from collections.abc import Iterator

from ggem_jax.progress import progress_bar
from ggem_jax.retrieval.index.report import OnProgress

SECONDS = 30.0  # time between two lines


@contextlib.contextmanager
def progress() -> Iterator[OnProgress]:
    """Yields a function to call with the numbers of images done and of all images."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    with progress_bar() as bar:

        def on_progress(done: int, total: int) -> None:
            if not bar.task_ids:  # images of an earlier run do not count for the speed
                bar.add_task("images", total=total, completed=done)
            bar.update(bar.task_ids[0], completed=done)

        yield on_progress


class Lines:
    """Prints a line every `SECONDS`, with the time that is left once it can be estimated."""

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None
        self.last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.last = (done, now), now
        elif done < total and now - self.last >= SECONDS:
            before, start = self.first
            left = ""
            if done > before:
                seconds = (now - start) / (done - before) * (total - done)
                left = f", {format_seconds(seconds)} left"
            sys.stderr.write(f"{done} of {total} images{left}\n")
            sys.stderr.flush()
            self.last = now


def format_seconds(seconds: float) -> str:
    """Returns a duration as people write it: `45 s`, `12 min`, `3 h 20 min`.

    Args:
        seconds: The duration.
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
