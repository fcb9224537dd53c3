"""A server that answers what a test wants: HTML, half an answer, an error. The page is real."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from bevatron.generate.server.chat_page import files

# Pieces of text, deltas, or {"error": ...}; then it is finished, if it ends.
Answer = Iterable[str | dict[str, Any]]


@dataclass
class StandIn:
    """`answer` says what the next request gets; a `Response` is sent as it is."""

    answer: Callable[[dict[str, Any]], Answer | Response] = lambda body: ["Hello", "."]
    name: str = "stand/in"
    chat: bool = True
    key: str = ""
    pause: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0  # streams that ended because the client went away
    url: str = ""

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def keyed(request: Request, call: Any) -> Response:
            given = request.headers.get("authorization")
            if request.url.path.startswith("/v1") and self.key and given != f"Bearer {self.key}":
                error = {"message": "this server asks for an API key", "code": "invalid_api_key"}
                return JSONResponse({"error": error}, 401)
            return await call(request)

        @app.get("/v1/models")
        def models() -> dict[str, Any]:
            entry = {"id": self.name, "object": "model", "chat": self.chat, "context": 8192}
            return {"object": "list", "data": [entry]}

        @app.post("/v1/{path:path}")
        async def complete(request: Request) -> Response:
            body = await request.json()
            self.asked.append(body)
            answer = self.answer(body)
            if isinstance(answer, Response):
                return answer
            return StreamingResponse(self.stream(body, answer), media_type="text/event-stream")

        for route, file in files().items():
            app.add_route(route, lambda request, file=file: file)
        return app

    async def stream(self, body: dict[str, Any], answer: Answer) -> AsyncIterator[str]:
        chat, sent = "messages" in body, 0
        try:
            for piece in answer:
                sent += 1
                if isinstance(piece, dict) and "error" in piece:
                    yield f"data: {json.dumps(piece)}\n\n"
                    return
                delta = piece if isinstance(piece, dict) else {"content": piece}
                choice = {"delta": delta} if chat else {"text": piece}
                yield f"data: {json.dumps({'choices': [{'index': 0, **choice}]})}\n\n"
                await asyncio.sleep(self.pause)
            end = {"index": 0, "finish_reason": "stop", **({"delta": {}} if chat else {"text": ""})}
            usage = {"prompt_tokens": 11, "completion_tokens": sent}
            yield f"data: {json.dumps({'choices': [end]})}\n\n"
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise

    def start(self) -> uvicorn.Server:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server = uvicorn.Server(uvicorn.Config(self.app(), log_level="warning"))
        threading.Thread(target=server.run, args=([listener],), daemon=True).start()
        return server
