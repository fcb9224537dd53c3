"""What stands after the final norm: logits over the vocabulary, or scores of a few labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bevatron.errors import BevatronError
from bevatron.nn.linear_map import LinearMap
from bevatron.nn.rank_communication import Comm, empty
from bevatron.spec import Head as HeadSpec

# What an objective does at the end: (hidden [B, T, h], weight [V, h]) -> anything; of another head
# than causal_lm, (this rank's share [B, T, labels] of the scores, head weight) -> anything.
Compute = Callable[[Tensor, Tensor], Any]


class Vocabulary(nn.Module):
    """The output matrix. What is computed with it is the caller's: logits, or a chunked loss that
    never holds all logits. It runs inside forward, where the weight is unsharded."""

    def __init__(self, vocab_size: int, hidden_size: int, comm: Comm) -> None:
        super().__init__()
        self.comm = comm
        self.weight = empty(vocab_size, hidden_size)

    def forward(self, hidden: Tensor, compute: Compute) -> Any:
        return compute(self.comm.enter(hidden), self.comm.view(self.weight))


class Scores(LinearMap):
    """Scores [B, T, labels] of a classification or question answering head."""

    def __init__(self, spec: HeadSpec, hidden_size: int, comm: Comm) -> None:
        super().__init__(spec.scores, hidden_size, bias=(spec.scores,) if spec.bias else None)
        self.comm = comm

    def forward(self, hidden: Tensor) -> Tensor:
        return self.reduced_part(hidden, self.comm)


def pool(scores: Tensor, ids: Tensor, pad_token_id: int | None) -> Tensor:
    """The scores [B, labels] at each sequence's rightmost token that is not padding, found from
    the ids [B, T] alone, as transformers does; at the first token if all are padding.

    Raises BevatronError if several sequences come without a padding token to tell their ends."""
    if pad_token_id is None:
        if len(ids) > 1:
            raise BevatronError(
                f"the model names no pad_token_id, so the ends of {len(ids)} sequences cannot be "
                "told; set it in config.json, or pass one sequence at a time"
            )
        return scores[:, -1]
    return at(scores, last_token(ids, pad_token_id))


def last_token(ids: Tensor, pad_token_id: int) -> Tensor:
    """The position [B] of the rightmost token of ids [B, T] that is not padding, or 0."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    return (positions * (ids != pad_token_id)).argmax(-1)


def at(scores: Tensor, positions: Tensor) -> Tensor:
    """Of each sequence of scores [B, T, ...] those at its position [B]."""
    return scores[torch.arange(len(scores), device=scores.device), positions]


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """c * tanh(logits / c)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
