"""The objective of reinforcement learning: a policy loss over answers whose advantages are known.

Samples come from `policy_feed.py`, and the losses from `policy_losses.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bevatron.align.policy_losses import (
    RULES,
    Clip,
    importance_weights,
    mean_count,
    mean_sum,
    policy_terms,
)
from bevatron.align.reference import NAME as REFERENCE
from bevatron.align.reference import open_reference
from bevatron.align.reward_model import judges
from bevatron.align.rollout_kind import PolicyKind
from bevatron.align.sequences import labels_of
from bevatron.nn.output_heads import Compute
from bevatron.nn.rank_communication import Comm, Context
from bevatron.nn.vocabulary_loss import IGNORE, log_probabilities_and_entropies
from bevatron.parallel.companion import Companion
from bevatron.parallel.forward_pass import log_probabilities_at
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.objectives import BLANK, NONE, Samples, Stored, Taps, Vector, mean_over

TERMS = ("loss", "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "tokens")
# How engine and trainer differ, TRL's names:
APART, RATIO = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
COMPARED = (f"{APART}/mean", "sampling/kl", f"{RATIO}/mean", "compared")  # sums, of so many tokens
ENDS = (f"{APART}/max", f"{RATIO}/max", f"{RATIO}/min")  # the last one with a minus
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
    [n, T], what the policy's loss of it is multiplied by. In place of these two, where the policy
    that answered is the one that is trained: `sampled` [n, T], its log-probability by the engine.
    Then `old` are the forward's own ones without their gradient (the ratio is 1, its gradient is
    not 0), and what the engine differs by is computed and reported here.

    Of a validation nothing is learned. Its samples have `reward` [n] and `passes` [n, ks] instead.
    """

    name = "grpo"
    rows = counted = 1
    largest = len(ENDS)
    stored: Stored | None = None
    taps: Taps | None = None

    def __init__(self, kind: PolicyKind, companions: Mapping[str, Companion] = NONE) -> None:
        self.kind, self.rule, self.companions = kind, RULES[kind.loss], companions
        high = kind.epsilon if kind.epsilon_high is None else kind.epsilon_high
        self.in_reward = kind.loss == "rloo"  # where the KL counts
        self.clip = Clip(kind.epsilon, high, kind.delta)
        self.tries = tries(kind.num_generations_eval)
        sums = len(TERMS) + len(COMPARED) + len(TRIED) + len(self.tries)
        self.entries = sums + self.largest

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
        policy = {name: samples.get(name, each) for name in ("old", "importance")}
        if "sampled" in samples:
            policy = {"sampled": samples["sampled"]}
        return tokens, {
            "labels": labels,
            "lengths": (labels != IGNORE).sum(1),
            "advantages": samples.get("advantages", nothing),
            **policy,
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
            compared, ends = self._nothing_compared(ours)
            if "sampled" in batch:
                old = ours.detach()
                importance, compared, ends = self._compared(old, batch["sampled"], mask, context)
            else:
                old, importance = batch["old"], batch["importance"]
            terms = policy_terms(
                self.rule,
                ours,
                old,
                mask,
                batch["advantages"],
                lengths,
                clip=self.clip,
                importance=importance,
                reference=batch.get(REFERENCE),
                beta=0.0 if self.in_reward else self.kind.beta,
                unbiased_kl=self.kind.use_bias_correction_kl,
                total=context.sum,
            )
            own = [mean_sum(self.rule, terms.losses, mask, lengths)]
            means = (terms.kl, entropies, terms.low, terms.high, torch.ones_like(ours))
            own += [(value * mask).sum() for value in means]
            found = batch.get("found")  # on every rank that shares the sequences
            tried = ours.new_zeros(len(TRIED) + len(self.tries))
            if found is not None:
                tried = found.sum(0).to(ours.dtype) / context.size
            return torch.cat((torch.stack(own), compared, tried, ends))

        return loss

    def _nothing_compared(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return like.new_zeros(len(COMPARED)), like.new_full((len(ENDS),), -torch.inf)

    def _compared(
        self, old: Tensor, sampled: Tensor, mask: Tensor, context: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Importance weights [B, T], and of these sequences what COMPARED and ENDS name."""
        kind, weights = self.kind, mask.to(old.dtype)
        if kind.importance_sampling_correction:
            mode, most = kind.importance_sampling_mode, kind.importance_sampling_clip_max
            weights = importance_weights(old, sampled, mask, mode, most, context.sum)
        if not mask.any():
            return weights, *self._nothing_compared(old)
        apart, inside = (old.double() - sampled)[mask], weights[mask].double()
        size = apart.abs()
        kl = apart.expm1() - apart
        sums = torch.stack((size.sum(), kl.sum(), inside.sum(), mask.sum()))
        ends = torch.stack((size.max(), inside.max(), -inside.min()))
        return weights, sums.to(old.dtype), ends.to(old.dtype)

    def report(self, sums: Vector, counts: Vector) -> dict[str, float]:
        terms = dict(zip(TERMS, sums, strict=False))
        tokens = mean_over(terms.pop("tokens"))
        loss = terms.pop("loss") / mean_over(counts[0])
        own, ends = sums[len(TERMS) : -self.largest], sums[-self.largest :]
        compared, (tried, reward, *passes) = own[: len(COMPARED)], own[len(COMPARED) :]
        if tried:
            found = {f"pass@{k}": n / tried for k, n in zip(self.tries, passes, strict=True)}
            return {"loss": -reward / tried, "reward": reward / tried, **found}
        shown = {name: value / tokens for name, value in terms.items()}
        shown["clip_ratio/region_mean"] = (
            shown["clip_ratio/low_mean"] + shown["clip_ratio/high_mean"]
        )
        if REFERENCE not in self.companions:
            del shown["kl"]
        return {"loss": loss, **shown, **self._apart(compared, ends)}

    def _apart(self, sums: Vector, ends: Vector) -> dict[str, float]:
        *means, tokens = sums
        if not tokens:
            return {}
        found = {name: value / tokens for name, value in zip(COMPARED, means, strict=False)}
        found |= dict(zip(ENDS, ends, strict=True))
        found[f"{RATIO}/min"] *= -1
        if not self.kind.importance_sampling_correction:
            found = {name: value for name, value in found.items() if not name.startswith(RATIO)}
        return found

    def settle(self, sums: Vector, counts: Vector) -> None:
        pass
