"""`bevatron generate`: it completes prompts and prints the answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bevatron.chat.answer_parts import AnswerReader, marker_tokens, opens_thoughts
from bevatron.chat.chat_template import ChatTemplate
from bevatron.chat.tool_calls import tool_names
from bevatron.errors import BevatronError
from bevatron.generate.engine import Engine
from bevatron.generate.prompts import Prompt
from bevatron.generate.request import Generation, Request, Sampling, TokenLogprob
from bevatron.generate.sampling_options import chosen, in_words
from bevatron.generate.terminal_text import show


def generate(
    ckpt: str,
    prompts: Sequence[Prompt],
    *,
    chat_template: Path | None,
    max_new_tokens: int,
    stop: Sequence[str],
    logprobs: int | None,
    asked: dict[str, Any],
    tp: int,
    pp: int,
    int8: bool,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Print the completion of a prompt while it is made; `as_json`: one JSON object for each.

    Args:
        asked: fields of Sampling, None where the user said nothing.
    Raises BevatronError, too, for what would have no effect.
    """
    chosen(Sampling(), asked)  # a mistake in it is said before a model is loaded
    if logprobs is not None and not as_json:
        raise BevatronError("--logprobs needs --json: plain text has no place for them")
    if chat_template is not None and not any(p.is_chat for p in prompts):
        raise BevatronError(
            f"--chat-template {chat_template}: plain text is completed without a template; pass "
            "--chat with it, or a chat as JSON on standard input"
        )
    where: dict[str, Any] = {"device": device, "dtype": dtype, "max_batch": min(len(prompts), 32)}
    with Engine.open(ckpt, tp=tp, pp=pp, int8=int8, **where) as engine:
        if engine.sampling.temperature and asked.get("temperature") is None:
            said = in_words(chosen(engine.sampling, asked))
            note = f"sampled as generation_config.json says: {said}; --temperature 0 is greedy"
            print(note, file=sys.stderr, flush=True)
        template = None
        if any(p.is_chat for p in prompts):
            template = ChatTemplate.needed(engine.opened, engine.tokenizer, chat_template)
        requests = [
            _request(engine, template, p, asked, max_new_tokens, tuple(stop), logprobs)
            for p in prompts
        ]
        for request in requests:
            _say_beyond(engine, len(request.prompt), 0)
        if as_json:
            for one, request, answer in zip(
                prompts, requests, engine.complete(requests), strict=True
            ):
                print(json.dumps(_described(engine, one, request, answer)))
                _say_beyond(engine, len(request.prompt), len(answer.tokens))
            return
        if not prompts[0].is_chat:
            show(prompts[0].text or "")
        new = 0
        stream = engine.submit(requests[0])
        for piece in stream:
            show(piece.text)
            new += len(piece.tokens)
        show("\n")
        _say_beyond(engine, len(requests[0].prompt), new)


def _say_beyond(engine: Engine, given: int, new: int) -> None:
    """A line where a prompt, or with its new tokens an answer, passes the model's context."""
    passes = given > engine.context if not new else given <= engine.context < given + new
    if passes:
        what = "prompt and answer have" if new else "the prompt has"
        print(
            f"warning: {what} {given + new:,} tokens, the model's context is {engine.context:,} "
            "(max_position_embeddings); beyond it answers mean little",
            file=sys.stderr,
        )


def _request(
    engine: Engine,
    template: ChatTemplate | None,
    prompt: Prompt,
    asked: dict[str, Any],
    max_new_tokens: int,
    stop: tuple[str, ...],
    logprobs: int | None,
) -> Request:
    stops = engine.stop_tokens
    if prompt.text is not None:
        ids = engine.tokenizer.encode(prompt.text).ids
    else:
        assert template is not None
        ids = template.encode(prompt.messages, tools=prompt.tools)
        stops |= template.stop_tokens
    if not ids:
        raise BevatronError("the prompt has no tokens; give at least one character")
    return Request(
        tuple(ids),
        max_new_tokens,
        chosen(engine.sampling, asked),
        stops,
        stop,
        logprobs,
        kept_tokens=marker_tokens(engine.tokenizer) if prompt.is_chat else frozenset(),
    )


def _described(
    engine: Engine, prompt: Prompt, request: Request, answer: Generation
) -> dict[str, Any]:
    given, new = len(request.prompt), len(answer.tokens)
    made: dict[str, Any] = {
        "text": answer.text,
        "tokens": answer.tokens,
        "finish_reason": answer.finish_reason,
        "usage": {
            "prompt_tokens": given,
            "completion_tokens": new,
            "total_tokens": given + new,
        },
    }
    if answer.logprobs is not None:
        made["logprobs"] = [_logprob(engine, entry) for entry in answer.logprobs]
    if prompt.is_chat:
        names = tool_names(prompt.tools) if prompt.tools else None
        thinking = opens_thoughts(engine.tokenizer, request.prompt)
        said = AnswerReader.whole(answer.text, names, thinking=thinking)
        made["text"] = said.text
        if said.thoughts:
            made["reasoning"] = said.thoughts
        if said.calls:
            made["tool_calls"] = [{"name": c.name, "arguments": c.arguments} for c in said.calls]
    return made


def _logprob(engine: Engine, entry: TokenLogprob) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "token": engine.tokenizer.id_to_token(token), "logprob": logprob}

    top = [one(token, logprob) for token, logprob in entry.top]
    return one(entry.token, entry.logprob) | ({"top": top} if top else {})
