"""Writing token ids and the starts of documents, as a whole store or a part to be joined."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bevatron.checkpoint.read_boxes import hash_file, new_hasher, spell
from bevatron.data.token_store import (
    DOCUMENTS,
    DTYPES,
    FILE_NAME,
    LEARNED,
    TOKENS,
    StoreError,
    StoreInfo,
    dtype_for,
)

COPY = 4 << 20  # bytes


@dataclass(frozen=True)
class Written:
    """What a StoreWriter has written into its folder.

    Attributes:
        documents: how many begin here.
        max_id: -1 if there is no token.
        hash, documents_hash: `xxh3:...` of the two files.
        open: whether the last document goes on in the next part.
        text_bytes: of the text that the tokens came from; None if not all of it was counted.
    """

    tokens: int
    documents: int
    max_id: int
    hash: str
    documents_hash: str
    open: bool
    text_bytes: int | None


class StoreWriter:
    """Writes tokens.bin and documents.bin into an existing folder: `add` documents, whole or in
    pieces, or `append` parts that another writer made; then `finish`. With learned.bin beside them
    (`masked`), `add_example` whole documents.

    Args:
        vocab_size: decides the dtype.
        eos_id: written after each document, if not None.
        inside: what comes first goes on with a document that an earlier part began.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        eos_id: int | None,
        *,
        inside: bool = False,
        masked: bool = False,
    ) -> None:
        self.folder = folder
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.dtype = dtype_for(vocab_size)
        self.tokens = 0
        self.documents = 0
        self.max_id = -1
        self.text_bytes: int | None = 0
        self.learned = 0 if masked else None
        names = (TOKENS, DOCUMENTS, LEARNED) if masked else (TOKENS, DOCUMENTS)
        self._hashers = {name: new_hasher() for name in names}
        self._inside = inside
        self._files: dict[str, BinaryIO] = {}
        for name in names:
            self._files[name] = (folder / name).open("wb")

    def add(self, ids: Sequence[int], ends: bool) -> None:
        """A piece of the current document; `ends`: it is the last one."""
        self.add_batch(np.asarray(ids, dtype=np.int64), [len(ids)], [ends])

    def add_example(self, ids: NDArray[np.int64], learned: NDArray[np.bool_]) -> None:
        """A document, [T], and which of its tokens are to be learned, [T]."""
        assert self.learned is not None and self.eos_id is None and len(ids) == len(learned)
        self.add_batch(ids, [len(ids)], [True])
        self._write(LEARNED, learned.astype(np.uint8))
        self.learned += int(learned.sum())

    def add_batch(
        self,
        ids: NDArray[Any],
        lengths: Sequence[int],
        ends: Sequence[bool],
        text_bytes: int | None = None,
    ) -> None:
        """Pieces that follow each other in `ids`, `lengths[i]` tokens long; `ends[i]`: the piece is
        its document's last. `text_bytes`: of the UTF-8 that all of them had as text, if known.

        A document whose pieces hold no token at all leaves no trace. Raises StoreError for an id
        outside of the vocabulary."""
        self._check(ids)
        starts: list[int] = []
        eos_at: list[int] = []
        inside, read, written = self._inside, 0, self.tokens
        for length, end in zip(lengths, ends, strict=True):
            if length and not inside:
                starts.append(written)
                inside = True
            read += length
            written += length
            if end and inside:
                inside = False
                if self.eos_id is not None:
                    eos_at.append(read)
                    written += 1
        self._inside = inside
        array = ids.astype(DTYPES[self.dtype])
        if eos_at and self.eos_id is not None:
            self.max_id = max(self.max_id, self.eos_id)
            array = np.insert(array, eos_at, self.eos_id)
        self._write(TOKENS, array)
        self._write(DOCUMENTS, np.array(starts, dtype="<i8"))
        self.tokens = written
        self.documents += len(starts)
        self._count_bytes(text_bytes)

    def append(self, folder: Path, part: Written) -> bool:
        """Copy a part behind what is here. False, and nothing is done, if its files are not what
        was written (a machine lost its power)."""
        files = {TOKENS: part.hash, DOCUMENTS: part.documents_hash}
        for name, expected in files.items():
            if not (folder / name).is_file() or hash_file(folder / name) != expected:
                return False
        with (folder / TOKENS).open("rb") as source:
            while data := source.read(COPY):
                self._put(TOKENS, data)
        begins = np.fromfile(folder / DOCUMENTS, dtype="<i8") + self.tokens
        if part.tokens and not self._inside and (not len(begins) or begins[0] != self.tokens):
            # it goes on with a document of which no earlier part had a token
            begins = np.insert(begins, 0, self.tokens)
        self._write(DOCUMENTS, begins.astype("<i8"))
        self.documents += len(begins)
        self.tokens += part.tokens
        self.max_id = max(self.max_id, part.max_id)
        self._count_bytes(part.text_bytes)
        self._inside = part.open and (self._inside or part.tokens > 0)
        return True

    def _count_bytes(self, more: int | None) -> None:
        if self.text_bytes is not None:
            self.text_bytes = None if more is None else self.text_bytes + more

    def _check(self, ids: NDArray[Any]) -> None:
        if not len(ids):
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise StoreError(
                f"{self.folder}: token {low if low < 0 else high} lies outside of the vocabulary "
                f"of {self.vocab_size}; the tokenizer is inconsistent"
            )
        self.max_id = max(self.max_id, high)

    def _write(self, name: str, array: NDArray[Any]) -> None:
        self._put(name, array.tobytes())

    def _put(self, name: str, data: bytes) -> None:
        self._hashers[name].update(memoryview(data))
        self._files[name].write(data)

    def close(self) -> Written:
        """Close the files; what they hold."""
        for file in self._files.values():
            file.close()
        return Written(
            tokens=self.tokens,
            documents=self.documents,
            max_id=self.max_id,
            hash=spell(self._hashers[TOKENS]),
            documents_hash=spell(self._hashers[DOCUMENTS]),
            open=self._inside,
            text_bytes=self.text_bytes,
        )

    def finish(
        self,
        *,
        tokenizer: str,
        fingerprint: str,
        bos_id: int | None = None,
        skipped: Mapping[str, int] | None = None,
        encoding: str | None = None,
        engine: Mapping[str, Any] | None = None,
        sources: Sequence[str] | None = None,
    ) -> StoreInfo:
        """Close the files and write store.json. Raises StoreError if there is no token."""
        written = self.close()
        if not self.tokens:
            raise StoreError(f"{self.folder}: a store needs at least one token, none was added")
        info = StoreInfo(
            dtype=self.dtype,
            tokens=self.tokens,
            documents=self.documents,
            tokenizer=tokenizer,
            fingerprint=fingerprint,
            vocab_size=self.vocab_size,
            max_id=self.max_id,
            hash=written.hash,
            eos_id=self.eos_id,
            bos_id=bos_id,
            skipped=dict(sorted((skipped or {}).items())),
            encoding=encoding,
            documents_hash=written.documents_hash,
            engine=engine,
            sources=tuple(sources) if sources is not None else None,
            text_bytes=written.text_bytes,
            learned=self.learned,
            learned_hash=spell(self._hashers[LEARNED]) if self.learned is not None else None,
        )
        text = json.dumps({"format": "bevatron token store", **asdict(info)}, indent=2)
        (self.folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")
        return info
