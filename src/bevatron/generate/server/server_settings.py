"""The settings of `bevatron serve`."""

from __future__ import annotations

from dataclasses import dataclass

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        name: the model's, as clients see it; `also`: further names that mean it.
        hosts: what a request's Host header may say; None: anything.
        origins: web pages of which origins may call (CORS).
        max_body: bytes of a request.
        max_choices: answers to one request: its prompts times n.
        timeout_s: for a request to have arrived, and for a client to go on reading.
        grace_s: for running answers to end after SIGTERM.
    """

    name: str
    also: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    hosts: tuple[str, ...] | None = LOOPBACK
    origins: tuple[str, ...] = ()
    max_body: int = 8 << 20
    max_choices: int = 128
    timeout_s: float = 30.0
    grace_s: float = 30.0
