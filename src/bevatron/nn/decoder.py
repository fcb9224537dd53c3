"""One decoder for every spec.

- token embedding, perhaps an unweighted norm after it
- layers that each say what they are: pre-norm residual attention and MLP sublayers, either of which
  may be one matrix or absent
- final norm, and a head: logits, tied to the embedding or not, perhaps softcapped; scores of a
  classification or question answering head; or none
- a pipeline stage is the same class over a slice of the layers
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevatron.nn.attention import Attention
from bevatron.nn.attention_kernels import Mask, make_mask
from bevatron.nn.mlp import MLP, Linear
from bevatron.nn.norm import Norm, rms
from bevatron.nn.output_heads import Compute, Scores, Vocabulary, pool, softcap
from bevatron.nn.rank_communication import LOCAL, Comm, empty
from bevatron.nn.rope import rotation
from bevatron.spec import MLP as MLPSpec
from bevatron.spec import Attention as AttentionSpec
from bevatron.spec import LayerSpec, ModelSpec

Rotations = dict[int, tuple[Tensor, ...]]
EMBEDDING = -1  # the place before the first layer
# Between the layers: (a layer's number or EMBEDDING, the hidden states after it) -> what goes on.
Tap = Callable[[int, Tensor], Tensor]


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


class Layer(nn.Module):
    """One entry of the list. Absent sublayers have neither norm nor parameters."""

    def __init__(self, spec: LayerSpec, model: ModelSpec, comm: Comm) -> None:
        super().__init__()
        self.spec = spec
        h = model.hidden_size
        if spec.attention is not None:
            self.attention_norm = Norm(model.norm, h, comm)
            self.attention = (
                Attention(spec.attention, h, model.norm.eps, comm)
                if isinstance(spec.attention, AttentionSpec)
                else Linear(h, comm)
            )
        if spec.mlp is not None:
            self.mlp_norm = Norm(model.norm, h, comm)
            self.mlp = MLP(spec.mlp, h, comm) if isinstance(spec.mlp, MLPSpec) else Linear(h, comm)

    def forward(
        self,
        x: Tensor,
        rotations: Rotations,
        mask: Mask | None = None,
    ) -> Tensor:
        return self.run(x, rotations, mask)

    def run(self, x: Tensor, rotations: Rotations, mask: Mask | None) -> Tensor:
        attention, mlp = self.spec.attention, self.spec.mlp
        if isinstance(attention, AttentionSpec):
            normed = self.attention_norm(x)
            x = x + self.attention(normed, rotations[attention.head_dim], mask)
        elif attention is not None:
            x = x + self.attention(self.attention_norm(x))
        if mlp is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x


class Decoder(nn.Module):
    """The layers `layers` of a model, with its embedding and its head if asked for.

    Parameters have the spec's names and global shapes and are uninitialised; build it under
    `torch.device("meta")` and fill it from a checkpoint or with `bevatron.parallel.random_weights`.

    Attributes:
        left_out: layers that a forward passes by, to see what they are worth.
    """

    left_out: Collection[int] = ()

    def __init__(
        self,
        spec: ModelSpec,
        *,
        layers: Sequence[int] | None = None,
        embed: bool = True,
        head: bool = True,
        comm: Comm = LOCAL,
    ) -> None:
        super().__init__()
        self.spec, self.comm = spec, comm
        indices = range(len(spec.layers)) if layers is None else layers
        self.embed = Embedding(spec.vocab_size, spec.hidden_size, comm) if embed else None
        self.layers = nn.ModuleDict({str(i): Layer(spec.layers[i], spec, comm) for i in indices})
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
    ) -> Tensor:
        """Token ids [B, T] (or the previous stage's hidden states) -> hidden states after the
        final norm; the scores [B, T, labels] of a head that is not causal_lm; `compute` of them and
        the head's weight if given.

        Args:
            documents: [B, T] numbers of the documents that a sequence is packed of: a token sees
                its own one alone.
            positions: [B or 1, T]; those in the document, or else in the sequence, if absent.

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
            if not self.left_out or int(i) not in self.left_out:
                x = layer(x, rotations, mask)
                if tap is not None:
                    x = tap(int(i), x)
        if self.final_norm is None:
            return x
        x = self.final_norm(x)
        if isinstance(self.head, Scores):
            scores: Tensor = self.head(x)
            return scores if compute is None else compute(scores, self.head.weight)
        return x if compute is None or self.head is None else self.head(x, compute)

    def sequence_length(self, x: Tensor) -> int:
        """Length of the whole sequence, of which hidden states x may hold this rank's share."""
        return x.shape[1] * self.comm.sequence_shares

    def rotations(self, positions: Tensor, dtype: torch.dtype, length: int | None) -> Rotations:
        """cos and sin for every head_dim that occurs in these layers; `length` of the whole
        sequence, None if `positions` say it."""
        sizes = {
            a.head_dim
            for layer in self.layers.values()
            if isinstance(a := layer.spec.attention, AttentionSpec)  # type: ignore[union-attr]
        }
        return {d: rotation(self.spec.rope, d, positions, dtype, length) for d in sizes}

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
