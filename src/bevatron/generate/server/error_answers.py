"""The server's error answers: all of them have the shape of OpenAI's error object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError

JSON_TYPE = "application/json"


class Refusal(Exception):
    """An answer with an error status.

    Attributes:
        param: the field of the request that is at fault, such as `messages.0.role`.
        code: for programs, such as `context_length_exceeded`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else BAD)
        code = self.code or HTTPStatus(self.status).phrase.lower().replace(" ", "_")
        error = {"message": self.message, "type": kind, "param": self.param, "code": code}
        return {"error": error}

    def encoded(self) -> bytes:
        return json.dumps(self.body()).encode()


BAD = "invalid_request_error"
UNSUPPORTED = "unsupported"  # a code, and the kind of a finding
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def bad(message: str, param: str | None = None, code: str = "invalid_value") -> Refusal:
    """A request that can be put right by who sent it."""
    return Refusal(400, message, param=param, code=code)


def stopping() -> Refusal:
    headers = {"Retry-After": "5", "Connection": "close"}
    message = "the server is shutting down; try again in a while"
    return Refusal(503, message, code="shutting_down", headers=headers)


def gone() -> Refusal:
    """Nobody reads it; the status is the one that access logs show for this."""
    return Refusal(499, "the client left", code="client_left")


def invalid(error: ValidationError) -> Refusal:
    """The first thing that is wrong with a request's fields, by name."""
    found = error.errors(include_url=False, include_context=False)
    first = found[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return bad(f"{param}: is not supported by this server; leave it out", param, UNSUPPORTED)
    if first["type"] == UNSUPPORTED:
        return bad(f"{param}: {first['msg']}", param, UNSUPPORTED)
    if first["type"] == "missing":
        return bad(f"{param}: is missing", param, "missing")
    message = str(first["msg"]).removeprefix("Value error, ")
    value = first["input"]
    if isinstance(value, str | int | float | bool | None):
        message += f" (found {_short(value)})"
    more = f"; {len(found) - 1} more like it" if len(found) > 1 else ""
    return bad(f"{param or 'the request'}: {message}{more}", param)


def _short(value: object) -> str:
    try:
        text = json.dumps(value)
    except ValueError:  # an integer of thousands of digits
        return "a very long number"
    return text if len(text) <= 60 else f"{text[:57]}..."
