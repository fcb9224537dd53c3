"""The feed of what is learned token by token: conversations, completions, texts.

All of it is tokenized once at the start, and only how long each example is stays in memory: how
many samples there are, which examples share one, and whether some are too long is known before the
first step. The ranks share out this work. An example is tokenized again when its step comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from bevatron.align.chat_rows import ChatRows, StoredRows, is_store
from bevatron.align.packing import best_fit_decreasing
from bevatron.data.chat_examples import Example
from bevatron.data.chat_rows import examples_of_rows
from bevatron.data.labelled_examples import Arrays, Labelled
from bevatron.data.token_store import TokenStore
from bevatron.data.tokenize import cores
from bevatron.errors import BevatronError
from bevatron.parallel.on_all_ranks import on_all
from bevatron.progress import progress
from bevatron.train.config import RunConfig, SourceConfig
from bevatron.train.labelled_feed import Examples, LabelledFeed, labelled_of
from bevatron.train.run_start import Start
from bevatron.train.trainer import Trainer

Table = NDArray[np.int64]
ROW, WINDOW, LENGTH, LEARNED, LEFT, SPLIT = range(6)  # columns; LEFT: learned if cut off


class Conversations(Examples):
    """Examples that are tokenized, and the samples that they are packed in."""

    labelled: ChatRows
    table: Table | None = None  # [examples, columns], in the order of the rows

    @staticmethod
    def read(sources: Sequence[SourceConfig], labelled: Labelled) -> Any:
        """Rows, or documents of token stores."""
        stored = [source.path for source in sources if is_store(source.path)]
        if not stored:
            return Examples.read(sources, labelled)
        other = next((s.path for s in sources if s.path not in stored), None)
        if other is not None:
            raise BevatronError(
                f"data: {stored[0]} is a token store, and {other} is none; name one of the two "
                "kinds (`bevatron tokenize --chat` makes a store)"
            )
        assert isinstance(labelled, ChatRows)
        return StoredRows(stored, labelled)

    def count(self, rank: int = 0, ranks: int = 1) -> Table:
        """That of every `ranks`-th row, from row `rank` on. Raises BevatronError naming a row that
        cannot be read."""
        numbers, labelled = range(rank, len(self.rows), ranks), self.labelled
        source: Any = self.rows
        if isinstance(source, StoredRows):
            rows: Iterator[list[Example]] = (labelled.of_row(source[n]) for n in numbers)
        else:
            workers = max(1, cores() // ranks)
            rows = examples_of_rows(labelled.examples, source, numbers, workers)
        found: list[tuple[int, ...]] = []
        with progress("tokenizing", len(numbers), "rows", show=rank == 0) as advance:
            for number, examples in zip(numbers, rows, strict=True):
                for window, one in enumerate(examples):
                    learned = int(one.learned.sum())
                    left = int(one.learned[: labelled.length].sum())
                    found.append((number, window, len(one), learned, left, one.split))
                advance(1)
        return np.array(found, dtype=np.int64).reshape(-1, 6)

    def join(self, tables: Sequence[Table]) -> None:
        """Know all examples. Raises BevatronError if some are too long and may not be, or none can
        be learned."""
        table = np.concatenate(tables)
        table = table[np.lexsort((table[:, WINDOW], table[:, ROW]))]
        length, too_long = self.labelled.length, self.labelled.too_long
        long = table[:, LENGTH] > length
        if too_long == "refuse" and long.any():
            worst = int(table[:, LENGTH].argmax())
            raise BevatronError(
                f"{int(long.sum()):,} of {len(table):,} examples are longer than data.seq_len "
                f"{length}; the longest has {int(table[worst, LENGTH]):,} tokens "
                f"({self.rows.where(int(table[worst, ROW]))}); raise data.seq_len, or set "
                "objective.too_long to truncate or drop"
            )
        kept = ~long if too_long == "drop" else table[:, LEFT] > 0
        if not kept.any():
            raise BevatronError(
                f"{self.rows.where(0)} and all others: nothing is left to learn within "
                f"data.seq_len {length}; raise it"
            )
        self.table, self.windows = table, table[kept][:, [ROW, WINDOW]]
        self.lengths = np.minimum(table[kept][:, LENGTH], length)
        self.learned = int(table[kept][:, LEFT].sum())

    @cached_property
    def samples(self) -> list[list[int]]:
        """The examples of each sample."""
        if self.table is None:
            self.join([self.count()])
        if self.labelled.packing:
            return best_fit_decreasing(self.lengths, self.labelled.length)
        return [[number] for number in range(len(self.lengths))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, numbers: Sequence[int]) -> list[Arrays]:
        taken = [self.samples[n] if n < len(self) else [] for n in numbers]
        encoded: dict[int, list[Arrays]] = {}
        out = []
        for sample in taken:
            examples = []
            for number in sample:
                assert self.windows is not None
                row, window = self.windows[number].tolist()
                if row not in encoded:
                    encoded[row] = self.labelled.encode([self.rows[row]])[0]
                examples.append(encoded[row][window])
            out.append(self.labelled.sample(examples))
        return out

    def _count(self) -> Any:
        return None  # `join` does

    def told(self) -> list[str]:
        """Lines on what the samples are of, and on what is not as the rows have it."""
        count, table = len(self), self.table
        assert table is not None
        room, tokens = count * self.labelled.length, int(self.lengths.sum())
        examples = self.labelled.examples
        lines = [
            f"{len(self.lengths):,} examples of {len(self.rows):,} rows in {count:,} samples: "
            f"{tokens:,} tokens, of which {self.learned:,} are learned, and "
            f"{1 - tokens / room:.1%} padding"
        ]
        long, length = table[:, LENGTH] > self.labelled.length, self.labelled.length
        source: Any = self.rows
        if isinstance(source, StoredRows) and source.masked:
            given = {
                "objective.assistant_only_loss": examples.assistant_only,
                "objective.completion_only_loss": examples.completion_only,
            }
            if off := [name for name, only in given.items() if not only]:
                lines.append(
                    f"{' and '.join(off)}: false changes nothing here: a token store says itself "
                    "what is learned (`bevatron tokenize --chat --learn-all` makes one of which "
                    "all is)"
                )
        if (more := len(table) - len(self.rows)) > 0:
            lines.append(
                f"{more:,} examples more than rows: the chat template writes answers in another "
                "way once a conversation goes on, so each is learned as it was said"
            )
        if (n := int(long.sum())) and self.labelled.too_long == "drop":
            lines.append(f"{n:,} examples of more than {length:,} tokens are left out")
        elif n:
            empty = int((table[:, LEFT] == 0).sum())
            lost = int((table[:, LEARNED] - table[:, LEFT]).sum())
            lines.append(
                f"{n:,} examples are cut off at {length:,} tokens, with {lost:,} tokens that were "
                f"to be learned; {empty:,} of them have none left and are left out"
            )
        if n := int((table[:, SPLIT] > 0).sum()):
            lines.append(
                f"{n:,} examples begin an answer inside of a token that the prompt begins, which "
                "reads otherwise at inference; end prompts where a token ends (often: before a "
                "space)"
            )
        return lines


class SftFeed(LabelledFeed):
    """Every example comes once an epoch, in another order each."""

    training: Conversations
    validation: Conversations | None

    examples = Conversations

    @classmethod
    def check(cls, config: RunConfig, start: Start) -> None:
        labelled = labelled_of(config, start)
        for sources in (config.data.train, config.data.validation):
            if sources:
                cls.examples.read(sources, labelled)

    @staticmethod
    def hash_of(path: str) -> str:
        if not is_store(path):
            return LabelledFeed.hash_of(path)
        info = TokenStore.open(Path(path)).info
        return info.hash if info.learned_hash is None else f"{info.hash} {info.learned_hash}"

    def bind(self, trainer: Trainer) -> None:
        super().bind(trainer)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        for part in (self.training, self.validation):
            if part is not None and part.table is None:
                part.join(on_all(lambda part=part: part.count(rank, ranks)))  # type: ignore[misc]

    def summary(self, steps: int) -> list[str]:
        taken, count = self.batches.position(steps), len(self.training)
        of = f"{taken:,} samples, {taken / count:.2f} epochs of {count:,}"
        lines = [f"{', '.join(self.fingerprints())}: {of}", *self.training.told()]
        for part in [self.validation] if self.validation is not None else []:
            lines += [f"validation: {line}" for line in part.told()]
        return lines
