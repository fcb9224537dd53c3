"""Running one step's micro-batches through this rank's stage, with or without a pipeline."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from bevatron.errors import BevatronError
from bevatron.parallel.placement import Placed, reshard

Batch = dict[str, Tensor]


SCHEDULES = {
    "1f1b": Schedule1F1B,
    "gpipe": ScheduleGPipe,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def pass_down(placed: Placed, ids: Tensor, dtype: torch.dtype, batch: Batch) -> Tensor | None:
    """One micro-batch through all stages, without gradients: hidden states come from the stage
    before and go to the next. Returns what the last stage computed, on the rank that has it."""
    layout, group = placed.layout, placed.mesh.get_group("pp")
    ranks = dist.get_process_group_ranks(group)
    out = ids
    for number, stage in placed.mine.items():
        if number > 0 and number - 1 not in placed.mine:
            length = ids.shape[1] // stage.decoder.comm.sequence_shares
            shape = (ids.shape[0], length, placed.spec.hidden_size)
            out = torch.empty(shape, dtype=dtype, device=ids.device)
            dist.recv(out, ranks[layout.rank_of_stage(number - 1)], group=group)
        out = stage(out, **batch)
        if number + 1 < len(placed.stages) and number + 1 not in placed.mine:
            dist.send(out.contiguous(), ranks[layout.rank_of_stage(number + 1)], group=group)
    return out if placed.is_last else None


def micro_batches(ids: Tensor, batch: Batch, size: int) -> list[tuple[Tensor, Batch]]:
    """Micro-batches of `size` samples."""
    n = ids.shape[0] // size
    pieces = {k: v.chunk(n) for k, v in batch.items()}
    return [(p, {k: v[i] for k, v in pieces.items()}) for i, p in enumerate(ids.chunk(n))]


class Runner:
    """Forward and backward over micro-batches of fixed shape.

    Args:
        micro_batch, seq_len: shape [B, T] of a micro-batch.
        count: micro-batches per step on this data-parallel rank.
        dtype: of the hidden states that travel between stages.
        entries: how many sums the last stage computes of a micro-batch.
    """

    def __init__(
        self,
        placed: Placed,
        *,
        micro_batch: int,
        seq_len: int,
        count: int,
        dtype: torch.dtype,
        device: torch.device,
        entries: int = 1,
    ) -> None:
        self.placed, self.micro_batch, self.count = placed, micro_batch, count
        self.seq_len, self.dtype, self.device = seq_len, dtype, device
        self.entries = entries
        self.scale = self.sums = torch.zeros(entries, device=device)
        self.schedule: Any = None
        if placed.layout.pp > 1:
            made = SCHEDULES[placed.layout.schedule]
            stages = [self._pipeline_stage(number) for number in placed.mine]
            single = issubclass(made, PipelineScheduleSingle)
            of: Any = stages[0] if single else stages
            self.schedule = made(of, count, self._scaled, scale_grads=False)

    def _pipeline_stage(self, number: int) -> PipelineStage:
        """Static shapes: examples of what comes in and goes out, so that ranks need not ask."""
        placed, stages = self.placed, len(self.placed.stages)
        shares = placed.mine[number].decoder.comm.sequence_shares
        shape = (self.micro_batch, self.seq_len // shares, placed.spec.hidden_size)

        def hidden() -> Tensor:
            return torch.empty(shape, dtype=self.dtype, device=self.device, requires_grad=True)

        ids = torch.zeros(self.micro_batch, self.seq_len, dtype=torch.int64, device=self.device)
        total = torch.zeros(self.entries, device=self.device, requires_grad=True)
        return PipelineStage(
            placed.mine[number],
            number,
            stages,
            self.device,
            input_args=ids if number == 0 else hidden(),
            output_args=total if number == stages - 1 else hidden(),
            group=placed.mesh.get_group("pp"),
        )

    def _scaled(self, out: Tensor, target: Tensor) -> Tensor:
        """What is differentiated of a micro-batch's sums, which are added up on the way."""
        self.sums += out.detach()
        return (out[: len(self.scale)] * self.scale).sum()

    def step(self, ids: Tensor, batch: Batch, scale: Tensor) -> Tensor:
        """Accumulate gradients of scale @ sums over all micro-batches; returns the sums [entries].

        ids and every tensor of batch are [count * B, ...]. `scale` is that of the first sums; the
        others are only reported. All are zero on all ranks but those with the last stage.
        Afterwards every parameter of this rank has its whole gradient."""
        self.scale, self.sums = scale, torch.zeros(self.entries, device=ids.device)
        self._fill_tied_head()
        if self.schedule is None:
            self._accumulate(ids, batch)
        else:
            self._run_schedule(ids, batch)
        self._finish_gradients()
        return self.sums

    def _fill_tied_head(self) -> None:
        if self.placed.tied is not None:
            self.placed.tied.fill_head()

    def _finish_gradients(self) -> None:
        expected = dict(self.placed.parameters)
        tied = self.placed.tied
        if tied is not None and tied.head is not None:
            expected["head.weight"] = tied.head
        missing = [n for n, p in expected.items() if p.requires_grad and p.grad is None]
        if missing:
            raise BevatronError(f"no gradient arrived at {', '.join(missing[:5])}; please report")
        if tied is not None:
            tied.sum_gradients()
        comm = self.placed.stage.decoder.comm
        for parameter in self.placed.added.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if comm.rank > 0 and comm.sequence_shares == 1:
                parameter.grad.zero_()  # these ranks computed the same as the first
            dist.all_reduce(parameter.grad)

    def evaluate(self, ids: Tensor, batch: Batch) -> Tensor:
        """The objective's sums without gradients; zero on all ranks but those with the last stage.

        Micro-batches pass down the stages one behind the other. (torch's `Schedule.eval` waits
        for ever on a 1F1B schedule with two stages, torch 2.13.)"""
        total = torch.zeros(self.entries, device=ids.device)
        self._fill_tied_head()
        with torch.no_grad():
            for part, extra in micro_batches(ids, batch, self.micro_batch):
                out = pass_down(self.placed, part, self.dtype, extra)
                if out is not None:
                    total += out
        reshard(self.placed)
        return total

    def _run_schedule(self, ids: Tensor, batch: Batch) -> None:
        args = (ids,) if self.placed.is_first else ()
        target = ids if self.placed.is_last else None
        self.schedule.step(*args, target=target, return_outputs=False, **batch)

    def _accumulate(self, ids: Tensor, batch: Batch) -> None:
        """Without a pipeline. Over several shards, gradients are reduced after every micro-batch,
        so that no rank ever holds all of them; replicas sum theirs once, at the end."""
        stage: Any = self.placed.stage
        layout = self.placed.layout
        parts = micro_batches(ids, batch, self.micro_batch)
        for i, (part, extra) in enumerate(parts):
            last = i == len(parts) - 1
            stage.set_requires_gradient_sync(last or layout.shards > 1)
            stage.set_requires_all_reduce(last)
            stage.set_reshard_after_backward(last or layout.regathers)
            stage.set_is_last_backward(last)
            self._scaled(stage(part, **extra), part).backward()
