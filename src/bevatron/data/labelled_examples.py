"""Labelled examples as padded token ids and labels, one class for each kind of label.

Text becomes the ids that transformers' tokenizer gives for `truncation=True` and
`padding="max_length"`, special tokens included. Padding is on the right. Attention is causal, so no
token sees the padding, and no mask is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from bevatron.checkpoint.strict_json import read_object
from bevatron.data.dataset_rows import Row
from bevatron.data.tokenizer import OpenTokenizer
from bevatron.errors import BevatronError

IGNORE = -100  # torch's and transformers' label for nothing
SURROGATE = re.compile("[\ud800-\udfff]")
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Padded:
    """A tokenizer for sequences of one length.

    Attributes:
        pad_id: by default the tokenizer's pad token, its eos if it has none, or 0: labels say which
            tokens count, whatever the padding is.
        side: of a long text that is cut off, left or right.
    """

    opened: OpenTokenizer
    length: int
    pad_id: int
    side: str

    @classmethod
    def of(cls, opened: OpenTokenizer, length: int, pad_id: int | None = None) -> Padded:
        if pad_id is not None and not 0 <= pad_id < opened.vocab_size:
            raise BevatronError(
                f"the model's pad_token_id is {pad_id}, but {opened.file} has ids 0 to "
                f"{opened.vocab_size - 1}, and shorter examples are filled up with it; correct "
                "pad_token_id in the model's config.json"
            )
        known = (pad_id, opened.pad_id, opened.eos_id, 0)
        path = opened.file.parent / "tokenizer_config.json"
        side = read_object(path).get("truncation_side") if path.is_file() else None
        found = next(i for i in known if i is not None)
        return cls(opened, length, found, "left" if side == "left" else "right")

    def encode(
        self,
        texts: Sequence[Any],
        *,
        split: bool = False,
        context_only: bool = False,
        share: int = 0,
    ) -> list[Encoding]:
        """Texts, pairs of texts, or lists of words (`split`) as encodings of exactly `length`
        tokens. A text that is too long loses its end; of a pair the longer one does, or the second
        (`context_only`), whose further windows share `share` tokens with the one before them."""
        encoder, pad = self.opened.encoder, self.opened.encoder.id_to_token(self.pad_id)
        try:
            encoder.enable_truncation(
                self.length,
                stride=share,
                strategy="only_second" if context_only else "longest_first",
                direction="right" if context_only else self.side,
            )
            encoder.enable_padding(length=self.length, pad_id=self.pad_id, pad_token=pad or "")
            return encoder.encode_batch(list(texts), is_pretokenized=split)
        except Exception as error:  # the library raises plain Exception
            raise BevatronError(
                f"an example cannot be brought to data.seq_len {self.length} tokens ({error}); "
                "use longer sequences, or a shorter objective.stride"
            ) from error


class Labelled(Protocol):
    """How rows of one kind become arrays. `windows`: whether one may become several examples, which
    takes tokenizing all of them to know."""

    windows: bool

    def check(self, row: Row) -> None:
        """Raise BevatronError saying what is wrong with a row."""

    def encode(self, rows: Sequence[Row]) -> list[list[Arrays]]:
        """Of every row its examples: one, or if `windows` those of a long context. Arrays have no
        batch dimension; `tokens` [T] int64 is one of them."""

    def blank(self) -> Arrays:
        """An example that counts for nothing."""


class SequenceLabels:
    """Rows {"text", "label"}, perhaps with a "text_pair". By problem type, the label is a name or
    number of a label; a list of them, or one float per label; a number, or a list of them."""

    windows = False

    def __init__(self, padded: Padded, labels: Sequence[str], problem_type: str) -> None:
        self.padded, self.names = padded, Names(labels)
        self.problem_type = problem_type

    def check(self, row: Row) -> None:
        text_of(row, "text")
        if "text_pair" in row:
            text_of(row, "text_pair")
        self._label(row)

    def encode(self, rows: Sequence[Row]) -> list[list[Arrays]]:
        texts = [
            (row["text"], row["text_pair"]) if "text_pair" in row else row["text"] for row in rows
        ]
        encodings = self.padded.encode(texts)
        return [
            [{"tokens": np.array(e.ids, dtype=np.int64), "labels": self._label(row)}]
            for e, row in zip(encodings, rows, strict=True)
        ]

    def blank(self) -> Arrays:
        tokens = np.full(self.padded.length, self.padded.pad_id, dtype=np.int64)
        if self.problem_type == "single_label_classification":
            return {"tokens": tokens, "labels": np.array(IGNORE, dtype=np.int64)}
        return {"tokens": tokens, "labels": np.full(len(self.names.all), np.nan, dtype=np.float32)}

    def _label(self, row: Row) -> NDArray[Any]:
        if "label" not in row:
            raise BevatronError(f'has no "label", only {_keys(row)}')
        label, count = row["label"], len(self.names.all)
        if self.problem_type == "single_label_classification":
            return np.array(self.names.number(label), dtype=np.int64)
        if self.problem_type == "regression":
            values = label if isinstance(label, list) else [label]
            if len(values) != count or not all(is_number(v) for v in values):
                raise BevatronError(f"the label {label!r} is not {count} finite number(s)")
            return np.array(values, dtype=np.float32)
        if not isinstance(label, list):
            raise BevatronError(
                f"the label {label!r} is not a list of labels, of which none to all"
            )
        if label and all(isinstance(v, float) for v in label):
            if len(label) != count or not set(label) <= {0.0, 1.0}:
                raise BevatronError(f"the label {label!r} is not {count} times 0.0 or 1.0")
            return np.array(label, dtype=np.float32)
        hot = np.zeros(count, dtype=np.float32)
        hot[[self.names.number(v) for v in label]] = 1
        return hot


class TokenLabels:
    """Rows {"tokens": words, "labels": one per word}, as names or numbers, IGNORE for none; see
    `train.head_kinds` for the options."""

    windows = False

    def __init__(
        self, padded: Padded, labels: Sequence[str], *, all_tokens: bool, join: bool
    ) -> None:
        self.padded, self.names = padded, Names(labels)
        self.all_tokens, self.join = all_tokens, join
        inside = {name: number for number, name in enumerate(labels) if name.startswith("I-")}
        # B-X -> I-X, for the tokens of a word after its first
        self.later = [inside.get("I-" + name[2:], i) if name.startswith("B-") else i
                      for i, name in enumerate(labels)]  # fmt: skip

    def check(self, row: Row) -> None:
        words, labels = row.get("tokens"), row.get("labels")
        if not isinstance(words, list) or not all(is_text(w) for w in words):
            raise BevatronError(f'"tokens" is not a list of words; the row has {_keys(row)}')
        if not isinstance(labels, list) or len(labels) != len(words):
            found = len(labels) if isinstance(labels, list) else "no list of"
            raise BevatronError(f'has {len(words)} "tokens" but {found} "labels"')
        for label in labels:
            self._number(label)

    def encode(self, rows: Sequence[Row]) -> list[list[Arrays]]:
        texts = [" ".join(row["tokens"]) if self.join else row["tokens"] for row in rows]
        out = []
        for row, encoding in zip(rows, self.padded.encode(texts, split=not self.join), strict=True):
            words = _joined(encoding, row["tokens"]) if self.join else encoding.word_ids
            numbers = [self._number(label) for label in row["labels"]]
            labels = np.full(self.padded.length, IGNORE, dtype=np.int64)
            before = None
            for i, word in enumerate(words):
                if word is not None and word != before:
                    labels[i] = numbers[word]
                elif word is not None and self.all_tokens and numbers[word] != IGNORE:
                    labels[i] = self.later[numbers[word]]
                before = word
            out.append([{"tokens": np.array(encoding.ids, dtype=np.int64), "labels": labels}])
        return out

    def blank(self) -> Arrays:
        tokens = np.full(self.padded.length, self.padded.pad_id, dtype=np.int64)
        return {"tokens": tokens, "labels": np.full_like(tokens, IGNORE)}

    def _number(self, label: Any) -> int:
        return IGNORE if label == IGNORE and type(label) is int else self.names.number(label)


def _joined(encoding: Encoding, words: Sequence[str]) -> Iterator[int | None]:
    """The word that each token of the joined words ends in; None for special tokens and spaces."""
    owner: list[int | None] = []
    for number, word in enumerate(words):
        owner += [None] if number else []
        owner += [number] * len(word)
    special = encoding.special_tokens_mask
    for (begin, end), is_special in zip(encoding.offsets, special, strict=True):
        yield None if is_special or begin == end else owner[end - 1]


class Names:
    """Label names and numbers."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.all = list(labels)
        self.numbers = {name: number for number, name in enumerate(labels)}

    def number(self, label: Any) -> int:
        if isinstance(label, str) and label in self.numbers:
            return self.numbers[label]
        if type(label) is int and 0 <= label < len(self.all):
            return label
        shown = ", ".join(self.all[:10]) + (", ..." if len(self.all) > 10 else "")
        raise BevatronError(
            f"the label {label!r} is not one of the model's ({shown}) or a number below "
            f"{len(self.all)}; correct it, or objective.labels or objective.problem_type"
        )


def text_of(row: Row, key: str) -> str:
    """The text under `key`; BevatronError if there is none."""
    found = row.get(key)
    if not is_text(found):
        raise BevatronError(f'"{key}" is not a text; the row has {_keys(row)}')
    return str(found)


def is_text(value: Any) -> bool:
    """Whether it is a string of characters: JSON can spell half of one, which has no UTF-8."""
    return isinstance(value, str) and (value.isascii() or not SURROGATE.search(value))


def _keys(row: Row) -> str:
    return "the keys " + (", ".join(map(repr, row))[:200] or "(none)")


def is_number(value: Any) -> bool:
    """Whether it is a finite one."""
    return type(value) in (int, float) and math.isfinite(value)
