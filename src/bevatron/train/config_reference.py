"""Every key of a run configuration: its type, default and meaning, read off `config.py`.

`python -m bevatron.train.config_reference` prints docs/configuration.md, `bevatron train
--print-config` a configuration with every key. Both follow from `config.py` alone.
"""

from __future__ import annotations

import difflib
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bevatron.errors import BevatronError
from bevatron.spec import Role
from bevatron.train.config import RunConfig
from bevatron.train.config_objective import fields_of

WIDTH = 96
ROLES = ", ".join(f"`{role}`" for role in typing.get_args(Role))
INTRODUCTION = f"""\
# Every key of a run configuration

Made of the code by `make docs`, to which a test holds it. `bevatron train --print-config` prints a
configuration with every key, `bevatron train CONFIG --print-config` what a given one comes to. The
same keys are overrides on the command line, as in `train.steps=500 data.train.0.weight=2`.
[training.md](training.md) says how they work together.

Unknown keys are refused. A default of `null` means that the key is absent; **required** ones have
no default. `N` stands for an item of a list, counted from 0. Roles of parameters are
{ROLES}.
"""


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        path: dotted, as overrides spell it, with N for an item of a list.
        kind: its type in words.
        default: as YAML; None where one has to be given.
        section: the model of what is below it, if it is a section or a list of such.
        listed: whether it is a list of sections.
        example: a value to start from, where the default is not enough.
    """

    path: str
    kind: str
    default: str | None
    meaning: str
    section: type[BaseModel] | None = None
    listed: bool = False
    example: Any = None

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


def keys_of(section: type[BaseModel], path: str = "") -> Iterator[Key]:
    """The keys of a section, in order, without what is below them."""
    for name, field in fields_of(section).items():
        dotted = f"{path}.{field.alias or name}" if path else field.alias or name
        inner, listed = _section(field.annotation)
        yield Key(
            path=dotted,
            kind=_kind(field.annotation, field.metadata),
            default=_default(field),
            meaning=" ".join((field.description or "").split()),
            section=inner,
            listed=listed,
            example=field.examples[0] if field.examples else None,
        )


def every_key(section: type[BaseModel] = RunConfig, path: str = "") -> Iterator[Key]:
    """All keys, each before what is below it."""
    for key in keys_of(section, path):
        yield key
        if key.section is not None:
            yield from every_key(key.section, f"{key.path}.N" if key.listed else key.path)


def known_keys(names: Sequence[str], where: str) -> frozenset[str]:
    """These names of keys and sections. Raises BevatronError, beginning with `where`, for one that
    is none, naming the nearest."""
    known = [key.path for key in every_key()]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BevatronError(f"{where}: {name!r} is not a key of a run configuration{hint}")
    return frozenset(names)


def markdown() -> str:
    """The reference: a table for each section."""
    parts = [INTRODUCTION]
    for top in keys_of(RunConfig):
        if top.section is None:
            said = f"{top.kind}, default {_shown(top.default)}. {top.meaning}"
            parts.append(f"## `{top.path}`\n\n{said[0].upper()}{said[1:]}\n")
            continue
        doc = " ".join((top.section.__doc__ or "").split())
        if top.default == "null":
            doc += " The section may be absent."
        rows = [
            f"| `{key.path}` | {key.kind} | {_shown(key.default)} | {key.meaning} |"
            for key in every_key(top.section, top.path)
        ]
        head = "| key | type | default | meaning |\n|---|---|---|---|\n"
        body = "\n".join(row.replace("||", r"\|\|") for row in rows)
        parts.append(f"## `{top.path}`\n\n{doc}\n\n{head}{body}\n")
    return "\n".join(parts)


def default_yaml() -> str:
    """A configuration with every key, its default, and its meaning as a comment."""
    top = [
        "Every key of a run configuration with its default. Those marked >> have none, and hold an",
        "example; all others may be left out.",
    ]
    lines = [*(f"# {line}" for line in top), ""]
    for key in keys_of(RunConfig):
        lines += [*_yaml(key, 0), ""]
    return "\n".join(lines)


def _yaml(key: Key, depth: int) -> list[str]:
    pad = "  " * depth
    lines = _comment(key, pad)
    if key.section is not None and not key.listed and key.default != "null":
        lines.append(f"{pad}{key.name}:")
        for inner in keys_of(key.section, key.path):
            lines += _yaml(inner, depth + 1)
        return lines
    value = key.default if key.example is None else _flow(key.example)
    if key.section is not None:  # not there by default: what it could hold, as comments
        for inner in every_key(key.section, f"{key.name}.N" if key.listed else key.name):
            said = f"{inner.path}: {inner.meaning} [{inner.kind}]"
            lines += textwrap.wrap(
                said, WIDTH, initial_indent=f"{pad}#   ", subsequent_indent=f"{pad}#     "
            )
    lines.append(f"{pad}{key.name}: {value}")
    return lines


def _comment(key: Key, pad: str) -> list[str]:
    mark = "# >> " if key.example is not None else "# "
    kind = "" if key.section is not None else f" [{key.kind}]"
    said = f"{key.meaning}{kind}"
    return textwrap.wrap(
        said, WIDTH, initial_indent=pad + mark, subsequent_indent=f"{pad}# ", break_on_hyphens=False
    )


def _shown(default: str | None) -> str:
    return "**required**" if default is None else f"`{default}`" if default else ""


def _default(field: FieldInfo) -> str | None:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        inner, listed = _section(field.annotation)
        return None if inner is None or listed else ""
    return "" if isinstance(value, BaseModel) else _flow(value)


def _flow(value: Any) -> str:
    """As one line of YAML that reads back as the same value."""
    if isinstance(value, tuple):
        value = list(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _section(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a type stands for, and whether it is a list of them."""
    for one in _alternatives(annotation):
        if typing.get_origin(one) is Annotated:
            return _section(typing.get_args(one)[0])
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one, False
        if typing.get_origin(one) is list:
            inner, _ = _section(typing.get_args(one)[0])
            if inner is not None:
                return inner, True
    return None, False


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


NAMES: dict[Any, str] = {
    Any: "anything",
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
}


def _kind(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """A type in words."""
    found = [_one_kind(a, metadata) for a in _alternatives(annotation) if a is not type(None)]
    return " or ".join(found)


def _one_kind(annotation: Any, metadata: list[Any] | tuple[Any, ...]) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        bounds = [b for m in arguments[1:] for b in getattr(m, "metadata", [m])]
        return _kind(arguments[0], bounds)
    if annotation is Role or arguments == typing.get_args(Role):
        return "role"
    if origin is Literal:
        *others, last = [f"`{a}`" for a in arguments]
        return f"{', '.join(others)} or {last}" if others else last
    if origin is list:
        least = any(isinstance(m, annotated_types.MinLen) and m.min_length for m in metadata)
        return f"list of {_plural(arguments[0])}{', not empty' if least else ''}"
    if origin is dict:
        return f"map from {_kind(arguments[0])} to {_kind(arguments[1])}"
    if origin is tuple:
        return "pair of " + _plural(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return " ".join([NAMES[annotation], *_bounds(metadata)])


def _plural(annotation: Any) -> str:
    first, _, rest = _kind(annotation).partition(" ")
    plural = first if first == "text" or first.startswith("`") else first + "s"
    return f"{plural} {rest}".strip()


def _bounds(metadata: list[Any] | tuple[Any, ...]) -> Iterator[str]:
    signs = (("ge", "from {:g}"), ("gt", "above {:g}"), ("le", "to {:g}"), ("lt", "below {:g}"))
    for attribute, words in signs:
        for bound in metadata:
            if (value := getattr(bound, attribute, None)) is not None:
                yield words.format(value)


if __name__ == "__main__":
    print(markdown(), end="")
