"""The model that is served, and what its requests have in common."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from bevatron.chat.chat_messages import ChatError
from bevatron.chat.chat_template import ChatTemplate
from bevatron.errors import BevatronError
from bevatron.generate.engine import Engine
from bevatron.generate.request import LARGEST_SEED, Piece, Request, Sampling
from bevatron.generate.sampling_options import RECOMMENDED
from bevatron.generate.server.error_answers import Refusal, bad
from bevatron.generate.server.logprobs import TokenTexts
from bevatron.generate.server.metrics import Metrics
from bevatron.generate.server.request_fields import Common
from bevatron.generate.server.server_settings import Settings


@dataclass
class Serving:
    """
    Attributes:
        context: tokens of a prompt and its answer.
        defaults: sampling settings for requests that name none.
    """

    engine: Engine
    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.context = min(self.engine.context, self.engine.max_tokens)
        self.texts = TokenTexts(self.engine.tokenizer)
        self.template = ChatTemplate.of(self.engine.opened, self.engine.tokenizer)
        self.stop_tokens = self.engine.stop_tokens  # of chats
        if self.template is not None:
            self.template.where = "chat template"  # what messages say, and clients need no paths
            with suppress(ChatError):  # every chat will be told; completions need no template
                self.stop_tokens |= self.template.stop_tokens
        self.defaults = {name: getattr(self.engine.sampling, name) for name in RECOMMENDED}

    def check_model(self, name: str | None) -> None:
        """Raises Refusal unless `name` means the model that is served."""
        if name is not None and name not in (self.settings.name, *self.settings.also):
            raise Refusal(
                404,
                f"the model {name[:200]!r} is not here; this server has {self.settings.name!r}",
                param="model",
                code="model_not_found",
            )

    def requests(
        self,
        asked: Common,
        prompts: Sequence[Sequence[int]],
        limit: int | None,
        *,
        stop_tokens: frozenset[int],
        **more: Any,
    ) -> list[Request]:
        """One per prompt and choice. `limit`: new tokens; None: until the context is full."""
        n = asked.n or 1
        if len(prompts) * n > (most := self.settings.max_choices):
            raise bad(f"n: {len(prompts)} prompts times {n} are over {most} answers", "n")
        stops = frozenset() if asked.ignore_eos else stop_tokens
        fields = {
            "stop_tokens": stops | frozenset(asked.stop_token_ids or ()),
            "stop_strings": (asked.stop,)
            if isinstance(asked.stop, str)
            else tuple(asked.stop or ()),
            **more,
        }
        if asked.skip_special_tokens is not None:
            fields["skip_special_tokens"] = asked.skip_special_tokens
        try:
            sampling = [self._sampling(asked, choice) for choice in range(n)]
            return [
                Request(tuple(ids), self._limit(ids, limit), how, **fields)
                for ids in prompts
                for how in sampling
            ]
        except BevatronError as error:
            raise bad(str(error)) from error

    def _limit(self, ids: Sequence[int], limit: int | None) -> int:
        if not ids:
            raise bad("the prompt has no tokens; give at least one character", "prompt")
        if (found := max(ids)) >= self.engine.spec.vocab_size:
            vocabulary = self.engine.spec.vocab_size
            raise bad(f"prompt: has token {found}, the model has {vocabulary} tokens", "prompt")
        room = self.context - len(ids)
        if room < (1 if limit is None else limit):
            wanted = "" if limit is None else f" and {limit} new ones were asked for"
            raise bad(
                f"the model's context is {self.context} tokens; the prompt has "
                f"{len(ids)}{wanted}. Shorten the prompt or lower max_tokens",
                "max_tokens" if room > 0 else "prompt",
                "context_length_exceeded",
            )
        return room if limit is None else limit

    def _sampling(self, asked: Common, choice: int) -> Sampling:
        """`choice`: its number among n, of which each draws from a seed of its own."""

        def take(name: str) -> Any:
            given = getattr(asked, name)
            return self.defaults[name] if given is None else given

        seed = asked.seed
        if seed is not None and choice:
            seed = (seed + choice) % LARGEST_SEED
        bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
        if bias and max(bias) >= self.engine.spec.vocab_size:
            vocabulary = self.engine.spec.vocab_size
            message = f"logit_bias: names token {max(bias)}, the model has {vocabulary} tokens"
            raise bad(message, "logit_bias")
        greedy = asked.top_p == 0  # no share at all: the likeliest token alone
        return Sampling(
            temperature=0.0 if greedy else take("temperature"),
            top_k=max(0, take("top_k")),
            top_p=1.0 if greedy else take("top_p"),
            min_p=take("min_p"),
            repetition_penalty=take("repetition_penalty"),
            frequency_penalty=asked.frequency_penalty or 0.0,
            presence_penalty=asked.presence_penalty or 0.0,
            logit_bias=bias,
            seed=seed,
        )

    def head(self, prefix: str, kind: str) -> dict[str, Any]:
        """What every reply, and every event of one, begins with."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.settings.name,
        }


def usage(prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, int]:
    """`prompts`: each once, however many answers it has."""
    prompt_tokens = sum(map(len, prompts))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


def count(answers: Sequence[Sequence[Piece]]) -> int:
    return sum(len(piece.tokens) for pieces in answers for piece in pieces)
