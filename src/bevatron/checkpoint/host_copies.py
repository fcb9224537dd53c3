"""Copies of tensors in host memory, so that training goes on while they are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bevatron.checkpoint.save_and_load import Saved


class Snapshot:
    """One set of host buffers, used again by every save: memory is bounded at one copy of what
    this rank writes. With an accelerator they are page-locked, which its copies need for speed."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def take(self, tensors: Sequence[Saved]) -> list[Saved]:
        """The tensors with their present values, which stay as they are until the next call.

        What several of them share (weights, and the masters that they are rounded from) is copied
        once; the rounding is left to the writer."""
        seen: dict[tuple[int, int], Tensor] = {}
        out, device = [], None
        for saved in tensors:
            values = saved.values.detach()
            key = (values.data_ptr(), values.numel())
            if key not in seen:
                seen[key] = self._buffer(saved.name, values)
                seen[key].copy_(values, non_blocking=True)
            if values.device.type != "cpu":
                device = values.device
            out.append(replace(saved, values=seen[key]))
        if device is not None:
            torch.accelerator.synchronize(device)
        return out

    def _buffer(self, name: str, values: Tensor) -> Tensor:
        held = self.buffers.get(name)
        if held is None or held.shape != values.shape or held.dtype != values.dtype:
            pinned = values.device.type != "cpu"
            held = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
            self.buffers[name] = held
        return held
