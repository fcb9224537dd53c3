"""Tools that a model may call while it learns: a calculator, and Python in a locked-down process.

A tool takes the arguments of a call and returns a text. Whatever is wrong with a call is a text
too, which the model can read: it never ends the run.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from bevatron.align.locked_python import Limits, run_python

MOST_DIGITS = 300  # of a number: powers and products stay cheap
LONGEST = 2000  # characters of an answer
EXPRESSION = 200  # characters of an expression
COUNT = re.compile(r"""(['"])([^'"\\]{0,200})\1\.count\((['"])([^'"\\]{1,100})\3\)""")
BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def calculated(expression: str) -> str:
    """The value of an expression of numbers with + - * / // % ** and brackets; as in NanoChat also
    how often one text is in another, `"strawberry".count("r")`. No Python is run. Raises ValueError
    that says what is wrong."""
    said = expression.strip().replace(",", "").replace("^", "**")
    if len(expression) > EXPRESSION:
        raise ValueError(f"longer than {EXPRESSION} characters")
    if (counted := COUNT.fullmatch(expression.strip())) is not None:
        return str(counted.group(2).count(counted.group(4)))
    try:
        value = _value(ast.parse(said, mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("not an expression of numbers") from None
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except OverflowError:
        raise ValueError("too large") from None
    if isinstance(value, float):
        return f"{value:.10g}" if abs(value) < 1e15 else str(Decimal(value))[:LONGEST]
    return str(value)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _small(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            digits = abs(right) * max(1, len(str(abs(int(left)))))
            if digits > MOST_DIGITS or (left < 0 and not isinstance(right, int)):
                raise OverflowError
        return _small(BINARY[type(node.op)](left, right))
    raise ValueError("not an expression of numbers")


def _small(value: Any) -> Any:
    if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
        raise OverflowError
    if isinstance(value, float) and value - value != 0:  # not finite
        raise OverflowError
    return value


def _schema(name: str, says: str, argument: str, meaning: str) -> dict[str, Any]:
    properties = {argument: {"type": "string", "description": meaning}}
    parameters = {"type": "object", "properties": properties, "required": [argument]}
    return {
        "type": "function",
        "function": {"name": name, "description": says, "parameters": parameters},
    }


# As chat templates take them, in OpenAI's form.
SCHEMAS = {
    "calculator": _schema(
        "calculator", "Computes an expression of numbers.", "expression", "such as 3 * (2 + 4)"
    ),
    "python": _schema(
        "python", "Runs a Python program and answers with what it prints.", "code", "the program"
    ),
}


def answer_of(name: str, arguments: Mapping[str, Any], limits: Limits) -> str:
    """What a tool says to a call."""
    if name not in SCHEMAS:
        return f"error: there is no tool {name[:50]!r}"
    (wanted,) = SCHEMAS[name]["function"]["parameters"]["required"]
    given = arguments.get(wanted)
    if not isinstance(given, str | int | float) or isinstance(given, bool):
        return f"error: {name} takes one argument, {wanted}, a text"
    if name == "calculator":
        try:
            return calculated(str(given))
        except ValueError as error:
            return f"error: {error}"
    ran = run_python(str(given), limits)
    out = ran.output if len(ran.output) <= LONGEST else ran.output[:LONGEST] + "..."
    if ran.fine:
        return out.rstrip("\n") or "(no output)"
    return f"{out}error: {ran.stopped or ran.error}"
