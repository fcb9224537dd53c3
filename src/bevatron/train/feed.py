"""The batches of a run: which samples a step takes, on this rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bevatron.data.sampler import Sampler
from bevatron.data.store import TokenStore
from bevatron.spec import ModelSpec
from bevatron.train.config import DataConfig, SourceConfig
from bevatron.train.objectives import Samples


class Feed:
    """Samples as a function of the step: nothing to save, nothing to lose.

    Args:
        global_batch: samples of a step over all ranks.
        dp_rank, dp: which contiguous part of them is this rank's.
    """

    def __init__(
        self,
        data: DataConfig,
        spec: ModelSpec,
        *,
        global_batch: int,
        seed: int,
        dp_rank: int,
        dp: int,
        device: torch.device,
    ) -> None:
        self.data, self.spec, self.seed, self.device = data, spec, seed, device
        self.global_batch, self.dp_rank, self.dp = global_batch, dp_rank, dp
        self.training = self._sampler(data.train)
        self.validation = self._sampler(data.validation) if data.validation else None

    def _sampler(self, sources: Sequence[SourceConfig]) -> Sampler:
        stores = [(TokenStore.open(Path(s.path)), s.weight) for s in sources]
        for store, _ in stores:
            store.check_vocab(self.spec.vocab_size)
        return Sampler(stores, self.data.seq_len, self.seed)

    def batch(self, step: int) -> Samples:
        """This rank's samples of update number `step` (from 0)."""
        return self._samples(self.training, step * self.global_batch)

    def validation_batch(self, number: int) -> Samples:
        """The same of validation batch `number`."""
        assert self.validation is not None
        return self._samples(self.validation, number * self.global_batch)

    def _samples(self, sampler: Sampler, position: int) -> Samples:
        n = self.global_batch // self.dp
        first = position + self.dp_rank * n
        numbers = range(first, first + n)
        out = {"tokens": np.stack([sampler.sample(i) for i in numbers])}
        if self.data.document_mask:
            out["documents"] = np.stack([sampler.documents(i) for i in numbers])
        return {name: torch.from_numpy(rows).to(self.device) for name, rows in out.items()}
