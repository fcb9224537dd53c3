"""Objectives of reward models: answers that people prefer get higher scores, or known scores.

A score stands at a sequence's last token that is not padding, where transformers' sequence
classification classes have it. Ranks that share a sequence or its channels all get the whole score;
each gives its share of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bevatron.nn.output_heads import Compute, last_token
from bevatron.nn.rank_communication import Comm
from bevatron.parallel.forward_pass import sequence_scores
from bevatron.spec import Head, ModelSpec
from bevatron.train.objectives import BLANK, NONE, Samples, Stored, Taps, Vector, mean_over

Batch = dict[str, Tensor]


class _OnLastToken:
    """What both objectives have in common: `numbers` of scores [B, labels] at the last tokens.

    Samples may have `cut`, whether a sequence has lost its end: its score would stand elsewhere, so
    such a sample counts for nothing, and `real`, whether there is a sample at all.
    """

    name = "reward"
    rows = counted = 1
    largest = 2  # -least, greatest reward
    companions = NONE
    stored: Stored | None = None
    taps: Taps | None = None
    metrics: tuple[str, ...] = ()  # means over what is counted

    def __init__(self, head: Head) -> None:
        assert head.pad_token_id is not None
        self.head, self.pad_token_id = head, head.pad_token_id
        self.entries = 1 + len(self.metrics) + 3 + self.largest

    def targets(self, samples: Samples) -> Batch:
        """What else of the samples is needed."""
        raise NotImplementedError

    def numbers(self, scores: Tensor, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Of scores [n, rows * labels], all [n]: the loss and each of the metrics; and what counts
        as rewards, [n, k]."""
        raise NotImplementedError

    def batch(self, samples: Samples) -> tuple[Tensor, Batch]:
        tokens = samples["tokens"]
        n = len(tokens)
        ids = tokens.reshape(-1, tokens.shape[-1])  # [B, T]
        real = samples.get("real")
        if real is None:
            real = torch.ones(n, dtype=torch.bool, device=ids.device)
        if BLANK in samples:
            real = real & ~samples[BLANK]
        whole = real
        if "cut" in samples:
            whole = real & ~samples["cut"].reshape(n, -1).any(1)
        batch = {"last": last_token(ids, self.pad_token_id), "real": real, "kept": whole}
        return ids, batch | self.targets(samples)

    def count(self, batch: Batch) -> Sequence[int]:
        return (int(batch["kept"].sum()),)

    def compute(self, comm: Comm, spec: ModelSpec, batch: Batch) -> Compute:
        pooled = sequence_scores(comm, spec, batch)

        def compute(scores: Tensor, weight: Tensor) -> Tensor:
            kept, real = batch["kept"], batch["real"]  # [n]
            whole = pooled(scores, weight).float().reshape(len(kept), -1)
            values, rewards = self.numbers(whole, batch)
            shown, known = rewards.detach(), kept[:, None].expand_as(rewards)
            sums = [torch.where(kept, value, 0.0).sum() for value in values]
            sums += [torch.where(known, shown, 0.0).sum(), known.sum(), (real & ~kept).sum()]
            together = torch.stack([total.float() for total in sums]) / comm.context.size
            if comm.rank > 0:  # the same on all ranks that share the channels; the first's counts
                together = together * 0
            ends = [torch.where(known, sign * shown, -torch.inf).max() for sign in (-1, 1)]
            return torch.cat((together, torch.stack(ends)))

        return compute

    def report(self, sums: Vector, counts: Vector) -> dict[str, float]:
        n, k = mean_over(counts[0]), 1 + len(self.metrics)
        total, known, dropped, least, greatest = sums[k:]
        out = {"loss": sums[0] / n}
        out |= {name: value / n for name, value in zip(self.metrics, sums[1:k], strict=True)}
        if known:
            out |= {"min_reward": -least, "mean_reward": total / known, "max_reward": greatest}
        return out | {"dropped": dropped / mean_over(counts[0] + dropped)}

    def settle(self, sums: Vector, counts: Vector) -> None:
        pass


class BradleyTerry(_OnLastToken):
    """-log sigmoid(r_chosen - r_rejected - margin), as TRL's RewardTrainer has it: Bradley and
    Terry (1952); the margin as in Llama 2 (arXiv 2307.09288, equation 2). Perhaps plus `centring`
    times (r_chosen + r_rejected)^2, which keeps rewards around zero (arXiv 2312.09244).

    Samples: `tokens` [n, 2, T] int64, the chosen one first; perhaps [n] fp32 under the name that
    `margin` is."""

    rows = 2
    metrics = ("accuracy", "margin")

    def __init__(self, head: Head, centring: float = 0.0, margin: str = "margin") -> None:
        super().__init__(head)
        self.centring, self.margin = centring, margin

    def targets(self, samples: Samples) -> Batch:
        tokens = samples["tokens"]
        none = torch.zeros(len(tokens), device=tokens.device)
        return {"margin": samples.get(self.margin, none)}

    def numbers(self, scores: Tensor, batch: Batch) -> tuple[list[Tensor], Tensor]:
        chosen, rejected = scores.unbind(1)  # [n]
        apart = chosen - rejected
        loss = -F.logsigmoid(apart - batch["margin"])
        if self.centring:
            loss = loss + self.centring * (chosen + rejected).square()
        return [loss, (apart.detach() > 0).float(), apart.detach()], scores


class Attributes(_OnLastToken):
    """The squared error of the scores of several attributes, averaged over them: the regression of
    SteerLM and HelpSteer2 (arXiv 2406.08673).

    Samples: `tokens` [n, T] int64; `scores` [n, labels] fp32."""

    def __init__(self, head: Head) -> None:
        self.metrics = tuple(f"mse/{label}" for label in head.labels)
        super().__init__(head)

    def targets(self, samples: Samples) -> Batch:
        return {"scores": samples["scores"]}

    def numbers(self, scores: Tensor, batch: Batch) -> tuple[list[Tensor], Tensor]:
        errors = (scores - batch["scores"]).square()  # [n, labels]
        return [errors.mean(1), *errors.detach().unbind(1)], scores
