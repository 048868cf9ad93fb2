"""What every request passes first: its key, its origin, its size; and the count and the log line of its answer."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ahn.serving.errors import RequestError
from ahn.serving.metrics import Metrics
from ahn.serving.settings import ServeSettings

_log = logging.getLogger("ahn.serving.requests")
_LOCAL = ("localhost", "127.0.0.1", "[::1]", "testserver")
_OPEN = ("/", "/health", "/page")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]


class Gate:
    """A layer of ASGI around the application.

    Args:
        app: The application.
        settings: Key, origins and sizes.
        metrics: Where answers are counted.
    """

    def __init__(self, app: Any, settings: ServeSettings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, taken, is_whole = time.monotonic(), 500, 0, False

        async def counted_send(message: Scope) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        async def bounded_receive() -> Scope:
            nonlocal taken, is_whole
            if is_whole:
                return await receive()
            left = start + self._settings.max_seconds - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), left)
            except asyncio.TimeoutError:
                raise RequestError(f"the body took longer than {self._settings.max_seconds} seconds", 408) from None
            is_whole = not message.get("more_body", False)
            taken += len(message.get("body", b""))
            if taken > self._settings.max_body_bytes:
                raise self._too_large()
            return message

        try:
            self._check(scope)
            await self._app(scope, bounded_receive, counted_send)
        except RequestError as error:
            await _send_error(counted_send, error)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", None) or "other"
            self._metrics.requests.labels(path, str(status)).inc()
            took = round(time.monotonic() - start, 4)
            line = {"method": scope["method"], "path": path, "status": status, "seconds": took, "bytes_in": taken}
            _log.info(json.dumps(line))

    def _check(self, scope: Scope) -> None:
        """Checks what can be seen before the body: key, origin and size."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self._check_site(headers)
        path = scope["path"]
        is_open = path in _OPEN or path.startswith("/page/")
        key = self._settings.api_key
        if key is not None and not is_open and scope["method"] != "OPTIONS":
            token = headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(token.encode(), key.encode()):
                raise RequestError("the API key is missing or wrong", 401, code="invalid_api_key")
        if int(headers.get("content-length") or 0) > self._settings.max_body_bytes:
            raise self._too_large()

    def _check_site(self, headers: dict[str, str]) -> None:
        """Without a key, only this machine's own programs and pages may ask; a page of any site could try to."""
        host, origin = headers.get("host", ""), headers.get("origin")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._settings.api_key is None and name not in (*_LOCAL, self._settings.host):
            raise RequestError(f"without a key this server answers on its own machine only, not as {host!r}", 403)
        if origin is None or origin in self._settings.cors_origin or origin.partition("://")[2] == host:
            return
        if "*" not in self._settings.cors_origin:
            raise RequestError(f"pages of {origin} may not ask this server; allow them by --cors-origin", 403)

    def _too_large(self) -> RequestError:
        most = self._settings.max_body_bytes
        return RequestError(f"the request is larger than {most:,} bytes", 413, code="too_large")


async def _send_error(send: Send, error: RequestError) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
