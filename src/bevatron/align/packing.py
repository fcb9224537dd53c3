"""Packing sequences into samples of one length, by best fit decreasing.

The longest sequence comes first, and each goes where the least room is left that holds it; where
none does, it begins a sample. At most 11/9 of the fewest samples possible, and one, are needed
(Johnson 1973); in practice a few in a thousand tokens are padding (Ding et al., arXiv 2404.10830,
who use it for training). TRL calls it "bfd".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def best_fit_decreasing(lengths: Sequence[int] | NDArray[np.int64], room: int) -> list[list[int]]:
    """The numbers of the sequences that share each sample of `room` tokens. A function of the
    lengths alone: of equally long ones the first comes first. Samples are in the order in which
    they were begun, and so are the sequences in them.

    Raises ValueError for a sequence that is longer than a sample, or empty.
    """
    given = np.asarray(lengths, dtype=np.int64)
    if len(given) and not 0 < given.min() <= given.max() <= room:
        raise ValueError(f"lengths are {given.min()} to {given.max()}, expected 1 to {room}")
    samples: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # by what is left
    left = 0  # a bit for each number of tokens that some sample has left
    for number in np.argsort(-given, kind="stable").tolist():
        length = int(given[number])
        fitting = left >> length << length
        if fitting:
            rest = (fitting & -fitting).bit_length() - 1
            sample = with_room[rest].pop()
            if not with_room[rest]:
                left ^= 1 << rest
        else:
            rest, sample = room, len(samples)
            samples.append([])
        samples[sample].append(number)
        rest -= length
        if rest and not with_room[rest]:
            left |= 1 << rest
        if rest:
            with_room[rest].append(sample)
    return samples
