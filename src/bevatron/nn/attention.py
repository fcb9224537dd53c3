"""Causal self-attention on fused QKV weights.

Rows of the QKV matrix lie by KV group: [group][q query heads, key, value][D]. A tensor-parallel
rank that owns whole groups multiplies with its rows as they are. Where the ranks do not divide the
groups, the matrix is stored cut along h, gathered for use, and each rank takes the rows of its own
query heads and of the groups that those need.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bevatron.nn.attention_kernels import Mask, attend
from bevatron.nn.linear_map import LinearMap
from bevatron.nn.norm import rms
from bevatron.nn.rank_communication import Comm
from bevatron.nn.rope import Rotations, rotate
from bevatron.spec import Attention as AttentionSpec
from bevatron.spec import ModelSpec


class Attention(nn.Module):
    """`tap`, if set, is called with what the output projection multiplies, [B, T, H*D]."""

    tap: Callable[[Tensor], None] | None = None

    def __init__(self, spec: AttentionSpec, model: ModelSpec, comm: Comm) -> None:
        super().__init__()
        self.spec, self.comm, self.eps = spec, comm, model.norm.eps
        hidden_size = model.hidden_size
        rows, width = spec.qkv_rows, spec.num_attention_heads * spec.head_dim
        self.qkv = LinearMap(rows, hidden_size, bias=(rows,) if spec.qkv_bias else None)
        self.o = LinearMap(hidden_size, width, bias=(hidden_size,) if spec.o_bias else None)

    @property
    def groups_are_cut(self) -> bool:
        """Whether the ranks do not divide the KV groups (see above)."""
        return self.spec.num_key_value_heads % self.comm.size != 0

    def forward(self, x: Tensor, rotations: Rotations, mask: Mask | None = None) -> Tensor:
        rope = rotations[self.spec.head_dim]
        x = self.comm.enter(x)  # [B, T, h]
        q, k, v = self._cut(x) if self.groups_are_cut else self._grouped(x)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if self.spec.qk_norm:
            q, k = rms(q, self.eps), rms(k, self.eps)
        k, v = self.comm.context.gather(k, v)  # [B, G, S, D]
        if self.groups_are_cut:
            groups = self._group_of_head(x.device)
            k, v = k[:, groups], v[:, groups]  # [B, H, S, D]
        y = attend(q, k, v, mask)  # [B, H, T, D]
        y = y.transpose(1, 2).flatten(2)  # [B, T, H*D]
        if self.tap is not None:
            self.tap(y)
        return self.o.reduced(y, self.comm)  # [B, T, h]

    def _grouped(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, H, T, D], key and value [B, G, T, D] of this rank's whole groups."""
        comm, spec = self.comm, self.spec
        rows = self.qkv.product(x, comm.view)  # [B, T, G*(q+2)*D]
        q, groups = spec.queries_per_group, spec.num_key_value_heads // comm.size
        heads = rows.unflatten(-1, (groups, q + 2, spec.head_dim)).permute(0, 2, 3, 1, 4)
        return heads[:, :, :q].flatten(1, 2), heads[:, :, q], heads[:, :, q + 1]

    def _cut(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query of this rank's heads, key and value of the groups that they need."""
        comm, spec = self.comm, self.spec
        q, first, last = spec.queries_per_group, *comm.bounds(spec.num_attention_heads)
        groups = slice(first // q, -(-last // q))

        def mine(tensor: Tensor) -> Tensor:
            t = tensor.unflatten(0, (-1, q + 2, spec.head_dim))  # [G, q+2, D, ...]
            query = t[:, :q].flatten(0, 1)[first:last]
            return torch.cat((query, t[groups, q], t[groups, q + 1])).flatten(0, 1)

        rows = self.qkv.product(x, comm.whole, mine)
        heads = rows.unflatten(-1, (-1, spec.head_dim)).transpose(1, 2)  # [B, H + 2G, T, D]
        n = last - first
        m = (heads.shape[1] - n) // 2
        return heads[:, :n], heads[:, n : n + m], heads[:, n + m :]

    def _group_of_head(self, device: torch.device) -> Tensor:
        """For each query head of this rank, which of its key/value heads it reads."""
        first, last = self.comm.bounds(self.spec.num_attention_heads)
        group = torch.arange(first, last, device=device) // self.spec.queries_per_group
        return group - first // self.spec.queries_per_group
