"""Which tokens the sample at a position is made of: a pure function of (seed, position).

Nothing is stored, so a run resumes at any position, at any number of ranks, by asking for it.

    position -> stage       a stage is a mixture, from a position on
    position -> source      blocks of 1024 positions of a stage; every source has an exact quota in
                            each, the order in a block is shuffled by (seed, stage, block)
    position -> index       what earlier stages took of the source + blocks before * quota + rank of
                            the position among the source's in its block: the source's samples are
                            counted without gaps, whatever the stages
    index    -> window      each epoch is a full permutation of the source's windows
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bevatron.data.permutation import Permutation, derive, mix_array
from bevatron.data.store import TokenStore
from bevatron.errors import BevatronError

BLOCK = 1024

Mixture = Sequence[tuple[TokenStore, float]]


def quotas(weights: Sequence[float], block: int = BLOCK) -> list[int]:
    """Positions of each source in a block, in proportion to the weights, by largest remainder
    (ties to the earlier source). Exact arithmetic: the same on every machine."""
    total = sum(Fraction(w) for w in weights)
    shares = [Fraction(w) * block / total for w in weights]
    counts = [math.floor(s) for s in shares]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in order[: block - sum(counts)]:
        counts[i] += 1
    return counts


class Place(NamedTuple):
    """Where a sample comes from: the source's number, its epoch, the window's number in it."""

    source: int
    epoch: int
    window: int


@dataclass(frozen=True)
class Stage:
    """A mixture from position `begin` on. All lists are by source, of all stages.

    Attributes:
        quotas: positions in each block; 0 for a source that this stage does not use.
        before: positions in all earlier stages.
    """

    number: int
    begin: int
    quotas: list[int]
    before: list[int]


class Sampler:
    """The endless order of samples.

    A window is seq_len + 1 tokens (inputs and targets) that begin at a multiple of seq_len, so
    windows share one token, every token but a store's first is a target once per epoch, and what
    does not fill a window at a store's end is left out.

    Args:
        stores: (store, weight): the share of samples, not of documents; weights need not add to 1.
        later: (position, stores): mixtures that take over there. A store that is in several goes on
            where it was.
        shuffled: False takes each source's windows in their order and mixes evenly, whatever the
            seed: for validation, where every run is to see the same.
    Raises BevatronError for a weight that is not positive or is below what a block can hold, for a
    store that is named twice in a mixture or is too short for one window, and for positions that do
    not ascend.
    """

    def __init__(
        self,
        stores: Mixture,
        seq_len: int,
        seed: int,
        *,
        later: Sequence[tuple[int, Mixture]] = (),
        shuffled: bool = True,
    ) -> None:
        if seq_len < 1:
            raise BevatronError(f"the sequence length is {seq_len}, expected at least 1")
        self.seq_len, self.seed, self.shuffled = seq_len, seed, shuffled
        self.stores: list[TokenStore] = []
        numbers: dict[object, int] = {}  # path -> source
        weights: list[dict[int, float]] = []
        for _, mixture in ((0, stores), *later):
            weights.append({})
            if not mixture:
                raise BevatronError("the data names no token store; expected at least one")
            for store, weight in mixture:
                _check(store, weight, seq_len)
                source = numbers.setdefault(store.path.resolve(), len(numbers))
                if source == len(self.stores):
                    self.stores.append(store)
                if source in weights[-1]:
                    raise BevatronError(
                        f"{store.path}: is named twice in one mixture; name it once, with the sum "
                        "of the weights"
                    )
                weights[-1][source] = weight
        self.windows = [(store.tokens - 1) // seq_len for store in self.stores]
        self.stages: list[Stage] = []
        self._order: dict[int, tuple[int, NDArray[np.int64], NDArray[np.int64]]] = {}
        for begin, of in zip((0, *(at for at, _ in later)), weights, strict=True):
            self._add_stage(begin, of)
        self._permutations: dict[tuple[int, int], Permutation] = {}

    def _add_stage(self, begin: int, weights: dict[int, float]) -> None:
        if self.stages and begin <= self.stages[-1].begin:
            raise BevatronError(
                f"a stage begins at sample {begin}, the one before at {self.stages[-1].begin}; "
                "expected ascending ones"
            )
        before = self.counts(begin) if self.stages else [0] * len(self.stores)
        shares = [0] * len(self.stores)
        for (source, weight), quota in zip(
            weights.items(), quotas(list(weights.values())), strict=True
        ):
            shares[source] = quota
            if quota == 0:
                raise BevatronError(
                    f"{self.stores[source].path}: its weight {weight} is under half of 1/{BLOCK} "
                    "of all weights, so it would never be sampled; raise it or leave the store out"
                )
        self.stages.append(Stage(len(self.stages), begin, shares, before))

    @property
    def epoch_length(self) -> int:
        """Windows of all stores together. With one store, position epoch_length begins its second
        epoch; in a mixture each store has epochs of its own, as its weight has it."""
        return sum(self.windows)

    def counts(self, position: int) -> list[int]:
        """How many of the samples before `position` come from each source."""
        stage = self._stage(position - 1) if position else self.stages[0]
        blocks, rest = divmod(position - stage.begin, BLOCK)
        sources, _ = self._slots(stage, blocks)
        part = np.bincount(sources[:rest], minlength=len(self.stores)).tolist()
        whole = zip(stage.before, stage.quotas, part, strict=True)
        return [before + blocks * quota + n for before, quota, n in whole]

    def samples(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n, seq_len + 1] tokens. Depends on nothing but the stores, the weights, the seed and
        the positions."""
        out = np.empty((len(positions), self.seq_len + 1), dtype=np.int64)
        sources, _, windows = self._places(positions)
        for source in np.unique(sources).tolist():
            rows = np.nonzero(sources == source)[0]
            starts = windows[rows] * self.seq_len
            out[rows] = self.stores[source].read_many(starts, self.seq_len + 1)
        return out

    def documents(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n, seq_len + 1]: the number of each token's document within its sample, from 0."""
        sources, _, windows = self._places(positions)
        length = self.seq_len + 1
        rows = [
            self.stores[source].documents(window * self.seq_len, length)
            for source, window in zip(sources.tolist(), windows.tolist(), strict=True)
        ]
        return np.stack(rows)

    def places(self, positions: NDArray[np.int64]) -> list[Place]:
        """Where the samples at these positions come from."""
        columns = (column.tolist() for column in self._places(positions))
        return [Place(*row) for row in zip(*columns, strict=True)]

    def _places(
        self, positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        if len(positions) and positions.min() < 0:
            raise BevatronError(f"the sample position is {positions.min()}, expected 0 or more")
        sources, indices = np.empty_like(positions), np.empty_like(positions)
        for stage, block, rows in self._blocks(positions):
            of, ranks = self._slots(stage, block)
            slots = positions[rows] - stage.begin - block * BLOCK
            sources[rows] = of[slots]
            first = np.array(stage.before) + block * np.array(stage.quotas)
            indices[rows] = first[of[slots]] + ranks[slots]
        epochs, indices = np.divmod(indices, np.array(self.windows)[sources])
        if not self.shuffled:
            return sources, epochs, indices
        for source, epoch in set(zip(sources.tolist(), epochs.tolist(), strict=True)):
            rows = np.nonzero((sources == source) & (epochs == epoch))[0]
            indices[rows] = self._permutation(source, epoch)(indices[rows])
        return sources, epochs, indices

    def _stage(self, position: int) -> Stage:
        return next(stage for stage in reversed(self.stages) if stage.begin <= position)

    def _blocks(
        self, positions: NDArray[np.int64]
    ) -> Iterator[tuple[Stage, int, NDArray[np.int64]]]:
        """The stage and block of positions, and which positions those are."""
        begins = np.array([stage.begin for stage in self.stages])
        numbers = np.searchsorted(begins, positions, side="right") - 1
        blocks = (positions - begins[numbers]) // BLOCK
        for number, block in sorted(set(zip(numbers.tolist(), blocks.tolist(), strict=True))):
            yield self.stages[number], block, np.nonzero((numbers == number) & (blocks == block))[0]

    def _slots(self, stage: Stage, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[BLOCK], [BLOCK]: the source, and its rank among the source's positions in this block."""
        known = self._order.get(stage.number)
        if known is None or known[0] != block:
            labels = np.repeat(np.arange(len(self.stores)), stage.quotas)  # in source order
            if self.shuffled:
                parts = (1, block) if stage.number == 0 else (3, stage.number, block)
                key = np.uint64(derive(self.seed, *parts))
                keys = mix_array(np.arange(BLOCK, dtype=np.uint64) ^ key)
            else:  # the i-th of n lies at (i + 1/2) / n of the block
                spans = [(2 * np.arange(n) + 1) / (2 * max(1, n)) for n in stage.quotas]
                keys = np.concatenate(spans)
            sources = labels[np.argsort(keys, kind="stable")]
            ranks = np.empty(BLOCK, dtype=np.int64)
            for source, quota in enumerate(stage.quotas):
                ranks[sources == source] = np.arange(quota)
            known = self._order[stage.number] = block, sources, ranks
        return known[1], known[2]

    def _permutation(self, source: int, epoch: int) -> Permutation:
        known = self._permutations.get((source, epoch))
        if known is None:
            if len(self._permutations) > 4 * len(self.stores):
                self._permutations.clear()
            key = derive(self.seed, 2, source, epoch)
            known = self._permutations[source, epoch] = Permutation(self.windows[source], key)
        return known


def _check(store: TokenStore, weight: float, seq_len: int) -> None:
    if not (math.isfinite(weight) and weight > 0):
        raise BevatronError(
            f"{store.path}: its weight is {weight}, expected a positive number; to leave a store "
            "out, do not name it"
        )
    if store.tokens < seq_len + 1:
        raise BevatronError(
            f"{store.path}: has {store.tokens} tokens, a sequence length of {seq_len} needs at "
            f"least {seq_len + 1}; add text or train with shorter sequences"
        )
