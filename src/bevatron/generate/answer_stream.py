"""The answer to one request as it arrives, from the engine's thread to the waiting caller."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

from bevatron.errors import BevatronError
from bevatron.generate.request import Generation, Piece, Request, TokenLogprob


class Stream:
    """Iterate over its pieces, in a thread (which blocks) or with `async for`; one consumer.

    Attributes:
        request: that it answers.
        prompt_logprobs: there once the first piece is, if they were asked for.
    """

    def __init__(self, request: Request, cancel: Callable[[Stream], None]) -> None:
        self.request = request
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.greedy: list[bool] = []  # of a prompt that is scored alone: whether each was likeliest
        self._cancel = cancel
        self._changed = threading.Condition()
        self._pieces: deque[Piece] = deque()
        self._ended = False
        self._failure: BevatronError | None = None
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def cancel(self) -> None:
        """End the answer and free its part of the cache; the last piece says `cancelled`. Without
        effect on one that has ended."""
        self._cancel(self)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        with self._changed:
            while (piece := self._next()) is None:
                if self._ended:
                    raise StopIteration
                self._changed.wait()
            return piece

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        while True:
            with self._changed:
                if (piece := self._next()) is not None:
                    return piece
                if self._ended:
                    raise StopAsyncIteration
                loop = asyncio.get_running_loop()
                woken: asyncio.Future[None] = loop.create_future()
                self._waiter = loop, woken
            await woken

    def result(self) -> Generation:
        """Wait for all pieces, and put them together."""
        pieces = list(self)
        logprobs = [p for piece in pieces for p in piece.logprobs]
        return Generation(
            "".join(piece.text for piece in pieces),
            [token for piece in pieces for token in piece.tokens],
            pieces[-1].finish_reason or "cancelled",
            logprobs if self.request.logprobs is not None else None,
            self.prompt_logprobs,
        )

    def _next(self) -> Piece | None:
        if self._pieces:
            return self._pieces.popleft()
        if self._failure is not None:
            raise self._failure
        return None

    def put(self, piece: Piece) -> None:
        """As the engine: the next piece."""
        with self._changed:
            if self._ended:
                return
            self._pieces.append(piece)
            self._ended = piece.finish_reason is not None
            self._wake()

    def fail(self, error: BevatronError) -> None:
        """As the engine: there will be no more pieces, because of this."""
        with self._changed:
            self._failure, self._ended = error, True
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        if self._waiter is not None:
            (loop, woken), self._waiter = self._waiter, None
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(_set, woken)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
