"""Runs the page of an index with uvicorn."""

import contextlib
import ipaddress
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from ggem_jax.retrieval.index.describing import open_filled
from ggem_jax.retrieval.page.app import make_app
from ggem_jax.retrieval.page.guard import LOOPBACK

PORT = 8000


def serve(
    index: Path | str,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    on_start: Callable[[str, int], None] = lambda url, images: None,
    **options: Any,
) -> None:
    """Serves the page of an index until the process is interrupted.

    The network is loaded in a thread of its own meanwhile. Beyond this machine (a host other than
    127.0.0.1, ::1 or localhost) everybody who reaches it sees the images: there is no password.

    Args:
        index: Folder of the index.
        host: Address to listen at; 0.0.0.0 is every address of this machine.
        port: Port to listen at; 0 takes a free one.
        on_start: Function that is called with the address of the page, and the number of images,
            once the page can be opened.
        **options: `weights`, `whitening`, `follow_links` and `max_megapixels` of `make_app`.

    Raises:
        IndexRefused: There is no index, it is empty, or damaged.
        ValueError: The host or port cannot be listened at.
    """
    opened = open_filled(index)
    beyond = not _is_loopback(host)
    hosts = {*LOOPBACK, host, *([socket.gethostname()] if beyond else [])}
    app = make_app(opened, hosts=hosts, any_address=beyond, **options)
    with _listen(host, port) as listening:
        name = f"[{host}]" if ":" in host else host
        url = f"http://{name}:{listening.getsockname()[1]}/"
        threading.Thread(target=_warm_up, args=(app.state.searcher,), daemon=True).start()
        config = uvicorn.Config(
            app, log_level="warning", server_header=False, limit_concurrency=200, lifespan="off"
        )
        on_start(url, len(opened))
        uvicorn.Server(config).run(sockets=[listening])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"the page cannot listen at port {port} of {host} ({reason}): choose another with"
            " --port or --host"
        ) from None


def _warm_up(searcher: Any) -> None:
    """What goes wrong here is said when an image is searched for."""
    with contextlib.suppress(ValueError, ImportError, OSError, RuntimeError):
        searcher.warm_up()
