"""Problems to answer: rows of datasets, or of generators, each with the prompt that is made of it.

`problems[position]` is a function of the seed and the position, as everything that a run reads.
Several sources are mixed by their weights, exactly: of the first n positions each source has its
share, rounded. A dataset's rows come in another order every epoch, each once; a validation takes
all rows once, in order.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from bevatron.align.curriculum import Curriculum
from bevatron.align.problem_config import ProblemsConfig
from bevatron.align.problem_generators import generator_of, is_generator
from bevatron.checkpoint.read_boxes import hash_bytes
from bevatron.data.dataset_rows import Rows, hash_of_rows
from bevatron.data.permutation import Permutation, derive
from bevatron.data.sample_order import Shares
from bevatron.errors import BevatronError
from bevatron.train.config import RunConfig, SourceConfig
from bevatron.train.run_start import Start

PERMUTED, GENERATED = 5, 6  # tell these draws from others of the seed
HELD_OUT = 0x5EED  # the seed of validations, which are the same in every run
Row = dict[str, Any]
Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Problem:
    """A row, and the prompt that is made of it: a text, or messages."""

    row: Row
    prompt: Prompt


class Problems:
    """Args:
        shuffled: False is a validation: each source once, in order, and held-out problems of
            generators.
        batch, steps: problems of a batch, and batches of the run, for a curriculum.
    Attributes:
        curriculum: that orders the training, if there is one.
    Raises BevatronError for sources that cannot be read, and for rows without a prompt, naming the
    line.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        config: ProblemsConfig,
        seed: int,
        *,
        shuffled: bool = True,
        batch: int = 1,
        steps: int = 1,
    ) -> None:
        self.sources, self.config, self.shuffled = list(sources), config, shuffled
        self.seed = seed if shuffled else HELD_OUT
        self.parts: list[Any] = [self._part(number) for number in range(len(self.sources))]
        self.sizes = [len(p) if isinstance(p, Rows) else p.size for p in self.parts]
        self.shares = Shares([source.weight for source in self.sources])
        self._ends = np.cumsum(self.sizes)
        self._permutations: dict[tuple[int, int], Permutation] = {}
        self.curriculum = None
        if config.curriculum is not None and shuffled:
            self.curriculum = Curriculum(
                self._rates(config.curriculum.column),
                config.curriculum,
                batch=batch,
                steps=steps,
                seed=self.seed,
            )

    @classmethod
    def open(cls, config: RunConfig, start: Start, *, validation: bool = False) -> Self:
        """Those of a run: what it trains on, or what it is measured on, which may be none."""
        del start
        how = getattr(config.objective, "problems", None) or ProblemsConfig()
        if config.data.stages:
            raise BevatronError("data.stages: problems have no stages; drop it, or order the "
                                "problems by objective.problems.curriculum")  # fmt: skip
        if validation:
            return cls(config.data.validation, how, HELD_OUT, shuffled=False)
        groups = getattr(config.objective, "num_generations", 1)
        batch = max(1, config.train.global_batch // groups)
        return cls(config.data.train, how, config.train.seed, batch=batch, steps=config.train.steps)

    def __len__(self) -> int:
        """Of one pass over all sources."""
        return int(self._ends[-1]) if self.sources else 0

    def __getitem__(self, position: int) -> Problem:
        source, index = self.place(position)
        return self.problem(source, index)

    def place(self, position: int) -> tuple[int, int]:
        """The source, and the index of the row in it, at a position."""
        if self.curriculum is not None:
            position = self.curriculum[position]
        if not self.shuffled or self.curriculum is not None:
            source = int(np.searchsorted(self._ends, position, side="right"))
            if not 0 <= position < len(self):
                raise IndexError(position)
            return source, position - (int(self._ends[source - 1]) if source else 0)
        before, after = self.shares.among(position), self.shares.among(position + 1)
        source = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
        if not isinstance(self.parts[source], Rows):
            return source, before[source]
        epoch, at = divmod(before[source], self.sizes[source])
        return source, int(self._permutation(source, epoch)(np.array([at]))[0])

    def problem(self, source: int, index: int) -> Problem:
        """The problem of a row."""
        row = self.parts[source][index]
        return Problem(row, self._prompt(row))

    @staticmethod
    def hash_of(path: str) -> str:
        """Of a source: the same for the same content anywhere. A generator is its name; that its
        parameters stay the same is looked after with the rest of the configuration."""
        return hash_bytes(path.encode()) if is_generator(path) else hash_of_rows(path)

    def fingerprints(self) -> dict[str, str]:
        """The hash of each source, by its path."""
        return {source.path: self.hash_of(source.path) for source in self.sources}

    def summary(self, problems: int) -> list[str]:
        """Lines about what a run of so many takes."""
        out = []
        counts = self.shares.among(problems)
        for source, part, size, count in zip(
            self.sources, self.parts, self.sizes, counts, strict=True
        ):
            if self.curriculum is not None:
                out.append(f"{source.path}: {size:,} problems")
            elif isinstance(part, Rows):
                epochs = count / size
                out.append(f"{source.path}: {count:,} problems, {epochs:.2f} epochs of {size:,}")
            else:
                out.append(f"{source.path}: {count:,} problems, made as they are needed")
        if self.curriculum is not None:
            kept, rates = len(self.curriculum.kept), self.curriculum.config
            out.append(
                f"curriculum: {kept:,} problems have a pass rate below {rates.drop_from:g}, "
                f"{problems / kept:.2f} epochs; from {rates.start:g} to {rates.end:g} in "
                f"{self.curriculum.steps:,} batches"
            )
        return out

    def _part(self, number: int) -> Any:
        source = self.sources[number]
        if is_generator(source.path):
            seed = derive(self.seed, GENERATED, number)
            return generator_of(source.path, source.parameters, seed, not self.shuffled)
        if source.parameters:
            raise BevatronError(
                f"{source.path}: parameters are for generators, and this is none; drop them"
            )
        return Rows([source.path], self._check)

    def _rates(self, column: str) -> list[float]:
        """The pass rates of all rows. Raises BevatronError where one has none."""
        rates = []
        for source, part in zip(self.sources, self.parts, strict=True):
            if not isinstance(part, Rows):
                raise BevatronError(
                    f"{source.path}: a generator's problems have no pass rate, which "
                    "problems.curriculum orders by; write some down with `bevatron pass-rates`"
                )
            if source.weight != self.sources[0].weight:
                raise BevatronError(
                    f"{source.path}: its weight is {source.weight:g}, but a curriculum orders the "
                    "problems of all sources together; drop the weights"
                )
            for number in range(len(part)):
                rate = part[number].get(column)
                if (
                    isinstance(rate, bool)
                    or not isinstance(rate, int | float)
                    or not 0 <= rate <= 1
                ):
                    raise BevatronError(
                        f'{part.where(number)}: "{column}" is {rate!r}, expected a pass rate from '
                        "0 to 1; `bevatron pass-rates` measures it"
                    )
                rates.append(float(rate))
        return rates

    def _permutation(self, source: int, epoch: int) -> Permutation:
        known = self._permutations.get((source, epoch))
        if known is None:
            if len(self._permutations) > 4 * len(self.parts):
                self._permutations.clear()
            key = derive(self.seed, PERMUTED, source, epoch)
            known = self._permutations[source, epoch] = Permutation(self.sizes[source], key)
        return known

    def _check(self, row: Row) -> None:
        self._prompt(row)

    def _prompt(self, row: Mapping[str, Any]) -> Prompt:
        config = self.config
        said = row.get(config.column)
        if isinstance(said, list) and said and all(_is_message(m) for m in said):
            if config.template is not None:
                raise BevatronError(
                    f'"{config.column}" holds messages, and problems.template is for texts; drop it'
                )
            messages = [dict(m) for m in said]
            if config.system is not None and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": config.system})
            return messages
        if not isinstance(said, str) or not said:
            has = ", ".join(map(str, row))[:200] or "none"
            raise BevatronError(
                f'"{config.column}" is neither a text nor a list of messages with role and content '
                f"(the row has {has}); name the column of the prompt in problems.column"
            )
        text = said if config.template is None else _filled(config.template, said, row)
        if not config.chat and config.system is None:
            return text
        system = [] if config.system is None else [{"role": "system", "content": config.system}]
        return [*system, {"role": "user", "content": text}]


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def _filled(template: str, prompt: str, row: Mapping[str, Any]) -> str:
    """{prompt} and other columns of a template, in whose texts braces stay what they are."""
    out = []
    try:
        for text, name, form, conversion in string.Formatter().parse(template):
            out.append(text)
            if name is None:
                continue
            if form or conversion or (name != "prompt" and name not in row):
                raise BevatronError(f"problems.template: {{{name}}} is no column of the row")
            out.append(prompt if name == "prompt" else str(row[name]))
    except ValueError as error:
        raise BevatronError(f"problems.template: {error}; write {{{{ for a brace") from error
    return "".join(out)
