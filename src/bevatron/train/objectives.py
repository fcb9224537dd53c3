"""What a run minimises. The trainer knows nothing of losses; an objective knows nothing of layouts.

An objective says what a batch holds, what the last stage computes from its hidden states (a sum),
and how many units that sum has, known before the forward, so that micro-batches, ranks and packing
never change a gradient.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from bevatron.nn.comm import Comm
from bevatron.nn.heads import Compute
from bevatron.spec import ModelSpec
from bevatron.train.cross_entropy import IGNORE, cross_entropy_sum


class Objective(Protocol):
    name: str

    def batch(self, samples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Samples [B, T + 1] -> token ids [B, T] and what `compute` will need, all [B, ...]."""

    def count(self, batch: dict[str, Tensor]) -> int:
        """How many units the sum over this batch has."""

    def compute(self, comm: Comm, spec: ModelSpec, batch: dict[str, Tensor]) -> Compute:
        """What the head computes for one micro-batch: the sum, a scalar."""


class Pretrain:
    """Next-token prediction: mean of -log p over all tokens of the global batch, in nats."""

    name = "pretrain"

    def batch(self, samples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return samples[:, :-1], {"labels": samples[:, 1:]}

    def count(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != IGNORE).sum())

    def compute(self, comm: Comm, spec: ModelSpec, batch: dict[str, Tensor]) -> Compute:
        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            labels, cap = batch["labels"], spec.logit_softcap
            return cross_entropy_sum(hidden, weight, labels, comm, cap, spec.vocab_size)

        return loss


def tensor(samples: object, device: torch.device) -> Tensor:
    """numpy int64 [B, T + 1] -> tensor on the device."""
    return torch.as_tensor(samples, dtype=torch.int64).to(device)
