"""Reinforcement learning learns what is rewarded, at every layout in the same way, and a killed run
goes on bit for bit, also in the middle of a batch of rollouts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from bevatron.checkpoint.run_folder import RunFolder, step_of
from tests.align.rl_run import lines, prepare_rl
from tests.commands import Command
from tests.processes import Pool
from tests.train.tiny_run import train

# Each batch of rollouts serves four updates: its two halves, twice.
SEVERAL = ("objective.steps_per_generation=2", "objective.num_iterations=2", "train.steps=6")
SEVERAL += ("optimizer.lr=5.0e-3", "checkpoint={every: 1, keep: 999}", "objective.loss=grpo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_rl(tmp_path_factory.mktemp("rl") / "run")


@pytest.fixture(scope="module")
def alone(folder: Path, pool: Pool) -> list[dict[str, Any]]:
    """The run in one process."""
    pool.run(1, train, folder, *SEVERAL, "run.dir=alone")
    return lines(folder / "alone")


def rollouts(run: Path, step: int) -> list[dict[str, Any]]:
    text = (run / "rollouts" / f"step-{step:08d}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_it_learns_what_is_rewarded(folder: Path, pool: Pool) -> None:
    pool.run(1, train, folder, "run.dir=learns", "train.steps=30", "checkpoint.every=0")
    found = lines(folder / "learns")
    rewards = [line["reward"] for line in found]
    assert np.mean(rewards[:3]) < 0.6 and np.mean(rewards[-3:]) > 0.9, rewards


def test_a_batch_of_rollouts_serves_several_updates(
    folder: Path, alone: list[dict[str, Any]]
) -> None:
    assert [line["step"] for line in alone if "reward" in line] == [1, 5]
    assert sorted(p.name for p in (folder / "alone/rollouts").iterdir()) == [
        "step-00000001.jsonl",
        "step-00000005.jsonl",
    ]
    made = rollouts(folder / "alone", 1)
    assert len(made) == 16 and len({line["problem"] for line in made}) == 4
    for line in made:
        assert line["reward"] == line["rewards"]["even"] and 0 <= line["reward"] <= 1
    # The first update is the policy's own; later ones have moved away from what it was.
    assert alone[0]["clip_ratio/region_mean"] == 0 < alone[3]["clip_ratio/region_mean"]


def test_old_log_probabilities_are_of_the_weights_that_answered(folder: Path, alone: Any) -> None:
    """Not of the weights since then: the fault that makes every ratio 1."""
    first, *later = (load_file(folder / f"alone/step-0000000{n}/feed.safetensors") for n in (1, 2))
    assert all(np.array_equal(first["old"], other["old"]) for other in later)
    assert not (folder / "alone/step-00000004/feed.safetensors").exists(), "they are used up"
    spread = [line["entropy"] for line in alone[:4]]
    assert len(set(spread)) == 4, "or the weights did not move"


def test_a_run_that_is_killed_between_two_updates_goes_on_bit_for_bit(
    folder: Path, pool: Pool, alone: list[dict[str, Any]]
) -> None:
    """By SIGKILL, with rollouts that are not used up; they are not made anew."""
    run = folder / "killed"
    command = Command(folder, "train", "run.yaml", *SEVERAL, f"run.dir={run}", "train.steps=500")
    assert command.wait_until((run / "step-00000002/manifest.json").is_file)
    command.kill()
    assert command.wait() == -9
    newest = RunFolder(run).newest()
    assert newest is not None
    made = sorted(p.name for p in (run / "rollouts").iterdir())
    for step in range(4, step_of(newest) + 1):  # it was quick: back into the first batch
        shutil.rmtree(run / f"step-{step:08d}")
    pool.run(1, train, folder, *SEVERAL, f"run.dir={run}")
    assert lines(run) == alone
    starts = (run / "starts.jsonl").read_text("utf-8").splitlines()
    assert 1 <= json.loads(starts[1])["step"] <= 3, "in the middle of a batch of rollouts"
    assert {"step-00000001.jsonl"} <= set(made)


@pytest.mark.parametrize(
    ("ranks", "layout", "engine"),
    [
        (4, "{tp: 2, pp: 2}", "{tp: 1, replicas: 3, max_batch: 2}"),
        (4, "{cp: 2, dp_shard: 2}", "{tp: 2, pp: 2}"),
        (2, "{dp_shard: 2}", "{pp: 2}"),
    ],
)
def test_it_is_the_same_at_every_layout_and_after_a_restart(
    folder: Path, pool: Pool, alone: list[dict[str, Any]], ranks: int, layout: str, engine: str
) -> None:
    name = "-".join(re.findall(r"\w+", layout))
    for steps in (3, 6):
        more = (f"parallel={layout}", f"objective.engine={engine}", f"run.dir={name}")
        pool.run(ranks, train, folder, *SEVERAL, *more, f"train.steps={steps}")
    found = lines(folder / name)
    for got, wanted in zip(found, alone, strict=True):
        mismatch = got.pop("sampling/sampling_logp_difference/max", 0.0)
        assert mismatch <= 1e-5, "the engine and the trainer compute the same in fp32"
        for line in (got, wanted):
            for key in [k for k in line if k.startswith("sampling/")]:
                del line[key]
        assert got == pytest.approx(wanted, rel=1e-3, abs=1e-5)
