"""Access: only programs on this machine that have the page's address with its token may read the page.

The server listens on 127.0.0.1 only. A foreign web page could still make the user's browser send requests, under a host
name that points here (DNS rebinding), so the Host header must name this server. Other users of the machine could send
requests too, so every address needs the token. Pages of other origins get no permissions.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from urllib.parse import parse_qs

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",  # the address contains the token
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_BAD_HOST = "Expected the address that batchnorm watch printed, got another host name. Open that address."
_NO_ACCESS = "Expected the token of this page, got none or another. Open the address that batchnorm watch printed."


class AccessGuard:
    """An application behind checks of host and token, with security headers on every response.

    Args:
        app: The application that answers allowed requests.
        port: The port of the server; the Host header must name it.
        token: A secret text that every address must contain as ``?token=``.
    """

    def __init__(self, app: ASGIApp, *, port: int, token: str) -> None:
        self.app = app
        self._hosts = {f"{name}:{port}".encode() for name in ("127.0.0.1", "localhost")}
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        answer = self._refusal(scope) or self.app
        return await answer(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        hosts = [value.lower() for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return PlainTextResponse(_BAD_HOST, 400)
        token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if not hmac.compare_digest(token.encode(errors="replace"), self._token):
            return PlainTextResponse(_NO_ACCESS, 403)
        return None


def _with_headers(send: Send) -> Send:
    """Add our headers to a response that lacks them."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *_missing(message["headers"])]
        await send(message)

    return send_with_headers


def _missing(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    names = {name.lower() for name, _ in headers}
    ours = ((name.lower().encode(), value.encode()) for name, value in _HEADERS.items())
    return [(name, value) for name, value in ours if name not in names]
