"""The settings of on-policy distillation: the section `objective` with the name
`on_policy_distill`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from bevatron.align.reward_config import OneReward
from bevatron.align.rollout_kind import RolloutKind

# Keys of answers that are learned from by their rewards.
UNUSED = (
    "dynamic_sampling",
    "importance_sampling_correction",
    "importance_sampling_mode",
    "importance_sampling_clip_max",
)


class OnPolicyDistillKind(RolloutKind):
    """A student learns from what its teacher says of the student's own answers. `temperature` is
    that of sampling and of both distributions, as in TRL's DistillationTrainer."""

    reads: ClassVar[str] = "bevatron.align.student_feed:StudentFeed"
    minimises: ClassVar[str] = "bevatron.align.on_policy_distill:OnPolicyDistill"
    paths: ClassVar[tuple[str, ...]] = ("teacher",)
    scored: ClassVar[bool] = False

    name: str = "on_policy_distill"
    rewards: list[OneReward] = Field([])
    """What scores the answers, to be reported; nothing is learned from it."""
    num_generations: int = Field(1, ge=1)
    """Answers to each prompt."""
    teacher: str | None = None
    """The model to distil from: a native checkpoint, a run, an HF folder or a Hub id."""
    teacher_like: str | None = None
    """Preset or spec file whose sizes the teacher has, as `model.like`."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    """Between the two distributions: KL(teacher || student), KL(student || teacher), or
    Jensen-Shannon."""
    mixture: float = Field(0.5, gt=0, lt=1)
    """Of jsd: the teacher's share of the distribution that both are compared with (TRL's beta)."""
    teacher_top_k: int | None = Field(None, ge=1)
    """Compare the teacher's k likeliest tokens, and the mass of all others as one more; if absent,
    all tokens."""

    @model_validator(mode="after")
    def _taught(self) -> OnPolicyDistillKind:
        if self.teacher is None:
            raise ValueError(
                "on_policy_distill needs a teacher, which reads what the student says; name its "
                "folder in objective.teacher"
            )
        for key in UNUSED:
            if getattr(self, key) != RolloutKind.model_fields[key].default:
                raise ValueError(
                    f"{key} means nothing to on_policy_distill, which learns from the teacher and "
                    "not from rewards; drop it"
                )
        return self
