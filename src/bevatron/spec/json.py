"""spec.json: a ModelSpec as text, one layer a line, read back strictly.

Every field is written and every field is required, so a file says all there is to know about the
model and does not change its meaning when a default does. (Fields that came later may be absent
from older files, which then mean what they always did.) A sublayer is an object with a `kind`,
one of `sublayer.KINDS` with its fields, or "no-op" for one that is absent.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, TypeVar

from bevatron.spec.model import Init, LayerSpec, ModelSpec
from bevatron.spec.parameter import SpecError
from bevatron.spec.rope import Rope
from bevatron.spec.sublayer import KINDS, Sublayer

T = TypeVar("T")

_PLACES = ("attention", "mlp")
_ADDED: dict[type, tuple[str, ...]] = {
    ModelSpec: ("head", "adapter"),
    Init: ("depth_scaled",),
    Rope: ("beta_fast", "beta_slow", "attention_factor", "truncate"),
}


def to_json(spec: ModelSpec) -> str:
    """The text of spec.json, ending in a newline. `from_json` gives back an equal spec."""
    layers = [
        {place: _sublayer_object(getattr(layer, place)) for place in _PLACES}
        for layer in spec.layers
    ]
    lines = []
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name == "adapter" and value is None:
            continue
        if field.name == "layers":
            rows = ",\n".join(f"    {_dump(layer)}" for layer in layers)
            lines.append(f'  "layers": [\n{rows}\n  ]')
        else:
            nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
            text = _dump(dataclasses.asdict(value) if nested else value)
            lines.append(f'  "{field.name}": {text}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def from_json(text: str) -> ModelSpec:
    """Read what `to_json` wrote.

    Raises SpecError naming the path of the first unknown or missing key, wrong type or value, such
    as `layers.3.attention.head_dim`.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise SpecError(
            f"spec.json: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg})"
        ) from error
    except RecursionError as error:
        raise SpecError("spec.json: nested too deeply to be a spec") from error
    except ValueError as error:  # an integer of thousands of digits
        raise SpecError(f"spec.json: {error}") from error
    return _read(ModelSpec, data, "")


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _sublayer_object(value: Any) -> dict[str, Any]:
    if value is None:
        return {"kind": "no-op"}
    return {"kind": value.kind, **dataclasses.asdict(value)}


def _read(cls: type[T], data: Any, path: str) -> T:
    """An object with exactly the fields of the dataclass `cls`."""
    place = path or "spec.json"
    data = _object(data, place)
    known = typing.get_type_hints(cls)
    hints = {field.name: known[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    added = cls.added if issubclass(cls, Sublayer) else _ADDED.get(cls, ())
    _same_keys(data, list(hints), path, optional=added)
    present = [name for name in hints if name in data]
    values = {name: _value(hints[name], data[name], _join(path, name)) for name in present}
    try:
        return cls(**values)
    except SpecError as error:
        message = str(error)
        if message.startswith("layers."):  # the model's own check already names the layer
            raise
        raise SpecError(f"{place}: {message.partition(': ')[2] or message}") from error


def _layers(data: Any, path: str) -> tuple[LayerSpec, ...]:
    if not isinstance(data, list):
        raise SpecError(f"{path}: expected a list with one object per layer, found {_shown(data)}")
    layers = []
    for i, item in enumerate(data):
        place = _join(path, str(i))
        layer = _object(item, place)
        _same_keys(layer, list(_PLACES), place)
        parts = {name: _sublayer(name, layer[name], _join(place, name)) for name in _PLACES}
        layers.append(LayerSpec(**parts))
    return tuple(layers)


def _sublayer(place: str, data: Any, path: str) -> Any:
    data = dict(_object(data, path))
    kinds = {kind: cls for kind, cls in KINDS.items() if place in cls.places}
    expected = f"{', '.join(map(repr, kinds))} or 'no-op'"
    if "kind" not in data:
        raise SpecError(f"{path}.kind: missing; write {expected}")
    kind = data.pop("kind")
    if kind == "no-op":
        _same_keys(data, [], path)
        return None
    if not isinstance(kind, str) or kind not in kinds:
        raise SpecError(f"{path}.kind: found {_shown(kind)}, expected {expected}")
    return _read(kinds[kind], data, path)


def _value(hint: Any, data: Any, path: str) -> Any:
    if hint == tuple[LayerSpec, ...]:
        return _layers(data, path)
    if hint == tuple[str, ...]:
        if not isinstance(data, list) or not all(isinstance(item, str) for item in data):
            raise SpecError(f"{path}: found {_shown(data)}, expected a list of strings")
        return tuple(data)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(option, type) and data is not None:
            return _read(option, data, path)
        if option is type(None) and data is None:
            return None
        if option is bool and isinstance(data, bool):
            return data
        if option is int and type(data) is int:
            return data
        if option is str and isinstance(data, str):
            return data
        integers = isinstance(data, list) and all(type(item) is int for item in data)
        if option == tuple[int, ...] and integers:
            return tuple(data)
        if option is float and type(data) in (int, float) and math.isfinite(data):
            return float(data)
        if typing.get_origin(option) is typing.Literal and data in typing.get_args(option):
            return data
    expected = " or ".join(_expected(option) for option in options)
    raise SpecError(f"{path}: found {_shown(data)}, expected {expected}")


def _expected(option: Any) -> str:
    if typing.get_origin(option) is typing.Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(option))
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    names[type(None)] = "null"
    names[tuple[int, ...]] = "a list of integers"
    return names.get(option, "an object {...}")


def _object(data: Any, place: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise SpecError(f"{place}: expected an object {{...}}, found {_shown(data)}")
    return data


def _same_keys(
    data: dict[str, Any], expected: list[str], path: str, optional: tuple[str, ...] = ()
) -> None:
    for key in data:
        if key not in expected:
            known = ", ".join(expected) or "none"
            raise SpecError(f"{_join(path, key)}: unknown key; known here are {known}")
    for key in expected:
        if key not in data and key not in optional:
            raise SpecError(f"{_join(path, key)}: missing; spec.json holds every field")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise SpecError(f"spec.json: the key {key!r} appears twice in one object; keep one")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise SpecError(f"spec.json: holds {name}, which is not JSON; write a number")
