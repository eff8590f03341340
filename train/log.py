"""Reports of a run: a banner, a bar or plain lines, `metrics.jsonl`, and TensorBoard files."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TextColumn

from ggem_jax.files.atomic import write_text
from ggem_jax.progress import progress_bar


class Log:
    """Writes and prints for one run.

    Args:
        run: Folder of the run. None, for the processes after the first, neither writes nor prints.
        total_steps: Steps of the run.
        start: The step after which it resumes; later lines of `metrics.jsonl` are dropped.
        quiet: Whether it writes and does not print.
    """

    def __init__(self, run: Path | None, *, total_steps: int, start: int, quiet: bool = False):
        self.run = run
        if run is None:
            return
        self.console = Console(stderr=True, quiet=quiet)
        self.bar = None
        if self.console.is_terminal and not quiet:
            self.bar = progress_bar(self.console, TextColumn("{task.fields[said]}"))
            self.bar.add_task("training", total=total_steps, completed=start, said="")
        drop_lines_after(run / "metrics.jsonl", start)
        self.file = (run / "metrics.jsonl").open("a", buffering=1)
        self.board = TensorBoard(run / "tensorboard")

    def banner(self, facts: dict[str, str]) -> None:
        """Prints facts by name and starts the bar.

        Args:
            facts: One line of text for each name, such as "devices"; at least one.
        """
        if self.run is not None:
            width = max(map(len, facts))
            for name, fact in facts.items():
                self.console.print(
                    f"{name:<{width}}  {fact}", highlight=False, markup=False, soft_wrap=True
                )
            if self.bar:
                self.bar.start()

    def advance(self, step: int) -> None:
        """Moves the bar to a step.

        Args:
            step: Steps that are done.
        """
        if self.run is not None and self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step)

    def metrics(self, kind: str, step: int, values: dict[str, Any], said: str) -> None:
        """Writes a line of JSON and TensorBoard scalars, and prints `said` for people.

        Args:
            kind: "train" or "eval".
            step: The step that the values belong to.
            values: Numbers, lists and dictionaries by name.
            said: The same in words; its parts stand two spaces apart, and a bar leaves out the
                first.
        """
        if self.run is None:
            return
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.board.write(kind, step, values)
        if self.bar and kind == "train":
            # the bar counts the steps itself
            self.bar.update(self.bar.task_ids[0], said=said.partition("  ")[2])
        else:
            self.console.print(said, highlight=False, markup=False, soft_wrap=True)

    def say(self, sentence: str) -> None:
        """Prints a sentence.

        Args:
            sentence: One line of text.
        """
        if self.run is not None:
            self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Stops the bar and closes the files."""
        if self.run is not None:
            if self.bar:
                self.bar.stop()
            self.file.close()
            self.board.close()


def drop_lines_after(path: Path, step: int) -> None:
    """Drops the lines after a step; a run that resumes from a checkpoint writes them again.

    Args:
        path: A `metrics.jsonl`; nothing happens where it does not exist. Damaged lines are dropped
            too.
        step: The last step whose lines are kept.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):  # cut off when the process was killed
            continue
    write_text(path, "".join(f"{line}\n" for line in kept))


def read_metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """Returns the lines of one kind of `metrics.jsonl`, oldest first.

    Args:
        run: Folder of the run.
        kind: "train" or "eval".

    Returns:
        Dictionaries with "kind", "step" and the values that were logged.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


class TensorBoard:
    """Writes scalars for TensorBoard where tensorboardX is installed.

    It writes at once, without a thread, so that a full disk is an error like any other.
    """

    def __init__(self, folder: Path):
        try:
            from tensorboardX.event_file_writer import EventsWriter
        except ImportError:
            self.writer = None
            return
        folder.mkdir(exist_ok=True)
        self.writer = EventsWriter(str(folder / "events"))

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Writes the values that are numbers, as `kind/name`.

        Args:
            kind: "train" or "eval".
            step: The step that the values belong to.
            values: Values by name; those that are not numbers are left out.
        """
        if self.writer is None:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.write_event(
                    Event(wall_time=time.time(), step=step, summary=scalar(f"{kind}/{name}", value))
                )
        self.writer.flush()

    def close(self) -> None:
        """Closes the file."""
        if self.writer is not None:
            self.writer.close()
