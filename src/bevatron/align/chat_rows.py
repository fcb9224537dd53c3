"""Rows to learn from in TRL's columns, as token ids and which of them are learned.

`messages` (or ShareGPT's `conversations`), perhaps with `tools` and `chat_template_kwargs`;
`prompt` and `completion`, both texts or both messages; or `text`. Other columns mean nothing.
Documents of a token store come as `ids` and `learned`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bevatron.chat.chat_messages import ChatError
from bevatron.data.chat_examples import ChatExamples, Example
from bevatron.data.dataset_rows import Row
from bevatron.data.labelled_examples import Arrays, is_text
from bevatron.errors import BevatronError

COLUMNS = '"messages", "prompt" and "completion", or "text"'
SHAREGPT = {"human": "user", "gpt": "assistant", "bing": "assistant", "observation": "tool"}


class ChatRows:
    """How rows become examples, and examples samples of one length (see `SftKind`)."""

    windows = True

    def __init__(
        self,
        examples: ChatExamples,
        length: int,
        *,
        packing: bool = False,
        too_long: str = "refuse",
        learn_unmasked: bool = False,
    ) -> None:
        self.examples, self.length = examples, length
        self.packing, self.too_long, self.learn_unmasked = packing, too_long, learn_unmasked
        known = (examples.tokenizer.pad_id, examples.tokenizer.eos_id, 0)
        self.pad_id = next(i for i in known if i is not None)

    def check(self, row: Row) -> None:
        """Raise BevatronError for a row whose columns cannot be used."""
        if "prompt" in row or "completion" in row:
            found = [row.get("prompt"), row.get("completion")]
            if not (all(map(is_text, found)) or all(map(_is_messages, found))):
                raise BevatronError(
                    '"prompt" and "completion" are not two texts or two lists of messages; the row '
                    f"has {_keys(row)}"
                )
        elif "messages" in row or "conversations" in row:
            name = "messages" if "messages" in row else "conversations"
            if not _is_messages(row[name]):
                raise BevatronError(f'"{name}" is not a list of messages')
        elif "ids" not in row and not is_text(row.get("text")):
            raise BevatronError(f"the row has {_keys(row)}; expected {COLUMNS}")

    def of_row(self, row: Row) -> list[Example]:
        """The examples of a row, however long. Raises BevatronError."""
        if "ids" in row:
            return [Example(row["ids"], row["learned"])]
        if "text" in row and not {"prompt", "completion", "messages", "conversations"} & set(row):
            return [self.examples.text(row["text"])]
        tools, variables = _parsed(row, "tools"), _parsed(row, "chat_template_kwargs") or {}
        try:
            if "prompt" in row:
                both = row["prompt"], row["completion"]
                return self.examples.completions(*both, tools, **variables)
            messages = row["messages"] if "messages" in row else _renamed(row["conversations"])
            return self.examples.conversation(messages, tools, **variables)
        except ChatError as error:
            raise BevatronError(str(error)) from error

    def encode(self, rows: Sequence[Row]) -> list[list[Arrays]]:
        """Of each row its examples, cut off at the sample's length: `tokens` and `learned` [t]."""
        return [
            [
                {"tokens": e.ids[: self.length], "learned": e.learned[: self.length]}
                for e in self.of_row(row)
            ]
            for row in rows
        ]

    def sample(self, examples: Sequence[Arrays]) -> Arrays:
        """A sample of the examples that share it; blank of none. Padding belongs to the last."""
        made = self.blank()
        at = 0
        for number, example in enumerate(examples):
            end = at + len(example["tokens"])
            made["tokens"][at:end] = example["tokens"]
            made["learned"][at:end] = example["learned"]
            if self.packing:
                made["documents"][at:] = number
            at = end
        return made

    def blank(self) -> Arrays:
        tokens = np.full(self.length, self.pad_id, dtype=np.int64)
        made: Arrays = {"tokens": tokens, "learned": np.zeros(self.length, dtype=bool)}
        return made | ({"documents": np.zeros_like(tokens)} if self.packing else {})


def _parsed(row: Mapping[str, Any], key: str) -> Any:
    """A value that may be JSON in a text, as tables have what differs from row to row."""
    value = row.get(key)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BevatronError(f'"{key}" is not valid JSON ({error})') from error


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) for m in value)


def _renamed(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """ShareGPT's turns, of which each is {"from", "value"}, as messages."""
    return [
        {"role": SHAREGPT.get(turn["from"], turn["from"]), "content": turn.get("value")}
        if "from" in turn
        else dict(turn)
        for turn in turns
    ]


def _keys(row: Row) -> str:
    return "the keys " + (", ".join(map(repr, row))[:200] or "(none)")
