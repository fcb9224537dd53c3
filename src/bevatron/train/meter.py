"""What is reported of a step, and where."""

from __future__ import annotations

from typing import Any

import torch

from bevatron.checkpoint.run_folder import RunFolder
from bevatron.parallel.layout import Layout
from bevatron.progress import Advance
from bevatron.spec import ModelSpec
from bevatron.spec.count import flops_per_token
from bevatron.train.hardware import memory_gib, peak_flops


class Meter:
    """Makes the lines of metrics.jsonl. Only the main rank has a `folder` to write them to."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        *,
        seq_len: int,
        global_batch: int,
        device: torch.device,
        folder: RunFolder | None,
    ) -> None:
        self.spec, self.layout, self.device, self.folder = spec, layout, device, folder
        self.seq_len, self.tokens_per_step = seq_len, seq_len * global_batch
        self.peak = peak_flops(device)

    def step(
        self,
        step: int,
        *,
        tokens: int,
        seconds: float,
        values: dict[str, float],
        advance: Advance,
    ) -> None:
        """Report an update. `values`: at least loss, grad_norm, lr."""
        speed = self.tokens_per_step / seconds
        line: dict[str, Any] = {"step": step, **values, "tokens": tokens, "tokens_per_s": speed}
        line |= self._mfu(speed)
        line["memory_gib"] = memory_gib(self.device)
        self.write(line)
        advance(1, loss=f"{line['loss']:.4f}", norm=f"{line['grad_norm']:.3f}")

    def write(self, line: dict[str, Any]) -> None:
        """Append any line, such as a validation's or an event's."""
        if self.folder is not None:
            self.folder.append_metrics(line)

    def _mfu(self, speed: float) -> dict[str, float | None]:
        """Model FLOPs utilisation in both conventions; None where the device's peak is unknown."""
        if self.peak is None:
            return {"mfu": None, "mfu_causal": None}
        limit = self.peak * self.layout.world_size
        flops = [flops_per_token(self.spec, self.seq_len, causal=c) for c in (False, True)]
        return {"mfu": speed * flops[0] / limit, "mfu_causal": speed * flops[1] / limit}
