"""The progress bar of all tools (needs rich, of the extras `retrieval` and `train`)."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")


def progress_bar(console: "Console | None" = None, *columns: Any) -> "Progress":
    """Returns a bar with its description, the steps done, and the times passed and left.

    The bar disappears when it stops, and shows nothing where there is no terminal.

    Args:
        console: Where the bar is drawn; None takes standard error.
        *columns: More columns of rich, at the right end of the bar.

    Returns:
        A bar that is not started and has no tasks.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = console or Console(stderr=True)
    usual = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(
        *usual, *columns, console=console, disable=not console.is_terminal, transient=True
    )


def track(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yields the items while a bar shows how many are done.

    Args:
        items: The items, each of which is one step of the bar.
        total: How many items there are.
        what: The description of the bar.
    """
    with progress_bar() as bar:
        yield from bar.track(items, total=total, description=what)
