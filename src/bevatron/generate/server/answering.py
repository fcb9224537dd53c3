"""Answering a request with the engine: submitting it, waiting, streaming, and cancelling it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from bevatron.errors import BevatronError
from bevatron.generate.answer_stream import Stream
from bevatron.generate.engine import Engine
from bevatron.generate.request import NoRoom, Piece, QueueFull, Request
from bevatron.generate.server.error_answers import Refusal, bad, gone, stopping
from bevatron.generate.server.metrics import Metrics
from bevatron.generate.server.request_limits import Receive, Scope, Send

if TYPE_CHECKING:
    from bevatron.generate.server.served_model import Serving

Result = TypeVar("Result")
LAST_EVENT = b"data: [DONE]\n\n"


class Answers:
    """The engine's answers to one HTTP request: one stream per prompt and choice."""

    def __init__(self, engine: Engine, metrics: Metrics, requests: Sequence[Request]) -> None:
        """Submit all, or none. Raises Refusal."""
        self.metrics, self.began = metrics, time.monotonic()
        self.streams: list[Stream] = []
        self.left = False  # whether the client is known to have gone
        try:
            for request in requests:
                self.streams.append(engine.submit(request))
        except QueueFull as error:
            self.cancel()
            headers = {"Retry-After": str(min(60, max(1, round(metrics.duration))))}
            raise Refusal(429, str(error), code="queue_full", headers=headers) from error
        except BevatronError as error:
            self.cancel()
            if engine.failure is not None:
                raise Refusal(503, "the engine failed", code="engine_failed") from error
            raise bad(str(error)) from error

    def cancel(self) -> None:
        """Free what they hold of the cache. Without effect on those that have ended."""
        for stream in self.streams:
            stream.cancel()

    async def pieces(self, index: int) -> AsyncIterator[Piece]:
        """Of one stream, timed. Raises Refusal if the engine does not end it."""
        last = None
        try:
            async for piece in self.streams[index]:
                now = time.monotonic()
                if last is None:
                    self.metrics.first_token.observe(now - self.began)
                else:
                    self.metrics.next_token.observe(now - last)
                last = now
                if piece.finish_reason == "cancelled":
                    raise gone() if self.left else stopping()
                yield piece
        except NoRoom as error:
            raise Refusal(503, str(error), code="out_of_memory") from error
        except BevatronError as error:
            raise Refusal(500, "the engine failed", code="engine_failed") from error
        self.metrics.took(time.monotonic() - self.began)

    async def merged(self) -> AsyncIterator[tuple[int, Piece]]:
        """Of all streams, as they come."""
        if len(self.streams) == 1:
            async with aclosing(self.pieces(0)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    yield 0, piece
            return
        ready: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

        async def pump(index: int) -> None:
            try:
                async for piece in self.pieces(index):
                    ready.put_nowait((index, piece))
                ready.put_nowait((index, None))
            except Exception as error:
                ready.put_nowait((index, error))

        pumps = [asyncio.create_task(pump(i)) for i in range(len(self.streams))]
        try:
            left = len(pumps)
            while left:
                index, found = await ready.get()
                if found is None:
                    left -= 1
                elif isinstance(found, Exception):
                    raise found
                else:
                    yield index, found
        finally:
            for task in pumps:
                task.cancel()

    async def whole(self, http: HttpRequest) -> list[list[Piece]]:
        """All pieces of all streams, unless the client leaves before that."""
        collected: list[list[Piece]] = [[] for _ in self.streams]

        async def collect() -> None:
            async with aclosing(self.merged()) as merged:  # type: ignore[type-var]
                async for index, piece in merged:
                    collected[index].append(piece)

        async with self.watching(http.receive):
            await collect()
        return collected

    def watching(self, receive: Receive) -> Watch:
        return Watch(self, receive)


class Watch:
    """Cancels answers as soon as their client leaves, and in any case at the end."""

    def __init__(self, answers: Answers, receive: Receive) -> None:
        self.answers, self.receive = answers, receive

    async def __aenter__(self) -> None:
        self.task = asyncio.create_task(self._wait())

    async def __aexit__(self, *exc: object) -> None:
        self.answers.cancel()
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task

    async def _wait(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            continue
        self.answers.left = True
        self.answers.metrics.disconnects.inc()
        self.answers.cancel()


class EventStream(Response):
    """Server-sent events. `events` yields what goes after `data: `; a failure becomes one too,
    because the status has been sent by then."""

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, events: Callable[[], AsyncIterator[Any]]) -> None:
        self.answers, self.events = answers, events
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def give(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async with self.answers.watching(receive):
            start = {"status": 200, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            try:
                async with aclosing(self.events()) as events:  # type: ignore[type-var]
                    async for event in events:
                        await give(encode_event(event))
                await give(LAST_EVENT)
            except Refusal as refusal:
                await give(encode_event(refusal.body()))
            await give(b"", more=False)


def encode_event(event: Any) -> bytes:
    return b"data: %s\n\n" % json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


async def beside(function: Callable[..., Result], *arguments: Any) -> Result:
    """Run what takes a while in a thread, so that others' streams go on."""
    running: Awaitable[Result] = asyncio.to_thread(function, *arguments)
    return await running


class Reply(Protocol):
    """What a route makes of the engine's answers."""

    requests: list[Request]

    def whole(self, answers: Answers, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """The body, of the pieces of every stream."""

    def events(self, answers: Answers) -> AsyncIterator[Any]:
        """The same in parts."""


async def respond(
    reply: Callable[[Serving, Any], Reply], serving: Serving, http: HttpRequest, asked: Any
) -> Response:
    """Answer the body `asked` of a request, whole or as a stream."""
    serving.check_model(asked.model)
    made = await beside(reply, serving, asked)
    answers = Answers(serving.engine, serving.metrics, made.requests)
    if asked.stream:
        return EventStream(answers, lambda: made.events(answers))
    return JSONResponse(made.whole(answers, await answers.whole(http)))
