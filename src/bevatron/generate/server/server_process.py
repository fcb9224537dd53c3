"""`bevatron serve`: the process around the application, from binding a port to the last answer."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from bevatron.bridge.open_weights import open_weights
from bevatron.errors import BevatronError, UnexpectedError
from bevatron.generate.engine import Engine
from bevatron.generate.sampling_options import in_words
from bevatron.generate.server.http_connection import MAX_CONNECTIONS, limited
from bevatron.generate.server.request_limits import App, Gate
from bevatron.generate.server.routes import make_app
from bevatron.generate.server.served_model import Serving
from bevatron.generate.server.server_settings import LOOPBACK, Settings

Say = Callable[[str], None]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def serve(ckpt: str, settings: Settings, say: Say = _say, **engine_options: Any) -> None:
    """Serve until a signal ends it. `engine_options`: as `Engine.open` takes them.

    Raises BevatronError if the port cannot be had or the checkpoint cannot be opened."""
    with bind(settings.host, settings.port) as sock:  # before the minutes that a model may take
        port = sock.getsockname()[1]
        if settings.host not in LOOPBACK and settings.api_key is None:
            say(f"warning: {settings.host} is open to others, and no --api-key is set")
        open_weights(ckpt)  # what is missing or damaged is said at once
        say(f"loading {settings.name}")
        with Engine.open(ckpt, **engine_options) as engine:
            app, gate = make_app(Serving(engine, settings))
            server = Server(app, gate, engine, settings, say)
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            sock.listen(MAX_CONNECTIONS)  # who reads the line below may connect at once
            say(f"serving {settings.name} at http://{host}:{port} (API at /v1, Ctrl-C ends)")
            if engine.max_tokens < engine.context:
                here = f"{engine.max_tokens:,} tokens, not the model's {engine.context:,}"
                say(f"a conversation has room for {here}: the KV cache of more does not fit")
            say(f"requests that do not say how are sampled so: {in_words(engine.sampling)}")
            asyncio.run(server.serve(sockets=[sock]))
            if engine.failure is not None:
                raise UnexpectedError(f"the engine failed: {engine.failure}")


class Server(uvicorn.Server):
    """The first signal lets running answers end and refuses new requests; a second one ends all at
    once, with status 128 + its number."""

    def __init__(
        self, app: App, gate: Gate, engine: Engine, settings: Settings, say: Say = _say
    ) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().__init__(
            uvicorn.Config(
                app,
                http=limited(settings.timeout_s),
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=min(15, max(1, int(settings.timeout_s))),
                timeout_graceful_shutdown=3,
            )
        )
        self.gate, self.engine, self.settings, self.say = gate, engine, settings, say
        self.ends_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.ends_at is not None:
            os._exit(128 + sig)
        self.ends_at = time.monotonic() + self.settings.grace_s
        self.gate.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self.engine.failure is not None:
            self.should_exit = True
        if self.ends_at is not None and not self.should_exit:
            if self.gate.active and time.monotonic() < self.ends_at:
                return False
            if self.gate.active:
                self.say(f"ending {self.gate.active} requests that still run")
                await asyncio.to_thread(self.engine.close)
            self.should_exit = True
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = 2 * MAX_CONNECTIONS if most == resource.RLIM_INFINITY else most
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2 * MAX_CONNECTIONS, wanted), most))
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BevatronError(
            f"cannot listen on {host} port {port}: {reason}; choose another --host or --port"
        ) from error
    return sock
