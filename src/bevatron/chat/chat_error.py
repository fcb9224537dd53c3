"""What is wrong with a chat: its template, its messages or its tools."""

from __future__ import annotations

from bevatron.errors import BevatronError


class ChatError(BevatronError):
    """A chat template or messages that cannot be used; the message is safe to show to a client."""
