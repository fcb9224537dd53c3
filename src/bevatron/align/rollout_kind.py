"""Settings of objectives that learn from the model's own answers, and of reinforcement learning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from bevatron.align.environment_config import EnvironmentConfig
from bevatron.align.problem_config import ProblemsConfig
from bevatron.align.reference_kind import ReferenceKind
from bevatron.align.reward_config import OneReward
from bevatron.train.config_objective import Kind, Section


class EngineConfig(Section):
    """The engine that answers, on the ranks of the run, between its steps."""

    tp: int = Field(1, ge=1)
    """Processes that share each of its layers."""
    pp: int = Field(1, ge=1)
    """Processes that share its layers out."""
    replicas: int | None = Field(None, ge=1)
    """How many engines share the prompts out; if absent, as many as the processes are enough
    for."""
    max_batch: int = Field(32, ge=1)
    """Answers that each engine computes at a time. Its cache has `data.seq_len` positions for each
    of them."""


class RolloutKind(Kind):
    """What prompts are, and how they are answered."""

    # Whether there must be rewards:
    scored: ClassVar[bool] = True

    name: str
    problems: ProblemsConfig | None = None
    """How rows of the data become prompts; if absent, by their column `prompt`."""
    rewards: list[OneReward] = Field([])
    """At least one. What scores the answers; their weighted sum is what an answer is worth."""
    environment: EnvironmentConfig | None = None
    """What answers the model, if its answers are to take several turns."""
    num_generations: int = Field(8, ge=1)
    """Answers to each prompt, which form a group."""
    num_generations_eval: int = Field(1, ge=1)
    """Answers to each prompt of a validation. 1: one, greedily; more: that one, and so many sampled
    ones for pass@k."""
    max_completion_length: int = Field(512, ge=1)
    """Most tokens of an answer. What is left of `data.seq_len` behind a prompt bounds it too."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling. Log-probabilities are those at this temperature, of the trained model too."""
    top_p: float = Field(1.0, gt=0, le=1)
    """The likeliest tokens whose probabilities add up to it are drawn from."""
    top_k: int = Field(0, ge=0)
    """So many of the likeliest tokens are drawn from; 0: all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Tokens of at least this share of the highest probability are drawn from."""
    stop_strings: list[str] = Field([])
    """Texts that end an answer, besides the model's own end-of-turn tokens."""
    mask_truncated_completions: bool = False
    """Learn nothing from answers that did not end by themselves."""
    dynamic_sampling: int = Field(0, ge=0)
    """Groups whose rewards are all equal teach nothing: answer other prompts in their place, up to
    so many times a batch (DAPO)."""
    solved_at: float = 1.0
    """An answer solves its problem, for pass@k, if its first reward is at least this."""
    steps_per_generation: int = Field(1, ge=1)
    """Updates that a batch of rollouts is shared out to: it has so many times `train.global_batch`
    answers."""
    num_iterations: int = Field(1, ge=1)
    """How often each of these answers is used."""
    importance_sampling_correction: bool = True
    """Weigh each token by what the trainer's probability of it is to the engine's, which rounds
    differently."""
    importance_sampling_mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "token_truncate"
    """Of these weights: of each token or of the whole answer; what is above the bound is set to it
    or to 0."""
    importance_sampling_clip_max: float | None = Field(2.0, gt=0)
    """The bound; none if absent."""
    max_logp_difference: float | None = Field(0.5, gt=0)
    """The run stops when the engine's and the trainer's log-probabilities of the sampled tokens
    differ by more than this on average: then one of them is wrong. Absent: it never does."""
    engine: EngineConfig | None = None
    """The engine that answers; if absent, one on each process."""

    @model_validator(mode="after")
    def _groups(self) -> RolloutKind:
        if self.scored and not self.rewards:
            raise ValueError("rewards is empty; name what scores an answer: [{name: exact_match}]")
        if self.num_generations == 1 and self.dynamic_sampling:
            raise ValueError("dynamic_sampling needs num_generations of at least 2")
        return self

    @property
    def answers_on(self) -> EngineConfig:
        """The engine, defaults included."""
        return self.engine or EngineConfig()

    @property
    def updates(self) -> int:
        """That one batch of rollouts serves."""
        return self.steps_per_generation * self.num_iterations


class PolicyKind(ReferenceKind, RolloutKind):
    """Reinforcement learning with verifiable rewards."""

    reads: ClassVar[str] = "bevatron.align.policy_feed:PolicyFeed"
    minimises: ClassVar[str] = "bevatron.align.policy:Policy"

    name: str = "grpo"
    loss: Literal["grpo", "dapo", "bnpo", "dr_grpo", "rloo", "cispo", "gspo", "reinforce"] = "dapo"
    """Which one: grpo averages over answers, dapo and bnpo over all tokens, dr_grpo over answers of
    a constant length; rloo's ratios are of whole answers and its baseline the others' mean; gspo's
    are of answers by the token; cispo clips weights; reinforce is -A log p and nothing else."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """By whose standard deviation advantages are divided; if absent, the group's, and with dr_grpo,
    rloo and reinforce none."""
    beta: float = Field(0.0, ge=0)
    """Weight of the KL to the reference: of k3 in the loss of each token, with rloo of the whole
    answer's log-ratio in its reward, as in its paper. 0: there is no reference."""
    use_bias_correction_kl: bool = True
    """Multiply k3 by the ratio, so that its gradient is that of the KL (DeepSeek-V3.2)."""
    epsilon: float = Field(0.2, ge=0)
    """Ratios below 1 - epsilon are clipped."""
    epsilon_high: float | None = Field(None, ge=0)
    """Ratios above 1 + this are clipped (DAPO: 0.28); with cispo the largest weight (ScaleRL: 5);
    if absent, epsilon."""
    delta: float | None = Field(None, gt=0)
    """The largest ratio that counts for an answer with a negative advantage (INTELLECT-2); none if
    absent."""

    @property
    def answered_by_update(self) -> bool:
        """Whether a batch serves one update, whose own log-probabilities are therefore those of the
        policy that answered. A KL in the reward needs them before it."""
        return self.updates == 1 and not (self.loss == "rloo" and self.beta)

    @model_validator(mode="after")
    def _fits(self) -> PolicyKind:
        if self.num_generations == 1 and self.loss != "reinforce":
            raise ValueError(
                f"num_generations is 1, but an advantage of {self.loss} is a difference to other "
                "answers to the same prompt; set it to at least 2"
            )
        if self.loss == "reinforce" and self.beta:
            raise ValueError(
                "loss reinforce has no term for a KL, so beta means nothing to it; set beta to 0, "
                "or take another loss"
            )
        if (self.reference or self.reference_like) and not self.beta:
            raise ValueError("reference is named, but beta is 0, so nothing is compared with it")
        if self.loss == "reinforce" and self.updates > 1:
            raise ValueError(
                "loss reinforce has no ratios, so it uses each answer once, for the update that "
                "follows: set steps_per_generation and num_iterations to 1, or take another loss"
            )
        return self
