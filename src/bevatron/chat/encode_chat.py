"""Token ids of a rendered chat, in which special tokens that a user wrote stay text.

`<|eot_id|>` in a message is seven characters and two brackets, not the end of a turn; otherwise a
user, or a page that the model is to summarise, could write turns of the system. So text becomes a
special token only where the template wrote its first character. To find these places, the chat is
rendered a second time, with a private character in place of the first character of every special
token that users wrote. This works even when a template cuts something out of a message and so joins
the halves of a special token.

Templates of reasoning models look for `</think>` in the assistant's messages. Where `</think>` is a
special token it stays one in these messages, because the model itself wrote it as a token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bevatron.chat.answer_parts import THINK, THINK_END
from bevatron.chat.chat_messages import REASONING, ChatError

PRIVATE = 0x10F000  # where the stand-ins begin
BREAK = "\U0010fffd\U0010fffc\U0010fffd"  # stands for a token of the template


@dataclass(frozen=True)
class EncodedChat:
    """Token ids, with what is needed to find them in the text.

    Attributes:
        encoding: of `tokenizers`; where `tokens` is given, of a text that has BREAK for each.
        break_id: that of BREAK.
        tokens: what the template wrote there: (id, characters).
    """

    encoding: Any
    break_id: int | None = None
    tokens: tuple[tuple[int, int], ...] = ()

    @property
    def ids(self) -> list[int]:
        left = iter(self.tokens)
        return [next(left)[0] if id == self.break_id else id for id in self.encoding.ids]

    @cached_property
    def places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each token the first character of the text and the one after the last, [tokens]."""
        found = np.array(self.encoding.offsets, dtype=np.int64).reshape(-1, 2)
        if not self.tokens:
            return found[:, 0], found[:, 1]
        breaks = np.array(self.encoding.ids) == self.break_id
        longer = np.zeros(len(found), dtype=np.int64)
        longer[breaks] = [length - len(BREAK) for _, length in self.tokens]
        shift = np.cumsum(longer)
        return found[:, 0] + shift - longer, found[:, 1] + shift

    def overlapping(self, spans: Sequence[tuple[int, int]]) -> list[bool]:
        """Which tokens have a character in one of the spans (from, to) of the text."""
        starts, ends = self.places
        inside = np.zeros(len(starts), dtype=bool)
        for begin, end in spans:
            inside |= (ends > begin) & (starts < end)
        return [bool(one) for one in inside]

    def is_inside(self, character: int) -> bool:
        """Whether a token has this character and the one before it."""
        starts, ends = self.places
        return bool(((starts < character) & (character < ends)).any())


class Encoder:
    """Of one tokenizer for one template, of which it gets all literal texts."""

    def __init__(self, tokenizer: Any, literals: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        text = "\0".join(literals)
        # Added tokens that are not special are the template's if it writes them, as transformers
        # sees it; the rest (such as runs of spaces) are a part of text.
        self.control = frozenset(
            token.content
            for token in added
            if token.content
            and (token.special or (token.content.strip() and token.content in text))
        )
        self.literals = tuple(text for text in literals if len(text) > 1)
        self.thoughts = tuple(t for t in (THINK, THINK_END) if t in self.control and t in text)
        longest_first = sorted(self.control, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.starts = {token[0] for token in self.control}

    @classmethod
    def cached(cls, tokenizer: Any, literals: tuple[str, ...]) -> Encoder:
        return _cached(tokenizer, literals)

    def encode(self, chat: Any, render: Callable[[Any], str]) -> EncodedChat:
        """That of `render(chat)`, `chat` being a tuple of messages, tools and plain data."""
        text = render(chat)
        written = "".join(_strings(chat))
        if not any(start in written for start in self.starts):
            return self._encoding(text)
        marks = self._marks(written + text)
        marked = self._marked(chat, render, text, marks)
        if marked is None:
            if self.pattern.search(written):
                raise ChatError(
                    "a message has the text of a special token, and the chat template looks into "
                    "messages in a way that makes it impossible to keep the two apart"
                )
            return self._encoding(text)
        private = set(marks.values())
        pieces, tokens, at = [], [], 0
        for match in self.pattern.finditer(text):
            if marked[match.start()] in private:
                continue
            pieces.append(text[at : match.start()])
            tokens.append(match.group())
            at = match.end()
        pieces.append(text[at:])
        if not any(self.pattern.search(piece) for piece in pieces):
            return self._encoding(text)
        return self._joined(pieces, tokens)

    def _marks(self, seen: str) -> dict[str, str]:
        free = (chr(code) for code in range(PRIVATE, PRIVATE + 0xF00) if chr(code) not in seen)
        return {start: next(free) for start in sorted(self.starts)}

    def _marked(
        self, chat: Any, render: Callable[[Any], str], text: str, marks: dict[str, str]
    ) -> str | None:
        """`text` with stand-ins where users wrote the first character of a special token, or None
        if the template treats messages differently with them."""
        back = str.maketrans({mark: start for start, mark in marks.items()})
        # Some templates look for texts such as </think> in messages: second try, without those.
        looked_for = [
            re.escape(literal)
            for literal in self.literals
            if literal[0] in marks and not any(t.startswith(literal) for t in self.control)
        ]
        everywhere = "|".join(map(re.escape, marks))
        elsewhere = f"(?!{'|'.join(looked_for) or '(?!)'})(?:{everywhere})"
        thoughts = "|".join(map(re.escape, self.thoughts)) or "(?!)"
        for pattern in (everywhere, elsewhere):
            other = partial(re.compile(pattern).sub, lambda m: marks[m.group()])
            said = partial(
                re.compile(f"(?!{thoughts})(?:{pattern})").sub, lambda m: marks[m.group()]
            )
            try:
                marked = render(_changed_chat(chat, said, other))
            except ChatError:
                continue
            if marked.translate(back) == text:
                return marked
        return None

    def _encoding(self, text: str) -> EncodedChat:
        return EncodedChat(self.tokenizer.encode(text, add_special_tokens=False))

    def _joined(self, pieces: list[str], tokens: list[str]) -> EncodedChat:
        """Pieces of text with tokens between them, encoded in one go: each text as it is encoded
        beside a special token."""
        if any(BREAK in piece for piece in pieces):
            raise ChatError("a message has characters that are reserved for inner use")
        plain = _without_special_tokens(self.tokenizer, self.control)
        encoding = plain.encode(BREAK.join(pieces), add_special_tokens=False)
        written = tuple((self.tokenizer.token_to_id(token), len(token)) for token in tokens)
        return EncodedChat(encoding, plain.token_to_id(BREAK), written)


@lru_cache(maxsize=8)
def _cached(tokenizer: Any, literals: tuple[str, ...]) -> Encoder:
    return Encoder(tokenizer, literals)


@lru_cache(maxsize=4)
def _without_special_tokens(tokenizer: Any, control: frozenset[str]) -> Any:
    """A copy to which `control` is text, and BREAK a token."""
    from tokenizers import AddedToken, Tokenizer

    raw = json.loads(tokenizer.to_str())
    for token in raw["added_tokens"]:
        token["special"] = token["special"] or token["content"] in control
    copy = Tokenizer.from_str(json.dumps(raw))
    copy.encode_special_tokens = True  # the library's name for: special tokens are text
    copy.add_tokens([AddedToken(BREAK, normalized=False, special=False)])
    return copy


def _strings(value: Any) -> list[str]:
    """All texts in plain data, keys among them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [s for pair in value.items() for part in pair for s in _strings(part)]
    return [s for item in value for s in _strings(item)] if isinstance(value, list | tuple) else []


def _changed_chat(chat: Any, said: Callable[[str], str], other: Callable[[str], str]) -> Any:
    """A chat with all texts changed: by `said` what the assistant said, by `other` the rest."""
    messages, *rest = chat
    changed = [_changed(message, other) for message in messages]
    for message, made in zip(messages, changed, strict=True):
        if message["role"] == "assistant":
            for key in ("content", *REASONING):
                if isinstance(message.get(key), str):
                    made[key] = said(message[key])
    return (changed, *(_changed(value, other) for value in rest))


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Plain data with all texts changed, keys among them."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _changed(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_changed(item, change) for item in value)
    return value
