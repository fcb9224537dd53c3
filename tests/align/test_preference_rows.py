"""Rows of preferences become the token ids that the chat template makes of them, with the answers
alone learned; what cannot be read is refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from bevatron.align.preference_rows import PreferenceRows
from bevatron.data.chat_examples import ChatExamples
from bevatron.errors import BevatronError
from tests.align.preference_data import chat_tokenizer
from tests.train.tiny_run import prepare

ASK = [{"role": "user", "content": "Hi."}]


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_tokenizer(prepare(tmp_path_factory.mktemp("rows") / "run") / "tokenizer")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def rows(folder: Path, length: int = 64, **options: Any) -> PreferenceRows:
    return PreferenceRows(ChatExamples.open(folder), length, **options)


def text(theirs: Any, arrays: dict[str, Any], i: int, learned: bool = True) -> str:
    ids = arrays["tokens"][i][arrays["learned"][i] == learned]
    return str(theirs.decode(ids))


def test_the_answer_and_its_end_are_learned_and_nothing_else(folder: Path, theirs: Any) -> None:
    row = {"prompt": ASK, "chosen": say("Hello!"), "rejected": say("What?")}
    arrays = rows(folder).encode([row])[0][0]
    for i, answer in enumerate(("Hello!", "What?")):
        wanted = theirs.apply_chat_template([*ASK, *say(answer)], return_dict=False)
        assert arrays["tokens"][i][: len(wanted)].tolist() == wanted
        assert (arrays["tokens"][i][len(wanted) :] == theirs.eos_token_id).all()
        assert text(theirs, arrays, i) == f"{answer}<|im_end|>"
    assert bool(arrays["real"]) and not arrays["cut"].any() and "rewards" not in arrays


def test_a_conversation_pair_is_a_prompt_and_two_answers(folder: Path) -> None:
    both = rows(folder)
    wanted = both.encode([{"prompt": ASK, "chosen": say("Yes"), "rejected": say("No")}])[0][0]
    shared: dict[str, Any] = {"chosen": [*ASK, *say("Yes")], "rejected": [*ASK, *say("No")]}
    for row in (shared, shared | {"prompt": "Hi."}):  # as ultrafeedback_binarized has it
        found = both.encode([row])[0][0]
        assert all((found[name] == wanted[name]).all() for name in wanted)


def test_texts_are_tokenized_in_one_piece(folder: Path, theirs: Any) -> None:
    arrays = rows(folder).encode([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}])[0][0]
    assert text(theirs, arrays, 0) == "2<|im_end|>"
    assert text(theirs, arrays, 1, learned=False).startswith("1+1=")


def test_several_answers_come_in_the_order_of_their_rewards(folder: Path, theirs: Any) -> None:
    row = {"prompt": "x", "responses": ["a", "b", "c"], "rewards": [0, 2.5, 1]}
    arrays = rows(folder, count=3, rewards=True).encode([row])[0][0]
    assert arrays["rewards"].tolist() == [2.5, 1.0, 0.0]
    assert [text(theirs, arrays, i)[0] for i in range(3)] == ["b", "c", "a"]


def test_rewards_of_a_pair_and_further_numbers(folder: Path) -> None:
    pair = {"prompt": "x", "chosen": "a", "rejected": "b"}
    found = rows(folder, rewards=True, default_rewards=(1.0, None), numbers=("margin",))
    arrays = found.encode([pair | {"rejected_reward": -2, "margin": 0.5}])[0][0]
    assert arrays["rewards"].tolist() == [1.0, -2.0] and float(arrays["margin"]) == 0.5
    assert arrays["rewards"].dtype == arrays["margin"].dtype == np.float32
    with pytest.raises(BevatronError, match=r'no "rejected_reward".*default_rejected_reward'):
        found.check(pair)


def test_what_is_too_long_loses_its_end_and_says_so(folder: Path) -> None:
    row = {"prompt": "1234", "chosen": "5678", "rejected": "5"}
    arrays = rows(folder, length=6).encode([row])[0][0]
    assert arrays["cut"].tolist() == [True, False]
    assert arrays["learned"].sum(1).tolist() == [2, 2]
    nothing = rows(folder, length=4).encode([row])[0][0]
    assert nothing["cut"].all() and not nothing["learned"].any()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"chosen": "a", "rejected": "b"}, 'no "prompt"'),
        ({"prompt": "x", "chosen": "a"}, "no \"rejected\", only the keys 'prompt', 'chosen'"),
        ({"prompt": "x", "chosen": "a", "rejected": 3}, "'3', expected a text or a list"),
        ({"prompt": ASK, "chosen": "a", "rejected": "b"}, "expected all of a kind"),
        ({"prompt": ASK, "chosen": say("a"), "rejected": []}, "expected a text or a list"),
        ({"chosen": say("a"), "rejected": say("b")}, "begin with no message that is the same"),
        ({"chosen": [*ASK, *say("a")], "rejected": ASK}, "one ends where the other goes on"),
        (
            {"prompt": "Bye", "chosen": [*ASK, *say("a")], "rejected": [*ASK, *say("b")]},
            "is no message of",
        ),
        ({"prompt": "x", "responses": ["a"], "rewards": [1]}, "has 1 \"responses\", expected 2"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "tools": "{"}, "not valid JSON"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "chat_template_kwargs": "[1]"},
         "expected an object such as"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row_is_said(folder: Path, row: dict[str, Any], says: str) -> None:
    with pytest.raises(BevatronError, match=says):
        rows(folder).encode([row])


@pytest.mark.parametrize("reward", ["high", None, float("nan"), True])
def test_rewards_are_numbers(folder: Path, reward: Any) -> None:
    row = {"prompt": "x", "responses": ["a", "b"], "rewards": [1.0, reward]}
    with pytest.raises(BevatronError, match="expected a finite number"):
        rows(folder, rewards=True).check(row)
