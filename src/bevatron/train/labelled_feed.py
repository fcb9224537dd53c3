"""Feeds of labelled examples; every example comes once per epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch

from bevatron.data.dataset_rows import Rows, hash_of_rows
from bevatron.data.labelled_examples import Arrays, Labelled
from bevatron.data.permutation import Permutation, derive
from bevatron.data.tokenizer import TOKENIZER, open_tokenizer
from bevatron.errors import BevatronError
from bevatron.train.config import RunConfig, SourceConfig
from bevatron.train.feed import Batch, Batches, Feed
from bevatron.train.head_kinds import ExamplesKind
from bevatron.train.objectives import Stored
from bevatron.train.run_start import Start, tokenizer_of

ROWS = 1024  # that are tokenized at once where windows are counted
SHUFFLE = 3  # tells these permutations from the sampler's


class Examples:
    """All examples of some files or datasets, tokenized when asked for."""

    def __init__(self, sources: Sequence[SourceConfig], labelled: Labelled) -> None:
        for source in sources:
            if source.weight != sources[0].weight:
                raise BevatronError(
                    f"{source.path}: its weight is {source.weight}, but every labelled example "
                    "comes once an epoch, so weights mean nothing; drop them"
                )
        self.labelled = labelled
        self.rows = self.read(sources, labelled)
        self.windows = self._count() if labelled.windows else None  # [examples, (row, window)]

    @staticmethod
    def read(sources: Sequence[SourceConfig], labelled: Labelled) -> Rows:
        """All rows, each of which is checked. Raises BevatronError naming the first that is
        wrong."""
        paths, splits = [s.path for s in sources], [s.split for s in sources]
        return Rows(paths, labelled.check, splits)

    def __len__(self) -> int:
        return len(self.rows) if self.windows is None else len(self.windows)

    def __getitem__(self, numbers: Sequence[int]) -> list[Arrays]:
        """The examples of these numbers; those behind the last are blank."""
        found = [n for n in numbers if n < len(self)]
        places = [(n, 0) for n in found] if self.windows is None else self.windows[found].tolist()
        encoded = self.labelled.encode([self.rows[row] for row, _ in places])
        made = [one[window] for one, (_, window) in zip(encoded, places, strict=True)]
        return made + [self.labelled.blank()] * (len(numbers) - len(found))

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The same as arrays [n, ...]."""
        made = self[numbers]
        return {name: np.stack([one[name] for one in made]) for name in made[0]}

    def _count(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        counts: list[int] = []
        for first in range(0, len(self.rows), ROWS):
            rows = [self.rows[i] for i in range(first, min(first + ROWS, len(self.rows)))]
            try:
                counts += map(len, self.labelled.encode(rows))
            except BevatronError:
                self._blame(range(first, first + len(rows)))
                raise
        row = np.repeat(np.arange(len(counts)), counts)
        return np.stack((row, np.concatenate([np.arange(n) for n in counts])), 1)

    def _blame(self, rows: range) -> None:
        """Raise the error of the first of these rows that has one, naming its line."""
        for i in rows:
            try:
                self.labelled.encode([self.rows[i]])
            except BevatronError as error:
                raise BevatronError(f"{self.rows.where(i)}: {error}") from None


class LabelledFeed(Feed):
    """Labelled examples. Training goes through all of them in another order every epoch; validation
    goes through them once, in order, and then has blank ones.

    Raises BevatronError for a row that does not fit the model's head, naming its line."""

    examples: ClassVar[type[Examples]] = Examples  # what is read of sources

    def __init__(
        self,
        config: RunConfig,
        start: Start,
        *,
        global_batch: int,
        seed: int,
        dp_rank: int,
        dp: int,
        device: torch.device,
        batches: Batches | None = None,
    ) -> None:
        super().__init__(
            global_batch=global_batch, dp_rank=dp_rank, dp=dp, device=device, batches=batches
        )
        self.seed, self.vocab_size = seed, start.spec.vocab_size
        self._hashes = {s.path: self.hash_of(s.path) for s in config.data.train}
        labelled = labelled_of(config, start)
        self.training = self.examples(config.data.train, labelled)
        validation = config.data.validation
        self.validation = self.examples(validation, labelled) if validation else None

    @classmethod
    def open(
        cls,
        config: RunConfig,
        start: Start,
        *,
        stored: Stored | None,
        rounded: bool,
        **options: Any,
    ) -> Self:
        return cls(config, start, **options)

    @classmethod
    def check(cls, config: RunConfig, start: Start) -> None:
        cls.rows_of(config, start)

    @classmethod
    def rows_of(cls, config: RunConfig, start: Start) -> tuple[Rows, Labelled]:
        """All rows, those of the training first, and how they become arrays."""
        sources, labelled = (
            [*config.data.train, *config.data.validation],
            labelled_of(config, start),
        )
        return cls.examples.read(sources, labelled), labelled

    @staticmethod
    def hash_of(path: str) -> str:
        return hash_of_rows(path)

    def read_training(self, positions: range) -> Batch:
        return self._samples(self.training, [self._shuffled(p) for p in positions])

    def read_validation(self, positions: range) -> Batch:
        assert self.validation is not None
        return self._samples(self.validation, list(positions))

    @property
    def validation_samples(self) -> int:
        return len(self.validation) if self.validation is not None else 0

    def fingerprints(self) -> dict[str, str]:
        return self._hashes

    def summary(self, steps: int) -> list[str]:
        names = ", ".join(self._hashes)
        taken = self.batches.position(steps)
        epochs = f"{taken / len(self.training):.2f} epochs of {len(self.training):,}"
        return [f"{names}: {taken:,} examples, {epochs}"]

    def _shuffled(self, position: int) -> int:
        epoch, index = divmod(position, len(self.training))
        permutation = Permutation(len(self.training), derive(self.seed, SHUFFLE, epoch))
        return int(permutation(np.array([index]))[0])

    def _samples(self, examples: Examples, numbers: Sequence[int]) -> Batch:
        rows = examples.batch(numbers)
        highest = int(rows["tokens"].max())
        if highest >= self.vocab_size:
            raise BevatronError(
                f"the tokenizer gave the token id {highest}, the model knows ids below "
                f"{self.vocab_size}; use the tokenizer that belongs to the model"
            )
        return rows


def labelled_of(config: RunConfig, start: Start) -> Labelled:
    """How the objective's rows become arrays, for the head of the model that starts."""
    if config.data.stages:
        raise BevatronError(
            f"data.stages are mixtures of token stores for pretraining; objective.name "
            f"{config.objective.name} takes every example once an epoch, so drop them"
        )
    if config.data.document_mask:
        raise BevatronError(
            f"data.document_mask is for packed pretraining data; in objective.name "
            f"{config.objective.name} every example sees itself alone anyway, so drop it"
        )
    opened = open_tokenizer(tokenizer_of(config, start))
    source = start.weights.source if start.weights else None
    if source is not None and (source / TOKENIZER).is_file():
        own = open_tokenizer(source)
        if own.fingerprint != opened.fingerprint:
            raise BevatronError(
                f"tokenizer: {opened.file} is not the {TOKENIZER} that lies with the model and "
                "that an export will hold; drop the key, or put this one into the model's folder"
            )
    assert isinstance(config.objective, ExamplesKind)
    return config.objective.labelled(opened, config, start.spec)
