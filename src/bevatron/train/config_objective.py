"""What a run minimises: the section `objective` of its configuration."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """Strict, frozen, and no unknown keys. The text below a key is its meaning."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        populate_by_name=True,
        use_attribute_docstrings=True,  # what a key means: docs/configuration.md is made of it
    )


# Every objective, and the settings that mean something to it.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "pretrain": ("z_loss",),
    "distill": (
        "teacher",
        "teacher_like",
        "logits",
        "states",
        "divergence",
        "temperature",
        "top_k",
        "ce",
    ),
    "sequence_classification": ("labels", "problem_type", "new_head"),
    "token_classification": ("labels", "new_head", "label_all_tokens", "join_words"),
    "question_answering": ("new_head", "stride"),
}
UNLABELLED = ("pretrain", "distill")  # these read token stores


class StatesConfig(Section):
    """Which hidden states of a student are drawn to its teacher's, and how; see
    `compress.states.StatesLoss`."""

    layers: Literal["all"] | dict[str, int] = {}
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


class ObjectiveConfig(Section):
    """What is minimised. Keys that mean nothing to the objective are refused."""

    name: str = "pretrain"
    """What is minimised: pretrain, distill, sequence_classification, token_classification or
    question_answering."""
    z_loss: float = Field(0.0, ge=0)
    """pretrain: weight of the mean of logsumexp(logits)^2 (PaLM: 1e-4), reported apart."""
    teacher: str | None = None
    """distill: the model to distil from: a native checkpoint, a run, an HF folder or a Hub id."""
    teacher_like: str | None = None
    """distill: preset or spec file whose sizes the teacher has, as `model.like`."""
    logits: str | None = None
    """distill: instead of a teacher, a folder of `bevatron logits` with what one said before."""
    states: StatesConfig | None = None
    """distill: states of the layers that are compared besides the logits."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """distill: between the two distributions: KL(teacher || student), KL(student || teacher), or
    Jensen-Shannon."""
    temperature: float = Field(1.0, gt=0)
    """distill: both models' logits are divided by it."""
    top_k: int | None = Field(None, ge=1)
    """distill: compare the teacher's k likeliest tokens, and the mass of all others as one more;
    if absent, all tokens."""
    ce: float = Field(0.0, ge=0)
    """distill: weight of the cross-entropy with the data's own next token."""
    labels: list[str] = []
    """Classification: names, in order, of the new head that a language model gets."""
    problem_type: (
        Literal["regression", "single_label_classification", "multi_label_classification"] | None
    ) = None
    """sequence_classification: of that head; if absent, regression for one label, else
    single_label_classification."""
    new_head: bool = False
    """Heads: replace the one that the model has by a freshly initialised one."""
    label_all_tokens: bool = False
    """token_classification: a word's label for all of its tokens (B-X continued as I-X), not only
    for the first."""
    join_words: bool = False
    """token_classification: tokenize words joined by spaces, as text has them at inference, rather
    than one by one, as transformers' scripts do."""
    stride: int | None = Field(None, ge=1)
    """question_answering: tokens that neighbouring windows of a long context share; if absent, a
    context is cut off where the sequence is full."""

    @model_validator(mode="after")
    def _known(self) -> ObjectiveConfig:
        if self.name not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise ValueError(f"name {self.name!r} is unknown; known are {known}")
        for key, field in type(self).model_fields.items():
            if key == "name" or key in OBJECTIVES[self.name]:
                continue
            if getattr(self, key) != field.default:
                takers = " or ".join(name for name, keys in OBJECTIVES.items() if key in keys)
                raise ValueError(f"{key} means nothing to {self.name}, only to {takers}; drop it")
        if self.name == "distill" and (self.teacher is None) == (self.logits is None):
            raise ValueError(
                "distill needs a teacher; name its folder in objective.teacher, or that of its "
                "stored logits in objective.logits, and not both"
            )
        if self.states is not None and self.teacher is None:
            raise ValueError("states needs objective.teacher: stored logits have no states")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels has a name twice; name every label once")
        return self
