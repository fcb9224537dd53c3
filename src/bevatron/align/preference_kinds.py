"""The settings of objectives on preferences: dpo, ipo, hinge, simpo, rpo."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from bevatron.align.reference_kind import ReferenceKind
from bevatron.align.rollout_kind import RolloutKind
from bevatron.data.labelled_examples import Labelled
from bevatron.data.tokenizer import OpenTokenizer
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.config_objective import Kind
from bevatron.train.head_kinds import ExamplesKind


class PreferenceKind(ExamplesKind):
    """Learns from prompts with two answers, of which one is better."""

    reads = "bevatron.align.preference_feed:PreferenceFeed"
    # Whether answers come with rewards, and how many of them a row may have:
    takes_rewards: ClassVar[bool] = False

    beta: float = Field(0.1, gt=0)
    """What log-probabilities, less the reference's, are multiplied by to be rewards."""
    sft_loss_weight: float = Field(0.0, ge=0)
    """Weight of the cross-entropy of the chosen answers' tokens, which is minimised as well and
    reported as sft_loss."""
    preference_avg_log_probs: bool = False
    """Average the log-probabilities of an answer over its tokens, rather than add them up."""
    too_long: Literal["refuse", "truncate", "drop"] = "refuse"
    """A prompt with an answer of more than `data.seq_len` tokens ends the run before it begins,
    loses its end (and its row is left out if nothing of an answer is left), or its row is left out.
    How many are is said."""
    chat_template: str | None = None
    """A file with a chat template, in place of the tokenizer's own."""

    @property
    def sequences(self) -> int:
        return 2

    def labelled(self, opened: OpenTokenizer, config: RunConfig, spec: ModelSpec) -> Labelled:
        from bevatron.align.preference_rows import PreferenceRows
        from bevatron.data.chat_examples import ChatExamples

        examples = ChatExamples.open(opened.file.parent, chat_template=self.chat_template)
        return PreferenceRows(
            examples,
            config.data.seq_len,
            count=self.sequences,
            rewards=self.takes_rewards,
            default_rewards=self.default_rewards,
            too_long=self.too_long,
        )

    @property
    def default_rewards(self) -> tuple[float | None, float | None]:
        """Of chosen and rejected answers whose row has none."""
        return None, None


class ReferencedKind(ReferenceKind, PreferenceKind):
    """Answers are compared by how much likelier they are than under a reference."""

    precompute_reference: bool = False
    """Compute the reference's log-probabilities of all examples once, at the start, into the run's
    folder; training then holds no reference model."""


class DpoKind(ReferencedKind):
    minimises = "bevatron.align.preference_objectives:Dpo"

    beta: float = Field(0.1, gt=0)
    """What log-ratios are multiplied by: the larger, the closer to the reference."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The share of pairs that are taken to be the wrong way round (cDPO)."""
    robust: bool = False
    """With label_smoothing, an estimate of the loss on the true labels, in place of cDPO."""

    @model_validator(mode="after")
    def _robust_to_something(self) -> Self:
        if self.robust and not self.label_smoothing:
            raise ValueError(
                "robust is the loss for labels of which a share is wrong; set label_smoothing to "
                "that share, or drop it"
            )
        return self


class IpoKind(ReferencedKind):
    minimises = "bevatron.align.preference_objectives:Ipo"

    beta: float = Field(0.1, gt=0)
    """The log-ratios are to differ by 1 / (2 * beta)."""
    preference_avg_log_probs: bool = True
    """Average the log-probabilities of an answer over its tokens, as TRL does for ipo; false adds
    them up, as NeMo-Aligner does."""


class HingeKind(ReferencedKind):
    minimises = "bevatron.align.preference_objectives:Hinge"

    beta: float = Field(0.1, gt=0)
    """The log-ratios are to differ by 1 / beta at least."""


class SimpoKind(PreferenceKind):
    minimises = "bevatron.align.preference_objectives:Simpo"

    beta: float = Field(2.0, gt=0)
    """What mean log-probabilities are multiplied by."""
    gamma: float = Field(0.5, ge=0)
    """The margin that is asked for between the rewards of the two answers."""
    preference_avg_log_probs: Literal[True] = True
    """SimPO's reward is the mean over an answer's tokens."""


class RpoSettings(Kind):
    """RPO's loss, wherever its answers come from."""

    minimises = "bevatron.align.preference_objectives:Rpo"

    loss: Literal["rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq", "rpo_sqloo"] = "rpo_bwd_kl"
    """How implicit rewards are drawn to the given ones: rpo_bwd_kl is KL(given || implicit), as
    NVIDIA calls it, rpo_fwd_kl the other way; rpo_sq the squared difference of two answers' gaps;
    rpo_sqloo that of each of K answers' rewards, less the mean of the others."""
    beta: float = Field(0.2, gt=0)
    """What log-ratios are multiplied by to be implicit rewards (ref_policy_kl_penalty)."""
    eta: float = Field(1.0, gt=0)
    """What given rewards are multiplied by (gt_reward_scale)."""
    preference_avg_log_probs: bool = False
    """Average the log-probabilities of an answer over its tokens, rather than add them up."""
    preference_loss_weight: float = Field(1.0, gt=0)
    """Weight of the loss on preferences beside that of `sft_loss_weight`."""
    sft_loss_weight: float = Field(0.0, ge=0)
    """Weight of the cross-entropy of the best answers' tokens."""


class RpoKind(RpoSettings, ReferencedKind):
    takes_rewards = True

    responses: int = Field(2, ge=2)
    """Answers to a prompt: of more than 2, rows have `responses` and `rewards`."""
    default_chosen_reward: float | None = None
    """Of the chosen answer of a row without chosen_reward."""
    default_rejected_reward: float | None = None
    """Of the rejected answer of a row without rejected_reward."""

    @model_validator(mode="after")
    def _of_two(self) -> Self:
        if self.loss == "rpo_sq" and self.responses > 2:
            raise ValueError(
                f"loss rpo_sq compares two answers, and responses is {self.responses}; use "
                "rpo_sqloo, which is the same of two"
            )
        return self

    @property
    def sequences(self) -> int:
        return self.responses

    @property
    def default_rewards(self) -> tuple[float | None, float | None]:
        return self.default_chosen_reward, self.default_rejected_reward


class OnlineRpoKind(RpoSettings, ReferenceKind, RolloutKind):
    """RPO of the model's own answers: a sample is a prompt, with all of its answers."""

    reads = "bevatron.align.online_feed:OnlineFeed"

    name: str = "online_rpo"
    num_generations: int = Field(4, ge=2)
    """Answers to each prompt, which are compared with each other."""

    @model_validator(mode="after")
    def _of_so_many(self) -> Self:
        if self.loss == "rpo_sq" and self.num_generations > 2:
            raise ValueError(
                f"loss rpo_sq compares two answers, and num_generations is {self.num_generations}; "
                "use rpo_sqloo, which is the same of two"
            )
        for name in MEANINGLESS:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} means nothing to online_rpo, whose loss is no expectation over "
                    "answers; drop it"
                )
        return self

    @property
    def sequences(self) -> int:
        return self.num_generations


# Keys of rollouts that weigh the tokens of a policy's loss.
MEANINGLESS = (
    "importance_sampling_correction",
    "importance_sampling_mode",
    "importance_sampling_clip_max",
)
