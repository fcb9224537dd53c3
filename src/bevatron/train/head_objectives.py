"""Objectives on the heads that are not over the vocabulary, with transformers' losses.

A micro-batch has few scores, so every tensor-parallel rank computes the same sums from all of them,
and only the first rank's gradient counts. Scores are computed with in fp32.

The last batch of a validation set is filled up with samples that do not count: all their labels are
IGNORE, or NaN where labels are numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bevatron.nn.output_heads import Compute, at, last_token
from bevatron.nn.rank_communication import Comm
from bevatron.nn.vocabulary_loss import IGNORE
from bevatron.spec import Head, ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.config_objective import Kind
from bevatron.train.head_kinds import problem_type
from bevatron.train.objectives import NONE, Samples, Stored, Taps, Vector, mean_over

Batch = dict[str, Tensor]


class _OnScores:
    """What the three have in common: `sums` of whole fp32 scores [B, T, labels]."""

    rows = 1
    companions = NONE
    stored: Stored | None = None
    taps: Taps | None = None

    @classmethod
    def of(cls, kind: Kind, spec: ModelSpec, config: RunConfig) -> Self:
        return cls()

    def sums(self, scores: Tensor, batch: Batch) -> list[Tensor]:
        raise NotImplementedError

    def settle(self, sums: Vector, counts: Vector) -> None:
        pass

    def compute(self, comm: Comm, spec: ModelSpec, batch: Batch) -> Compute:
        def compute(scores: Tensor, weight: Tensor) -> Tensor:
            whole = comm.enter(scores).float()  # its gradient is the sum of the ranks' ones
            sums = torch.stack(self.sums(whole, batch))
            return sums if comm.rank == 0 else sums * 0

        return compute


class SequenceClassification(_OnScores):
    """Of the scores at each sequence's last token: cross-entropy of one label, binary cross-entropy
    of any number of labels, or the squared error of numbers, by the head's problem type.

    Samples: `tokens` [n, T], `labels` [n] int64, or [n, labels] fp32 of the other two types."""

    name = "sequence_classification"
    counted = 1

    def __init__(self, head: Head) -> None:
        self.kind = problem_type(head)
        assert head.pad_token_id is not None
        self.pad_token_id = head.pad_token_id
        self.entries = {
            "single_label_classification": 2,
            "multi_label_classification": 4,
            "regression": 1,
        }[self.kind]

    @classmethod
    def of(cls, kind: Kind, spec: ModelSpec, config: RunConfig) -> Self:
        return cls(spec.head)

    def batch(self, samples: Samples) -> tuple[Tensor, Batch]:
        ids = samples["tokens"]
        return ids, {"labels": samples["labels"], "last": last_token(ids, self.pad_token_id)}

    def count(self, batch: Batch) -> Sequence[int]:
        labels = batch["labels"]
        kept = labels.isfinite() if labels.is_floating_point() else labels != IGNORE
        return (int(kept.sum()),)

    def sums(self, scores: Tensor, batch: Batch) -> list[Tensor]:
        pooled, labels = at(scores, batch["last"]), batch["labels"]  # [B, labels]
        if self.kind == "single_label_classification":
            loss = F.cross_entropy(pooled, labels, ignore_index=IGNORE, reduction="sum")
            return [loss, (pooled.argmax(-1) == labels).sum()]
        kept = labels.isfinite()
        labels = torch.where(kept, labels, 0.0)
        if self.kind == "regression":
            return [((pooled - labels).square() * kept).sum()]
        loss = F.binary_cross_entropy_with_logits(pooled, labels, reduction="none")
        said, true = (pooled > 0) & kept, labels > 0.5
        hits = (said & true).sum()
        return [(loss * kept).sum(), hits, said.sum(), true.sum()]

    def report(self, sums: Vector, counts: Vector) -> dict[str, float]:
        loss = sums[0] / mean_over(counts[0])
        if self.kind == "regression":
            return {"loss": loss, "mse": loss}
        if self.kind == "single_label_classification":
            return {"loss": loss, "accuracy": sums[1] / mean_over(counts[0])}
        return {"loss": loss, "micro_f1": 2 * sums[1] / mean_over(sums[2] + sums[3])}


class TokenClassification(_OnScores):
    """Cross-entropy at every token that has a label. transformers' class has dropout before its
    head while it trains (`classifier_dropout`); this has none.

    Samples: `tokens` [n, T], `labels` [n, T] int64, IGNORE where there is none."""

    name = "token_classification"
    entries, counted = 2, 1

    def batch(self, samples: Samples) -> tuple[Tensor, Batch]:
        return samples["tokens"], {"labels": samples["labels"]}

    def count(self, batch: Batch) -> Sequence[int]:
        return (int((batch["labels"] != IGNORE).sum()),)

    def sums(self, scores: Tensor, batch: Batch) -> list[Tensor]:
        flat, labels = scores.flatten(0, 1), batch["labels"].flatten()
        loss = F.cross_entropy(flat, labels, ignore_index=IGNORE, reduction="sum")
        return [loss, (flat.argmax(-1) == labels).sum()]

    def report(self, sums: Vector, counts: Vector) -> dict[str, float]:
        n = mean_over(counts[0])
        return {"loss": sums[0] / n, "accuracy": sums[1] / n}


class QuestionAnswering(_OnScores):
    """The mean of two cross-entropies over the tokens of the sequence: of where the answer starts,
    and of where it ends. A position outside of the sequence is ignored. Padding takes no part, so
    the loss is transformers' on sequences without any, whatever their length is.

    Metrics compare the best span with the labelled one, token by token: its start and end within
    the context in that order, or both at `null`, which means that there is no answer.

    Samples: `tokens` [n, T]; `starts`, `ends` and `null` [n] int64; `lengths` [n] int64, without
    padding and at least 1; `context` [n, T] bool."""

    name = "question_answering"
    counted = 2
    entries = 5  # loss of starts, loss of ends, exact matches, F1s, samples

    def batch(self, samples: Samples) -> tuple[Tensor, Batch]:
        batch = {name: values for name, values in samples.items() if name != "tokens"}
        length = samples["tokens"].shape[1]
        for name in ("starts", "ends"):
            inside = batch[name] < batch["lengths"]
            batch[name] = torch.where(inside, batch[name].clamp(min=0), length)
        return samples["tokens"], batch

    def count(self, batch: Batch) -> Sequence[int]:
        """Twice as many as there are positions: the loss is the mean of the two means."""
        length = batch["context"].shape[1]
        return [2 * int((batch[name] < length).sum()) for name in ("starts", "ends")]

    def sums(self, scores: Tensor, batch: Batch) -> list[Tensor]:
        starts, ends, length = batch["starts"], batch["ends"], scores.shape[1]
        padding = torch.arange(length, device=scores.device) >= batch["lengths"][:, None]
        scores = scores.masked_fill(padding[..., None], -torch.inf)
        loss = [
            F.cross_entropy(scores[..., i], true, ignore_index=length, reduction="sum")
            for i, true in enumerate((starts, ends))
        ]
        kept = (starts < length) & (ends < length)
        first, last = best_span(scores.detach(), batch["context"], batch["null"])
        exact = (first == starts) & (last == ends)
        common = (torch.minimum(last, ends) - torch.maximum(first, starts) + 1).clamp(min=0)
        f1 = 2 * common / ((last - first + 1) + (ends - starts + 1)).clamp(min=1)
        return [*loss, (exact & kept).sum(), (f1 * kept).sum(), kept.sum()]

    def report(self, sums: Vector, counts: Vector) -> dict[str, float]:
        loss = sums[0] / mean_over(counts[0]) + sums[1] / mean_over(counts[1])
        n = mean_over(sums[4])
        return {"loss": loss, "exact_match": sums[2] / n, "f1": sums[3] / n}


def best_span(scores: Tensor, context: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
    """First and last token [B] of the span with the highest sum of scores [B, T, 2]: within
    `context` [B, T], or `null` [B] alone."""
    outside = ~context
    start = scores[..., 0].masked_fill(outside, -torch.inf)  # [B, T]
    end = scores[..., 1].masked_fill(outside, -torch.inf)
    best, where = end.flip(1).cummax(1)  # of each start: the best end from there on
    best, where = best.flip(1), end.shape[1] - 1 - where.flip(1)
    value, first = (start + best).max(1)
    is_null = at(scores, null).sum(-1) > value
    return torch.where(is_null, null, first), torch.where(is_null, null, at(where, first))
