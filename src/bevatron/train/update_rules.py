"""How each parameter is updated: by which algorithm, with how much decay, at which multiple of the
learning rate. Its role decides, for the whole model and before anything is placed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from bevatron.spec import ModelSpec, Role
from bevatron.train.config import OptimizerConfig

MATRICES: frozenset[Role] = frozenset({"qkv", "o", "gate_up", "up", "down", "linear"})
# NanoChat's, as multiples of the matrices' rate; what it has none of (norms, biases) as its head.
NANOCHAT_SCALES: dict[Role, float] = {"embedding": 10.0, "head": 0.2}
NANOCHAT_SCALES |= {"score": 0.2, "norm": 0.2, "bias": 0.2}


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

    Where `lr_scale` does not name a role it is 1; with Muon in NanoChat's scale, NanoChat's own
    multiple (a tied embedding takes the head's)."""
    muon = config.name == "muon"
    scale = 1.0
    if muon and config.muon.scale == "nanochat":
        known: Role = "head" if role == "embedding" and spec.tied else role
        scale = NANOCHAT_SCALES.get(known, 1.0)
    return Rule(
        "muon" if muon and role in MATRICES else "adamw",
        0.0 if role in config.no_decay else config.weight_decay,
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
