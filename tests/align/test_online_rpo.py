"""RPO of the model's own answers: it learns what is rewarded, as far as the rewards say and no
further, and is the same at every layout and after a restart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bevatron.errors import BevatronError
from bevatron.train.config_file import load_config
from tests.align.rl_run import lines, prepare_rl
from tests.processes import Pool
from tests.train.tiny_run import train

OWN = """objective={name: online_rpo, loss: rpo_sqloo, beta: 0.5, num_generations: 4,
  max_completion_length: 4, rewards: [{name: python, path: reward.py, function: even}]}"""
OURS = (OWN, "train.global_batch=4", "data.validation=[{path: problems.jsonl}]")
SHORT = (*OURS, "train.steps=4", "optimizer.lr=5.0e-3", "train.val_every=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_rl(tmp_path_factory.mktemp("online") / "run")


@pytest.fixture(scope="module")
def alone(folder: Path, pool: Pool) -> list[dict[str, Any]]:
    pool.run(1, train, folder, *SHORT, "run.dir=alone")
    return lines(folder / "alone")


def test_it_learns_what_is_rewarded(folder: Path, pool: Pool) -> None:
    more = ("train.steps=25", "checkpoint.every=0", "train.val_every=0", "objective.eta=8.0")
    pool.run(1, train, folder, *OURS, *more, "run.dir=learns")
    found = lines(folder / "learns")
    rewards = [line["reward"] for line in found]
    assert np.mean(rewards[:3]) < 0.6 and np.mean(rewards[-3:]) > 0.75, rewards
    # Nothing of the given margins is left over at the reference, where the loss is their size.
    assert found[0]["rewards/margins"] == 0 < found[0]["rewards/given_margins"]
    assert all(line["dropped"] == 0 for line in found)


@pytest.mark.parametrize(
    ("ranks", "layout", "engine"),
    [(4, "{tp: 2, pp: 2}", "{tp: 1, replicas: 3}"), (2, "{cp: 2}", "{pp: 2}")],
)
def test_it_is_the_same_at_every_layout_and_after_a_restart(
    folder: Path, pool: Pool, alone: list[dict[str, Any]], ranks: int, layout: str, engine: str
) -> None:
    name = "-".join(re.findall(r"\w+", layout))
    for steps in (2, 4):
        more = (f"parallel={layout}", f"objective.engine={engine}", f"run.dir={name}")
        pool.run(ranks, train, folder, *SHORT, *more, f"train.steps={steps}")
    found = lines(folder / name)
    assert len(found) == len(alone) == 7, "four steps and three validations"
    for got, wanted in zip(found, alone, strict=True):
        keep = [key for key in wanted if not key.startswith("sampling/")]
        assert {k: got[k] for k in keep} == pytest.approx(
            {k: wanted[k] for k in keep}, rel=1e-3, abs=2e-5
        )


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("objective.loss=rpo_sq", "rpo_sq compares two answers, and num_generations is 4"),
        ("objective.importance_sampling_clip_max=3.0", "means nothing to online_rpo"),
        ("objective.num_generations=1", "objective.num_generations"),
        ("objective.responses=3", "responses means nothing to online_rpo, only to rpo"),
    ],
)
def test_settings_that_mean_nothing_are_refused(folder: Path, keys: str, says: str) -> None:
    with pytest.raises(BevatronError, match=says):
        load_config(folder / "run.yaml", [*OURS, keys])
