"""The MLP, with or without a gate, and the matrix that may stand for a whole sublayer."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from bevatron.nn.attention_kernels import Mask
from bevatron.nn.linear_map import LinearMap
from bevatron.nn.rank_communication import Comm
from bevatron.nn.rope import Rotations
from bevatron.spec import MLP as MLPSpec
from bevatron.spec import Linear as LinearSpec
from bevatron.spec import ModelSpec


def activate(x: Tensor, name: str) -> Tensor:
    return F.silu(x) if name == "silu" else F.relu(x).square()


def between(rows: Tensor, spec: MLPSpec) -> Tensor:
    """What the down projection multiplies [..., f]: of the first product's rows [..., 2f], gate and
    up, or without a gate [..., f]."""
    if not spec.gated:
        return activate(rows, spec.activation)
    gate, up = rows.chunk(2, dim=-1)
    return activate(gate, spec.activation) * up


class MLP(nn.Module):
    """`tap`, if set, is called with what the down projection multiplies, [B, T, f]."""

    tap: Callable[[Tensor], None] | None = None

    def __init__(self, spec: MLPSpec, model: ModelSpec, comm: Comm) -> None:
        super().__init__()
        self.spec, self.comm = spec, comm
        h, f = model.hidden_size, spec.intermediate_size
        if spec.gated:
            self.gate_up = LinearMap(2, f, h, bias=(2, f) if spec.bias else None)
        else:
            self.up = LinearMap(f, h, bias=(f,) if spec.bias else None)
        self.down = LinearMap(h, f, bias=(h,) if spec.bias else None)

    def forward(self, x: Tensor, rotations: Rotations, mask: Mask | None = None) -> Tensor:
        comm = self.comm
        x = comm.enter(x)  # [B, T, h]
        if self.spec.gated:
            rows = self.gate_up.product(x, comm.view, lambda t: t.flatten(0, 1))  # [B, T, 2f]
        else:
            rows = self.up.product(x, comm.view)  # [B, T, f]
        y = between(rows, self.spec)  # [B, T, f]
        if self.tap is not None:
            self.tap(y)
        return self.down.reduced(y, comm)  # [B, T, h]


class Linear(nn.Module):
    """A square matrix in place of a sublayer."""

    def __init__(self, spec: LinearSpec, model: ModelSpec, comm: Comm) -> None:
        super().__init__()
        self.comm = comm
        self.linear = LinearMap(model.hidden_size, model.hidden_size)

    def forward(self, x: Tensor, rotations: Rotations, mask: Mask | None = None) -> Tensor:
        return self.linear.reduced_part(x, self.comm)
