"""The settings of the objective `reward`: a model that scores answers, learned from preferences or
from known scores."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from bevatron.data.labelled_examples import Labelled
from bevatron.data.tokenizer import OpenTokenizer
from bevatron.errors import BevatronError
from bevatron.spec import Head, ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.head_kinds import LabelledKind

if TYPE_CHECKING:
    from bevatron.train.objectives import Objective


class RewardKind(LabelledKind):
    head = "sequence_classification"
    reads = "bevatron.align.reward_feed:RewardFeed"

    name: str = "reward"
    attributes: list[str] = Field([])
    """Columns with scores that answers are to get, such as [helpfulness, verbosity]: they become
    the labels of the head, and their squared error is minimised. If absent, of two answers to a
    prompt the chosen one is to get the higher score (Bradley and Terry)."""
    margin: str = "margin"
    """Of two answers: the column that says by how much the chosen one's score is to be higher; a
    row without it says 0."""
    center_rewards_coefficient: float | None = Field(None, gt=0)
    """Of two answers: weight of the mean square of their scores' sum, which keeps scores around
    zero; if absent, none."""
    chat_template: str | None = None
    """A file with a chat template, in place of the tokenizer's own."""

    @model_validator(mode="after")
    def _of_pairs_or_scores(self) -> Self:
        if self.attributes and self.center_rewards_coefficient is not None:
            raise ValueError(
                "center_rewards_coefficient is for pairs of answers, but attributes are scores "
                "that are known; drop one of them"
            )
        if len(set(self.attributes)) < len(self.attributes):
            raise ValueError("attributes has a name twice; name every column once")
        return self

    @property
    def sequences(self) -> int:
        return 1 if self.attributes else 2

    def made_head(self) -> Head:
        labels = tuple(self.attributes) or ("reward",)
        return Head(self.head, labels, problem_type="regression")

    def adjusted(self, head: Head) -> Head:
        anew = "or set objective.new_head: true to start with a new head"
        if head.problem_type not in (None, "regression"):
            raise BevatronError(
                f"objective.name {self.name} learns scores, but the model's head is for "
                f"{head.problem_type}; start from another model, {anew}"
            )
        if not self.attributes and len(head.labels) > 1:
            raise BevatronError(
                f"objective.attributes: missing; the model's head has {len(head.labels)} scores "
                f"({', '.join(head.labels)}), and pairs of answers are for one; name these "
                f"columns, {anew}"
            )
        if self.attributes and tuple(self.attributes) != head.labels:
            raise BevatronError(
                f"objective.attributes is {self.attributes}, but the model's head has the labels "
                f"{list(head.labels)}; drop objective.attributes to go on with these, {anew}"
            )
        return replace(head, problem_type="regression")

    def labelled(self, opened: OpenTokenizer, config: RunConfig, spec: ModelSpec) -> Labelled:
        from bevatron.align.reward_rows import RewardPairs, ScoredAnswers
        from bevatron.data.chat_examples import ChatExamples

        examples = ChatExamples.open(opened.file.parent, chat_template=self.chat_template)
        length, pad = config.data.seq_len, spec.head.pad_token_id
        if self.attributes:
            return ScoredAnswers(examples, length, self.attributes, pad_id=pad)
        return RewardPairs(examples, length, pad_id=pad, numbers=[self.margin])

    def make(self, spec: ModelSpec, config: RunConfig) -> Objective:
        from bevatron.align.reward_objective import Attributes, BradleyTerry

        if self.attributes:
            return Attributes(spec.head)
        centring = self.center_rewards_coefficient or 0.0
        return BradleyTerry(spec.head, centring, margin=self.margin)
