"""uvicorn's HTTP connection, with a time limit for clients and a limit on their number.

The limits guard against headers that never end, clients that never read their answer, and more
connections than the process can hold.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from bevatron.generate.server.error_answers import JSON_TYPE, Refusal

MAX_CONNECTIONS = 1000


class Connection(H11Protocol):
    """`timeout_s` is set by `limited`: for a request's headers from their first byte (or from the
    start of the connection), and for a client that does not read."""

    timeout_s = 30.0
    headers_timer: asyncio.TimerHandle | None = None
    reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(Refusal(503, "too many connections", headers={"Retry-After": "5"}))
            return
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._await_headers()  # a part of a request's headers
        else:
            self._cancel_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_headers()
        self._cancel_reader()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.reader_timer = self.loop.call_later(self.timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel_reader()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # closing would wait for the client to read
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        self._refuse(Refusal(400, "this is not a valid HTTP request", code="invalid_http"))

    def _await_headers(self) -> None:
        if self.headers_timer is None:
            self.headers_timer = self.loop.call_later(self.timeout_s, self._headers_late)

    def _headers_late(self) -> None:
        message = f"no whole request within {self.timeout_s:g} s"
        self._refuse(Refusal(408, message, code="request_timeout"))

    def _refuse(self, refusal: Refusal) -> None:
        """Answer below the application, if nothing has been answered yet, and close."""
        if self.conn.our_state is h11.IDLE or self.conn.our_state is h11.SEND_RESPONSE:
            body = refusal.encoded()
            headers = [("content-type", JSON_TYPE), ("content-length", str(len(body)))]
            headers += [*refusal.headers.items(), ("connection", "close")]
            events: list[Any] = [h11.Response(status_code=refusal.status, headers=headers)]
            events += [h11.Data(data=body), h11.EndOfMessage()]
            try:
                self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            except h11.LocalProtocolError:
                self.transport.abort()
                return
        self.transport.close()

    def _cancel_headers(self) -> None:
        if self.headers_timer is not None:
            self.headers_timer.cancel()
            self.headers_timer = None

    def _cancel_reader(self) -> None:
        if self.reader_timer is not None:
            self.reader_timer.cancel()
            self.reader_timer = None


def limited(timeout_s: float) -> type[Connection]:
    return type("Connection", (Connection,), {"timeout_s": timeout_s})
