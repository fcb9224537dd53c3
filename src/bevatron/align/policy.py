"""The objective of reinforcement learning: a policy loss over answers whose advantages are known.

Samples come from `rollout_feed.py`, and the losses from `policy_losses.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bevatron.align.policy_losses import RULES, Clip, mean_count, mean_sum, policy_terms
from bevatron.align.reference import NAME as REFERENCE
from bevatron.align.reference import open_reference
from bevatron.align.reward_model import judges
from bevatron.align.rollout_kind import PolicyKind
from bevatron.align.sequences import labels_of
from bevatron.nn.output_heads import Compute
from bevatron.nn.rank_communication import Comm
from bevatron.nn.vocabulary_loss import IGNORE, log_probabilities_and_entropies
from bevatron.parallel.companion import Companion
from bevatron.parallel.forward_pass import log_probabilities_at
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.objectives import BLANK, NONE, Samples, Stored, Taps, Vector, mean_over

TERMS = ("loss", "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "tokens")
TRIED = ("tried", "reward")  # of a validation, and then pass@k for every k of `tries`


def tries(sampled: int) -> list[int]:
    """For which k pass@k is reported, of so many sampled answers besides the greedy one."""
    ks = [1]
    while sampled > 1 and ks[-1] * 2 <= sampled:
        ks.append(ks[-1] * 2)
    return ks


class Policy:
    """A sample is one answer: `tokens` [n, T] and `learned` [n, T] (see `sequences.py`),
    `advantages` [n], and of every token that is predicted, where its prediction stands: `old`
    [n, T], its log-probability under the policy that answered, by the trainer, and `importance`
    [n, T], what the policy's loss of it is multiplied by.

    Of a validation nothing is learned. Its samples have `reward` [n] and `passes` [n, ks] instead.
    """

    name = "grpo"
    rows = counted = 1
    stored: Stored | None = None
    taps: Taps | None = None

    def __init__(self, kind: PolicyKind, companions: Mapping[str, Companion] = NONE) -> None:
        self.kind, self.rule, self.companions = kind, RULES[kind.loss], companions
        high = kind.epsilon if kind.epsilon_high is None else kind.epsilon_high
        self.in_reward = kind.loss == "rloo"  # where the KL counts
        self.clip = Clip(kind.epsilon, high, kind.delta)
        self.tries = tries(kind.num_generations_eval)
        self.entries = len(TERMS) + len(TRIED) + len(self.tries)

    @classmethod
    def of(cls, kind: PolicyKind, spec: ModelSpec, config: RunConfig) -> Policy:
        companions = judges(kind.rewards)
        if kind.beta:
            asked = log_probabilities_at(kind.temperature)
            companions[REFERENCE] = open_reference(kind, spec, config, asked)
        return cls(kind, companions)

    def batch(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = samples["tokens"]
        labels, nothing = labels_of(tokens, samples["learned"]), torch.zeros(len(tokens))
        nothing = nothing.to(tokens.device)
        if (blank := samples.get(BLANK)) is not None:
            labels = labels.masked_fill(blank[:, None], IGNORE)
        each = torch.zeros(tokens.shape, device=tokens.device)
        return tokens, {
            "labels": labels,
            "lengths": (labels != IGNORE).sum(1),
            "advantages": samples.get("advantages", nothing),
            "old": samples.get("old", each),
            "importance": samples.get("importance", each),
            **self._tried(samples, blank),
        }

    def _tried(self, samples: Samples, blank: Tensor | None) -> dict[str, Tensor]:
        """[n, ...] of a validation: what is added up of each sample."""
        if "passes" not in samples:
            return {}
        found = torch.cat((samples["reward"][:, None], samples["passes"]), 1)
        found = torch.cat((torch.ones_like(found[:, :1]), found), 1)
        return {"found": found if blank is None else found * ~blank[:, None]}

    def count(self, batch: dict[str, Tensor]) -> Sequence[int]:
        return (mean_count(self.rule, batch["lengths"], self.kind.max_completion_length),)

    def compute(self, comm: Comm, spec: ModelSpec, batch: dict[str, Tensor]) -> Compute:
        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            labels, lengths, context = batch["labels"], batch["lengths"], comm.context
            ours, entropies = log_probabilities_and_entropies(
                hidden,
                weight,
                labels,
                comm,
                spec.logit_softcap,
                spec.vocab_size,
                self.kind.temperature,
            )
            mask = labels != IGNORE
            terms = policy_terms(
                self.rule,
                ours,
                batch["old"],
                mask,
                batch["advantages"],
                lengths,
                clip=self.clip,
                importance=batch["importance"],
                reference=batch.get(REFERENCE),
                beta=0.0 if self.in_reward else self.kind.beta,
                unbiased_kl=self.kind.use_bias_correction_kl,
                total=context.sum,
            )
            own = [mean_sum(self.rule, terms.losses, mask, lengths)]
            means = (terms.kl, entropies, terms.low, terms.high, torch.ones_like(ours))
            own += [(value * mask).sum() for value in means]
            found = batch.get("found")  # on every rank that shares the sequences
            tried = ours.new_zeros(self.entries - len(own))
            if found is not None:
                tried = found.sum(0).to(ours.dtype) / context.size
            return torch.cat((torch.stack(own), tried))

        return loss

    def report(self, sums: Vector, counts: Vector) -> dict[str, float]:
        terms = dict(zip(TERMS, sums, strict=False))
        tokens = mean_over(terms.pop("tokens"))
        loss = terms.pop("loss") / mean_over(counts[0])
        tried, reward, *passes = sums[len(TERMS) :]
        if tried:
            found = {f"pass@{k}": n / tried for k, n in zip(self.tries, passes, strict=True)}
            return {"loss": -reward / tried, "reward": reward / tried, **found}
        shown = {name: value / tokens for name, value in terms.items()}
        shown["clip_ratio/region_mean"] = (
            shown["clip_ratio/low_mean"] + shown["clip_ratio/high_mean"]
        )
        if REFERENCE not in self.companions:
            del shown["kl"]
        return {"loss": loss, **shown}

    def settle(self, sums: Vector, counts: Vector) -> None:
        pass
