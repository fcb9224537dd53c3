"""A model that is spread over all ranks, as one torch module.

It takes token ids and returns logits, and it can hand out its tensors whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from bevatron.bridge.open_weights import Opened
from bevatron.checkpoint.rank_boxes import box, is_first_copy, local
from bevatron.errors import BevatronError
from bevatron.nn.output_heads import Compute, pool, softcap
from bevatron.nn.rank_communication import Comm
from bevatron.parallel.forward_pass import forward, on_all_stages, pass_down
from bevatron.parallel.on_all_ranks import on_all
from bevatron.parallel.placement import Placed
from bevatron.parallel.tensor_parallel import TensorParallel
from bevatron.spec import ModelSpec


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, and so what accompanies its weights when it is saved.

    Attributes:
        weights: the folder with the source's weights and other files, if there is one.
        config: config.json where there is none.
        tokenizer: a folder to take a tokenizer from, where there is none either.
    """

    weights: Opened | None = None
    config: Mapping[str, Any] | None = None
    tokenizer: Path | None = None


class DistributedModel(nn.Module):
    """This rank's part of a model. Parameters are DTensors: fp32 shards, as in training.

    Attributes:
        placed: the decoder slice, its mesh, and its parameters by native name.
        dtypes: of every parameter when it leaves the model (saved or exported).
    """

    def __init__(self, placed: Placed, dtypes: Mapping[str, torch.dtype], origin: Origin) -> None:
        super().__init__()
        self.stage, self.placed = placed.stage, placed
        self.dtypes, self.origin = dtypes, origin

    @property
    def spec(self) -> ModelSpec:
        return self.placed.spec

    @property
    def dtype(self) -> torch.dtype:
        return self.placed.dtype

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] on every rank, for token ids [B, T]; with another head what
        `Decoder.logits` gives: pooled scores [B, labels], scores [B, T, labels], hidden states.

        Ranks of one tensor- or pipeline-parallel group must pass the same ids, data-parallel ones
        may pass others of the same shape; all ranks call it together. Without a pipeline it carries
        gradients: they arrive summed over the data-parallel ranks, so divide the loss by the global
        count. Over a pipeline, hidden states travel from stage to stage without gradients: call it
        under `torch.no_grad()`, and train with `bevatron train`, whose schedule runs backwards too.

        Args:
            position_ids: [B or 1, T]; 0..T-1 if absent.
            attention_mask: for the callers who pass one; attention is causal and nothing else, so
                anything but None or all true is refused.
        """
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            raise BevatronError(
                "attention_mask masks some positions, but attention is causal alone; pass "
                "sequences of equal length without padding, and no mask"
            )
        shares = self.placed.stage.decoder.comm.sequence_shares
        if input_ids.shape[1] % shares:
            raise BevatronError(
                f"the sequence length {input_ids.shape[1]} is not a multiple of the "
                f"tensor-parallel size {shares}, which sequence_parallel needs; pad it, or set "
                "provider.sequence_parallel = False"
            )
        extra = {} if position_ids is None else {"positions": position_ids}
        if self.placed.layout.pp > 1 and torch.is_grad_enabled():
            raise BevatronError(
                "a forward over a pipeline carries no gradients; call it under torch.no_grad(), "
                "and train with `bevatron train` or at pipeline_model_parallel_size = 1"
            )
        if torch.is_grad_enabled():
            end = pass_down(self.placed, input_ids, extra).end
        else:
            (end,) = (found.end for found in forward(self.placed, [(input_ids, extra)]))
        width = self.spec.head_rows or self.spec.hidden_size
        shape = (*input_ids.shape, width)
        whole = None if end is None else self._whole(end)
        logits = on_all_stages(self.placed, whole, shape, self.placed.dtype)
        if self.spec.head.kind == "sequence_classification":
            logits = pool(logits, input_ids, self.spec.head.pad_token_id)
        return logits

    def _whole(self, out: Tensor) -> Tensor:
        """All of T, of which a rank has its share behind a head that is not over the vocabulary."""
        comm = self.placed.stage.decoder.comm
        if self.spec.head.kind == "causal_lm" or not isinstance(comm, TensorParallel):
            return out
        part = DTensor.from_local(out, comm.mesh, [comm.between], run_check=False)
        whole = part.redistribute(placements=[Replicate()])
        return whole.to_local(grad_placements=[Replicate()])


def to_logits(comm: Comm, spec: ModelSpec, batch: dict[str, Tensor]) -> Compute:
    """What the head of a `DistributedModel` computes: logits over the whole vocabulary, or this
    rank's share of another head's scores."""

    def compute(hidden: Tensor, weight: Tensor) -> Tensor:
        if spec.head.kind != "causal_lm":
            return hidden
        part = softcap(F.linear(hidden, weight), spec.logit_softcap)  # [B, T, V of this rank]
        if not isinstance(comm, TensorParallel):
            return part
        shape = torch.Size((*part.shape[:-1], spec.vocab_size))
        stride = (shape[1] * shape[2], shape[2], 1)
        whole = DTensor.from_local(
            part, comm.mesh, [Shard(2)], run_check=False, shape=shape, stride=stride
        ).redistribute(placements=[Replicate()])
        # Every rank goes on to compute the same thing with the logits, so each has the whole
        # gradient already and takes its own part of it.
        return whole.to_local(grad_placements=[Replicate()])

    return compute


def whole_tensors(
    model: DistributedModel,
    dtype: torch.dtype | None = None,
    only: Collection[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by native name, whole and on every rank, one after the other.

    Collective: all ranks must take as many.

    Args:
        dtype: instead of the model's own ones.
        only: the names to yield; None for all.
    """
    placed, rank = model.placed, dist.get_rank()
    mine = {
        name: box(p)
        for name, p in placed.parameters.items()
        if is_first_copy(p) and local(p).numel()
    }
    everyone = on_all(lambda: mine)
    for parameter in placed.spec.parameters():
        name = parameter.name
        if only is not None and name not in only:
            continue
        to = dtype or model.dtypes[name]
        whole = torch.empty(parameter.shape, dtype=to, device=placed.device)
        for owner, boxes in enumerate(everyone):
            if name not in boxes:
                continue
            offset, shape = boxes[name]
            if owner == rank:
                part = local(placed.parameters[name].detach()).to(to).contiguous()
            else:
                part = torch.empty(shape, dtype=to, device=placed.device)
            if len(everyone) > 1:
                dist.broadcast(part, owner)
            whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))] = part
        yield name, whole
