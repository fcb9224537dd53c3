"""The evaluator: one method per node of jinja2's syntax tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, Undefined, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser

from bevatron.chat.chat_error import ChatError
from bevatron.chat.sandbox.budget import NODE, Budget
from bevatron.chat.sandbox.filters import Filters
from bevatron.chat.sandbox.functions import functions
from bevatron.chat.sandbox.objects import Function, Loop, Namespace
from bevatron.chat.sandbox.values import Values

DEEPEST = 60  # macros within each other


class Generation(Extension):
    """`{% generation %}`, which marks what the model is to say: here only a scope."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


# Blocks are trimmed as transformers does it.
ENVIRONMENT = Environment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension]
)


class Scope:
    """Names and what they mean, within an outer scope."""

    def __init__(self, outer: Scope | None, names: dict[str, Any]) -> None:
        self.outer = outer
        self.names = names

    def find(self, name: str) -> Any:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.outer
        return Undefined(name=name)


class _Jump(Exception):
    """`break` or `continue`."""

    def __init__(self, ends: bool) -> None:
        self.ends = ends


def evaluate(
    tree: nodes.Template,
    variables: dict[str, Any],
    budget: Budget,
    now: Callable[[], datetime] = datetime.now,
) -> str:
    """The text of a template for plain data.

    Raises ChatError, and whatever a template's own mistakes raise: jinja2's UndefinedError,
    TypeError, ValueError, ArithmeticError, LookupError, RecursionError."""
    return _Evaluator(budget, now).render(tree, variables)


class _Evaluator:
    def __init__(self, budget: Budget, now: Callable[[], datetime]) -> None:
        self.budget = budget
        self.values = Values(budget)
        self.filters = Filters(self.values)
        self.globals = functions(self.values, now)
        self.depth = 0  # of macros
        self.does: dict[type, Callable[[Any, Scope, list[str]], None]] = {
            nodes.Output: self._output,
            nodes.For: self._for,
            nodes.If: self._if,
            nodes.Assign: self._assign,
            nodes.AssignBlock: self._assign_block,
            nodes.Macro: self._macro,
            nodes.CallBlock: self._call_block,
            nodes.FilterBlock: self._filter_block,
            nodes.With: self._with,
            nodes.Scope: lambda n, s, out: self.run(n.body, Scope(s, {}), out),
            nodes.Break: self._jump,
            nodes.Continue: self._jump,
        }
        self.gives: dict[type, Callable[[Any, Scope], Any]] = {
            nodes.Const: lambda n, s: n.value,
            nodes.TemplateData: lambda n, s: n.data,
            nodes.Name: lambda n, s: s.find(n.name),
            nodes.Getattr: lambda n, s: self.values.attribute(self.give(n.node, s), n.attr),
            nodes.Getitem: self._item,
            nodes.Call: self._call,
            nodes.Filter: self._filter,
            nodes.Test: self._test,
            nodes.And: lambda n, s: self.give(n.left, s) and self.give(n.right, s),
            nodes.Or: lambda n, s: self.give(n.left, s) or self.give(n.right, s),
            nodes.Not: lambda n, s: not self.give(n.node, s),
            nodes.Neg: lambda n, s: -self.give(n.node, s),
            nodes.Pos: lambda n, s: +self.give(n.node, s),
            nodes.Compare: self._compare,
            nodes.CondExpr: self._condition,
            nodes.Concat: self._concat,
            nodes.List: lambda n, s: self.all(n.items, s),
            nodes.Tuple: lambda n, s: tuple(self.all(n.items, s)),
            nodes.Dict: self._dict,
            nodes.Slice: lambda n, s: slice(
                *(self._bound(x, s) for x in (n.start, n.stop, n.step))
            ),
        }

    def render(self, tree: nodes.Template, variables: dict[str, Any]) -> str:
        out: list[str] = []
        self.run(tree.body, Scope(Scope(None, self.globals), dict(variables)), out)
        return "".join(out)

    def run(self, body: Sequence[nodes.Node], scope: Scope, out: list[str]) -> None:
        for node in body:
            self.budget.spend()
            do = self.does.get(type(node))
            if do is None:
                raise ChatError(_unsupported(node))
            do(node, scope, out)

    def give(self, node: nodes.Node, scope: Scope) -> Any:
        self.budget.spend()
        kind = type(node)
        if kind in self.gives:
            return self.gives[kind](node, scope)
        if isinstance(node, nodes.BinExpr) and getattr(node, "operator", None) is not None:
            left, right = self.give(node.left, scope), self.give(node.right, scope)
            return self.values.binary(str(node.operator), left, right)
        raise ChatError(_unsupported(node))

    def all(self, items: Sequence[nodes.Node], scope: Scope) -> list[Any]:
        self.budget.make(NODE * len(items))
        return [self.give(item, scope) for item in items]

    def captured(self, body: Sequence[nodes.Node], scope: Scope) -> str:
        out: list[str] = []
        self.run(body, scope, out)
        self.budget.make(sum(map(len, out)))
        return "".join(out)

    # statements

    def _output(self, node: nodes.Output, scope: Scope, out: list[str]) -> None:
        for part in node.nodes:
            text = self.values.text(self.give(part, scope))
            self.budget.make(len(text))
            out.append(text)

    def _if(self, node: nodes.If, scope: Scope, out: list[str]) -> None:
        for branch in (node, *node.elif_):
            if self.give(branch.test, scope):
                self.run(branch.body, scope, out)
                return
        self.run(node.else_, scope, out)

    def _for(self, node: nodes.For, scope: Scope, out: list[str]) -> None:
        if node.recursive:
            raise ChatError("the chat template has a recursive loop, which is not supported")
        items = self.values.items(self.give(node.iter, scope))
        if node.test is not None:
            items = [item for item in items if self._passes(node, item, scope)]
        loop = Loop(items)
        for index, item in enumerate(items):
            self.budget.spend()
            loop.index0 = index
            inner = Scope(scope, {"loop": loop})
            self.assign(node.target, item, inner)
            try:
                self.run(node.body, inner, out)
            except _Jump as jump:
                if jump.ends:
                    break
        if not items:
            self.run(node.else_, Scope(scope, {}), out)

    def _passes(self, node: nodes.For, item: Any, scope: Scope) -> bool:
        inner = Scope(scope, {})
        self.assign(node.target, item, inner)
        assert node.test is not None
        return bool(self.give(node.test, inner))

    def _jump(self, node: nodes.Node, scope: Scope, out: list[str]) -> None:
        raise _Jump(ends=isinstance(node, nodes.Break))

    def _assign(self, node: nodes.Assign, scope: Scope, out: list[str]) -> None:
        self.assign(node.target, self.give(node.node, scope), scope)

    def assign(self, target: nodes.Node, value: Any, scope: Scope) -> None:
        if isinstance(target, nodes.Name):
            scope.names[target.name] = value
        elif isinstance(target, nodes.NSRef):
            space = scope.find(target.name)
            if not isinstance(space, Namespace):
                raise ChatError("the chat template sets an attribute of what is no namespace")
            space[target.attr] = value
        elif isinstance(target, nodes.Tuple | nodes.List):
            parts = self.values.items(value)
            if len(parts) != len(target.items):
                raise ValueError(f"expected {len(target.items)} values to unpack, got {len(parts)}")
            for inner, part in zip(target.items, parts, strict=True):
                self.assign(inner, part, scope)
        else:
            raise ChatError(_unsupported(target))

    def _assign_block(self, node: nodes.AssignBlock, scope: Scope, out: list[str]) -> None:
        inner = Scope(scope, {})
        value: Any = self.captured(node.body, inner)
        if node.filter is not None:
            value = self._filter(node.filter, inner, value)
        self.assign(node.target, value, scope)

    def _filter_block(self, node: nodes.FilterBlock, scope: Scope, out: list[str]) -> None:
        inner = Scope(scope, {})
        value = self._filter(node.filter, inner, self.captured(node.body, inner))
        out.append(self.values.text(value))

    def _with(self, node: nodes.With, scope: Scope, out: list[str]) -> None:
        inner = Scope(scope, {})
        for target, value in zip(node.targets, node.values, strict=True):
            self.assign(target, self.give(value, scope), inner)
        self.run(node.body, inner, out)

    def _macro(self, node: nodes.Macro, scope: Scope, out: list[str]) -> None:
        scope.names[node.name] = Function(node.name, self._called(node, scope))

    def _call_block(self, node: nodes.CallBlock, scope: Scope, out: list[str]) -> None:
        caller = Function("caller", self._called(node, scope))
        out.append(self.values.text(self._call(node.call, scope, {"caller": caller})))

    def _called(self, node: nodes.Macro | nodes.CallBlock, scope: Scope) -> Callable[..., str]:
        names = [arg.name for arg in node.args]
        used = {name.name for name in node.find_all(nodes.Name)}
        missing = object()

        def call(*args: Any, **kwargs: Any) -> str:
            inner = Scope(scope, {})
            given = dict(zip(names, args, strict=False))
            caller = kwargs.pop("caller", missing) if "caller" not in names else missing
            if caller is not missing:
                inner.names["caller"] = caller
            for name in names[len(args) :]:
                if name in kwargs:
                    given[name] = kwargs.pop(name)
            if "varargs" in used:
                inner.names["varargs"] = args[len(names) :]
            elif len(args) > len(names):
                raise TypeError(f"a macro takes {len(names)} arguments, not {len(args)}")
            if "kwargs" in used:
                inner.names["kwargs"] = kwargs
            elif kwargs:
                raise TypeError(f"a macro has no argument {next(iter(kwargs))!r}")
            first_default = len(names) - len(node.defaults)
            for i, name in enumerate(names):
                if name in given:
                    inner.names[name] = given[name]
                elif i >= first_default:
                    inner.names[name] = self.give(node.defaults[i - first_default], inner)
                else:
                    inner.names[name] = Undefined(f"parameter {name!r} was not provided", name=name)
            self.depth += 1
            if self.depth > DEEPEST:
                raise ChatError("the chat template's macros call each other too deeply; stopped")
            try:
                return self.captured(node.body, inner)
            finally:
                self.depth -= 1

        return call

    # expressions

    def _item(self, node: nodes.Getitem, scope: Scope) -> Any:
        return self.values.item(self.give(node.node, scope), self.give(node.arg, scope))

    def _bound(self, node: nodes.Node | None, scope: Scope) -> Any:
        return None if node is None else self.give(node, scope)

    def _arguments(
        self, node: nodes.Call | nodes.Filter | nodes.Test, scope: Scope
    ) -> tuple[list[Any], dict[str, Any]]:
        args = self.all(node.args, scope)
        kwargs = {str(pair.key): self.give(pair.value, scope) for pair in node.kwargs}
        if node.dyn_args is not None:
            args += self.values.items(self.give(node.dyn_args, scope))
        if node.dyn_kwargs is not None:
            more = self.give(node.dyn_kwargs, scope)
            if not isinstance(more, dict) or not all(isinstance(key, str) for key in more):
                raise TypeError("argument after ** must be a mapping of names")
            kwargs |= more
        return args, kwargs

    def _call(self, node: nodes.Call, scope: Scope, more: dict[str, Any] | None = None) -> Any:
        function = self.give(node.node, scope)
        args, kwargs = self._arguments(node, scope)
        return self.values.call(function, args, {**kwargs, **(more or {})})

    def _filter(self, node: nodes.Filter, scope: Scope, value: Any = None) -> Any:
        if node.node is not None:
            value = self._filter_input(node, scope, value)
        args, kwargs = self._arguments(node, scope)
        return self.filters.apply(node.name, value, args, kwargs)

    def _filter_input(self, node: nodes.Filter, scope: Scope, value: Any) -> Any:
        """Filters of a block are chained down to one that has no node: the block's text."""
        if isinstance(node.node, nodes.Filter):
            return self._filter(node.node, scope, value)
        assert node.node is not None
        return self.give(node.node, scope)

    def _test(self, node: nodes.Test, scope: Scope) -> bool:
        value = self.give(node.node, scope)
        args, kwargs = self._arguments(node, scope)
        return self.filters.test(node.name, value, args, kwargs)

    def _compare(self, node: nodes.Compare, scope: Scope) -> bool:
        left = self.give(node.expr, scope)
        for operand in node.ops:
            right = self.give(operand.expr, scope)
            if not self.values.compare(operand.op, left, right):
                return False
            left = right
        return True

    def _condition(self, node: nodes.CondExpr, scope: Scope) -> Any:
        if self.give(node.test, scope):
            return self.give(node.expr1, scope)
        if node.expr2 is None:
            return Undefined("an inline if without else was false")
        return self.give(node.expr2, scope)

    def _concat(self, node: nodes.Concat, scope: Scope) -> str:
        parts = [self.values.text(self.give(part, scope)) for part in node.nodes]
        self.budget.make(sum(map(len, parts)))
        return "".join(parts)

    def _dict(self, node: nodes.Dict, scope: Scope) -> dict[Any, Any]:
        self.budget.make(2 * NODE * len(node.items))
        made = {}
        for pair in node.items:
            key = self.give(pair.key, scope)
            if isinstance(key, tuple):
                self.budget.weigh(key)
            made[key] = self.give(pair.value, scope)
        return made


def _unsupported(node: nodes.Node) -> str:
    kind = type(node).__name__.lower()
    return f"the chat template uses {kind!r} in line {node.lineno}, which is not supported"
