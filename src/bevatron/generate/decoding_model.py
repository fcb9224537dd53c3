"""The decoder as the engine runs it: one rank's layers over the flat tokens of a `Step`.

What `bevatron.nn.Decoder` computes, for inference alone: N tokens of any sequences in one [N, h]
matrix, few operations per layer, keys and values in rows of a `SlotCache`. Shape legend as in `nn`;
under tensor parallelism H, G, f and V are this rank's share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bevatron.generate.decoding_weights import (
    AttentionWeights,
    LayerWeights,
    MLPWeights,
    ModelWeights,
)
from bevatron.generate.engine_ranks import Ranks
from bevatron.generate.engine_step import Output, Scores, Segment, Step
from bevatron.generate.kv_cache import SlotCache
from bevatron.generate.matrix_product import Matrix
from bevatron.generate.request import NoRoom
from bevatron.nn.mlp import activate
from bevatron.nn.norm import rms
from bevatron.nn.output_heads import softcap
from bevatron.nn.rope import inverse_frequencies
from bevatron.spec import ModelSpec

SCORED = 128  # positions whose logits over the whole vocabulary are held at a time

Pair = tuple[Tensor, Tensor]


def is_want_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device. (torch has no class for it on CPUs.)"""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error) if isinstance(error, RuntimeError) else ""
    return "DefaultCPUAllocator" in said or said.startswith("could not create a ")  # oneDNN


class Rotations:
    """cos and sin of positions, [N, 1, 1, R] each, for the rotation x * cos + swapped(x) * sin."""

    def __init__(
        self, spec: ModelSpec, head_dims: set[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rope, self.dtype, self.device = spec.rope, dtype, device
        self.head_dims, self.held = head_dims, 0
        self.tables: dict[int, Pair] = {}

    def at(self, positions: Tensor, lengths: list[int], capacity: int) -> dict[int, Pair]:
        """By head_dim. `lengths`: of the sequence that each token belongs to, so far."""
        if self.rope.kind == "dynamic":
            longest = torch.tensor(lengths, device=self.device)[:, None]
            return {d: self._make(d, positions, longest) for d in self.head_dims}
        if capacity > self.held:
            everything = torch.arange(capacity, device=self.device)
            self.tables = {d: self._make(d, everything, 0) for d in self.head_dims}
            self.held = capacity
        return {d: (cos[positions], sin[positions]) for d, (cos, sin) in self.tables.items()}

    def _make(self, head_dim: int, positions: Tensor, length: Tensor | int) -> Pair:
        inverse = inverse_frequencies(self.rope, head_dim, length, self.device)
        angles = positions.float()[:, None] * inverse  # [N, R/2]
        cos, sin = angles.cos(), angles.sin()
        if self.rope.attention_factor is not None:
            cos, sin = cos * self.rope.attention_factor, sin * self.rope.attention_factor
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return cos[:, None, None].to(self.dtype), sin[:, None, None].to(self.dtype)


@dataclass
class _Place:
    """Where the tokens of a step lie: made once, used by every layer.

    Attributes:
        rotations: by head_dim.
        rows, positions: of the tokens that are decoded, as tensors where there are several.
        held: positions that any of them sees; mask [n, 1, 1, held] where they differ.
        masks: by segment, which positions [T, S] its tokens see; None for a plain causal one.
    """

    step: Step
    rotations: dict[int, Pair]
    rows: Tensor
    positions: Tensor
    held: int
    mask: Tensor | None
    masks: list[Tensor | None]


class Model:
    """One rank's part of a model."""

    def __init__(
        self, spec: ModelSpec, weights: ModelWeights, ranks: Ranks, device: torch.device
    ) -> None:
        self.spec, self.ranks, self.device = spec, ranks, device
        self.weights, self.dtype = weights, weights.dtype
        shapes = {
            i: (a.groups, a.head_dim)
            for i, layer in weights.layers.items()
            if (a := layer.attention) is not None
        }
        self.cache = SlotCache(shapes, self.dtype, device)
        self.sizes = (0, 0)  # of the cache, on all ranks
        self.rotations = Rotations(spec, {d for _, d in shapes.values()}, self.dtype, device)

    @torch.inference_mode()
    def run(self, step: Step) -> Output | None:
        """The logits and scores of a step, on rank 0. All ranks call it together.

        Raises NoRoom, on all ranks, if the cache cannot be as large as the step needs it; what it
        held is held, and the swaps are made."""
        for a, b, length in step.swaps:
            self.cache.swap(a, b, length)
        if (step.rows, step.capacity) != self.sizes:
            self._resize(step)
        place = self._place(step)
        if self.weights.embed is not None:
            x = self._embed(step)
        else:
            x = self.ranks.receive((step.size, self.spec.hidden_size), self.dtype, self.device)
        for index, layer in self.weights.layers.items():
            x = self._layer(x, index, layer, place)
        if self.weights.head is None:
            self.ranks.send(x)
        return self.ranks.to_first(self._output(x, step), step, self.spec.vocab_size, self.device)

    def _resize(self, step: Step) -> None:
        self.sizes, fits = (0, 0), True
        try:
            self.cache.resize(step.rows, step.capacity)
        except Exception as error:
            if not is_want_of_memory(error):
                raise
            fits = False
        if not self.ranks.all_of(fits):
            positions = f"{step.rows} x {step.capacity} positions"
            raise NoRoom(f"there is no memory for a cache of {positions}")
        self.sizes = (step.rows, step.capacity)

    # --- before the layers

    def _embed(self, step: Step) -> Tensor:
        ids = list(step.tokens)
        for segment in step.prefill:
            ids += segment.tokens
        tokens = torch.tensor(ids, device=self.device)
        embed = self.weights.embed
        assert embed is not None
        if self.ranks.tp == 1:
            x = F.embedding(tokens, embed)
        else:
            first, last = self.ranks.bounds(self.spec.vocab_size)
            mine = (tokens >= first) & (tokens < last)
            x = F.embedding(torch.where(mine, tokens - first, 0), embed) * mine[:, None]
            x = self.ranks.sum_(x)
        x = x.to(self.dtype)  # [N, h]
        return rms(x, self.spec.norm.eps) if self.spec.embedding_norm else x

    def _place(self, step: Step) -> _Place:
        positions = list(step.positions)
        lengths = [p + 1 for p in positions]
        for s in step.prefill:
            these = range(s.start, s.start + len(s.tokens))
            positions += these
            lengths += [
                max(s.length, p + 1) for p in these
            ]  # an answer's own tokens, a second time
        at = torch.tensor(positions, device=self.device)
        n = len(step.tokens)
        held, mask = max(lengths[:n], default=0), None
        own = at[:n]
        if n > 1 and min(lengths[:n]) < held:
            hidden = torch.arange(held, device=self.device) > own[:, None]
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
            mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]  # [n, 1, 1, held]
        rotations = self.rotations.at(at, lengths, self.cache.capacity)
        rows = torch.arange(n, device=self.device)
        return _Place(step, rotations, rows, own, held, mask, [self._mask(s) for s in step.prefill])

    def _mask(self, segment: Segment) -> Tensor | None:
        """A piece of a prompt: each token sees what came before it."""
        new, end = len(segment.tokens), segment.start + len(segment.tokens)
        if segment.start == 0 or new == 1:
            return None
        return torch.ones(new, end, dtype=torch.bool, device=self.device).tril(segment.start)

    # --- the layers

    def _layer(self, x: Tensor, index: int, layer: LayerWeights, place: _Place) -> Tensor:
        """x [N, h], which is changed in place."""
        if layer.attention is not None:
            x.add_(self._attention(layer.attention_norm(x), index, layer.attention, place))
        elif layer.attention_linear is not None:
            x.add_(self._linear(layer.attention_norm(x), layer.attention_linear))
        if layer.mlp is not None:
            x.add_(self._mlp(layer.mlp_norm(x), layer.mlp))
        elif layer.mlp_linear is not None:
            x.add_(self._linear(layer.mlp_norm(x), layer.mlp_linear))
        return x

    def _linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        if self.ranks.tp > 1:
            first, last = self.ranks.bounds(self.spec.hidden_size)
            x = x[:, first:last].contiguous()
        return self.ranks.sum_(matrix(x))

    def _mlp(self, x: Tensor, mlp: MLPWeights) -> Tensor:
        y = mlp.up(x)
        if mlp.up_bias is not None:
            y += mlp.up_bias
        if mlp.gated:
            gate, up = y.chunk(2, dim=-1)  # [N, f] each
            y = activate(gate, mlp.activation).mul_(up)
        else:
            y = activate(y, mlp.activation)
        y = self.ranks.sum_(mlp.down(y))  # [N, h]
        return y if mlp.down_bias is None else y + mlp.down_bias

    def _attention(self, x: Tensor, index: int, a: AttentionWeights, place: _Place) -> Tensor:
        rows = a.qkv(x)
        if a.qkv_bias is not None:
            rows += a.qkv_bias
        heads = rows.view(len(x), a.groups, a.queries + 2, a.head_dim)  # [N, G, q+2, D]
        cos, sin = place.rotations[a.head_dim]
        turned = heads[:, :, : a.queries + 1, : cos.shape[-1]]  # queries and key
        left, right = turned.chunk(2, dim=-1)
        swapped = torch.cat((right, left), dim=-1)
        turned.mul_(cos).add_(swapped.mul_(sin))  # rounded as often as transformers does
        if a.qk_norm:
            both = heads[:, :, : a.queries + 1]
            both.copy_(rms(both, self.spec.norm.eps))
        kv, q, n = self.cache.layers[index], a.queries, len(place.step.tokens)
        parts = []
        if n:
            parts.append(_decode(heads[:n], kv, q, place))
        at = n
        for segment, mask in zip(place.step.prefill, place.masks, strict=True):
            end = at + len(segment.tokens)
            parts.append(_prefill(heads[at:end], kv, q, segment, mask))
            at = end
        y = parts[0] if len(parts) == 1 else torch.cat(parts)  # [N, H*D]
        y = self.ranks.sum_(a.o(y))  # [N, h]
        return y if a.o_bias is None else y + a.o_bias

    # --- after the layers

    def _output(self, x: Tensor, step: Step) -> Output | None:
        """On the last stage, on the first of its tensor-parallel ranks."""
        weights = self.weights
        if weights.head is None or weights.final_norm is None:
            return None
        wanted = step.wanted
        chosen = x if len(wanted) == len(x) else x[torch.tensor(wanted, device=x.device).long()]
        logits = self._logits(chosen)
        scores, at = [], len(step.tokens)
        for segment in step.prefill:
            if segment.targets:
                scores += self._score(x[at : at + len(segment.targets)], segment)
            at += len(segment.tokens)
        return Output(logits, scores) if self.ranks.tp_rank == 0 else None

    def _logits(self, x: Tensor) -> Tensor:
        """[N, h] -> fp32 [N, V], whole on the first tensor-parallel rank."""
        if not len(x):
            return torch.empty(0, self.spec.vocab_size, device=self.device)
        assert self.weights.head is not None and self.weights.final_norm is not None
        logits = softcap(self.weights.head(self.weights.final_norm(x)), self.spec.logit_softcap)
        return self.ranks.gather(logits.float(), self.spec.vocab_size)

    def _score(self, x: Tensor, segment: Segment) -> list[Scores]:
        """One; none on the tensor-parallel ranks that have not all logits."""
        targets = torch.tensor(segment.targets, device=self.device)
        parts = []
        for begin in range(0, len(targets), SCORED):
            logits = self._logits(x[begin : begin + SCORED])
            if self.ranks.tp_rank == 0:
                parts.append(score(logits, targets[begin : begin + SCORED], segment.top))
        return [Scores(*(torch.cat(t) for t in zip(*parts, strict=True)))] if parts else []


def score(logits: Tensor, targets: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Scores`, of logits [n, V] and the tokens [n] that came."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(top, logits.shape[-1]))
    own = logprobs.gather(1, targets[:, None])[:, 0]
    return own, logits.argmax(-1) == targets, best.indices, best.values


def _decode(heads: Tensor, kv: Tensor, q: int, place: _Place) -> Tensor:
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
