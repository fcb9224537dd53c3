"""`Option`: how a field of a dataclass becomes an option of a verb.

An `Option` stands in the field's annotation, `Annotated[int, Option("How many.", min=1)]`, and
`cli/dataclass_options.py` makes the command line from it. So an option is spelled once. This file
imports nothing heavy, so any room can use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Option:
    """Attributes:
    help: what the help of the verb says of it.
    name: such as `--span`; by default the field's.
    read: text (or what `of` is: a path) -> value, of what is spelled otherwise than its value;
        raises BevatronError. `shown`: the default as that text.
    words: what `--` does not stand before, under this name in the help.
    """

    help: str = ""
    name: str | None = None
    min: int | None = None
    read: Callable[[Any], Any] | None = None
    of: type = str
    shown: str | None = None
    words: str | None = None


def described(kind: type) -> dict[str, tuple[Any, Option]]:
    """The fields of a dataclass: their type, and how they are options."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        own, *more = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        option = next((m for m in more if isinstance(m, Option)), Option())
        found[name] = own, option
    return found


def name_of(field: str, option: Option) -> str:
    """Such as `--seq-len`."""
    return option.name or f"--{field.replace('_', '-')}"


def arguments(options: Any) -> list[str]:
    """The words that give a verb these options, for another process. No field may have a `read`."""
    words: list[str] = []
    known = described(type(options))
    for field in fields(options):
        name, value = name_of(field.name, known[field.name][1]), getattr(options, field.name)
        if isinstance(value, bool):
            words += [name] if value else []
        elif value is not None:
            for each in value if isinstance(value, tuple) else (value,):
                words += [name, str(each)]
    return words
