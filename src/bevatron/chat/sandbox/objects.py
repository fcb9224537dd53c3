"""What templates meet beside plain data: methods, functions, namespaces and loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2 import Undefined

from bevatron.chat.chat_error import ChatError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


READS = _words(
    """
    startswith endswith find rfind index rindex count isdigit isalpha isalnum isspace
    isupper islower isnumeric isdecimal isidentifier istitle isascii isprintable
    """
)
MAKES = _words(
    """
    upper lower title capitalize swapcase casefold strip lstrip rstrip removeprefix
    removesuffix
    """
)
SPLITS = _words(
    """
    split rsplit splitlines partition rpartition
    """
)
PADS = _words(
    """
    center ljust rjust zfill expandtabs
    """
)
METHODS: dict[type, frozenset[str]] = {
    str: READS | MAKES | SPLITS | PADS | {"replace", "join", "format"},
    dict: frozenset({"get", "items", "keys", "values", "copy"}),
    list: frozenset({"index", "count", "copy"}),
    tuple: frozenset({"index", "count"}),
}


@dataclass(frozen=True, eq=False)
class Method:
    """A method of a plain value, such as `text.strip`."""

    owner: Any
    name: str

    def __repr__(self) -> str:
        return f"<method {self.name}>"


@dataclass(frozen=True, eq=False)
class Function:
    """A function of the template's world, such as `range`, or a macro."""

    name: str
    call: Callable[..., Any]

    def __repr__(self) -> str:
        return f"<function {self.name}>"


@dataclass(eq=False, repr=False)
class Namespace:
    """`namespace(...)`: the one thing that a template may change."""

    values: dict[str, Any]

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise ChatError(f"the chat template sets {name!r} on a namespace, which is not allowed")
        self.values[name] = value


@dataclass(eq=False, repr=False)
class Loop:
    """The variable `loop`."""

    items: list[Any]
    index0: int = -1

    def get(self, name: str) -> Any:
        at, n = self.index0, len(self.items)
        values: dict[str, Any] = {"index0": at, "index": at + 1, "length": n}
        values |= {"revindex0": n - at - 1, "revindex": n - at}
        values |= {"first": at == 0, "last": at == n - 1}
        values |= {"depth0": 0, "depth": 1}  # of recursion, which there is none of
        if name == "previtem":
            return self.items[at - 1] if at > 0 else Undefined("there is no previous item")
        if name == "nextitem":
            return self.items[at + 1] if at + 1 < n else Undefined("there is no next item")
        if name == "cycle":
            return Function("loop.cycle", self._cycle)
        return values[name] if name in values else Undefined(obj=self, name=name)

    def _cycle(self, *values: Any) -> Any:
        if not values:
            raise ChatError("the chat template calls loop.cycle() without items")
        return values[self.index0 % len(values)]
