"""Attention in tiles of queries and keys, with an online softmax and a backward, in plain torch.

The algorithm is that of FlashAttention-2 (Dao, arXiv 2307.08691). Memory beyond inputs and outputs
does not depend on the sequence length, masked tiles are not computed, and the queries may be any
rank's part of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bevatron.nn.rank_communication import Run

# A tile: queries at the most, keys at the least, scores over all heads if that gives more keys.
# (64 queries: more are a little faster without documents, and much slower with short ones.)
QUERIES, KEYS, SCORES = 64, 128, 2**19

_ALL = 2**31  # rows, however many there are
_HIDDEN = -1e30  # finite, so that a tile in which a query sees nothing gives no NaN


def blocks_of(runs: tuple[Run, ...], starts: Tensor | None) -> Tensor:
    """Which queries are computed together, [n, 7] on the CPU: rows [from, to) of the batch, queries
    [from, to), the position of the first one, the first key that any of them sees, and the first
    one that is of all their documents."""
    rows = [(0, _ALL)] if starts is None else [(i, i + 1) for i in range(len(starts))]
    blocks, at = [], 0
    for begin, end in runs:
        for p in range(begin, end, QUERIES):
            n = min(QUERIES, end - p)
            blocks += [(*row, at, at + n, p, 0, 0) for row in rows]
            at += n
    table = torch.tensor(blocks)
    if starts is not None:
        where = table[:, [0, 0]], table[:, [2, 3]] - torch.tensor([0, 1])
        table[:, 5:] = starts[where].cpu()
    return table


@dataclass(frozen=True)
class _Block:
    """Some queries of some rows of the batch, as [rows * G, q * queries, ...]."""

    rows: slice
    queries: slice
    position: int
    first_key: int
    common_key: int

    def take(self, x: Tensor, groups: int) -> Tensor:
        """[B, H, T, ...] -> [rows * G, q * queries, ...], fp32."""
        part: Tensor = x[self.rows, :, self.queries].float().unflatten(1, (groups, -1))
        return part.flatten(2, 3).flatten(0, 1)

    def put(self, x: Tensor, values: Tensor) -> None:
        """The inverse of `take`, into x [B, H, T, ...]."""
        part = x[self.rows, :, self.queries]
        part.copy_(values.view(part.shape))

    def tiles(self, keys_at_once: int) -> Iterator[slice]:
        """The keys that are not hidden from all of these queries."""
        end = self.position + self.queries.stop - self.queries.start
        for begin in range(self.first_key, end, keys_at_once):
            yield slice(begin, min(end, begin + keys_at_once))

    def scores(self, q: Tensor, k: Tensor, keys: slice, starts: Tensor | None) -> Tensor:
        """q [N, q * queries, D] and k [N, S, D] -> masked scores [N, q * queries, keys]."""
        scores = torch.bmm(q, k[:, keys].float().transpose(1, 2))
        in_one_document = keys.start >= self.common_key
        if in_one_document and keys.stop <= self.position + 1:
            return scores
        n = self.queries.stop - self.queries.start
        key = torch.arange(keys.start, keys.stop, device=q.device)
        hidden = key > torch.arange(self.position, self.position + n, device=q.device)[:, None]
        if starts is not None and not in_one_document:
            hidden |= key < starts[self.rows, self.queries, None][0]
        scores.unflatten(1, (-1, n)).masked_fill_(hidden, _HIDDEN)
        return scores


def _each(blocks: Tensor) -> Iterator[_Block]:
    for row, to_row, begin, end, position, first, common in blocks.tolist():
        yield _Block(slice(row, to_row), slice(begin, end), position, first, common)


def _keys_at_once(q: Tensor, starts: Tensor | None) -> int:
    """How many keys a tile takes."""
    rows = len(q) if starts is None else 1
    return max(KEYS, SCORES // (rows * q.shape[1] * QUERIES))


@torch.library.custom_op("bevatron::tiled_attention", mutates_args=())
def tiled(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, blocks: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention in tiles, computed in fp32: [B, H, T, D] in q's dtype, log of the sums [B, H, T].

    An operator, so that a compiled layer need not look into its loops."""
    groups, scale, step = k.shape[1], q.shape[-1] ** -0.5, _keys_at_once(q, starts)
    k, v = k.contiguous(), v.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    log = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    for block in _each(blocks):
        part = block.take(q, groups) * scale  # [N, M, D]
        keys, values = k[block.rows].flatten(0, 1), v[block.rows].flatten(0, 1)  # [N, S, D]
        top = part.new_full((*part.shape[:2], 1), _HIDDEN)
        total, y = torch.zeros_like(top), torch.zeros_like(part)
        for at in block.tiles(step):
            scores = block.scores(part, keys, at, starts)
            highest = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights = scores.sub_(highest).exp_()
            shrink = (top - highest).exp_()
            total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
            y.mul_(shrink).baddbmm_(weights, values[:, at].float())
            top = highest
        block.put(out, y.div_(total))
        block.put(log, top.add_(total.log_()).squeeze(-1))
    return out, log


@torch.library.custom_op("bevatron::tiled_attention_backward", mutates_args=())
def _tiled_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log: Tensor,
    starts: Tensor | None,
    blocks: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    groups, scale, step = k.shape[1], q.shape[-1] ** -0.5, _keys_at_once(q, starts)
    k, v = k.contiguous(), v.contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=torch.float32, device=q.device)
    dv = torch.zeros_like(dk)
    for block in _each(blocks):
        part, dpart = block.take(q, groups) * scale, block.take(dy, groups)  # [N, M, D]
        offset = block.take(log[..., None], groups)  # [N, M, 1]
        share = (block.take(out, groups) * dpart).sum(-1, keepdim=True)
        keys, values = k[block.rows].flatten(0, 1), v[block.rows].flatten(0, 1)  # [N, S, D]
        dkeys, dvalues = dk[block.rows].flatten(0, 1), dv[block.rows].flatten(0, 1)
        dqueries = torch.zeros_like(part)
        for at in block.tiles(step):
            weights = block.scores(part, keys, at, starts).sub_(offset).exp_()
            dvalues[:, at].baddbmm_(weights.transpose(1, 2), dpart)
            dscores = torch.bmm(dpart, values[:, at].float().transpose(1, 2))
            dscores.sub_(share).mul_(weights)
            dqueries.baddbmm_(dscores, keys[:, at].float())
            dkeys[:, at].baddbmm_(dscores.transpose(1, 2), part)
        block.put(dq, dqueries.mul_(scale))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@tiled.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, blocks: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(
        q.shape[:3], dtype=torch.float32
    )


@_tiled_backward.register_fake
def _(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log: Tensor,
    starts: Tensor | None,
    blocks: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(k.shape, dtype=k.dtype, device=q.device),
        torch.empty(v.shape, dtype=v.dtype, device=q.device),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, blocks = inputs
    ctx.save_for_backward(q, k, v, *output, starts, blocks)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_tiled_backward(dy, *ctx.saved_tensors), None, None)


tiled.register_autograd(_backward, setup_context=_keep)
