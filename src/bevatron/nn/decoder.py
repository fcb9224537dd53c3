"""The decoder: one class that builds itself from any spec.

- a token embedding, with an optional unweighted norm after it
- layers, each by its own spec: pre-norm residual attention and MLP sublayers, either of which may
  be replaced by one matrix or absent
- beside its linear maps perhaps an adapter
- a final norm, and a head: logits, tied to the embedding or not, optionally softcapped; scores of a
  classification or question answering head; or no head
- a pipeline stage is the same class over a slice of the layers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevatron.errors import BevatronError
from bevatron.nn.adapted_map import adapt
from bevatron.nn.attention import Attention
from bevatron.nn.attention_kernels import Mask, make_mask
from bevatron.nn.mlp import MLP, Linear
from bevatron.nn.norm import Norm, rms
from bevatron.nn.output_heads import Compute, Scores, Vocabulary, pool, softcap
from bevatron.nn.rank_communication import LOCAL, Comm, empty
from bevatron.nn.rope import Rotations, rotation
from bevatron.spec import LayerSpec, ModelSpec, Sublayer

# What computes a sublayer, by its kind. Made of the sublayer's spec, the model's, and what it may
# ask of other ranks; called with what the norm before it gives, the rotations and the mask.
MODULES: dict[str, Callable[[Any, ModelSpec, Comm], nn.Module]] = {
    "attention": Attention,
    "mlp": MLP,
    "linear": Linear,
}
EMBEDDING = -1  # the place before the first layer
# Between the layers: (a layer's number or EMBEDDING, the hidden states after it) -> what goes on.
Tap = Callable[[int, Tensor], Tensor]
OWN = "own"


@dataclass(frozen=True)
class Choice:
    """What a forward computes in one layer. Each sublayer is the layer's OWN, that of one of its
    variants, by name, or is left out (None)."""

    attention: str | None = OWN
    mlp: str | None = OWN


LEFT_OUT = Choice(None, None)
Choices = Mapping[int, Choice]  # by the layer's number
NO_CHOICES: Choices = MappingProxyType({})
Variants = Mapping[int, Mapping[str, LayerSpec]]  # a layer's number -> name -> what it may be
NO_VARIANTS: Variants = MappingProxyType({})


class Embedding(nn.Module):
    """Token embedding; each rank holds a range of the vocabulary."""

    def __init__(self, vocab_size: int, hidden_size: int, comm: Comm) -> None:
        super().__init__()
        self.comm, self.vocab_size = comm, vocab_size
        self.weight = empty(vocab_size, hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.comm.view(self.weight)
        if self.comm.size == 1:
            return F.embedding(ids, weight)  # [B, T, h]
        first, last = self.comm.bounds(self.vocab_size)
        mine = (ids >= first) & (ids < last)
        rows = F.embedding(torch.where(mine, ids - first, 0), weight)
        return self.comm.leave(rows * mine.unsqueeze(-1))


def computed(sublayer: Sublayer, model: ModelSpec, comm: Comm) -> nn.Module:
    """The module of a sublayer."""
    if sublayer.kind not in MODULES:
        raise BevatronError(
            f"nothing computes sublayers of kind {sublayer.kind!r}: add their module to "
            "bevatron.nn.decoder.MODULES"
        )
    return MODULES[sublayer.kind](sublayer, model, comm)


class Layer(nn.Module):
    """One entry of the list. Absent sublayers have neither norm nor parameters.

    Its `variants` are layers that may stand in for it, whole or for one of the sublayers; theirs
    are parameters of this module, though not of the model: `layers.3.variants.<name>...`."""

    def __init__(
        self,
        spec: LayerSpec,
        model: ModelSpec,
        comm: Comm,
        variants: Mapping[str, LayerSpec] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.spec = spec
        self.variants = nn.ModuleDict({n: Layer(v, model, comm) for n, v in variants.items()})
        h = model.hidden_size
        if spec.attention is not None:
            self.attention_norm = Norm(model.norm, h, comm)
            self.attention = computed(spec.attention, model, comm)
        if spec.mlp is not None:
            self.mlp_norm = Norm(model.norm, h, comm)
            self.mlp = computed(spec.mlp, model, comm)

    def forward(
        self,
        x: Tensor,
        rotations: Rotations,
        mask: Mask | None = None,
        *choice: Choice,
    ) -> Tensor:
        return self.run(x, rotations, mask, *choice)

    def run(
        self, x: Tensor, rotations: Rotations, mask: Mask | None, choice: Choice = Choice()
    ) -> Tensor:
        if choice.attention is not None:
            x = self._variant(choice.attention).attend(x, rotations, mask)
        if choice.mlp is not None:
            x = self._variant(choice.mlp).feed(x, rotations, mask)
        return x

    def _variant(self, name: str) -> Layer:
        return self if name == OWN else self.variants[name]  # type: ignore[return-value]

    def attend(self, x: Tensor, rotations: Rotations, mask: Mask | None) -> Tensor:
        """The residual stream after the attention sublayer."""
        if self.spec.attention is None:
            return x
        return x + self.attention(self.attention_norm(x), rotations, mask)  # type: ignore[no-any-return]

    def feed(self, x: Tensor, rotations: Rotations, mask: Mask | None) -> Tensor:
        """The residual stream after the MLP sublayer."""
        if self.spec.mlp is None:
            return x
        return x + self.mlp(self.mlp_norm(x), rotations, mask)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """The layers `layers` of a model, with its embedding and its head if asked for.

    Parameters have the spec's names and global shapes and are uninitialised; build it under
    `torch.device("meta")` and fill it from a checkpoint or with `bevatron.parallel.random_weights`.

    Args:
        variants: what else some layers may be; see `forward`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        layers: Sequence[int] | None = None,
        embed: bool = True,
        head: bool = True,
        comm: Comm = LOCAL,
        variants: Variants = NO_VARIANTS,
    ) -> None:
        super().__init__()
        self.spec, self.comm = spec, comm
        indices = range(len(spec.layers)) if layers is None else layers
        self.embed = Embedding(spec.vocab_size, spec.hidden_size, comm) if embed else None
        self.layers = nn.ModuleDict(
            {str(i): Layer(spec.layers[i], spec, comm, variants.get(i, {})) for i in indices}
        )
        adapt(self.layers, spec, comm)
        self.final_norm = Norm(spec.norm, spec.hidden_size, comm) if head else None
        self.head = self._head() if head else None
        self.tie()

    def _head(self) -> Vocabulary | Scores | None:
        spec = self.spec
        if spec.head.kind == "causal_lm":
            return Vocabulary(spec.vocab_size, spec.hidden_size, self.comm)
        return Scores(spec.head, spec.hidden_size, self.comm) if spec.head.scores else None

    def tie(self) -> None:
        """Make a tied head and the embedding one parameter (again, after it was replaced)."""
        if self.spec.tied and self.embed is not None and self.head is not None:
            self.head.weight = self.embed.weight

    def forward(
        self,
        x: Tensor,
        compute: Compute | None = None,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        tap: Tap | None = None,
        choices: Choices = NO_CHOICES,
    ) -> Tensor:
        """Token ids [B, T] (or the previous stage's hidden states) -> hidden states after the
        final norm; the scores [B, T, labels] of a head that is not causal_lm; `compute` of them and
        the head's weight if given.

        Args:
            documents: [B, T] numbers of the documents that a sequence is packed of: a token sees
                its own one alone.
            positions: [B or 1, T]; those in the document, or else in the sequence, if absent.
            choices: what is computed in these layers instead of what the spec says, to see what a
                variant or the layer itself is worth. One that is LEFT_OUT is passed by.

        T is this rank's part of the sequence under context parallel, and all of that also where x
        holds the share of a sequence-parallel rank."""
        if self.embed is not None:
            ids, x = x, self.embed(x)
            length = ids.shape[1]
            if self.spec.embedding_norm:
                x = rms(x, self.spec.norm.eps)
            if tap is not None:
                x = tap(EMBEDDING, x)
        else:
            length = self.sequence_length(x)
        mask = make_mask(self.comm.context, x, length, documents)
        whole = None if positions is not None else length * self.comm.context.size
        if positions is None:
            runs = self.comm.context.runs(length)
            positions = torch.cat([torch.arange(*run, device=x.device) for run in runs])[None]
            if mask is not None and mask.starts is not None:
                positions = positions - mask.starts
        rotations = self.rotations(positions, x.dtype, whole)
        for i, layer in self.layers.items():
            choice = choices.get(int(i))
            if choice != LEFT_OUT:
                x = layer(x, rotations, mask, *([] if choice is None else [choice]))
                if tap is not None:
                    x = tap(int(i), x)
        if self.final_norm is None:
            return x
        x = self.final_norm(x)
        if isinstance(self.head, Scores):
            scores: Tensor = self.head(x)
            return scores if compute is None else compute(scores, self.head.weight)
        return x if compute is None or self.head is None else self.head(x, compute)

    def variants(self) -> list[Layer]:
        """All variants of all layers."""
        layers: list[Layer] = list(self.layers.values())  # type: ignore[arg-type]
        return [variant for layer in layers for variant in layer.variants.values()]  # type: ignore[misc]

    def sequence_length(self, x: Tensor) -> int:
        """Length of the whole sequence, of which hidden states x may hold this rank's share."""
        return x.shape[1] * self.comm.sequence_shares

    def rotations(self, positions: Tensor, dtype: torch.dtype, length: int | None) -> Rotations:
        """cos and sin for every head_dim that occurs in these layers; `length` of the whole
        sequence, None if `positions` say it."""
        layers: list[Any] = list(self.layers.values())
        specs = [v.spec for layer in layers for v in (layer, *layer.variants.values())]
        sizes = {sublayer.rotated for spec in specs for _, sublayer in spec.present}
        rope = self.spec.rope
        return {d: rotation(rope, d, positions, dtype, length) for d in sizes if d is not None}

    def logits(self, ids: Tensor, **kwargs: object) -> Tensor:
        """What the model is for, of a whole model in one process: logits [B, T, V]; the pooled
        scores [B, labels] of a sequence classification; scores [B, T, labels] of a token
        classification, [B, T, 2] of question answering; hidden states [B, T, h] without a head."""
        head = self.spec.head
        if head.kind == "causal_lm":
            return self(ids, self.to_logits, **kwargs)  # type: ignore[no-any-return]
        y: Tensor = self(ids, **kwargs)
        return pool(y, ids, head.pad_token_id) if head.kind == "sequence_classification" else y

    def to_logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return softcap(F.linear(hidden, weight), self.spec.logit_softcap)
