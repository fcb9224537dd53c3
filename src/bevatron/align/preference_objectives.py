"""Objectives on preferences: a model is to find the better of several answers likelier.

The answers to a prompt are the sequences of one sample. What counts of each is one number, the sum
of its tokens' log-probabilities, so ranks that share the vocabulary or the tokens add up what they
have before the loss is taken; `preference_losses.py` has the losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from bevatron.align.preference_kinds import (
    DpoKind,
    OnlineRpoKind,
    PreferenceKind,
    ReferencedKind,
    RpoKind,
    SimpoKind,
)
from bevatron.align.preference_losses import RPO_FORMS, hinge, ipo, robust, sigmoid, simpo
from bevatron.align.reference import Precomputed, open_reference
from bevatron.align.reference_kind import ReferenceKind
from bevatron.align.reward_model import judges
from bevatron.align.sequences import labels_of
from bevatron.nn.output_heads import Compute
from bevatron.nn.rank_communication import Comm
from bevatron.nn.vocabulary_loss import IGNORE
from bevatron.parallel.companion import Companion
from bevatron.parallel.forward_pass import sequence_log_probabilities
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.objectives import NONE, Samples, Stored, Taps, Vector, mean_over

REFERENCE = "reference"
# Metrics of a pair, as TRL names them; of several answers `chosen` is the best, `rejected` the last
PAIRED = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
CUT = ("truncated", "dropped")


@dataclass(frozen=True)
class Scored:
    """What is known of a micro-batch's answers, [n, K] each, float64; the chosen one is first, the
    worst last.

    Attributes:
        logps: log-probabilities, summed over an answer's tokens.
        reference: those of the reference, or zeros.
        lengths: numbers of these tokens.
        given: rewards that came with the answers, or zeros.
    """

    logps: Tensor
    reference: Tensor
    lengths: Tensor
    given: Tensor

    def ratios(self, average: bool = False) -> Tensor:
        """log p - log p_reference, summed or averaged over tokens."""
        ratios = self.logps - self.reference
        return ratios / self.lengths if average else ratios


def gap(values: Tensor) -> Tensor:
    """[n, K] -> [n]: the first answer's less the last one's."""
    return values[:, 0] - values[:, -1]


class Preference:
    """The mean over samples of `losses`, plus sft_loss_weight times the mean over the chosen
    answers' tokens of -log p.

    Samples: `tokens` [n, K, T] int64, padded at the end; `learned` [n, K, T] bool, an answer's
    tokens. Perhaps `rewards` [n, K], and `reference` [n, K] of a reference that answered before.
    A sample with an answer that has no learned token counts for nothing.
    """

    taps: Taps | None = None

    def __init__(
        self,
        kind: PreferenceKind | OnlineRpoKind,
        reference: Companion | Precomputed | None = None,
    ) -> None:
        self.name, self.rows = kind.name, kind.sequences
        self.average, self.sft = kind.preference_avg_log_probs, kind.sft_loss_weight
        self.beta = kind.beta
        self.stored: Stored | None = None
        self.companions: Mapping[str, Companion] = NONE
        self.reference = reference
        if isinstance(reference, Companion):
            self.companions = {REFERENCE: reference}
        else:
            self.stored = reference
        self.counted = 2 if self.sft else 1
        self.metrics = (*PAIRED, *self.further)
        self.entries = self.counted + len(self.metrics) + len(CUT) + 1

    # Metrics of a loss of its own, the means of what `further_metrics` gives.
    further: tuple[str, ...] = ()

    @classmethod
    def of(cls, kind: Any, spec: ModelSpec, config: RunConfig) -> Self:
        reference: Companion | Precomputed | None = None
        if isinstance(kind, ReferenceKind):
            once = isinstance(kind, ReferencedKind) and kind.precompute_reference
            at_end = sequence_log_probabilities
            companion = open_reference(kind, spec, config, at_end, alone=once)
            reference = Precomputed.of(companion, config) if once else companion
        made = cls(kind, reference)
        if isinstance(kind, OnlineRpoKind):
            made.companions = {**made.companions, **judges(kind.rewards)}
        return made

    # What a kind of loss says of itself.

    def losses(self, scored: Scored) -> Tensor:
        """[n], of answers with these numbers."""
        raise NotImplementedError

    def rewards(self, scored: Scored) -> Tensor:
        """[n, K], the implicit rewards that are reported."""
        return self.beta * scored.ratios()

    def logps(self, scored: Scored) -> Tensor:
        """[n, K], what is reported of log-probabilities."""
        return scored.logps

    def further_metrics(self, scored: Scored) -> list[Tensor]:
        """[n] of each of `further`."""
        return []

    # What every objective says.

    def batch(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = samples["tokens"].flatten(0, 1)  # [B, T]
        labels = labels_of(tokens, samples["learned"].flatten(0, 1))
        lengths = (labels != IGNORE).sum(1)  # [B]
        each = lengths.view(-1, self.rows)
        batch = {"labels": labels, "lengths": lengths, "counts": (each > 0).all(1)}
        batch["real"] = batch["counts"] if "real" not in samples else samples["real"]
        batch["cut"] = samples["cut"].flatten() if "cut" in samples else torch.zeros_like(lengths)
        for name in ("rewards", REFERENCE):
            if name in samples:
                batch[name] = samples[name].flatten()
        return tokens, batch

    def count(self, batch: dict[str, Tensor]) -> Sequence[int]:
        """Samples; and the chosen answers' tokens."""
        counts = batch["counts"]
        chosen = batch["lengths"].view(-1, self.rows)[:, 0] * counts
        return [int(counts.sum()), int(chosen.sum())][: self.counted]

    def compute(self, comm: Comm, spec: ModelSpec, batch: dict[str, Tensor]) -> Compute:
        whole = sequence_log_probabilities(comm, spec, batch)

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            scored = self._scored(whole(hidden, weight), batch)
            differentiated = [self.losses(scored)]
            if self.sft:
                differentiated.append(-self.sft * scored.logps[:, 0])
            counts, real = batch["counts"], batch["real"]  # [n]
            with torch.no_grad():
                found = self._metrics(scored)
            sums = [torch.where(counts, values, 0.0).sum() for values in (*differentiated, *found)]
            sums += [batch["cut"].sum(), (real & ~counts).sum(), real.sum()]
            # Every rank that shares the sequences has the whole of it, and gives its share.
            return torch.stack([total.double() for total in sums]).float() / comm.context.size

        return loss

    def report(self, sums: Vector, counts: Vector) -> dict[str, float]:
        n, parts = mean_over(counts[0]), sums[self.counted :]
        out = {"loss": sums[0] / n}
        if self.sft:
            weighted = sums[1] / mean_over(counts[1])
            out = {"loss": out["loss"] + weighted, "sft_loss": weighted / self.sft}
        out |= {name: total / n for name, total in zip(self.metrics, parts, strict=False)}
        cut, dropped, samples = parts[-3:]
        return out | {
            "truncated": cut / (self.rows * mean_over(samples)),
            "dropped": dropped / mean_over(samples),
        }

    def settle(self, sums: Vector, counts: Vector) -> None:
        pass

    def _metrics(self, scored: Scored) -> list[Tensor]:
        """[n] of each of `metrics`."""
        rewards, logps = self.rewards(scored), self.logps(scored)
        best, last = rewards[:, 0], rewards[:, -1]
        found = [best, last, (best > last).double(), best - last, logps[:, 0], logps[:, -1]]
        return found + self.further_metrics(scored)

    def _scored(self, logps: Tensor, batch: dict[str, Tensor]) -> Scored:
        """Of log-probabilities [B]."""

        def of(values: Tensor) -> Tensor:
            return values.double().view(-1, self.rows)

        none = torch.zeros_like(logps)
        return Scored(
            of(logps),
            of(batch.get(REFERENCE, none)),
            of(batch["lengths"]).clamp(min=1),
            of(batch.get("rewards", none)),
        )


class Dpo(Preference):
    """DPO; cDPO with `label_smoothing`, robust DPO with `robust`. With `preference_avg_log_probs`
    it is what TRL calls sigmoid_norm."""

    def __init__(self, kind: DpoKind, reference: Companion | Precomputed | None = None) -> None:
        super().__init__(kind, reference)
        self.label_smoothing, self.robust = kind.label_smoothing, kind.robust

    def losses(self, scored: Scored) -> Tensor:
        margin = self.beta * gap(scored.ratios(self.average))
        loss = robust if self.robust else sigmoid
        return loss(margin, self.label_smoothing)


class Ipo(Preference):
    def losses(self, scored: Scored) -> Tensor:
        return ipo(gap(scored.ratios(self.average)), self.beta)


class Hinge(Preference):
    def losses(self, scored: Scored) -> Tensor:
        return hinge(self.beta * gap(scored.ratios(self.average)))


class Simpo(Preference):
    """Rewards are means of log-probabilities and no reference takes part; the metrics `logps/...`
    are means as well, as TRL has them here."""

    def __init__(self, kind: SimpoKind, reference: Companion | Precomputed | None = None) -> None:
        super().__init__(kind, reference)
        self.gamma = kind.gamma

    def losses(self, scored: Scored) -> Tensor:
        return simpo(gap(self.rewards(scored)), self.gamma)

    def rewards(self, scored: Scored) -> Tensor:
        return self.beta * scored.ratios(average=True)

    def logps(self, scored: Scored) -> Tensor:
        return scored.logps / scored.lengths


class Rpo(Preference):
    """RPO, of two answers or of K, given or the model's own. Reports the gap of the given rewards,
    times eta, as `rewards/given_margins`, to which `rewards/margins` is drawn."""

    further = ("rewards/given_margins",)

    def __init__(
        self, kind: RpoKind | OnlineRpoKind, reference: Companion | Precomputed | None = None
    ) -> None:
        super().__init__(kind, reference)
        self.form, self.eta, self.weight = (
            RPO_FORMS[kind.loss],
            kind.eta,
            kind.preference_loss_weight,
        )

    def losses(self, scored: Scored) -> Tensor:
        return self.weight * self.form(self.rewards(scored), self.eta * scored.given)

    def rewards(self, scored: Scored) -> Tensor:
        return self.beta * scored.ratios(self.average)

    def further_metrics(self, scored: Scored) -> list[Tensor]:
        return [self.eta * gap(scored.given)]
