"""POST /v1/chat/completions: the next message of a conversation."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import ValidationError

from bevatron.chat.answer_parts import AnswerReader, Said, marker_tokens, opens_thoughts
from bevatron.chat.chat_messages import ChatError
from bevatron.chat.tool_calls import ToolCall
from bevatron.generate.request import Piece, Request
from bevatron.generate.sampling_options import RECOMMENDED
from bevatron.generate.server.answering import Answers
from bevatron.generate.server.error_answers import bad, invalid
from bevatron.generate.server.logprobs import for_chat
from bevatron.generate.server.request_fields import ChatRequest
from bevatron.generate.server.served_model import Serving, count, usage


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
        limit = next((value for value in given if value is not None), -1)
        self.requests: list[Request] = serving.requests(
            asked,
            [self.prompt],
            None if limit == -1 else limit,
            logprobs=logprobs,
            stop_tokens=serving.stop_tokens,
            kept_tokens=marker_tokens(serving.engine.tokenizer),
        )
        self.thinking = opens_thoughts(serving.engine.tokenizer, self.prompt)
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

    def reader(self) -> AnswerReader:
        """Of one answer; streams and whole answers are read by the same."""
        names = {tool.function.name for tool in self.tools} if self.tools else None
        parallel = self.asked.parallel_tool_calls is not False
        return AnswerReader(names, thinking=self.thinking, parallel=parallel)

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        reader = self.reader()
        said = sum((reader.add(piece.text) for piece in pieces), Said()) + reader.finish()
        content = None if said.calls and not said.text else said.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if said.thoughts:
            message["reasoning_content"] = said.thoughts
        if said.calls:
            message["tool_calls"] = [called(call) for call in said.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(pieces),
            "finish_reason": "tool_calls" if said.calls else pieces[-1].finish_reason,
        }

    def whole(self, answers: Answers, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        choices = [self.choice(i, answer) for i, answer in enumerate(pieces)]
        return {**self.head, "choices": choices, "usage": usage([self.prompt], count(pieces))}

    async def events(self, answers: Answers) -> AsyncIterator[Any]:
        """The role, then what was said as it becomes certain, then why it ended."""
        options = self.asked.stream_options
        ending: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        head = {**self.head, "object": "chat.completion.chunk"}

        def event(
            index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
        ) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return {**head, "choices": [choice], **ending}

        # With tools it is not known yet whether there will be a content.
        begin = {"role": "assistant"} if self.tools else {"role": "assistant", "content": ""}
        readers = [self.reader() for _ in answers.streams]
        for index in range(len(readers)):
            yield event(index, begin)
        calls, spoken, new = [0] * len(readers), [not self.tools] * len(readers), 0
        async with aclosing(answers.merged()) as merged:  # type: ignore[type-var]
            async for index, piece in merged:
                new += len(piece.tokens)
                logprobs, reason = self._logprobs([piece]), piece.finish_reason
                said = readers[index].add(piece.text)
                if reason is not None:
                    said += readers[index].finish()
                delta: dict[str, Any] = {}
                if said.thoughts:
                    delta["reasoning_content"] = said.thoughts
                if said.calls:
                    made = enumerate(said.calls, calls[index])
                    delta["tool_calls"] = [{"index": i, **called(call)} for i, call in made]
                    calls[index] += len(said.calls)
                last = reason is not None and not spoken[index] and not calls[index]
                if said.text or last or (logprobs and spoken[index]):
                    delta["content"] = said.text
                    spoken[index] = True
                if delta or logprobs:
                    yield event(index, delta, logprobs)
                if reason is not None:
                    yield event(index, {}, reason="tool_calls" if calls[index] else reason)
        if ending:
            yield {**head, "choices": [], "usage": usage([self.prompt], new)}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        found = [one for piece in pieces for one in piece.logprobs]
        return {"content": for_chat(found, self.serving.texts), "refusal": None}


def called(call: ToolCall) -> dict[str, Any]:
    return call.to_openai(f"call_{uuid.uuid4().hex[:24]}")


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
    found = {name: given[name] for name in RECOMMENDED if given.get(name) is not None}
    if given.get("max_new_tokens") is not None:
        found["max_tokens"] = given["max_new_tokens"]
    if given.get("do_sample") is False:
        found["temperature"] = 0
    try:
        return ChatRequest.model_validate({**found, **asked.model_dump(exclude_unset=True)})
    except ValidationError as error:
        raise invalid(error) from error
