"""The filters and tests that a template finds, as transformers gives them to it.

Left out of jinja2's are those that no chat needs and that cost more than they read (`urlize`,
`striptags`, `wordwrap`, ...), and `random`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from jinja2 import Undefined, filters, tests
from markupsafe import Markup, escape

from bevatron.chat.chat_error import ChatError
from bevatron.chat.sandbox.budget import NODE
from bevatron.chat.sandbox.objects import Function, Method
from bevatron.chat.sandbox.values import ITERATOR, SIZED, Values

Filter = Callable[..., Any]


class Filters:
    """`apply(name, value, args, kwargs)` and `test(...)`; each method is the filter of its name."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self.budget = values.budget

    def apply(self, name: str, value: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        self.budget.spend()
        own = OWN.get(name)
        if own is not None:
            return own(self, value, *args, **kwargs)
        if name in TEXT:
            text = value if isinstance(value, str) else self.values.text(value)
            self.budget.make(len(text))
            return TEXT[name](text, *args, **kwargs)
        raise ChatError(f"the chat template uses the filter {name!r}, which is not supported")

    def test(self, name: str, value: Any, args: list[Any], kwargs: dict[str, Any]) -> bool:
        self.budget.spend()
        if name in ("filter", "test"):
            known = {*OWN, *TEXT} if name == "filter" else TESTS
            return value in known
        if name in COMPARED and len(args) == 1:
            return self.values.compare(COMPARED[name], value, args[0])
        if name not in TESTS:
            raise ChatError(f"the chat template uses the test {name!r}, which is not supported")
        if name == "iterable":
            return isinstance(value, (*SIZED, ITERATOR))
        if name == "callable":
            return isinstance(value, Function | Method)
        if name in ("lower", "upper"):
            value = self.values.text(value)
        return bool(TESTS[name](value, *args, **kwargs))

    # filters

    def default(self, value: Any, default_value: Any = "", boolean: Any = False) -> Any:
        if isinstance(value, Undefined) or (boolean and not value):
            return default_value
        return value

    def length(self, value: Any) -> int:
        if isinstance(value, SIZED):
            return len(value)
        raise TypeError(f"object of type {type(value).__name__!r} has no len()")

    def first(self, value: Any) -> Any:
        for item in self.values.items(value):
            return item
        return Undefined("No first item, sequence was empty.")

    def last(self, value: Any) -> Any:
        items = self.values.items(value)
        return items[-1] if items else Undefined("No last item, sequence was empty.")

    def list(self, value: Any) -> Any:
        return self.values.items(value)

    def items(self, value: Any) -> Any:
        if isinstance(value, Undefined):
            return self.values.iterator([])
        if not isinstance(value, dict):
            raise TypeError("Can only get item pairs from a mapping.")
        return self.values.iterator(list(value.items()))

    def reverse(self, value: Any) -> Any:
        if isinstance(value, str):
            self.budget.make(len(value))
            return value[::-1]
        return self.values.iterator(self.values.items(value)[::-1])

    def join(self, value: Any, d: Any = "", attribute: Any = None) -> str:
        items = self.values.items(value)
        if attribute is not None:
            items = [self.lookup(item, attribute) for item in items]
        return self.values.join(self.values.text(d), [self.values.text(item) for item in items])

    def replace(self, value: Any, old: Any, new: Any, count: Any = None) -> str:
        text = self.values.text(value)
        old, new = self.values.text(old), self.values.text(new)
        return self.values.replace(text, old, new, -1 if count is None else count)

    def string(self, value: Any) -> str:
        return value if isinstance(value, str) else self.values.text(value)

    def format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        if args and kwargs:
            raise ChatError("the chat template gives the filter format positions and names")
        return self.values.percent(self.values.text(value), kwargs or tuple(args))

    def indent(self, s: Any, width: Any = 4, first: Any = False, blank: Any = False) -> str:
        text = self.string(s)
        self.values.width(width)
        lines = len(text) if text.count("\n") == 0 else text.count("\n") + text.count("\r") + 1
        margin = len(width) if isinstance(width, str) else max(int(width), 0)
        self.budget.make(len(text) + (min(lines, len(text)) + 2) * (margin + 1))
        return filters.do_indent(text, width, first, blank)

    def center(self, value: Any, width: Any = 80) -> str:
        text = self.values.text(value)
        self.budget.make(len(text) + self.values.width(width))
        return text.center(width)

    def escape(self, value: Any) -> Markup:
        text = self.string(value)
        self.budget.make(5 * len(text))
        return escape(text)

    def safe(self, value: Any) -> Markup:
        text = self.string(value)
        self.budget.make(len(text))
        return Markup(text)

    def tojson(
        self,
        value: Any,
        ensure_ascii: Any = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: Any = False,
    ) -> str:
        """As transformers', not as jinja2's, which escapes what HTML would misread."""
        weight, depth = self.budget.weigh(value)
        self.values.width(indent)
        margin = len(indent) if isinstance(indent, str) else indent or 0
        between = sum(len(s) for s in separators or () if isinstance(s, str))
        self.budget.make(weight + weight // NODE * (between + max(int(margin), 0) * depth))
        return json.dumps(
            value,
            ensure_ascii=bool(ensure_ascii),
            indent=indent,
            separators=separators,
            sort_keys=bool(sort_keys),
        )

    def int(self, value: Any, default: Any = 0, base: Any = 10) -> Any:
        self.budget.read(len(value) * 8 if isinstance(value, str) else 0)
        return filters.do_int(value, default, base)

    def float(self, value: Any, default: Any = 0.0) -> Any:
        return filters.do_float(value, default)

    def abs(self, value: Any) -> Any:
        return abs(value)

    def round(self, value: Any, precision: Any = 0, method: Any = "common") -> Any:
        if abs(precision) > 30:
            raise ChatError(f"the chat template rounds to {precision} digits; stopped")
        return filters.do_round(value, precision, method)

    def sum(self, value: Any, attribute: Any = None, start: Any = 0) -> Any:
        for item in self.values.items(value):
            part = item if attribute is None else self.lookup(item, attribute)
            start = self.values.binary("+", start, part)
        return start

    def min(self, value: Any, case_sensitive: Any = False, attribute: Any = None) -> Any:
        ordered = self.ordered(value, False, case_sensitive, attribute)
        return ordered[0] if ordered else Undefined("No aggregated item, sequence was empty.")

    def max(self, value: Any, case_sensitive: Any = False, attribute: Any = None) -> Any:
        items = self.values.items(value)
        if not items:
            return Undefined("No aggregated item, sequence was empty.")
        keys = self._keys(items, case_sensitive, attribute)
        return items[max(range(len(items)), key=keys.__getitem__)]

    def sort(
        self, value: Any, reverse: Any = False, case_sensitive: Any = False, attribute: Any = None
    ) -> Any:
        return self.ordered(value, reverse, case_sensitive, attribute)

    def dictsort(
        self, value: Any, case_sensitive: Any = False, by: Any = "key", reverse: Any = False
    ) -> Any:
        if by not in ("key", "value"):
            raise ChatError("the chat template sorts a dict by neither 'key' nor 'value'")
        if not isinstance(value, dict):
            raise TypeError("Can only sort a mapping by its keys or values.")
        return self.ordered(value.items(), reverse, case_sensitive, 0 if by == "key" else 1)

    def unique(self, value: Any, case_sensitive: Any = False, attribute: Any = None) -> Any:
        items = self.values.items(value)
        seen, found = set(), []
        for item, key in zip(items, self._keys(items, case_sensitive, attribute), strict=True):
            if key not in seen:
                seen.add(key)
                found.append(item)
        return self.values.iterator(found)

    def batch(self, value: Any, linecount: Any, fill_with: Any = None) -> Any:
        self.values.width(linecount)
        return self.values.iterator(
            list(filters.do_batch(self.values.items(value), linecount, fill_with))
        )

    def slice(self, value: Any, slices: Any, fill_with: Any = None) -> Any:
        self.values.width(slices)
        return self.values.iterator(
            list(filters.sync_do_slice(self.values.items(value), slices, fill_with))
        )

    def attr(self, value: Any, name: Any) -> Any:
        """As `value.name`, but never an item."""
        if isinstance(value, dict) and str(name) not in ("get", "items", "keys", "values", "copy"):
            return Undefined(obj=value, name=str(name))
        return self.values.attribute(value, self.values.text(name))

    def map(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        items = self.values.items(value)
        if not args and "attribute" in kwargs:
            attribute = kwargs.pop("attribute")
            missing = kwargs.pop("default", None)
            found = [self.lookup(item, attribute) for item in items]
            if missing is not None:
                found = [missing if isinstance(f, Undefined) else f for f in found]
            return self.values.iterator(found)
        if not args:
            raise ChatError("the chat template uses the filter map without a filter")
        name, *rest = args
        return self.values.iterator([self.apply(name, item, rest, kwargs) for item in items])

    def select(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return self._selected(value, True, False, args, kwargs)

    def reject(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return self._selected(value, False, False, args, kwargs)

    def selectattr(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return self._selected(value, True, True, args, kwargs)

    def rejectattr(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return self._selected(value, False, True, args, kwargs)

    # parts of filters

    def _selected(
        self,
        value: Any,
        keep: bool,
        by_attribute: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        rest = list(args)
        attribute = rest.pop(0) if by_attribute else None
        found = []
        for item in self.values.items(value):
            looked = self.lookup(item, attribute) if by_attribute else item
            passes = self.test(rest[0], looked, rest[1:], kwargs) if rest else bool(looked)
            if passes is keep:
                found.append(item)
        return self.values.iterator(found)

    def lookup(self, value: Any, attribute: Any) -> Any:
        """`a.b.0` of a value, as filters name attributes."""
        parts = attribute.split(".") if isinstance(attribute, str) else [attribute]
        for part in parts:
            key = int(part) if isinstance(part, str) and part.isdigit() else part
            value = self.values.item(value, key)
        return value

    def ordered(self, value: Any, reverse: Any, case_sensitive: Any, attribute: Any) -> Any:
        items = self.values.items(value)
        keys = self._keys(items, case_sensitive, attribute)
        order = sorted(range(len(items)), key=keys.__getitem__, reverse=bool(reverse))
        return [items[i] for i in order]

    def _keys(self, items: Any, case_sensitive: Any, attribute: Any) -> Any:
        """What to compare items by. Paid for as if each were compared with twenty others."""
        if isinstance(attribute, str) and "," in attribute:
            raise ChatError("the chat template sorts by several attributes, which is not supported")
        keys = items if attribute is None else [self.lookup(item, attribute) for item in items]
        self.budget.read(20 * self.budget.weigh(keys)[0])
        if case_sensitive:
            return keys
        return [key.lower() if isinstance(key, str) else key for key in keys]


ALIASES = {"d": "default", "count": "length", "e": "escape"}
NAMES = """abs attr batch center default dictsort escape first float format indent int items join
last length list map max min reject rejectattr replace reverse round safe select selectattr slice
sort string sum tojson unique"""
OWN: dict[str, Filter] = {name: getattr(Filters, name) for name in NAMES.split()}
OWN |= {alias: OWN[name] for alias, name in ALIASES.items()}
TEXT: dict[str, Filter] = {
    name: filters.FILTERS[name]
    for name in ("capitalize", "lower", "title", "trim", "upper", "wordcount")
}
TESTS: dict[str, Any] = dict(tests.TESTS)
COMPARED = {"==": "eq", "eq": "eq", "equalto": "eq", "!=": "ne", "ne": "ne", "in": "in"}
COMPARED |= {">": "gt", "gt": "gt", "greaterthan": "gt", ">=": "gteq", "ge": "gteq"}
COMPARED |= {"<": "lt", "lt": "lt", "lessthan": "lt", "<=": "lteq", "le": "lteq"}
