"""What one parameter of a model is, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bevatron.errors import BevatronError

Role = Literal[
    "embedding", "head", "score", "norm", "bias", "qkv", "o", "gate_up", "up", "down", "linear",
    "lora_a", "lora_b", "magnitude",
]  # fmt: skip
Shape = tuple[int, ...]
# What one dimension of a parameter counts: channels of the residual stream; units of the sublayer
# (see `Sublayer.units`), each of one entry or of several neighbouring ones; or something else.
Axis = Literal["hidden", "units", "other"]


class SpecError(BevatronError):
    """A spec that describes no model."""


@dataclass(frozen=True)
class ParameterSpec:
    """One native parameter: its name, its global shape, and what it does.

    Attributes:
        axes: what each dimension counts.
        fused: of several matrices in one, (groups, rows of each matrix in a group): its rows are,
            group by group, so many of the first matrix, which are units, then of the second, ...
    """

    name: str
    shape: Shape
    role: Role
    axes: tuple[Axis, ...]
    fused: tuple[int, tuple[int, ...]] | None = None

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n
