"""Sequences of which some tokens are learned."""

from __future__ import annotations

from torch import Tensor

from bevatron.nn.vocabulary_loss import IGNORE


def labels_of(tokens: Tensor, learned: Tensor) -> Tensor:
    """[n, T] int64: at each token the one after it, if that is learned, else IGNORE.

    Args:
        tokens, learned: [n, T]; that the first token of a document is not learned is for whoever
            made them (`data.chat_examples.Example`).
    """
    labels = tokens.roll(-1, 1).masked_fill(~learned.roll(-1, 1), IGNORE)
    labels[:, -1] = IGNORE
    return labels
