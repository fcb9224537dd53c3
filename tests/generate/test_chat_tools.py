"""Tool calls are found in answers; what is not exactly one stays text."""

from __future__ import annotations

import json

import pytest

from bevatron.generate.chat.tools import ToolCall, may_begin_call, parse_tool_calls

CALL = '{"name": "weather", "parameters": {"city": "Köln", "days": 2}}'
WEATHER = ToolCall("weather", {"city": "Köln", "days": 2})
TIME = ToolCall("time", {})


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "", [WEATHER]),
        (f"\n {CALL} \n", "", [WEATHER]),
        (f"<|python_tag|>{CALL}<|eom_id|>", "", [WEATHER]),
        (f"I look it up.<|python_tag|>{CALL}", "I look it up.", [WEATHER]),
        (f'[{CALL}, {{"name": "time", "arguments": {{}}}}]', "", [WEATHER, TIME]),
        (f'{CALL}; {{"name": "time", "parameters": {{}}}}', "", [WEATHER, TIME]),
        (f'{CALL}\n{{"name": "time", "parameters": {{}}}}', "", [WEATHER, TIME]),
        (json.dumps({"type": "function", "function": json.loads(CALL)}), "", [WEATHER]),
        ('{"name": "time", "arguments": "{}"}', "", [TIME]),
        (f"<TOOLCALL>[{CALL}]</TOOLCALL>", "", [WEATHER]),
        (f"<think>\nhm</think>\n\n<TOOLCALL>[{CALL}]</TOOLCALL>", "<think>\nhm</think>", [WEATHER]),
        (f"<TOOLCALL>{CALL}</TOOLCALL>", "", [WEATHER]),
        (
            '<|python_tag|>brave_search.call(query="a, b", n=3)<|eom_id|>',
            "",
            [ToolCall("brave_search", {"query": "a, b", "n": 3})],
        ),
    ],
)
def test_calls_are_parsed(text: str, content: str, calls: list[ToolCall]) -> None:
    assert parse_tool_calls(text) == (content, calls)
    assert parse_tool_calls(text, {c.name for c in calls}) == (content, calls)
    if len(calls) == 1:
        assert parse_tool_calls(text, {"other"}) == (text, []), "a tool that was not offered"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello",
        "{}",
        "[]",
        '{"name": "weather"}',
        '{"name": "weather", "parameters": 5}',
        '{"name": 5, "parameters": {}}',
        '{"name": "weather", "parameters": "no json"}',
        CALL[:-1],
        CALL + " and more",
        "Call this: " + CALL,
        f"[{CALL}, 5]",
        f"[{CALL}",
        "<TOOLCALL>[oops]</TOOLCALL>",
        f"<TOOLCALL>[{CALL}]",
        "<TOOLCALL>[]</TOOLCALL>",
        "<|python_tag|>print('hello')",
        "<|python_tag|>search.call(open('/etc/passwd'))",
        "<|python_tag|>search.call(q=open('/etc/passwd'))",
        "<|python_tag|>search.call(q=1); import os",
        "<|python_tag|>search.call(" + "(" * 5000 + ")",
        "[" * 100_000,
        '{"a":' * 100_000,
        "x" * 2_000_000,
    ],
    ids=range(24),
)
def test_malformed_calls_stay_text(text: str) -> None:
    assert parse_tool_calls(text) == (text, [])


def test_only_what_may_be_a_call_is_held_back() -> None:
    for text in ("", " ", "{", '{"name', "[", "<", "<TOOL", "<|python", "<|python_tag|>x", "\n{"):
        assert may_begin_call(text)
    for text in ("Hello", "<b>", "<think>", "The {"):
        assert not may_begin_call(text)


def test_openai_s_form_has_arguments_as_json() -> None:
    made = WEATHER.to_openai("call_1")
    assert made["id"] == "call_1" and made["type"] == "function"
    assert json.loads(made["function"]["arguments"]) == WEATHER.arguments
