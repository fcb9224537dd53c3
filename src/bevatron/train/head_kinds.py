"""The settings of objectives on classification and question answering heads.

Here is also decided which head a run trains: the model's own head, or a new one on top of a
language model's body.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from bevatron.data.labelled_examples import Labelled, Padded, SequenceLabels, TokenLabels
from bevatron.data.question_answering import Answers
from bevatron.data.tokenizer import OpenTokenizer
from bevatron.errors import BevatronError
from bevatron.families import by_name
from bevatron.spec import Head, ModelSpec
from bevatron.spec.model import HeadKind
from bevatron.train.config_objective import KINDS, Kind, kind_named

if TYPE_CHECKING:
    from bevatron.train.config import RunConfig


class ExamplesKind(Kind):
    """What learns from rows of files, each of which comes once an epoch."""

    reads = "bevatron.train.labelled_feed:LabelledFeed"

    def labelled(self, opened: OpenTokenizer, config: RunConfig, spec: ModelSpec) -> Labelled:
        """How rows become arrays, with this tokenizer and for this model. Raises BevatronError if
        the run cannot read any."""
        raise NotImplementedError


class LabelledKind(ExamplesKind):
    """What learns from labelled examples."""

    new_head: bool = False
    """Replace the head that the model has by a freshly initialised one."""

    @property
    def replaces_head(self) -> bool:
        return self.new_head

    def labelled(self, opened: OpenTokenizer, config: RunConfig, spec: ModelSpec) -> Labelled:
        if config.parallel.cp > 1:
            raise BevatronError(
                f"objective.name {self.name} scores whole sequences, which "
                f"parallel.cp={config.parallel.cp} cuts; use cp: 1"
            )
        padded = Padded.of(opened, config.data.seq_len, spec.head.pad_token_id)
        return self.rows(padded, spec.head)

    def rows(self, padded: Padded, head: Head) -> Labelled:
        """How rows become arrays of this length, for this head."""
        raise NotImplementedError


class _Classification(LabelledKind):
    labels: list[str] = Field([])
    """Names, in order, of the new head that a language model gets."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels has a name twice; name every label once")
        return self

    def adjusted(self, head: Head) -> Head:
        if self.labels and tuple(self.labels) != head.labels:
            raise BevatronError(
                f"objective.labels is {self.labels}, but the model's head has the labels "
                f"{list(head.labels)}; drop objective.labels to go on with these, or set "
                "objective.new_head: true to start with a new head"
            )
        return head

    def named(self) -> tuple[str, ...]:
        """The labels of a new head. Raises BevatronError if there are none."""
        if not self.labels:
            raise BevatronError(
                f"objective.labels: missing; the model gets a new {self.head} head, so name its "
                "labels in order, such as labels: [negative, positive]"
            )
        return tuple(self.labels)


class SequenceClassificationKind(_Classification):
    head = "sequence_classification"
    minimises = "bevatron.train.head_objectives:SequenceClassification"

    problem_type: (
        Literal["regression", "single_label_classification", "multi_label_classification"] | None
    ) = None
    """Of a new head; if absent, regression for one label, else single_label_classification."""

    def adjusted(self, head: Head) -> Head:
        super().adjusted(head)
        if self.problem_type is None:
            return head
        if head.problem_type not in (None, self.problem_type):
            raise BevatronError(
                f"objective.problem_type is {self.problem_type}, but the model's head is for "
                f"{head.problem_type}; drop it, or set objective.new_head: true"
            )
        return replace(head, problem_type=self.problem_type)

    def made_head(self) -> Head:
        one = self.problem_type == "regression" and not self.labels
        labels = ("LABEL_0",) if one else self.named()
        made = Head(self.head, labels, problem_type=self.problem_type)
        return replace(made, problem_type=problem_type(made))

    def rows(self, padded: Padded, head: Head) -> Labelled:
        return SequenceLabels(padded, head.labels, problem_type(head))


class TokenClassificationKind(_Classification):
    head = "token_classification"
    minimises = "bevatron.train.head_objectives:TokenClassification"

    label_all_tokens: bool = False
    """A word's label for all of its tokens (B-X continued as I-X), not only for the first."""
    join_words: bool = False
    """Tokenize words joined by spaces, as text has them at inference, rather than one by one, as
    transformers' scripts do."""

    def made_head(self) -> Head:
        return Head(self.head, self.named(), bias=True)

    def rows(self, padded: Padded, head: Head) -> Labelled:
        return TokenLabels(
            padded, head.labels, all_tokens=self.label_all_tokens, join=self.join_words
        )


class QuestionAnsweringKind(LabelledKind):
    head = "question_answering"
    minimises = "bevatron.train.head_objectives:QuestionAnswering"

    stride: int | None = Field(None, ge=1)
    """Tokens that neighbouring windows of a long context share; if absent, a context is cut off
    where the sequence is full."""

    def made_head(self) -> Head:
        return Head(self.head, bias=True)

    def rows(self, padded: Padded, head: Head) -> Labelled:
        return Answers(padded, self.stride)


def problem_type(head: Head) -> str:
    """The head's, or what transformers makes of the number of its labels."""
    if head.problem_type is not None:
        return head.problem_type
    return "regression" if len(head.labels) == 1 else "single_label_classification"


def with_head(
    spec: ModelSpec,
    objective: Kind,
    family: str,
    pad: Callable[[], int | None],
    *,
    keep: bool = False,
) -> tuple[ModelSpec, tuple[str, ...]]:
    """The spec that the objective trains, and the parameters of its head if that is a new one.

    Args:
        family: that the model is of; its class with the head must exist, so that it can be
            exported.
        pad: finds the padding token's id; called if the head needs one and names none.
        keep: the model's head is that of this run already, and is not replaced again.
    Raises BevatronError saying what to change if objective and model do not go together.
    """
    kind, old = objective.head, spec.head
    renewed = objective.replaces_head and not keep
    if old.kind == kind and not renewed:
        return replace(spec, head=_padded(objective.adjusted(old), pad)), ()
    if kind == "causal_lm":
        raise BevatronError(
            f"objective.name {objective.name} needs a model with a causal_lm head; this one has "
            f"the head {old.kind}: {_advice(old.kind)}"
        )
    if old.kind not in ("causal_lm", "none") and not renewed:
        raise BevatronError(
            f"objective.name {objective.name} needs a model with the head {kind}, or a language "
            f"model, which gets a new one; this one has the head {old.kind}: {_advice(old.kind)}, "
            "or set objective.new_head: true to replace it by a new one"
        )
    classes = by_name(family).architectures
    if kind not in classes.values():
        raise BevatronError(
            f"objective.name {objective.name}: transformers has no class for a {family} model with "
            f"the head {kind}, only {', '.join(classes)}, so it could not be exported; start from "
            "a model of another family"
        )
    head = _padded(objective.made_head(), pad)
    made = replace(spec, head=head)
    return made, tuple(p.name for p in head.parameters(spec.hidden_size))


def _padded(head: Head, pad: Callable[[], int | None]) -> Head:
    """A sequence classifier finds the ends of its sequences by the padding token."""
    if head.kind != "sequence_classification" or head.pad_token_id is not None:
        return head
    found = pad()
    if found is None:
        raise BevatronError(
            "the tokenizer names neither a pad nor an eos token, so the ends of sequences cannot "
            "be told; set pad_token in its tokenizer_config.json"
        )
    return replace(head, pad_token_id=found)


def _advice(kind: HeadKind) -> str:
    same = next((name for name in KINDS if kind_named(name).head == kind), None)
    if same is None:
        return "start from a model with one"
    return f"use objective.name: {same}"
