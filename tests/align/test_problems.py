"""Problems are a function of (seed, position): each row once an epoch, sources in exact shares,
generators without end, a curriculum from easy to hard."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from bevatron.align.curriculum import Curriculum
from bevatron.align.instruction_prompts import APART, HELD_OUT, KINDS, TOPICS, instruction_row
from bevatron.align.problem_config import CurriculumConfig, ProblemsConfig
from bevatron.align.problem_generators import LOCAL
from bevatron.align.problems import Problems
from bevatron.align.reward_config import reward_of
from bevatron.align.scorers import Asked, scorer_of
from bevatron.errors import BevatronError
from bevatron.train.config import SourceConfig

PLAIN = ProblemsConfig()


def rows(folder: Path, name: str, made: list[dict[str, Any]]) -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def problems(*sources: dict[str, Any], config: ProblemsConfig = PLAIN, **keys: Any) -> Problems:
    return Problems([SourceConfig(**s) for s in sources], config, keys.pop("seed", 0), **keys)


def test_rows_come_once_an_epoch_and_sources_in_their_shares(tmp_path: Path) -> None:
    a = rows(tmp_path, "a.jsonl", [{"prompt": f"a{i}", "n": i} for i in range(7)])
    b = rows(tmp_path, "b.jsonl", [{"prompt": f"b{i}"} for i in range(3)])
    made = problems({"path": a, "weight": 2.0}, {"path": b, "weight": 1.0})
    found = [made[i].prompt for i in range(63)]
    for n in range(1, 64):
        assert abs(sum(str(p).startswith("a") for p in found[:n]) - 2 * n / 3) <= 1
    ours = [p for p in found if str(p).startswith("a")]
    epochs = [ours[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(map(str, e)) == [f"a{i}" for i in range(7)] for e in epochs)
    assert len({tuple(e) for e in epochs}) > 1
    again = problems({"path": a, "weight": 2.0}, {"path": b, "weight": 1.0})
    assert [again[i].prompt for i in (40, 3, 17)] == [found[i] for i in (40, 3, 17)]
    other = problems({"path": a, "weight": 2.0}, {"path": b, "weight": 1.0}, seed=1)
    assert [other[i].prompt for i in range(63)] != found
    assert made.summary(21)[1] == f"{b}: 7 problems, 2.33 epochs of 3"
    assert list(made.fingerprints()) == [a, b]


def test_a_validation_is_one_pass_in_order(tmp_path: Path) -> None:
    a = rows(tmp_path, "a.jsonl", [{"prompt": f"a{i}"} for i in range(3)])
    made = problems(
        {"path": a},
        {"path": "generator:sums", "parameters": {"size": 2}},
        shuffled=False,
    )
    assert len(made) == 5
    assert [made[i].prompt for i in range(3)] == ["a0", "a1", "a2"]
    with pytest.raises(IndexError):
        made[5]
    other = problems({"path": a}, {"path": "generator:sums"}, seed=9, shuffled=False)
    assert other[3] == made[3] and other[4] == made[4]  # whatever the seed


def test_prompts_are_made_of_rows(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    path = rows(tmp_path, "a.jsonl", [{"prompt": chat, "question": "1{+}2", "unit": "kg"}])
    source = {"path": path}

    def prompt(**keys: Any) -> Any:
        return problems(source, config=ProblemsConfig(**keys))[0].prompt

    system = {"role": "system", "content": "S"}
    assert prompt() == chat
    assert prompt(system="S") == [system, *chat]
    assert prompt(column="question") == "1{+}2"
    filled = "Q: 1{+}2 {in} kg"
    template = "Q: {prompt} {{in}} {unit}"
    assert prompt(column="question", template=template) == filled
    assert prompt(column="question", chat=True) == [{"role": "user", "content": "1{+}2"}]
    assert prompt(column="question", system="S")[0] == system
    for keys, said in (
        ({"column": "text"}, 'a.jsonl: line 1: "text" is neither .* problems.column'),
        ({"column": "question", "template": "{other}"}, "{other} is no column"),
        ({"column": "question", "template": "{"}, "write {{ for a brace"),
        ({"template": "{prompt}"}, "problems.template is for texts"),
    ):
        with pytest.raises(BevatronError, match=said):
            prompt(**keys)


def test_reasoning_gyms_problems_are_its_own_and_never_end() -> None:
    import reasoning_gym

    parameters = {"max_terms": 3, "max_digits": 2}
    made = problems({"path": "reasoning_gym:chain_sum", "parameters": parameters}, seed=5)
    again = problems({"path": "reasoning_gym:chain_sum", "parameters": parameters}, seed=5)
    for position in (0, 499, 500, 123_456_789):
        row = made[position].row
        assert row == again[position].row
        assert made[position].prompt == row["question"]
        theirs = reasoning_gym.get_score_answer_fn("chain_sum")
        ours = scorer_of(reward_of({"name": "reasoning_gym"}))
        for text in (row["answer"], "x"):
            assert ours(Asked(row, "", text, [], True)) == theirs(text, row)
    assert len({made[i].row["question"] for i in range(400, 600)}) > 150


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"path": "generator:x"}, "known are generator:sums"),
        ({"path": "reasoning_gym:x"}, "reasoning_gym has no 'x'; it has ab, acre"),
        ({"path": "generator:sums", "parameters": {"a": 1}}, "parameters.a is unknown"),
        ({"path": "generator:sums", "parameters": {"size": 0}}, "parameters.size is 0"),
        ({"path": "generator:sums", "parameters": {"digits": "a"}}, "digits is 'a'"),
        ({"path": "generator:instructions", "parameters": {"kinds": ["x"]}}, "'x' is unknown"),
        ({"path": "generator:instructions", "parameters": {"least": 2}}, "least is 2"),
        ({"path": "reasoning_gym:chain_sum", "parameters": {"seed": 1}}, "parameters.seed"),
        ({"path": "reasoning_gym:chain_sum", "parameters": {"min_terms": 0}}, "must be positive"),
        ({"path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"path": "nowhere.jsonl", "parameters": {"a": 1}}, "parameters are for generators"),
    ],
)
def test_sources_that_cannot_be_are_refused(source: dict[str, Any], said: str) -> None:
    with pytest.raises(BevatronError, match=said):
        problems(source)


def test_sums_are_right() -> None:
    for form in ("plain", "words"):
        made = LOCAL["sums"](terms=3, digits=2, form=form)
        row = made(Random(1))
        numbers = [
            int(n) for n in "".join(c if c.isdigit() else " " for c in row["prompt"]).split()
        ]
        assert len(numbers) == 3 and str(sum(numbers)) == row["answer"]


SOLVED = {
    "no_comma": "a b",
    "lowercase": "the sea is very large and it is blue and cold in the winter",
    "capitals": "THE SEA IS VERY LARGE AND IT IS BLUE AND COLD IN THE WINTER",
    "quotation": '"a b"',
    "title": "<<a>> b",
    "end": "b {end_phrase}",
    "postscript": "b\nP.S. c",
    "keyword": "b {keywords[0]}",
    "forbidden": "b c",
    "fewer_words": "b c",
    "bullets": "* b\n* c\n* d\n* e",
    "highlights": "*b* *c* d",
    "placeholders": "[b] [c]",
    "two": "b\n******\nc",
}


@pytest.mark.parametrize("kind", KINDS)
def test_instructions_can_be_followed_and_not(kind: str) -> None:
    """IFEval's own checkers take what the prompts ask for."""
    score = scorer_of(reward_of({"name": "instructions"}))
    random = Random(3)
    for _ in range(4):
        row = instruction_row(random, [kind], 1, 1, False)
        arguments = row["kwargs"][0]
        text = SOLVED[kind].format(**arguments)
        if kind == "bullets":
            text = "\n".join(text.splitlines()[: arguments["num_bullets"]])
        assert score(Asked(row, row["prompt"], text, [], True)) == 1, row["prompt"]
        wrong = "The, Sea. " * 20 if kind != "forbidden" else "a the and is of to"
        assert score(Asked(row, row["prompt"], wrong, [], True)) == 0, row["prompt"]
        assert all(f'"{v}"' in row["prompt"] for v in arguments.get("keywords", []))


def test_instructions_go_together_and_validations_have_other_topics() -> None:
    source = {"path": "generator:instructions", "parameters": {"least": 2, "most": 3}}
    made, held = problems(source), problems(source, shuffled=False)
    for i in range(100):
        kinds = made[i].row["kinds"]
        assert len(kinds) in (2, 3) and len(set(kinds)) == len(kinds)
        assert not any({a, b} in APART for a in kinds for b in kinds)
        assert any(topic in str(made[i].prompt) for topic in TOPICS)
        assert any(topic in str(held[i].prompt) for topic in HELD_OUT)
    assert not set(TOPICS) & set(HELD_OUT)


def test_a_curriculum_moves_from_easy_to_hard() -> None:
    rates = np.linspace(0, 1, 2001)
    config = CurriculumConfig(start=0.7, end=0.1, width=0.1)
    made = Curriculum(rates.tolist(), config, batch=50, steps=30, seed=1)
    assert rates[made.kept].max() < 0.75 <= rates[made.kept.max() + 1]
    order = [made[i] for i in range(1500)]
    assert len(set(order)) == len(made.kept) == 1500  # each once, before any comes again
    means = [rates[order[i : i + 50]].mean() for i in range(0, 1000, 50)]
    assert means[0] > 0.6 and all(a > b - 0.02 for a, b in pairwise(means))
    found = rates[order[:50]]
    assert abs(found.std() - 0.07) < 0.03  # a Gaussian that 0.75 cuts off
    for number in range(30):
        assert made.quotas(number).sum() == 50
    later = Curriculum(rates.tolist(), config, batch=50, steps=30, seed=1)
    assert [later[i] for i in (1400, 3)] == [order[1400], order[3]]
    assert [made[i] for i in range(1500, 1600)] != order[:100]
    far = Curriculum([0.0] * 5, CurriculumConfig(width=0.001), batch=4, steps=2, seed=0)
    assert sorted(far[i] for i in range(5)) == [0, 1, 2, 3, 4]


def test_a_curriculum_orders_rows_by_their_rates(tmp_path: Path) -> None:
    made = [{"prompt": f"p{i}", "pass_rate": i / 100} for i in range(100)]
    path = rows(tmp_path, "a.jsonl", made)
    config = ProblemsConfig(curriculum=CurriculumConfig())
    found = problems({"path": path}, config=config, batch=5, steps=15)
    order = [found[i].row["pass_rate"] for i in range(75)]
    assert sorted(order) == [i / 100 for i in range(75)]
    assert np.mean(order[:15]) > np.mean(order[30:45]) > np.mean(order[60:])
    bare = rows(tmp_path, "b.jsonl", [{"prompt": "p"}])
    for source, said in (
        ({"path": bare}, 'b.jsonl: line 1: "pass_rate" is None'),
        ({"path": "generator:sums"}, "have no pass rate"),
    ):
        with pytest.raises(BevatronError, match=said):
            problems(source, config=config)
    with pytest.raises(BevatronError, match="no problem has a pass rate"):
        Curriculum([0.9], CurriculumConfig(), batch=1, steps=1, seed=0)
