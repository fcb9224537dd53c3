"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split as transformers stores it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bevatron.spec import Rope


def inverse_frequencies(rope: Rope, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Angular step per position of every rotated pair, fp32 [R/2], with the rope's scaling."""
    rotary_dim = rope.rotary_dim(head_dim)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device=device).float()
    inverse = 1.0 / (rope.theta ** (exponents / rotary_dim))
    if rope.kind == "linear":
        assert rope.factor is not None
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        inverse = _llama3(inverse, rope)
    return -inverse if rope.reversed else inverse


def _llama3(inverse: Tensor, rope: Rope) -> Tensor:
    """Long wavelengths divided by `factor`, short ones kept, a linear blend between."""
    assert rope.factor is not None and rope.original_max_position_embeddings is not None
    assert rope.low_freq_factor is not None and rope.high_freq_factor is not None
    context = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / inverse
    blend = context / wavelength - rope.low_freq_factor
    blend = blend / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = (1 - blend) * inverse / rope.factor + blend * inverse
    out = torch.where(wavelength > context / rope.low_freq_factor, inverse / rope.factor, inverse)
    middle = (wavelength <= context / rope.low_freq_factor) & (
        wavelength >= context / rope.high_freq_factor
    )
    return torch.where(middle, smooth, out)


def rotation(
    rope: Rope, head_dim: int, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """cos and sin [B or 1, 1, T, R/2] for `positions` [B or 1, T]; computed in fp32."""
    inverse = inverse_frequencies(rope, head_dim, positions.device)
    angles = positions.float()[:, None, :, None] * inverse  # [B, 1, T, R/2]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading 2 * R/2 dimensions of the heads x [B, H, T, D]; the rest passes."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    parts = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat((*parts, rest) if rest.shape[-1] else parts, dim=-1)
