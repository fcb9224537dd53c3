"""Feeds of token stores: windows of tokens, mixed by weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from bevatron.data.sample_order import BLOCK, Sampler
from bevatron.data.token_store import StoreError, TokenStore
from bevatron.data.tokenizer import TOKENIZER, fingerprint, open_tokenizer
from bevatron.spec import ModelSpec
from bevatron.train.config import DataConfig, RunConfig, SourceConfig
from bevatron.train.feed import Batch, Batches, Feed
from bevatron.train.objectives import BLANK, Stored
from bevatron.train.run_start import Start


class TokenFeed(Feed):
    """Windows of token stores.

    Args:
        tokenizer: the model's own, if it has one; the data must be made with it.
        stored: arrays that join the samples.
        rounded: mix by rounded weights, as the run was begun; see `Shares`.
        batches: see `Feed`.
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
        tokenizer: Path | None = None,
        stored: Stored | None = None,
        rounded: bool = False,
        batches: Batches | None = None,
    ) -> None:
        super().__init__(
            global_batch=global_batch, dp_rank=dp_rank, dp=dp, device=device, batches=batches
        )
        self.data, self.stored = data, stored
        stores = open_stores(data, spec, tokenizer)
        self.training, self.validation = make_samplers(
            data, stores, self.batches, seed, rounded=rounded
        )

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
        own = own_tokenizer(config, start)
        return cls(
            config.data, start.spec, tokenizer=own, stored=stored, rounded=rounded, **options
        )

    @classmethod
    def check(cls, config: RunConfig, start: Start) -> None:
        stores = open_stores(config.data, start.spec, own_tokenizer(config, start))
        make_samplers(config.data, stores, Batches.of(config.train.global_batch), config.train.seed)

    @staticmethod
    def hash_of(path: str) -> str:
        return TokenStore.open(Path(path)).info.hash

    def read_training(self, positions: range) -> Batch:
        return self._windows("train", self.training, positions)

    def read_validation(self, positions: range) -> Batch:
        assert self.validation is not None
        end = self.validation_samples
        real = range(min(positions.start, end - 1), min(positions.stop, end))
        rows = self._windows("validation", self.validation, real)
        blank = np.array(positions) >= end
        if not blank.any():
            return rows
        at = np.minimum(np.array(positions), end - 1) - real.start
        return {name: array[at] for name, array in rows.items()} | {BLANK: blank}

    @cached_property
    def validation_samples(self) -> int:
        return self.validation.pass_length if self.validation is not None else 0

    def _windows(self, kind: str, sampler: Sampler, positions: range) -> Batch:
        at = np.array(positions, dtype=np.int64)
        rows: Batch = {"tokens": sampler.samples(at)}
        if self.data.document_mask:
            rows["documents"] = sampler.documents(at)
        if self.stored is not None:
            rows |= self.stored.read(kind, positions, rows["tokens"])
        return rows

    def fingerprints(self) -> dict[str, str]:
        """The hash of each training store, by the path under which the configuration has it."""
        return {str(store.path): store.info.hash for store in self.training.stores}

    def summary(self, steps: int) -> list[str]:
        """A line per source: how much of it a run of so many steps takes, in samples and epochs;
        and per later stage."""
        sampler = self.training
        counts = sampler.counts(self.batches.position(steps))
        lines = []
        for store, count, windows in zip(sampler.stores, counts, sampler.windows, strict=True):
            share = count / max(1, sum(counts))
            lines.append(
                f"{store.path}: {count:,} samples ({_percent(share)}), {count / windows:.2f} "
                f"epochs of {windows:,}"
            )
            if store.info.learned is not None:
                lines[-1] += "; all tokens are learned, though it says which ones are to be"
            if windows < self.global_batch * share:
                lines[-1] += f"; fewer than its share of a step of {self.global_batch:,}"
        for stage, configured in zip(sampler.stages[1:], self.data.stages, strict=True):
            used = zip(stage.sources, stage.shares.exact, strict=True)
            mixture = ", ".join(f"{sampler.stores[s].path} {_percent(float(n))}" for s, n in used)
            lines.append(f"from step {configured.from_step:,}: {mixture}")
        for stage in sampler.stages if sampler.rounded else ():
            of = zip(stage.sources, stage.shares.quotas or (), stage.shares.exact, strict=True)
            odd = [
                (sampler.stores[i].path, q / BLOCK, float(n)) for i, q, n in of if q != BLOCK * n
            ]
            if odd:
                shown = ", ".join(f"{path} {got:.4g} for {asked:.4g}" for path, got, asked in odd)
                lines.append(
                    f"weights stay rounded to 1/{BLOCK}, as this run was begun: {shown}; a new run "
                    "has them exact"
                )
        return lines


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or not share else f"{100 * share:.2g}%"


def own_tokenizer(config: RunConfig, start: Start) -> Path | None:
    """The tokenizer that the model comes with, or that will be saved with it."""
    places = [start.weights.source] if start.weights is not None else []
    if config.tokenizer is not None:
        places.append(Path(config.tokenizer))
    found = (place for place in places if place is not None and (place / TOKENIZER).is_file())
    return next(found, None)


def open_stores(data: DataConfig, spec: ModelSpec, tokenizer: Path | None) -> dict[str, TokenStore]:
    """All stores of a configuration by path, checked against the model and its tokenizer."""
    stores: dict[str, TokenStore] = {}
    for source in data.sources():
        if source.split is not None:
            raise StoreError(
                f"{source.path}: a token store has no splits; drop its split: {source.split}"
            )
        if source.path not in stores:
            store = stores[source.path] = TokenStore.open(Path(source.path))
            store.check_vocab(spec.vocab_size)
            if data.document_mask:
                store.check_index()
    if not data.allow_other_tokenizer:
        _check_tokenizers(list(stores.values()), tokenizer)
    return stores


def _check_tokenizers(stores: Sequence[TokenStore], tokenizer: Path | None) -> None:
    """All stores are of one tokenizer, and it is the model's."""
    key = "set data.allow_other_tokenizer: true if that is meant"
    first = stores[0]
    for store in stores[1:]:
        if not store.made_with(first.info.fingerprint, first.info.encoding):
            raise StoreError(
                f"{store.path}: was made with another tokenizer ({_by(store)}) than {first.path} "
                f"({_by(first)}); make them anew with one, or {key}"
            )
    if tokenizer is None:
        return
    own = fingerprint(tokenizer)
    other = [store for store in stores if store.info.fingerprint != own]
    if other:
        encoding = open_tokenizer(tokenizer).encoding
        for store in other:
            if not store.made_with(own, encoding):
                raise StoreError(
                    f"{store.path}: was made with another tokenizer ({_by(store)}) than the "
                    f"model's own ({tokenizer / TOKENIZER}, {own}); make it anew with `bevatron "
                    f"tokenize --tokenizer {tokenizer}`, or {key}"
                )


def check_companion(where: str, companion: Path, own: Path) -> None:
    """A model that reads the same token ids has the same tokenizer, or one that encodes alike."""
    if fingerprint(companion) == fingerprint(own):
        return
    encoding = open_tokenizer(own).encoding
    if encoding is None or open_tokenizer(companion).encoding != encoding:
        raise StoreError(
            f"{where}: has another tokenizer ({companion / TOKENIZER}, {fingerprint(companion)}) "
            f"than the model that is trained ({own / TOKENIZER}, {fingerprint(own)}), so its "
            "token ids mean other text; use models of one tokenizer, or set "
            "data.allow_other_tokenizer: true if that is meant"
        )


def _by(store: TokenStore) -> str:
    return f"{store.info.tokenizer}, {store.info.fingerprint}"


def make_samplers(
    data: DataConfig,
    stores: Mapping[str, TokenStore],
    batches: Batches,
    seed: int,
    *,
    rounded: bool = False,
) -> tuple[Sampler, Sampler | None]:
    """The order of the training samples, and that of the validation's if there is one.
    `rounded`: see `Shares`."""

    def mixture(sources: Sequence[SourceConfig]) -> list[tuple[TokenStore, float]]:
        return [(stores[source.path], source.weight) for source in sources]

    later: list[Any] = [(batches.position(s.from_step), mixture(s.train)) for s in data.stages]
    training = Sampler(mixture(data.train), data.seq_len, seed, later=later, rounded=rounded)
    if not data.validation:
        return training, None
    mixed = mixture(data.validation)
    return training, Sampler(mixed, data.seq_len, 0, shuffled=False, rounded=rounded)
