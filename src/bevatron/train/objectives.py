"""What a run minimises. The trainer knows nothing of losses; an objective knows nothing of layouts.

An objective says what a batch holds, what the last stage computes from its hidden states (a sum),
and how many units that sum has, known before the forward, so that micro-batches, ranks and packing
never change a gradient.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from bevatron.nn.comm import Comm
from bevatron.nn.heads import Compute
from bevatron.spec import ModelSpec
from bevatron.train.cross_entropy import IGNORE, cross_entropy_sum

# What the feed delivers of a step, all [n, ...] on the device: `tokens` [n, T + 1] int64, and, if
# `data.document_mask` is set, `documents` [n, T + 1] int64, the number of each token's document
# within its sample, from 0.
Samples = dict[str, Tensor]


class Objective(Protocol):
    name: str

    def batch(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        """Samples -> token ids [B, T] and what the stages and `compute` will need, all [B, ...].

        `positions` and `documents` [B, T] among them go to the decoder. Of all that is [B, T], a
        context-parallel rank gets its own tokens."""

    def count(self, batch: dict[str, Tensor]) -> int:
        """How many units the sum over this batch has."""

    def compute(self, comm: Comm, spec: ModelSpec, batch: dict[str, Tensor]) -> Compute:
        """What the head computes for one micro-batch: the sum, a scalar."""


class Pretrain:
    """Next-token prediction: mean of -log p over all tokens of the global batch, in nats."""

    name = "pretrain"

    def batch(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, documents = samples["tokens"], samples.get("documents")
        ids, labels = tokens[:, :-1], tokens[:, 1:]
        if documents is None:
            return ids, {"labels": labels}
        # The first token of a document is not for the one before it to predict.
        labels = labels.masked_fill(documents[:, 1:] != documents[:, :-1], IGNORE)
        return ids, {"labels": labels, "documents": documents[:, :-1]}

    def count(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != IGNORE).sum())

    def compute(self, comm: Comm, spec: ModelSpec, batch: dict[str, Tensor]) -> Compute:
        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            labels, cap = batch["labels"], spec.logit_softcap
            return cross_entropy_sum(hidden, weight, labels, comm, cap, spec.vocab_size)

        return loss
