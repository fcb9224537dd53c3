"""Keys and values of all sequences that run: one buffer per layer that needs one."""

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
        """Have so many rows and positions; what is held in those that stay is kept."""
        if (rows, capacity) == (self.rows, self.capacity):
            return
        r, c = min(rows, self.rows), min(capacity, self.capacity)
        for i, old in self.layers.items():
            _, g, two, _, d = old.shape
            new = torch.zeros((rows, g, two, capacity, d), dtype=old.dtype, device=old.device)
            new[:r, :, :, :c] = old[:r, :, :, :c]
            self.layers[i] = new
        self.rows, self.capacity = rows, capacity

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` positions of two rows."""
        for kv in self.layers.values():
            one, other = kv[a, :, :, :length], kv[b, :, :, :length]
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)

    @property
    def bytes_per_position(self) -> int:
        """Of one sequence, in all layers."""
        sizes = (kv.shape[1] * 2 * kv.shape[4] * kv.itemsize for kv in self.layers.values())
        return sum(sizes)
