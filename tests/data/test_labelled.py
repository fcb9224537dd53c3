"""Labelled examples become the ids and labels that transformers' example scripts make of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from bevatron.data.dataset_rows import Rows
from bevatron.data.labelled_examples import Padded, SequenceLabels, TokenLabels
from bevatron.data.question_answering import Answers
from bevatron.data.tokenizer import open_tokenizer
from bevatron.errors import BevatronError
from tests.labelled_data import save_tokenizer, write_rows

T = 24
TEXTS = [
    "",
    "Short.",
    "Ünïcode, 日本語 and 🙂 emoji; tabs\tand\nlines.",
    "the tokenizer cuts what is too long for the sequence " * 4,
    "a text with </s> a special token's name in it",
]
TAGS = ("O", "B-PER", "I-PER", "B-LOC")
SENTENCES = [
    {"tokens": ["Ada", "Lovelace", "visited", "Turin", "."], "labels": [1, 2, 0, 3, 0]},
    {"tokens": ["Wolfeschlegelsteinhausen", "slept"], "labels": ["B-PER", -100]},
    {"tokens": ["word"] * 40, "labels": ["O"] * 40},
    {"tokens": [], "labels": []},
]
CONTEXT = (
    "Bevatron was a particle accelerator at Lawrence Berkeley National Laboratory. It began "
    "operating in 1954. The antiproton was discovered there in 1955. Größe: 日本語 text."
)


def question(text: str, answer: str | None) -> dict[str, Any]:
    starts = [] if answer is None else [CONTEXT.index(answer)]
    answers = {"text": [] if answer is None else [answer], "answer_start": starts}
    return {"question": text, "context": CONTEXT, "answers": answers}


QUESTIONS = [
    question("When did it begin operating?", "1954"),
    question("  What was discovered?", "The antiproton"),
    question("Where?", "Lawrence Berkeley National Laboratory"),
    question("Which script?", "日本語"),
    question("Who?", None),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), [*TEXTS, CONTEXT])


@pytest.fixture(scope="module")
def padded(folder: Path) -> Padded:
    return Padded.of(open_tokenizer(folder), T)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_texts_and_pairs_are_transformers_ids(padded: Padded, theirs: Any) -> None:
    kind = SequenceLabels(padded, ("no", "yes"), "single_label_classification")
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    rows += [{"text": a, "text_pair": b, "label": "yes"} for a in TEXTS for b in TEXTS]
    for row, [made] in zip(rows, kind.encode(rows), strict=True):
        kind.check(row)
        texts = [[row[key]] for key in ("text", "text_pair") if key in row]
        [want] = theirs(*texts, truncation=True, padding="max_length", max_length=T).input_ids
        assert made["tokens"].tolist() == want, row
    assert [int(made["labels"]) for [made] in kind.encode(rows)[:6]] == [0, 1, 0, 1, 0, 1]


def test_a_long_text_loses_the_side_that_the_tokenizer_says(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    changed = config | {"truncation_side": "left"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(changed))
    left = AutoTokenizer.from_pretrained(tmp_path)
    want = left(TEXTS[3], truncation=True, padding="max_length", max_length=T).input_ids
    kind = SequenceLabels(Padded.of(open_tokenizer(tmp_path), T), ("a",), "regression")
    [[made]] = kind.encode([{"text": TEXTS[3], "label": 0.5}])
    assert made["tokens"].tolist() == want


@pytest.mark.parametrize("pad", [-1, 10**6])
def test_a_padding_that_is_no_token_counts_as_none(folder: Path, tmp_path: Path, pad: int) -> None:
    """Publishers write -1 for none. Only a model that finds the ends of sequences by it minds."""
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": pad}))
    opened = open_tokenizer(tmp_path)
    assert opened.pad_id is None
    assert Padded.of(opened, T).pad_id == 0
    with pytest.raises(BevatronError, match="pad_token_id"):
        Padded.of(opened, T, pad)


def run_ner(theirs: Any, row: dict[str, Any], all_tokens: bool) -> tuple[list[int], list[int]]:
    """As in transformers' examples/pytorch/token-classification/run_ner.py."""
    b_to_i = [0, 2, 2, 3]
    out = theirs(row["tokens"], padding="max_length", truncation=True, max_length=T,
                 is_split_into_words=True)  # fmt: skip
    numbers = [TAGS.index(label) if isinstance(label, str) else label for label in row["labels"]]
    previous, labels = None, []
    for word in out.word_ids():
        if word is None:
            labels.append(-100)
        elif word != previous:
            labels.append(numbers[word])
        elif all_tokens and numbers[word] != -100:
            labels.append(b_to_i[numbers[word]])
        else:
            labels.append(-100)
        previous = word
    return out.input_ids, labels


@pytest.mark.parametrize("all_tokens", [False, True])
def test_words_and_labels_are_those_of_run_ner(
    padded: Padded, theirs: Any, all_tokens: bool
) -> None:
    kind = TokenLabels(padded, TAGS, all_tokens=all_tokens, join=False)
    for row in SENTENCES:
        kind.check(row)
        [[made]] = kind.encode([row])
        ids, labels = run_ner(theirs, row, all_tokens)
        assert (made["tokens"].tolist(), made["labels"].tolist()) == (ids, labels)


def test_joined_words_are_the_ids_of_the_text_with_a_label_at_each_words_first_token(
    padded: Padded, theirs: Any
) -> None:
    kind = TokenLabels(padded, TAGS, all_tokens=False, join=True)
    for row in SENTENCES[:3]:
        [[made]] = kind.encode([row])
        text = " ".join(row["tokens"])
        out = theirs(text, padding="max_length", truncation=True, max_length=T,
                     return_offsets_mapping=True)  # fmt: skip
        assert made["tokens"].tolist() == out.input_ids
        ends, at = [], 0
        for word in row["tokens"]:
            ends.append((at, at + len(word)))
            at += len(word) + 1
        seen = set()
        for i, (begin, end) in enumerate(out.offset_mapping):
            word = next((w for w, (a, b) in enumerate(ends) if begin < end and a < end <= b), None)
            fresh = word is not None and word not in seen
            seen.add(word)
            label = row["labels"][word] if fresh else -100
            assert made["labels"][i] == (TAGS.index(label) if isinstance(label, str) else label)


def run_qa(
    theirs: Any, row: dict[str, Any], stride: int | None, length: int
) -> list[tuple[list[int], int, int]]:
    """As in transformers' examples/pytorch/question-answering/run_qa.py: prepare_train_features."""
    out = theirs(row["question"].lstrip(), row["context"], truncation="only_second",
                 max_length=length, stride=stride or 0, padding="max_length",
                 return_overflowing_tokens=stride is not None,
                 return_offsets_mapping=True)  # fmt: skip
    windows = [0] if stride is None else range(len(out.input_ids))
    found = []
    for i in windows:
        ids = out.input_ids if stride is None else out.input_ids[i]
        offsets = out.offset_mapping if stride is None else out.offset_mapping[i]
        null = ids.index(theirs.bos_token_id)
        sequence, answers = out.sequence_ids(i), row["answers"]
        if not answers["answer_start"]:
            found.append((ids, null, null))
            continue
        begin = answers["answer_start"][0]
        end = begin + len(answers["text"][0])
        first = 0
        while sequence[first] != 1:
            first += 1
        last = len(ids) - 1
        while sequence[last] != 1:
            last -= 1
        if not (offsets[first][0] <= begin and offsets[last][1] >= end):
            found.append((ids, null, null))
            continue
        while first < len(offsets) and offsets[first][0] <= begin:
            first += 1
        while offsets[last][1] >= end:
            last -= 1
        found.append((ids, first - 1, last + 1))
    return found


@pytest.mark.parametrize("stride", [None, 4])
def test_windows_and_positions_are_those_of_run_qa(
    padded: Padded, theirs: Any, stride: int | None
) -> None:
    length = 48 if stride else 80
    kind = Answers(replace(padded, length=length), stride)
    inside = 0
    for row in QUESTIONS:
        kind.check(row)
        [windows] = kind.encode([row])
        want = run_qa(theirs, row, stride, length)
        got = [(w["tokens"].tolist(), int(w["starts"]), int(w["ends"])) for w in windows]
        assert got == want, row
        for window in windows:
            begin, end = int(window["starts"]), int(window["ends"])
            if begin >= np.flatnonzero(window["context"])[0]:
                inside += 1
                assert window["context"][begin : end + 1].all()
                text = theirs.decode(window["tokens"][begin : end + 1])
                assert row["answers"]["text"][0] in text
            assert window["lengths"] == np.count_nonzero(window["tokens"] != theirs.pad_token_id)
    assert inside >= (4 if stride else 3)


def test_labels_of_several_and_of_numbers(padded: Padded) -> None:
    several = SequenceLabels(padded, ("a", "b", "c"), "multi_label_classification")
    for label, want in [(["a", "c"], [1, 0, 1]), ([1], [0, 1, 0]), ([], [0, 0, 0]),
                        ([0.0, 1.0, 1.0], [0, 1, 1])]:  # fmt: skip
        [[made]] = several.encode([{"text": "x", "label": label}])
        assert (made["labels"].tolist(), made["labels"].dtype) == (want, np.float32)
    number = SequenceLabels(padded, ("score",), "regression")
    [[made]] = number.encode([{"text": "x", "label": 3}])
    assert made["labels"].tolist() == [3.0]


single = {"labels": ("a", "b"), "problem_type": "single_label_classification"}
BAD = {
    "no text": (SequenceLabels, single, {"label": 0}, 'line 2: "text" is not a text'),
    "no label": (SequenceLabels, single, {"text": "x"}, 'line 2: has no "label"'),
    "name": (SequenceLabels, single, {"text": "x", "label": "c"}, r"'c' is not one of .*\(a, b\)"),
    "number": (SequenceLabels, single, {"text": "x", "label": 2}, "2 is not one of"),
    "list": (SequenceLabels, single, {"text": "x", "label": [0]}, "problem_type"),
    "surrogate": (SequenceLabels, single, {"text": "\ud83d", "label": 0}, "is not a text"),
    "regression": (
        SequenceLabels,
        {"labels": ("a",), "problem_type": "regression"},
        {"text": "x", "label": "high"},
        "'high' is not 1 finite number",
    ),
    "hot": (
        SequenceLabels,
        {"labels": ("a", "b"), "problem_type": "multi_label_classification"},
        {"text": "x", "label": [0.5, 1.0]},
        "is not 2 times 0.0 or 1.0",
    ),
    "lengths": (
        TokenLabels,
        {"labels": TAGS, "all_tokens": False, "join": False},
        {"tokens": ["a", "b"], "labels": ["O"]},
        'has 2 "tokens" but 1 "labels"',
    ),
    "answer": (
        Answers,
        {"stride": None},
        {"question": "?", "context": "abc", "answers": {"text": ["b"], "answer_start": [0]}},
        "the context has 'a' at character 0, not the answer 'b'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_does_not_fit_is_named_by_its_line(
    case: str, padded: Padded, tmp_path: Path
) -> None:
    kind, options, row, message = BAD[case]
    labelled: Any = kind(padded, **options)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(BevatronError, match=message):
        Rows([path], labelled.check)


def test_rows_of_several_files_are_read_where_they_lie(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", [{"n": 0}, {"n": 1}])
    (tmp_path / "b.jsonl").write_text('\ufeff{"n": 2}\r\n\n{"n": "ü"}', encoding="utf-8")
    rows = Rows([a, tmp_path / "b.jsonl"], lambda row: None)
    assert [row["n"] for row in rows] == [0, 1, 2, "ü"]
    for path, message in [(tmp_path, "is a folder"), (tmp_path / "no", "No such file")]:
        with pytest.raises(BevatronError, match=message):
            Rows([path], lambda row: None)
    (tmp_path / "c.jsonl").write_text("[1]\n")
    with pytest.raises(BevatronError, match="line 1 holds a JSON list"):
        Rows([tmp_path / "c.jsonl"], lambda row: None)


def test_a_question_that_leaves_no_room_is_refused(padded: Padded) -> None:
    row = question("why " * 50, "1954")
    with pytest.raises(BevatronError, match=r"data\.seq_len 24"):
        Answers(padded, None).encode([row])
