"""Losses and gradients that cannot be used: nothing of them reaches the weights, on any rank."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from bevatron.checkpoint.manifest import read_manifest
from bevatron.checkpoint.save_and_load import box_reader
from bevatron.errors import BevatronError
from bevatron.train.bad_steps import Guard
from bevatron.train.config import SafetyConfig
from bevatron.train.config_file import load_config
from tests.processes import Pool
from tests.train import small_run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return small_run.make(tmp_path)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    manifest = read_manifest(folder)
    read = box_reader(folder, manifest, "")
    return {n: read(n, (0,) * len(t.shape), t.shape) for n, t in manifest.tensors.items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def test_nan_on_one_rank_stops_all_before_the_update(pool: Pool, config: Path) -> None:
    ends = pool.run(2, small_run.train, config, [], ("nan loss", 1, 4))
    assert ends[0] == ends[1]
    assert ends[0].startswith("step 4: loss nan") and "step-00000002" in ends[0]
    run = config.parent / "run"
    assert small_run.events(run) == [(4, "stopped")]
    assert [step for step, *_ in small_run.losses(run)] == [1, 2, 3]
    assert small_run.lines(run)[-1]["loss"] is None, "metrics.jsonl is JSON, which has no NaN"
    assert (run / "latest").read_text() == "step-00000002\n"


def test_a_skipped_step_leaves_weights_and_moments_as_they_were(pool: Pool, config: Path) -> None:
    """Bit for bit as if the update had not been there; also when the run was interrupted since."""
    skip, trouble = ["safety.on_nonfinite=skip", "train.steps=6"], ("inf gradient", 0, 3)
    assert pool.run(1, small_run.train, config, skip, trouble) == ["done"]
    run = config.parent / "run"
    assert small_run.events(run) == [(3, "skipped")]
    expected = pool.run(1, small_run.stepped, config, [0, 1, 3, 4, 5])[0]
    assert_equal(saved(run / "step-00000006"), expected)
    parts = [*skip, f"run.dir={config.parent}/parts"]
    for steps in ("train.steps=4", "train.steps=6"):
        assert pool.run(1, small_run.train, config, [*parts, steps], trouble) == ["done"]
    assert_equal(saved(config.parent / "parts" / "step-00000006"), expected)


def test_a_spike_is_judged_alike_on_all_ranks_and_after_a_resume(pool: Pool, config: Path) -> None:
    policy = ["safety.on_spike=skip", "safety.spike_window=8", "train.steps=7"]
    trouble = ("spike", 1, 6)
    assert pool.run(2, small_run.train, config, policy, trouble) == ["done", "done"]
    run = config.parent / "run"
    assert small_run.events(run) == [(6, "skipped")]
    assert "gradient norm" in small_run.lines(run)[5]["reason"]
    parts = [*policy, f"run.dir={config.parent}/parts"]
    for steps in ("train.steps=5", "train.steps=7"):
        pool.run(2, small_run.train, config, [*parts, steps], trouble)
    assert small_run.lines(config.parent / "parts")[5] == small_run.lines(run)[5]
    assert small_run.losses(config.parent / "parts") == small_run.losses(run)


def test_a_rewind_goes_back_to_the_saved_step_and_past_the_data(pool: Pool, config: Path) -> None:
    """Saved at 4, bad at 6: the weights of 4 go on with the batch of step 7; so does a resume."""
    rewind, trouble = ["safety.on_nonfinite=rewind", "checkpoint.every=4"], ("nan loss", 0, 6)
    assert pool.run(1, small_run.train, config, rewind, trouble) == ["done"]
    run = config.parent / "run"
    assert [step for step, *_ in small_run.losses(run)] == [1, 2, 3, 4, 7, 8]
    assert small_run.events(run) == [(6, "rewound")]
    state = json.loads((run / "step-00000006" / "train_state.json").read_text())
    assert state["guard"]["rewound"] == [[5, 6]]
    assert state["tokens"] == 6 * 8 * 16, "the data is used up"
    expected = pool.run(1, small_run.stepped, config, [0, 1, 2, 3, 6, 7])[0]
    assert_equal(saved(run / "step-00000008"), expected)


def test_without_a_saved_step_a_rewind_stops(pool: Pool, config: Path) -> None:
    rewind = ["safety.on_nonfinite=rewind", "checkpoint.every=4"]
    ends = pool.run(2, small_run.train, config, rewind, ("nan loss", 1, 2))
    assert ends[0] == ends[1] and "no saved step" in ends[0]


def test_rewind_needs_saved_steps(config: Path) -> None:
    with pytest.raises(BevatronError, match=r"checkpoint\.every"):
        load_config(config, ["safety.on_spike=rewind", "checkpoint.every=0"])


def decisions(guard: Guard, values: list[tuple[float, float]]) -> list[str]:
    return [guard.decide(i + 1, *v).action for i, v in enumerate(values)]


def test_a_spike_is_one_only_beside_half_a_window() -> None:
    safety = SafetyConfig(on_spike="skip", spike_window=4)
    calm = [(2.0, 1.0), (2.1, 1.1)]
    assert decisions(Guard(safety), [(2.0, 1.0), (90.0, 1.0)]) == ["apply", "apply"]
    assert decisions(Guard(safety), [*calm, (90.0, 1.0)])[-1] == "skip"
    assert decisions(Guard(safety), [*calm, (2.0, 90.0)])[-1] == "skip"
    assert decisions(Guard(safety), [*calm, (0.1, 0.1)])[-1] == "apply", "lower is no spike"
    assert decisions(Guard(SafetyConfig()), [*calm, (90.0, 90.0)])[-1] == "apply"


def test_equal_losses_make_no_spike_of_a_little_more() -> None:
    guard = Guard(SafetyConfig(on_spike="stop", spike_window=4))
    assert decisions(guard, [(2.0, 1.0)] * 4 + [(2.1, 1.05)])[-1] == "apply"


def test_a_skipped_value_does_not_widen_the_window() -> None:
    guard = Guard(SafetyConfig(on_spike="skip", spike_window=8))
    ends = decisions(guard, [(2.0, 1.0), (2.1, 1.0)] * 2 + [(90.0, 1.0)] * 3)
    assert ends[-3:] == ["skip"] * 3


def test_too_many_skips_stop_and_old_ones_are_forgotten() -> None:
    nan = (math.nan, 1.0)
    safety = SafetyConfig(on_nonfinite="skip", max_skips=2, spike_window=6)
    assert decisions(Guard(safety), [nan] * 3) == ["skip", "skip", "stop"]
    guard = Guard(safety)
    assert decisions(guard, ([nan] + [(2.0, 1.0)] * 3) * 4).count("skip") == 4
    assert guard.updates(16) == 12


def test_too_many_rewinds_stop() -> None:
    guard = Guard(SafetyConfig(on_nonfinite="rewind", max_rewinds=1))
    assert guard.decide(5, 2.0, math.inf).action == "rewind"
    guard.rewound.append((3, 5))
    assert guard.decide(9, math.inf, 1.0).action == "stop"
    assert guard.updates(9) == 6
