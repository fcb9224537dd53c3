"""The section `adapter` of a configuration: what is trained beside a model that is held still."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field, field_validator

from bevatron.errors import BevatronError
from bevatron.spec import ModelSpec, SpecError
from bevatron.spec.adapter import MAPS, Adapter
from bevatron.train.config_objective import Section

Target = Literal["qkv", "o", "gate_up", "up", "down", "linear", "q", "k", "v", "gate"]


class AdapterConfig(Section):
    """Small matrices beside linear maps of a model that is held still, at `model.init`: they alone
    are trained, and saved."""

    kind: Literal["lora", "dora"] = "lora"
    """lora adds a product of two small matrices to a weight; dora learns the length of each row of
    the sum apart."""
    rank: int = Field(16, ge=1)
    """Rows of the first of the two matrices, peft's `r`."""
    alpha: float = Field(32.0, gt=0)
    """The product is multiplied by alpha / rank."""
    rslora: bool = False
    """Multiply it by alpha / sqrt(rank) instead."""
    targets: list[Target] = Field([])
    """Which linear maps of a layer: qkv (or some of q, k, v), o, gate_up (or gate, up; the up of an
    MLP without a gate), down, and linear where one stands for a whole sublayer. If absent, all."""
    layers: str | None = Field(None, examples=["16-31"])
    """Which layers, counted from 0, such as 16-31 or 3,5; if absent, all."""
    fused: bool = False
    """q, k and v share the first of the two matrices, and gate and up do, as they share an input;
    if not, each has its own, as in peft."""
    whole: list[str] = Field([])
    """Parameters of the model that are trained whole and saved besides, by their native names, as
    in [embed.*, head.*] (peft's modules_to_save); `*` stands for anything. A new head always is."""

    init: str | None = None
    """An adapter to begin with: another run's, or a folder of peft, of these settings; if absent, A
    is random and B zero, so that the run begins as its base."""

    @field_validator("targets")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        return list(dict.fromkeys(value))

    @field_validator("layers")
    @classmethod
    def _ranges(cls, value: str | None) -> str | None:
        if value is not None:
            numbers(value)
        return value


def numbers(text: str) -> tuple[int, ...]:
    """`16-31` or `3,5` as numbers, in order. Raises ValueError."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError("expected numbers of layers such as 16-31 or 3,5")
        ends = int(first), int(last or first)
        if ends[1] < ends[0]:
            raise ValueError(f"{part.strip()} ends before it begins")
        found |= set(range(ends[0], ends[1] + 1))
    return tuple(sorted(found))


def adapted(spec: ModelSpec, config: AdapterConfig, fresh: Sequence[str] = ()) -> ModelSpec:
    """The model with the adapter.

    Args:
        fresh: parameters of a new head, which are trained whole.
    Raises BevatronError for targets, layers or parameters that the model has not."""
    names = [p.name for p in spec.parameters()]
    whole = list(fresh)
    for pattern in config.whole:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            near = ", ".join(difflib.get_close_matches(pattern, names, 3) or names[:3])
            raise BevatronError(
                f"adapter.whole: {pattern} is not a parameter of the model; near it are {near}"
            )
        whole += matched
    known = {p.role for p in spec.parameters()}
    made = Adapter(
        kind=config.kind,
        rank=config.rank,
        alpha=config.alpha,
        targets=tuple(config.targets) or tuple(role for role in MAPS if role in known),
        rslora=config.rslora,
        fused=config.fused,
        layers=None if config.layers is None else numbers(config.layers),
        whole=tuple(name for name in names if name in whole),
    )
    try:
        return spec.with_adapter(made)
    except SpecError as error:
        raise BevatronError(str(error)) from None
