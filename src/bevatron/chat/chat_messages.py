"""Turning messages and tools, as people and programs write them, into what templates expect."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bevatron.errors import BevatronError

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")
REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers' names for one thing
ROLE = re.compile(r"[\w-]{1,40}")
DEEPEST = 100
LONE = re.compile("[\ud800-\udfff]")  # halves of characters, which JSON may have and text not

Message = dict[str, Any]


class ChatError(BevatronError):
    """A chat template, messages or tools that cannot be used; the message is safe to show to a
    client."""


def checked_messages(messages: Any, template: str) -> list[Message]:
    """Fresh plain copies: content is text (or None beside tool calls), other values that are None
    are left out, arguments of tool calls are objects rather than JSON in a string, and a developer
    is a system where `template` (its text) knows no developer.

    Raises ChatError that says which message is wrong and how.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise ChatError(f"messages is {_kind(messages)}, expected a list of objects")
    if not messages:
        raise ChatError("messages is empty, expected at least one message")
    return [_message(f"messages[{i}]", m, template) for i, m in enumerate(messages)]


def _message(where: str, message: Any, template: str) -> Message:
    if not isinstance(message, Mapping):
        raise ChatError(f'{where} is {_kind(message)}, expected {{"role": ..., "content": ...}}')
    given = plain(message, where)
    made: Message = {k: v for k, v in given.items() if v is not None or k == "content"}
    role = made.get("role")
    if not isinstance(role, str):
        raise ChatError(f"{where}.role is {_kind(role)}, expected a text such as 'user'")
    quoted = f"'{role}'" in template or f'"{role}"' in template
    if role not in ROLES and not (quoted and ROLE.fullmatch(role)):
        known = ", ".join(ROLES)
        raise ChatError(f"{where}.role is {role[:40]!r}, expected one of {known}")
    if role == "developer" and "developer" not in template:
        made["role"] = "system"
    made["content"] = _content(f"{where}.content", made)
    if calls := made.get("tool_calls"):
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ChatError(f"{where}.tool_calls is no list of objects")
        for i, call in enumerate(calls):
            if not isinstance(inner := call.get("function", {}), dict | None):
                raise ChatError(
                    f"{where}.tool_calls[{i}].function is {_kind(inner)}, expected an object"
                )
        made["tool_calls"] = [_parsed_arguments(call) for call in calls]
    reasoning = next((made[key] for key in REASONING if made.get(key) is not None), None)
    if reasoning is not None:
        made = {"thinking": reasoning, **made, "reasoning_content": reasoning}
    return made


def _content(where: str, message: Message) -> str | None:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        if message.get("tool_calls"):
            return None
        if "content" in message and message["role"] == "assistant":
            return ""
        raise ChatError(f"{where} is missing, expected a text")
    if not isinstance(content, list):
        raise ChatError(f"{where} is {_kind(content)}, expected a text")
    parts = []
    for i, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise ChatError(
                f"{where}[{i}] is a part of type {str(kind)[:40]!r}; only text can be read"
            )
        parts.append(text)
    return "\n".join(parts)


def _parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's clients send arguments as JSON in a string; templates print objects as JSON."""
    inner = call.get("function")
    function = inner if isinstance(inner, dict) else call
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            function = {**function, "arguments": parsed}
    return {**call, "function": function} if isinstance(inner, dict) else function


def checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tools as JSON schemas, or None. Raises ChatError that says which one is wrong."""
    if tools is None or tools == []:
        return None
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise ChatError(f"tools is {_kind(tools)}, expected a list of objects")
    made = []
    for i, tool in enumerate(tools):
        copy = plain(tool, f"tools[{i}]")
        function = copy.get("function", copy) if isinstance(copy, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ChatError(
                f'tools[{i}] is no {{"type": "function", "function": {{"name": ..., "parameters": '
                "...}}"
            )
        made.append(copy)
    return made


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy that has nothing but JSON's types, all the way down."""
    if depth > DEEPEST:
        raise ChatError(f"{where} is nested more than {DEEPEST} deep")
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        return LONE.sub("�", value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ChatError(f"{where} has a key that is no text")
        return {LONE.sub("�", k): plain(v, where, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where, depth + 1) for item in value]
    raise ChatError(f"{where} has a value of type {type(value).__name__}, which JSON does not have")


def merge_system(messages: Sequence[Message]) -> list[Message]:
    """For models without a system role: its text goes before the first user message's, as NanoChat
    and others were trained."""
    texts = [m["content"] or "" for m in messages if m["role"] == "system"]
    others = [dict(m) for m in messages if m["role"] != "system"]
    before = "\n\n".join(text for text in texts if text)
    if not before:
        return others or [{"role": "user", "content": ""}]
    for message in others:
        if message["role"] == "user":
            message["content"] = f"{before}\n\n{message['content']}"
            return others
    return [{"role": "user", "content": before}, *others]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean"}
    names |= {type(None): "missing", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
