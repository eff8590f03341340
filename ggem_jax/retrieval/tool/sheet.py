"""The results of a search as one HTML page that holds everything it shows: pictures are data URIs,
nothing is loaded and nothing runs.
"""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from ggem_jax.files.atomic import replacing
from ggem_jax.files.images import UnreadableImage, read_image
from ggem_jax.retrieval.index.folder import shown

THUMBNAIL = 320  # pixels of the longer side
QUALITY = 80  # of JPEG

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Hit:
    """One result. Ranks are from 1; before reranking there is none for what the first search did
    not reach.
    """

    path: str
    rank: int
    score: float
    rank_before: int | None
    score_before: float | None


@dataclass(frozen=True)
class Answer:
    """A query with its results, best first."""

    query: str
    box: Box | None
    hits: list[Hit]


def write_sheet(
    file: Path, answers: Sequence[Answer], *, root: Path, reranked: bool, facts: Mapping[str, str]
) -> None:
    """Writes the page; it appears when it is complete. `facts` stand at its head, results are
    pictures under `root`.
    """
    with (
        replacing(file) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace") as page,
    ):
        page.writelines(f"{line}\n" for line in _page(answers, root, reranked, facts))


def _page(
    answers: Sequence[Answer], root: Path, reranked: bool, facts: Mapping[str, str]
) -> Iterator[str]:
    title = f"Search: {len(answers)} {'query' if len(answers) == 1 else 'queries'}"
    yield (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>'
    )
    yield (
        '<meta name="viewport" content="width=device-width,'
        f' initial-scale=1">\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>'
    )
    yield "<dl>"
    yield from (
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(shown(fact))}</dd>"
        for name, fact in facts.items()
    )
    yield "</dl>"
    for answer in answers:
        yield '<section>\n<div class="query">'
        box = (
            ""
            if answer.box is None
            else f'<div class="ranks">box {", ".join(f"{each:g}" for each in answer.box)}</div>'
        )
        yield (
            f"{_picture(Path(answer.query), answer.box)}<h2>{html.escape(shown(answer.query))}</h2>{box}</div>\n<ol>"
        )
        yield from (_result(hit, root, reranked) for hit in answer.hits)
        yield "</ol>\n</section>"
    yield "</body>\n</html>"


def _result(hit: Hit, root: Path, reranked: bool) -> str:
    move, before = "", ""
    if reranked:
        move = _move(hit)
        before = '<span class="before">not among the candidates</span>'
        if hit.rank_before is not None:
            before = (
                f'<span class="before">before: {hit.rank_before}. at {hit.score_before:.4f}</span>'
            )
    ranks = (
        f'<div class="ranks"><b>{hit.rank}.</b><span'
        f' class="score">{hit.score:.4f}</span>{move}</div>'
    )
    return (
        f"<li>{_picture(root / hit.path)}{ranks}{before}<div"
        f' class="path">{html.escape(shown(hit.path))}</div></li>'
    )


def _move(hit: Hit) -> str:
    if hit.rank_before is None:
        return '<span class="up">new</span>'
    up = hit.rank_before - hit.rank
    if up == 0:
        return '<span class="same">=</span>'
    return f'<span class="up">▲ {up}</span>' if up > 0 else f'<span class="down">▼ {-up}</span>'


def _picture(path: Path, box: Box | None = None) -> str:
    """A thumbnail, or a place that says why there is none."""
    try:
        data = thumbnail(path, box)
    except UnreadableImage:
        why = "cannot be read" if path.exists() else "is no longer there"
        return f'<div class="frame missing">this picture {why}</div>'
    source = base64.b64encode(data).decode()
    return (
        f'<div class="frame"><img alt="{html.escape(shown(path.name))}"'
        f' src="data:image/jpeg;base64,{source}"></div>'
    )


def thumbnail(path: Path, box: Box | None = None) -> bytes:
    """A small JPEG, the right way up, with the box of a query drawn. Raises `UnreadableImage`."""
    picture = Image.fromarray(read_image(path))
    zoom = min(THUMBNAIL / max(picture.size), 1.0)
    small = picture.resize(
        (max(round(picture.width * zoom), 1), max(round(picture.height * zoom), 1)),
        Image.Resampling.LANCZOS,
    )
    if box is not None:
        corners = [
            min(max(each * zoom, 0), length - 1)
            for each, length in zip(box, small.size * 2, strict=True)
        ]
        ImageDraw.Draw(small).rectangle(corners, outline=(255, 214, 10), width=3)
    data = io.BytesIO()
    small.save(data, "JPEG", quality=QUALITY)
    return data.getvalue()


STYLE = """
:root { color-scheme: light dark; --soft: #8881; --line: #8884; --up: #187a3d; --down: #b3261e; --accent: #b58900 }
@media (prefers-color-scheme: dark) { :root { --up: #5bd08a; --down: #ff8a80; --accent: #ffd60a } }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 90rem; margin: 1.5rem auto; padding: 0 1.25rem }
h1 { font-size: 1.4rem; margin: 0 0 .5rem } h2 { font-size: .95rem; margin: .6rem 0 .2rem; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .85rem; margin: .5rem 0 }
dt { opacity: .65 } dd { margin: 0; overflow-wrap: anywhere }
section { display: grid; grid-template-columns: 15rem 1fr; gap: 1.25rem; border-top: 1px solid var(--line); padding: 1.25rem 0; margin-top: 1rem }
.query { position: sticky; top: 1rem; align-self: start; padding: .7rem }
.query { background: var(--soft); border-radius: 10px; border: 2px solid var(--accent) }
ol { list-style: none; margin: 0; padding: 0; display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .8rem }
li { background: var(--soft); border-radius: 10px; padding: .6rem; font-size: .82rem }
.frame { aspect-ratio: 4 / 3; display: grid; place-items: center; overflow: hidden; border-radius: 6px; background: var(--soft) }
.frame img { width: 100%; height: 100%; object-fit: contain; min-width: 0; min-height: 0 }
.missing { border: 1px dashed var(--line); opacity: .7; padding: .5rem; text-align: center }
.ranks { display: flex; gap: .6rem; align-items: baseline; margin-top: .4rem; font-variant-numeric: tabular-nums } .ranks b { font-size: 1.05rem }
.up, .down, .same { margin-left: auto; font-weight: 600 } .up { color: var(--up) } .down { color: var(--down) } .same { opacity: .5 }
.before { display: block; opacity: .65; font-variant-numeric: tabular-nums } .path { overflow-wrap: anywhere; margin-top: .2rem }
@media (max-width: 45rem) { section { grid-template-columns: 1fr } .query { position: static } }
@media print { .query { position: static } li { break-inside: avoid } }
"""
