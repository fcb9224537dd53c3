"""The spec of one matrix that takes the place of an attention or an MLP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bevatron.spec.parameter import ParameterSpec
from bevatron.spec.sublayer import Sublayer


@dataclass(frozen=True)
class Linear(Sublayer, kind="linear", places=("attention", "mlp")):
    """A sublayer replaced by one square matrix without bias (Llama-Nemotron)."""

    def parameters(self, prefix: str, hidden_size: int) -> Iterator[ParameterSpec]:
        shape = (hidden_size, hidden_size)
        yield ParameterSpec(f"{prefix}.linear.weight", shape, "linear", ("hidden", "hidden"))

    def cut(self, name: str, tp: int) -> int | None:
        return 1

    def activation_bytes(self, itemsize: int, tp: int, cp: int) -> float:
        return 0.0

    def product_bytes(self, itemsize: int, tp: int) -> float:
        return 0.0

    def describe(self) -> str:
        return "linear"
