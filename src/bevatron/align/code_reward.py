"""Scoring Python that a model wrote by tests: assertions, or standard input and output.

What the program should write, and the literal that an assertion compares with, never enter the
program's process: they are compared here. So a program cannot pass by returning something that is
equal to everything, by ending early, or by printing what a checker prints. An assertion of another
form (`assert abs(f(2) - 1.4) < 0.1`) runs beside the program, which could tamper with it; use
input and output, or `==` with a literal, where that matters.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from bevatron.align.locked_python import Limits, LockedPython, Stopped, run_python
from bevatron.align.reward_config import Code
from bevatron.align.scorers import column, without_thoughts
from bevatron.errors import BevatronError

FENCE = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
MAKERS: dict[str, Callable[[Any], Any]] = {"set": set, "tuple": tuple, "list": list}


def program_of(text: str) -> str:
    """The last block of code in an answer without its thoughts; all of it if there is none."""
    text = without_thoughts(text)
    found = FENCE.findall(text)
    return found[-1] if found else text


def code_score(config: Code, row: Mapping[str, Any], text: str) -> float:
    """0 to 1. Raises BevatronError for tests that cannot be understood, and where this system
    cannot lock a program in."""
    program, tests = program_of(text), tests_of(column(row, config.column))
    memory = int(config.memory_gib * (1 << 30))
    limits = Limits(config.seconds, memory, config.site_packages, config.allow_unguarded)
    if isinstance(tests[0], str):
        passed = _assertions(program, tests, limits, config.partial)
    else:
        passed = _streams(program, tests, limits, config.partial)
    return passed / len(tests) if config.partial else float(passed == len(tests))


def tests_of(given: Any) -> list[Any]:
    """Assertions, or (input, output) pairs. Raises BevatronError."""
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError):  # a text of assertions may begin so
            given = json.loads(given)
    if isinstance(given, str):
        return [given]
    if isinstance(given, Mapping) and {"inputs", "outputs"} <= set(given):
        if given.get("fn_name"):
            raise BevatronError("tests that call a function by `fn_name` are not supported; write "
                                "them as assertions")  # fmt: skip
        given = [
            {"input": i, "output": o}
            for i, o in zip(given["inputs"], given["outputs"], strict=True)
        ]
    if isinstance(given, Sequence) and given:
        if all(isinstance(each, str) for each in given):
            return list(given)
        if all(isinstance(e, Mapping) and {"input", "output"} <= set(e) for e in given):
            return [(str(each["input"]), str(each["output"])) for each in given]
    raise BevatronError(
        "the tests are neither a list of assertions, nor a list of {input, output}, nor a text"
    )


def _streams(program: str, tests: list[tuple[str, str]], limits: Limits, all_of_them: bool) -> int:
    passed = 0
    for given, wanted in tests:
        ran = run_python(program, limits, given)
        if ran.fine and _lines(ran.output) == _lines(wanted):
            passed += 1
        elif not all_of_them:
            break
    return passed


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _assertions(program: str, tests: list[str], limits: Limits, all_of_them: bool) -> int:
    passed, left = 0, list(tests)
    while left:
        try:
            with LockedPython(program, limits) as running:
                if running.started() is not None:
                    return passed
                while left:
                    if _holds(running, left.pop(0)):
                        passed += 1
                    elif not all_of_them:
                        return passed
        except Stopped:  # by the program, or by the test that was taken from the list
            if not all_of_them or len(left) == len(tests):
                return passed
    return passed


def _holds(running: LockedPython, test: str) -> bool:
    taken = compared(test)
    if taken is None:
        # Nothing but the program's own process can say so.
        return "error" not in running.ask(run=test)
    expression, wanted = taken
    said = running.ask(value=expression)
    if "error" in said or not isinstance(said.get("value"), str):
        return False
    try:
        found = literal(ast.parse(said["value"], mode="eval").body)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    return bool(found == wanted)


def compared(test: str) -> tuple[str, Any] | None:
    """Of `assert EXPRESSION == LITERAL` the expression and the value; None for other tests."""
    try:
        body = ast.parse(test.strip()).body
        if len(body) != 1 or not isinstance(body[0], ast.Assert):
            return None
        said = body[0].test
        if not isinstance(said, ast.Compare) or len(said.ops) != 1:
            return None
        if not isinstance(said.ops[0], ast.Eq | ast.Is):
            return None
        return ast.unparse(said.left), literal(said.comparators[0])
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def literal(node: ast.expr) -> Any:
    """The value of a literal, or of `set([...])` and the like. Raises ValueError."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        made = MAKERS.get(node.func.id)
        if made is not None and len(node.args) <= 1 and not node.keywords:
            return made(literal(node.args[0]) if node.args else ())
    try:
        return ast.literal_eval(node)
    except TypeError as error:
        raise ValueError(str(error)) from error
