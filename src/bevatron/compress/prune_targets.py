"""Pruning targets as the command line and files spell them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bevatron.checkpoint.strict_json import read_object
from bevatron.compress.pruned_spec import LayerTarget, PruneError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_KEYS = ("intermediate_size", "num_attention_heads", "attention", "mlp")


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
