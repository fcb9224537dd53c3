"""The feed of preferences: prompts with several answers, and what a reference said of them before.

All rows are tokenized once at the start, and how long they are is known before the first step. The
ranks share out this work. A row is tokenized again when its step comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from bevatron.align.preference_rows import PreferenceRows
from bevatron.align.reference import Precomputed
from bevatron.errors import BevatronError
from bevatron.parallel.on_all_ranks import on_all
from bevatron.progress import progress
from bevatron.train.config import RunConfig
from bevatron.train.feed import Batch
from bevatron.train.labelled_feed import Examples, LabelledFeed
from bevatron.train.run_start import Start
from bevatron.train.trainer import Trainer

TRIED = 8  # rows that are tokenized before any process starts
ALIVE_EVERY = 256  # rows

# [rows, (row, tokens of its longest sequence, whether answers are left, whether all are equal)]
Table = NDArray[np.int64]


class Long(NamedTuple):
    """How many rows have a sequence that is too long, and how many of these are left out; the
    longest one's tokens."""

    rows: int
    out: int
    longest: int


class Preferences(Examples):
    """Rows that are tokenized, of which some may be left out."""

    long: Long | None = None
    same = 0  # rows whose answers are all the same

    @property
    def of(self) -> PreferenceRows:
        assert isinstance(self.labelled, PreferenceRows)
        return self.labelled

    def count(self, rank: int, ranks: int, alive: Callable[[], None]) -> Table:
        """Of every `ranks`-th row, from row `rank` on. Raises BevatronError naming a row that
        cannot be tokenized."""
        found = []
        numbers = range(rank, len(self.rows), ranks)
        with progress("tokenizing", len(numbers), "rows", show=rank == 0) as advance:
            for i, number in enumerate(numbers):
                if i % ALIVE_EVERY == 0:
                    alive()
                found.append((number, *self.lengths(number)))
                advance(1)
        return np.array(found, dtype=np.int64).reshape(-1, 4)

    def lengths(self, number: int) -> tuple[int, bool, bool]:
        """Of a row the tokens of its longest sequence, whether something of every answer is left
        within the sample's length, and whether its answers are all the same."""
        try:
            found = self.of.tokenized(self.rows[number])
        except BevatronError as error:
            raise BevatronError(f"{self.rows.where(number)}: {error}") from None
        left = all(bool(one.learned[: self.of.length].any()) for one in found)
        same = len({one.ids.tobytes() for one in found}) == 1
        return max(len(one) for one in found), left, same

    def join(self, tables: Sequence[Table]) -> None:
        """Know all rows. Raises BevatronError if some are too long and may not be, or none is
        left."""
        table = np.concatenate(tables)
        table = table[np.argsort(table[:, 0])]
        length, too_long = self.of.length, self.of.too_long
        long = table[:, 1] > length
        if long.any() and too_long == "refuse":
            worst = int(table[:, 1].argmax())
            raise BevatronError(
                f"{int(long.sum()):,} of {len(table):,} rows have a prompt with an answer of more "
                f"than data.seq_len {length} tokens; the longest has {int(table[worst, 1]):,} "
                f"({self.rows.where(worst)}); raise data.seq_len, or set objective.too_long to "
                "truncate or drop"
            )
        kept = ~long if too_long == "drop" else table[:, 2] > 0
        if not kept.any():
            raise BevatronError(
                f"{self.rows.where(0)} and all others: nothing of an answer is left within "
                f"data.seq_len {length}; raise it"
            )
        self.long = Long(int(long.sum()), int((~kept).sum()), int(table[:, 1].max()))
        self.same = int(table[kept][:, 3].sum())
        self.windows = np.stack((table[kept][:, 0], np.zeros(int(kept.sum()), np.int64)), 1)

    def told(self) -> list[str]:
        """Lines on what is not as the rows have it, and on what teaches nothing."""
        assert self.long is not None
        (rows, out, longest), lines = self.long, []
        if rows:
            cut = "lose the end of an answer"
            if self.of.too_long == "drop":
                cut = "are left out"
            elif out:
                cut += f", {out:,} of them all of one, and are left out"
            lines.append(
                f"{rows:,} of {len(self.rows):,} rows have sequences of more than "
                f"{self.of.length:,} tokens (the longest {longest:,}) and {cut}"
            )
        if self.same:
            lines.append(
                f"{self.same:,} of {len(self.rows):,} rows prefer an answer to itself: nothing is "
                "learned from the comparison"
            )
        return lines


class PreferenceFeed(LabelledFeed):
    """Every row comes once an epoch, in another order each."""

    examples = Preferences
    training: Preferences
    validation: Preferences | None
    precomputed: Precomputed | None = None

    @classmethod
    def check(cls, config: RunConfig, start: Start) -> None:
        rows, labelled = cls.rows_of(config, start)
        assert isinstance(labelled, PreferenceRows)
        for number in range(min(TRIED, len(rows))):
            try:
                labelled.tokenized(rows[number])
            except BevatronError as error:
                raise BevatronError(f"{rows.where(number)}: {error}") from None

    def bind(self, trainer: Trainer) -> None:
        super().bind(trainer)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        parts: dict[str, Examples] = {"train": self.training}
        if self.validation is not None:
            parts["validation"] = self.validation
        for part in (self.training, self.validation):
            if part is not None and part.long is None:
                tables = on_all(partial(part.count, rank, ranks, self.alive))
                on_all(partial(part.join, tables))
        stored = trainer.objective.stored
        if isinstance(stored, Precomputed):
            stored.prepare(trainer, parts, self.alive)
            self.precomputed = stored

    def summary(self, steps: int) -> list[str]:
        lines = super().summary(steps) + self.training.told()
        if self.validation is not None:
            lines += [f"validation: {line}" for line in self.validation.told()]
        if self.precomputed is not None:
            lines.append(f"the reference's log-probabilities are in {self.precomputed.folder}")
        return lines

    def _samples(self, examples: Examples, numbers: Sequence[int]) -> Batch:
        rows = super()._samples(examples, numbers)
        if self.precomputed is None:
            return rows
        kind = "train" if examples is self.training else "validation"
        return rows | self.precomputed.read(kind, numbers, rows["tokens"])
