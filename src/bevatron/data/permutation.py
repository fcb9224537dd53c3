"""Pseudo-random permutations of any size that need no memory, and the bit mixing that they use."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
MASK = (1 << 64) - 1
_ADD, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(x: int) -> int:
    """splitmix64's finalizer: a bijection of 64 bit that spreads every input bit."""
    x = (x + _ADD) & MASK
    x = ((x ^ (x >> 30)) * _FIRST) & MASK
    x = ((x ^ (x >> 27)) * _SECOND) & MASK
    return x ^ (x >> 31)


def mix_array(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix` of every element (integer arrays wrap around)."""
    x = x + np.uint64(_ADD)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))


def derive(*numbers: int) -> int:
    """A 64 bit key from integers; their order matters."""
    key = 0
    for number in numbers:
        key = mix(key ^ (number & MASK))
    return key


class Permutation:
    """A pseudo-random bijection of range(size): a Feistel network with cycle walking (Black &
    Rogaway 2002), O(1) memory, expected under 4 walks a number."""

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self.half = max(1, ((size - 1).bit_length() + 1) // 2)  # bits of each Feistel half
        self.keys = [derive(key, i) for i in range(ROUNDS)]

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each of these numbers, all within range(size), goes."""
        half, low = np.uint64(self.half), np.uint64((1 << self.half) - 1)
        out = np.empty(len(numbers), dtype=np.int64)
        walking = np.arange(len(numbers))  # which of them are still out of range
        x = numbers.astype(np.uint64)
        while len(walking):
            left, right = x >> half, x & low
            for key in self.keys:
                left, right = right, left ^ (mix_array(right ^ np.uint64(key)) & low)
            x = (left << half) | right
            inside = x < self.size  # else walk on: the cycle that left the range comes back into it
            out[walking[inside]] = x[inside]
            walking, x = walking[~inside], x[~inside]
        return out
