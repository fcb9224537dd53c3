"""Making a verb's options from a dataclass: every field becomes one, see `bevatron/option.py`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from bevatron.option import Option, described, name_of


def with_options(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, with an option for each field in the place of every parameter that is a dataclass.
    It is called with the dataclasses, made of what was given."""
    hints = get_type_hints(verb, include_extras=True)
    shown: list[inspect.Parameter] = []
    made: dict[str, Any] = {}
    for name, parameter in inspect.signature(verb).parameters.items():
        if is_dataclass(kind := hints[name]):
            made[name] = kind
            known = described(kind)  # type: ignore[arg-type]
            shown += [_option(field, *known[field.name]) for field in fields(kind)]
        else:
            shown.append(_parameter(name, kind, parameter.default))

    @wraps(verb)
    def run(**given: Any) -> None:
        for name, kind in made.items():
            values: dict[str, Any] = {}
            for each, (_, option) in described(kind).items():
                value = given.pop(each)
                if value is not None:  # else its default
                    value = tuple(value) if isinstance(value, list) else value
                    values[each] = value if option.read is None else option.read(value)
            given[name] = kind(**values)
        verb(**given)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in shown}
    return run


def _parameter(name: str, kind: Any, default: Any) -> inspect.Parameter:
    only = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, only, default=default, annotation=kind)


def _option(field: Field[Any], kind: Any, option: Option) -> inspect.Parameter:
    """A field as typer's option, or argument."""
    default = field.default
    required = default is MISSING and field.default_factory is MISSING
    if option.read is not None:
        kind, default = option.of | None, option.shown
    elif get_origin(kind) is tuple:
        kind, default = list[get_args(kind)[0]] | None, default or None  # type: ignore[misc]
    if required:
        default = inspect.Parameter.empty
    if option.words is not None:
        spelled: Any = typer.Argument(metavar=option.words, help=option.help)
    else:
        name = name_of(field.name, option)
        spelled = typer.Option(name, help=option.help or None, min=option.min)
    return _parameter(field.name, Annotated[kind, spelled], default)
