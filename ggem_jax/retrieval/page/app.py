"""The routes of the page and of its JSON API.

| route | result |
| --- | --- |
| `GET /` | the page |
| `GET /images?k=&seed=` | k images of the index, drawn at random |
| `GET /thumbnail/{id}`, `/image/{id}` | a JPEG file of at most 320 or 1,280 pixels |
| `GET /similar/{id}?k=&rerank=&neighbors=&box=` | images like one of the index, or a part of it |
| `GET /words?text=&k=&rerank=&neighbors=` | images like words, of an index with the pooling clip |
| `POST /search` | images like an upload: fields `image`, and as needed the same, and `preview` |

A box is x1,y1,x2,y2 in pixels. An error is `{"error": sentence}` with a status of 4xx, or 501 where
a package is not installed.
"""

import base64
import json
import random
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ggem_jax.files.images import UnreadableImage
from ggem_jax.files.pages import render_page
from ggem_jax.files.thumbnails import THUMBNAIL, make_thumbnail
from ggem_jax.retrieval.index.folder import shown
from ggem_jax.retrieval.index.index import Index
from ggem_jax.retrieval.index.text_search import Encode
from ggem_jax.retrieval.methods import choose_method
from ggem_jax.retrieval.page.guard import LOOPBACK, Guard
from ggem_jax.retrieval.page.originals import Originals
from ggem_jax.retrieval.page.searcher import Describe, Searcher, Wanted

STATIC = Path(__file__).parent / "static"
PREVIEW = 1280  # longer side of the query on the page, pixels
MAX_BYTES = 64 * 2**20  # size of an upload
MAX_MEGAPIXELS = 80.0  # size of an uploaded image
MAX_RESULTS = 500
MAX_LETTERS = 1000
RERANKERS = ("none", "superglobal", "aqe", "alpha-qe")  # dba does n² work for each query


def make_app(
    index: Index | Path | str,
    *,
    describe: Describe | None = None,
    encode: Encode | None = None,
    weights: str | None = None,
    whitening: str | None = None,
    hosts: Collection[str] = LOOPBACK,
    any_address: bool = False,
    follow_links: bool = False,
    max_bytes: int = MAX_BYTES,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> Starlette:
    """Returns the page of an index with its JSON API, as an ASGI application.

    Only images of the index are served, by their ids, and only from inside its root folder. The
    application keeps the index as it was when it was opened.

    Args:
        index: The index, or its folder.
        describe: Function from an image, `(h, w, 3)` uint8, to its vector `(d,)`; None takes the
            network that the index was made with, which is loaded when it is first needed.
        encode: Function from m texts to unit vectors `(m, d)`; None takes the text tower in the
            same file of weights, where the index was made with the pooling "clip".
        weights, whitening: Where the files that the index was made with are now; None takes their
            old places.
        hosts: Names and addresses by which browsers may call the page. Others are refused, as a
            domain of somebody else may point to this machine.
        any_address: Whether browsers may also call it by any numeric address.
        follow_links: Whether images behind links that leave the root are shown too.
        max_bytes: Size of the largest request, bytes.
        max_megapixels: Size of the largest image that is uploaded.

    Returns:
        The application; `app.state.searcher` is its `Searcher`.

    Raises:
        IndexRefused: There is no index, or it is damaged.
    """
    opened = index if isinstance(index, Index) else Index.open(index)
    originals = Originals(opened, follow_links=follow_links)
    searcher = Searcher(
        opened, originals, describe=describe, encode=encode, weights=weights, whitening=whitening
    )
    routes = _Routes(searcher, originals, max_megapixels)
    app = Starlette(
        routes=[
            Route("/", routes.page),
            Route("/page.css", lambda request: _static("page.css", "text/css")),
            Route("/page.js", lambda request: _static("page.js", "text/javascript")),
            Route("/images", routes.images),
            Route("/thumbnail/{id:int}", routes.thumbnail),
            Route("/image/{id:int}", routes.image),
            Route("/similar/{id:int}", routes.similar),
            Route("/words", routes.words),
            Route("/search", routes.search, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, hosts=hosts, any_address=any_address, max_bytes=max_bytes)],
        exception_handlers={
            HTTPException: lambda request, error: _error(error.status_code, error.detail),
            UnreadableImage: lambda request, error: _error(422, str(error)),
            ValueError: lambda request, error: _error(400, str(error)),
            ModuleNotFoundError: lambda request, error: _error(501, str(error)),
        },
    )
    app.state.searcher = searcher
    return app


class _Routes:
    """The functions behind the routes. Those without `async` run in threads."""

    def __init__(self, searcher: Searcher, originals: Originals, max_megapixels: float):
        self.searcher, self.originals = searcher, originals
        self.max_megapixels = max_megapixels

    def page(self, request: Request) -> Response:
        index = self.searcher.index
        pieces = render_page(
            STATIC / "page.html",
            name=shown(index.folder.absolute().name),
            root=shown(str(index.root)),
            count=len(index),
            rerankers=RERANKERS,
            takes_words=self.searcher.takes_words,
        )
        return Response("".join(pieces), media_type="text/html")

    def images(self, request: Request) -> Response:
        total = len(self.searcher.index)
        k = min(_whole(request.query_params, "k", 60, most=MAX_RESULTS), total)
        seed = _whole(request.query_params, "seed", 0, least=0, most=2**53)
        ids = random.Random(seed).sample(range(total), k)
        return _json({"total": total, "images": self.searcher.list_images(ids)})

    def thumbnail(self, request: Request) -> Response:
        return self._jpeg(request, THUMBNAIL)

    def image(self, request: Request) -> Response:
        return self._jpeg(request, PREVIEW)

    def similar(self, request: Request) -> Response:
        number, wanted = self._id(request), _wanted(request.query_params)
        box = _box(request.query_params)
        if box is None:
            return _json(self.searcher.search_entry(number, wanted))
        return _json(self.searcher.search_part(number, box, wanted))

    def words(self, request: Request) -> Response:
        words = request.query_params.get("text", "")
        if len(words) > MAX_LETTERS:
            raise HTTPException(400, f"text must have at most {MAX_LETTERS} letters")
        return _json(self.searcher.search_words(words, _wanted(request.query_params)))

    async def search(self, request: Request) -> Response:
        async with request.form(max_files=1, max_fields=16, max_part_size=4096) as form:
            texts = {name: value for name, value in form.items() if isinstance(value, str)}
            wanted, box = _wanted(texts), _box(texts)
            file = form.get("image")
            if not isinstance(file, UploadFile):
                raise HTTPException(400, "the field image must be a file")
            data = await file.read()
        found = await run_in_threadpool(
            self._search_upload, data, wanted, box, texts.get("preview") == "1"
        )
        return _json(found)

    def _search_upload(
        self, data: bytes, wanted: Wanted, box: list[float] | None, preview: bool
    ) -> dict[str, Any]:
        limit = self.max_megapixels
        found = self.searcher.search_upload(data, wanted, box=box, max_megapixels=limit)
        if preview:  # the browser may not know the format
            with self.originals.decoding:
                small = make_thumbnail(data, longest=PREVIEW, max_megapixels=limit)
            found["preview"] = f"data:image/jpeg;base64,{base64.b64encode(small).decode()}"
        return found

    def _jpeg(self, request: Request, longest: int) -> Response:
        number = self._id(request)
        try:
            tag = f'"{self.originals.stamp(number)}"'
            headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
            if request.headers.get("if-none-match") == tag:
                return Response(status_code=304, headers=headers)
            data = self.originals.thumbnail(number, longest)
        except UnreadableImage as error:
            raise HTTPException(404, str(error)) from None
        return Response(data, media_type="image/jpeg", headers=headers)

    def _id(self, request: Request) -> int:
        number, total = request.path_params["id"], len(self.searcher.index)
        if number >= total:
            raise HTTPException(404, f"there is no image {number}: the index holds {total}")
        return number


def _wanted(values: Mapping[str, str]) -> Wanted:
    name = values.get("rerank", "none")
    if name not in RERANKERS:
        raise HTTPException(400, f"rerank must be one of {', '.join(RERANKERS)}, not {name!r}")
    options = {}
    if name != "none" and values.get("neighbors"):
        options["neighbors"] = _whole(values, "neighbors", 9, most=MAX_RESULTS)
    return Wanted(_whole(values, "k", 60, most=MAX_RESULTS), choose_method(name, **options))


def _whole(values: Mapping[str, str], name: str, default: int, *, least: int = 1, most: int) -> int:
    text = values.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise HTTPException(
            400, f"{name} must be a whole number from {least} to {most}, not {text[:40]!r}"
        )
    return int(text)


def _box(values: Mapping[str, str]) -> list[float] | None:
    text = values.get("box", "")
    if not text:
        return None
    try:
        x1, y1, x2, y2 = (float(each) for each in text.split(","))
    except ValueError:
        raise HTTPException(400, f"box must be x1,y1,x2,y2 in pixels, not {text[:80]!r}") from None
    return [x1, y1, x2, y2]


def _static(name: str, kind: str) -> Response:
    headers = {"Cache-Control": "no-cache"}
    return Response((STATIC / name).read_text(), media_type=kind, headers=headers)


def _json(values: Any, status: int = 200) -> Response:
    """JSON in ASCII: names that are not UTF-8 are escaped."""
    headers = {"Cache-Control": "no-store"}
    return Response(json.dumps(values), status, media_type="application/json", headers=headers)


def _error(status: int, sentence: str) -> Response:
    return _json({"error": sentence}, status)
