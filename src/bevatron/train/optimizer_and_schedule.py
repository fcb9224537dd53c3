"""How parameters are updated: by which rule, at which learning rate, by which algorithm.

- A parameter's role decides its rule, for the whole model and before anything is placed. A rule
  says AdamW or Muon, the weight decay, and a multiple of the learning rate.
- The learning rate is a pure function of the update's number. Update 1 is the first; with a warmup
  its rate is lr / warmup_steps, never zero. (transformers counts from zero, so its first update
  changes nothing; ours is its second.) Every shape but `constant` reaches `min_lr` at update
  `steps`, the last one.
- The optimizer is AdamW, or Muon (`muon.py`) for the layers' matrices and AdamW for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from bevatron.checkpoint.rank_boxes import local
from bevatron.parallel.placement import Placed
from bevatron.spec import ModelSpec, Role
from bevatron.train.config import OptimizerConfig, ScheduleConfig
from bevatron.train.muon import Muon

MATRICES: frozenset[Role] = frozenset({"qkv", "o", "gate_up", "up", "down", "linear"})
# NanoChat's, as multiples of the matrices' rate; what it has none of (norms, biases) as its head.
NANOCHAT_SCALES: dict[Role, float] = {"embedding": 10.0, "head": 0.2}
NANOCHAT_SCALES |= {"score": 0.2, "norm": 0.2, "bias": 0.2}
FUSED = ("cpu", "cuda", "xpu", "mps")  # devices with a kernel for all of AdamW's update

NONE_LATER: Mapping[str, int] = MappingProxyType({})
MOMENTS = ("exp_avg", "exp_avg_sq")

# Checkpoint name (kind/parameter) -> the parameter that says which box it is, this rank's values.
States = dict[str, tuple[Tensor, Tensor]]


# --- rules ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How a parameter is updated: at `lr_scale` times the run's learning rate."""

    algorithm: Literal["adamw", "muon"]
    weight_decay: float
    lr_scale: float


@dataclass(frozen=True)
class Group:
    """Roles that are updated alike, and how many parameters those are in the whole model."""

    rule: Rule
    roles: tuple[Role, ...]
    parameters: int

    def __str__(self) -> str:
        rule = self.rule
        return (
            f"{rule.algorithm:<6} {', '.join(self.roles)}: {self.parameters:,} parameters, "
            f"weight decay {rule.weight_decay:g}, lr x {rule.lr_scale:g}"
        )


def rule(role: Role, spec: ModelSpec, config: OptimizerConfig) -> Rule:
    """How parameters of a role are updated.

    A magnitude does not decay, for that would shrink the weights of the model that is adapted.
    Where `lr_scale` does not name a role it is 1; with Muon in NanoChat's scale, NanoChat's own
    multiple (a tied embedding takes the head's)."""
    muon = config.name == "muon"
    scale = 1.0
    if muon and config.muon.scale == "nanochat":
        known: Role = "head" if role == "embedding" and spec.tied else role
        scale = NANOCHAT_SCALES.get(known, 1.0)
    return Rule(
        "muon" if muon and role in MATRICES else "adamw",
        0.0 if role in (*config.no_decay, "magnitude") else config.weight_decay,
        config.lr_scale.get(role, scale),
    )


def groups(spec: ModelSpec, config: OptimizerConfig, frozen: Collection[str] = ()) -> list[Group]:
    """The model's parameters by how they are updated, to be shown before a run."""
    found: dict[Rule, tuple[dict[Role, None], int]] = {}
    for parameter in spec.parameters():
        if parameter.name in frozen:
            continue
        key = rule(parameter.role, spec, config)
        roles, count = found.get(key, ({}, 0))
        found[key] = ({**roles, parameter.role: None}, count + parameter.numel)
    return [Group(key, tuple(roles), count) for key, (roles, count) in found.items()]


# --- the learning rate ----------------------------------------------------------------------------


def learning_rate(step: int, schedule: ScheduleConfig, *, steps: int, lr: float) -> float:
    """Rate of update number `step` (from 1) of a run of `steps`, whose highest rate is `lr`."""
    warmup, low = schedule.warmup_steps, schedule.min_lr
    if step <= warmup:
        return lr * step / warmup
    if schedule.name == "constant":
        return lr
    start, shape = warmup, schedule.name
    if schedule.name == "wsd":
        start, shape = max(warmup, steps - decay_steps(schedule, steps)), schedule.decay
    progress = (step - start) / max(1, steps - start)
    return low + (lr - low) * _remaining(shape, min(1.0, max(0.0, progress)))


def decay_steps(schedule: ScheduleConfig, steps: int) -> int:
    """How many updates at the end of a `wsd` run decay."""
    if schedule.decay_steps is not None:
        return schedule.decay_steps
    return max(1, round(schedule.decay_fraction * steps))


def _remaining(shape: str, progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1."""
    if shape == "linear":
        return 1.0 - progress
    if shape == "one_sqrt":
        return 1.0 - math.sqrt(progress)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


# --- the optimizer --------------------------------------------------------------------------------


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
