"""The MLP, with or without a gate, and the matrix that may stand for a whole sublayer."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from bevatron.nn.linear_map import LinearMap
from bevatron.nn.rank_communication import Comm
from bevatron.spec import MLP as MLPSpec


def activate(x: Tensor, name: str) -> Tensor:
    return F.silu(x) if name == "silu" else F.relu(x).square()


class MLP(nn.Module):
    """`tap`, if set, is called with what the down projection multiplies, [B, T, f]."""

    tap: Callable[[Tensor], None] | None = None

    def __init__(self, spec: MLPSpec, hidden_size: int, comm: Comm) -> None:
        super().__init__()
        self.spec, self.comm = spec, comm
        h, f = hidden_size, spec.intermediate_size
        if spec.gated:
            self.gate_up = LinearMap(2, f, h, bias=(2, f) if spec.bias else None)
        else:
            self.up = LinearMap(f, h, bias=(f,) if spec.bias else None)
        self.down = LinearMap(h, f, bias=(h,) if spec.bias else None)

    def forward(self, x: Tensor) -> Tensor:
        comm = self.comm
        x = comm.enter(x)  # [B, T, h]
        if self.spec.gated:
            both = self.gate_up.product(x, lambda t: comm.view(t).flatten(0, 1))  # [B, T, 2f]
            gate, up = both.chunk(2, dim=-1)
            y = activate(gate, self.spec.activation) * up  # [B, T, f]
        else:
            y = activate(self.up.product(x, comm.view), self.spec.activation)  # [B, T, f]
        if self.tap is not None:
            self.tap(y)
        return self.down.reduced(y, comm)  # [B, T, h]


class Linear(nn.Module):
    """A square matrix in place of a sublayer."""

    def __init__(self, hidden_size: int, comm: Comm) -> None:
        super().__init__()
        self.comm = comm
        self.linear = LinearMap(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear.reduced_part(x, self.comm)
