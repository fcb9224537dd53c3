"""Which tokens of a conversation the assistant says, whatever the template.

A template may say so itself (`{% generation %}`). Of another one, an answer is what a rendering up
to the answer has more than the prompt that the model would be given for it. So what is learned at
an answer stands behind exactly that prompt, or is refused.

Some templates write an answer in another way once the conversation goes on: Qwen3's leave out the
thoughts, gpt-oss's end it by another token. Such an answer is learned from a text of its own, which
ends with it. So a conversation may become several texts; answers that a later text has as they
were said share that text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bevatron.chat.answer_parts import THINK_END
from bevatron.chat.chat_messages import REASONING, ChatError, Message
from bevatron.chat.chat_template import Chat, ChatTemplate
from bevatron.chat.template_process import Rendered

SHOWN = 40  # characters of a text in a message
Span = tuple[int, int]


@dataclass(frozen=True)
class Told:
    """Token ids of a text, which of them the assistant says, and how many answers those are.

    Attributes:
        split: how many answers began inside of a token that the prompt begins.
    """

    ids: list[int]
    said: list[bool]
    answers: int
    split: int = 0


def assistant_turns(
    template: ChatTemplate,
    messages: Any,
    *,
    tools: Any = None,
    last: int | None = None,
    stops: Collection[int] = (),
    **variables: Any,
) -> list[Told]:
    """The texts of a conversation, in order. Every answer is in one of them, with the token that
    ends it.

    Args:
        last: learn answers among so many messages at the end; all of them if absent.
        stops: token ids that end an answer, besides those that the template writes.
    Raises ChatError if there is no answer, if one of them cannot be told from what stands before
    it, if the template leaves out a part of one, or if nothing ends it.
    """
    chat = template.prepared(messages, tools, None, variables)
    now, count = datetime.now(), len(chat[0])
    first = 0 if last is None else count - last
    answers = [i for i in range(max(0, first), count) if chat[0][i]["role"] == "assistant"]
    if not answers:
        raise ChatError("no message of the assistant is there to learn")
    texts = _marked if template.marks_answers(tools) else _compared
    return [
        _told(template, text, template.stop_tokens | frozenset(stops), now)
        for text in texts(template, chat, answers, now)
    ]


@dataclass
class _Text:
    """What was rendered, where in it the answers are, and how many."""

    chat: Chat
    rendered: Rendered
    spans: list[Span]
    answers: int


def _marked(template: ChatTemplate, chat: Chat, answers: list[int], now: datetime) -> list[_Text]:
    first = next(i for i, m in enumerate(chat[0]) if m["role"] == "assistant")
    cuts = [(len(chat[0]), False)] + ([(answers[0], True)] if answers[0] > first else [])
    rendered, *prompts = template.beginnings(chat, cuts, now)
    spans = rendered.spans
    begin = _common(prompts[0].text, rendered.text) if prompts else 0
    spans = [span for span in spans if span[0] >= begin and span[1] > span[0]]
    if len(spans) < len(answers):
        raise ChatError(
            f"{template.where}: the template has {{% generation %}} around {len(spans)} of "
            f"{len(answers)} answers; correct it, or leave the marks out, so that answers are "
            "found by comparing renderings"
        )
    _check_whole(template, [chat[0][i] for i in answers], [rendered.text] * len(answers))
    return [_Text(chat, rendered, spans, len(answers))]


def _compared(template: ChatTemplate, chat: Chat, answers: list[int], now: datetime) -> list[_Text]:
    texts: list[_Text] = []
    cuts = [cut for i in answers for cut in ((i, True), (i + 1, False))]
    found = template.beginnings(chat, cuts, now)
    for i, given, said in reversed([*zip(answers, found[::2], found[1::2], strict=True)]):
        prompt, upto = given.text, (chat[0][: i + 1], *chat[1:])
        span = len(prompt), len(said.text)
        if not said.text.startswith(prompt) or span[0] == span[1]:
            at = _common(prompt, said.text)
            raise ChatError(
                f"{template.where}: the template does not write an answer behind the prompt that "
                f"it gives for it: the prompt goes on {_shown(prompt[at:])}, the conversation "
                f"{_shown(said.text[at:])}, so a model would learn what it is never asked for; use "
                "a template that does, or one with {% generation %} around the answers"
            )
        _check_whole(template, [chat[0][i]], [said.text[span[0] :]])
        if texts and texts[-1].rendered.text.startswith(said.text.rstrip()):
            texts[-1].spans.insert(0, span)
            texts[-1].answers += 1
        else:
            texts.append(_Text(upto, said, [span], 1))
    return texts[::-1]


def _check_whole(template: ChatTemplate, answers: Sequence[Message], texts: Sequence[str]) -> None:
    """Each answer's text has all that its message says."""
    for message, text in zip(answers, texts, strict=True):
        content = str(message.get("content") or "")
        parts = {"content": content.rpartition(THINK_END)[2]}
        parts |= {key: str(message[key]) for key in REASONING if message.get(key)}
        for call in message.get("tool_calls") or ():
            parts["tool_calls"] = str((call.get("function") or call).get("name", ""))
            if parts["tool_calls"] not in text:
                break
        for key, part in parts.items():
            if part.strip() not in text:
                raise ChatError(
                    f"{template.where}: the template leaves out the {key} of an answer, "
                    f"{_shown(part.strip())}; put it where the template writes it, or drop it"
                )


def _told(template: ChatTemplate, text: _Text, stops: frozenset[int], now: datetime) -> Told:
    spans, encoded = text.spans, template.encoded(text.chat, text.rendered, now)
    ids, said = encoded.ids, encoded.overlapping(spans)
    split = sum(encoded.is_inside(begin) for begin, _ in spans)
    by_marks = template.marks_answers(text.chat[1])
    ended, at = 0, 0
    while at < len(ids):
        if not said[at]:
            at += 1
            continue
        begin = at
        while at < len(ids) and said[at]:
            at += 1
        stop = next((i for i in range(at - 1, begin - 1, -1) if ids[i] in stops), None)
        if stop is not None and _is_space(template, ids[stop + 1 : at]):
            ended += 1
            if not by_marks:  # what stands behind the end is never asked for
                said[stop + 1 : at] = [False] * (at - stop - 1)
        elif at < len(ids) and ids[at] in stops:
            said[at], ended = True, ended + 1
    if ended < text.answers:
        raise ChatError(
            f"{template.where}: no token ends the assistant's turn in what the template writes, so "
            "a model would learn never to stop; name the token that does as eos_token in "
            "tokenizer_config.json or as eos_token_id in generation_config.json, or correct the "
            "template"
        )
    return Told(ids, said, text.answers, split)


def _is_space(template: ChatTemplate, ids: Sequence[int]) -> bool:
    return not ids or not template.tokenizer.decode(ids, skip_special_tokens=False).strip()


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


def _shown(text: str) -> str:
    return repr(text[:SHOWN]) + ("..." if len(text) > SHOWN else "")
