"""The prompts that `bevatron generate` completes: a text, a chat, or a file of texts and chats."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bevatron.errors import BevatronError

MISSING = (
    "nothing to complete: pass --prompt TEXT (- reads it from standard input), --file "
    'PROMPTS.jsonl, or a chat on standard input, such as echo \'{"role": "user", "content": "Hi"}\''
)


@dataclass(frozen=True)
class Prompt:
    """Either `text`, or the `messages` of a chat (with `tools`, if any)."""

    text: str | None = None
    messages: Any = None
    tools: Any = None

    @property
    def is_chat(self) -> bool:
        return self.text is None


def read_prompts(
    prompt: str | None, file: Path | None, *, chat: bool, system: str | None
) -> list[Prompt]:
    """The prompts, in order. Nothing is opened yet but standard input and `file`.

    Args:
        prompt: the text; `-` is standard input as text; None is `file`, or a chat as JSON on
            standard input.
        chat: a text is what a user says in a chat.
        system: goes before each chat; makes chats of texts.
    """
    if prompt is not None and file is not None:
        raise BevatronError("--prompt and --file are both given; pass one of them")
    if file is not None:
        found = _lines(file)
    elif prompt is not None:
        # An argument that is no UTF-8 arrives as lone surrogates, which no tokenizer takes.
        text = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        found = [Prompt(_standard_input("a text") if prompt == "-" else text)]
    elif sys.stdin is None or sys.stdin.isatty():
        raise BevatronError(MISSING)
    else:
        found = [_from_json(_standard_input("JSON"), "standard input", text_allowed=False)]
    return [_as_chat(p, system) if chat or system is not None else p for p in found]


def _as_chat(prompt: Prompt, system: str | None) -> Prompt:
    messages = prompt.messages
    if prompt.text is not None:
        messages = [{"role": "user", "content": prompt.text}]
    if system is not None:
        first = messages[0] if isinstance(messages, list) and messages else None
        if isinstance(first, dict) and first.get("role") in ("system", "developer"):
            raise BevatronError("--system is given, and the chat has a system message of its own")
        messages = [{"role": "system", "content": system}, *messages]
    return Prompt(None, messages, prompt.tools)


def _standard_input(what: str) -> str:
    try:
        data = sys.stdin.buffer.read()
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BevatronError(f"standard input is not UTF-8 ({error}); expected {what}") from error
    if not text.strip():
        raise BevatronError(f"standard input is empty; {MISSING}")
    return text.removesuffix("\n").removesuffix("\r")


def _lines(file: Path) -> list[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BevatronError(f"{file}: is not UTF-8 text ({error})") from error
    found = [
        _from_json(line, f"{file}:{number}", text_allowed=True)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise BevatronError(f"{file}: has no prompts; expected one JSON value per line")
    return found


def _from_json(text: str, where: str, *, text_allowed: bool) -> Prompt:
    expected = 'a message {"role": "user", "content": "..."}, a list of them, {"messages": [...]}'
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BevatronError(
            f"{where}: is not JSON ({error}); expected {expected}"
            + ("" if text_allowed else "; for plain text pass --prompt -")
        ) from error
    if isinstance(value, str) and text_allowed:
        return Prompt(value)
    if isinstance(value, list):
        return Prompt(messages=value)
    if isinstance(value, dict):
        if "messages" in value:
            return Prompt(messages=value["messages"], tools=value.get("tools"))
        if "role" in value:
            return Prompt(messages=[value])
        if isinstance(value.get("prompt"), str):
            return Prompt(value["prompt"])
    raise BevatronError(f"{where}: is not a prompt; expected {expected} or {{'prompt': '...'}}")
