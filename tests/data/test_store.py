"""The token store keeps what was written, and says what is wrong with one that is not whole."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bevatron.data.token_store import DOCUMENTS, FILE_NAME, TOKENS, TokenStore
from bevatron.data.token_store_writer import StoreWriter
from bevatron.errors import BevatronError


def write_store(path: Path, documents: list[list[int]], vocab: int, eos: int | None = None) -> Path:
    path.mkdir(parents=True)
    writer = StoreWriter(path, vocab, eos)
    for ids in documents:
        writer.add(ids, ends=True)
    writer.finish(tokenizer="toy", fingerprint="xxh3:0")
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", [[1, 2, 3], [], [4, 5]], vocab=100, eos=99)


def test_what_was_written_is_read(store: Path) -> None:
    opened = TokenStore.open(store)
    assert opened.tokens == 7
    assert opened.read(0, 7).tolist() == [1, 2, 3, 99, 4, 5, 99]
    assert opened.read(2, 3).tolist() == [3, 99, 4]
    assert opened.read(0, 1).dtype == np.int64
    assert opened.document_starts().tolist() == [0, 4]
    assert opened.documents(2, 3).tolist() == [0, 0, 1]
    assert opened.documents(4, 3).tolist() == [0, 0, 0]
    opened.verify()


@pytest.mark.parametrize(
    ("vocab", "dtype", "size"), [(65536, "uint16", 2), (65537, "uint32", 4)], ids=["16", "32"]
)
def test_the_vocabulary_decides_the_width(
    tmp_path: Path, vocab: int, dtype: str, size: int
) -> None:
    opened = TokenStore.open(write_store(tmp_path / "s", [[0, vocab - 1]], vocab))
    assert opened.info.dtype == dtype
    assert (tmp_path / "s" / TOKENS).stat().st_size == 2 * size
    assert opened.read(0, 2).tolist() == [0, vocab - 1]
    assert opened.info.max_id == vocab - 1


@pytest.mark.parametrize("name", [TOKENS, DOCUMENTS])
def test_a_truncated_file_is_named(store: Path, name: str) -> None:
    data = (store / name).read_bytes()
    (store / name).write_bytes(data[:-1])
    with pytest.raises(BevatronError, match=rf"{name}: is truncated: {len(data) - 1} bytes"):
        TokenStore.open(store)
    (store / name).write_bytes(data + b"x")
    with pytest.raises(BevatronError, match=f"{name}: is too long"):
        TokenStore.open(store)
    (store / name).unlink()
    with pytest.raises(BevatronError, match=f"{name}: is missing"):
        TokenStore.open(store)


def test_flipped_bytes_are_found_by_verify(store: Path) -> None:
    data = bytearray((store / TOKENS).read_bytes())
    data[3] ^= 1
    (store / TOKENS).write_bytes(data)
    with pytest.raises(BevatronError, match="is damaged: its hash is xxh3:"):
        TokenStore.open(store).verify()


@pytest.mark.parametrize("starts", [[0, 9], [1, 4], [-1, 4], [4, 0], [0, 7]])
def test_an_index_that_begins_or_ends_wrong_is_refused_at_once(
    store: Path, starts: list[int]
) -> None:
    (store / DOCUMENTS).write_bytes(np.array(starts, dtype="<i8").tobytes())
    with pytest.raises(BevatronError, match=r"documents\.bin: is damaged: .* do not ascend"):
        TokenStore.open(store)


@pytest.mark.parametrize("starts", [[0, 5, 5, 6], [0, 5, 3, 6], [0, -9, 3, 6], [0, 99, 3, 6]])
def test_an_index_that_does_not_ascend_is_found(tmp_path: Path, starts: list[int]) -> None:
    store = write_store(tmp_path / "s", [[1, 2], [3, 4], [5, 6], [7]], vocab=10)
    (store / DOCUMENTS).write_bytes(np.array(starts, dtype="<i8").tobytes())
    opened = TokenStore.open(store)
    for look in (opened.check_index, opened.verify):
        with pytest.raises(BevatronError, match="do not ascend"):
            look()


def test_other_starts_than_were_written_are_found_by_verify(store: Path) -> None:
    (store / DOCUMENTS).write_bytes(np.array([0, 5], dtype="<i8").tobytes())
    TokenStore.open(store).check_index()
    with pytest.raises(BevatronError, match=r"documents\.bin: is damaged: its hash is xxh3:"):
        TokenStore.open(store).verify()


def test_a_store_of_the_first_version_is_read(store: Path) -> None:
    """It had no hash of documents.bin, no engine, no sources, no bytes of text."""
    data = json.loads((store / FILE_NAME).read_text())
    for key in ("encoding", "documents_hash", "engine", "sources", "text_bytes"):
        data.pop(key)
    (store / FILE_NAME).write_text(json.dumps(data))
    opened = TokenStore.open(store)
    opened.verify()
    assert opened.read(0, 3).tolist() == [1, 2, 3]
    assert opened.describe()["documents_hash"] is None


def test_many_windows_are_read_as_one_by_one(store: Path) -> None:
    opened = TokenStore.open(store)
    starts = np.array([4, 0, 2, 2, 5])
    expected = [opened.read(int(s), 2).tolist() for s in starts]
    assert opened.read_many(starts, 2).tolist() == expected
    for bad in ([6], [0, -1], [0, 6, 1]):
        with pytest.raises(BevatronError, match="it has 7"):
            opened.read_many(np.array(bad), 2)


def test_a_token_above_the_largest_is_found_when_it_is_read(store: Path) -> None:
    tokens = np.fromfile(store / TOKENS, dtype="<u2")
    tokens[4] = 500
    tokens.tofile(store / TOKENS)
    opened = TokenStore.open(store)
    assert opened.read_many(np.array([0, 1]), 3).shape == (2, 3)
    with pytest.raises(BevatronError, match=r"tokens\.bin: is damaged: holds token 500, .*99"):
        opened.read_many(np.array([0, 3]), 3)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 2, "format version 2, expected 1"),
        ("documents_hash", 5, "documents_hash is 5, expected str"),
        ("dtype", "int8", "dtype is 'int8', expected uint16 or uint32"),
        ("tokens", "7", "tokens is '7', expected int"),
        ("tokens", -1, "names -1 tokens"),
        ("documents", 0, "in 0 documents"),
        ("max_id", None, "max_id is None, expected int"),
    ],
)
def test_a_wrong_description_is_refused(store: Path, key: str, value: object, message: str) -> None:
    data = json.loads((store / FILE_NAME).read_text()) | {key: value}
    (store / FILE_NAME).write_text(json.dumps(data))
    with pytest.raises(BevatronError, match=message):
        TokenStore.open(store)


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(BevatronError, match=r"absent: does not exist"):
        TokenStore.open(tmp_path / "absent")
    with pytest.raises(BevatronError, match=r"has no store\.json"):
        TokenStore.open(tmp_path)


def test_reading_beyond_the_ends_is_refused(store: Path) -> None:
    opened = TokenStore.open(store)
    for start, length in [(-1, 2), (6, 2), (0, -1), (8, 0)]:
        with pytest.raises(BevatronError, match="it has 7"):
            opened.read(start, length)


def test_a_vocabulary_too_small_for_the_tokens_is_refused(store: Path) -> None:
    opened = TokenStore.open(store)
    opened.check_vocab(100)
    with pytest.raises(BevatronError, match=r"holds token 99, the model has a vocabulary of 99 "):
        opened.check_vocab(99)


def test_the_map_is_read_only(store: Path) -> None:
    opened = TokenStore.open(store)
    opened.read(0, 3)[0] = 50  # a copy
    assert opened.read(0, 1).tolist() == [1]
    with pytest.raises(ValueError, match="read-only"):
        opened._tokens[0] = 1


def test_a_token_outside_of_the_vocabulary_is_not_written(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, 10, None)
    with pytest.raises(BevatronError, match="token 10 lies outside of the vocabulary of 10"):
        writer.add([1, 10], ends=True)
    writer.close()


def test_pieces_in_batches_are_written_as_one_by_one(tmp_path: Path) -> None:
    """Documents of several pieces, empty ones among them, whatever the batches."""
    rng = np.random.default_rng(0)
    pieces = [
        (rng.integers(0, 100, rng.integers(0, 4)), bool(rng.random() < 0.6)) for _ in range(300)
    ]
    expected: list[list[int]] = [[]]
    for ids, ends in pieces:
        expected[-1] += ids.tolist()
        if ends:
            expected.append([])
    expected = [[*ids, 7] for ids in expected[:-1] if ids] + [ids for ids in expected[-1:] if ids]
    for size in (1, 7, 300):
        (tmp_path / str(size)).mkdir()
        writer = StoreWriter(tmp_path / str(size), 100, 7)
        for begin in range(0, 300, size):
            batch = pieces[begin : begin + size]
            ids = np.concatenate([ids for ids, _ in batch])
            writer.add_batch(ids, [len(i) for i, _ in batch], [ends for _, ends in batch])
        writer.finish(tokenizer="toy", fingerprint="xxh3:0")
        opened = TokenStore.open(tmp_path / str(size))
        opened.verify()
        ends_at = [*opened.document_starts().tolist(), opened.tokens]
        found = [opened.read(a, b - a).tolist() for a, b in pairwise(ends_at)]
        assert found == expected


def test_parts_are_joined_as_if_written_in_one(tmp_path: Path) -> None:
    """A document that goes on over parts, the first of which has no token of it."""
    whole, parts = tmp_path / "whole", []
    pieces = [([1, 2], True), ([], False), ([], False), ([3], False), ([4, 5], True), ([6], True)]
    inside = False
    for i, (ids, ends) in enumerate(pieces):
        (tmp_path / str(i)).mkdir()
        writer = StoreWriter(tmp_path / str(i), 100, 9, inside=inside)
        writer.add(ids, ends)
        parts.append((tmp_path / str(i), writer.close()))
        inside = not ends
    whole.mkdir()
    joined = StoreWriter(whole, 100, 9)
    assert all(joined.append(folder, written) for folder, written in parts)
    joined.finish(tokenizer="toy", fingerprint="xxh3:0")
    opened = TokenStore.open(whole)
    opened.verify()
    assert opened.read(0, opened.tokens).tolist() == [1, 2, 9, 3, 4, 5, 9, 6, 9]
    assert opened.document_starts().tolist() == [0, 3, 7]
    (parts[0][0] / TOKENS).write_bytes(b"\0" * 6)
    assert not StoreWriter(whole, 100, 9).append(*parts[0])
