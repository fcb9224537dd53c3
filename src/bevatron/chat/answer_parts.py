"""Taking apart what a model says in a chat, while it arrives: thoughts, text and tool calls.

Streams and whole answers have the same reader, so both give the same message, however the text is
cut into pieces. The reader hands out what is certain. It holds back what may still become something
else: half of a marker, spaces that may be the last ones, and a tool call that is not complete.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from bevatron.chat.tool_calls import (
    PYTHON_TAG,
    TOOLCALL,
    TOOLCALL_END,
    ToolCall,
    parse_calls,
)

THINK, THINK_END = "<think>", "</think>"
CALLS = (PYTHON_TAG, TOOLCALL)
MARKERS = (THINK, THINK_END, PYTHON_TAG, TOOLCALL, TOOLCALL_END)
LONGEST = 1 << 18  # characters of a call; what is longer is text
PIECE = 1 << 14  # characters that are read at a time
TAIL = 8  # tokens of a prompt that may open the thoughts of its answer


@dataclass(frozen=True)
class Said:
    """A part of an answer, or all of it: `thoughts` come before the `text`."""

    text: str = ""
    thoughts: str = ""
    calls: tuple[ToolCall, ...] = ()

    def __add__(self, other: Said) -> Said:
        return Said(
            self.text + other.text, self.thoughts + other.thoughts, self.calls + other.calls
        )

    def __bool__(self) -> bool:
        return bool(self.text or self.thoughts or self.calls)


class AnswerReader:
    """Takes one answer apart.

    Args:
        tools: names of those that were offered; None if none were: then nothing is a call.
        thinking: whether the prompt has opened the thoughts, so that the answer begins in them.
        parallel: whether an answer may call several tools; otherwise the first call counts.
    """

    def __init__(
        self, tools: Collection[str] | None = None, *, thinking: bool = False, parallel: bool = True
    ) -> None:
        self.tools, self.parallel = tools, parallel
        self._held = ""  # what came and was not given out
        self._state = self._thoughts if thinking else self._beginning
        self._bare = True  # whether spaces here are not part of a text: at the edges of thoughts
        self._final = False
        self._spoken = False  # whether there was text
        self._closed = False  # whether no call in TOOLCALL can be whole any more
        self._edge = False  # whether nothing but spaces came since a call
        self._out = Said()
        self._called = False

    def add(self, text: str) -> Said:
        """What became certain with this piece."""
        self._held += text
        return self._read()

    def finish(self) -> Said:
        """What was held back when the answer ends."""
        self._final = True
        return self._read()

    @classmethod
    def whole(cls, text: str, *arguments: Any, **options: Any) -> Said:
        """All of an answer at once."""
        reader = cls(*arguments, **options)
        pieces = (text[at : at + PIECE] for at in range(0, len(text), PIECE))
        return sum(map(reader.add, pieces), Said()) + reader.finish()

    def _read(self) -> Said:
        while self._state():
            continue
        out, self._out = self._out, Said()
        return out

    # --- states: each takes what it can from what is held; whether another one may go on

    def _beginning(self) -> bool:
        """Nothing but spaces came: an answer begins with thoughts, or has none."""
        said = self._held.lstrip()
        if said.startswith(THINK):
            self._held = said.removeprefix(THINK)
            return self._go(self._thoughts)
        if THINK.startswith(said) and not self._final:
            return False
        self._bare = False
        return self._go(self._opening)

    def _thoughts(self) -> bool:
        """Up to their end, without the spaces around them."""
        said = self._held.lstrip() if self._bare else self._held
        thoughts, end, rest = said.partition(THINK_END)
        kept = len(thoughts.rstrip())
        if not end and not self._final:
            kept = len(thoughts[: len(thoughts) - overlap(thoughts, THINK_END)].rstrip())
        self._bare = self._bare and not kept
        self._out += Said(thoughts=thoughts[:kept])
        self._held = rest if end else said[kept:]
        if not end:
            return self._ends()
        self._bare = True
        return self._go(self._opening)

    def _opening(self) -> bool:
        """Before the first word of the text: all of it is a call, if it begins like one."""
        said = self._held.lstrip()
        if not said and not self._final:
            return False
        if self._bare:
            self._held = said
        if self.tools is not None and said.startswith(("{", "[")):
            return self._go(self._json)
        return self._go(self._text)

    def _json(self) -> bool:
        """A call that is all of the answer."""
        if len(self._held) <= LONGEST and not self._final:
            return False
        if len(self._held) <= LONGEST and self._calls(self._held):
            return self._ends()
        return self._go(self._text)

    def _text(self) -> bool:
        """Up to what marks a call; spaces are held back, as those beside a call are left out."""
        if self._edge and not self._spoken:
            self._held = self._held.lstrip()
        said, tag, at = self._held, "", len(self._held)
        if self.tools is not None:
            tags = CALLS[:1] if self._closed else CALLS
            found = [(said.find(tag), tag) for tag in tags if tag in said]
            at, tag = min(found, default=(at, tag))
            if not tag and not self._final:
                at -= max(overlap(said, tag) for tag in CALLS)
            if tag or self._edge or not self._final:
                at = len(said[:at].rstrip())
        self._out += Said(said[:at])
        self._held = said[at:]
        if at:
            self._spoken, self._edge = True, False
        if not tag:
            return self._ends()
        return self._go(self._tagged if tag == PYTHON_TAG else self._toolcall)

    def _tagged(self) -> bool:
        """Spaces, PYTHON_TAG, and the rest of the answer."""
        if len(self._held) <= LONGEST and not self._final:
            return False
        if len(self._held) <= LONGEST and self._calls(self._held):
            return self._ends()
        # One that comes later may be followed by nothing but a call.
        last = self._held.rfind(PYTHON_TAG) - self._held.index(PYTHON_TAG) - len(PYTHON_TAG)
        return self._is_text(PYTHON_TAG, last if self._final else 0)

    def _toolcall(self) -> bool:
        """Spaces, TOOLCALL, calls and TOOLCALL_END."""
        inside = self._held.lstrip()[len(TOOLCALL) :]
        if inside.lstrip()[:1] not in ("", "{", "["):
            return self._is_text(TOOLCALL)
        end = inside.find(TOOLCALL_END, 0, LONGEST)
        if end < 0:
            if not self._final and len(inside) < LONGEST:
                return False
            self._closed = self._closed or self._final
            return self._is_text(TOOLCALL)
        if self._calls(inside[:end]):
            self._held, self._edge = inside[end + len(TOOLCALL_END) :], True
            return self._go(self._text)
        # One that was opened later may be what is closed there.
        return self._is_text(TOOLCALL, inside.rfind(TOOLCALL, 0, end))

    # --- steps

    def _go(self, state: Any) -> bool:
        self._state = state
        return True

    def _ends(self) -> bool:
        if self._final:
            self._held = ""
        return False

    def _calls(self, text: str) -> bool:
        assert self.tools is not None
        calls = parse_calls(text, self.tools)
        if calls and not self.parallel:
            calls = [] if self._called else calls[:1]
            self._out += Said(calls=tuple(calls))
            self._called = True
            return True
        self._out += Said(calls=tuple(calls))
        return bool(calls)

    def _is_text(self, tag: str, more: int = 0) -> bool:
        """What seemed to open a call is text, and so are `more` characters after it."""
        end = self._held.index(tag) + len(tag) + max(0, more)
        self._out += Said(self._held[:end])
        self._held = self._held[end:]
        self._spoken, self._edge = True, False
        return self._go(self._text)


def opens_thoughts(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Whether the prompt ends within thoughts, as some templates begin the answer."""
    text: str = tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False)
    return text.rstrip().endswith(THINK)


def marker_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens that are markers: they stay in the text that is taken apart, special or not."""
    found = (tokenizer.token_to_id(marker) for marker in MARKERS)
    return frozenset(id for id in found if id is not None)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
