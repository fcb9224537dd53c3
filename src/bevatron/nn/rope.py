"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split as transformers stores it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bevatron.spec import Rope

Rotations = dict[int, tuple[Tensor, ...]]  # head_dim -> cos and sin


def inverse_frequencies(
    rope: Rope, head_dim: int, length: Tensor | int, device: torch.device | str = "cpu"
) -> Tensor:
    """Angular step per position of every rotated pair, fp32 [R/2], with the rope's scaling.
    `length` of the sequence (the highest position + 1) matters to `dynamic` only."""
    rotary_dim = rope.rotary_dim(head_dim)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device=device).float()
    exponents = exponents / rotary_dim
    inverse = 1.0 / (_theta(rope, rotary_dim, length, device) ** exponents)
    if rope.kind == "linear":
        assert rope.factor is not None
        inverse = inverse / rope.factor
    elif rope.kind == "yarn":
        inverse = _yarn(inverse, rope, rotary_dim)
    elif rope.kind == "llama3":
        inverse = _llama3(inverse, rope)
    return -inverse if rope.reversed else inverse


def _theta(
    rope: Rope, rotary_dim: int, length: Tensor | int, device: torch.device | str
) -> Tensor | float:
    """Theta, which `dynamic` raises for sequences beyond the trained context."""
    if rope.kind != "dynamic":
        return rope.theta
    assert rope.factor is not None and rope.original_max_position_embeddings is not None
    context = rope.original_max_position_embeddings
    longest = torch.as_tensor(length, device=device).clamp(min=context)
    stretch = rope.factor * longest / context - (rope.factor - 1)
    return rope.theta * stretch ** (rotary_dim / (rotary_dim - 2))


def _yarn(inverse: Tensor, rope: Rope, rotary_dim: int) -> Tensor:
    """Pairs that turn fast are kept, those that turn slowly divided by `factor` (YaRN, eq. 23)."""
    assert rope.factor is not None and rope.original_max_position_embeddings is not None
    assert rope.beta_fast is not None and rope.beta_slow is not None

    def pair_that_turns(times: float) -> float:
        """The (fractional) index of the pair that turns so often within the trained context."""
        context = float(rope.original_max_position_embeddings or 0)
        return rotary_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float32, device=inverse.device)
    blend = ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)
    keep = 1 - blend
    return inverse / rope.factor * (1 - keep) + inverse * keep


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
    rope: Rope, head_dim: int, positions: Tensor, dtype: torch.dtype, length: int | None = None
) -> tuple[Tensor, ...]:
    """cos and sin [B or 1, 1, T, R/2] for `positions` [B or 1, T]; computed in fp32.
    `length` of the sequence, if `positions` are but a part of it."""
    longest: Tensor | int = 0 if length is None else length
    if length is None and rope.kind == "dynamic":
        longest = positions.max() + 1
    cos, sin = cos_and_sin(rope, head_dim, positions[:, None], longest)
    return cos.to(dtype), sin.to(dtype)


def cos_and_sin(
    rope: Rope, head_dim: int, positions: Tensor, length: Tensor | int
) -> tuple[Tensor, Tensor]:
    """fp32 [..., R/2] for positions [...]; see `inverse_frequencies` for `length`."""
    inverse = inverse_frequencies(rope, head_dim, length, positions.device)
    angles = positions.float()[..., None] * inverse
    cos, sin = angles.cos(), angles.sin()
    if rope.attention_factor is not None:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading 2 * R/2 dimensions of the heads x [B, H, T, D]; the rest passes."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    parts = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat((*parts, rest) if rest.shape[-1] else parts, dim=-1)


def for_rotate_(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [..., R/2] as `rotate_` takes them, [..., R]."""
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`rotate` in place, in fewer operations and without gradients: the same bits, for a result is
    rounded as often. x [..., D], cos and sin of `for_rotate_`."""
    turned = x[..., : cos.shape[-1]]
    left, right = turned.chunk(2, dim=-1)
    swapped = torch.cat((right, left), dim=-1)
    turned.mul_(cos).add_(swapped.mul_(sin))
