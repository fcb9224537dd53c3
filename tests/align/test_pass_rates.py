"""`bevatron pass-rates` measures how often a model solves a run's problems, and its rows make a
curriculum."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bevatron.align.pass_rates import pass_rates
from bevatron.align.problem_config import CurriculumConfig, ProblemsConfig
from bevatron.align.problems import Problems
from bevatron.errors import BevatronError
from bevatron.train.config import SourceConfig
from tests.align.rl_run import prepare_rl
from tests.processes import Pool
from tests.train.tiny_run import train

OPTIONS = {"greedy": False, "validation": False, "limit": None, "tp": 1, "dtype": None}
OPTIONS |= {"device": "cpu", "samples": 4}


def test_rates_are_measured_and_order_a_curriculum(
    tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare_rl(tmp_path / "run")
    pool.run(1, train, folder, "train.steps=1", "checkpoint.every=1")
    monkeypatch.chdir(folder)
    config = ["objective.solved_at=0.5"]
    out = folder / "rates.jsonl"
    found = pass_rates(Path("run.yaml"), config, out, ckpt="run", **OPTIONS)  # type: ignore[arg-type]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert found["problems"] == len(rows) == 8 and found["samples"] == 4
    assert {row["prompt"] for row in rows} == {f"say {c}" for c in "abcdefgh"}
    assert all(row["pass_rate"] in (0, 0.25, 0.5, 0.75, 1) for row in rows)
    mean = sum(row["pass_rate"] for row in rows) / 8
    assert found["pass_rate"] == pytest.approx(mean) and 0 < mean < 1
    again = pass_rates(Path("run.yaml"), config, None, ckpt="run", **OPTIONS)  # type: ignore[arg-type]
    assert again["pass_rate"] == found["pass_rate"] and again["rewards"] == found["rewards"]
    how = ProblemsConfig(curriculum=CurriculumConfig(drop_from=1.1, start=1.0, end=0.0, width=0.01))
    ordered = Problems([SourceConfig(path=str(out))], how, 0, batch=1, steps=8)
    order = [ordered[i].row["pass_rate"] for i in range(8)]
    assert order[0] == max(order) and sum(order[:4]) > sum(order[4:])


def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare_rl(tmp_path / "run")
    monkeypatch.chdir(folder)
    for overrides, keys, said in (
        ([], {}, "begins with random weights"),
        (["objective={name: pretrain}"], {}, "has no rewards"),
        (["objective.environment={tools: [calculator]}"], {}, "several turns are not measured"),
        ([], {"ckpt": "x", "validation": True}, "data.validation names no problems"),
    ):
        options = {**OPTIONS, "ckpt": None, **keys}
        with pytest.raises(BevatronError, match=said):
            pass_rates(Path("run.yaml"), overrides, None, **options)  # type: ignore[arg-type]
