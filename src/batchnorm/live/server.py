"""Serving the page: the HTML, a stream of new data, one layer's percentiles, and the page as a file."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from batchnorm.live.access import AccessGuard
from batchnorm.live.log_feed import Feed, Message, PagePosition
from batchnorm.live.page import policy, render, saved

HOST = "127.0.0.1"
PORT = 8421
_PORTS = 40  # number of ports tried from PORT on
_POLL = 0.25  # seconds between two reads of the file: a step is on the page well within 2 s
_BEAT = 1.0  # seconds between two messages without new data, which show that the server runs


def serve(feed: Feed, listener: socket.socket, token: str, ready: Callable[[], None] = lambda: None) -> None:
    """Serve the page until Ctrl-C, then raise KeyboardInterrupt again.

    Args:
        feed: The feed of the log.
        listener: A listening socket, from ``listen``.
        token: A secret text that every address of the page must contain.
        ready: Called when the server is about to answer requests.
    """
    # a long log is indexed while the browser starts
    threading.Thread(target=feed.news, args=(PagePosition(),), daemon=True).start()
    closing = threading.Event()
    app = application(feed, port=listener.getsockname()[1], token=token, closing=closing)
    _Server(_config(app), closing, ready).run(sockets=[listener])


def listen(port: int = 0) -> socket.socket:
    """A listening socket on 127.0.0.1 at ``port``; 0 means 8421, or the next free port.

    Raises:
        OSError: If the port, or each of 40 ports from 8421 on, is in use or not permitted.
    """
    for candidate in [port] if port else range(PORT, PORT + _PORTS):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections
        try:
            listener.bind((HOST, candidate))
            listener.listen()
        except OSError as error:
            listener.close()
            if error.errno not in {errno.EADDRINUSE, errno.EACCES}:
                raise
        else:
            return listener
    wanted = f"port {port}" if port else f"a port from {PORT} to {PORT + _PORTS - 1}"
    raise OSError(
        f"expected {wanted} of {HOST} to be free, got a port in use or not permitted. Choose another with --port N."
    )


def application(feed: Feed, *, port: int, token: str, closing: threading.Event | None = None) -> AccessGuard:
    """The application with its access guard; streams end when ``closing`` is set."""
    stop = closing or threading.Event()
    html, csp = render(feed.name), policy()

    async def page(_: Request) -> Response:
        return HTMLResponse(html, headers={"Content-Security-Policy": csp})

    async def events(request: Request) -> Response:
        position = request.headers.get("last-event-id") or request.query_params.get("since", "")
        return StreamingResponse(_stream(feed, PagePosition.parse(position), stop), media_type="text/event-stream")

    async def layer(request: Request) -> Response:
        return await asyncio.to_thread(_layer, feed, request.query_params)

    async def file(_: Request) -> Response:
        return await asyncio.to_thread(_file, feed)

    routes = {"/": page, "/events": events, "/layer": layer, "/page.html": file}
    return AccessGuard(Starlette(routes=[Route(path, call) for path, call in routes.items()]), port=port, token=token)


async def _stream(feed: Feed, position: PagePosition, closing: threading.Event) -> AsyncIterator[str]:
    """Messages as server-sent events: new data at once, else a ``beat`` each second."""
    yield "retry: 500\n\n"
    last_sent = 0.0
    while not closing.is_set():
        message = await asyncio.to_thread(feed.news, position)
        if message.kind != "beat" or time.monotonic() - last_sent >= _BEAT:
            last_sent, position = time.monotonic(), message.seen
            yield as_event(message)
        await asyncio.sleep(_POLL)


def as_event(message: Message) -> str:
    """A message as a server-sent event."""
    identity = f"id: {message.seen}\n" if message.seen.identity else ""
    return f"event: {message.kind}\n{identity}data: {message.text}\n\n"


def _layer(feed: Feed, query: QueryParams) -> Response:
    try:
        data = feed.layer(int(query.get("index", "")), first=max(0, int(query.get("first", "0"))))
    except ModuleNotFoundError as error:
        data = {"problem": f"Percentiles need {error.name}, not installed here. Run: pip install {error.name}"}
    except OSError:
        data = {"problem": "The log is gone from its folder, or cannot be opened."}
    except (ValueError, IndexError):
        return JSONResponse({"problem": "Expected the number of a layer of a readable log. Reload the page."}, 404)
    return JSONResponse(data)


def _file(feed: Feed) -> Response:
    try:
        html = saved(feed)
    except (OSError, ValueError) as error:
        return Response(f"The log cannot be read now: {error}", 503, media_type="text/plain")
    return HTMLResponse(html, headers={"Content-Disposition": 'attachment; filename="batchnorm-watch.html"'})


def _config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_level="error",
        access_log=False,  # addresses contain the token
        server_header=False,
        timeout_graceful_shutdown=2,
    )


class _Server(uvicorn.Server):
    """A server that ends its streams when it shuts down; otherwise the shutdown would wait for them."""

    def __init__(self, config: uvicorn.Config, closing: threading.Event, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._closing, self._ready = closing, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._closing.set()
        super().handle_exit(sig, frame)
