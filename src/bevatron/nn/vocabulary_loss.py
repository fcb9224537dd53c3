"""Losses over the vocabulary without ever holding all logits.

Logits exist for one chunk of tokens at a time, at most `CHUNK_LOGITS` of them, and ranks may share
the vocabulary. There are two ways to a gradient:

- `sums_of_chunks` adds up a loss over all tokens. The weight of each token is known in the forward,
  so one pass over the chunks computes the loss and both gradients, and the backward only scales
  them (the idea of Wijmans et al., arXiv 2411.09009). Cross-entropy and distillation are such sums.
- `log_probabilities` gives a number for each token, which may be used in any way. The forward keeps
  one number per token; the backward computes each chunk's logits again, with the gradient that
  arrives for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bevatron.nn.rank_communication import Comm

IGNORE = -100  # the label of a token that counts for nothing
CHUNK_LOGITS = 2**24
SCALED = 2**22  # elements that are widened at once

# (x [n, h] of some tokens, weight, which tokens, whether a gradient is wanted) -> their sums, and
# the gradient of the first sum with respect to x @ weight.T, [n, V] in x's dtype, if it is wanted
Chunk = Callable[[Tensor, Tensor, slice, bool], tuple[Tensor, Tensor | None]]


def chunk_tokens(rows: int, comm: Comm, models: int = 1) -> int:
    """How many tokens a chunk has when the logits of so many models exist together. It follows from
    the largest share of an uneven vocabulary, so that all ranks have as many chunks."""
    return max(1, CHUNK_LOGITS // models // -(-rows // comm.size))


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, comm: Comm, softcap: float | None, rows: int
) -> Tensor:
    """Sum of -log p(label) over all labels that are not IGNORE, fp32 scalar.

    Args:
        hidden: [B, T, h]; under tensor parallelism its gradient is this rank's partial sum.
        weight: [V/size, h], this rank's rows of a vocabulary of `rows`.
        labels: [B, T] int64.
    """
    return cross_entropy_and_z(hidden, weight, labels, comm, softcap, rows, 0.0)[0]


def cross_entropy_and_z(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    comm: Comm,
    softcap: float | None,
    rows: int,
    z_loss: float,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """The sum of -log p(label) + z_loss * logsumexp(logits)^2, and its second term's share without
    a gradient, to report it apart (Chowdhery et al., arXiv 2204.02311, section 5). Arguments as of
    `cross_entropy_sum`; `compiled`: what is done with the logits is compiled, where no other rank
    takes part in it."""
    first, _ = comm.bounds(rows)
    flat, targets = hidden.flatten(0, 1), labels.flatten()
    compute = _compiled_cross_entropy() if compiled and comm.size == 1 else _cross_entropy

    def chunk(x: Tensor, w: Tensor, piece: slice, keep: bool) -> tuple[Tensor, Tensor | None]:
        loss, z, dlogits = compute(x, w, targets[piece], first, comm, softcap, z_loss, keep)
        return torch.stack((loss + z, z)), dlogits

    sums = sums_of_chunks(flat, weight, chunk_tokens(rows, comm), 2, chunk)
    return sums[0], sums[1].detach()


def log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    comm: Comm,
    softcap: float | None,
    rows: int,
    temperature: float = 1.0,
) -> Tensor:
    """log p(label) of every token, [B, T] fp32 (fp64 of fp64), and 0 where the label is IGNORE.

    It is the same on all ranks that share the vocabulary, and so must be what is computed from it:
    each token may get any gradient. Arguments as of `cross_entropy_sum`; `temperature`: what the
    logits are divided by."""
    return _log_probabilities(hidden, weight, labels, comm, softcap, rows, temperature, False)[0]


def log_probabilities_and_entropies(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    comm: Comm,
    softcap: float | None,
    rows: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The same, and the entropy [B, T] in nats of each token's distribution, without a gradient."""
    return _log_probabilities(hidden, weight, labels, comm, softcap, rows, temperature, True)


def _log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    comm: Comm,
    softcap: float | None,
    rows: int,
    temperature: float,
    entropies: bool,
) -> tuple[Tensor, Tensor]:
    first, _ = comm.bounds(rows)
    flat, targets = hidden.flatten(0, 1), labels.flatten()
    found, spread = _LogProbabilities.apply(  # type: ignore[no-untyped-call]
        flat,
        weight,
        targets,
        first,
        comm,
        softcap,
        chunk_tokens(rows, comm),  # the same pieces, so the same bits, with and without
        temperature,
        entropies,
    )
    return found.view(labels.shape), spread.view(labels.shape if entropies else (0,))


def sums_of_chunks(x: Tensor, weight: Tensor, tokens: int, entries: int, chunk: Chunk) -> Tensor:
    """What `chunk` gives, added up over chunks of `tokens` tokens: fp32 [entries].

    Only the first sum has a gradient, to x [N, h] and weight [V, h]."""
    keep = torch.is_grad_enabled()
    return _Sums.apply(x, weight, tokens, entries, chunk, keep)  # type: ignore[no-any-return, no-untyped-call]


def capped_logits(
    x: Tensor, weight: Tensor, cap: float | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """softcap(x @ weight.T) [n, V] in fp32 (fp64 of fp64); and its slope with respect to the
    product, if there is a cap and a gradient is wanted."""
    logits = _wide(x @ weight.T)
    if cap is None:
        return logits, None
    squashed = torch.tanh(logits / cap)
    slope = 1 - squashed.square() if keep else None
    return squashed.mul_(cap), slope


def _cool(logits: Tensor, temperature: float) -> None:
    """Divide by the temperature, in place."""
    if temperature != 1:
        logits /= temperature


class _Gradients:
    """Those of x [N, h] and weight [V, h], added up chunk by chunk; of what is frozen none.
    `wanted`: of which of the two."""

    def __init__(self, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> None:
        self.x, self.weight = x, weight
        self.dx = torch.empty_like(x) if wanted[0] else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.dweight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None

    def add(self, dlogits: Tensor, piece: slice) -> None:
        """`dlogits` [n, V], of the product x[piece] @ weight.T, in x's dtype."""
        if self.dx is not None:
            torch.mm(dlogits, self.weight, out=self.dx[piece])
        if self.dweight is None:
            return
        if self.dweight.dtype == self.x.dtype:
            self.dweight.addmm_(dlogits.T, self.x[piece])
        else:  # the product in x's dtype, the sum in fp32
            self.dweight += dlogits.T @ self.x[piece]

    def both(self) -> tuple[Tensor | None, Tensor | None]:
        dweight = self.dweight
        return self.dx, dweight.to(self.weight.dtype) if dweight is not None else None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, tokens: int, entries: int, chunk: Chunk, keep: bool
    ) -> Tensor:
        total = torch.zeros(entries, dtype=torch.float32, device=x.device)
        gradients = _Gradients(x, weight, ctx.needs_input_grad) if keep else None
        for piece in _pieces(len(x), tokens):
            sums, dlogits = chunk(x[piece], weight, piece, keep)
            total += sums
            if dlogits is not None and gradients is not None:
                gradients.add(dlogits, piece)
            del dlogits  # before the next chunk's
        if gradients is not None:
            ctx.save_for_backward(*gradients.both())
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dx, dweight = ctx.saved_tensors
        both = (scaled(d, grad[0]) if d is not None else None for d in (dx, dweight))
        return *both, *[None] * 4


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        first: int,
        comm: Comm,
        cap: float | None,
        tokens: int,
        temperature: float,
        entropies: bool,
    ) -> tuple[Tensor, Tensor]:
        found, normalisers, spread = [], [], []
        for piece in _pieces(len(x), tokens):
            logits, _ = capped_logits(x[piece], weight, cap, False)
            _cool(logits, temperature)
            chosen = _chosen(labels[piece], first, len(weight))
            kept = logits.clone() if entropies else None
            exponentials, denominator, target, highest = _normalised(logits, chosen, comm)
            relative = denominator.log()
            found.append((target - relative) * (labels[piece] != IGNORE))
            normalisers.append(relative + highest)
            if kept is not None:  # log sum - sum of p * logit, both relative to the highest
                weighted = kept.sub_(highest[:, None]).mul_(exponentials).sum(-1)
                spread.append(relative - comm.sum_(weighted) / denominator)
            del logits, kept, exponentials  # before the next chunk's
        ctx.save_for_backward(x, weight, labels, torch.cat(normalisers))
        ctx.first, ctx.cap, ctx.tokens, ctx.temperature = first, cap, tokens, temperature
        out, spreads = torch.cat(found), torch.cat(spread) if entropies else x.new_empty(0)
        ctx.mark_non_differentiable(spreads)
        return out, spreads

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        """No rank needs another one here: each has its columns of the probabilities."""
        x, weight, labels, normalisers = ctx.saved_tensors
        gradients = _Gradients(x, weight, ctx.needs_input_grad)
        factor = -grad * (labels != IGNORE)  # of probabilities - what was chosen
        if ctx.temperature != 1:
            factor = factor / ctx.temperature
        for piece in _pieces(len(x), ctx.tokens):
            logits, slope = capped_logits(x[piece], weight, ctx.cap, True)
            _cool(logits, ctx.temperature)
            probabilities = logits.sub_(normalisers[piece, None]).exp_()
            chosen = _chosen(labels[piece], ctx.first, len(weight))
            dlogits = _towards(probabilities, chosen, factor[piece], slope)
            gradients.add(dlogits.to(x.dtype), piece)
            del logits, slope, probabilities, dlogits  # before the next chunk's
        return *gradients.both(), *[None] * 7


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x [n, m] * factor (an fp32 scalar) in x's dtype. The factor itself is never rounded to that:
    1/count as bf16 is off by up to 0.2%, and so would the whole gradient be."""
    if x.dtype == factor.dtype:
        return x * factor
    out, rows = torch.empty_like(x), max(1, SCALED // max(1, x.shape[1]))
    for piece, into in zip(x.split(rows), out.split(rows), strict=True):
        into.copy_(piece.float() * factor)
    return out


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _pieces(count: int, tokens: int) -> list[slice]:
    return [slice(begin, begin + tokens) for begin in range(0, count, tokens)]


# Of labels: this rank's column of each, [n, 1] (0 where it is another rank's, or none), and whether
# it is this rank's, [n].
Chosen = tuple[Tensor, Tensor]


def _chosen(labels: Tensor, first: int, width: int) -> Chosen:
    mine = (labels != IGNORE) & (labels >= first) & (labels < first + width)
    return torch.where(mine, labels - first, 0)[:, None], mine


def _normalised(
    logits: Tensor, chosen: Chosen, comm: Comm
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over all ranks' logits: exp(logits - the highest) [n, V], which overwrites them; its sum [n];
    the chosen logit - the highest [n]; and the highest [n]."""
    column, mine = chosen
    highest = comm.max_(logits.amax(-1))
    logits -= highest[:, None]
    target = logits.gather(1, column)[:, 0] * mine
    exponentials = logits.exp_()
    denominator, target = comm.sum_(torch.stack((exponentials.sum(-1), target)))
    return exponentials, denominator, target, highest


def _towards(probabilities: Tensor, chosen: Chosen, factor: Tensor, slope: Tensor | None) -> Tensor:
    """(probabilities [n, V] - 1 at the chosen column) * factor [n], and through the softcap's
    slope: the gradient of -log p with respect to the product. Overwrites the probabilities."""
    column, mine = chosen
    probabilities.scatter_add_(1, column, -mine[:, None].to(probabilities.dtype))
    probabilities *= factor[:, None]
    return probabilities if slope is None else probabilities.mul_(slope)


@cache
def _compiled_cross_entropy() -> Any:
    return torch.compile(_cross_entropy, dynamic=False)


def _cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    first: int,
    comm: Comm,
    cap: float | None,
    z_loss: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss of one chunk, its z-loss, and the gradient of their sum with respect to the uncapped
    logits [n, V]."""
    logits, slope = capped_logits(x, weight, cap, keep)
    chosen, valid = _chosen(labels, first, len(weight)), labels != IGNORE
    probabilities, denominator, target, highest = _normalised(logits, chosen, comm)
    relative = denominator.log()
    loss = ((relative - target) * valid).sum()
    normaliser = relative + highest  # log sum exp of the capped logits
    z = (z_loss * normaliser.square() * valid).sum()
    if not keep:
        return loss, z, None
    probabilities.div_(denominator[:, None])
    if z_loss:
        probabilities *= (1 + 2 * z_loss * normaliser)[:, None]
    return loss, z, _towards(probabilities, chosen, valid, slope).to(x.dtype)
