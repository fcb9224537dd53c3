"""Rows of preferences as token ids: a prompt, and two or more answers to it.

A row has the columns that TRL's datasets have: `prompt`, `chosen` and `rejected`, all three texts
or all three lists of messages; or `chosen` and `rejected` alone, two conversations that begin with
the same messages, which are the prompt then. How good an answer is stands in `chosen_reward` and
`rejected_reward`. Of more than two answers a row has a list of `responses` and one of `rewards`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bevatron.chat.chat_messages import ChatError
from bevatron.data.chat_examples import ChatExamples, Example
from bevatron.data.chat_rows import template_inputs
from bevatron.data.dataset_rows import Row
from bevatron.data.labelled_examples import Arrays, is_text
from bevatron.errors import BevatronError

Text = str | list[dict[str, Any]]


class Answers(NamedTuple):
    """What a row says.

    Attributes:
        prompt, texts: a text and texts, or messages and lists of messages; of two answers the
            chosen one is first, of several those with higher rewards are.
        rewards: as many, if the row has them.
        numbers: values of other columns that were asked for.
    """

    prompt: Text
    texts: list[Text]
    rewards: list[float] | None
    numbers: list[float]


class PreferenceRows:
    """Makes arrays of rows, `count` sequences of each; a `data.labelled_examples.Labelled`.

    Arrays: `tokens` [count, T] int64, each prompt with its answer, padded at the end; `learned`
    [count, T] bool, the answer's tokens and the end of its turn; `rewards` [count] float32, if they
    are needed; `cut` [count] bool, whether a sequence was too long and lost its end; `real` [],
    bool, whether there is a row; and under their names float32 scalars of further columns.

    Args:
        length: T; longer sequences lose their ends, as with TRL's `truncation_mode: keep_start`.
        too_long: whether a run refuses them, truncates them or drops their rows; that is for who
            reads the rows.
        count: answers of a row.
        rewards: whether answers need rewards.
        default_rewards: of a row's chosen and rejected answer, where it has none.
        numbers: further columns with a number, 0 where a row has none.
        pad_id: by default the tokenizer's pad token, or its eos.
    """

    windows = False

    def __init__(
        self,
        examples: ChatExamples,
        length: int,
        *,
        count: int = 2,
        rewards: bool = False,
        default_rewards: tuple[float | None, float | None] = (None, None),
        numbers: Sequence[str] = (),
        too_long: str = "truncate",
        pad_id: int | None = None,
    ) -> None:
        self.examples, self.length, self.count = examples, length, count
        self.too_long = too_long
        self.rewards, self.default_rewards, self.numbers = rewards, default_rewards, numbers
        opened = examples.tokenizer
        known = (pad_id, opened.pad_id, opened.eos_id, 0)
        self.pad_id = next(i for i in known if i is not None)

    def check(self, row: Row) -> None:
        self.read(row)

    def read(self, row: Row) -> Answers:
        """Raises BevatronError saying what is wrong with a row."""
        if "responses" in row:
            prompt, texts = row.get("prompt"), row["responses"]
            if not isinstance(texts, list) or len(texts) != self.count:
                found = len(texts) if isinstance(texts, list) else "no list of"
                raise BevatronError(
                    f'has {found} "responses", expected {self.count}; objective.responses of rpo '
                    "says how many a row has"
                )
        elif self.count > 2:
            raise BevatronError(
                f'has no "responses", of which objective.responses is {self.count}, only '
                f"{_keys(row)}"
            )
        else:
            prompt, texts = _pair(row)
        kinds = {_kind(text, row) for text in (prompt, *texts)}
        if len(kinds) > 1:
            raise BevatronError(
                "the prompt and its answers are texts and lists of messages; expected all of a kind"
            )
        rewards = self._rewards(row)
        if rewards is not None and "responses" in row:
            ranked = sorted(zip(rewards, range(self.count), strict=True), key=lambda r: -r[0])
            texts, rewards = [texts[i] for _, i in ranked], [reward for reward, _ in ranked]
        numbers = [_number(row.get(name, 0.0), name) for name in self.numbers]
        return Answers(prompt, texts, rewards, numbers)  # type: ignore[arg-type]

    def encode(self, rows: Sequence[Row]) -> list[list[Arrays]]:
        return [[self._arrays(row)] for row in rows]

    def tokenized(self, row: Row) -> list[Example]:
        """The prompt with each of its answers."""
        prompt, texts, _, _ = self.read(row)
        tools, variables = template_inputs(row)
        try:
            return [self.examples.completion(prompt, t, tools, **variables) for t in texts]
        except ChatError as error:
            raise BevatronError(str(error)) from error

    def blank(self) -> Arrays:
        shape = (self.count, self.length)
        return self._with_rewards(
            {
                "tokens": np.full(shape, self.pad_id, dtype=np.int64),
                "learned": np.zeros(shape, dtype=bool),
                "cut": np.zeros(self.count, dtype=bool),
                "real": np.array(False),
            },
            [0.0] * self.count,
            [0.0] * len(self.numbers),
        )

    def _arrays(self, row: Row) -> Arrays:
        arrays, found = self.blank(), self.tokenized(row)
        arrays["real"] = np.array(True)
        for i, example in enumerate(found):
            n = min(len(example.ids), self.length)
            arrays["tokens"][i, :n] = example.ids[:n]
            arrays["learned"][i, :n] = example.learned[:n]
            arrays["cut"][i] = len(example.ids) > self.length
        read = self.read(row)
        return self._with_rewards(arrays, read.rewards or [], read.numbers)

    def _with_rewards(
        self, arrays: Arrays, rewards: Sequence[float], numbers: Sequence[float]
    ) -> Arrays:
        if self.rewards:
            arrays["rewards"] = np.array(rewards, dtype=np.float32)
        for name, value in zip(self.numbers, numbers, strict=True):
            arrays[name] = np.array(value, dtype=np.float32)
        return arrays

    def _rewards(self, row: Row) -> list[float] | None:
        if not self.rewards:
            return None
        if "responses" in row:
            rewards = row.get("rewards")
            if not isinstance(rewards, list) or len(rewards) != self.count:
                raise BevatronError(f'"rewards" is {rewards!r}, expected one for each response')
            return [_number(value, "rewards") for value in rewards]
        names = ("chosen_reward", "rejected_reward")
        pairs = zip(names, self.default_rewards, strict=True)
        values = [row.get(name, default) for name, default in pairs]
        for name, value in zip(names, values, strict=True):
            if value is None:
                raise BevatronError(
                    f'has no "{name}", only {_keys(row)}; objective.default_{name} is taken for '
                    "rows without one"
                )
        return [_number(value, name) for name, value in zip(names, values, strict=True)]


def _pair(row: Row) -> tuple[Text, list[Text]]:
    """The prompt, and the chosen and the rejected answer."""
    for name in ("chosen", "rejected"):
        if name not in row:
            raise BevatronError(f'has no "{name}", only {_keys(row)}')
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    lists = isinstance(chosen, list) and isinstance(rejected, list)
    if lists and (prompt is None or isinstance(prompt, str)):
        shared = 0
        for ours, theirs in zip(chosen, rejected, strict=False):  # type: ignore[arg-type]
            if ours != theirs:
                break
            shared += 1
        given = chosen[:shared]  # type: ignore[index]
        if not given or shared in (len(chosen), len(rejected)):  # type: ignore[arg-type]
            raise BevatronError(
                '"chosen" and "rejected" are conversations without a "prompt", and '
                + ("begin with no message that is the same" if not given else "one ends where "
                   "the other goes on")
                + "; expected the same messages, and then two answers"
            )  # fmt: skip
        if prompt is not None and not any(m.get("content") == prompt for m in given):
            raise BevatronError(
                '"prompt" is a text that is no message of "chosen" and "rejected"; drop it, or '
                "make it a list of messages"
            )
        return given, [chosen[shared:], rejected[shared:]]  # type: ignore[index]
    if prompt is None:
        raise BevatronError(f'has no "prompt", only {_keys(row)}')
    return prompt, [chosen, rejected]  # type: ignore[list-item]


def _kind(text: Any, row: Row) -> str:
    """`text`, or `messages`."""
    if is_text(text):
        return "text"
    if isinstance(text, list) and text and all(isinstance(m, dict) for m in text):
        return "messages"
    raise BevatronError(
        f"the prompt or an answer is {str(text)[:60]!r}, expected a text or a list of messages; "
        f"the row has {_keys(row)}"
    )


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise BevatronError(f'"{name}" is {value!r}, expected a finite number')
    return float(value)


def _keys(row: Row) -> str:
    return "the keys " + (", ".join(map(repr, row))[:200] or "(none)")
