"""Muon: momentum whose update is made orthogonal, matrix by matrix.

Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), in the form in
which NanoChat trains: Nesterov momentum that warms up, five Newton-Schulz iterations, and decoupled
weight decay.

A fused weight consists of several matrices. Each is made orthogonal as a whole and on its own: Q
[H*D, h], K and V [G*D, h] (not one QKV, not per head), gate and up [f, h]. The momentum is cut like
the parameter. For the rest of the update every matrix is gathered on one rank
(`parallel/whole_tensors.py`), which computes exactly what one process would compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from bevatron.checkpoint.rank_boxes import local
from bevatron.parallel.whole_tensors import Owners
from bevatron.spec import ModelSpec
from bevatron.train.config import MuonConfig

if TYPE_CHECKING:
    from bevatron.train.optimizer_and_schedule import Rule

# The quintic a*x + b*x^3 + c*x^5, steep at zero: singular values end between about 0.7 and 1.2.
A, B, C = 3.4445, -4.7750, 2.0315
BATCH_ELEMENTS = 2**26  # matrices of one shape go together up to this size


class Muon:
    """Args:
    sources: the layers' matrices on this rank, by native name.
    dtype: that the run computes in; `config.dtype` may name another for the iterations.
    mesh: that the matrices lie on.
    """

    def __init__(
        self,
        sources: Mapping[str, Tensor],
        rules: Mapping[str, Rule],
        spec: ModelSpec,
        config: MuonConfig,
        dtype: torch.dtype,
        mesh: DeviceMesh,
    ) -> None:
        self.sources, self.rules, self.config = sources, rules, config
        self.fused = {p.name: p.fused for p in spec.parameters()}
        known = {"bf16": torch.bfloat16, "fp32": torch.float32, None: dtype}
        self.dtype = known[config.dtype]
        self.names = list(sources)
        self.shards = [local(p.detach()) for p in sources.values()]
        self.momentum = [torch.zeros_like(shard) for shard in self.shards]
        whole = [torch.empty(p.shape, device="meta") for p in sources.values()]
        costs = [sum(_cost(m.shape) for m in self._split(i, w)) for i, w in enumerate(whole)]
        self.owners = Owners(list(sources.values()), costs, mesh)
        self.count = 0

    def step(self, lr: float) -> None:
        self.count += 1
        beta = momentum_at(self.count, self.config)
        grads = [local(p.grad) for p in self.sources.values() if p.grad is not None]
        torch._foreach_lerp_(self.momentum, grads, 1 - beta)
        torch._foreach_lerp_(grads, self.momentum, beta)  # Nesterov; the gradients end here
        updates = [g.to(self.dtype) for g in grads]
        parts = self.owners.scatter(self._orthogonal(self.owners.gather(updates)), updates[0])
        for name, shard, part in zip(self.names, self.shards, parts, strict=True):
            rule = self.rules[name]
            rate = lr * rule.lr_scale
            shard.mul_(1 - rate * rule.weight_decay).add_(part, alpha=-rate)
        for parameter in self.sources.values():
            parameter.grad = None

    def _orthogonal(self, whole: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The scaled update of whole parameters, by number."""
        split = {i: self._split(i, tensor) for i, tensor in whole.items()}
        todo: dict[torch.Size, list[tuple[int, int]]] = {}
        for i, matrices in split.items():
            for j, matrix in enumerate(matrices):
                todo.setdefault(matrix.shape, []).append((i, j))
        for shape, where in todo.items():
            at_once = max(1, BATCH_ELEMENTS // shape.numel())
            for first in range(0, len(where), at_once):
                some = where[first : first + at_once]
                batch = torch.stack([split[i][j] for i, j in some])
                done = orthogonalize(batch, self.config.iterations)
                done = (done.float() * scale(shape, self.config.scale)).to(self.dtype)
                for (i, j), matrix in zip(some, done, strict=True):
                    split[i][j] = matrix
        return {i: self._join(i, matrices) for i, matrices in split.items()}

    def _split(self, number: int, whole: Tensor) -> list[Tensor]:
        """The matrices [rows, columns] that a parameter is made of."""
        if (fused := self.fused[self.names[number]]) is None:
            return [whole]
        groups, rows = fused
        parts = whole.reshape(groups, sum(rows), whole.shape[-1]).split(rows, 1)
        return [part.flatten(0, 1) for part in parts]

    def _join(self, number: int, matrices: list[Tensor]) -> Tensor:
        """The reverse."""
        if (fused := self.fused[self.names[number]]) is None:
            return matrices[0]
        parts = torch.cat([m.unflatten(0, (fused[0], -1)) for m in matrices], 1)
        return parts.reshape(self.sources[self.names[number]].shape)

    def states(self) -> dict[str, tuple[Tensor, Tensor]]:
        """`momentum/<parameter>`, fp32."""
        pairs = zip(self.sources.items(), self.momentum, strict=True)
        return {f"momentum/{name}": (source, values) for (name, source), values in pairs}

    def set_step(self, step: int, later: Mapping[str, int]) -> None:
        self.count = step  # of the momentum's warmup, which is the run's, not a parameter's


def momentum_at(step: int, config: MuonConfig) -> float:
    """Momentum of update number `step` (from 1): linear up to `momentum` at update
    `momentum_warmup` + 1."""
    if config.momentum_warmup == 0:
        return config.momentum
    share = min(1.0, (step - 1) / config.momentum_warmup)
    return (1 - share) * config.momentum_start + share * config.momentum


def scale(shape: torch.Size, name: str) -> float:
    """What an orthogonal update of this shape is multiplied with. `moonshot` (Liu et al., arXiv
    2502.16982) gives it the size that AdamW's updates have."""
    rows, columns = shape
    if name == "moonshot":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def orthogonalize(batch: Tensor, iterations: int) -> Tensor:
    """Replace the singular values of matrices [n, rows, columns] by ones, roughly (Newton-Schulz),
    in the dtype in which they come."""
    tall = batch.shape[1] > batch.shape[2]
    x = batch.mT if tall else batch
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


def _cost(shape: torch.Size) -> float:
    """Of one iteration, in multiply-adds."""
    small, large = sorted(shape)
    return float(2 * small * small * large + small**3)
