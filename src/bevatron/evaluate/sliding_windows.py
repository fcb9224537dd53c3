"""Sliding windows over a stream of tokens: each token but the first is scored exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bevatron.errors import BevatronError


class Window(NamedTuple):
    """Tokens `begin` to `end` of a stream, of which the last `scored` are scored; the others are
    their context."""

    begin: int
    end: int
    scored: int


def windows(tokens: int, seq_len: int, stride: int) -> Iterator[Window]:
    """The windows over a stream of so many tokens. The model sees at most `seq_len` of them at
    once: a window has one more, which is only predicted.

    Args:
        stride: how many tokens a window scores. At `seq_len` all that it predicts, which is the
            fastest; the smaller, the more context each token has, and the lower the loss. The last
            window is as long as the others where the stream is, so it scores fewer.
    """
    if seq_len < 1:
        raise BevatronError(f"the sequence length is {seq_len}, expected at least 1")
    if not 1 <= stride <= seq_len:
        raise BevatronError(
            f"the stride is {stride}, expected 1 to {seq_len}, the sequence length: a larger one "
            "would leave tokens out"
        )
    done = 1  # nothing comes before the first token
    while done < tokens:
        # The first window has no context to give up, so it scores all that it sees
        end = min(tokens, done + (stride if done > 1 else seq_len))
        yield Window(max(0, end - seq_len - 1), end, end - done)
        done = end
