"""Which tokens make up the sample at a position: a pure function of (seed, position).

Nothing is stored, so a run can resume at any position and on any number of ranks.

    position -> stage       a stage is a mixture of sources that begins at a position
    position -> source      blocks of 1024 positions of a stage; how many of the first n blocks'
                            positions each source has is its exact share, rounded (`Shares`); the
                            order in a block is shuffled by (seed, stage, block)
    position -> index       what earlier stages took of the source + what the blocks before took +
                            rank of the position among the source's in its block: the source's
                            samples are counted without gaps, whatever the stages
    index    -> window      each epoch is a full permutation of the source's windows
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bevatron.data.permutation import Permutation, derive, mix_array
from bevatron.data.token_store import TokenStore
from bevatron.errors import BevatronError

BLOCK = 1024

Mixture = Sequence[tuple[TokenStore, float]]


class Shares:
    """How many of the first blocks' positions each source of a mixture has, in exact arithmetic:
    the same on every machine.

    The sources are halved until one is left; of n positions that come to some sources, the first
    half of them has its share of n, rounded. So every number is the exact share but for at most
    half a position per halving, however long the stretch; it never falls as n grows; and finding
    it takes as many roundings as there are sources.

    Args:
        rounded: each source has the same number in every block, by largest remainder (ties to the
            earlier source), which is how older runs began. Shares that are multiples of 1/BLOCK
            come to the same.
    """

    def __init__(self, weights: Sequence[float], *, rounded: bool = False) -> None:
        total = sum(Fraction(w) for w in weights)
        self.exact = [Fraction(w) / total for w in weights]
        self.quotas = _largest_remainders(self.exact) if rounded else None

    def taken(self, blocks: int) -> list[int]:
        """Of each source, positions in the first so many blocks."""
        if self.quotas is not None:
            return [quota * blocks for quota in self.quotas]
        return self.among(blocks * BLOCK)

    def among(self, positions: int) -> list[int]:
        """Of each source, positions among the first so many, where the shares are exact. As many
        as `positions` in all, and none falls as `positions` grows, so each next position is one
        source's."""
        out = [0] * len(self.exact)

        def halve(begin: int, end: int, positions: int) -> None:
            if end - begin == 1:
                out[begin] = positions
                return
            middle = (begin + end) // 2
            first, both = sum(self.exact[begin:middle]), sum(self.exact[begin:end])
            part = math.floor(positions * first / both + Fraction(1, 2))
            halve(begin, middle, part)
            halve(middle, end, positions - part)

        halve(0, len(out), positions)
        return out


def _largest_remainders(exact: Sequence[Fraction]) -> list[int]:
    shares = [share * BLOCK for share in exact]
    counts = [math.floor(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in order[: BLOCK - sum(counts)]:
        counts[i] += 1
    return counts


class Place(NamedTuple):
    """Where a sample comes from: the source's number, its epoch, the window's number in it."""

    source: int
    epoch: int
    window: int


@dataclass(frozen=True)
class Stage:
    """A mixture from position `begin` on.

    Attributes:
        sources: that it is of.
        shares: of them, in this order.
        before: positions in all earlier stages of each source of any stage.
    """

    number: int
    begin: int
    sources: list[int]
    shares: Shares
    before: NDArray[np.int64]

    def taken(self, blocks: int) -> NDArray[np.int64]:
        """Of each source of any stage, positions before block `blocks` of this stage, in all."""
        out = self.before.copy()
        out[self.sources] += np.array(self.shares.taken(blocks))
        return out


class Slots(NamedTuple):
    """A block: of each of its positions the source and its rank among the source's samples."""

    block: int
    sources: NDArray[np.int64]  # [BLOCK]
    ranks: NDArray[np.int64]  # [BLOCK]


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
        rounded: see `Shares`.
    Raises BevatronError for a weight that is not positive or, rounded, below what a block can hold,
    for a store that is named twice in a mixture or is too short for one window, and for positions
    that do not ascend.
    """

    def __init__(
        self,
        stores: Mixture,
        seq_len: int,
        seed: int,
        *,
        later: Sequence[tuple[int, Mixture]] = (),
        shuffled: bool = True,
        rounded: bool = False,
    ) -> None:
        if seq_len < 1:
            raise BevatronError(f"the sequence length is {seq_len}, expected at least 1")
        self.seq_len, self.seed, self.shuffled = seq_len, seed, shuffled
        self.rounded = rounded
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
        self._slots_of: dict[int, Slots] = {}  # of each stage the last block that was asked for
        for begin, of in zip((0, *(at for at, _ in later)), weights, strict=True):
            self._add_stage(begin, of)
        self._permutations: dict[tuple[int, int], Permutation] = {}

    def _add_stage(self, begin: int, weights: dict[int, float]) -> None:
        if self.stages and begin <= self.stages[-1].begin:
            raise BevatronError(
                f"a stage begins at sample {begin}, the one before at {self.stages[-1].begin}; "
                "expected ascending numbers"
            )
        before = self.counts(begin) if self.stages else [0] * len(self.stores)
        shares = Shares(list(weights.values()), rounded=self.rounded)
        for (source, weight), quota in zip(weights.items(), shares.quotas or (), strict=False):
            if quota == 0:
                raise BevatronError(
                    f"{self.stores[source].path}: its weight {weight} is under half of 1/{BLOCK} "
                    "of all weights, so it would never be sampled in this run, which was begun "
                    "with rounded weights; raise it, leave the store out, or begin another run"
                )
        at = np.array(before, dtype=np.int64)
        self.stages.append(Stage(len(self.stages), begin, list(weights), shares, at))

    @property
    def epoch_length(self) -> int:
        """Windows of all stores together. With one store, position epoch_length begins its second
        epoch; in a mixture each store has epochs of its own, as its weight has it."""
        return sum(self.windows)

    @property
    def pass_length(self) -> int:
        """Positions from the beginning on within which every window of every store comes, and those
        of the last store to end once."""
        whole = 1
        while any(n < of for n, of in zip(self.counts(whole), self.windows, strict=True)):
            whole *= 2

        def is_whole(position: int) -> bool:
            return all(n >= of for n, of in zip(self.counts(position), self.windows, strict=True))

        return bisect_left(range(whole + 1), True, key=is_whole)

    def counts(self, position: int) -> list[int]:
        """How many of the samples before `position` come from each source."""
        stage = self._stage(position - 1) if position else self.stages[0]
        blocks, rest = divmod(position - stage.begin, BLOCK)
        sources = self._slots(stage, blocks).sources
        part = np.bincount(sources[:rest], minlength=len(stage.before))
        return [int(n) for n in stage.taken(blocks) + part]

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
            slots = self._slots(stage, block)
            at = positions[rows] - stage.begin - block * BLOCK
            sources[rows], indices[rows] = slots.sources[at], slots.ranks[at]
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

    def _slots(self, stage: Stage, block: int) -> Slots:
        known = self._slots_of.get(stage.number)
        if known is not None and known.block == block:
            return known
        first = stage.taken(block)
        quotas = stage.taken(block + 1) - first
        labels = np.repeat(np.arange(len(quotas)), quotas)  # in source order
        if self.shuffled:
            parts = (1, block) if stage.number == 0 else (3, stage.number, block)
            key = np.uint64(derive(self.seed, *parts))
            keys = mix_array(np.arange(BLOCK, dtype=np.uint64) ^ key)
        else:  # the i-th of n lies at (i + 1/2) / n of the block
            spans = [(2 * np.arange(n) + 1) / (2 * max(1, n)) for n in quotas.tolist()]
            keys = np.concatenate(spans)
        sources = labels[np.argsort(keys, kind="stable")]
        ranks = np.empty(BLOCK, dtype=np.int64)
        for source, quota in enumerate(quotas.tolist()):
            ranks[sources == source] = first[source] + np.arange(quota)
        slots = self._slots_of[stage.number] = Slots(block, sources, ranks)
        return slots

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
