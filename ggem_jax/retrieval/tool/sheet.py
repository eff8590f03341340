"""Results of a search, or groups of near duplicates, as one HTML page without other files.

Images are data URIs; a page loads nothing and has no scripts. The templates are `search.html` and
`duplicates.html` in `ggem_jax/files/templates`.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ggem_jax.files.atomic import replacing
from ggem_jax.files.images import UnreadableImage
from ggem_jax.files.pages import TEMPLATES, render_page
from ggem_jax.files.thumbnails import make_thumbnail
from ggem_jax.retrieval.index.duplicates import Duplicates
from ggem_jax.retrieval.index.folder import shown

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Hit:
    """One result of a query."""

    path: str  # path of the image, relative to the root of the index
    rank: int  # from 1
    score: float  # score after reranking
    rank_before: int | None  # rank before reranking; None if it was beyond the first search
    score_before: float | None  # score of the first search; None likewise


@dataclass(frozen=True)
class Answer:
    """A query with its results, best first."""

    query: str  # path of the image
    box: Box | None  # part of the image that was searched for, pixels; None for all of it
    hits: list[Hit]


@dataclass(frozen=True)
class Thumbnail:
    """A small image as the page shows it."""

    name: str  # name of the file
    source: str = ""  # data URI of a JPEG file
    missing: str = ""  # if there is no source: what is wrong with the image


def write_sheet(
    file: Path, answers: Sequence[Answer], *, root: Path, reranked: bool, facts: Mapping[str, str]
) -> None:
    """Writes the page, which appears when it is complete.

    Args:
        file: File of the page.
        answers: The queries with their results.
        root: Folder of the images, which the paths of the results are relative to.
        reranked: Whether the page shows the ranks before reranking.
        facts: Name and text of each line at the head of the page.

    Raises:
        OSError: The page cannot be written.
    """
    pieces = render_page(
        TEMPLATES / "search.html",
        title=f"Search: {len(answers)} {'query' if len(answers) == 1 else 'queries'}",
        facts={name: shown(fact) for name, fact in facts.items()},
        answers=answers,
        root=root,
        reranked=reranked,
        thumbnail=_thumbnail_of,
        shown=shown,
    )
    _write_page(file, pieces)


def write_duplicates_sheet(file: Path, found: Duplicates, *, facts: Mapping[str, str]) -> None:
    """Writes a page of near duplicates, which appears when it is complete.

    Args:
        file: File of the page.
        found: The groups.
        facts: Name and text of each line at the head of the page.

    Raises:
        OSError: The page cannot be written.
    """
    pieces = render_page(
        TEMPLATES / "duplicates.html",
        title="Near duplicates",
        facts={name: shown(fact) for name, fact in facts.items()},
        groups=found.groups,
        root=found.root,
        thumbnail=_thumbnail_of,
        shown=shown,
        size=format_bytes,
    )
    _write_page(file, pieces)


def format_bytes(size: int) -> str:
    """Returns a size as people write it: `812 bytes`, `3.2 kB`, `41 MB`, `1.5 GB`.

    Args:
        size: The size, bytes.
    """
    value, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "bytes" or value >= 9.95 else f"{value:.1f} {unit}"


def _write_page(file: Path, pieces: Iterable[str]) -> None:
    with (
        replacing(file) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace") as page,
    ):
        page.writelines(pieces)


def _thumbnail_of(path: str | Path, box: Box | None) -> Thumbnail:
    path = Path(path)
    try:
        data = make_thumbnail(path, box)
    except UnreadableImage:
        missing = "cannot be read" if path.exists() else "is no longer there"
        return Thumbnail(shown(path.name), missing=missing)
    source = base64.b64encode(data).decode()
    return Thumbnail(shown(path.name), f"data:image/jpeg;base64,{source}")
