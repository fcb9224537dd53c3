"""On-policy distillation: a student learns what its teacher says of the student's own answers.

The student answers prompts by the engine inside the run, and at every token of an answer its
distribution over the next one is drawn to the teacher's (Agarwal et al., arXiv 2306.13649; Gu et
al., MiniLLM, arXiv 2306.08543). With the reverse KL, the default, the student is not asked to cover
what it cannot say. No gradient goes through the sampling. Samples come from `rollout_feed.py`, the
divergence from `compress.logit_divergence`; the teacher is a companion of any family and shape with
the student's vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from bevatron.align.on_policy_distill_kind import OnPolicyDistillKind
from bevatron.align.reward_model import judges
from bevatron.align.sequences import labels_of
from bevatron.compress.distill import Distill, teacher_of
from bevatron.compress.logit_divergence import Divergence
from bevatron.nn.vocabulary_loss import IGNORE
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.objectives import BLANK, Samples


class OnPolicyDistill(Distill):
    """The mean over all tokens of all answers of the global batch of temperature^2 * divergence.
    Samples are answers: `tokens` [n, T] and `learned` [n, T] (see `sequences.py`). Reports `kl`,
    the divergence alone, and `ce`, the mean of -log p(token) at temperature 1, which is not
    minimised."""

    name = "on_policy_distill"

    @classmethod
    def of(  # type: ignore[override]  # of another kind
        cls, kind: OnPolicyDistillKind, student: ModelSpec, run: RunConfig
    ) -> OnPolicyDistill:
        options = Divergence(
            kind.divergence, kind.temperature, kind.teacher_top_k, 0.0, kind.mixture
        )
        teacher = teacher_of(kind, student, "teacher_top_k", kind.teacher_top_k)
        made = cls(teacher, options)
        made.companions = {**made.companions, **judges(kind.rewards)}
        return made

    def batch(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = samples["tokens"]
        labels = labels_of(tokens, samples["learned"])
        if (blank := samples.get(BLANK)) is not None:
            labels = labels.masked_fill(blank[:, None], IGNORE)
        return tokens, {"labels": labels}
