"""Which tokens the sample at a position is made of: a pure function of (seed, position).

Nothing is stored, so a run resumes at any position, at any number of ranks, by asking for it.

    position -> source      blocks of 1024 positions; every source has an exact quota in each,
                            the order in a block is shuffled by (seed, block)
    position -> index       blocks before * quota + rank of the position among the source's in
                            its block: the source's samples are counted without gaps
    index    -> window      each epoch is a full permutation of the source's windows, by a Feistel
                            network with cycle walking (Black & Rogaway 2002): no memory
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from bevatron.data.store import TokenStore
from bevatron.errors import BevatronError

BLOCK = 1024
ROUNDS = 6
MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """splitmix64's finalizer: a bijection of 64 bit that spreads every input bit."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def derive(*numbers: int) -> int:
    """A 64 bit key from integers; their order matters."""
    key = 0
    for number in numbers:
        key = mix(key ^ (number & MASK))
    return key


class Permutation:
    """A pseudo-random bijection of range(size): O(1) memory, expected under 4 walks a call."""

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self.half = max(1, ((size - 1).bit_length() + 1) // 2)  # bits of each Feistel half
        self.keys = [derive(key, i) for i in range(ROUNDS)]

    def __call__(self, i: int) -> int:
        half, low = self.half, (1 << self.half) - 1
        while True:
            left, right = i >> half, i & low
            for key in self.keys:
                left, right = right, left ^ (mix(key ^ right) & low)
            i = left << half | right
            if i < self.size:  # else walk on: the cycle that left the range comes back into it
                return i


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


@dataclass(frozen=True)
class Place:
    """Where a sample comes from: the source's number, its epoch, the window's number in it."""

    source: int
    epoch: int
    window: int


class Sampler:
    """The endless order of training samples.

    A window is seq_len + 1 tokens (inputs and targets) that begin at a multiple of seq_len, so
    windows share one token, every token but a store's first is a target once per epoch, and what
    does not fill a window at a store's end is left out.

    Args:
        stores: (store, weight): the share of samples, not of documents; weights need not add to 1.
    Raises BevatronError for a weight that is not positive or is below what a block can hold, and
    for a store too short for one window.
    """

    def __init__(self, stores: list[tuple[TokenStore, float]], seq_len: int, seed: int) -> None:
        if not stores:
            raise BevatronError("the data names no token store; expected at least one")
        if seq_len < 1:
            raise BevatronError(f"the sequence length is {seq_len}, expected at least 1")
        for store, weight in stores:
            _check(store, weight, seq_len)
        self.stores = [store for store, _ in stores]
        self.seq_len = seq_len
        self.seed = seed
        self.windows = [(store.tokens - 1) // seq_len for store in self.stores]
        self.quotas = quotas([weight for _, weight in stores])
        for (store, weight), quota in zip(stores, self.quotas, strict=True):
            if quota == 0:
                raise BevatronError(
                    f"{store.path}: its weight {weight} is under half of 1/{BLOCK} of all weights, "
                    f"so it would never be sampled; raise it or leave the store out"
                )
        self._labels = np.repeat(np.arange(len(stores)), self.quotas)  # [BLOCK], in source order
        self._block = -1
        self._order: list[tuple[int, int]] = []
        self._permutations: dict[int, tuple[int, Permutation]] = {}  # source -> its latest epoch

    @property
    def epoch_length(self) -> int:
        """Windows of all stores together. With one store, position epoch_length begins its second
        epoch; in a mixture each store has epochs of its own, as its weight has it."""
        return sum(self.windows)

    def sample(self, position: int) -> NDArray[np.int64]:
        """[seq_len + 1] tokens. Depends on nothing but the stores, the weights, seed, position."""
        place = self.place(position)
        return self.stores[place.source].read(place.window * self.seq_len, self.seq_len + 1)

    def documents(self, position: int) -> NDArray[np.int64]:
        """[seq_len + 1]: the number of each token's document within the sample, from 0."""
        place = self.place(position)
        return self.stores[place.source].documents(place.window * self.seq_len, self.seq_len + 1)

    def place(self, position: int) -> Place:
        """Where the sample at `position` comes from."""
        if position < 0:
            raise BevatronError(f"the sample position is {position}, expected 0 or more")
        block, slot = divmod(position, BLOCK)
        if len(self.stores) == 1:
            source, index = 0, position
        else:
            source, rank = self._slots(block)[slot]
            index = block * self.quotas[source] + rank
        epoch, index = divmod(index, self.windows[source])
        return Place(source, epoch, self._permutation(source, epoch)(index))

    def _slots(self, block: int) -> list[tuple[int, int]]:
        """[BLOCK]: (source, rank among the source's positions in this block)."""
        if block != self._block:
            key = np.uint64(derive(self.seed, 1, block))
            hashes = _mix_array(np.arange(BLOCK, dtype=np.uint64) ^ key)
            sources: list[int] = self._labels[np.argsort(hashes, kind="stable")].tolist()
            seen = [0] * len(self.stores)
            order = []
            for source in sources:
                order.append((source, seen[source]))
                seen[source] += 1
            self._block, self._order = block, order
        return self._order

    def _permutation(self, source: int, epoch: int) -> Permutation:
        known = self._permutations.get(source)
        if known is None or known[0] != epoch:
            key = derive(self.seed, 2, source, epoch)
            known = self._permutations[source] = epoch, Permutation(self.windows[source], key)
        return known[1]


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


def _mix_array(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix` of every element (integer arrays wrap around)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
