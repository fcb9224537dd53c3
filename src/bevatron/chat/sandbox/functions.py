"""The functions that a template finds, as transformers gives them to it."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

from bevatron.chat.chat_error import ChatError
from bevatron.chat.sandbox.objects import Function, Namespace
from bevatron.chat.sandbox.values import Values

LONGEST_RANGE = 100_000  # as jinja2's sandbox
WIDEST_FORM = 200


def functions(values: Values, now: Callable[[], datetime]) -> dict[str, Any]:
    """The names that are there before any variable."""

    def range_(*args: Any) -> range:
        found = range(*args)
        if len(found) > LONGEST_RANGE:
            raise ChatError(f"the chat template makes a range of {len(found)}; stopped")
        return found

    def dict_(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        for value in args:
            values.budget.make_like(value)
        return dict(*args, **kwargs)

    def namespace(*args: Any, **kwargs: Any) -> Namespace:
        made = Namespace({})
        for name, value in dict_(*args, **kwargs).items():
            made[name] = value
        return made

    def raise_exception(message: Any) -> None:
        raise ChatError(f"the chat template refuses this: {shortened(values.text(message))}")

    def strftime_now(form: Any) -> str:
        if re.search(r"%[^a-zA-Z%]*\d", form) or len(form) > WIDEST_FORM:
            raise ChatError("the chat template formats the time with an absurd width; stopped")
        return now().strftime(form)

    made: dict[str, Callable[..., Any]] = {"range": range_, "dict": dict_, "namespace": namespace}
    made |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return {name: Function(name, call) for name, call in made.items()}


def shortened(text: str, limit: int = 300) -> str:
    """One line of a text that somebody else wrote, safe to print."""
    flat = " ".join(text.split())
    flat = "".join(c if c.isprintable() else "�" for c in flat)
    return flat if len(flat) <= limit else flat[:limit] + "..."
