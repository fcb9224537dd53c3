"""Choosing the next tokens of a batch.

The order is that of transformers' processors: penalties and biases on logits, then temperature,
top-k, top-p and min-p, each on what the one before it left. A draw inverts the cumulative
distribution, in the order of the vocabulary, at a number that is a function of (seed, position) and
does not depend on what else is in the batch. (The logits do depend on the batch, by rounding: see
docs/serve.md, Sameness.)
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from bevatron.generate.request import LARGEST_SEED, Sampling

__all__ = ["Chooser", "Sampling", "choose", "left_over"]

CANDIDATES = 256  # likeliest tokens that top-k and top-p look at first
_MASK = 2**64 - 1


class Chooser:
    """How one sequence chooses, and what it has seen.

    Attributes:
        counts: [2, V] how often each token stands in the prompt and in the answer, if a penalty
            asks for it.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocab_size: int) -> None:
        self.sampling = sampling
        self.seed = secrets.randbelow(LARGEST_SEED) if sampling.seed is None else sampling.seed
        self.position = len(prompt)  # of the token to be chosen
        self.counts: Tensor | None = None
        if sampling.penalises:
            self.counts = torch.zeros(2, vocab_size)
            self.counts[0] = torch.bincount(torch.tensor(prompt), minlength=vocab_size)
        ids = list(sampling.logit_bias)
        self.biased = torch.tensor(ids, dtype=torch.long)
        self.bias = torch.tensor([sampling.logit_bias[i] for i in ids])

    def chose(self, token: int) -> None:
        self.position += 1
        if self.counts is not None:
            self.counts[1, token] += 1

    @property
    def plain(self) -> bool:
        """Whether the likeliest token wins as it is."""
        s = self.sampling
        return s.temperature == 0 and self.counts is None and not s.logit_bias


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for this position: SplitMix64 of both (Steele et al., 2014)."""
    z = _mix(_mix(seed & _MASK) ^ ((position + 1) * 0x9E3779B97F4A7C15 & _MASK))
    return (z >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """The next token of each sequence, from logits [B, V], which stay as they are. Does not call
    `chose`."""
    tokens: list[int] = logits.argmax(-1).tolist()
    rows = [i for i, chooser in enumerate(choosers) if not chooser.plain]
    if not rows:
        return tokens
    some = [choosers[i] for i in rows]
    scores = penalise(logits[rows].float().cpu(), some)
    drawn = [i for i, chooser in enumerate(some) if chooser.sampling.temperature > 0]
    for i, token in enumerate(scores.argmax(-1).tolist()):
        tokens[rows[i]] = token
    if drawn:
        picked = draw(scores[drawn], [some[i] for i in drawn])
        for i, token in zip(drawn, picked, strict=True):
            tokens[rows[i]] = token
    return tokens


def penalise(scores: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """Penalties and biases on scores [B, V], in place."""
    rows = [i for i, chooser in enumerate(choosers) if chooser.counts is not None]
    if rows:
        counts = torch.stack([c for i in rows if (c := choosers[i].counts) is not None])
        s = [choosers[i].sampling for i in rows]
        repeated = torch.tensor([x.repetition_penalty for x in s])[:, None]
        frequency = torch.tensor([x.frequency_penalty for x in s])[:, None]
        presence = torch.tensor([x.presence_penalty for x in s])[:, None]
        part, new = scores[rows], counts[:, 1]
        weaker = torch.where(part < 0, part * repeated, part / repeated)
        part = torch.where(counts.sum(1) > 0, weaker, part)
        scores[rows] = part - frequency * new - presence * (new > 0)
    for row, chooser in zip(scores, choosers, strict=True):
        if len(chooser.bias):
            row[chooser.biased] += chooser.bias
    return scores


def draw(scores: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """One token for each row of penalised scores [B, V]."""
    samplings = [chooser.sampling for chooser in choosers]
    kept, ids = left_over(scores, samplings)
    if ids is not None:  # back into the order of the vocabulary
        ids, order = ids.sort(-1)
        kept = kept.gather(1, order)
    total = kept.double().softmax(-1).cumsum(-1)
    points = torch.tensor([uniform(c.seed, c.position) for c in choosers], dtype=torch.float64)
    at = torch.searchsorted(total, points[:, None] * total[:, -1:], right=True)
    # Behind the last one by rounding alone: the last one that has any probability.
    last = (kept > float("-inf")).long().cumsum(-1).argmax(-1, keepdim=True)
    at = torch.minimum(at, last)
    picked: list[int] = (at if ids is None else ids.gather(1, at))[:, 0].tolist()
    return picked


def left_over(scores: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor | None]:
    """Scores after temperature, with -inf for what top-k, top-p and min-p drop: over the whole
    vocabulary, or of the candidates [B, n] whose token ids are the second result."""
    vocab = scores.shape[-1]
    temperature = torch.tensor([s.temperature for s in samplings])[:, None]
    # The highest first to 0, and no temperature that rounds to 0: neither overflows.
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature.clamp(min=1e-6)
    ks = [min(s.top_k or vocab, vocab) for s in samplings]
    ps = torch.tensor([s.top_p for s in samplings])[:, None]
    floor = torch.tensor([s.min_p for s in samplings])[:, None]
    cut = [k < vocab or s.top_p < 1 for k, s in zip(ks, samplings, strict=True)]
    if not any(cut):
        return _above(scores, floor), None
    most = max([k for k in ks if k < vocab], default=0)
    n = min(vocab, max(CANDIDATES, 2 * most))
    if not all(cut):
        n = vocab
    while True:
        values, ids = scores.topk(n) if n < vocab else scores.sort(descending=True)
        kth = values.gather(1, torch.tensor([min(k, n) - 1 for k in ks])[:, None])
        whole = torch.tensor([k >= vocab for k in ks])[:, None]
        values = values.masked_fill((values < kth) & ~whole, float("-inf"))
        everything = torch.where(
            whole, scores.logsumexp(-1, keepdim=True), values.logsumexp(-1, keepdim=True)
        )
        shares = (values - everything).exp()
        before = shares.cumsum(-1) - shares
        # Enough candidates: those behind the last one would be dropped as well. (Of scores that
        # are equal, top-k keeps all.)
        enough = torch.where(whole, before[:, -1:] >= ps, values[:, -1:] == float("-inf"))
        enough |= (before[:, -1:] >= ps) & (ps < 1)
        if n == vocab or bool(enough.all()):
            values = values.masked_fill((before >= ps) & (ps < 1), float("-inf"))
            return _above(values, floor), ids
        n = min(vocab, n * 16)


def _above(scores: Tensor, floor: Tensor) -> Tensor:
    """Drop tokens whose probability is less than `floor` [B, 1] of the highest."""
    if not bool((floor > 0).any()):
        return scores
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) + floor.log(), float("-inf"))
