"""Rows that reward models learn from, as token ids: pairs of answers, or answers with scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bevatron.align.preference_rows import Answers, PreferenceRows
from bevatron.chat.chat_messages import ChatError
from bevatron.data.chat_examples import ChatExamples, Example
from bevatron.data.dataset_rows import Row
from bevatron.data.labelled_examples import Arrays, is_number, is_text
from bevatron.errors import BevatronError

ANSWERS = ("completion", "response")  # HelpSteer's name is the second


class RewardPairs(PreferenceRows):
    """As `PreferenceRows`; texts `chosen` and `rejected` need no prompt, as for TRL's
    RewardTrainer."""

    def read(self, row: Row) -> Answers:
        if "prompt" not in row and all(is_text(row.get(name)) for name in ("chosen", "rejected")):
            row = {**row, "prompt": ""}
        return super().read(row)

    def lengths(self, row: Row) -> list[int]:
        """Tokens of the row's sequences."""
        return [len(example) for example in self.tokenized(row)]


class ScoredAnswers:
    """Rows with `messages`, or with a `prompt` and a `completion` or `response`, all texts or all
    lists of messages; and a number for each attribute, which may lie in an object `label` too. A
    `data.labelled_examples.Labelled`.

    Arrays: `tokens` [T] int64, padded at the end; `scores` [attributes] fp32; `cut` [], whether the
    sequence was too long and lost its end; `real` [], whether there is a row.
    """

    windows = False

    def __init__(
        self,
        examples: ChatExamples,
        length: int,
        attributes: Sequence[str],
        *,
        pad_id: int | None = None,
    ) -> None:
        self.examples, self.length, self.attributes = examples, length, list(attributes)
        known = (pad_id, examples.tokenizer.pad_id, examples.tokenizer.eos_id, 0)
        self.pad_id = next(i for i in known if i is not None)

    def check(self, row: Row) -> None:
        self._scores(row)
        if "messages" not in row:
            self._answer(row)

    def encode(self, rows: Sequence[Row]) -> list[list[Arrays]]:
        return [[self._arrays(row)] for row in rows]

    def lengths(self, row: Row) -> list[int]:
        """Tokens of the row's sequences."""
        return [len(self._example(row).ids)]

    def blank(self) -> Arrays:
        return {
            "tokens": np.full(self.length, self.pad_id, dtype=np.int64),
            "scores": np.zeros(len(self.attributes), dtype=np.float32),
            "cut": np.array(False),
            "real": np.array(False),
        }

    def _arrays(self, row: Row) -> Arrays:
        arrays, ids = self.blank(), self._example(row).ids
        n = min(len(ids), self.length)
        arrays["tokens"][:n] = ids[:n]
        arrays["scores"] = np.array(self._scores(row), dtype=np.float32)
        arrays["cut"], arrays["real"] = np.array(len(ids) > self.length), np.array(True)
        return arrays

    def _example(self, row: Row) -> Example:
        try:
            if "messages" in row:
                return self.examples.messages(row["messages"])
            return self.examples.completion(row.get("prompt", ""), row[self._answer(row)])
        except ChatError as error:
            raise BevatronError(str(error)) from error

    def _answer(self, row: Row) -> str:
        """The column of the answer."""
        for name in ANSWERS:
            if name in row:
                for text in (row.get("prompt", ""), row[name]):
                    if not is_text(text) and not isinstance(text, list):
                        raise BevatronError(
                            f"its prompt or {name} is neither a text nor a list of messages"
                        )
                return name
        raise BevatronError(
            'has neither "messages" nor "prompt" with "completion" or "response", only the keys '
            + ", ".join(map(repr, row))[:200]
        )

    def _scores(self, row: Row) -> list[float]:
        label = row.get("label")
        inner = label if isinstance(label, dict) else {}
        found: list[Any] = [row.get(name, inner.get(name)) for name in self.attributes]
        for name, value in zip(self.attributes, found, strict=True):
            if not is_number(value):
                raise BevatronError(
                    f'"{name}" is {value!r}, expected a finite number; objective.attributes names '
                    "the columns with scores"
                )
        return [float(value) for value in found]
