"""Text to token ids: by `tokenizers`, or by tiktoken where its ids are proven to be the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from unicodedata import is_normalized

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bevatron.data.fast_bpe import FastBpe, Unproven, translate
from bevatron.errors import BevatronError

Engine = Literal["auto", "tiktoken", "tokenizers"]
ENGINES: tuple[Engine, ...] = ("auto", "tiktoken", "tokenizers")
WORTH = 16 << 20  # bytes of text; below, the proof takes longer than it saves
INSTALL = 'pip install "bevatron[fast]"'

_WORDS = "The quick brown fox, 'twas HE'LL I'm we've don't DON'T 'S 'ſ naïve Straße ǅungla"
_SPACES = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    " \n ",
    "\n\n\n",
    "a  b",
    "a \n b",
    " \t\n\r x",
    "   x",
]
_SPACES += [
    "\u00a0a\u00a0",
    "\u3000あ\u3000",
    "a\u2028b\u2029c",
    "\u0085\u0085x",
    "\u200b\u200dx",
    "\x1c\x1dx",
]
_NUMBERS = [
    "1",
    "12",
    "123",
    "1234567",
    "a1b22c333",
    "3.14e-10",
    " 42  7",
    "½²Ⅷ一二三",
    "٣٤٥ 1٣",
    "v1.2.3",
]
_MARKS = ["e\u0301 n\u0303 a\u030a\u0301", "\u0301\u0302", "का कि", "ก็ กํา", "각 각", "Å Å \u212b"]
_SYMBOLS = [
    "!!!",
    "...",
    "a!b?c",
    "--- ===",
    "#!/bin/sh\n",
    "<|x|> <| |>",
    "\\n\\t",
    "x->y && z||w;\n",
]
_SYMBOLS += [
    "🎻🎻",
    "👩‍👩‍👧‍👦 🇩🇪",
    "a\ufe0fb",
    "\ufffd\ufffe",
    "\U000e0001",
    "\ud7ff\ue000",
    "\U0010ffff\x00\x7f",
]
_CODE = [
    "def f(x):\n    return x  # y\n\n\n",
    "if (a) {\r\n\t\tb();\r\n}\r\n",
    "x" * 300,
    " " * 300 + "x",
]
STRANGE = (
    _WORDS,
    *_WORDS.split(),
    *_SPACES,
    *_NUMBERS,
    *_MARKS,
    *_SYMBOLS,
    *_CODE,
    "\n" * 300,
    "é" * 99,
)


@dataclass
class Encoder:
    """Encodes texts by `tokenizers`, in parallel unless TOKENIZERS_PARALLELISM is off."""

    tokenizer: Tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], list[int]]:
        """The ids of all texts, one after the other, and how many of each."""
        ids = [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = [len(one) for one in ids]
        return np.fromiter(chain.from_iterable(ids), np.uint32, sum(lengths)), lengths


class FastEncoder(Encoder):
    """The same by tiktoken, except for texts that may hold an added token or an unsafe character,
    which go through `tokenizers`."""

    def __init__(self, tokenizer: Tokenizer, bpe: FastBpe) -> None:
        from tiktoken import Encoding

        super().__init__(tokenizer)
        raw = [token.encode("latin-1") for token in bpe.tokens]
        self._core = Encoding(
            "fast",
            pat_str=bpe.pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(raw)},
            special_tokens={},
        )
        self._ids = np.array(bpe.ids, dtype=np.uint32)
        self._sizes = np.array([len(t) for t in raw], dtype=np.int64)
        self._needles = bpe.needles
        self._nfc = bpe.nfc
        self._unsafe = re.compile(bpe.unsafe) if bpe.unsafe else None

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], list[int]]:
        ranks = [self._ranks(text) for text in texts]
        found: Iterator[NDArray[np.uint32]] = iter(())
        if slow := [text for text, one in zip(texts, ranks, strict=True) if one is None]:
            flat, lengths = super().encode(slow)
            found = iter(np.split(flat, np.cumsum(lengths)[:-1]))
        ids = [self._ids[one] if one is not None else next(found) for one in ranks]
        whole = np.concatenate(ids) if ids else np.zeros(0, np.uint32)
        return whole, [len(one) for one in ids]

    def _ranks(self, text: str) -> NDArray[np.uint32] | None:
        """tiktoken's ids; None for a text that is none of its business."""
        if any(needle in text for needle in self._needles):
            return None
        if not text.isascii() and not self._takes(text):
            return None
        try:
            ranks = self._core.encode_to_numpy(text, disallowed_special=())
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of its regular expressions' limits
                raise
            return None
        # What the pattern does not match, tiktoken drops and tokenizers keeps
        size = len(text) if text.isascii() else len(text.encode())
        return ranks if int(self._sizes[ranks].sum()) == size else None

    def _takes(self, text: str) -> bool:
        if self._nfc and not is_normalized("NFC", text):
            return False
        return self._unsafe is None or self._unsafe.search(text) is None


@dataclass(frozen=True)
class Choice:
    """Which engine encodes, and why. `bpe` is what tiktoken needs."""

    engine: str
    why: str
    bpe: FastBpe | None = None

    def describe(self) -> dict[str, str]:
        """For store.json."""
        return {"name": self.engine, "why": self.why}

    def encoder(self, tokenizer: Tokenizer) -> Encoder:
        return Encoder(tokenizer) if self.bpe is None else FastEncoder(tokenizer, self.bpe)


def choose(
    engine: Engine, file: Path, tokenizer: Tokenizer, probes: Iterable[str], nbytes: int | None
) -> Choice:
    """The engine for a job.

    Args:
        file: the tokenizer.json that `tokenizer` was read from.
        probes: some of the text itself, for the last comparison.
        nbytes: how much text there is, None if unknown; a little is not worth the proof.
    Raises BevatronError if tiktoken is asked for and not proven to give the same ids.
    """
    if engine not in ENGINES:
        raise BevatronError(f"the engine is {engine!r}, expected one of {', '.join(ENGINES)}")
    if engine == "tokenizers":
        return Choice("tokenizers", "asked for")
    if engine == "auto" and nbytes is not None and nbytes < WORTH:
        return Choice("tokenizers", f"under {WORTH >> 20} MB of text")
    try:
        bpe = _prove(file, tokenizer, probes)
    except Unproven as error:
        if engine == "tiktoken":
            raise BevatronError(
                f"{file}: tiktoken is not known to give the same ids as tokenizers: {error}; use "
                "the engine auto or tokenizers"
            ) from error
        return Choice("tokenizers", str(error))
    return Choice("tiktoken", "proven to give the same ids as tokenizers", bpe)


def _prove(file: Path, tokenizer: Tokenizer, probes: Iterable[str]) -> FastBpe:
    try:
        import tiktoken  # noqa: F401
    except ImportError:
        raise Unproven(f"tiktoken is not installed ({INSTALL})") from None
    data: Any = json.loads(file.read_bytes())
    bpe = translate(data)
    try:
        fast = FastEncoder(tokenizer, bpe)
    except (ValueError, TypeError, KeyError) as error:
        raise Unproven(f"tiktoken does not take it ({error})") from error
    texts = [t for t in STRANGE if _is_text(t)]
    texts += [f"{a}{b}" for a in texts[::3] for b in texts[1::5]]
    added = [str(token["content"]) for token in data.get("added_tokens") or ()]
    texts += [f"x{token} {token}y" for token in added[:100]]
    texts += probes
    expected, actual = Encoder(tokenizer).encode(texts), fast.encode(texts)
    if expected[1] != actual[1] or not np.array_equal(expected[0], actual[0]):
        raise Unproven("its ids differ on the comparison's text")
    return bpe


def _is_text(text: str) -> bool:
    """Python spells surrogates, which no text holds."""
    return not any("\ud800" <= c <= "\udfff" for c in text)
