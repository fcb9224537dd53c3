"""Norms: statistics are computed in fp32, the result has the input's dtype, as in transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevatron.nn.rank_communication import Comm, empty
from bevatron.spec import Norm as NormSpec

NormFunction = Callable[[Tensor], Tensor]


def rms(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dimension."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class Norm(nn.Module):
    """RMSNorm with or without weight, or LayerNorm1P (stored weight + 1, and a bias)."""

    def __init__(self, spec: NormSpec, hidden_size: int, comm: Comm) -> None:
        super().__init__()
        self.spec, self.comm = spec, comm
        if spec.weight:
            self.weight = empty(hidden_size)
        if spec.kind == "layernorm1p":
            self.bias = empty(hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.kind == "layernorm1p":
            weight, bias = self.comm.shared(self.weight), self.comm.shared(self.bias)
            return F.layer_norm(x, (x.shape[-1],), weight + 1, bias, self.spec.eps)
        x = rms(x, self.spec.eps)
        return self.comm.shared(self.weight) * x if self.spec.weight else x


def norm_function(
    spec: NormSpec, width: int, weight: Tensor | None, bias: Tensor | None
) -> NormFunction:
    """What `Norm` computes over the last dimension, of `width`, for inference: in place, and in
    fp32 by torch's fused kernel, whose sum has another order."""
    shape, eps = (width,), spec.eps
    if spec.kind == "layernorm1p":
        assert weight is not None
        scale = weight + 1
        return lambda x: F.layer_norm(x, shape, scale, bias, eps)
    if weight is None:
        return lambda x: rms(x, eps)
    if weight.dtype == torch.float32:
        return lambda x: F.rms_norm(x, shape, weight, eps)
    return lambda x: rms(x, eps).mul_(weight)
