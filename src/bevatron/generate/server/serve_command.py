"""The verb `serve`, up to the point where FastAPI and uvicorn are imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from bevatron.errors import BevatronError
from bevatron.generate.sampling_options import model_name
from bevatron.generate.server.server_settings import LOOPBACK, Settings


def serve(
    ckpt: str,
    *,
    host: str,
    port: int,
    api_key: str | None,
    name: str | None,
    max_body: int,
    timeout_s: float,
    grace_s: float,
    hosts: Sequence[str],
    origins: Sequence[str],
    max_batch: int,
    queue: int,
    **engine_options: Any,
) -> None:
    """Serve until a signal ends it."""
    needed = ("fastapi", "uvicorn", "prometheus_client")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise BevatronError(
            f"serve needs {' and '.join(missing)}, not installed here; run "
            "`pip install 'bevatron[serve]'`"
        )
    if api_key is not None and not api_key.isascii():
        raise BevatronError("--api-key has characters outside of ASCII, which no HTTP header may")
    # Any page that a browser shows can send requests to loopback under a name of its own, so the
    # name is checked there. Elsewhere a server has names that it does not know of.
    local: tuple[str, ...] | None = (*LOOPBACK, *(h.lower() for h in hosts))
    if "*" in hosts or (host not in LOOPBACK and not hosts):
        local = None
    settings = Settings(
        name=name or model_name(ckpt),
        also=(ckpt, f"{ckpt}@main"),
        host=host,
        port=port,
        api_key=api_key or None,
        hosts=local,
        origins=tuple(origins),
        max_body=max_body,
        max_choices=min(Settings.max_choices, max_batch + queue),
        timeout_s=timeout_s,
        grace_s=grace_s,
    )
    from bevatron.generate.server.server_process import serve as start

    start(ckpt, settings, max_batch=max_batch, queue=queue, **engine_options)
