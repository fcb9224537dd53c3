"""Parsing tool calls as models write them; `answer_parts.py` finds where they stand in an answer.

Llama 3.1 to 3.3 write a JSON object {"name": ..., "parameters": {...}}, with or without
<|python_tag|> before it. Several calls are separated by `;` or stand in a list. For their built-in
tools they write Python: <|python_tag|>brave_search.call(query="..."). Llama-Nemotron writes
<TOOLCALL>[{"name": ..., "arguments": {...}}]</TOOLCALL>. Text in any other form is not a call.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PYTHON_TAG = "<|python_tag|>"
ENDS = ("<|eom_id|>", "<|eot_id|>")
TOOLCALL, TOOLCALL_END = "<TOOLCALL>", "</TOOLCALL>"
BUILT_IN = re.compile(r"(\w+)\.call\((.*)\)", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for; `arguments` as an object."""

    name: str
    arguments: dict[str, Any]

    def to_openai(self, id: str) -> dict[str, Any]:
        """As OpenAI's API has it, arguments being JSON in a text."""
        function = {"name": self.name, "arguments": json.dumps(self.arguments, ensure_ascii=False)}
        return {"id": id, "type": "function", "function": function}


def tool_names(tools: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Of tools as `checked_tools` lets them pass."""
    return frozenset(tool.get("function", tool)["name"] for tool in tools)


def parse_calls(text: str, names: Collection[str]) -> list[ToolCall]:
    """The calls that a text is, if it is nothing else: JSON, or Python after PYTHON_TAG.

    Args:
        names: of the tools that were offered; JSON that calls anything else is an answer that
            happens to be JSON.
    """
    said = text.strip()
    tagged = said.startswith(PYTHON_TAG)
    said = said.removeprefix(PYTHON_TAG).strip()
    for end in ENDS:
        said = said.removesuffix(end).strip()
    calls = _json_calls(said, names)
    return calls if calls or not tagged else _built_in(said, names)


def _json_calls(text: str, names: Collection[str]) -> list[ToolCall]:
    """One object, a list of objects, or several apart by semicolons; else none."""
    decoder = json.JSONDecoder()
    calls: list[ToolCall] = []
    rest = text.strip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        for item in value if isinstance(value, list) else [value]:
            call = _call(item, names)
            if call is None:
                return []
            calls.append(call)
        rest = rest[end:].lstrip()
        if rest and not rest.startswith((";", "{")):
            return []
        rest = rest.removeprefix(";").lstrip()
    return calls


def _call(value: Any, names: Collection[str]) -> ToolCall | None:
    if not isinstance(value, dict):
        return None
    if value.get("type") == "function" and isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name")
    arguments = value.get("parameters", value.get("arguments"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return ToolCall(name, arguments) if name in names else None


def _built_in(text: str, names: Collection[str]) -> list[ToolCall]:
    """`tool.call(query="...")`; anything else after the tag is Python for the code interpreter,
    which stays text."""
    match = BUILT_IN.fullmatch(text)
    if match is None or match.group(1) not in names:
        return []
    try:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        arguments = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except (SyntaxError, ValueError, AssertionError, RecursionError, MemoryError):
        return []
    return [ToolCall(match.group(1), arguments)]
