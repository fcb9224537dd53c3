"""Turning tokens into text while they arrive.

Only text that later tokens cannot change is handed out, and the pieces add up to the whole text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from bevatron.chat.answer_parts import overlap

CONTEXT = 8  # tokens before the new ones that a window begins with: decoders look at neighbours
WINDOW = 48  # tokens that are decoded at a time, unless they end in half a character
UNKNOWN = "\ufffd"  # what decoders give for bytes that are no character (yet)
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Vocabulary:
    """What the text of a token stream depends on, found once for a tokenizer.

    Attributes:
        byte_tokens: tokens for single bytes of tokenizers with byte fallback. Such a decoder judges
            a run of them as a whole, so its text is certain only when the run has ended.
        special: tokens that are left out of the text if they are not kept.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.byte_tokens: frozenset[int] = frozenset()
        self.special: frozenset[int] = frozenset()
        if tokenizer is None:  # a checkpoint without one: no text
            return
        added = tokenizer.get_added_tokens_decoder().items()
        self.special = frozenset(i for i, token in added if token.special)
        decoder = json.dumps(json.loads(tokenizer.to_str()).get("decoder"))
        if "ByteFallback" in decoder:
            vocabulary = tokenizer.get_vocab(with_added_tokens=False)
            self.byte_tokens = frozenset(i for t, i in vocabulary.items() if _BYTE.fullmatch(t))

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool, kept: frozenset[int] = frozenset()
    ) -> str:
        """The text; without special tokens, if so, but those that are kept."""
        if self.tokenizer is None:
            return ""
        if skip_special_tokens and kept:
            ids = [i for i in ids if i in kept or i not in self.special]
            skip_special_tokens = False
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


class TextStream:
    """The text that new tokens add to their prompt's. (Decoding them alone may lose a space.)"""

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt: Sequence[int],
        stop_strings: Sequence[str] = (),
        skip_special_tokens: bool = True,
        kept_tokens: frozenset[int] = frozenset(),
    ) -> None:
        self.vocabulary, self.skip, self.kept = vocabulary, skip_special_tokens, kept_tokens
        self.stops, self.held, self.stopped = tuple(stop_strings), "", False
        self.window, self.before = self._window(prompt)  # `before`: its text that was given out

    def _window(self, prompt: Sequence[int]) -> tuple[list[int], str]:
        """The end of the prompt that new tokens are decoded with: one that has text, if any has,
        and nothing if that ends in half a character."""
        n = CONTEXT
        while not (text := self._decode(prompt[-n:])) and n < len(prompt):
            n *= 4
        return ([], "") if text.endswith(UNKNOWN) else (list(prompt[-n:]), text)

    def add(self, token: int) -> str:
        """The text that became certain with this token. After a stop string came, `stopped` is
        true, and nothing follows."""
        self.window.append(token)
        if token in self.vocabulary.byte_tokens:
            return ""
        text = self._decode(self.window)
        if not self.vocabulary.byte_tokens and text.endswith(UNKNOWN):
            text = text[:-1]  # the last one may be half a character; those before it are not
        return self._release(self._take(text))

    def finish(self) -> str:
        """What was held back when the answer ends, half a character included."""
        if self.stopped:
            return ""
        text = self._release(self._take(self._decode(self.window)))
        rest, self.held = self.held, ""
        return text if self.stopped else text + rest

    def _decode(self, ids: Sequence[int]) -> str:
        return self.vocabulary.decode(ids, self.skip, self.kept)

    def _take(self, text: str) -> str:
        """The part of the window's text that is new; the window moves on once it is long."""
        new = text[len(self.before) :]
        self.before = text
        if len(self.window) > WINDOW:
            shorter = self.window[-CONTEXT:]
            before = self._decode(shorter)
            if before and before.endswith(text[-1:]) and not before.endswith(UNKNOWN):
                self.window, self.before = shorter, before
        return new

    def _release(self, new: str) -> str:
        """Hold back what may begin a stop string; cut at the first one that is whole."""
        text = self.held + new
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]
