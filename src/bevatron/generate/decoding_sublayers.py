"""How the engine computes each kind of sublayer, over the flat tokens of a `Step`.

DECODINGS maps each kind of sublayer to its class, which is made from a reader of its weights. The
shape legend is that of `nn`, with N tokens of a step; under tensor parallelism H, G and f are this
rank's share.

Tensor parallelism cuts weights as training does (`ModelSpec.cut`). If the ranks do not divide the
KV groups, each rank reads the rows of its own query heads and, beside every one of them, the rows
of the key and value that this head needs, so that each head is a group of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bevatron.generate.engine_ranks import Ranks
from bevatron.generate.engine_step import Segment, Step
from bevatron.generate.matrix_product import Matrix
from bevatron.nn.mlp import between
from bevatron.nn.norm import rms
from bevatron.nn.rope import rotate_
from bevatron.spec import MLP, Attention, Linear, ModelSpec, ParameterSpec

Pair = tuple[Tensor, Tensor]


@dataclass
class Place:
    """Where the tokens of a step lie: made once, used by every layer.

    Attributes:
        ranks: that share the layers.
        caches: by layer, [rows, G, 2, capacity, D]; see `SlotCache`.
        rotations: by head_dim, [N, 1, 1, R] each; see `nn.rope.rotate_`.
        rows, positions: of the tokens that are decoded, as tensors where there are several.
        held: positions that any of them sees; mask [n, 1, 1, held] where they differ.
        masks: by segment, which positions [T, S] its tokens see; None for a plain causal one.
    """

    step: Step
    ranks: Ranks
    caches: Mapping[int, Tensor]
    rotations: Mapping[int, Pair]
    rows: Tensor
    positions: Tensor
    held: int
    mask: Tensor | None
    masks: list[Tensor | None]


class Reads(Protocol):
    """What reads a rank's weights, `decoding_weights.Reader`, as far as a sublayer needs it."""

    spec: ModelSpec
    share: Any  # a `decoding_weights.Share`
    parameters: dict[str, ParameterSpec]

    def box(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor: ...

    def matrix(self, name: str, weight: Tensor | None = None) -> Matrix: ...

    def bias(self, name: str) -> Tensor | None: ...


class Decoding(Protocol):
    """A sublayer of one rank."""

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        """What its norm gives [N, h] -> what is added to the residual stream [N, h]."""


class DecodeLinear:
    """One matrix, shared by its columns."""

    def __init__(self, spec: Linear, index: int, part: str, reader: Reads) -> None:
        self.whole = reader.share.tp == 1
        self.bounds = reader.share.bounds(reader.spec.hidden_size)
        self.matrix = reader.matrix(f"layers.{index}.{part}.linear.weight")

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        if not self.whole:
            first, last = self.bounds
            x = x[:, first:last].contiguous()
        return place.ranks.sum_(self.matrix(x))


class DecodeMLP:
    """`up` has the gate's rows first if there is one."""

    def __init__(self, spec: MLP, index: int, part: str, reader: Reads) -> None:
        prefix = f"layers.{index}.{part}"
        up = f"{prefix}.{'gate_up' if spec.gated else 'up'}"
        self.spec = spec
        self.up, self.up_bias = reader.matrix(f"{up}.weight"), reader.bias(f"{up}.bias")
        self.down = reader.matrix(f"{prefix}.down.weight")
        self.down_bias = reader.bias(f"{prefix}.down.bias")

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        y = self.up(x)  # [N, 2f], or [N, f]
        if self.up_bias is not None:
            y += self.up_bias
        y = place.ranks.sum_(self.down(between(y, self.spec)))  # [N, h]
        return y if self.down_bias is None else y + self.down_bias


class DecodeAttention:
    """Rows of qkv: [groups][queries.., key, value][head_dim], of this rank."""

    def __init__(self, spec: Attention, index: int, part: str, reader: Reads) -> None:
        prefix, share = f"layers.{index}.{part}", reader.share
        self.spec, self.index, self.eps = spec, index, reader.spec.norm.eps
        self.groups, self.queries = spec.groups_at(share.tp)
        name, bias = f"{prefix}.qkv.weight", f"{prefix}.qkv.bias"
        if spec.num_key_value_heads % share.tp == 0:
            self.qkv, self.qkv_bias = reader.matrix(name), reader.bias(bias)
        else:
            heads = range(*share.bounds(spec.num_attention_heads))
            self.qkv = reader.matrix(name, _rows_of(heads, name, spec, reader))
            self.qkv_bias = _rows_of(heads, bias, spec, reader) if spec.qkv_bias else None
        self.o, self.o_bias = reader.matrix(f"{prefix}.o.weight"), reader.bias(f"{prefix}.o.bias")

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        rows, q = self.qkv(x), self.queries
        if self.qkv_bias is not None:
            rows += self.qkv_bias
        heads = rows.view(len(x), self.groups, q + 2, self.spec.head_dim)  # [N, G, q+2, D]
        turned = heads[:, :, : q + 1]  # queries and key
        rotate_(turned, *place.rotations[self.spec.head_dim])
        if self.spec.qk_norm:
            turned.copy_(rms(turned, self.eps))
        kv, n = place.caches[self.index], len(place.step.tokens)
        parts = []
        if n:
            parts.append(_decode(heads[:n], kv, q, place))
        at = n
        for segment, mask in zip(place.step.prefill, place.masks, strict=True):
            end = at + len(segment.tokens)
            parts.append(_prefill(heads[at:end], kv, q, segment, mask))
            at = end
        y = parts[0] if len(parts) == 1 else torch.cat(parts)  # [N, H*D]
        y = place.ranks.sum_(self.o(y))  # [N, h]
        return y if self.o_bias is None else y + self.o_bias


# What decodes a sublayer, by its kind. Made of the sublayer's spec, its layer's number, which part
# of the layer it is, and the reader of its weights: in the order in which the spec lists them.
DECODINGS: dict[str, Callable[[Any, int, str, Reads], Decoding]] = {
    "attention": DecodeAttention,
    "mlp": DecodeMLP,
    "linear": DecodeLinear,
}


def _rows_of(heads: range, name: str, spec: Attention, reader: Reads) -> Tensor:
    """Rows of these query heads, each followed by those of its key and value."""
    q, d, tail = spec.queries_per_group, spec.head_dim, reader.parameters[name].shape[1:]

    def rows(at: int) -> Tensor:
        return reader.box(name, (at * d, *[0] * len(tail)), (d, *tail))

    parts = []
    for head in heads:
        group = head // q * (q + 2)
        parts += [rows(group + head % q), rows(group + q), rows(group + q + 1)]
    return torch.cat(parts)


def _decode(heads: Tensor, kv: Tensor, q: int, place: Place) -> Tensor:
    """One new token each of the sequences in the first rows: heads [n, G, q+2, D] -> [n, H*D]."""
    n = len(heads)
    if n == 1:
        kv[0, :, :, place.held - 1] = heads[0, :, q:]
    else:
        kv[place.rows, :, :, place.positions] = heads[:, :, q:]
    keys, values = kv[:n, :, 0, : place.held], kv[:n, :, 1, : place.held]  # [n, G, S, D]
    # A group's queries take the place of T: they see the same keys.
    y = F.scaled_dot_product_attention(heads[:, :, :q], keys, values, place.mask)
    return y.flatten(1)  # [n, G*q*D]


def _prefill(heads: Tensor, kv: Tensor, q: int, segment: Segment, mask: Tensor | None) -> Tensor:
    """Tokens of one prompt: heads [T, G, q+2, D] -> [T, H*D]."""
    new = len(heads)
    end = segment.start + new
    held = kv[segment.row]  # [G, 2, capacity, D]
    held[:, :, segment.start : end] = heads[:, :, q:].permute(1, 2, 0, 3)
    keys, values = held[None, :, 0, :end], held[None, :, 1, :end]  # [1, G, S, D]
    queries = heads[:, :, :q].permute(1, 2, 0, 3).flatten(0, 1)[None]  # [1, H, T, D]
    y = F.scaled_dot_product_attention(
        queries, keys, values, mask, is_causal=mask is None and new > 1, enable_gqa=q > 1
    )
    return y[0].transpose(0, 1).flatten(1)
