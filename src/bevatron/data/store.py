"""The token store: a folder of token ids that training maps into memory.

store.json      what the other two hold, and the tokenizer that made them
tokens.bin      every token, little endian, uint16 if the vocabulary allows it, else uint32
documents.bin   int64, the index in tokens.bin at which each document begins
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from bevatron.checkpoint.boxes import new_hasher, spell
from bevatron.checkpoint.strict_json import read_object
from bevatron.errors import BevatronError

T = TypeVar("T")

VERSION = 1
FILE_NAME = "store.json"
TOKENS = "tokens.bin"
DOCUMENTS = "documents.bin"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
AGAIN = "make it anew with `bevatron tokenize`"


class StoreError(BevatronError):
    """A token store that is missing, damaged, of another version, or not for this model."""


def dtype_for(vocab_size: int) -> str:
    """The narrowest of the two dtypes that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class StoreInfo:
    """The content of store.json.

    Attributes:
        tokenizer: the path or Hub id as the user gave it; `fingerprint`: `xxh3:...` of the bytes
            of its tokenizer.json.
        vocab_size: one more than the tokenizer's largest id; `max_id`: the largest id used here.
        hash: `xxh3:...` of tokens.bin.
        eos_id: the token that ends each document, or None; `bos_id`: the tokenizer's, unused here.
        skipped: why -> how many files (or records) were left out when the store was made.
    """

    dtype: str
    tokens: int
    documents: int
    tokenizer: str
    fingerprint: str
    vocab_size: int
    max_id: int
    hash: str
    eos_id: int | None = None
    bos_id: int | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    version: int = VERSION


class TokenStore:
    """A complete store, mapped read-only: opening it costs no memory and reads no tokens."""

    def __init__(self, path: Path, info: StoreInfo) -> None:
        self.path = path
        self.info = info
        self._tokens: NDArray[Any] = np.memmap(path / TOKENS, dtype=DTYPES[info.dtype], mode="r")
        self._documents: NDArray[Any] = np.memmap(path / DOCUMENTS, dtype="<i8", mode="r")

    @classmethod
    def open(cls, path: Path) -> TokenStore:
        """Raises StoreError if it is missing, incomplete, truncated or of another version. The
        bytes are not read; `verify` does that."""
        info = _read_info(path)
        _check_size(path / TOKENS, info.tokens * DTYPES[info.dtype].itemsize)
        _check_size(path / DOCUMENTS, info.documents * 8)
        try:
            return cls(path, info)
        except (OSError, ValueError) as error:
            raise StoreError(f"{path / TOKENS}: cannot be mapped into memory ({error})") from error

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.info.tokens

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Tokens `start` to `start + length`, as a copy. Raises StoreError beyond the ends."""
        if start < 0 or length < 0 or start + length > self.tokens:
            raise StoreError(
                f"{self.path}: tokens {start} to {start + length} were asked for, it has "
                f"{self.tokens}"
            )
        return self._tokens[start : start + length].astype(np.int64)

    def documents(self, start: int, length: int) -> NDArray[np.int64]:
        """For tokens `start` to `start + length`: which of the documents that meet this range each
        belongs to, from 0."""
        low, high = np.searchsorted(self._documents, (start, start + length), side="right")
        begins = self._documents[low:high].astype(np.int64) - start
        numbers = np.zeros(length, dtype=np.int64)
        numbers[begins[begins < length]] = 1
        return np.cumsum(numbers)

    def document_starts(self) -> NDArray[np.int64]:
        """[documents]: index of the first token of each."""
        return np.fromfile(self.path / DOCUMENTS, dtype="<i8").astype(np.int64)

    def check_vocab(self, vocab_size: int) -> None:
        """Raises StoreError if a token here has no row in a model's embedding."""
        if self.info.max_id >= vocab_size:
            raise StoreError(
                f"{self.path}: holds token {self.info.max_id}, the model has a vocabulary of "
                f"{vocab_size} (ids 0 to {vocab_size - 1}); the store was made with the tokenizer "
                f"{self.info.tokenizer}: make it anew with the model's own"
            )

    def verify(self) -> None:
        """Read everything: the hash of the tokens, and the order of the documents. Raises
        StoreError."""
        hasher = new_hasher()
        raw = self._tokens.view(np.uint8)
        for begin in range(0, len(raw), 1 << 22):
            hasher.update(raw[begin : begin + (1 << 22)].data)
        found = spell(hasher)
        if found != self.info.hash:
            raise StoreError(
                f"{self.path / TOKENS}: is damaged: its hash is {found}, expected "
                f"{self.info.hash}; restore the file, or {AGAIN}"
            )
        starts = self.document_starts()
        if starts[0] != 0 or starts[-1] >= self.tokens or bool(np.any(np.diff(starts) <= 0)):
            raise StoreError(
                f"{self.path / DOCUMENTS}: is damaged: the starts of the documents do not ascend "
                f"from 0 to below {self.tokens}; restore the file, or {AGAIN}"
            )


class StoreWriter:
    """Writes a store's files into an existing folder: `add` pieces of documents, then `finish`.

    Args:
        vocab_size: decides the dtype.
        eos_id: written after each document, if not None.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_id: int | None) -> None:
        self.folder = folder
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.dtype = dtype_for(vocab_size)
        self.tokens = 0
        self.documents = 0
        self.max_id = -1
        self._hasher = new_hasher()
        self._inside = False  # of a document
        self._tokens: BinaryIO = (folder / TOKENS).open("wb")
        self._documents: BinaryIO = (folder / DOCUMENTS).open("wb")

    def add(self, ids: Sequence[int], ends: bool) -> None:
        """A piece of the current document; `ends`: it is the last one.

        A document whose pieces hold no token at all leaves no trace."""
        if len(ids) and not self._inside:
            self._documents.write(np.array([self.tokens], dtype="<i8").tobytes())
            self.documents += 1
            self._inside = True
        self._write(ids)
        if ends and self._inside:
            if self.eos_id is not None:
                self._write([self.eos_id])
            self._inside = False

    def _write(self, ids: Sequence[int]) -> None:
        if not len(ids):
            return
        array = np.asarray(ids, dtype=np.int64)
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.vocab_size:
            raise StoreError(
                f"{self.folder}: token {low if low < 0 else high} lies outside of the vocabulary "
                f"of {self.vocab_size}; the tokenizer is inconsistent"
            )
        self.max_id = max(self.max_id, high)
        data = array.astype(DTYPES[self.dtype]).tobytes()
        self._hasher.update(memoryview(data))
        self._tokens.write(data)
        self.tokens += len(array)

    def close(self) -> None:
        self._tokens.close()
        self._documents.close()

    def finish(
        self,
        *,
        tokenizer: str,
        fingerprint: str,
        bos_id: int | None = None,
        skipped: Mapping[str, int] | None = None,
    ) -> StoreInfo:
        """Close the files and write store.json. Raises StoreError if there is no token."""
        self.close()
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
            hash=spell(self._hasher),
            eos_id=self.eos_id,
            bos_id=bos_id,
            skipped=dict(skipped or {}),
        )
        text = json.dumps({"format": "bevatron token store", **asdict(info)}, indent=2)
        (self.folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")
        return info


# ---------------------------------------------------------------------------------------------
# Reading store.json
# ---------------------------------------------------------------------------------------------


def _read_info(path: Path) -> StoreInfo:
    if not path.exists():
        raise StoreError(f"{path}: does not exist; expected a token store: {AGAIN}")
    file = path / FILE_NAME
    if not file.is_file():
        raise StoreError(
            f"{path}: has no {FILE_NAME}, so it is no token store; make one from text with "
            "`bevatron tokenize`"
        )
    data = read_object(file)
    version = data.get("version")
    if version != VERSION:
        raise StoreError(
            f"{file}: has format version {version!r}, expected {VERSION}; {AGAIN}, or use the "
            "version of Bevatron that wrote it"
        )
    skipped = data.get("skipped", {})
    info = StoreInfo(
        dtype=_get(data, file, "dtype", str),
        tokens=_get(data, file, "tokens", int),
        documents=_get(data, file, "documents", int),
        tokenizer=_get(data, file, "tokenizer", str),
        fingerprint=_get(data, file, "fingerprint", str),
        vocab_size=_get(data, file, "vocab_size", int),
        max_id=_get(data, file, "max_id", int),
        hash=_get(data, file, "hash", str),
        eos_id=_optional_id(data, file, "eos_id"),
        bos_id=_optional_id(data, file, "bos_id"),
        skipped=skipped if isinstance(skipped, dict) else {},
    )
    if info.dtype not in DTYPES:
        raise StoreError(f"{file}: dtype is {info.dtype!r}, expected uint16 or uint32; {AGAIN}")
    if not 0 < info.documents <= info.tokens:
        raise StoreError(
            f"{file}: names {info.tokens} tokens in {info.documents} documents, expected at least "
            f"one token in each; {AGAIN}"
        )
    return info


def _get(data: Mapping[str, Any], file: Path, key: str, kind: type[T]) -> T:
    value = data.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        raise StoreError(f"{file}: {key} is {value!r}, expected {kind.__name__}; {AGAIN}")
    return value


def _optional_id(data: Mapping[str, Any], file: Path, key: str) -> int | None:
    return None if data.get(key) is None else _get(data, file, key, int)


def _check_size(file: Path, expected: int) -> None:
    if not file.is_file():
        raise StoreError(f"{file}: is missing, the token store is incomplete; {AGAIN}")
    found = file.stat().st_size
    if found != expected:
        what = "truncated" if found < expected else "too long"
        raise StoreError(
            f"{file}: is {what}: {found} bytes, {FILE_NAME} says {expected}; restore it, or {AGAIN}"
        )
