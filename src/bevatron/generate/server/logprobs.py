"""Single tokens as text and bytes, and their log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from bevatron.data.fast_bpe import byte_alphabet
from bevatron.generate.request import TokenLogprob

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """What a token stands for on its own: bytes, which need not be whole characters."""

    def __init__(self, tokenizer: Any) -> None:
        described = json.loads(tokenizer.to_str())
        decoder = json.dumps(described.get("decoder"))
        self._tokenizer = tokenizer
        added = described.get("added_tokens", ())
        self._added = {t["id"] for t in added}
        self.special = frozenset(t["id"] for t in added if t["special"])
        self._alphabet = byte_alphabet() if '"ByteLevel"' in decoder else {}
        self._fallback = '"ByteFallback"' in decoder
        self._known: dict[int, bytes] = {}

    def raw(self, token: int) -> bytes:
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._find(token)
        return found

    def text(self, token: int) -> str:
        return self.raw(token).decode("utf-8", errors="replace")

    def _find(self, token: int) -> bytes:
        piece = self._tokenizer.id_to_token(token)
        if piece is None:  # the model's vocabulary may be padded
            return b""
        if token in self._added:
            return str(piece).encode()
        if self._alphabet and all(character in self._alphabet for character in piece):
            return bytes(self._alphabet[character] for character in piece)
        if self._fallback:
            if byte := _BYTE.fullmatch(piece):
                return bytes([int(byte[1], 16)])
            return str(piece).replace("\u2581", " ").encode()
        return str(self._tokenizer.decode([token], skip_special_tokens=False)).encode()


class Offsets:
    """Where in a choice's text its tokens begin, counted in characters: a token that completes a
    character begins where that does, and one that is not shown takes no room."""

    def __init__(self, texts: TokenTexts, echoed: str, skip_special_tokens: bool) -> None:
        self._texts, self._echoed, self._skip = texts, echoed, skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def take(self, token: int) -> int:
        before = self._at
        if token in self._texts.special:
            text = self._texts.text(token)
            hidden = self._skip or before < len(self._echoed)
            if hidden and not self._echoed.startswith(text, before):
                return before
        raw = self._texts.raw(token)
        if self._decoder.getstate()[0] and raw and raw[0] & 0xC0 != 0x80:
            # The rest of a character never came.
            self._at = before = before + len(self._decoder.decode(b"", final=True))
        self._at += len(self._decoder.decode(raw))
        return before


def for_chat(found: Sequence[TokenLogprob], texts: TokenTexts) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat completion."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = texts.raw(token)
        text = data.decode("utf-8", errors="replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}

    return [
        {**one(f.token, f.logprob), "top_logprobs": [one(*pair) for pair in f.top]} for f in found
    ]


def for_completion(
    tokens: Sequence[int],
    found: Sequence[TokenLogprob | None],
    texts: TokenTexts,
    offsets: Offsets,
) -> dict[str, Any]:
    """`logprobs` of a completion. A token's own logprob is in its `top_logprobs` even where it is
    not among the likeliest."""
    return {
        "tokens": [texts.text(token) for token in tokens],
        "token_logprobs": [None if f is None else _finite(f.logprob) for f in found],
        "top_logprobs": [None if f is None else _top(f, texts) for f in found],
        "text_offset": [offsets.take(token) for token in tokens],
    }


def _top(found: TokenLogprob, texts: TokenTexts) -> dict[str, float]:
    """Two tokens may read the same, such as two halves of characters: the likelier one stays."""
    top: dict[str, float] = {}
    for token, logprob in (*found.top, (found.token, found.logprob)):
        top.setdefault(texts.text(token), _finite(logprob))
    return top


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what is impossible."""
    return logprob if math.isfinite(logprob) else -9999.0
