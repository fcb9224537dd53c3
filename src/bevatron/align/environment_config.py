"""Settings of an environment: what answers the model until its own answer is final. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bevatron.train.config_objective import Section


class EnvironmentConfig(Section):
    """What answers the model, so that an answer may take several turns. What the environment says
    is part of the sequence and is not learned. The rewards score the whole of it."""

    tools: list[Literal["calculator", "python"]] = Field([])
    """Tools that the model may call: calculator computes an expression, python runs a program in
    the locked-down process of the reward `code` and answers with what it prints."""
    form: Literal["chat", "nanochat"] = "chat"
    """chat: calls as the model's chat template and family have them, answered by a message of the
    role `tool`; nanochat: an expression between <|python_start|> and <|python_end|>, answered
    within the answer, between <|output_start|> and <|output_end|>."""
    path: str | None = None
    """Instead of tools, a Python file of the user's."""
    function: str = "reply"
    """The function in it: reply(row, messages) -> the messages that follow, or None if the
    conversation is over."""
    turns: int = Field(4, ge=1)
    """Most answers of the model in one conversation."""
    seconds: float = Field(5.0, gt=0)
    """By the clock, for one call."""
    memory_gib: float = Field(1.0, gt=0)
    """That a call may take."""
    allow_unguarded: bool = False
    """As for the reward `code`."""

    @model_validator(mode="after")
    def _one(self) -> EnvironmentConfig:
        if (not self.tools) == (self.path is None):
            raise ValueError("give either tools, such as [calculator], or the path of a function")
        if self.form == "nanochat" and self.tools != ["calculator"]:
            raise ValueError("form nanochat has one tool: tools: [calculator]")
        return self
