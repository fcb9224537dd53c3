"""A reward model scores a run's answers on the run's ranks, as transformers would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from bevatron.errors import BevatronError
from bevatron.train.dry_run import make_plan
from bevatron.train.launch import prepared
from bevatron.train.run_start import find_start
from tests.align.rl_run import lines, prepare_rl
from tests.processes import Pool
from tests.train.tiny_run import train

PAD = 2
ONE = "{name: reward_model, path: judge}"
SEVERAL = "{name: reward_model, path: several, weight: 0.5, attributes: {good: 2.0, long: -1.0}}"
REWARDS = f"objective.rewards=[{ONE}, {{name: python, path: reward.py, function: even}}, {SEVERAL}]"
SHORT = (REWARDS, "train.steps=2", "checkpoint.every=0", "optimizer.lr=5.0e-3")


def judge(folder: Path, tokenizer: Path, labels: list[str]) -> None:
    """A random classifier with large scores, as transformers saves it."""
    torch.manual_seed(len(labels))
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=PAD,
        id2label=dict(enumerate(labels)), label2id={x: i for i, x in enumerate(labels)},
        initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare_rl(tmp_path_factory.mktemp("judged") / "run")
    judge(folder / "judge", folder / "tokenizer", ["LABEL_0"])
    judge(folder / "several", folder / "tokenizer", ["good", "bad", "long"])
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path, pool: Pool) -> list[dict[str, Any]]:
    pool.run(1, train, folder, *SHORT, "run.dir=alone")
    return lines(folder / "alone")


def rollouts(run: Path) -> list[dict[str, Any]]:
    files = sorted((run / "rollouts").iterdir())
    return [json.loads(x) for file in files for x in file.read_text("utf-8").splitlines()]


def test_scores_are_those_of_transformers(folder: Path, alone: list[dict[str, Any]]) -> None:
    assert "rewards/reward_model/mean" in alone[0]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
    models = [
        transformers.AutoModelForSequenceClassification.from_pretrained(folder / name).eval()
        for name in ("judge", "several")
    ]
    made = rollouts(folder / "alone")
    assert len({line["rewards"]["reward_model"] for line in made}) > 8
    for line in made:
        ids = torch.tensor([[*tokenizer.encode(line["prompt"] + line["answer"]).ids, 2, PAD, PAD]])
        with torch.no_grad():
            one, several = (model(ids).logits[0].double() for model in models)
        assert line["rewards"]["reward_model"] == pytest.approx(float(one[0]), abs=1e-5)
        weighed = float(2 * several[0] - several[2])
        assert line["rewards"]["reward_model_2"] == pytest.approx(weighed, abs=1e-5)
        total = sum(line["rewards"][k] for k in ("reward_model", "even")) + 0.5 * weighed
        assert line["reward"] == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("layout", ["{tp: 2, pp: 2}", "{dp_shard: 2, cp: 2}"])
def test_every_layout_scores_alike(
    folder: Path, pool: Pool, alone: list[dict[str, Any]], layout: str
) -> None:
    name = "".join(c for c in layout if c.isalnum())
    pool.run(4, train, folder, *SHORT, f"run.dir={name}", f"parallel={layout}")
    before, after = rollouts(folder / "alone"), rollouts(folder / name)
    for ours, theirs in zip(after[:8], before[:8], strict=True):
        assert ours["answer"] == theirs["answer"]
        assert ours["rewards"] == pytest.approx(theirs["rewards"], abs=2e-5)
    found, wanted = lines(folder / name)[0], alone[0]
    for key in ("reward", "reward_std", "rewards/reward_model/mean", "loss", "grad_norm"):
        assert found[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-5), key


def test_online_rpo_takes_one_as_well(folder: Path, pool: Pool) -> None:
    keys = f"num_generations: 2, max_completion_length: 4, rewards: [{ONE}]"
    ours = f"objective={{name: online_rpo, {keys}}}"
    pool.run(2, train, folder, ours, *SHORT[1:], "run.dir=online", "parallel={tp: 2}")
    found, made = lines(folder / "online")[0], rollouts(folder / "online")[:16]
    mean = sum(line["rewards"]["reward_model"] for line in made) / len(made)
    assert found["rewards/reward_model/mean"] == pytest.approx(mean, abs=1e-6)


def test_its_memory_is_in_the_dry_run_and_others_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    plain = ["objective.rewards=[{name: python, path: reward.py, function: even}]"]
    peaks = []
    for overrides in (plain, [REWARDS]):
        config, layout = prepared(Path("run.yaml"), ["run.dir=none", *overrides], 1)
        objective = config.objective.make(find_start(config).spec, config)
        peaks.append(make_plan(config, layout, objective, []).stages[0].weights)
    judges = [transformers.AutoModelForSequenceClassification.from_pretrained(n)
              for n in ("judge", "several")]  # fmt: skip
    more = sum(p.numel() * 4 for judge in judges for p in judge.parameters())
    assert peaks[1] - peaks[0] == more
    for reward, words in (
        ("{name: reward_model, path: nowhere/at/all}", "objective.rewards.0: .*nowhere/at/all"),
        ("{name: reward_model, path: several}", "has the scores good, bad, long, and attributes"),
        ("{name: reward_model, path: several, attributes: {nice: 1.0}}", "it has no nice"),
    ):
        with pytest.raises(BevatronError, match=words):
            prepared(Path("run.yaml"), ["run.dir=none", f"objective.rewards=[{reward}]"], 1)
