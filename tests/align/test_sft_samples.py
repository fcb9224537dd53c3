"""Rows in TRL's columns become samples; nothing is packed, cut off or left out in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trl.data_utils import pack_dataset

from bevatron.align.chat_rows import ChatRows
from bevatron.align.packing import best_fit_decreasing
from bevatron.align.sequences import labels_of
from bevatron.align.sft_feed import Conversations
from bevatron.data.chat_examples import ChatExamples
from bevatron.errors import BevatronError
from bevatron.nn.vocabulary_loss import IGNORE
from bevatron.train.config import SourceConfig
from tests.align.sft_data import chats, prepared
from tests.labelled_data import write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("sft") / "run")


@pytest.fixture(scope="module")
def examples(folder: Path) -> ChatExamples:
    return ChatExamples.open(folder / "tokenizer")


def read(folder: Path, examples: ChatExamples, length: int, **options: Any) -> Conversations:
    rows = ChatRows(examples, length, **options)
    return Conversations([SourceConfig(path=str(folder / "chats.jsonl"))], rows)


def test_what_does_not_fit_is_refused_cut_or_left_out_and_said(
    folder: Path, examples: ChatExamples
) -> None:
    with pytest.raises(BevatronError, match=r"22 of 40 examples are longer than data\.seq_len 16"):
        len(read(folder, examples, 16))
    cut = read(folder, examples, 16, too_long="truncate")
    assert len(cut) == 40
    assert cut.told()[1] == (
        "22 examples are cut off at 16 tokens, with 104 tokens that were to be learned; 0 of them "
        "have none left and are left out"
    )
    dropped = read(folder, examples, 16, too_long="drop")
    assert len(dropped) == 18
    assert dropped.told()[1] == "22 examples of more than 16 tokens are left out"
    short = read(folder, examples, 7, too_long="truncate")
    assert len(short) < 40, "what has nothing left to learn"
    assert f"{40 - len(short)} of them have none left and are left out" in short.told()[1]
    with pytest.raises(BevatronError, match=r"nothing is left to learn within data\.seq_len 1"):
        len(read(folder, examples, 1, too_long="truncate"))


def test_packing_keeps_every_token_and_its_mask(folder: Path, examples: ChatExamples) -> None:
    """A mask dropped by packing."""
    apart, packed = read(folder, examples, 64), read(folder, examples, 64, packing=True)
    assert len(apart) == 40 and len(packed) == 12

    def parts(samples: Conversations) -> list[tuple[list[int], list[bool]]]:
        made = []
        for sample in samples[range(len(samples))]:
            numbers = sample.get("documents", np.zeros(64, dtype=np.int64))
            for number in range(int(numbers.max()) + 1):
                inside = numbers == number
                tokens, learned = sample["tokens"][inside], sample["learned"][inside]
                end = int(np.flatnonzero(learned).max()) + 1  # all of ours end with an answer
                made.append((tokens[:end].tolist(), learned[:end].tolist()))
        return sorted(made)

    assert parts(packed) == parts(apart)
    for sample in packed[range(len(packed))]:
        begins = np.flatnonzero(np.diff(sample["documents"], prepend=-1))
        assert not sample["learned"][begins].any(), "nothing comes before a document"
        labels = labels_of(*(torch.tensor(sample[n])[None] for n in ("tokens", "learned")))[0]
        assert int((labels != IGNORE).sum()) == sample["learned"].sum()
        assert (labels[begins[1:] - 1] == IGNORE).all()
    assert not packed[[99]][0]["learned"].any(), "behind the last ones nothing counts"


def test_packing_is_best_fit_decreasing_as_trl_has_it() -> None:
    draw = np.random.default_rng(0)
    for room, lengths in ((16, draw.integers(1, 17, 200)), (100, draw.integers(1, 60, 500))):
        made = best_fit_decreasing(lengths, room)
        assert sorted(n for sample in made for n in sample) == list(range(len(lengths)))
        assert all(lengths[sample].sum() <= room for sample in made)
        import datasets

        rows = datasets.Dataset.from_dict({"input_ids": [[i] * n for i, n in enumerate(lengths)]})
        theirs = pack_dataset(rows, room, "bfd")
        assert len(made) == len(theirs)
        filled = sorted(int(lengths[sample].sum()) for sample in made)
        assert filled == sorted(len(row) for row in theirs["input_ids"])
    assert best_fit_decreasing([4, 4, 8, 1], 8) == [[2], [0, 1], [3]]
    with pytest.raises(ValueError, match="lengths are 1 to 9, expected 1 to 8"):
        best_fit_decreasing([9, 1], 8)


def test_every_form_of_a_row_is_read(examples: ChatExamples, tmp_path: Path) -> None:
    sharegpt = [{"from": "human", "value": "2+2="}, {"from": "gpt", "value": "4"}]
    messages = [{"role": "user", "content": "2+2="}, {"role": "assistant", "content": "4"}]
    rows = ChatRows(examples, 64)
    for row in (
        {"conversations": sharegpt},
        {"messages": messages, "id": 7, "tools": "null", "chat_template_kwargs": {}},
        {"prompt": messages[:1], "completion": messages[1:]},
    ):
        rows.check(row)
        [one] = rows.of_row(row)
        want = examples.messages(messages)
        assert one.ids.tolist() == want.ids.tolist()
        assert one.learned.tolist() == want.learned.tolist()
    for row, says in (
        ({"message": messages}, 'the row has the keys \'message\'; expected "messages", "prompt"'),
        ({"messages": []}, '"messages" is not a list of messages'),
        ({"prompt": "a", "completion": messages}, "not two texts or two lists of messages"),
        ({"prompt": "a"}, "not two texts or two lists of messages"),
        ({"text": None}, "the row has the keys 'text'"),
        ({"text": 5}, "\"text\" is '5', expected a text"),
        ({"text": "a\ud800"}, '"text" is .*, expected a text'),
    ):
        with pytest.raises(BevatronError, match=says):
            rows.check(row)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": "f"}]}
    for row, says in (
        ({"conversations": [{"from": ["x"], "value": "a"}]}, r"messages\[0\].role is a list"),
        ({"messages": [*messages, call]}, r"tool_calls\[0\].function is a text, expected an obj"),
        ({"messages": messages, "chat_template_kwargs": [1]}, r"is '\[1\]', expected an object"),
        ({"messages": messages, "chat_template_kwargs": "5"}, "is '5', expected an object"),
        ({"messages": messages, "chat_template_kwargs": {"tools": []}}, "has 'tools', which is"),
        ({"messages": messages, "chat_template_kwargs": {"stops": 1}}, "has 'stops', which is"),
    ):
        with pytest.raises(BevatronError, match=says):
            rows.of_row(row)
    path = write_rows(tmp_path / "x.jsonl", [*chats(2), {"messages": messages[:1]}])
    samples = Conversations([SourceConfig(path=str(path))], rows)
    with pytest.raises(BevatronError, match=r"x.jsonl: line 3: no message of the assistant"):
        len(samples)
