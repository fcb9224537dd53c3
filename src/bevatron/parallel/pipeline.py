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
from bevatron.parallel.forward_pass import forward, micro_batches
from bevatron.parallel.layout import ZERO_BUBBLE
from bevatron.parallel.placement import Batch, Placed

SCHEDULES = {
    "1f1b": Schedule1F1B,
    "gpipe": ScheduleGPipe,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class Runner:
    """Forward and backward over micro-batches of one shape. A step may have shorter sequences, on
    all ranks alike; a pipeline then makes its buffers anew.

    Args:
        micro_batch, seq_len: shape [B, T] of a micro-batch.
        count: micro-batches per step on this data-parallel rank.
        entries: how many sums the last stage computes of a micro-batch.
        largest: how many of these, the last ones, are no sums: of several micro-batches the largest
            counts.
    """

    def __init__(
        self,
        placed: Placed,
        *,
        micro_batch: int,
        seq_len: int,
        count: int,
        entries: int = 1,
        largest: int = 0,
    ) -> None:
        self.placed, self.micro_batch, self.count = placed, micro_batch, count
        self.seq_len, self.entries, self.device = seq_len, entries, placed.device
        self.largest = largest
        self.scale = self.sums = self.nothing()
        self.schedule: Any = None
        if placed.layout.pp > 1:
            self._make_schedule(seq_len)

    def _make_schedule(self, length: int) -> None:
        """For sequences of this length, of which a context-parallel rank has its share."""
        self.length, placed = length, self.placed
        made = SCHEDULES[placed.layout.schedule]
        stages = [self._pipeline_stage(number, length) for number in placed.mine]
        single = issubclass(made, PipelineScheduleSingle)
        of: Any = stages[0] if single else stages
        self.schedule = made(of, self.count, self._scaled, scale_grads=False)

    def nothing(self) -> Tensor:
        """The sums [entries] of no micro-batch."""
        sums = torch.zeros(self.entries, device=self.device)
        sums[self.entries - self.largest :] = -torch.inf
        return sums

    def _pipeline_stage(self, number: int, length: int) -> PipelineStage:
        """Static shapes: examples of what comes in and goes out, so that ranks need not ask."""
        placed, stages = self.placed, len(self.placed.stages)
        shares = placed.mine[number].decoder.comm.sequence_shares
        shape = (self.micro_batch, length // shares, placed.spec.hidden_size)

        def hidden(after: int) -> Tensor:
            """Between the stages `after` and the next. (A zero-bubble schedule has a backward for
            inputs and one for weights, and gives a stage without the first none of the second.)"""
            grad = placed.differentiable[after] or placed.layout.schedule in ZERO_BUBBLE
            return torch.empty(shape, dtype=placed.dtype, device=self.device, requires_grad=grad)

        ids = torch.zeros(self.micro_batch, length, dtype=torch.int64, device=self.device)
        total = torch.zeros(self.entries, device=self.device, requires_grad=True)
        return PipelineStage(
            placed.mine[number],
            number,
            stages,
            self.device,
            input_args=ids if number == 0 else hidden(number - 1),
            output_args=total if number == stages - 1 else hidden(number),
            group=placed.mesh.get_group("pp"),
        )

    def _scaled(self, out: Tensor, target: Tensor) -> Tensor:
        """What is differentiated of a micro-batch's sums, which are added up on the way."""
        self.sums = together(self.sums, out.detach(), self.largest)
        return (out[: len(self.scale)] * self.scale).sum()

    def step(self, ids: Tensor, batch: Batch, scale: Tensor) -> Tensor:
        """Accumulate gradients of scale @ sums over all micro-batches; returns the sums [entries].

        ids and every tensor of batch are [count * B, ...]. `scale` is that of the first sums; the
        others are only reported. Ranks without the last stage have those of `nothing`.
        Afterwards every parameter of this rank has its whole gradient."""
        self.scale, self.sums = scale, self.nothing()
        if self.placed.tied is not None:
            self.placed.tied.fill_head()
        if self.schedule is None:
            self._accumulate(ids, batch)
        else:
            self._run_schedule(ids, batch)
        self._finish_gradients()
        return self.sums

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
        """The objective's sums without gradients; `nothing` on ranks without the last stage."""
        total = self.nothing()
        for found in forward(self.placed, micro_batches(ids, batch, self.micro_batch)):
            if found.end is not None:
                total = together(total, found.end, self.largest)
        return total

    def _run_schedule(self, ids: Tensor, batch: Batch) -> None:
        if ids.shape[1] != self.length:
            self._make_schedule(ids.shape[1])
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


def together(a: Tensor, b: Tensor, largest: int) -> Tensor:
    """The sums [entries] of two parts of a batch: added up, but for the last `largest` ones, of
    which the larger counts."""
    n = len(a) - largest
    return torch.cat((a[:n] + b[:n], torch.maximum(a[n:], b[n:])))
