"""Reading the JSON body of a request, and checking it before anything uses it."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from bevatron.checkpoint.strict_json import parse_object
from bevatron.errors import CheckpointError
from bevatron.generate.server.error_answers import Refusal, bad, gone, invalid

MAX_DEPTH = 64
SMALL = 64 << 10  # bytes; larger ones are parsed beside the event loop

Fields = TypeVar("Fields", bound=BaseModel)


async def read(request: Request, kind: type[Fields]) -> Fields:
    """The request's body as `kind`. Raises Refusal."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != "application/json":
        # Also keeps out web pages: a browser sends this type to strangers only after asking.
        raise Refusal(415, "send JSON, with the header `Content-Type: application/json`")
    try:
        data = await request.body()
    except ClientDisconnect:
        raise gone() from None
    if len(data) > SMALL:
        return await asyncio.to_thread(_parse, data, kind)
    return _parse(data, kind)


def _parse(data: bytes, kind: type[Fields]) -> Fields:
    try:
        value = parse_object(data, "the body")
    except CheckpointError as error:
        raise bad(str(error), code="invalid_json") from error
    if depth_over(value, MAX_DEPTH):
        raise bad(f"the body: nested more than {MAX_DEPTH} levels deep", code="invalid_json")
    if b"\\ud" in data or b"\\uD" in data:  # half of a surrogate pair is not text
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise bad("the body: holds half of a surrogate pair", code="invalid_json") from error
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise invalid(error) from error


def depth_over(value: Any, limit: int) -> bool:
    """Whether lists and objects lie in each other more than `limit` deep."""
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
