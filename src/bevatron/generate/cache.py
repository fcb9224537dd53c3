"""Keys and values of one sequence batch, preallocated, one cache per layer that needs one."""

from __future__ import annotations

import torch
from torch import Tensor

from bevatron.spec import Attention, ModelSpec


class LayerCache:
    """[B, G, capacity, D] keys and values, of which the first `length` positions are filled."""

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.key = torch.empty(shape, dtype=dtype, device=device)
        self.value = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, G, T, D]; returns views of all that is held."""
        end = self.length + key.shape[2]
        self.key[:, :, self.length : end] = key
        self.value[:, :, self.length : end] = value
        self.length = end
        return self.key[:, :, :end], self.value[:, :, :end]


def make_caches(
    spec: ModelSpec, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> dict[int, LayerCache]:
    """By layer index, each of the size that its layer needs; none for no-op and linear ones."""
    return {
        i: LayerCache((batch, a.num_key_value_heads, capacity, a.head_dim), dtype, device)
        for i, layer in enumerate(spec.layers)
        if isinstance(a := layer.attention, Attention)
    }
