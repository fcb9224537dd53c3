"""POST /v1/chat/completions: the next message of a conversation."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import ValidationError

from bevatron.generate.chat.error import ChatError
from bevatron.generate.chat.tools import may_begin_call, parse_tool_calls
from bevatron.generate.request import Piece, Request
from bevatron.generate.server.answering import Answers
from bevatron.generate.server.fields import ChatRequest
from bevatron.generate.server.refusal import bad, invalid
from bevatron.generate.server.serving import Serving, count, usage
from bevatron.generate.server.tokens import for_chat

CONFIG_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class ChatCompletion:
    """One request and what its reply is made of."""

    def __init__(self, serving: Serving, asked: ChatRequest) -> None:
        asked = with_config(asked)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise bad("top_logprobs: needs logprobs to be true", "top_logprobs")
        if asked.logprobs:
            logprobs: int | None = asked.top_logprobs or 0
        else:
            logprobs = None
        self.serving, self.asked = serving, asked
        self.tools = [] if asked.tool_choice == "none" else list(asked.tools or ())
        self.prompt = self._prompt()
        given = (asked.max_completion_tokens, asked.max_tokens)
        limit = next((value for value in given if value is not None), None)
        self.requests: list[Request] = serving.requests(
            asked,
            [self.prompt],
            limit,
            logprobs=logprobs,
            stop_tokens=serving.stop_tokens,
            skip_special_tokens=not self.tools,
        )
        self.head = serving.head("chatcmpl", "chat.completion")

    def _prompt(self) -> list[int]:
        template = self.serving.template
        if template is None:
            raise bad(
                "this model has no chat template; ask /v1/completions to continue a text",
                "messages",
                "no_chat_template",
            )
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools]
        messages = [message.plain() for message in self.asked.messages]
        options: dict[str, Any] = dict(self.asked.chat_template_kwargs or {})
        if taken := {"self", "messages", "tools"} & options.keys():
            message = f"chat_template_kwargs: {taken.pop()} has a place of its own in the request"
            raise bad(message, "chat_template_kwargs")
        try:
            return template.encode(messages, tools=tools or None, **options)
        except ChatError as error:
            raise bad(str(error), "messages", "invalid_chat") from error

    def _parsed(self, text: str) -> tuple[str | None, list[dict[str, Any]]]:
        """Content and tool calls of a whole answer."""
        if not self.tools:
            return text, []
        content, calls = parse_tool_calls(text, {tool.function.name for tool in self.tools})
        named = [call.to_openai(f"call_{uuid.uuid4().hex[:24]}") for call in calls]
        return content, [{"index": i, **call} for i, call in enumerate(named)]

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        content, calls = self._parsed("".join(piece.text for piece in pieces))
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        reason = pieces[-1].finish_reason
        if calls:
            message["content"] = content or None
            message["tool_calls"] = [{k: call[k] for k in call if k != "index"} for call in calls]
            reason = "tool_calls"
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(pieces),
            "finish_reason": reason,
        }

    def whole(self, answers: Answers, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        choices = [self.choice(i, answer) for i, answer in enumerate(pieces)]
        return {**self.head, "choices": choices, "usage": usage([self.prompt], count(pieces))}

    async def events(self, answers: Answers) -> AsyncIterator[Any]:
        """The role, then text as it becomes certain, then why it ended. With tools, text that may
        be a call is held back until it is known whether it is one."""
        options = self.asked.stream_options
        ending: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        head = {**self.head, "object": "chat.completion.chunk"}

        def event(
            index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
        ) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return {**head, "choices": [choice], **ending}

        for index in range(len(answers.streams)):
            yield event(index, {"role": "assistant", "content": ""})
        held = dict.fromkeys(range(len(answers.streams)), "")
        free = set() if self.tools else set(held)  # choices whose text is known not to be a call
        new = 0
        async with aclosing(answers.merged()) as merged:  # type: ignore[type-var]
            async for index, piece in merged:
                new += len(piece.tokens)
                logprobs, reason = self._logprobs([piece]), piece.finish_reason
                text = held[index] = held[index] + piece.text
                if index in free or not may_begin_call(text):
                    free.add(index)
                    held[index] = ""
                elif reason is None:
                    text = ""
                else:
                    content, calls = self._parsed(text)
                    text = content or ""
                    if calls:
                        reason = "tool_calls"
                        yield event(index, {"tool_calls": calls})
                if text or logprobs:
                    yield event(index, {"content": text}, logprobs)
                if reason is not None:
                    yield event(index, {}, reason=reason)
        if ending:
            yield {**head, "choices": [], "usage": usage([self.prompt], new)}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        found = [one for piece in pieces for one in piece.logprobs]
        return {"content": for_chat(found, self.serving.texts), "refusal": None}


def with_config(asked: ChatRequest) -> ChatRequest:
    """`transformers chat` sends its sampling settings as one JSON text of transformers' names.
    What the request says itself goes first."""
    if asked.generation_config is None:
        return asked
    try:
        given = json.loads(asked.generation_config)
    except (ValueError, RecursionError) as error:
        raise bad(f"generation_config: not JSON ({error})", "generation_config") from error
    if not isinstance(given, dict):
        raise bad("generation_config: expected a JSON object", "generation_config")
    found = {name: given[name] for name in CONFIG_FIELDS if given.get(name) is not None}
    if given.get("max_new_tokens") is not None:
        found["max_tokens"] = given["max_new_tokens"]
    if given.get("do_sample") is False:
        found["temperature"] = 0
    try:
        return ChatRequest.model_validate({**found, **asked.model_dump(exclude_unset=True)})
    except ValidationError as error:
        raise invalid(error) from error
