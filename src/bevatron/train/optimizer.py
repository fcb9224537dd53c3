"""AdamW on fp32 shards, with weight decay by role."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bevatron.checkpoint.shard import local
from bevatron.parallel.place import Placed

STATES = ("exp_avg", "exp_avg_sq")


class AdamW:
    """torch's AdamW (Loshchilov and Hutter, arXiv 1711.05101) on this rank's local shards.

    The shards are fp32 masters; every element is updated where it lies, so the layout cannot
    matter. Norms, biases and embeddings are not decayed."""

    def __init__(
        self, placed: Placed, *, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.placed = placed
        roles = {p.name: p.role for p in placed.spec.parameters()}
        names = list(placed.parameters)
        self.shards: dict[str, nn.Parameter] = {}
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        self.sources = dict(zip(names, placed.trainable(), strict=True))
        for name, parameter in self.sources.items():
            shard = nn.Parameter(local(parameter.detach()))
            self.shards[name] = shard
            groups[roles[name] not in ("norm", "bias", "embedding")].append(shard)
        options = [
            {"params": shards, "weight_decay": weight_decay if decayed else 0.0}
            for decayed, shards in groups.items()
            if shards
        ]
        self.inner = torch.optim.AdamW(options, betas=betas, eps=eps) if options else None
        for shard in self.shards.values():
            self._state(shard)

    def _state(self, shard: Tensor) -> dict[str, Tensor]:
        """This shard's moments, made on first use so that a load can fill them."""
        assert self.inner is not None
        state: dict[str, Tensor] = self.inner.state[shard]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state |= {name: torch.zeros_like(shard) for name in STATES}
            self.inner.state[shard] = state
        return state

    def step(self, lr: float) -> None:
        """Update all shards from the parameters' gradients, which are dropped afterwards."""
        for name, parameter in self.sources.items():
            assert parameter.grad is not None
            self.shards[name].grad = local(parameter.grad)
        if self.inner is not None:
            for group in self.inner.param_groups:
                group["lr"] = lr
            self.inner.step()
        for name, parameter in self.sources.items():
            parameter.grad = self.shards[name].grad = None

    def states(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Checkpoint name -> (the parameter that says which box it is, this rank's values)."""
        return {
            f"{kind}/{name}": (self.sources[name], self._state(shard)[kind])
            for name, shard in self.shards.items()
            for kind in STATES
        }

    def set_step(self, step: int) -> None:
        """How many updates the moments have seen (for the bias correction)."""
        for shard in self.shards.values():
            self._state(shard)["step"].fill_(float(step))
