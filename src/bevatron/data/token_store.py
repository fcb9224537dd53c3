"""The token store: a folder of token ids that training maps into memory.

store.json      what the other two hold, and the tokenizer that made them
tokens.bin      every token, little endian, uint16 if the vocabulary allows it, else uint32
documents.bin   int64, little endian, the index in tokens.bin at which each document begins:
                ascending, the first is 0
learned.bin     in a store that says what is to be learned (`bevatron tokenize --chat`): a byte for
                each token, 1 where it is
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from bevatron.checkpoint.read_boxes import new_hasher, spell
from bevatron.checkpoint.strict_json import read_object
from bevatron.errors import BevatronError

T = TypeVar("T")

VERSION = 1
FILE_NAME = "store.json"
TOKENS = "tokens.bin"
DOCUMENTS = "documents.bin"
LEARNED = "learned.bin"
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
            of its tokenizer.json; `encoding`: the same of what in it decides the ids, so that a
            tokenizer that was merely saved anew is known as the same one.
        vocab_size: one more than the tokenizer's largest id; `max_id`: the largest id used here.
        hash: `xxh3:...` of tokens.bin; `documents_hash`: of documents.bin.
        eos_id: the token that ends each document, or None; `bos_id`: the tokenizer's, unused here.
        skipped: why -> how many files (or records) were left out when the store was made.
        engine: what encoded, `tiktoken` or `tokenizers`, and `why`; the ids are the same.
        sources: as the user named them.
        text_bytes: of UTF-8 that the documents had as text.
        learned: how many tokens are to be learned, or None in a store that does not say which;
            `learned_hash`: of learned.bin.
    The fields that default to None are absent in stores of earlier versions.
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
    encoding: str | None = None
    documents_hash: str | None = None
    engine: Mapping[str, Any] | None = None
    sources: tuple[str, ...] | None = None
    text_bytes: int | None = None
    learned: int | None = None
    learned_hash: str | None = None
    version: int = VERSION


class TokenStore:
    """A complete store, mapped read-only: opening it costs no memory and reads no tokens."""

    def __init__(self, path: Path, info: StoreInfo) -> None:
        self.path = path
        self.info = info
        # Plain views: every slice of a memmap makes an object that costs more than its copy
        tokens = np.memmap(path / TOKENS, dtype=DTYPES[info.dtype], mode="r")
        self._tokens: NDArray[Any] = tokens.view(np.ndarray)
        documents = np.memmap(path / DOCUMENTS, dtype="<i8", mode="r")
        self._documents: NDArray[Any] = documents.view(np.ndarray)
        self._learned: NDArray[Any] | None = None
        if info.learned is not None:
            self._learned = np.memmap(path / LEARNED, dtype=np.uint8, mode="r").view(np.ndarray)

    @classmethod
    def open(cls, path: Path) -> TokenStore:
        """Raises StoreError if it is missing, incomplete, truncated or of another version. The
        bytes are not read; `verify` does that."""
        info = _read_info(path)
        _check_size(path / TOKENS, info.tokens * DTYPES[info.dtype].itemsize)
        _check_size(path / DOCUMENTS, info.documents * 8)
        if info.learned is not None:
            _check_size(path / LEARNED, info.tokens)
        elif (path / LEARNED).exists():
            raise StoreError(
                f"{path / LEARNED}: {FILE_NAME} does not know of this mask, so it is of other "
                f"tokens; {AGAIN}, or remove it"
            )
        try:
            store = cls(path, info)
        except (OSError, ValueError) as error:
            raise StoreError(f"{path / TOKENS}: cannot be mapped into memory ({error})") from error
        first, last = int(store._documents[0]), int(store._documents[-1])
        if first != 0 or last >= info.tokens:
            raise store._bad_index()
        return store

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.info.tokens

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Tokens `start` to `start + length`, as a copy. Raises StoreError beyond the ends."""
        self._check_range(start, length)
        return self._tokens[start : start + length].astype(np.int64)

    def learned(self, start: int, length: int) -> NDArray[np.bool_] | None:
        """Which of these tokens are to be learned; None if the store does not say it."""
        self._check_range(start, length)
        if self._learned is None:
            return None
        found: NDArray[np.bool_] = self._learned[start : start + length].astype(bool)
        return found

    def read_many(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        """[n, length], in the store's dtype: the tokens from each of `starts` on. Raises StoreError
        beyond the ends, and for an id above the largest that the store is said to hold."""
        for start in (int(starts.min()), int(starts.max())) if len(starts) else ():
            self._check_range(start, length)
        # A gather of rows of overlapping windows: four times the speed of a loop of slices
        rows: NDArray[Any] = sliding_window_view(self._tokens, length)[starts]
        if rows.size and int(rows.max()) > self.info.max_id:
            raise StoreError(
                f"{self.path / TOKENS}: is damaged: holds token {int(rows.max())}, {FILE_NAME} "
                f"says that {self.info.max_id} is the largest; restore the file, or {AGAIN}"
            )
        return rows

    def documents(self, start: int, length: int) -> NDArray[np.int64]:
        """For tokens `start` to `start + length`: which of the documents that meet this range each
        belongs to, from 0."""
        low, high = np.searchsorted(self._documents, (start, start + length), side="right")
        begins = self._documents[low:high].astype(np.int64) - start
        numbers = np.zeros(length, dtype=np.int64)
        numbers[begins[begins < length]] = 1
        return np.cumsum(numbers)

    def _check_range(self, start: int, length: int) -> None:
        if start < 0 or length < 0 or start + length > self.tokens:
            raise StoreError(
                f"{self.path}: tokens {start} to {start + length} were asked for, it has "
                f"{self.tokens}"
            )

    def document_starts(self) -> NDArray[np.int64]:
        """[documents]: index of the first token of each."""
        return np.fromfile(self.path / DOCUMENTS, dtype="<i8").astype(np.int64)

    def made_with(self, fingerprint: str, encoding: str | None) -> bool:
        """Whether its tokenizer is this one, or one that encodes alike (merely saved anew)."""
        known = self.info.encoding
        return self.info.fingerprint == fingerprint or (known is not None and known == encoding)

    def check_vocab(self, vocab_size: int) -> None:
        """Raises StoreError if a token here has no row in a model's embedding."""
        if self.info.max_id >= vocab_size:
            raise StoreError(
                f"{self.path}: holds token {self.info.max_id}, the model has a vocabulary of "
                f"{vocab_size} (ids 0 to {vocab_size - 1}); the store was made with the tokenizer "
                f"{self.info.tokenizer}: make it anew with the model's own"
            )

    def check_index(self) -> None:
        """Raises StoreError if the starts of the documents do not ascend. Reads documents.bin."""
        previous = -1
        for begin in range(0, len(self._documents), 1 << 20):
            part = self._documents[begin : begin + (1 << 20)]
            if part[0] <= previous or bool(np.any(part[1:] <= part[:-1])):
                raise self._bad_index()
            previous = int(part[-1])

    def _bad_index(self) -> StoreError:
        return StoreError(
            f"{self.path / DOCUMENTS}: is damaged: the starts of the documents do not ascend "
            f"from 0 to below {self.tokens}; restore the file, or {AGAIN}"
        )

    def verify(self) -> None:
        """Read everything: the hashes of all files, and the order of the documents. Raises
        StoreError."""
        self.check_index()
        files = [
            (TOKENS, self._tokens, self.info.hash),
            (DOCUMENTS, self._documents, self.info.documents_hash),
        ]
        if self._learned is not None:
            files.append((LEARNED, self._learned, self.info.learned_hash))
        for name, data, expected in files:
            found = hash_array(data)
            if expected is not None and found != expected:
                raise StoreError(
                    f"{self.path / name}: is damaged: its hash is {found}, expected {expected}; "
                    f"restore the file, or {AGAIN}"
                )

    def describe(self) -> dict[str, Any]:
        """What `bevatron inspect` says of it."""
        info = self.info
        files = [self.path / TOKENS, self.path / DOCUMENTS]
        files += [self.path / LEARNED] if info.learned is not None else []
        return {
            "kind": "token store",
            "path": str(self.path),
            "tokens": info.tokens,
            "documents": info.documents,
            "text_bytes": info.text_bytes,
            "bytes": sum(f.stat().st_size for f in files),
            "dtype": info.dtype,
            "tokenizer": info.tokenizer,
            "fingerprint": info.fingerprint,
            "encoding": info.encoding,
            "vocab_size": info.vocab_size,
            "max_id": info.max_id,
            "eos_id": info.eos_id,
            "hash": info.hash,
            "documents_hash": info.documents_hash,
            "learned": info.learned,
            "learned_hash": info.learned_hash,
            "engine": dict(info.engine) if info.engine else None,
            "sources": list(info.sources) if info.sources is not None else None,
            "skipped": dict(info.skipped),
        }


def hash_array(data: NDArray[Any]) -> str:
    """`xxh3:...` of an array's bytes, read through in small parts."""
    hasher = new_hasher()
    raw = data.view(np.uint8)
    for begin in range(0, len(raw), 1 << 22):
        hasher.update(raw[begin : begin + (1 << 22)].data)
    return spell(hasher)


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
    skipped, engine, sources = data.get("skipped"), data.get("engine"), data.get("sources")
    info = StoreInfo(
        dtype=_get(data, file, "dtype", str),
        tokens=_get(data, file, "tokens", int),
        documents=_get(data, file, "documents", int),
        tokenizer=_get(data, file, "tokenizer", str),
        fingerprint=_get(data, file, "fingerprint", str),
        vocab_size=_get(data, file, "vocab_size", int),
        max_id=_get(data, file, "max_id", int),
        hash=_get(data, file, "hash", str),
        eos_id=_optional_count(data, file, "eos_id"),
        bos_id=_optional_count(data, file, "bos_id"),
        skipped=skipped if isinstance(skipped, dict) else {},
        encoding=_optional_hash(data, file, "encoding"),
        documents_hash=_optional_hash(data, file, "documents_hash"),
        engine=engine if isinstance(engine, dict) else None,
        sources=tuple(map(str, sources)) if isinstance(sources, list) else None,
        text_bytes=_optional_count(data, file, "text_bytes"),
        learned=_optional_count(data, file, "learned"),
        learned_hash=_optional_hash(data, file, "learned_hash"),
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


def _optional_count(data: Mapping[str, Any], file: Path, key: str) -> int | None:
    return None if data.get(key) is None else _get(data, file, key, int)


def _optional_hash(data: Mapping[str, Any], file: Path, key: str) -> str | None:
    return None if data.get(key) is None else _get(data, file, key, str)


def _check_size(file: Path, expected: int) -> None:
    if not file.is_file():
        raise StoreError(f"{file}: is missing, the token store is incomplete; {AGAIN}")
    found = file.stat().st_size
    if found != expected:
        what = "truncated" if found < expected else "too long"
        raise StoreError(
            f"{file}: is {what}: {found} bytes, {FILE_NAME} says {expected}; restore it, or {AGAIN}"
        )
