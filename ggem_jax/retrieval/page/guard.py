"""What every request has to pass, and what every response says: a guard around the page.

A page of another site may send requests to this machine, and a name of its own domain may come to
point here (DNS rebinding). So the host of a request must be one of ours, its origin the same, and
its fetch metadata must not say that another site asks. The responses allow nothing but our own
files.
"""

import ipaddress
import json
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """An ASGI application that refuses requests of other sites with 403.

    Args:
        app: The application that gets all other requests.
        hosts: Names and addresses by which requests may call this machine.
        any_address: Whether they may call it by any numeric address. No domain can be such.
        max_bytes: Size of the largest request, bytes.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: Collection[str] = LOOPBACK,
        any_address: bool = False,
        *,
        max_bytes: int,
    ):
        self.app, self.any_address, self.max_bytes = app, any_address, max_bytes
        self.hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        left = self.max_bytes

        async def receive_within_limit() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"the request has more than {self.max_bytes} bytes")
            return message

        if refusal := self._refuse(Headers(scope=scope), scope["path"]):
            text = json.dumps({"error": refusal})
            response = Response(text, 403, media_type="application/json")
            await response(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive_within_limit, send_with_headers)

    def _refuse(self, headers: Headers, path: str) -> str:
        """Returns why a request is refused, or an empty text."""
        named = headers.getlist("host")
        if len(named) != 1 or not self._is_ours(named[0]):
            return f"the host {', '.join(named) or 'of the request'} is not this page's"
        if any(_place(origin) != named[0].lower() for origin in headers.getlist("origin")):
            return "the request comes from another origin"
        navigates = path == "/" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not navigates:
            return "the request comes from another site"
        return ""

    def _is_ours(self, host: str) -> bool:
        try:
            parts = urlsplit(f"//{host}")
            name, _ = parts.hostname or "", parts.port
        except ValueError:
            return False
        if parts.netloc != host or "@" in host:
            return False
        if name in self.hosts:
            return True
        try:
            return self.any_address and bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def _place(origin: str) -> str:
    """`127.0.0.1:8000` of `http://127.0.0.1:8000`, and an empty text of `null`."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
