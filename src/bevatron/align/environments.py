"""What answers the model within a rollout: tools, or a function of the user's.

An environment gets the row of a problem and the conversation so far, whose last message is the
model's, and says which messages follow; none, if the model's answer was its last. `turns.py` makes
token ids of them, which are part of the sequence and are not learned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bevatron.align.environment_config import EnvironmentConfig
from bevatron.align.locked_python import Limits, run_python
from bevatron.align.reward_config import PythonReward
from bevatron.align.rewards import Answer, Failed, Worker
from bevatron.align.tools import SCHEMAS, answer_of
from bevatron.chat.answer_parts import AnswerReader
from bevatron.chat.tool_calls import ToolCall, parse_calls

# As Hermes, Qwen and SmolLM have it.
TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
MOST_CALLS = 8  # of one answer
Message = dict[str, Any]


class EnvironmentFunction(PythonReward):
    """A function of the user's, as the process that runs it is told."""

    name: str = "environment"


class Environment:
    """One run's. A context. `tools`: what the chat template is given.

    Raises BevatronError if a function cannot be loaded, or Python cannot be locked in."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self.config = config
        self.tools = [SCHEMAS[name] for name in config.tools] or None
        memory = int(config.memory_gib * (1 << 30))
        self.limits = Limits(config.seconds, memory, allow_unguarded=config.allow_unguarded)
        self.notes: list[str] = []
        self._worker: Worker | None = None
        if "python" in config.tools:
            run_python("pass", self.limits)
        if config.path is not None:
            self._function = EnvironmentFunction(
                path=config.path,
                function=config.function,
                seconds=config.seconds,
                memory_gib=config.memory_gib,
            )
            self._worker = Worker(self._function)

    def __enter__(self) -> Environment:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def reply(
        self, row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]
    ) -> list[Message] | None:
        """The messages that follow, or None. A function that fails ends the conversation, and
        `notes` says so."""
        if self.config.path is not None:
            return self._said(row, messages)
        calls = self.calls(str(messages[-1]["content"]))[:MOST_CALLS]
        if not calls:
            return None
        return [
            {
                "role": "tool",
                "name": call.name,
                "content": answer_of(call.name, call.arguments, self.limits),
            }
            for call in calls
        ]

    def calculate(self, expression: str) -> str:
        """The value of an expression, or what is wrong with it."""
        return answer_of("calculator", {"expression": expression}, self.limits)

    def calls(self, text: str) -> list[ToolCall]:
        """The calls of tools in an answer, in whatever form models write them."""
        names = frozenset(self.config.tools)
        said = AnswerReader.whole(text, names)
        if said.calls:
            return list(said.calls)
        return [call for part in TAGGED.findall(said.text) for call in parse_calls(part, names)]

    def _said(
        self, row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]
    ) -> list[Message] | None:
        if self._worker is None or self._worker.ended:
            self._worker = Worker(self._function)
        asked = Answer(dict(row), [dict(m) for m in messages], "", [], True)
        try:
            (found,) = self._worker.score([asked])
        except Failed as error:
            self.notes.append(f"environment {self.config.function} {error}; the answer ends there")
            return None
        if isinstance(found, str):
            self.notes.append(f"environment {self.config.function} {found}; the answer ends there")
            return None
        return found or None
