"""What expressions of a template may do with values: attributes, items, calls, operators.

Values are None, bool, int, float, str, list, tuple, dict and its views, range, iterators over
lists, jinja2's Undefined, and the classes of `objects.py`. Nothing else ever gets into a template.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from string import Formatter
from typing import Any

from jinja2 import Undefined
from jinja2.exceptions import SecurityError

from bevatron.chat.chat_error import ChatError
from bevatron.chat.sandbox.budget import NODE, VIEWS, Budget
from bevatron.chat.sandbox.objects import (
    METHODS,
    PADS,
    READS,
    SPLITS,
    Function,
    Loop,
    Method,
    Namespace,
)

LONGEST_INT = 16384  # bits
WIDEST = 1000  # of padding, by anything
ITERATOR: Any = type(iter([]))
CONTAINERS: Any = (list, tuple, dict, range, *VIEWS)
SIZED: Any = (str, *CONTAINERS, Undefined)
FLAGS = re.compile(r"[#0\- +*.\dhlL]*")


class Values:
    """The operations, each paid for out of one budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def attribute(self, value: Any, name: str) -> Any:
        """`value.name`: a method that is known to be harmless, else the item of that name."""
        if isinstance(value, Undefined):
            value._fail_with_undefined_error()
        if isinstance(value, Loop):
            return value.get(name)
        if isinstance(value, Namespace):
            return value.values.get(name, Undefined(obj=value, name=name))
        found = self._method(value, name)
        if found is None and isinstance(value, dict):
            return value.get(name, Undefined(obj=value, name=name))
        return Undefined(obj=value, name=name) if found is None else found

    def item(self, value: Any, key: Any) -> Any:
        """`value[key]`; as jinja2, the attribute of that name where there is no such item."""
        if isinstance(value, Undefined):
            value._fail_with_undefined_error()
        if isinstance(key, tuple):
            self.budget.weigh(key)
        if isinstance(key, slice):
            if not isinstance(value, str | list | tuple):
                raise TypeError(f"{type(value).__name__!r} object has no slices")
            part = len(range(*key.indices(len(value))))
            self.budget.make(part * (1 if isinstance(value, str) else NODE))
        if isinstance(value, str | list | tuple | dict | range):
            try:
                return value[key]
            except (TypeError, LookupError):
                pass
        if not isinstance(key, str):
            return Undefined(obj=value, name=key)
        if isinstance(value, Loop | Namespace):
            return self.attribute(value, key)
        found = self._method(value, key)
        return Undefined(obj=value, name=key) if found is None else found

    def _method(self, value: Any, name: str) -> Any:
        """A known method, None if there is nothing of that name, or what raises when used."""
        for kind, names in METHODS.items():
            if isinstance(value, kind):
                if name in names:
                    return Method(value, name)
                if hasattr(kind, name):
                    return self._unsafe(kind.__name__, name)
                return None
        return self._unsafe(type(value).__name__, name) if name.startswith("__") else None

    def _unsafe(self, kind: str, name: str) -> Undefined:
        return Undefined(f"{kind}.{name} is not available in chat templates", exc=SecurityError)

    def call(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        self.budget.spend()
        if isinstance(function, Function):
            return function.call(*args, **kwargs)
        if isinstance(function, Method):
            return self._call_method(function.owner, function.name, args, kwargs)
        if isinstance(function, Undefined):
            function._fail_with_undefined_error()
        raise TypeError(f"{type(function).__name__!r} object is not callable")

    def _call_method(self, owner: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        budget = self.budget
        if not isinstance(owner, str):
            budget.make(NODE * len(owner) if name == "copy" else 0)
            for value in (owner, *args) if name in ("index", "count") else args:
                budget.weigh(value)
            return getattr(owner, name)(*args, **kwargs)
        for value in args:
            budget.read(len(value) if isinstance(value, str) else 0)
        if name == "join":
            return self.join(owner, *args, **kwargs)
        if name == "format":
            return self.format(owner, args, kwargs)
        if name == "replace":
            return self.replace(owner, *args, **kwargs)
        if name in READS:
            budget.read(len(owner))
        elif name in SPLITS:
            budget.make(len(owner) + NODE * self._pieces(owner, name, args, kwargs))
        else:
            width = 0
            if name in PADS:
                wanted = [v for v in (*args, *kwargs.values()) if isinstance(v, int)]
                width = self.width(*wanted or [8]) * (1 + owner.count("\t"))
            budget.make(len(owner) + width)
        return getattr(owner, name)(*args, **kwargs)

    def _pieces(self, text: str, name: str, args: list[Any], kwargs: dict[str, Any]) -> int:
        """At most so many pieces does a split give."""
        by = args[0] if args else kwargs.get("sep")
        if isinstance(by, str) and by:
            return text.count(by) + 1
        return 1 + len(text) // (1 if name == "splitlines" else 2)

    def width(self, *widths: Any) -> int:
        """The widest of some widths, if none is absurd."""
        for width in widths:
            if isinstance(width, int) and abs(width) > WIDEST:
                raise ChatError(f"the chat template pads text to {width} characters; stopped")
        return max((w for w in widths if isinstance(w, int)), default=0)

    def text(self, value: Any) -> str:
        """`str(value)`, paid for."""
        if type(value) is str:
            return value
        self.budget.make_like(value)
        return str(value)

    def items(self, value: Any) -> list[Any]:
        """What iterating over a value gives."""
        if isinstance(value, SIZED):
            self.budget.make(NODE * len(value))
            return list(value)
        if isinstance(value, ITERATOR):
            return list(value)
        raise TypeError(f"{type(value).__name__!r} object is not iterable")

    def iterator(self, values: list[Any]) -> Iterator[Any]:
        """What filters such as `map` give: true even when empty, and gone after one use."""
        self.budget.make(NODE * len(values))
        return iter(values)

    def join(self, by: str, values: Any) -> str:
        parts = self.items(values)
        self.budget.make(sum(len(p) for p in parts if isinstance(p, str)) + len(by) * len(parts))
        return by.join(parts)

    def replace(self, text: str, old: Any, new: Any, count: Any = -1) -> str:
        if isinstance(old, str) and isinstance(new, str):
            found = text.count(old) if old else len(text) + 1
            if isinstance(count, int) and 0 <= count < found:
                found = count
            self.budget.make(len(text) + found * len(new))
        return text.replace(old, new, count)

    def format(self, text: str, args: list[Any], kwargs: dict[str, Any]) -> str:
        return _Format(self).vformat(text, args, kwargs)

    def percent(self, text: str, values: Any) -> str:
        """`text % values`."""
        at = 0
        while (at := text.find("%", at) + 1) > 0:
            at = _after_key(text, at)
            match = FLAGS.match(text, at)
            flags = match.group() if match else ""
            if re.search(r"\*|\d{4}", flags):
                raise ChatError("the chat template formats a text with an absurd width; stopped")
            at += len(flags) + 1
        self.budget.make(len(text) + (text.count("%") + 1) * (self.budget.weigh(values)[0] + 999))
        return str(text % values) if type(text) is str else text % values

    def binary(self, symbol: str, left: Any, right: Any) -> Any:
        self.budget.spend()
        if isinstance(left, str) and symbol == "%":
            return self.percent(left, right)
        if symbol == "*":
            self._check_repeat(left, right)
            self._check_repeat(right, left)
        elif symbol == "+" and isinstance(left, str | list | tuple) and type(right) is type(left):
            part = 1 if isinstance(left, str) else NODE
            self.budget.make(part * (len(left) + len(right)))
        elif symbol == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_int(left.bit_length() * abs(right))
        elif isinstance(left, VIEWS) or isinstance(right, VIEWS):
            raise TypeError(f"unsupported operand for {symbol}: a view of a dict")
        found = OPERATORS[symbol](left, right)
        if isinstance(found, int):
            self._check_int(found.bit_length())
        return found

    def _check_repeat(self, value: Any, times: Any) -> None:
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            part = 1 if isinstance(value, str) else NODE
            self.budget.make(part * len(value) * max(times, 0))

    def _check_int(self, bits: int) -> None:
        if bits > LONGEST_INT:
            raise ChatError("the chat template computes a number of absurd size; stopped")

    def compare(self, symbol: str, left: Any, right: Any) -> bool:
        scalar = not isinstance(left, CONTAINERS)
        if isinstance(left, str):
            self.budget.read(len(left))
        elif not scalar:
            self.budget.weigh(left)
        if symbol in ("in", "notin"):
            if isinstance(right, ITERATOR):
                right = self.items(right)
            if isinstance(right, range) and not isinstance(left, int):
                self.budget.spend(len(right))  # compared with each
            if isinstance(right, str):
                self.budget.read(len(right))
            elif not (scalar and isinstance(right, dict | range | type({}.keys()))):
                self.budget.weigh(right)
            if not isinstance(right, SIZED):
                raise TypeError(f"argument of type {type(right).__name__!r} is not iterable")
            return (left in right) is (symbol == "in")
        if not scalar and not isinstance(right, str):
            self.budget.weigh(right)
        return bool(COMPARISONS[symbol](left, right))


def _after_key(text: str, at: int) -> int:
    """The position after the `(key)` of a `%(key)s`, if there is one; keys may have brackets."""
    if text[at : at + 1] != "(":
        return at
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)


class _Format(Formatter):
    """str.format with our look-ups and without absurd widths."""

    def __init__(self, values: Values) -> None:
        self.values = values

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        parts = re.findall(r"^[^.\[]*|\.[^.\[]+|\[[^\]]*\]", field_name)
        found = self.get_value(int(parts[0]) if parts[0].isdigit() else parts[0], args, kwargs)
        for part in parts[1:]:
            if part[0] == ".":
                found = self.values.attribute(found, part[1:])
            else:
                key = part[1:-1]
                found = self.values.item(found, int(key) if key.isdigit() else key)
        return found, parts[0]

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self.values.budget.make_like(value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        if re.search(r"\d{4}", format_spec):
            raise ChatError("the chat template formats a text with an absurd width; stopped")
        self.values.budget.make_like(value)
        self.values.budget.make(WIDEST if format_spec else 0)
        return str(super().format_field(value, format_spec))


OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
}
