"""What an adapter adds to a model: small matrices beside some of its linear maps.

- LoRA (Hu et al., arXiv 2106.09685): y = W x + s B A x, with A [r, in], B [out, r]
- DoRA (Liu et al., arXiv 2402.09353): y = m (W + s B A) x / |W + s B A|, row by row; m [out]

s is alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732). A map that fuses several matrices
(qkv; gate_up) has an A for each of them, as if they were apart, or one for all (`fused`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bevatron.spec.parameter import ParameterSpec, Role, SpecError

# The matrices that a linear map of this role is fused of, in the order of its rows.
FUSED: dict[Role, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
MAPS: tuple[Role, ...] = ("qkv", "o", "gate_up", "up", "down", "linear")
TARGETS = (*MAPS, "q", "k", "v", "gate")
NAMES = ("lora_a", "lora_b", "magnitude")  # of the parameters beside a map's weight, and roles


@dataclass(frozen=True)
class Adapter:
    """The adapter of a model.

    Attributes:
        targets: of TARGETS. `gate_up` is also the `up` of an MLP without a gate, and `up` also one
            part of a gate_up.
        layers: which layers have it; None for all.
        whole: parameters of the model that are trained besides, whole, by name.
    """

    kind: Literal["lora", "dora"]
    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False
    fused: bool = False
    layers: tuple[int, ...] | None = None
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "dora"):
            raise SpecError(f"adapter: kind {self.kind!r} is not one of lora, dora")
        if self.rank < 1:
            raise SpecError(f"adapter: rank is {self.rank}, expected at least 1")
        if not 0 < self.alpha < math.inf:
            raise SpecError(f"adapter: alpha is {self.alpha}, expected more than 0")
        for target in self.targets:
            if target not in TARGETS:
                raise SpecError(f"adapter: target {target!r} is not one of {', '.join(TARGETS)}")
        if not self.targets:
            raise SpecError("adapter: it has no targets")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def parts(self, weight: ParameterSpec, layer: int) -> tuple[int, ...]:
        """Which of the matrices that a weight of this layer is fused of are adapted, by number;
        (0,) of one that is not fused, () if it is not adapted."""
        role = weight.role
        if role not in MAPS or (self.layers is not None and layer not in self.layers):
            return ()
        names = FUSED.get(role, (role,))
        if role in self.targets or (role == "up" and "gate_up" in self.targets):
            return tuple(range(len(names)))
        return tuple(i for i, name in enumerate(names) if name in self.targets)

    def lefts(self, parts: tuple[int, ...]) -> int:
        """How many A there are for these parts of a map."""
        return 1 if self.fused else len(parts)

    def beside(self, weight: ParameterSpec, layer: int) -> Iterator[ParameterSpec]:
        """The adapter's parameters at a weight of this layer, in order: A of all parts, one below
        the other, [parts * rank, in]; B [the weight's rows of these parts, rank], or in three
        dimensions as the weight is; and DoRA's magnitude of these rows."""
        parts = self.parts(weight, layer)
        if not parts:
            return
        prefix = weight.name.removesuffix("weight")
        rows, fused = weight.shape[:-1], weight.fused
        if fused is not None and len(parts) < len(fused[1]):
            groups, sizes = fused[0], tuple(fused[1][part] for part in parts)
            fused = (groups, sizes)
            rows = (groups * sum(sizes),) if len(rows) == 1 else (len(parts), *rows[1:])
        lefts = self.lefts(parts) * self.rank
        yield ParameterSpec(
            f"{prefix}lora_a", (lefts, weight.shape[-1]), "lora_a", ("other", weight.axes[-1])
        )
        axes = weight.axes[:-1]
        yield ParameterSpec(
            f"{prefix}lora_b", (*rows, self.rank), "lora_b", (*axes, "other"), fused
        )
        if self.kind == "dora":
            yield ParameterSpec(f"{prefix}magnitude", rows, "magnitude", axes, fused)

    def owns(self, name: str) -> bool:
        """Whether a parameter of this name is stored with the adapter and not with its base."""
        return name.rpartition(".")[2] in NAMES or name in self.whole


def adds_up_columns(weight: ParameterSpec) -> bool:
    """Whether tensor-parallel ranks share the columns of such a weight and add up their results (o,
    down, linear), rather than sharing its rows."""
    return weight.axes[0] == "hidden"
