"""Reward models learn from preferences and from scores, at any layout; exports score alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from bevatron.errors import BevatronError
from bevatron.train.launch import prepared
from tests.align.preference_data import PAIRS, lines, objective, pairs, write
from tests.processes import Pool
from tests.train.tiny_run import prepare, train

SCORES = "data={train: [{path: scored.jsonl}], validation: [{path: scored.jsonl}], seq_len: 24}"
KEYS = ("loss", "grad_norm", "accuracy", "margin", "min_reward", "mean_reward", "max_reward")
KEYS += ("dropped",)
VALIDATED = tuple(f"val_{key}" for key in KEYS if key != "grad_norm")
OURS = objective("reward", center_rewards_coefficient=0.05)
SHORT = ("optimizer.lr=3.0e-3", "checkpoint.every=2", "train.steps=4")
ATTRIBUTES = ["helpfulness", "verbosity"]


def scored() -> list[dict[str, Any]]:
    """In the shape of HelpSteer's rows."""
    return [
        {"prompt": "Say a.", "response": "a " * n, "helpfulness": n % 5, "verbosity": n}
        for n in range(1, 7)
    ] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare(tmp_path_factory.mktemp("reward") / "runs")
    rows: list[dict[str, Any]] = [{**row, "margin": 0.25} for row in pairs()]
    rows[3]["rejected"] = "x" * 40  # longer than a sequence
    write(folder / "pairs.jsonl", rows)
    write(folder / "scored.jsonl", scored())
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path, pool: Pool) -> list[dict[str, Any]]:
    more = ("run.dir=alone", "checkpoint.export=hf")
    pool.run(1, train, folder, OURS, PAIRS, *SHORT, *more)
    return lines(folder / "alone", *KEYS)


@pytest.fixture(scope="module")
def of_attributes(folder: Path, pool: Pool) -> Path:
    """The export of a run on scores."""
    ours = objective("reward", attributes=ATTRIBUTES)
    pool.run(1, train, folder, ours, SCORES, *SHORT, "run.dir=scored", "checkpoint.export=hf-s")
    return folder / "hf-s"


def scores_of(folder: Path, texts: list[str]) -> torch.Tensor:
    """By the class of transformers that config.json names: [texts, labels]."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("</s>")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    found = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([[*tokenizer.encode(text).ids, end]])
            padded = torch.nn.functional.pad(ids, (0, 3), value=model.config.pad_token_id)
            found.append(model(padded).logits[0])
    return torch.stack(found)


def test_scores_are_those_of_the_export_in_transformers(
    folder: Path, alone: list[dict[str, Any]]
) -> None:
    kept = [row for i, row in enumerate(pairs()) if i != 3]
    chosen, rejected = (
        scores_of(folder / "hf", [row["prompt"] + row[name] for row in kept])[:, 0]
        for name in ("chosen", "rejected")
    )
    both = torch.cat((chosen, rejected))
    found = lines(folder / "alone", *VALIDATED)[-1]
    wanted = {"accuracy": (chosen > rejected).float().mean(), "margin": (chosen - rejected).mean()}
    wanted |= {"min_reward": both.min(), "mean_reward": both.mean(), "max_reward": both.max()}
    for name, value in wanted.items():
        assert found[f"val_{name}"] == pytest.approx(float(value), abs=2e-6), name
    assert found["val_dropped"] == pytest.approx(1 / len(pairs()))
    config = transformers.AutoConfig.from_pretrained(folder / "hf")
    assert config.architectures == ["LlamaForSequenceClassification"]
    assert config.id2label == {0: "reward"} and config.pad_token_id is not None


def test_another_layout_and_a_restart_change_nothing(
    folder: Path, alone: list[dict[str, Any]], pool: Pool
) -> None:
    other = (OURS, PAIRS, *SHORT[:2], "train.micro_batch=1", "run.dir=other")
    pool.run(4, train, folder, *other, "train.steps=2", "parallel={tp: 2, pp: 2}")
    pool.run(2, train, folder, *other, "train.steps=4", "parallel={cp: 2}")
    for ours, theirs in zip(lines(folder / "other", *KEYS), alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5 if ours["step"] <= 1 else 1e-4, abs=2e-5)


def test_attributes_are_learned_as_transformers_learns_numbers(
    folder: Path, of_attributes: Path
) -> None:
    rows = scored()
    found = scores_of(of_attributes, [row["prompt"] + row["response"] for row in rows])
    wanted = torch.tensor([[float(row[name]) for name in ATTRIBUTES] for row in rows])
    errors = (found - wanted).square().mean(0)
    names = ["val_loss", *(f"val_mse/{name}" for name in ATTRIBUTES)]
    last = lines(folder / "scored", *names)[-1]
    assert last["val_loss"] == pytest.approx(float(errors.mean()), rel=1e-5)
    for name, error in zip(ATTRIBUTES, errors, strict=True):
        assert last[f"val_mse/{name}"] == pytest.approx(float(error), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([SCORES], r'scored\.jsonl: line 1: has no "chosen"'),
        ([SCORES, "objective.attributes=[a]"], r'line 1: "a" is None, expected a finite number'),
        ([PAIRS, "objective.attributes=[margin]"], 'has neither "messages" nor "prompt" with'),
        (["data.seq_len=2"], "too short for each of the first 30 rows, whose longest sequence has"),
        (["objective.attributes=[a, a]"], "has a name twice"),
        (["objective.attributes=[a]", "objective.center_rewards_coefficient=1.0"], "for pairs of"),
        (["model={init: hf-s}", PAIRS], "attributes: missing; the model's head has 2 scores"),
        (["model={init: hf}", SCORES, "objective.attributes=[a]"], "objective.new_head: true"),
        (["model={spec: nanochat-d20}", PAIRS], "transformers has no class for a nanochat model"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(
    folder: Path,
    alone: list[dict[str, Any]],
    of_attributes: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(BevatronError, match=words):
        prepared(Path("run.yaml"), ["objective={name: reward}", PAIRS, *overrides], 1)
