"""POST /v1/completions: the continuation of a prompt."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from bevatron.generate.request import Piece, Request
from bevatron.generate.server.answering import Answers
from bevatron.generate.server.error_answers import bad
from bevatron.generate.server.logprobs import Offsets, for_completion
from bevatron.generate.server.request_fields import CompletionRequest
from bevatron.generate.server.served_model import Serving, count, usage

DEFAULT_TOKENS = 16  # OpenAI's


class Completion:
    """One request and what its reply is made of."""

    def __init__(self, serving: Serving, asked: CompletionRequest) -> None:
        self.serving, self.asked = serving, asked
        self.n, self.echo = asked.n or 1, bool(asked.echo)
        tokenizer = serving.engine.tokenizer
        self.prompts = [
            tokenizer.encode(p).ids if isinstance(p, str) else p for p in as_prompts(asked.prompt)
        ]
        self.silent = asked.max_tokens == 0  # only the prompt's log-probabilities are wanted
        if self.silent and not self.echo:
            raise bad(
                "max_tokens: is 0, which only `echo` allows; ask for at least 1", "max_tokens"
            )
        if asked.best_of not in (None, self.n):
            raise bad(
                f"best_of: is {asked.best_of} and n is {self.n}; all answers are returned, so ask "
                "for as many as you want by n",
                "best_of",
            )
        limit: int | None = max(1, asked.max_tokens or 0)
        if asked.max_tokens == -1:
            limit = None
        elif asked.max_tokens is None:
            room = serving.context - max(map(len, self.prompts))
            limit = max(1, min(DEFAULT_TOKENS, room))
        self.requests: list[Request] = serving.requests(
            asked,
            self.prompts,
            limit,
            stop_tokens=serving.engine.stop_tokens,
            logprobs=asked.logprobs,
            prompt_logprobs=asked.logprobs if self.echo else None,
        )
        # What an echo shows: text as it was sent, token ids as they read.
        self.shown = [
            p if isinstance(p, str) else str(tokenizer.decode(p, skip_special_tokens=False))
            for p in (as_prompts(asked.prompt) if self.echo else ())
        ]
        self.head = serving.head("cmpl", "text_completion")

    def offsets(self, index: int) -> Offsets:
        echoed = self.shown[index // self.n] if self.echo else ""
        return Offsets(self.serving.texts, echoed, self.asked.skip_special_tokens is not False)

    def choice(
        self,
        answers: Answers,
        index: int,
        pieces: Sequence[Piece],
        offsets: Offsets,
        first: bool = True,
    ) -> dict[str, Any]:
        """`first`: whether these pieces begin the choice, where an echo stands."""
        which = index // self.n
        text = self.shown[which] if self.echo and first else ""
        found: list[Any] = []
        tokens: list[int] = []
        if self.echo and first and self.asked.logprobs is not None:
            tokens += self.prompts[which]
            found += answers.streams[index].prompt_logprobs or ()
        if not self.silent:
            text += "".join(piece.text for piece in pieces)
            tokens += [token for piece in pieces for token in piece.tokens]
            found += [one for piece in pieces for one in piece.logprobs]
        logprobs = None
        if self.asked.logprobs is not None:
            tokens = tokens[: len(found)]
            logprobs = for_completion(tokens, found, self.serving.texts, offsets)
        reason = pieces[-1].finish_reason
        reason = "length" if self.silent and reason else reason
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def whole(self, answers: Answers, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        choices = [
            self.choice(answers, i, answer, self.offsets(i)) for i, answer in enumerate(pieces)
        ]
        new = 0 if self.silent else count(pieces)
        return {**self.head, "choices": choices, "usage": usage(self.prompts, new)}

    async def events(self, answers: Answers) -> AsyncIterator[Any]:
        """One per new token, and the usage at the end if that was asked for."""
        options = self.asked.stream_options
        ending: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        offsets: dict[int, Offsets] = {}  # of the choices that have begun
        new = 0
        async with aclosing(answers.merged()) as merged:  # type: ignore[type-var]
            async for index, piece in merged:
                first = index not in offsets
                if first:
                    offsets[index] = self.offsets(index)
                choice = self.choice(answers, index, [piece], offsets[index], first)
                new += 0 if self.silent else len(piece.tokens)
                if choice["text"] or choice["finish_reason"] or choice["logprobs"]:
                    yield {**self.head, "choices": [choice], **ending}
        if ending:
            yield {**self.head, "choices": [], "usage": usage(self.prompts, new)}


def as_prompts(prompt: Any) -> list[Any]:
    """The prompts of a request, each a string or token ids."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)
