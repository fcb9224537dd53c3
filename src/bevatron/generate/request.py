"""The engine's requests and answers, as plain data without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from bevatron.errors import BevatronError

MOST_LOGPROBS = 100  # likeliest tokens that may be asked for beside each one
LARGEST_SEED = 2**63 - 1


class QueueFull(BevatronError):
    """As many requests wait as may wait. Try again later."""


class NoRoom(BevatronError):
    """There is not enough memory for this request. Others go on."""


def _in(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse what is not in [low, high], or in (low, high] if `open_low`; NaN is in nothing."""
    if isinstance(value, bool) or not (low < value if open_low else low <= value) or value > high:
        first = f"more than {low:g}" if open_low else f"at least {low:g}"
        last = "finite" if high == math.inf else f"at most {high:g}"
        raise BevatronError(f"{name} is {value}, expected {first} and {last}")
    if math.isinf(value):
        raise BevatronError(f"{name} is {value}, expected a finite number")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits, in this order: the penalties and the bias
    change logits; at temperature 0 the highest one wins; else they are divided by the temperature,
    and of what top_k, top_p and min_p leave one is drawn.

    Attributes:
        temperature: 0 is greedy.
        top_k: how many of the likeliest stay; 0 keeps all.
        top_p: the least number of likeliest tokens whose probabilities add up to it stay.
        min_p: those stay whose probability is at least this share of the highest.
        repetition_penalty: as transformers: over prompt and new tokens, once each.
        frequency_penalty, presence_penalty: as OpenAI: over new tokens, per occurrence and once.
        logit_bias: added to the logits of these tokens.
        seed: a draw is a function of the seed and the position alone; None takes a random seed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = 0

    def __post_init__(self) -> None:
        _in("temperature", self.temperature, 0, math.inf)
        _in("top_k", self.top_k, 0, math.inf)
        _in("top_p", self.top_p, 0, 1, open_low=True)
        _in("min_p", self.min_p, 0, 1)
        _in("repetition_penalty", self.repetition_penalty, 0, math.inf, open_low=True)
        for name in ("frequency_penalty", "presence_penalty"):
            _in(name, getattr(self, name), -100, 100)
        for token, bias in self.logit_bias.items():
            if token < 0:
                raise BevatronError(f"logit_bias names token {token}, expected at least 0")
            _in(f"logit_bias of token {token}", bias, -1e6, 1e6)
        if self.seed is not None:
            _in("seed", self.seed, -LARGEST_SEED, LARGEST_SEED)

    @property
    def divisor(self) -> float:
        """Of the logits: the temperature, where there is one."""
        return self.temperature or 1.0

    @property
    def penalises(self) -> bool:
        """Whether the choice depends on tokens seen before."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)


@dataclass(frozen=True)
class Request:
    """One answer to one prompt.

    Attributes:
        prompt: token ids, at least one.
        stop_tokens: end the answer; the token is in `tokens` and not in the text.
        stop_strings: end the answer and are cut from the text; while streaming, what may be the
            beginning of one is held back.
        logprobs: None for none; n for that of each new token and of the n likeliest beside it.
        prompt_logprobs: the same of the prompt's tokens.
        tempered: whether the new tokens' logprobs are of the distribution at the sampling's
            temperature (as long as that is not 0) and not at 1; top_k and its like never count.
        skip_special_tokens: leave special tokens out of the text, but for `kept_tokens`.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 128
    sampling: Sampling = Sampling()
    stop_tokens: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    tempered: bool = False
    skip_special_tokens: bool = True
    kept_tokens: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise BevatronError("the prompt has no tokens; give at least one")
        if self.max_new_tokens < 1:
            raise BevatronError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if "" in self.stop_strings:
            raise BevatronError("a stop string is empty; leave it out")
        for name in ("logprobs", "prompt_logprobs"):
            if (n := getattr(self, name)) is not None:
                _in(name, n, 0, MOST_LOGPROBS)


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability under the model, before temperature (unless the
    request is `tempered`), penalties and bias; `top`: the likeliest tokens and theirs, likeliest
    first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a stream yields for each new token, in order; the last one has a finish_reason.

    Attributes:
        tokens: the new token; none in the last piece of an answer that was cancelled.
        text: that became certain: never half a character, never part of a stop string.
        logprobs: of the tokens, if they were asked for.
        finish_reason: `stop` (a stop token or string), `length` or `cancelled`.
    """

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True)
class Generation:
    """A whole answer: its text, its token ids (a stop token included) and why it ended. Of
    `prompt_logprobs` the first is None: nothing comes before the first token."""

    text: str
    tokens: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None


@dataclass(frozen=True)
class Loglikelihood:
    """Of a sequence of T tokens: [T-1] log-probability of each next one, and whether it was the
    likeliest."""

    logprobs: list[float]
    greedy: list[bool]


@dataclass(frozen=True)
class Stats:
    """The engine's state and, since it was opened, its totals.

    Attributes:
        running: requests that have a part of the cache; waiting: those that have none yet.
        cached_tokens: positions held in the cache.
        finished: requests that ended, whatever the reason.
        prompt_tokens, new_tokens: computed in all.
    """

    running: int = 0
    waiting: int = 0
    cached_tokens: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
