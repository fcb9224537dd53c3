"""Answers taken apart into thoughts, text and calls, whole and in whatever pieces they come."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bevatron.chat.answer_parts import AnswerReader, Said, marker_tokens, opens_thoughts
from bevatron.chat.tool_calls import ToolCall
from bevatron.generate.detokenize import TextStream, Vocabulary
from bevatron.generate.request import Request
from tests.chat.chat_templates import SPECIALS, tokenizer

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
        (f"A <TOOLCALL>[{CALL}]</TOOLCALL> b ", "A b ", [WEATHER]),
        (f"<TOOLCALL>[{CALL}]</TOOLCALL>\n<TOOLCALL>{CALL}</TOOLCALL>\n", "", [WEATHER, WEATHER]),
        (
            f"<TOOLCALL>[5]</TOOLCALL> <TOOLCALL>{CALL}</TOOLCALL>",
            "<TOOLCALL>[5]</TOOLCALL>",
            [WEATHER],
        ),
        (f"<TOOLCALL>{CALL}</TOOLCALL>", "", [WEATHER]),
        (
            '<|python_tag|>brave_search.call(query="a, b", n=3)<|eom_id|>',
            "",
            [ToolCall("brave_search", {"query": "a, b", "n": 3})],
        ),
    ],
)
def test_calls_are_parsed(text: str, content: str, calls: list[ToolCall]) -> None:
    names = {call.name for call in calls}
    assert AnswerReader.whole(text, names) == Said(content, calls=tuple(calls))
    assert AnswerReader.whole(f"<think>\nhm\n</think>\n\n{text}", names).thoughts == "hm"
    one = AnswerReader.whole(text, names, parallel=False)
    assert one == Said(content, calls=tuple(calls[:1]))
    assert AnswerReader.whole(text) == Said(text), "no tools were offered"
    if len(calls) == 1:
        assert AnswerReader.whole(text, {"other"}) == Said(text), "a tool that was not offered"


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
    for names in ({"weather", "search"}, None):
        assert AnswerReader.whole(text, names) == Said(text)


@pytest.mark.parametrize(
    ("text", "thinking", "said"),
    [
        ("<think>\nhm\n</think>\n\nYes. ", False, Said("Yes. ", "hm")),
        ("\n<think>a <b> c</think>Yes", False, Said("Yes", "a <b> c")),
        ("hm\n</think>\n\nYes", True, Said("Yes", "hm")),
        ("\n\n</think>\n\nYes", True, Said("Yes")),
        ("<think>cut off </thi", False, Said("", "cut off </thi")),
        ("<think>cut off\n", False, Said("", "cut off")),
        (" Yes <think>no</think>", False, Said(" Yes <think>no</think>")),
        ("Yes</think>", False, Said("Yes</think>")),
        ("<thin", False, Said("<thin")),
        (" \n", False, Said(" \n")),
    ],
)
def test_thoughts_are_not_text(text: str, thinking: bool, said: Said) -> None:
    for tools in (None, {"weather"}):
        assert AnswerReader.whole(text, tools, thinking=thinking) == said


BITS = ["<think>", "</think>", "<|python_tag|>", "<TOOLCALL>", "</TOOLCALL>", "[", "]", "{", CALL]
BITS += [
    " ",
    "\n",
    "a",
    "<",
    "time.call()",
    ";",
    '{"name": "time", "parameters": {}}',
    "<|eom_id|>",
]


@given(st.data())
def test_a_stream_is_the_same_message_as_the_whole(data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(BITS), max_size=12)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=9)))
    thinking, parallel = data.draw(st.booleans()), data.draw(st.booleans())
    tools = data.draw(st.sampled_from([None, {"weather", "time"}]))
    reader = AnswerReader(tools, thinking=thinking, parallel=parallel)
    streamed = Said()
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        streamed += reader.add(text[begin:end])
    streamed += reader.finish()
    whole = AnswerReader.whole(text, tools, thinking=thinking, parallel=parallel)
    assert streamed == whole
    assert reader.finish() == Said()
    if not whole.calls and parallel:
        everything = "".join(text.split()).replace("<think>", "").replace("</think>", "")
        kept = "".join((whole.thoughts + whole.text).split())
        assert kept.replace("<think>", "").replace("</think>", "") == everything, "nothing is lost"


@pytest.mark.parametrize("text", [f"I see. {CALL}", "<think>\nI see", f"Hm <TOOLCALL>[{CALL}]"])
def test_what_is_certain_is_given_out_at_once(text: str) -> None:
    reader = AnswerReader({"weather"})
    said = Said()
    for character in text:
        said += reader.add(character)
    assert (said.text + said.thoughts).startswith(("I see", "Hm"))


def test_endless_markers_take_no_time() -> None:
    for text in ("<TOOLCALL>" * 20_000, "<TOOLCALL>[" * 20_000 + "</TOOLCALL>", "<think>" * 50_000):
        assert AnswerReader.whole(text, {"weather"}).calls == ()


def test_markers_that_are_special_tokens_stay_in_the_text_that_is_read() -> None:
    made = tokenizer((*SPECIALS, "<think>", "</think>"))
    kept = marker_tokens(made)
    assert {made.id_to_token(i) for i in kept} == {"<think>", "</think>", "<|python_tag|>"}
    prompt = made.encode("<|start_header_id|>assistant<|end_header_id|>\n\n").ids
    ids = made.encode("<think>hm</think><|eom_id|>Yes<|python_tag|>").ids
    request = Request(tuple(prompt), kept_tokens=kept)
    stream = TextStream(Vocabulary(made), prompt, (), True, request.kept_tokens)
    text = "".join(stream.add(i) for i in ids) + stream.finish()
    assert text == "<think>hm</think>Yes<|python_tag|>"
    assert made.decode(ids) == "hmYes", "which is what was read before"
    assert opens_thoughts(made, made.encode("assistant\n\n<think>\n").ids)
    assert not opens_thoughts(made, made.encode("assistant\n\n<think>\n\n</think>\n\n").ids)


def test_openai_s_form_has_arguments_as_json() -> None:
    made = WEATHER.to_openai("call_1")
    assert made["id"] == "call_1" and made["type"] == "function"
    assert json.loads(made["function"]["arguments"]) == WEATHER.arguments
