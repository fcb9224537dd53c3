"""Reinforcement learning learns what is rewarded, at every layout in the same way, and a killed run
goes on bit for bit, also in the middle of a batch of rollouts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from safetensors.numpy import load_file

from bevatron.align.rollout_kind import PolicyKind
from bevatron.align.rollouts import Sequences
from bevatron.checkpoint.run_folder import RunFolder, step_of
from bevatron.errors import CheckFailed
from bevatron.generate.live_engine import LiveEngine
from bevatron.train.report import report
from tests.align.rl_run import lines, prepare_rl
from tests.commands import Command
from tests.processes import Pool
from tests.train.tiny_run import train

# Each batch of rollouts serves four updates: its two halves, twice.
SEVERAL = ("objective.steps_per_generation=2", "objective.num_iterations=2", "train.steps=6")
SEVERAL += (
    "optimizer.lr=5.0e-3",
    "checkpoint={every: 1, keep: 999}",
    "objective.loss=grpo",
    "objective.beta=0.05",
)


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
    assert np.mean(rewards[:3]) < 0.6 and np.mean(rewards[-3:]) > 0.85, rewards


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


# The first half at one layout of the run and of the engine, the second, from the middle of a batch
# of rollouts, at others.
TP_PP = (4, "{tp: 2, pp: 2}", "{tp: 1, replicas: 3, max_batch: 2}")
CP_DP = (4, "{cp: 2, dp_shard: 2}", "{tp: 2, pp: 2}")
DP = (2, "{dp_shard: 2}", "{pp: 2}")


@pytest.mark.parametrize(("first", "then"), [(TP_PP, CP_DP), (CP_DP, TP_PP), (DP, DP)])
def test_it_is_the_same_at_every_layout_and_after_a_restart(
    folder: Path, pool: Pool, alone: list[dict[str, Any]], first: Any, then: Any
) -> None:
    name = "-".join(re.findall(r"\w+", f"{first[1]} {then[1]}"))
    for steps, (ranks, layout, engine) in ((3, first), (6, then)):
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
    for step in (1, 5):
        same = [[line["answer"] for line in rollouts(folder / x, step)] for x in (name, "alone")]
        assert same[0] == same[1]


def test_engine_and_trainer_are_compared_and_a_run_that_differs_stops(
    folder: Path, pool: Pool
) -> None:
    """In bf16 they differ, which weights correct; with other weights in the engine the run ends."""
    bf16 = ("train.precision=bf16", "train.steps=2", "checkpoint.every=0", "data.seq_len=64")
    bf16 += ("objective.max_completion_length=40",)
    pool.run(1, train, folder, *bf16, "run.dir=bf16", "objective.temperature=0.5")
    for line in lines(folder / "bf16"):
        ratio, apart = "sampling/importance_sampling_ratio", "sampling/sampling_logp_difference"
        assert 1e-5 < line[f"{apart}/mean"] < 0.1 and line[f"{apart}/max"] < 0.5
        assert line[f"{ratio}/min"] < 1 < line[f"{ratio}/max"] < 2
        assert 0 < line["sampling/kl"] < 0.01
    said = pool.run(2, stale_engine, folder)
    assert said[0] == said[1]
    assert "step 2: the engine's and the trainer's log-probabilities" in said[0]
    assert "more than objective.max_logp_difference 0.001" in said[0]


def stale_engine(folder: Path) -> str:
    """What a run says whose engine never gets new weights, in a process of the pool."""
    first, refresh = [True], LiveEngine.refresh

    def once(engine: LiveEngine) -> None:
        if first.pop() if first else False:
            refresh(engine)

    with patch.object(LiveEngine, "refresh", once), pytest.raises(CheckFailed) as caught:
        train(folder, "run.dir=stale", "objective.max_logp_difference=1e-3", "train.steps=3")
    return str(caught.value)


# Of runs whose batches serve one update: whether log-probabilities are needed before it, and keys.
SETTINGS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "gspo": (False, ("objective.importance_sampling_mode=sequence_truncate",)),
    "dapo": (False, ("objective.importance_sampling_clip_max=1.05", "objective.beta=0.1")),
    "grpo": (
        False,
        (
            "objective.importance_sampling_mode=sequence_mask",
            "objective.importance_sampling_clip_max=1.1",
        ),
    ),
    "rloo": (True, ("objective.beta=0.1",)),
}


def one_update(folder: Path, name: str, forced: bool, *more: str) -> None:
    """Short runs with an engine whose log-probabilities are wrong by up to 0.2, in a process of the
    pool. `forced`: old log-probabilities come from a forward of their own."""
    of, needs = Sequences.of, PolicyKind.answered_by_update.fget  # type: ignore[attr-defined]

    def wrong(rollouts: Any, seq_len: int) -> Sequences:
        made = of(rollouts, seq_len)
        size = np.arange(made.sampled.size, dtype=np.float32).reshape(made.sampled.shape)
        return made._replace(sampled=made.sampled + 0.2 * np.sin(size) * made.mask)

    own = property(lambda kind: not forced and needs(kind))
    for loss, (_, given) in SETTINGS.items():
        keys = (*given, f"objective.loss={loss}", f"run.dir={name}-{loss}", "train.steps=2", *more)
        with (
            patch.object(Sequences, "of", wrong),
            patch.object(PolicyKind, "answered_by_update", own),
        ):
            train(folder, *keys)


@pytest.mark.parametrize("layout", ["{}", "{cp: 2, dp_shard: 2}", "{tp: 2, pp: 2}"])
def test_the_only_update_of_a_batch_has_old_log_probabilities_of_its_own(
    folder: Path, pool: Pool, layout: str
) -> None:
    """The same losses, gradients, comparisons with the engine, and weights as with a forward."""
    ranks = 1 if layout == "{}" else 4
    names = [f"{how}-{'-'.join(re.findall('[a-z]+', layout))}" for how in ("own", "forced")]
    for name in names:
        forced = name.startswith("forced")
        pool.run(ranks, one_update, folder, name, forced, f"parallel={layout}")
    for loss, (needed, _) in SETTINGS.items():
        own, apart = (folder / f"{name}-{loss}" for name in names)
        text = [(run / "metrics.jsonl").read_text("utf-8") for run in (own, apart)]
        assert ["time/logps_s" in x for x in text] == [needed, True]
        for got, wanted in zip(lines(own), lines(apart), strict=True):
            assert 0.05 < wanted["sampling/sampling_logp_difference/mean"] < 0.2
            assert wanted["sampling/importance_sampling_ratio/min"] < 0.9
            assert got == pytest.approx(wanted, rel=1e-4, abs=1e-6), loss
        files = sorted((apart / "step-00000002").rglob("*.safetensors"))
        assert files
        for file in files:
            mine = load_file(own / file.relative_to(apart))
            for key, array in load_file(file).items():
                np.testing.assert_allclose(mine[key], array, rtol=1e-4, atol=1e-6, err_msg=key)


def test_an_adapter_learns_with_its_base_as_the_reference(folder: Path, pool: Pool) -> None:
    """The engine answers with the adapter merged in, the reference is the adapter switched off."""
    pool.run(1, train, folder, "run.dir=base", "train.steps=1", "checkpoint.every=0")
    more = ("model={init: base}", "adapter={kind: lora, rank: 4, alpha: 8, targets: [qkv, down]}")
    more += ("objective.beta=0.1", "train.steps=3", "run.dir=lora", "parallel={tp: 2}")
    pool.run(2, train, folder, *more)
    first, *later = lines(folder / "lora")
    assert first["kl"] == 0 and all(line["kl"] > 0 for line in later)
    assert all(line["sampling/sampling_logp_difference/max"] <= 1e-5 for line in later)


def test_groups_that_teach_nothing_are_replaced(folder: Path, pool: Pool) -> None:
    """Rewards that are all equal for half of the problems: other problems come in their place."""
    (folder / "half.py").write_text(
        "def half(prompts, completions, completion_ids, **columns):\n"
        "    flat = [p[-1] in 'abcd' for p in prompts]\n"
        "    return [0.5 if f else c[0] % 2 for f, c in zip(flat, completion_ids)]\n"
    )
    more = ("objective.rewards=[{name: python, path: half.py, function: half}]", "train.steps=2")
    for name, tries in (("plain", 0), ("dynamic", 6)):
        pool.run(1, train, folder, *more, f"run.dir={name}", f"objective.dynamic_sampling={tries}")
    zero = {n: [x["frac_reward_zero_std"] for x in lines(folder / n)] for n in ("plain", "dynamic")}
    assert max(zero["plain"]) > 0 and zero["dynamic"] == [0.0, 0.0]
    asked = [x["problem"] for step in (1, 2) for x in rollouts(folder / "dynamic", step)]
    assert asked == sorted(asked) and len(set(asked)) == 4 and asked[-1] > 3
    state = json.loads((folder / "dynamic/step-00000002/train_state.json").read_text("utf-8"))
    assert state["feed"]["problems"] > asked[-1], "where the next batch goes on"


def test_what_was_cut_off_may_teach_nothing(folder: Path, pool: Pool) -> None:
    """Nearly all answers of this model are cut off, so nothing is learned."""
    more = ("objective.mask_truncated_completions=true", "train.steps=1", "run.dir=cut")
    pool.run(1, train, folder, *more)
    (line,) = lines(folder / "cut")
    ended = [x["finished"] for x in rollouts(folder / "cut", 1)]
    assert line["completions/clipped_ratio"] == 1 - sum(ended) / len(ended) == 1
    assert line["grad_norm"] == 0 and line["reward_std"] > 0


def test_held_out_problems_are_answered_greedily_and_by_drawing(folder: Path, pool: Pool) -> None:
    held = ("data.validation=[{path: problems.jsonl}]", "train.val_every=8", "train.steps=8")
    held += ("objective.num_generations_eval=4", "objective.solved_at=0.7", "checkpoint.every=0")
    pool.run(2, train, folder, *held, "run.dir=held", "parallel={dp_shard: 2}")
    found = [line for line in lines(folder / "held") if "val_loss" in line]
    assert [line["step"] for line in found] == [0, 8]
    for line in found:
        assert line["val_loss"] == -line["val_reward"]
        assert 0 <= line["val_pass@2"] <= line["val_pass@4"] <= 1
        assert line["val_pass@1"] * 8 == pytest.approx(round(line["val_pass@1"] * 8))
    assert found[0] != found[1] | {"step": 0}, "the weights have moved, and the engine's too"


def test_a_report_shows_rewards_and_rollouts(folder: Path, alone: Any) -> None:
    (folder / "alone/rollouts/step-00000009.jsonl").write_text(
        json.dumps({"prompt": "<b>", "answer": "<script>alert(1)</script>", "reward": 1.0})
        + "\nno json\n"
    )
    html = report([folder / "alone"]).read_text(encoding="utf-8")  # type: ignore[union-attr]
    for title in ("Reward", "Length of answers", "Engine against trainer", "Rollouts"):
        assert title in html
    assert "&lt;script&gt;alert(1)" in html and "<script>alert" not in html
