"""A token store keeps which of its tokens are to be learned, and a run finds out when it does
not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bevatron.align.chat_rows import ChatRows
from bevatron.align.sft_feed import Conversations, SftFeed
from bevatron.data.chat_examples import ChatExamples
from bevatron.data.token_store import StoreError, TokenStore
from bevatron.data.tokenize import tokenize
from bevatron.data.tokenize_chats import tokenize_chats
from bevatron.errors import BevatronError
from bevatron.train.config import SourceConfig
from tests.align.sft_data import chats, prepared
from tests.commands import bevatron
from tests.labelled_data import write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepared(tmp_path_factory.mktemp("sft") / "run")
    tokenize_chats([folder / "chats.jsonl"], folder / "store", tokenizer=folder / "tokenizer")
    return folder


def read(folder: Path, name: str, **options: Any) -> Conversations:
    rows = ChatRows(ChatExamples.open(folder / "tokenizer"), 64, **options)
    return Conversations([SourceConfig(path=str(folder / name))], rows)


def test_a_store_gives_the_samples_of_the_rows_that_it_was_made_of(folder: Path) -> None:
    store = TokenStore.open(folder / "store")
    store.verify()
    assert (store.info.documents, store.info.learned) == (40, 270)
    for packing in (False, True):
        rows = read(folder, "chats.jsonl", packing=packing)
        stored = read(folder, "store", packing=packing)
        assert stored.told() == rows.told()
        numbers = range(len(rows) + 1)
        for one, other in zip(rows[numbers], stored[numbers], strict=True):
            assert one.keys() == other.keys()
            for name, array in one.items():
                np.testing.assert_array_equal(other[name], array)


def test_threads_make_the_same_store(folder: Path, tmp_path: Path) -> None:
    many = write_rows(tmp_path / "x.jsonl", chats(100))
    for workers in (1, 3):
        made, _ = tokenize_chats(
            [many], tmp_path / f"{workers}", tokenizer=folder / "tokenizer", workers=workers
        )
        assert made.info.documents == 100
    assert made.info.learned_hash == TokenStore.open(tmp_path / "1").info.learned_hash
    assert made.info.hash == TokenStore.open(tmp_path / "1").info.hash
    rows = [*chats(99), {"messages": [{"role": "user", "content": "a"}]}, *chats(3)]
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(BevatronError, match=r"bad.jsonl: line 100: no message of the assistant"):
        tokenize_chats([bad], tmp_path / "none", tokenizer=folder / "tokenizer", workers=3)
    assert not (tmp_path / "none").exists()


def test_a_mask_that_is_lost_or_of_other_tokens_is_noticed(folder: Path, tmp_path: Path) -> None:
    for change, says in (
        ("remove", "learned.bin: is missing, the token store is incomplete"),
        ("cut", "learned.bin: is truncated: 700 bytes, store.json says 717"),
        ("forget", "learned.bin: store.json does not know of this mask"),
    ):
        store = shutil.copytree(folder / "store", tmp_path / change)
        if change == "remove":
            (store / "learned.bin").unlink()
        elif change == "cut":
            (store / "learned.bin").write_bytes((store / "learned.bin").read_bytes()[:700])
        else:
            info = json.loads((store / "store.json").read_text())
            (store / "store.json").write_text(json.dumps(info | {"learned": None}))
        with pytest.raises(StoreError, match=says):
            TokenStore.open(store)
    flipped = shutil.copytree(folder / "store", tmp_path / "flipped")
    mask = bytearray((flipped / "learned.bin").read_bytes())
    mask[0] ^= 1
    (flipped / "learned.bin").write_bytes(mask)
    with pytest.raises(StoreError, match=r"learned.bin: is damaged: its hash is"):
        TokenStore.open(flipped).verify()
    assert SftFeed.hash_of(str(folder / "store")).count("xxh3:") == 2


def test_a_store_without_a_mask_is_learned_only_if_that_is_said(folder: Path) -> None:
    texts = write_rows(folder / "texts.jsonl", [{"text": "2+2=4"}, {"text": "3+3=6"}])
    tokenize([texts], folder / "bare", tokenizer=folder / "tokenizer")
    with pytest.raises(StoreError, match="bare: does not say which of its tokens are to be learne"):
        read(folder, "bare")
    whole = read(folder, "bare", learn_unmasked=True)
    assert [int(sample["learned"].sum()) for sample in whole[range(2)]] == [5, 5]
    mixed = [SourceConfig(path=str(folder / name)) for name in ("store", "chats.jsonl")]
    with pytest.raises(BevatronError, match=r"store is a token store, and .*chats.jsonl is none"):
        Conversations(mixed, whole.labelled)


def test_a_setting_that_a_store_does_not_heed_is_named(folder: Path) -> None:
    asked = ChatExamples.open(folder / "tokenizer", assistant_only=False)
    says = "objective.assistant_only_loss: false changes nothing here"
    for name, there in (("store", True), ("chats.jsonl", False)):
        found = Conversations([SourceConfig(path=str(folder / name))], ChatRows(asked, 64))
        assert any(line.startswith(says) for line in found.told()) == there
    assert not any("changes nothing" in line for line in read(folder, "store").told())


def test_a_store_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    other = prepared(tmp_path / "other") / "tokenizer"
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"<unk>"', '"<unknown>"'))
    rows = ChatRows(ChatExamples.open(other), 64)
    with pytest.raises(StoreError, match="was made with another tokenizer"):
        Conversations([SourceConfig(path=str(folder / "store"))], rows)


def test_the_verb_says_what_is_learned(folder: Path, tmp_path: Path) -> None:
    def tokenized(*more: str) -> tuple[int, str]:
        common = ("tokenize", "chats.jsonl", str(tmp_path / "s"), "--tokenizer", "tokenizer")
        return bevatron(folder, *common, "--json", "--overwrite", *more)

    status, said = tokenized("--chat")
    assert status == 0
    found = json.loads(said[said.index("{") :])
    assert (found["documents"], found["learned"], found["tokens"]) == (40, 270, 717)
    status, said = tokenized("--chat", "--learn-all")
    assert json.loads(said[said.index("{") :])["learned"] == 717 - 40
    for more, says in (
        (("--chat", "--no-eos"), "--no-eos is for texts and means nothing with --chat"),
        (("--learn-all",), "for rows of chats; add --chat"),
    ):
        status, said = tokenized(*more)
        assert status == 2
        assert says in said
