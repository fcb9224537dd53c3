"""What the built-in rewards say of one answer. They run in `reward_worker.py`, under its limits.

A scorer is made once of its settings and then called with an `Asked`; it returns a number, or None
for what it cannot score. Libraries are imported when a scorer is made, so that no answer pays for
it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from importlib import import_module
from typing import Any

from bevatron.align.reward_config import (
    PATTERNS,
    ExactMatch,
    Instructions,
    Length,
    MathVerify,
    ReasoningGym,
    RewardConfig,
    SoftOverlong,
    ThinkFormat,
)
from bevatron.errors import BevatronError

THINK, THINK_END = "<think>", "</think>"
OFF = re.compile(r"detailed thinking off", re.IGNORECASE)
NUMBER = re.compile(r"-?\$?\d[\d,]*(\.\d+)?|-?\$?\.\d+")


@dataclass(frozen=True)
class Asked:
    """An answer, the row of its problem, and the prompt (a text or messages). `messages`: of an
    answer of several turns, all that follows the prompt, what its environment said included."""

    row: Mapping[str, Any]
    prompt: str | Sequence[Mapping[str, Any]]
    text: str
    ids: Sequence[int]
    finished: bool
    messages: Sequence[Mapping[str, Any]] | None = None


Scorer = Callable[[Asked], float | None]


def scorer_of(config: RewardConfig) -> Scorer:
    """Raises BevatronError if a library is missing."""
    made: Scorer = MAKERS[type(config)](config)
    return made


def imported(module: str, what: str) -> Any:
    """A module of the extra `align`. Raises BevatronError that names it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise BevatronError(
            f"{what} needs {error.name}, which is not installed; pip install 'bevatron[align]'"
        ) from error


def column(row: Mapping[str, Any], name: str) -> Any:
    """Raises BevatronError if the row has no such column."""
    if name not in row:
        has = ", ".join(map(str, row)) or "none"
        raise BevatronError(f"the row has no column {name!r} (it has {has})")
    return row[name]


# --- answers in texts


def without_thoughts(text: str) -> str:
    """What comes after the thoughts; nothing, if they never end."""
    if THINK_END in text:
        return text.rpartition(THINK_END)[2]
    return "" if text.lstrip().startswith(THINK) else text


def extracted(text: str, pattern: str | None) -> str | None:
    """The answer in a text without its thoughts; None if there is none. The last match counts."""
    text = without_thoughts(text)
    if pattern is None:
        return text
    if pattern == "boxed":
        return last_boxed(text)
    found = list(re.finditer(PATTERNS.get(pattern, pattern), text, re.DOTALL))
    return found[-1].group(1) if found else None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...}, whose braces nest; None if it is not closed."""
    at = text.rfind(r"\boxed{")
    if at < 0:
        return None
    begin = at + len(r"\boxed{")
    depth = 1
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0) if text[i - 1] != "\\" else 0
        if not depth:
            return text[begin:i]
    return None


def normalised(text: str) -> str:
    """Without what does not matter: case, spaces, a final period; a number in its plainest form."""
    plain = " ".join(text.split()).casefold()
    plain = plain.removesuffix(".").strip()
    if NUMBER.fullmatch(plain):
        try:
            number = Decimal(plain.replace(",", "").replace("$", ""))
        except InvalidOperation:
            return plain
        return format(number.normalize(), "f")
    return plain


def exact_match(config: ExactMatch) -> Scorer:
    def score(asked: Asked) -> float:
        right = column(asked.row, config.column)
        found = extracted(asked.text, config.pattern)
        if found is None:
            return 0.0
        change = normalised if config.normalise else str
        wanted = right if isinstance(right, list | tuple) else [right]
        return float(change(found) in [change(_gold(str(each))) for each in wanted])

    def _gold(right: str) -> str:
        """GSM8K's and MATH's columns hold a whole solution."""
        if config.pattern in ("gsm8k", "boxed"):
            return extracted(right, config.pattern) or right
        return right

    return score


def math_verify(config: MathVerify) -> Scorer:
    library = imported("math_verify", "the reward math_verify")
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    targets = [
        library.LatexExtractionConfig(boxed_match_priority=0),
        library.ExprExtractionConfig(),
    ]

    def score(asked: Asked) -> float | None:
        right = str(column(asked.row, config.column))
        # A bare answer such as \frac{1}{2} is LaTeX, although nothing marks it.
        plain = library.parse(f"${right}$", fallback_mode="no_fallback")
        gold = library.parse(right) or plain
        if not gold:
            return None
        text = without_thoughts(asked.text)
        boxed = last_boxed(text)
        if boxed is not None:  # several boxes are several guesses
            text = rf"$\boxed{{{boxed}}}$"
        found = library.parse(text, extraction_config=targets, extraction_mode="first_match")
        return float(library.verify(gold, found))

    return score


# --- forms


def think_format(config: ThinkFormat) -> Scorer:
    def score(asked: Asked) -> float:
        text = (THINK if config.opened else "") + asked.text
        if not _thinks(config, asked):
            return float(THINK not in asked.text and THINK_END not in asked.text)
        if text.count(THINK) != 1 or text.count(THINK_END) != 1:
            return 0.0
        before, _, rest = text.partition(THINK)
        thoughts, end, answer = rest.partition(THINK_END)
        return float(bool(end and not before.strip() and thoughts.strip() and answer.strip()))

    return score


def _thinks(config: ThinkFormat, asked: Asked) -> bool:
    if config.thinking != "prompt":
        return config.thinking == "on"
    if isinstance(said := asked.row.get("thinking"), bool):
        return said
    if isinstance(asked.prompt, str):
        return True
    system = [m.get("content") for m in asked.prompt if m.get("role") == "system"]
    return not any(isinstance(s, str) and OFF.search(s) for s in system)


def length(config: Length) -> Scorer:
    return lambda asked: max(0.0, 1 - abs(len(asked.ids) - config.target) / config.target)


def soft_overlong(config: SoftOverlong) -> Scorer:
    """Equation 13 of DAPO (arXiv 2503.14476)."""
    free = config.longest - config.cache

    def score(asked: Asked) -> float:
        n = len(asked.ids)
        if n <= free:
            return 0.0
        return (free - n) / config.cache if n <= config.longest else -1.0

    return score


# --- instructions


def instructions(config: Instructions) -> Scorer:
    common = imported("if_verifiable.common", "the reward instructions")
    imported("langdetect", "the reward instructions").DetectorFactory.seed = 0  # else it draws
    registry = imported(
        f"if_verifiable.{config.benchmark}.instructions_registry", "the reward instructions"
    ).INSTRUCTION_DICT

    def score(asked: Asked) -> float:
        names = column(asked.row, "instruction_id_list")
        arguments = arguments_of(column(asked.row, "kwargs"), len(names))
        for name in names:
            if name not in registry:
                raise BevatronError(f"{name!r} is not an instruction of {config.benchmark}")
        prompt = asked.row.get("prompt", asked.prompt)
        prompt = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        results, found = common.evaluate_instructions(
            asked.text, list(names), arguments, prompt, registry
        )
        del results
        key = ("binary" if config.per == "prompt" else "partial") + f"_{config.mode}"
        return float(getattr(found, key))

    return score


def arguments_of(given: Any, count: int) -> list[dict[str, Any]]:
    """One map per instruction, or one JSON text of them, as some data sets have it. Raises
    BevatronError."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise BevatronError(f"the column kwargs is not JSON ({error})") from error
    if not isinstance(given, list) or len(given) != count:
        raise BevatronError(f"the column kwargs does not hold {count} maps, one per instruction")
    return [dict(each or {}) for each in given]


def reasoning_gym(config: ReasoningGym) -> Scorer:
    library = imported("reasoning_gym", "the reward reasoning_gym")
    functions: dict[str, Any] = {}

    def score(asked: Asked) -> float | None:
        metadata = asked.row.get("metadata")
        source = metadata.get("source_dataset") if isinstance(metadata, Mapping) else None
        if not isinstance(source, str):
            return None  # in a mixture, a problem of another source
        if source not in functions:
            functions[source] = library.get_score_answer_fn(source)
        found = extracted(asked.text, config.pattern)
        if found is None:
            return 0.0
        return float(functions[source](answer=found.strip(), entry=dict(asked.row)))

    return score


MAKERS: dict[type[RewardConfig], Any] = {
    ExactMatch: exact_match,
    MathVerify: math_verify,
    ThinkFormat: think_format,
    Length: length,
    SoftOverlong: soft_overlong,
    Instructions: instructions,
    ReasoningGym: reasoning_gym,
}
