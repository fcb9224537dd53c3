"""The decoder as the engine runs it: one rank's layers over the flat tokens of a `Step`.

It computes what `bevatron.nn.Decoder` computes, for inference alone: N tokens of any sequences in
one [N, h] matrix, with few operations per layer, and keys and values in rows of a `SlotCache`. The
shape legend is that of `nn`; under tensor parallelism H, G, f and V are this rank's share.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bevatron.generate.decoding_sublayers import Pair, Place
from bevatron.generate.decoding_weights import ModelWeights
from bevatron.generate.engine_ranks import Ranks
from bevatron.generate.engine_step import Output, Scores, Segment, Step
from bevatron.generate.kv_cache import SlotCache
from bevatron.generate.request import NoRoom
from bevatron.nn.norm import rms
from bevatron.nn.output_heads import softcap
from bevatron.nn.rope import cos_and_sin, for_rotate_
from bevatron.spec import ModelSpec

SCORED = 128  # positions whose logits over the whole vocabulary are held at a time


def is_want_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device. (torch has no class for it on CPUs.)"""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error) if isinstance(error, RuntimeError) else ""
    return "DefaultCPUAllocator" in said or said.startswith("could not create a ")  # oneDNN


class Rotations:
    """cos and sin of positions, [N, 1, 1, R] each, as `nn.rope.rotate_` takes them."""

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
        both = cos_and_sin(self.rope, head_dim, positions, length)  # [N, R/2] each
        cos, sin = for_rotate_(*both)
        return cos[:, None, None].to(self.dtype), sin[:, None, None].to(self.dtype)


class Model:
    """One rank's part of a model."""

    def __init__(
        self, spec: ModelSpec, weights: ModelWeights, ranks: Ranks, device: torch.device
    ) -> None:
        self.spec, self.ranks, self.device = spec, ranks, device
        self.weights, self.dtype = weights, weights.dtype
        found = [(i, s) for i in weights.layers for _, s in spec.layers[i].present]
        shapes = {i: shape for i, s in found if (shape := s.cache(ranks.tp))}
        self.cache = SlotCache(shapes, self.dtype, device)
        self.sizes = (0, 0)  # of the cache, on all ranks
        head_dims = {s.rotated for _, s in found if s.rotated is not None}
        self.rotations = Rotations(spec, head_dims, self.dtype, device)

    @torch.inference_mode()
    def run(self, step: Step) -> Output | None:
        """The logits and scores of a step, on rank 0. All ranks call it together.

        Raises NoRoom, on all ranks, if the cache cannot be as large as the step needs it; what it
        held is held, and the moves are made."""
        for move in step.moves:
            (self.cache.copy if move.copy else self.cache.swap)(*move[:3])
        if (step.rows, step.capacity) != self.sizes:
            self._resize(step)
        place = self._place(step)
        if self.weights.embed is not None:
            x = self._embed(step)
        else:
            x = self.ranks.receive((step.size, self.spec.hidden_size), self.dtype, self.device)
        for layer in self.weights.layers.values():
            for norm, sublayer in layer:
                x.add_(sublayer(norm(x), place))  # [N, h]
        if self.weights.head is None:
            self.ranks.send(x)
        return self.ranks.to_first(self._output(x, step), step, self.spec.vocab_size, self.device)

    def release(self) -> None:
        """Give the cache's memory back, and forget what it held."""
        self.sizes = (0, 0)
        self.cache.resize(0, 0)

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

    def _place(self, step: Step) -> Place:
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
        masks = [self._mask(s) for s in step.prefill]
        caches = self.cache.layers
        return Place(step, self.ranks, caches, rotations, rows, own, held, mask, masks)

    def _mask(self, segment: Segment) -> Tensor | None:
        """A piece of a prompt: each token sees what came before it."""
        new, end = len(segment.tokens), segment.start + len(segment.tokens)
        if segment.start == 0 or new == 1:
            return None
        return torch.ones(new, end, dtype=torch.bool, device=self.device).tril(segment.start)

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
