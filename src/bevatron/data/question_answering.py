"""Questions with their answer in a context, as in SQuAD, labelled as in transformers' run_qa."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import Encoding

from bevatron.data.dataset_rows import Row
from bevatron.data.labelled_examples import Arrays, Padded, is_text, text_of
from bevatron.errors import BevatronError


class Answers:
    """Rows {"question", "context", "answers": {"text": [...], "answer_start": [...]}}; the first
    answer is the label. The tokens are those of the pair question, context, of which the context
    alone is cut. If the answer does not lie in a window, or the question has none, both positions
    are `null`, that of the bos token.

    Args:
        stride: tokens that neighbouring windows of a context share, each of which is an example;
            None for its first window alone.
    """

    windows = True  # or one only; but all are made once at the start, as a question may be too long

    def __init__(self, padded: Padded, stride: int | None) -> None:
        self.padded, self.stride = padded, stride

    def check(self, row: Row) -> None:
        text_of(row, "question")
        context, answers = text_of(row, "context"), row.get("answers")
        texts, starts = [answers.get(key) if isinstance(answers, Mapping) else None
                         for key in ("text", "answer_start")]  # fmt: skip
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise BevatronError(
                '"answers" is not an object with the lists "text" and "answer_start", equally long'
            )
        for text, start in zip(texts, starts, strict=True):
            if not is_text(text) or type(start) is not int or start < 0:
                raise BevatronError(f"the answer {text!r} at {start!r} is no text at a position")
            found = context[start : start + len(text)]
            if found != text or not text:
                raise BevatronError(
                    f"the context has {found!r} at character {start}, not the answer {text!r}; "
                    "correct its answer_start"
                )

    def encode(self, rows: Sequence[Row]) -> list[list[Arrays]]:
        pairs = [(row["question"].lstrip(), row["context"]) for row in rows]
        encodings = self.padded.encode(pairs, context_only=True, share=self.stride or 0)
        out = []
        for row, encoding in zip(rows, encodings, strict=True):
            windows = [encoding, *(() if self.stride is None else encoding.overflowing)]
            out.append([self._window(row, window) for window in windows])
        return out

    def blank(self) -> Arrays:
        length = self.padded.length
        return {
            "tokens": np.full(length, self.padded.pad_id, dtype=np.int64),
            "starts": np.array(length, dtype=np.int64),
            "ends": np.array(length, dtype=np.int64),
            "lengths": np.array(length, dtype=np.int64),
            "context": np.zeros(length, dtype=np.bool_),
            "null": np.array(0, dtype=np.int64),
        }

    def _window(self, row: Row, encoding: Encoding) -> Arrays:
        context = np.array([s == 1 for s in encoding.sequence_ids], dtype=np.bool_)
        bos = self.padded.opened.bos_id
        null = encoding.ids.index(bos) if bos in encoding.ids else 0
        start, end = self._positions(row, encoding, context, null)
        return {
            "tokens": np.array(encoding.ids, dtype=np.int64),
            "starts": np.array(start, dtype=np.int64),
            "ends": np.array(end, dtype=np.int64),
            "lengths": np.array(max(1, sum(encoding.attention_mask)), dtype=np.int64),
            "context": context,
            "null": np.array(null, dtype=np.int64),
        }

    @staticmethod
    def _positions(row: Row, encoding: Encoding, context: np.ndarray, null: int) -> tuple[int, int]:
        """The last token that begins at the answer's start or before it, and the first that ends
        at its end or after it."""
        answers = row["answers"]
        inside = np.flatnonzero(context)
        if not answers["text"] or not len(inside):
            return null, null
        begin = answers["answer_start"][0]
        end = begin + len(answers["text"][0])
        begins, ends = np.array(encoding.offsets)[inside].T
        if begins[0] > begin or ends[-1] < end:
            return null, null
        return int(inside[begins <= begin][-1]), int(inside[ends >= end][0])
