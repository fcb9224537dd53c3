"""The server's application and its routes: which function answers which URL."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response

import bevatron
from bevatron.generate.server import chat_page
from bevatron.generate.server.answering import encode_event, respond
from bevatron.generate.server.chat_completions import ChatCompletion
from bevatron.generate.server.error_answers import Refusal
from bevatron.generate.server.metrics import CONTENT_TYPE
from bevatron.generate.server.request_body import read
from bevatron.generate.server.request_fields import ChatRequest, CompletionRequest, LoadRequest
from bevatron.generate.server.request_limits import App, Gate
from bevatron.generate.server.served_model import Serving
from bevatron.generate.server.text_completions import Completion

BODIES: tuple[type[BaseModel], ...] = (CompletionRequest, ChatRequest, LoadRequest)
SCHEMAS = "#/components/schemas/{model}"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERRORS = {
    400: "The request is not valid; the error names the field",
    401: "The API key is missing or wrong",
    403: "The Host header is not this server's",
    404: "No such model",
    408: "The request did not arrive in time",
    413: "The request is too large",
    415: "The request is not JSON",
    429: "The queue is full; see Retry-After",
    500: "A fault of the server",
    503: "The server is shutting down, or has not enough memory for the request",
}


def make_app(serving: Serving) -> tuple[App, Gate]:
    """The ASGI application, and the gate in it, which knows what is under way."""
    app = FastAPI(
        title="Bevatron",
        version=bevatron.__version__,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    for route in (_models, _generating, _state, _page):
        route(app, serving)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _refused_by_routing)
    app.add_exception_handler(Exception, _failed)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    gate = Gate(app, serving.settings, serving.metrics)
    app.state.gate = gate
    if not serving.settings.origins:
        return gate, gate
    crossing = CORSMiddleware(
        gate,
        allow_origins=list(serving.settings.origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"],
    )
    return crossing, gate


def _models(app: FastAPI, serving: Serving) -> None:
    model = {
        "id": serving.settings.name,
        "object": "model",
        "created": serving.created,
        "owned_by": "bevatron",
        "context": serving.context,
        "chat": serving.template is not None,
        "sampling": serving.defaults,
    }

    @app.get("/v1/models", responses=_errors(401, 403))
    async def list_models() -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{model_id:path}", responses=_errors(401, 403, 404))
    async def retrieve_model(model_id: str) -> Response:
        serving.check_model(model_id)
        return JSONResponse(model)


def _generating(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/completions", **_takes(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        """Continue prompts."""
        asked = await read(request, CompletionRequest)
        return await respond(Completion, serving, request, asked)

    @app.post("/v1/chat/completions", **_takes(ChatRequest))
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        asked = await read(request, ChatRequest)
        return await respond(ChatCompletion, serving, request, asked)

    @app.post("/load_model", **_takes(LoadRequest))
    async def load_model(request: Request) -> Response:
        """`transformers chat` asks for this first: the model has been loaded."""
        serving.check_model((await read(request, LoadRequest)).model)
        ready = encode_event({"status": "ready", "cached": True})
        return Response(ready, media_type="text/event-stream")


def _state(app: FastAPI, serving: Serving) -> None:
    @app.get("/health", responses=_errors(403, 503))
    async def health() -> Response:
        """200 while requests are taken."""
        stopping = app.state.gate.draining
        status = {"status": "stopping" if stopping else "ok"}
        return JSONResponse(status, 503 if stopping else 200)

    @app.get("/metrics", response_class=PlainTextResponse, responses=_errors(401, 403))
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(serving.metrics.text(serving.engine.stats()), media_type=CONTENT_TYPE)


def _page(app: FastAPI, serving: Serving) -> None:
    def add(address: str, file: Response) -> None:
        @app.get(address, include_in_schema=False)
        async def send() -> Response:
            return file

    for address, file in chat_page.files().items():
        add(address, file)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": {"$ref": SCHEMAS.format(model="Error")}}}
    return {s: {"description": ERRORS[s], "content": content} for s in statuses}


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    """The body is read by us, so the schema is told of it here."""
    schema = {"schema": {"$ref": SCHEMAS.format(model=kind.__name__)}}
    body = {"required": True, "content": {"application/json": schema}}
    events: dict[str, Any] = {"text/event-stream": {}}
    found = {"application/json": {"schema": {"type": "object"}}, **events}
    return {
        "openapi_extra": {"requestBody": body},
        "responses": {200: {"description": "The answer", "content": found}, **_errors(*ERRORS)},
    }


def _described(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        described = FastAPI.openapi(app)
        pairs = [(kind, "validation") for kind in BODIES]
        _, made = models_json_schema(pairs, ref_template=SCHEMAS)  # type: ignore[arg-type]
        for operations in described["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI's, which is never sent
        schemas = {**made.get("$defs", {}), "Error": ERROR}
        described["components"] = {"schemas": schemas}
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = described
    return app.openapi_schema


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error.body(), error.status, error.headers)


async def _refused_by_routing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: f"there is no {request.url.path[:200]} here", 405: "this route has other methods"}
    message = known.get(error.status_code, str(error.detail))
    refusal = Refusal(error.status_code, message, headers=error.headers)
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


async def _failed(request: Request, error: Exception) -> Response:
    logging.getLogger("bevatron.server").error("a request failed", exc_info=error)
    refusal = Refusal(500, "the server failed; its log says how")
    return JSONResponse(refusal.body(), 500)
