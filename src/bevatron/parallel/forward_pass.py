"""The forward of a placed model: micro-batches go in, what is asked of each one comes out.

Everything that runs a placed model without training it goes through here: validation, importance,
stored logits, a companion beside the trained model, a model behind AutoBridge. A micro-batch passes
down the stages; between two of them hidden states travel, and nothing else does. What is asked for
is computed where it can be, and only that leaves the forward:

- at the end, on the ranks that have the last stage: what an `AtEnd` computes from the final hidden
  states and the head. The result stays on these ranks; `on_all_stages` sends it to the others.
- between the layers: the hidden states after each named layer, on the ranks that have this layer.

Who asks what (T: this rank's tokens of a sequence; the batch has `labels` [B, T], `last` [B]):

validation, importance      nothing new: the sums [entries] that the model was placed to compute
DPO's reference model       `sequence_log_probabilities` -> [B], one number a sequence
GRPO's reference model      `log_probabilities_at` the temperature -> [B, T], one number a token
                            instead of h
a reward model              `sequence_scores` -> [B, labels]; per token `token_scores`
distilling from a teacher   `hidden_states` -> [B, T, h], for the student's loss takes them through
                            the teacher's head in chunks (all logits would be larger)
stored logits               `top_tokens` of compress/ -> [B, T, k] thrice
what a block is worth       the loss; `choices` leave layers out or put variants in their place
Puzzle's blockwise losses   the layers' hidden states, and nothing at the end: stages beyond the
                            last layer that is asked for do not run
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from bevatron.nn.decoder import NO_CHOICES, Choices
from bevatron.nn.output_heads import Compute
from bevatron.nn.rank_communication import Comm
from bevatron.nn.vocabulary_loss import log_probabilities
from bevatron.parallel.placement import AtEnd, Batch, Placed, reshard
from bevatron.spec import ModelSpec

MicroBatch = tuple[Tensor, Batch]  # token ids [B, T], and what goes with them, all [B, ...]


class Found(NamedTuple):
    """What a micro-batch left on this rank.

    Attributes:
        end: what was computed at the end, on ranks with the last stage; elsewhere None.
        layers: hidden states [B, T, h] after the layers asked for that this rank has. T is a
            sequence-parallel rank's share.
    """

    end: Any
    layers: Mapping[int, Tensor]


def forward(
    placed: Placed,
    parts: Iterable[MicroBatch],
    at_end: AtEnd | None = None,
    *,
    layers: Collection[int] = (),
    ends: bool = True,
    choices: Choices = NO_CHOICES,
    keep: FSDPModule | None = None,
) -> Iterator[Found]:
    """Pass micro-batches down the stages one behind the other, without gradients. Collective: all
    ranks take as many. (torch's `Schedule.eval` waits for ever on a 1F1B schedule with two stages,
    torch 2.13.)

    What FSDP gathered meanwhile is dropped at the end, also when an exception ends it.

    Args:
        at_end, layers, ends, choices: what is asked for, as `pass_down` takes them.
        keep: a module whose parameters stay gathered.
    """
    if placed.tied is not None and not placed.frozen:
        placed.tied.fill_head()
    try:
        for ids, batch in parts:
            with torch.no_grad():
                found = pass_down(
                    placed, ids, batch, at_end, layers=layers, ends=ends, choices=choices
                )
            yield found
    finally:
        reshard(placed, keep)


def pass_down(
    placed: Placed,
    ids: Tensor,
    batch: Batch,
    at_end: AtEnd | None = None,
    *,
    layers: Collection[int] = (),
    ends: bool = True,
    choices: Choices = NO_CHOICES,
) -> Found:
    """One micro-batch through all stages; over a pipeline it carries no gradients.

    Args:
        at_end: what is computed at the end; None for what the model was placed to compute, which is
            hidden states for a frozen one.
        layers: after which layers hidden states are wanted; EMBEDDING is before the first.
        ends: whether anything is wanted at the end. If not, no stage runs beyond those layers'.
        choices: of layers that another variant stands in for, or that are left out.
    """
    layout, group = placed.layout, placed.mesh.get_group("pp")
    ranks = dist.get_process_group_ranks(group)
    count = len(placed.stages)
    if not ends:
        count = 1 + max((placed.stage_of(layer) for layer in layers), default=-1)
    caught: dict[int, Tensor] = {}

    def catch(layer: int, x: Tensor) -> Tensor:
        if layer in layers:
            caught[layer] = x
        return x

    out = ids
    for number, stage in placed.mine.items():
        if number >= count:
            break
        if number > 0 and number - 1 not in placed.mine:
            length = ids.shape[1] // stage.decoder.comm.sequence_shares
            shape = (ids.shape[0], length, placed.spec.hidden_size)
            out = torch.empty(shape, dtype=placed.dtype, device=ids.device)
            dist.recv(out, ranks[layout.rank_of_stage(number - 1)], group=group)
        out = stage(out, at_end=at_end, tap=catch if layers else None, choices=choices, **batch)
        if number + 1 < count and number + 1 not in placed.mine:
            dist.send(out.contiguous(), ranks[layout.rank_of_stage(number + 1)], group=group)
    return Found(out if placed.is_last and ends else None, caught)


def micro_batches(ids: Tensor, batch: Batch, size: int) -> list[MicroBatch]:
    """Micro-batches of `size` samples."""
    n = ids.shape[0] // size
    pieces = {k: v.chunk(n) for k, v in batch.items()}
    return [(p, {k: v[i] for k, v in pieces.items()}) for i, p in enumerate(ids.chunk(n))]


def joined(ends: Sequence[Any]) -> Any:
    """What micro-batches gave at the end, tensors [B, ...] or dicts of them, as one [n, ...]."""
    if isinstance(ends[0], dict):
        return {name: torch.cat([end[name] for end in ends]) for name in ends[0]}
    return torch.cat(list(ends))


def on_all_stages(
    placed: Placed, end: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """What the last stage found, on the ranks of all stages. Collective over a pipeline's ranks."""
    if placed.layout.pp == 1:
        assert end is not None
        return end
    group = placed.mesh.get_group("pp")
    if end is None:
        end = torch.empty(shape, dtype=dtype, device=placed.device)
    end = end.contiguous()
    last = placed.layout.rank_of_stage(len(placed.stages) - 1)
    dist.broadcast(end, dist.get_process_group_ranks(group)[last], group=group)
    return end


def hidden_states(comm: Comm, spec: ModelSpec, batch: Batch) -> Compute | None:
    """[B, T, h] after the final norm, T a sequence-parallel rank's share; the head is not used."""
    return None


def log_probabilities_at(temperature: float) -> Callable[[Comm, ModelSpec, Batch], Compute]:
    """log p [B, T] of `batch["labels"]` [B, T], fp32, and 0 where the label is IGNORE, of logits
    that are divided by the temperature; the same on all tensor-parallel ranks. Logits exist for a
    chunk of tokens at a time."""

    def at_end(comm: Comm, spec: ModelSpec, batch: Batch) -> Compute:
        def compute(hidden: Tensor, weight: Tensor) -> Tensor:
            cap, rows = spec.logit_softcap, spec.vocab_size
            labels = batch["labels"]
            return log_probabilities(hidden, weight, labels, comm, cap, rows, temperature)

        return compute

    return at_end


token_log_probabilities = log_probabilities_at(1.0)


def sequence_log_probabilities(comm: Comm, spec: ModelSpec, batch: Batch) -> Compute:
    """log p [B] of every sequence, float64: the sum of its tokens'. The same on all tensor- and
    context-parallel ranks."""
    each = token_log_probabilities(comm, spec, batch)
    return lambda hidden, weight: comm.context.sum(each(hidden, weight).double().sum(1))


def token_scores(comm: Comm, spec: ModelSpec, batch: Batch) -> Compute:
    """Of a head that is not over the vocabulary, the scores [B, T, labels] of every token, the same
    on all tensor-parallel ranks."""
    return lambda scores, weight: comm.enter(scores)


def sequence_scores(comm: Comm, spec: ModelSpec, batch: Batch) -> Compute:
    """[B, labels], the scores at the token `batch["last"]` [B] of each sequence, a position in the
    whole one (see `nn.output_heads.last_token`); the same on all tensor- and context-parallel
    ranks."""

    def compute(scores: Tensor, weight: Tensor) -> Tensor:
        whole, context = comm.enter(scores), comm.context
        runs = context.runs(whole.shape[1])
        at = torch.cat([torch.arange(*run, device=whole.device) for run in runs])
        here = at == batch["last"][:, None]  # [B, T], true at one token on one of the ranks
        return context.sum(torch.where(here[..., None], whole, 0).sum(1))

    return compute
