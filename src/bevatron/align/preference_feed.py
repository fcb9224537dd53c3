"""The feed of preferences: examples, and what a reference said of them before."""

from __future__ import annotations

from collections.abc import Sequence

from bevatron.align.reference import Precomputed
from bevatron.train.feed import Batch
from bevatron.train.labelled_feed import Examples, LabelledFeed
from bevatron.train.trainer import Trainer


class PreferenceFeed(LabelledFeed):
    """Prompts with several answers; every one comes once an epoch, in another order each."""

    precomputed: Precomputed | None = None

    def bind(self, trainer: Trainer) -> None:
        super().bind(trainer)
        stored = trainer.objective.stored
        if isinstance(stored, Precomputed):
            examples = {"train": self.training}
            if self.validation is not None:
                examples["validation"] = self.validation
            stored.prepare(trainer, examples)
            self.precomputed = stored

    def _samples(self, examples: Examples, numbers: Sequence[int]) -> Batch:
        rows = super()._samples(examples, numbers)
        if self.precomputed is None:
            return rows
        kind = "train" if examples is self.training else "validation"
        return rows | self.precomputed.read(kind, numbers, rows["tokens"])
