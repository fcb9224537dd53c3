"""SIGTERM on one rank, whatever that rank is doing: all save after the same step and end."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from bevatron.parallel.on_all_ranks import on_all
from bevatron.train.feed import Batch
from bevatron.train.token_feed import TokenFeed
from tests.processes import Pool
from tests.train import small_run


@pytest.mark.parametrize(
    ("moment", "last"),
    [("data wait", 2), ("step", 3), ("evaluation", 3), ("save", 3)],
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    pool: Pool, moment: str, last: int, tmp_path: Path
) -> None:
    config = small_run.make(tmp_path)
    every = ["checkpoint.every=1", "train.val_every=1", "train.val_batches=3"]
    ends = pool.run(2, small_run.train, config, every, (f"signal in {moment}", 1, 3))
    assert ends == ["done", "exit 143"]
    run = tmp_path / "run"
    assert [step for step, *_ in small_run.losses(run)] == list(range(1, last + 1))
    assert (run / "latest").read_text() == f"step-{last:08d}\n"
    validated = [line["step"] for line in small_run.lines(run) if "val_loss" in line]
    cut_short = moment in ("step", "evaluation")
    assert validated == list(range(last + 1 - cut_short))
    assert small_run.events(run) == [(last, "stopped")]


def of_all_ranks(config: Path, every: list[str], trouble: small_run.Trouble) -> str:
    """With a feed whose batches all ranks make together."""
    read = TokenFeed.read_training

    def reading(self: TokenFeed, positions: range) -> Batch:
        on_all(lambda: positions)
        return read(self, positions)

    with (
        patch.object(TokenFeed, "collective", True),
        patch.object(TokenFeed, "read_training", reading),
    ):
        return small_run.train(config, every, trouble)


@pytest.mark.parametrize(("moment", "last"), [("batch", 3), ("step", 3), ("evaluation", 3)])
def test_a_stop_is_agreed_before_all_ranks_make_a_batch(
    pool: Pool, moment: str, last: int, tmp_path: Path
) -> None:
    """A rank that is asked to stop while the others wait for it in the making takes part to the
    end, and in the step."""
    config = small_run.make(tmp_path)
    every = ["checkpoint.every=1", "train.val_every=1", "train.val_batches=3"]
    ends = pool.run(2, of_all_ranks, config, every, (f"signal in {moment}", 1, 3))
    assert ends == ["done", "exit 143"]
    run = tmp_path / "run"
    assert [step for step, *_ in small_run.losses(run)] == list(range(1, last + 1))
    assert (run / "latest").read_text() == f"step-{last:08d}\n"
    assert small_run.events(run) == [(last, "stopped")]


def test_a_signal_in_warm_up_takes_no_step(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run.make(tmp_path)
    assert pool.run(2, asked_early, config) == ["exit 143", "done"]
    assert not list((tmp_path / "run").glob("step-*"))


def asked_early(config: Path) -> str:
    import os
    import signal
    from unittest.mock import patch

    import torch.distributed as dist

    from bevatron.train.trainer import Trainer

    fill = Trainer.fill_random

    def filling(self: Trainer, seed: int) -> None:
        fill(self, seed)
        if dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    with patch.object(Trainer, "fill_random", filling):
        return small_run.train(config, [])
