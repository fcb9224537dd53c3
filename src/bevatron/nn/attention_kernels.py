"""How attention is computed from queries, keys and values: the one place that chooses.

- plain causal: torch's fused kernels; compiled on a CPU over short sequences, plain products, which
  the compiler fuses with the softmax between them
- a mask (for documents, or for a part of the queries under context parallelism) over short
  sequences: the same kernels with the mask, which is made once per forward for all layers
- a part of the queries on an accelerator: one fused causal call per run of consecutive positions
- in all other cases: tiles (`tiled_attention.py`), which need neither [T, S] scores nor a mask
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from bevatron.nn.rank_communication import Context, Run
from bevatron.nn.tiled_attention import blocks_of, tiled

# On a CPU, compiled products are faster than the fused kernel up to this length, in blocks of so
# many queries that see no keys behind the block.
PRODUCTS, BLOCK = 1024, 128
# Largest mask [B, T, S], in elements, that is made as a whole.
DENSE = {"cpu": 2**16}
DENSE_ON_ACCELERATORS = 2**27
# Where a fused call for a run of positions would make a mask of all its queries and keys.
NO_RUNS = {"cpu"}


@dataclass(frozen=True)
class Mask:
    """Which keys this rank's queries see: those of their own document, up to themselves.

    Attributes:
        runs: the queries' positions in the sequence.
        starts: [B, T] where the document of each query begins; None for one that is all.
        dense: [B or 1, 1, T, S], 0 and -inf, if it is to be used.
        blocks: if tiles are, see `tiles.blocks_of`.
        biases: if one call per run is: what tells it that its last query sees all of its keys. (A
            compiled layer takes such an object, but cannot make one.)
    """

    runs: tuple[Run, ...]
    starts: Tensor | None
    dense: Tensor | None = None
    blocks: Tensor | None = None
    biases: tuple[Tensor, ...] = ()


def make_mask(
    context: Context, x: Tensor, length: int, documents: Tensor | None = None
) -> Mask | None:
    """The mask of a forward over `length` tokens of this rank; None where it is plain causal.

    Args:
        x: hidden states, for dtype and device.
        documents: [B, T], see `Context.starts`.
    """
    if documents is None and context.size == 1:
        return None
    runs = context.runs(length)
    starts = None if documents is None else context.starts(documents)
    if starts is None and x.device.type not in NO_RUNS:
        biases = tuple(causal_lower_right(end - begin, end) for begin, end in runs)
        return Mask(runs, starts, biases=biases)
    elements = length * length * context.size * (1 if starts is None else len(starts))
    if elements > DENSE.get(x.device.type, DENSE_ON_ACCELERATORS):
        return Mask(runs, starts, blocks=blocks_of(runs, starts))
    keys = torch.arange(length * context.size, device=x.device)
    queries = torch.cat([keys[a:b] for a, b in runs])[:, None]  # [T, 1]
    seen = (keys <= queries)[None]  # [1, T, S]
    if starts is not None:
        seen = seen & (keys >= starts[..., None])  # [B, T, S]
    zeros = torch.zeros(seen.shape, dtype=x.dtype, device=x.device)
    return Mask(runs, starts, dense=zeros.masked_fill(~seen, float("-inf"))[:, None])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
    """Softmax attention [B, H, T, D] of q [B, H, T, D] to k, v [B, G, S, D]; S is T without a
    mask, and each query sees all up to itself."""
    if mask is None:
        return _causal(q, k, v)
    if mask.dense is not None:
        return F.scaled_dot_product_attention(q, k, v, mask.dense, enable_gqa=_grouped(q, k))
    if mask.blocks is not None:
        y: Tensor = tiled(q, k, v, mask.starts, mask.blocks)[0]
        return y
    return by_runs(q, k, v, mask)


def _grouped(q: Tensor, k: Tensor) -> bool:
    return q.shape[1] != k.shape[1]


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type == "cpu" and torch.compiler.is_compiling() and q.shape[2] <= PRODUCTS:
        return by_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=_grouped(q, k))


def by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of all queries to themselves, as products and softmax in fp32."""
    groups, scale = k.shape[1], q.shape[-1] ** -0.5
    parts = []
    for begin in range(0, q.shape[2], BLOCK):
        part = q[:, :, begin : begin + BLOCK].unflatten(1, (groups, -1))  # [B, G, q, block, D]
        end = begin + part.shape[3]
        keys, values = k[:, :, :end], v[:, :, :end]
        scores = (part.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, part.shape[2:4])
        query = torch.arange(begin, end, device=q.device)[:, None]
        seen = torch.arange(end, device=q.device) <= query
        scores = torch.where(seen, scores.float() * scale, float("-inf"))
        weights = scores.softmax(-1).to(v.dtype).flatten(2, 3)
        parts.append((weights @ values).unflatten(2, part.shape[2:4]).flatten(1, 2))
    return torch.cat(parts, dim=2)


def by_runs(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Causal attention of queries at `mask.runs`, one fused call each."""
    parts, at = [], 0
    for (begin, end), bias in zip(mask.runs, mask.biases, strict=True):
        new = end - begin
        part = q[:, :, at : at + new], k[:, :, :end], v[:, :, :end]
        parts.append(F.scaled_dot_product_attention(*part, bias, enable_gqa=_grouped(q, k)))
        at += new
    return torch.cat(parts, dim=2)
