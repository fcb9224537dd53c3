"""A loss on an output matrix's logits, computed in chunks of tokens that never coexist.

One pass over the chunks computes the loss and both gradients; the backward only scales (the idea of
Wijmans et al., arXiv 2411.09009).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 2**24
SCALED = 2**22  # elements that are widened at once

# (x [n, h] of some tokens, weight, which tokens, whether a gradient is wanted) -> their sums, and
# the gradient of the first sum with respect to x @ weight.T, [n, V] in x's dtype, if it is wanted
Chunk = Callable[[Tensor, Tensor, slice, bool], tuple[Tensor, Tensor | None]]


def sums_of_chunks(x: Tensor, weight: Tensor, tokens: int, entries: int, chunk: Chunk) -> Tensor:
    """What `chunk` gives, added up over chunks of `tokens` tokens: fp32 [entries].

    Only the first sum has a gradient, to x [N, h] and weight [V, h]."""
    keep = torch.is_grad_enabled()
    return _Chunks.apply(x, weight, tokens, entries, chunk, keep)  # type: ignore[no-any-return, no-untyped-call]


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, tokens: int, entries: int, chunk: Chunk, keep: bool
    ) -> Tensor:
        total = torch.zeros(entries, dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if keep else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if keep else None
        for begin in range(0, len(x), tokens):
            piece = slice(begin, begin + tokens)
            sums, dlogits = chunk(x[piece], weight, piece, keep)
            total += sums
            if dlogits is not None and dx is not None and dweight is not None:
                torch.mm(dlogits, weight, out=dx[piece])
                if dweight.dtype == x.dtype:
                    dweight.addmm_(dlogits.T, x[piece])
                else:  # the product in x's dtype, the sum in fp32
                    dweight += dlogits.T @ x[piece]
            del dlogits  # before the next chunk's
        if dx is not None and dweight is not None:
            ctx.save_for_backward(dx, dweight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dx, dweight = ctx.saved_tensors
        return scaled(dx, grad[0]), scaled(dweight, grad[0]), *[None] * 4


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x [n, m] * factor (an fp32 scalar) in x's dtype. The factor itself is never rounded to that:
    1/count as bf16 is off by up to 0.2%, and so would the whole gradient be."""
    if x.dtype == factor.dtype:
        return x * factor
    out, rows = torch.empty_like(x), max(1, SCALED // max(1, x.shape[1]))
    for piece, into in zip(x.split(rows), out.split(rows), strict=True):
        into.copy_(piece.float() * factor)
    return out
