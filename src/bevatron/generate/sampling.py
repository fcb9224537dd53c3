"""Choosing the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from bevatron.generate.request import Sampling

__all__ = ["Sampling", "choose"]


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Next tokens [B] from logits [B, V]. Top-k is applied before top-p, as transformers does."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores = logits.float().cpu() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = scores.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = (before >= sampling.top_p).scatter(1, order, before >= sampling.top_p)
        scores = scores.masked_fill(dropped, float("-inf"))
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0].to(logits.device)
