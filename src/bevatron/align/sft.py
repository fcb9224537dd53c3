"""Supervised finetuning: next-token prediction of what is to be learned."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bevatron.align.sequences import labels_of
from bevatron.spec import ModelSpec
from bevatron.train.config import RunConfig
from bevatron.train.objectives import Pretrain, Samples


class Sft(Pretrain):
    """The mean of -log p over all learned tokens of the global batch, in nats: a long answer counts
    for as many tokens as it has, whatever it shares a micro-batch with.

    Samples: `tokens` [n, T] int64, `learned` [n, T] bool, and of packed ones `documents` [n, T]."""

    name = "sft"

    @classmethod
    def of(cls, kind: Any, spec: ModelSpec, config: RunConfig) -> Sft:
        return cls(compiled=config.train.compile)

    def batch(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        batch = {"labels": labels_of(samples["tokens"], samples["learned"])}
        if "documents" in samples:
            batch["documents"] = samples["documents"]
        return samples["tokens"], batch
