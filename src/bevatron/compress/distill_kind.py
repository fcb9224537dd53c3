"""The settings of a distillation: the section `objective` with the name `distill`."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from bevatron.train.config_objective import Kind, Section


class StatesConfig(Section):
    """Which hidden states of a student are drawn to its teacher's, and how; see
    `compress.distill_states.StatesLoss`."""

    layers: Literal["all"] | dict[str, int] = Field({})
    """The student's layer -> the teacher's, counted from 0, such as {13: 29}; or `all`, of two
    models with as many."""
    embedding: bool = False
    """Also what enters the first layer."""
    loss: Literal["cosine", "mse"] = "cosine"
    """The distance: 1 - cosine, or the mean squared difference."""
    weight: Literal["dynamic"] | float = "dynamic"
    """Of the states in the sum; `dynamic` makes them as large as the rest of the loss."""
    project: bool | None = None
    """Map the student's states by a learnt matrix first; if absent, where the widths differ."""

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        known = value == "all" or (
            isinstance(value, dict)
            and all(str(k).isdecimal() and type(v) is int for k, v in value.items())
        )
        if not known:
            raise ValueError(
                "expected all, or the teacher's layer for each of the student's, counted from 0, "
                f"as in {{13: 29}}, found {value!r}"
            )
        return value

    @field_validator("weight", mode="before")
    @classmethod
    def _weight(cls, value: Any) -> Any:
        if value != "dynamic" and (type(value) not in (int, float) or not 0 <= value < math.inf):
            raise ValueError(f"expected dynamic, or a number from 0 on, found {value!r}")
        return value

    @model_validator(mode="after")
    def _some(self) -> StatesConfig:
        if not self.layers and not self.embedding:
            raise ValueError("names no states; give layers, as in {13: 29}, or embedding: true")
        return self


class DistillKind(Kind):
    minimises = "bevatron.compress.distill:Distill"
    paths = ("teacher", "logits")

    teacher: str | None = None
    """The model to distil from: a native checkpoint, a run, an HF folder or a Hub id."""
    teacher_like: str | None = None
    """Preset or spec file whose sizes the teacher has, as `model.like`."""
    logits: str | None = None
    """Instead of a teacher, a folder of `bevatron logits` with what one said before."""
    states: StatesConfig | None = None
    """States of the layers that are compared besides the logits."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Between the two distributions: KL(teacher || student), KL(student || teacher), or
    Jensen-Shannon."""
    mixture: float = Field(0.5, gt=0, lt=1)
    """Of jsd: the teacher's share of the distribution that both are compared with (TRL's beta)."""
    temperature: float = Field(1.0, gt=0)
    """Both models' logits are divided by it."""
    top_k: int | None = Field(None, ge=1)
    """Compare the teacher's k likeliest tokens, and the mass of all others as one more;
    if absent, all tokens."""
    ce: float = Field(0.0, ge=0)
    """Weight of the cross-entropy with the data's own next token."""

    @model_validator(mode="after")
    def _one_teacher(self) -> DistillKind:
        if (self.teacher is None) == (self.logits is None):
            raise ValueError(
                "distill needs a teacher; name its folder in objective.teacher, or that of its "
                "stored logits in objective.logits, and not both"
            )
        if self.states is not None and self.teacher is None:
            raise ValueError("states needs objective.teacher: stored logits have no states")
        return self
