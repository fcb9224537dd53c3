"""Problems that are made when they are asked for: the row at an index is a function of the seed.

A source of data names one by its path: `reasoning_gym:chain_sum` for any of reasoning_gym's, and
`generator:sums` or `generator:instructions` for those below. They never end. Where a pass over the
data is needed, as in a validation, it is `size` problems long.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from random import Random
from typing import Any, Protocol

from bevatron.align.instruction_prompts import checked_kinds, instruction_row
from bevatron.align.scorers import imported
from bevatron.data.permutation import derive
from bevatron.errors import BevatronError

SIZE = 256  # problems of one pass, if nothing is said
CHUNK = 500  # problems of one seed of reasoning_gym's, as its own ReseedingDataset has it
Row = dict[str, Any]


class Generator(Protocol):
    """An endless list of rows; `size` of them make one pass."""

    size: int

    def __getitem__(self, index: int) -> Row: ...


def is_generator(path: str) -> bool:
    """Whether a source's path names one."""
    return path.partition(":")[0] in ("reasoning_gym", "generator") and ":" in path


def generator_of(path: str, parameters: Mapping[str, Any], seed: int, held_out: bool) -> Generator:
    """Raises BevatronError for an unknown one, and for parameters that it does not take."""
    library, _, name = path.partition(":")
    given = dict(parameters)
    size = given.pop("size", SIZE)
    if type(size) is not int or size < 1:
        raise BevatronError(f"{path}: parameters.size is {size!r}, expected a number from 1 on")
    if library == "reasoning_gym":
        return ReasoningGymProblems(path, name, given, seed, size)
    if name not in LOCAL:
        known = ", ".join(f"generator:{each}" for each in LOCAL)
        raise BevatronError(f"{path}: there is no such generator; known are {known}")
    make = LOCAL[name]
    takes = [p for p in inspect.signature(make).parameters if p != "held_out"]
    for key in given:
        if key not in takes:
            raise BevatronError(
                f"{path}: parameters.{key} is unknown; known are {', '.join([*takes, 'size'])}"
            )
    try:
        return LocalProblems(make(**given, held_out=held_out), seed, size)
    except TypeError as error:
        raise BevatronError(f"{path}: parameters: {error}") from error
    except BevatronError as error:
        raise BevatronError(f"{path}: parameters.{error}") from error


class LocalProblems:
    def __init__(self, make: Callable[[Random], Row], seed: int, size: int) -> None:
        self.make, self.seed, self.size = make, seed, size

    def __getitem__(self, index: int) -> Row:
        return self.make(Random(derive(self.seed, index)))


class ReasoningGymProblems:
    """Any of reasoning_gym's generators, with its own settings as parameters."""

    def __init__(self, path: str, name: str, given: Row, seed: int, size: int) -> None:
        self.path, self.name, self.given, self.seed, self.size = path, name, given, seed, size
        self.library = imported("reasoning_gym", path)
        known = self.library.factory.DATASETS
        if name not in known:
            raise BevatronError(
                f"{path}: reasoning_gym has no {name!r}; it has {', '.join(sorted(known))}"
            )
        for key in given:
            fields = known[name][1].__dataclass_fields__
            if key not in fields or key == "seed":
                takes = ", ".join(f for f in fields if f != "seed")
                raise BevatronError(f"{path}: parameters.{key} is unknown; known are {takes}")
        self._chunk = lru_cache(maxsize=4)(self._made)
        self[0]

    def __getitem__(self, index: int) -> Row:
        chunk, at = divmod(index, CHUNK)
        row = dict(self._chunk(chunk)[at])
        return {"prompt": row["question"], **row}

    def _made(self, chunk: int) -> Any:
        seed = derive(self.seed, chunk) & 0x7FFFFFFF
        try:
            return self.library.create_dataset(self.name, seed=seed, size=CHUNK, **self.given)
        except (AssertionError, TypeError, ValueError, KeyError) as error:
            raise BevatronError(f"{self.path}: parameters: {error}") from error


def sums(
    *,
    terms: int = 2,
    digits: int = 1,
    form: str = "plain",
    held_out: bool = False,
) -> Callable[[Random], Row]:
    """Sums of numbers: `plain` is "3+4=", `words` a story that ends with a question, as GSM8K's do.
    The column `answer` is the number alone."""
    del held_out
    if form not in FORMS:
        raise BevatronError(f"form is {form!r}, expected {' or '.join(FORMS)}")
    for name, value in (("terms", terms), ("digits", digits)):
        if type(value) is not int or value < 1:
            raise BevatronError(f"{name} is {value!r}, expected a number from 1 on")

    def make(random: Random) -> Row:
        numbers = [random.randrange(10**digits) for _ in range(terms)]
        return {"prompt": FORMS[form](numbers, random), "answer": str(sum(numbers))}

    return make


NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo")
THINGS = ("apples", "books", "coins", "shells", "stamps", "marbles")


def _plain(numbers: Sequence[int], random: Random) -> str:
    del random
    return "+".join(map(str, numbers)) + "="


def _words(numbers: Sequence[int], random: Random) -> str:
    name, things = random.choice(NAMES), random.choice(THINGS)
    first, *more = numbers
    said = [f"{name} has {first} {things}."]
    said += [f"Then {name} gets {n} more." for n in more]
    return " ".join([*said, f"How many {things} does {name} have now?"])


FORMS: dict[str, Callable[[Sequence[int], Random], str]] = {"plain": _plain, "words": _words}


def instructions(
    *,
    kinds: list[str] | None = None,
    least: int = 1,
    most: int = 1,
    held_out: bool = False,
) -> Callable[[Random], Row]:
    """Requests with `least` to `most` of IFEval's instructions; see `instruction_prompts.py`. A
    validation has other topics than the training."""
    known = checked_kinds(kinds)
    if type(least) is not int or type(most) is not int or not 1 <= least <= most:
        raise BevatronError(f"least is {least!r} and most is {most!r}, expected 1 <= least <= most")
    return lambda random: instruction_row(random, known, least, most, held_out)


LOCAL: dict[str, Callable[..., Callable[[Random], Row]]] = {
    "sums": sums,
    "instructions": instructions,
}
