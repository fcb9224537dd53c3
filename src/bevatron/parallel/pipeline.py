"""Running one step's micro-batches through this rank's stage, with or without a pipeline."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from bevatron.errors import BevatronError
from bevatron.parallel.place import Placed, reshard, sum_tied_gradients

Batch = dict[str, Tensor]


def pass_down(placed: Placed, ids: Tensor, dtype: torch.dtype, batch: Batch) -> Tensor:
    """One micro-batch through the stages, without gradients: hidden states come from the stage
    before and go to the next. Returns what this rank's stage computed."""
    group = placed.mesh.get_group("pp")
    ranks = dist.get_process_group_ranks(group)
    x = ids
    if not placed.is_first:
        length = ids.shape[1] // placed.stage.decoder.comm.sequence_shares
        shape = (ids.shape[0], length, placed.spec.hidden_size)
        x = torch.empty(shape, dtype=dtype, device=ids.device)
        dist.recv(x, ranks[placed.pp_rank - 1], group=group)
    out: Tensor = placed.stage(x, **batch)
    if not placed.is_last:
        dist.send(out.contiguous(), ranks[placed.pp_rank + 1], group=group)
    return out


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
        self.entries, self.dtype = entries, dtype
        self.scale = self.sums = torch.zeros(entries, device=device)
        shares = placed.stage.decoder.comm.sequence_shares
        self.hidden_shape = (micro_batch, seq_len // shares, placed.spec.hidden_size)
        self.schedule: Schedule1F1B | None = None
        if placed.layout.pp > 1:
            stage = self._pipeline_stage(device, seq_len)
            self.schedule = Schedule1F1B(stage, count, self._scaled, scale_grads=False)

    def _pipeline_stage(self, device: torch.device, seq_len: int) -> PipelineStage:
        """Static shapes: examples of what comes in and goes out, so that ranks need not ask."""
        placed = self.placed

        def hidden() -> Tensor:
            return torch.empty(
                self.hidden_shape, dtype=self.dtype, device=device, requires_grad=True
            )

        ids = torch.zeros(self.micro_batch, seq_len, dtype=torch.int64, device=device)
        total = torch.zeros(self.entries, device=device, requires_grad=True)
        return PipelineStage(
            placed.stage,
            placed.pp_rank,
            placed.layout.pp,
            device,
            input_args=ids if placed.is_first else hidden(),
            output_args=total if placed.is_last else hidden(),
            group=placed.mesh.get_group("pp"),
        )

    def _scaled(self, out: Tensor, target: Tensor) -> Tensor:
        """What is differentiated of a micro-batch's sums, which are added up on the way."""
        self.sums += out.detach()
        return (out[: len(self.scale)] * self.scale).sum()

    def step(self, ids: Tensor, batch: Batch, scale: Tensor) -> Tensor:
        """Accumulate gradients of scale @ sums over all micro-batches; returns the sums [entries].

        ids and every tensor of batch are [count * B, ...]. `scale` is that of the first sums; the
        others are only reported. All are zero on all stages but the last. Afterwards every
        parameter of this rank has its whole gradient."""
        self.scale, self.sums = scale, torch.zeros(self.entries, device=ids.device)
        if self.schedule is None:
            self._accumulate(ids, batch)
        else:
            self._run_schedule(ids, batch)
        missing = [n for n, p in self.placed.parameters.items() if p.grad is None]
        if missing:
            raise BevatronError(f"no gradient arrived at {', '.join(missing[:5])}; please report")
        sum_tied_gradients(self.placed)
        return self.sums

    def evaluate(self, ids: Tensor, batch: Batch) -> Tensor:
        """The objective's sums without gradients; zero on all stages but the last.

        Micro-batches pass down the stages one behind the other. (torch's `Schedule.eval` waits
        for ever on a 1F1B schedule with two stages, torch 2.13.)"""
        total = torch.zeros(self.entries, device=ids.device)
        with torch.no_grad():
            for part, extra in self._chunks(ids, batch):
                out = pass_down(self.placed, part, self.dtype, extra)
                if self.placed.is_last:
                    total += out
        reshard(self.placed.stage)
        return total

    def _run_schedule(self, ids: Tensor, batch: Batch) -> None:
        assert self.schedule is not None
        args = (ids,) if self.placed.is_first else ()
        target = ids if self.placed.is_last else None
        run: Any = self.schedule.step
        run(*args, target=target, return_outputs=False, **batch)

    def _accumulate(self, ids: Tensor, batch: Batch) -> None:
        stage = self.placed.stage
        parts = self._chunks(ids, batch)
        for i, (part, extra) in enumerate(parts):
            last = i == len(parts) - 1
            stage.set_requires_gradient_sync(last)  # type: ignore[operator]
            stage.set_is_last_backward(last)  # type: ignore[operator]
            self._scaled(stage(part, **extra), part).backward()

    def _chunks(self, ids: Tensor, batch: Batch) -> list[tuple[Tensor, Batch]]:
        n = ids.shape[0] // self.micro_batch
        pieces = {k: v.chunk(n) for k, v in batch.items()}
        return [(p, {k: v[i] for k, v in pieces.items()}) for i, p in enumerate(ids.chunk(n))]
