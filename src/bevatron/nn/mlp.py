"""The MLP, with or without a gate, and the matrix that may stand for a whole sublayer."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from bevatron.nn.attention import Projection
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
            self.gate_up = Projection(2, f, h, bias=(2, f) if spec.bias else None)
        else:
            self.up = Projection(f, h, bias=(f,) if spec.bias else None)
        self.down = Projection(h, f, bias=(h,) if spec.bias else None)

    def forward(self, x: Tensor) -> Tensor:
        comm = self.comm
        x = comm.enter(x)  # [B, T, h]
        first = self.gate_up if self.spec.gated else self.up
        weight = comm.view(first.weight)
        bias = None if first.bias is None else comm.view(first.bias).flatten()
        if self.spec.gated:
            weight = weight.flatten(0, 1)  # [2f, h]
            gate, up = F.linear(x, weight, bias).chunk(2, dim=-1)  # [B, T, f] each
            y = activate(gate, self.spec.activation) * up
        else:
            y = activate(F.linear(x, weight, bias), self.spec.activation)  # [B, T, f]
        if self.tap is not None:
            self.tap(y)
        y = comm.leave(F.linear(y, comm.view(self.down.weight)))  # [B, T, h]
        return y if self.down.bias is None else y + comm.shared(self.down.bias)


class RowParallel(nn.Module):
    """A product whose weight the ranks share by input columns."""

    def __init__(self, hidden_size: int, comm: Comm) -> None:
        super().__init__()
        self.comm, self.hidden_size = comm, hidden_size

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        first, last = self.comm.bounds(self.hidden_size)
        x = self.comm.enter(x)[..., first:last]  # [B, T, h/size]
        y = self.comm.leave(F.linear(x, self.comm.view(weight)))  # [B, T, out]
        return y if bias is None else y + self.comm.shared(bias)


class Linear(RowParallel):
    """A square matrix in place of a sublayer."""

    def __init__(self, hidden_size: int, comm: Comm) -> None:
        super().__init__(hidden_size, comm)
        self.linear = Projection(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.linear.weight)
