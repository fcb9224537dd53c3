"""Choosing the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bevatron.errors import BevatronError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. `top_k` 0 and `top_p` 1 keep everything."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise BevatronError(f"temperature is {self.temperature}, expected a number from 0 on")
        if not 0 < self.top_p <= 1:
            raise BevatronError(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if self.top_k < 0:
            raise BevatronError(f"top_k is {self.top_k}, expected 0 (all) or more")


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
