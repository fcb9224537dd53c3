"""The settings of problems: how prompts are made of rows, and their curriculum. No torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from bevatron.train.config_objective import Section

Rate = Annotated[float, Field(ge=0, le=1)]


class CurriculumConfig(Section):
    """Which problems come when, by the share of answers that are right (their pass rate): each
    batch is drawn by a Gaussian over pass rates whose centre moves from easy to hard
    (Llama-Nemotron, arXiv 2505.00949, section 5)."""

    column: str = "pass_rate"
    """Column of the rows with the measured rate, as `bevatron pass-rates` writes it."""
    drop_from: float = Field(0.75, gt=0)
    """Problems with this rate or a higher one are left out; above 1: none."""
    drop_below: Rate = 0.0
    """Problems with a lower rate are left out, such as those that were never solved."""
    start: Rate = 0.7
    """Centre of the first batch."""
    end: Rate = 0.1
    """Centre of the last one."""
    width: float = Field(0.15, gt=0)
    """Standard deviation."""
    steps: int | None = Field(None, ge=1)
    """Batches over which the centre moves; if absent, those of the run."""

    @model_validator(mode="after")
    def _some(self) -> CurriculumConfig:
        if self.drop_below >= self.drop_from:
            raise ValueError(
                f"drop_below {self.drop_below:g} and drop_from {self.drop_from:g} leave nothing"
            )
        return self


class ProblemsConfig(Section):
    """How a row of the data becomes a prompt. Its other columns go to the rewards."""

    column: str = "prompt"
    """Column with the prompt: a text, or messages."""
    template: str | None = None
    """A text in which {prompt} stands for that column, if it is a text, and the name of any other
    column in braces for that one."""
    system: str | None = None
    """A system message before the prompt, which becomes a chat."""
    chat: bool = False
    """A text is what a user says in a chat. If false, the model continues the text."""
    curriculum: CurriculumConfig | None = None
    """Which problems come when."""
