"""What a user asks of pruning, as the command line and files spell it. No numpy and no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from bevatron.checkpoint.strict_json import read_object
from bevatron.errors import BevatronError
from bevatron.option import Option

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_KEYS = ("intermediate_size", "num_attention_heads", "attention", "mlp")
DEPTH_BY = ("influence", "loss", "span")


class PruneError(BevatronError):
    """Sizes that the model cannot be pruned to."""


@dataclass(frozen=True)
class LayerTarget:
    """Sizes of one layer; None leaves one as the other options have it."""

    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    no_attention: bool = False
    no_mlp: bool = False


def parse_count(text: str) -> int:
    """A parameter count: 4B, 4.5B, 350M, or plain digits."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.strip().upper().replace(",", ""))
    count = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if found and not found[2] and "." not in found[1]:
        count = int(found[1])
    if count < 1:
        raise PruneError(f"--params is {text!r}, expected a count such as 4B, 4.5B or 350M")
    return count


def parse_sizes(option: str, text: str | None) -> tuple[int, ...] | None:
    """Sizes to try, such as 3072,3584,4096."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,9}", part) and int(part) for part in parts):
        raise PruneError(f"{option} is {text!r}, expected sizes such as 3072,3584,4096")
    return tuple(sorted({int(part) for part in parts}))


def parse_share(option: str, text: str) -> float:
    """5% or 0.05."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    if not found:
        raise PruneError(f"{option} is {text!r}, expected a share such as 5%")
    return float(found[1]) / 100 if found[2] else float(found[1])


def parse_layers(text: str) -> tuple[int, ...]:
    """Layers counted from 0, such as 16-30 (both included) or 3,5,8-11."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise PruneError(f"{text!r} names no layers; expected such as 16-30 or 3,5,8-11")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(sorted(set(found)))


def read_per_layer(path: Path) -> dict[int, LayerTarget]:
    """A JSON object: layers of the model that is pruned ("3" or "4-7") -> an object with
    `intermediate_size`, `num_attention_heads`, or `attention` or `mlp` as "no-op"."""
    targets: dict[int, LayerTarget] = {}
    for name, value in read_object(path).items():
        target = _target(path, name, value)
        for i in parse_layers(name):
            if i in targets:
                raise PruneError(f"{path}: layer {i} has sizes twice; keep one")
            targets[i] = target
    return targets


def _target(path: Path, name: str, value: Any) -> LayerTarget:
    where = f"{path}: layer {name}"
    if not isinstance(value, Mapping):
        raise PruneError(f"{where} is {value!r}, expected an object with {', '.join(_KEYS)}")
    for key, found in value.items():
        if key not in _KEYS:
            raise PruneError(f"{where}: {key} is unknown; known are {', '.join(_KEYS)}")
        number = key in _KEYS[:2]
        if (number and (type(found) is not int or found < 1)) or not (number or found == "no-op"):
            expected = "a whole number of at least 1" if number else '"no-op"'
            raise PruneError(f"{where}: {key} is {found!r}, expected {expected}")
    return LayerTarget(
        value.get("intermediate_size"),
        value.get("num_attention_heads"),
        no_attention="attention" in value,
        no_mlp="mlp" in value,
    )


@dataclass(frozen=True)
class Targets:
    """What is asked for; None leaves an axis as it is.

    Attributes:
        num_layers: how many stay; `depth_by`: which ones, one of DEPTH_BY.
        drop_layers: which ones go, counted from 0.
        parameters: of the result; the widths that are not given are chosen to meet it.
        per_layer: by the layer's index in the model that is pruned.
        multiple: of chosen widths.
    """

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: Annotated[int | None, Option("Query heads; all KV heads stay.")] = None
    num_layers: Annotated[int | None, Option("How many stay; see --depth-by.")] = None
    drop_layers: Annotated[
        tuple[int, ...],
        Option("Which go, counted from 0, such as 15-30 or 3,5.", read=parse_layers),
    ] = ()
    parameters: Annotated[
        int | None,
        Option(
            "Such as 4B: chooses the widths that are not given.", name="--params", read=parse_count
        ),
    ] = None
    per_layer: Annotated[
        Mapping[int, LayerTarget],
        Option(
            "JSON: layer -> its sizes; the result's layers differ.",
            of=Path,
            read=read_per_layer,
        ),
    ] = field(default_factory=dict)
    multiple: Annotated[int, Option("Of widths that --params chooses.")] = 64
    depth_by: Annotated[
        str, Option("influence, loss, or span (neighbours) decides which layers go.")
    ] = "influence"

    def or_else(self, sizes: Mapping[str, Any]) -> Targets:
        """These, and where none are asked for those of a recipe's `prune` part. Which layers go is
        one choice: either is there or the recipe's are not looked at."""
        found = {name: value for name, value in sizes.items() if value is not None}
        if "drop_layers" in found:
            found["drop_layers"] = parse_layers(found["drop_layers"])
        own = {name for name in found if getattr(self, name) not in (None, ())}
        if self.num_layers is not None or self.drop_layers:
            own |= {"num_layers", "drop_layers"}
        return replace(self, **{name: value for name, value in found.items() if name not in own})
