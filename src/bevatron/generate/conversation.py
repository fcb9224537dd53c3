"""A conversation: its messages, how answers are sampled, and which messages fit the context."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bevatron.chat.answer_parts import Said
from bevatron.chat.chat_messages import Message, checked_messages
from bevatron.chat.tool_calls import ToolCall
from bevatron.errors import BevatronError
from bevatron.generate.request import Sampling

SETTINGS = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "seed": int,
    "max_new_tokens": int,
}


@dataclass
class Conversation:
    """`messages` as chat templates take them; a system message, if any, is the first."""

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 1024
    messages: list[Message] = field(default_factory=list)

    @property
    def system(self) -> str | None:
        first = self.messages[0] if self.messages else {}
        return str(first["content"]) if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        if self.system is not None:
            del self.messages[0]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def say(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def answer(self, said: Said, calls: Sequence[ToolCall] = ()) -> None:
        """`calls`: those of what was said that are made."""
        message: Message = {"role": "assistant", "content": said.text}
        if said.thoughts:
            message["reasoning_content"] = said.thoughts
        if calls:
            named = [{"name": call.name, "arguments": call.arguments} for call in calls]
            message["content"] = said.text or None
            message["tool_calls"] = [{"type": "function", "function": f} for f in named]
        self.messages.append(message)

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        del self.messages[self._first() :]

    def undo(self) -> str | None:
        """Take back the last thing that the user said, with all that came after; returns it."""
        text = self.take_back_answer()
        if text is not None:
            del self.messages[-1]
        return text

    def take_back_answer(self) -> str | None:
        """Take back what came after the last thing that the user said; returns that, if any."""
        for at in range(len(self.messages) - 1, -1, -1):
            if self.messages[at]["role"] == "user":
                del self.messages[at + 1 :]
                return str(self.messages[at]["content"])
        return None

    def fitting(
        self, encode: Callable[[list[Message]], list[int]], positions: int
    ) -> tuple[list[int], int]:
        """Token ids that leave room for an answer within `positions`, and how many of the oldest
        messages had to be left out for it. Nothing is taken out of the conversation.

        Raises BevatronError if even the last turn alone is too long.
        """
        room = positions - max(1, min(self.max_new_tokens, positions // 4))
        ids = encode(self.messages)
        first = begin = self._first()
        while len(ids) > room:
            later = [i for i in self._turns() if i > begin]
            if not later:
                raise BevatronError(
                    f"this needs {len(ids):,} tokens; the model can hold {positions:,}, of which "
                    f"{positions - room:,} are kept for the answer: shorten it, or /reset"
                )
            begin = later[0]
            ids = encode(self.messages[:first] + self.messages[begin:])
        return ids, begin - first

    def set(self, name: str, value: str) -> None:
        """Change a setting, given as text."""
        if name not in SETTINGS:
            raise BevatronError(f"there is no setting {name}; there are {', '.join(SETTINGS)}")
        try:
            number: float | int | None = SETTINGS[name](value)
        except ValueError as error:
            if name != "seed" or value.lower() != "none":
                kind = "a whole number" if SETTINGS[name] is int else "a number"
                raise BevatronError(f"{name} is {value}, expected {kind}") from error
            number = None
        if isinstance(number, float) and math.isnan(number):
            raise BevatronError(f"{name} is {value}, expected a number")
        if name != "max_new_tokens":
            change: dict[str, Any] = {name: number}
            self.sampling = replace(self.sampling, **change)
        elif number is not None and number >= 1:
            self.max_new_tokens = int(number)
        else:
            raise BevatronError(f"max_new_tokens is {value}, expected at least 1")

    def settings(self) -> dict[str, Any]:
        values = asdict(self.sampling) | {"max_new_tokens": self.max_new_tokens}
        return {name: values[name] for name in SETTINGS}

    def save(self, file: Path) -> None:
        """Write it as JSON. An existing file is replaced only if it holds a conversation."""
        if file.exists():
            try:
                read_messages(file)
            except BevatronError as error:
                raise BevatronError(
                    f"{file}: exists and is not a conversation; choose another name"
                ) from error
        saved = {"messages": self.messages, "settings": self.settings()}
        text = json.dumps(saved, indent=1, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")

    def load(self, file: Path) -> None:
        """Go on with a saved one, or with any JSON list of messages."""
        self.messages = read_messages(file)

    def _first(self) -> int:
        """The index of the first message that is not the system's."""
        return 0 if self.system is None else 1

    def _turns(self) -> list[int]:
        return [i for i, m in enumerate(self.messages) if m["role"] == "user"]


def read_messages(file: Path) -> list[Message]:
    """The messages of a saved conversation, or of a JSON list of messages."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BevatronError(f"{file}: is not JSON ({error}); expected a saved chat") from error
    if isinstance(value, dict):
        value = value.get("messages")
    try:
        return checked_messages(value, "'developer'") if value != [] else []
    except BevatronError as error:
        raise BevatronError(f"{file}: {error}") from error
