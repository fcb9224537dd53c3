"""What updates the parameters: AdamW, or Muon for the layers' matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from bevatron.checkpoint.rank_boxes import local
from bevatron.parallel.placement import Placed
from bevatron.train.config import OptimizerConfig
from bevatron.train.muon import Muon
from bevatron.train.update_rules import Rule, rule

FUSED = ("cpu", "cuda", "xpu", "mps")  # devices with a kernel for all of AdamW's update

NONE_LATER: Mapping[str, int] = MappingProxyType({})
MOMENTS = ("exp_avg", "exp_avg_sq")

# Checkpoint name (kind/parameter) -> the parameter that says which box it is, this rank's values.
States = dict[str, tuple[Tensor, Tensor]]


class Algorithm(Protocol):
    """Updates some of this rank's parameters."""

    def step(self, lr: float) -> None:
        """Update them from their gradients, which are dropped afterwards. Collective."""

    def states(self) -> States:
        """What it remembers between updates, to be saved, or filled by a load."""

    def set_step(self, step: int, later: Mapping[str, int]) -> None:
        """How many updates it has seen; of the parameters in `later` so many, as they were frozen
        before."""


class Optimizer:
    """The algorithms of a run, together."""

    def __init__(self, parts: list[Algorithm]) -> None:
        self.parts = parts

    def step(self, lr: float) -> None:
        for part in self.parts:
            part.step(lr)

    def states(self) -> States:
        return {name: state for part in self.parts for name, state in part.states().items()}

    def set_step(self, step: int, later: Mapping[str, int] = NONE_LATER) -> None:
        for part in self.parts:
            part.set_step(step, later)


def make_optimizer(placed: Placed, config: OptimizerConfig, dtype: torch.dtype) -> Optimizer:
    """The optimizer of a placed model. `dtype`: that the run computes in."""
    spec = placed.spec
    rules = {p.name: rule(p.role, spec, config) for p in spec.parameters()}
    rules |= {name: rule("score", spec, config) for name in placed.added}
    trained = placed.trained
    matrices = {n: p for n, p in trained.items() if rules[n].algorithm == "muon"}
    rest = {n: p for n, p in trained.items() if n not in matrices}
    parts: list[Algorithm] = [AdamW(rest, rules, betas=config.betas, eps=config.eps)]
    if matrices:
        parts.append(Muon(matrices, rules, spec, config.muon, dtype, placed.grid))
    return Optimizer(parts)


class AdamW:
    """torch's AdamW (Loshchilov and Hutter, arXiv 1711.05101) on this rank's local shards.

    The shards are fp32 masters; every element is updated where it lies, so the layout cannot
    matter."""

    def __init__(
        self,
        sources: Mapping[str, Tensor],
        rules: Mapping[str, Rule],
        *,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self.sources = sources
        self.shards: dict[str, nn.Parameter] = {}
        by_rule: dict[Rule, list[Tensor]] = {}
        for name, parameter in sources.items():
            self.shards[name] = nn.Parameter(local(parameter.detach()))
            by_rule.setdefault(rules[name], []).append(self.shards[name])
        options = [
            {"params": shards, "weight_decay": rule.weight_decay, "lr_scale": rule.lr_scale}
            for rule, shards in by_rule.items()
        ]
        fused = all(shard.device.type in FUSED for shard in self.shards.values())
        self.inner = None
        if options:
            self.inner = torch.optim.AdamW(options, betas=betas, eps=eps, fused=fused)
        for shard in self.shards.values():
            self._state(shard)

    def _state(self, shard: Tensor) -> dict[str, Tensor]:
        """This shard's moments, made on first use so that a load can fill them."""
        assert self.inner is not None
        state: dict[str, Tensor] = self.inner.state[shard]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=shard.device)
            state |= {name: torch.zeros_like(shard) for name in MOMENTS}
            self.inner.state[shard] = state
        return state

    def step(self, lr: float) -> None:
        for name, parameter in self.sources.items():
            assert parameter.grad is not None
            self.shards[name].grad = local(parameter.grad)
        if self.inner is not None:
            for group in self.inner.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self.inner.step()
        for name, parameter in self.sources.items():
            parameter.grad = self.shards[name].grad = None

    def states(self) -> States:
        return {
            f"{kind}/{name}": (self.sources[name], self._state(shard)[kind])
            for name, shard in self.shards.items()
            for kind in MOMENTS
        }

    def set_step(self, step: int, later: Mapping[str, int]) -> None:
        for name, shard in self.shards.items():
            self._state(shard)["step"].fill_(float(later.get(name, step)))
