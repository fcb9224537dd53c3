"""Rows to learn from as token ids and which of them are learned, and samples made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bevatron.data.chat_examples import ChatExamples, Example
from bevatron.data.chat_rows import check_row, examples_of
from bevatron.data.dataset_rows import Row
from bevatron.data.labelled_examples import Arrays
from bevatron.data.token_store import FILE_NAME, StoreError, TokenStore


class ChatRows:
    """How rows become examples, and examples samples of one length (see `SftKind`). Rows are as
    `data.chat_rows` reads them, or documents of a token store: `ids` and `learned`."""

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
        if "ids" not in row:
            check_row(row)

    def of_row(self, row: Row) -> list[Example]:
        """The examples of a row, however long. Raises BevatronError."""
        if "ids" in row:
            return [Example(row["ids"], row["learned"])]
        return examples_of(self.examples, row)

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


class StoredRows:
    """The documents of token stores as rows: `ids` [t] and `learned` [t].

    Raises StoreError for a store of another tokenizer, or one that does not say what is to be
    learned, unless all of it is (`learn_unmasked`)."""

    def __init__(self, paths: Sequence[str], labelled: ChatRows) -> None:
        opened = labelled.examples.tokenizer
        self.stores = [TokenStore.open(Path(path)) for path in paths]
        for store in self.stores:
            store.check_index()
            if not store.made_with(opened.fingerprint, opened.encoding):
                raise StoreError(
                    f"{store.path}: was made with another tokenizer ({store.info.tokenizer}, "
                    f"{store.info.fingerprint}) than the model's own ({opened.file}, "
                    f"{opened.fingerprint}); make it anew with `bevatron tokenize --chat "
                    f"--tokenizer {opened.file.parent}`"
                )
            if store.info.learned is None and not labelled.learn_unmasked:
                raise StoreError(
                    f"{store.path}: does not say which of its tokens are to be learned; make it "
                    "anew with `bevatron tokenize --chat`, or set objective.learn_unmasked: true "
                    "to learn every token"
                )
        self._begins = [np.append(s.document_starts(), s.tokens) for s in self.stores]
        self._ends = np.cumsum([store.info.documents for store in self.stores])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Row:
        number, document = self._at(index)
        store, (begin, end) = self.stores[number], self._begins[number][document : document + 2]
        ids, learned = store.read(int(begin), int(end - begin)), None
        if store.info.learned is not None:
            learned = store.learned(int(begin), int(end - begin))
        if learned is None:
            learned = np.ones(len(ids), dtype=bool)
        learned[:1] = False  # nothing comes before it
        return {"ids": ids, "learned": learned}

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    @property
    def masked(self) -> bool:
        """Whether any says which of its tokens are to be learned."""
        return any(store.info.learned is not None for store in self.stores)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[documents] tokens of each."""
        return np.concatenate([np.diff(begins) for begins in self._begins])

    def where(self, index: int) -> str:
        number, document = self._at(index)
        return f"{self.stores[number].path}: document {document}"

    def _at(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)


def is_store(path: str) -> bool:
    return (Path(path) / FILE_NAME).is_file()
