"""The KV cache: keys and values of all running sequences, one buffer per layer that needs one."""

from __future__ import annotations

from collections.abc import Mapping

import torch

CAPACITY = 256  # positions that a buffer begins with


class SlotCache:
    """One row per sequence: [rows, G, 2, capacity, D] keys and values of each layer that has
    attention, kept and reused, made larger when more or longer sequences need it.

    Args:
        shapes: (G, D) by layer, of this rank's part.
    """

    def __init__(
        self, shapes: Mapping[int, tuple[int, int]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows = self.capacity = 0
        # Zeros, because what is masked is multiplied by a weight of zero, which leaves a NaN.
        self.layers = {
            i: torch.zeros((0, g, 2, 0, d), dtype=dtype, device=device)
            for i, (g, d) in shapes.items()
        }

    def resize(self, rows: int, capacity: int) -> None:
        """Have so many rows and positions; what is held in those that stay is kept.

        May fail for want of memory after some of the layers. Nothing is lost by that: the next call
        goes on from what each layer has, and gives back what was taken in vain."""
        self.rows = self.capacity = 0
        for i, old in self.layers.items():
            r, g, two, c, d = old.shape
            if (r, c) == (rows, capacity):
                continue
            try:
                new = torch.zeros((rows, g, two, capacity, d), dtype=old.dtype, device=old.device)
            except (RuntimeError, MemoryError):
                if r >= rows and c >= capacity:
                    continue  # larger than it need be, and no room for a smaller one beside it
                raise
            r, c = min(rows, r), min(capacity, c)
            new[:r, :, :, :c] = old[:r, :, :, :c]
            self.layers[i] = new
        self.rows, self.capacity = rows, capacity

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` positions of two rows, a few at a time: this must not fail
        for want of memory, as half of it would be worse than nothing."""
        for kv in self.layers.values():
            for at in range(0, length, CAPACITY):
                one, other = (kv[row, :, :, at : min(length, at + CAPACITY)] for row in (a, b))
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row to another one."""
        for kv in self.layers.values():
            kv[target, :, :, :length] = kv[source, :, :, :length]

    @property
    def bytes_per_position(self) -> int:
        """Of one sequence, in all layers."""
        sizes = (kv.shape[1] * 2 * kv.shape[4] * kv.itemsize for kv in self.layers.values())
        return sum(sizes)
