"""Checks on every request before the application sees it: Host, API key, size and time."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from bevatron.generate.server.error_answers import JSON_TYPE, Refusal, stopping
from bevatron.generate.server.metrics import Metrics
from bevatron.generate.server.server_settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

KEYED = ("/v1/", "/metrics", "/load_model")  # the page and /health need no key
SECURITY = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
SWALLOWED = 32 << 20  # bytes of a refused body that are read, so that the client reads the refusal


class Gate:
    """An ASGI application around another.

    Attributes:
        active: requests under way, the page's files and /metrics not counted.
        draining: from the first SIGTERM on, after which nothing new is generated.
    """

    def __init__(self, app: App, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.active = 0
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # A slash at the end names the same route, and HEAD asks for what GET gives but its body.
        headed = scope["method"] == "HEAD"
        scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        scope |= {"method": "GET"} if headed else {}
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *SECURITY]
            elif headed and message["type"] == "http.response.body":
                message["body"] = b""
            await send(message)

        counts = scope["method"] == "POST"
        self.active += counts
        try:
            if refusal := self._refusal(scope):
                await self._swallow(receive)
                await answer(refusal, watched)
            else:
                await self.app(scope, self._bounded(receive), watched)
        finally:
            self.active -= counts
            self.metrics.answered(_route(scope), status)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = dict(scope["headers"])
        if self.settings.hosts is not None:
            host = _host(headers.get(b"host", b""))
            if host not in self.settings.hosts:
                return Refusal(
                    403,
                    f"this server does not answer to the host {host[:100]!r}; start it with "
                    "--allow-host if it should",
                    code="host_not_allowed",
                )
        path = scope["path"]
        if self.settings.api_key is not None and path.startswith(KEYED):
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(key.strip(), self.settings.api_key.encode())
            if not (right and scheme.lower() == b"bearer"):
                return Refusal(
                    401,
                    "a valid API key is needed, as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if scope["method"] != "POST":
            return None
        if self.draining:
            return stopping()
        length = headers.get(b"content-length", b"0")
        return self._too_large() if int(length) > self.settings.max_body else None

    def _too_large(self) -> Refusal:
        limit = self.settings.max_body
        message = f"the request is larger than {limit:,} bytes, which is the limit (--max-body)"
        headers = {"Connection": "close"}
        return Refusal(413, message, code="request_too_large", headers=headers)

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` with limits on the bytes and the time of the request's body."""
        deadline = asyncio.get_running_loop().time() + self.settings.timeout_s
        size, whole = 0, False

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise Refusal(
                    408,
                    f"the request's body did not arrive within {self.settings.timeout_s:g} s",
                    code="request_timeout",
                    headers={"Connection": "close"},
                ) from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self.settings.max_body:
                if not whole:
                    await self._swallow(receive)
                raise self._too_large()
            return message

        return bounded

    async def _swallow(self, receive: Receive) -> None:
        """Read on for a moment: a connection closed on unread data loses the answer as well."""
        left, until = SWALLOWED, time.monotonic() + min(5.0, self.settings.timeout_s)
        while left > 0 and (seconds := until - time.monotonic()) > 0:
            try:
                message = await asyncio.wait_for(receive(), seconds)
            except TimeoutError:
                return
            left -= len(message.get("body", b""))
            if not message.get("more_body", False):
                return


async def answer(refusal: Refusal, send: Send) -> None:
    body = refusal.encoded()
    headers = [(b"content-type", JSON_TYPE.encode()), (b"content-length", b"%d" % len(body))]
    headers += [(k.lower().encode(), v.encode()) for k, v in refusal.headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _host(header: bytes) -> str:
    """Without the port; `[::1]:80` is ::1."""
    text = header.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/")


def _route(scope: Scope) -> str:
    """One of few words: a label of a metric must not be what a client chooses."""
    path = scope["path"]
    return next((r for r in (*ROUTES, "/load_model", "/openapi.json") if r == path), "other")
