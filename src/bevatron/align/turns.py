"""Rollouts of several turns: the model speaks, its environment answers, the model goes on.

What the environment says joins the sequence as the chat template writes it, and is not learned; the
log-probabilities there are 0. Everything is collective; rank 0 alone asks the environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bevatron.align.environment_config import EnvironmentConfig
from bevatron.align.environments import Environment, Message
from bevatron.align.rollouts import Ask, Ends, Rollout
from bevatron.chat.chat_messages import ChatError
from bevatron.data.chat_examples import ChatExamples
from bevatron.errors import BevatronError
from bevatron.generate.live_engine import LiveEngine
from bevatron.generate.request import Request
from bevatron.parallel.on_all_ranks import on_all

# NanoChat's tokens around an expression and its value.
ASKS, ASKED, SAYS, SAID = (
    *("<|python_start|>", "<|python_end|>"),
    *("<|output_start|>", "<|output_end|>"),
)
Reply = tuple[list[Message], list[int]] | None  # what an environment says, and as token ids


@dataclass
class Conversation:
    """One that goes on. Fields as those of a `Rollout`."""

    ask: Ask
    ids: list[int]
    learned: list[bool]
    logprobs: list[float]
    said: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    finished: bool = False
    open: bool = True

    @classmethod
    def of(cls, ask: Ask) -> Conversation:
        n = len(ask.ids)
        return cls(ask, list(ask.ids), [False] * n, [0.0] * n)

    def add(self, ids: Sequence[int], logprobs: Sequence[float] | None) -> None:
        """What the model said, or without log-probabilities what it was told."""
        self.ids += ids
        self.learned += [logprobs is not None] * len(ids)
        self.logprobs += [0.0] * len(ids) if logprobs is None else logprobs
        if logprobs is not None:
            self.said += ids


class Turns:
    """Args:
        environment: on rank 0; None elsewhere.
    Raises BevatronError for a model whose tokenizer or template has no place for it.
    """

    def __init__(
        self, config: EnvironmentConfig, chats: ChatExamples, environment: Environment | None
    ) -> None:
        self.config, self.chats, self.environment = config, chats, environment
        self.inline = config.form == "nanochat"
        encoder = chats.tokenizer.encoder
        if self.inline:
            found = {name: encoder.token_to_id(name) for name in (ASKS, ASKED, SAYS, SAID)}
            self.marks = {name: id for name, id in found.items() if id is not None}
            if missing := [name for name in found if name not in self.marks]:
                raise BevatronError(
                    f"objective.environment.form nanochat: {chats.tokenizer.file} has no token "
                    f"{' or '.join(missing)}; use form: chat"
                )
            self.stops = frozenset({self.marks[ASKED]})
        elif chats.template is None:
            raise BevatronError(
                f"objective.environment: {chats.tokenizer.file} has no chat template beside it, "
                "which says how tools answer; use a chat model, or objective.chat_template"
            )
        else:
            self.stops = chats.template.stop_tokens

    @property
    def tools(self) -> Any:
        """What prompts are rendered with, if the template has a place for it."""
        template = self.chats.template
        if self.inline or self.environment is None or template is None or not template.takes_tools:
            return None
        return self.environment.tools

    def __call__(
        self, engine: LiveEngine, asks: Sequence[Ask], ends: Ends, longest: int, seq_len: int
    ) -> list[Rollout]:
        talks = [Conversation.of(ask) for ask in asks]
        for turn in range(self.config.turns):
            active = [talk for talk in talks if talk.open]
            if not active:
                break
            self._answer(engine, active, ends, longest, seq_len)
            active = [talk for talk in active if talk.finished]
            if turn + 1 == self.config.turns:
                break
            replies = on_all(lambda: self._replies(active))[0]  # noqa: B023 (called at once)
            assert replies is not None
            for talk, reply in zip(active, replies, strict=True):
                talk.open = reply is not None
                if reply is None:
                    continue
                talk.finished = False
                talk.open = self._room(talk, longest, seq_len) > len(reply[1])
                if talk.open:  # else it is cut off there
                    talk.messages += reply[0]
                    talk.add(reply[1], None)
        return [self._rollout(talk) for talk in talks]

    def _room(self, talk: Conversation, longest: int, seq_len: int) -> int:
        """Tokens that the conversation may still have."""
        return min(longest - (len(talk.ids) - len(talk.ask.ids)), seq_len - len(talk.ids))

    def _answer(
        self,
        engine: LiveEngine,
        talks: Sequence[Conversation],
        ends: Ends,
        longest: int,
        seq_len: int,
    ) -> None:
        """The model's next turn in each."""
        requests = [
            Request(
                tuple(talk.ids),
                self._room(talk, longest, seq_len),
                talk.ask.sampling,
                ends.tokens | self.stops,
                ends.strings,
                logprobs=0,
                tempered=True,
                kept_tokens=ends.kept | (frozenset(self.marks.values()) if self.inline else set()),
            )
            for talk in talks
        ]
        for talk, found in zip(talks, engine.complete(requests), strict=True):
            assert found.logprobs is not None
            talk.add(found.tokens, [one.logprob for one in found.logprobs])
            talk.texts.append(found.text)
            talk.messages.append({"role": "assistant", "content": found.text})
            talk.finished = talk.open = found.finish_reason == "stop"

    def _replies(self, talks: Sequence[Conversation]) -> list[Reply] | None:
        """On rank 0."""
        if self.environment is None:
            return None
        return [self._inline(talk) if self.inline else self._reply(talk) for talk in talks]

    def _reply(self, talk: Conversation) -> Reply:
        assert self.environment is not None and talk.ask.problem is not None
        problem = talk.ask.problem
        prompt = problem.prompt
        if isinstance(prompt, str):
            raise BevatronError(
                "objective.environment: the prompts are texts, and tools answer in chats; set "
                "objective.problems.chat: true, or give messages"
            )
        messages = self.environment.reply(problem.row, [*prompt, *talk.messages])
        return None if messages is None else (messages, self.told(messages))

    def told(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of an environment's messages and the beginning of the answer after them:
        what the template writes behind the end of an assistant's turn. Raises ChatError if it
        writes earlier turns in another way once there are more."""
        template = self.chats.template
        assert template is not None
        before: list[Message] = [{"role": "user", "content": "x"}]
        before.append({"role": "assistant", "content": "y"})
        short = template.encode(before, tools=self.tools, add_generation_prompt=False)
        whole = template.encode([*before, *messages], tools=self.tools)
        stops = [i for i, id in enumerate(short) if id in self.stops]
        cut = stops[-1] + 1 if stops else len(short)
        if whole[:cut] != short[:cut]:
            raise ChatError(
                f"{template.where}: the template writes an answer in another way once a tool has "
                "answered, so a conversation cannot be continued token by token"
            )
        return whole[cut:]

    def _inline(self, talk: Conversation) -> Reply:
        """NanoChat's: the model goes on in the same turn, behind the value of its expression."""
        assert self.environment is not None
        if talk.ids[-1] != self.marks[ASKED]:
            return None
        said = talk.texts[-1].removesuffix(ASKED).rpartition(ASKS)[2]
        value = self.environment.calculate(said)
        encoder = self.chats.tokenizer.encoder
        ids = encoder.encode(value, add_special_tokens=False).ids
        message = {"role": "tool", "name": "calculator", "content": value}
        return [message], [self.marks[SAYS], *ids, self.marks[SAID]]

    def _rollout(self, talk: Conversation) -> Rollout:
        """One that has no room for what the environment says is not finished."""
        text = self._whole(talk) if self.inline else talk.texts[-1] if talk.texts else ""
        return Rollout(
            talk.ids, talk.learned, talk.logprobs, talk.said, text, talk.finished, talk.messages
        )

    @staticmethod
    def _whole(talk: Conversation) -> str:
        """NanoChat's answer is one text, with the values in it."""
        parts = [
            m["content"] if m["role"] == "assistant" else f"{SAYS}{m['content']}{SAID}"
            for m in talk.messages
        ]
        return "".join(parts)
