"""The spec of an MLP, with or without a gate.

Layout of the fused matrix: `gate_up` [2, f, h], gate rows, then up rows; f intermediate_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from bevatron.spec.parameter import Axis, ParameterSpec, Role, SpecError
from bevatron.spec.sublayer import Sublayer, uneven_cut


@dataclass(frozen=True)
class MLP(Sublayer, kind="mlp", places=("mlp",)):
    """`down(act(up(x)))`, or with a gate `down(act(gate(x)) * up(x))`."""

    unit: ClassVar[str] = "neurons"
    unit_field: ClassVar[str] = "intermediate_size"

    intermediate_size: int
    activation: Literal["silu", "relu2"] = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        if self.intermediate_size < 1:
            raise SpecError(
                f"mlp: intermediate_size is {self.intermediate_size}, expected at least 1"
            )
        if self.activation not in ("silu", "relu2"):
            raise SpecError(f"mlp: activation {self.activation!r} is not one of silu, relu2")

    def parameters(self, prefix: str, hidden_size: int) -> Iterator[ParameterSpec]:
        f, h = self.intermediate_size, hidden_size
        name, lead = ("gate_up", (2, f)) if self.gated else ("up", (f,))
        role: Role = "gate_up" if self.gated else "up"
        fused = (1, (f, f)) if self.gated else None
        axes: tuple[Axis, ...] = ("other", "units") if self.gated else ("units",)
        yield ParameterSpec(f"{prefix}.{name}.weight", (*lead, h), role, (*axes, "hidden"), fused)
        if self.bias:
            yield ParameterSpec(f"{prefix}.{name}.bias", lead, "bias", axes, fused)
        yield ParameterSpec(f"{prefix}.down.weight", (h, f), "down", ("hidden", "units"))
        if self.bias:
            yield ParameterSpec(f"{prefix}.down.bias", (h,), "bias", ("hidden",))

    def cut(self, name: str, tp: int) -> int | None:
        known = {"gate_up.weight": 1, "gate_up.bias": 1, "up.weight": 0, "up.bias": 0}
        return (known | {"down.weight": 1}).get(name)

    def cut_problem(self, place: str, tp: int) -> str | None:
        return uneven_cut(f"{place}: intermediate_size", self.intermediate_size, tp)

    def activation_bytes(self, itemsize: int, tp: int, cp: int) -> float:
        kept = 4 if self.gated else 2  # gate and up, act(gate), the product; or relu, squared
        return kept * self.intermediate_size * itemsize / tp

    def product_bytes(self, itemsize: int, tp: int) -> float:
        return (2 if self.gated else 1) * self.intermediate_size / tp * itemsize

    def describe(self) -> str:
        gated = "gated " if self.gated else ""
        return f"{gated}{self.activation} {self.intermediate_size}"
