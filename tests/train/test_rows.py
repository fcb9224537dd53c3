"""Samples of several sequences: an objective says how many, and everything counts them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bevatron.parallel.layout import Layout
from bevatron.parallel.process_groups import mesh
from bevatron.spec.json import to_json
from bevatron.train.config import OptimizerConfig, TrainConfig
from bevatron.train.dry_run import Plan, make_plan
from bevatron.train.launch import layout_of
from bevatron.train.objectives import Objective, Pretrain, Samples
from bevatron.train.step_metrics import Meter
from bevatron.train.trainer import Trainer
from tests.processes import Pool
from tests.specs import HETEROGENEOUS, HOMOGENEOUS
from tests.train.test_dry_run import config_of
from tests.train.tiny_run import configuration

T, N = 16, 4


class Pairs(Pretrain):
    """Two texts a sample, [n, 2, T + 1], of which both are learned."""

    rows = 2

    def batch(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        return super().batch({name: values.flatten(0, 1) for name, values in samples.items()})


def steps(objective: Objective, layout: Layout) -> list[tuple[float, float]]:
    """Loss and norm of three updates on the same texts, and the loss of a validation after them."""
    samples, micro = N * 2 // objective.rows, 2 // objective.rows
    trainer = Trainer(
        HETEROGENEOUS,
        layout,
        mesh(layout, torch.device("cpu")),
        objective,
        seq_len=T,
        train=TrainConfig(steps=3, global_batch=samples, micro_batch=micro, precision="fp32"),
        optimizer=OptimizerConfig(lr=1e-2),
        device=torch.device("cpu"),
    )
    trainer.fill_random(seed=0)
    tokens = torch.randint(90, (2 * N, T + 1), generator=torch.Generator().manual_seed(0))
    whole = tokens if objective.rows == 1 else tokens.view(N, 2, T + 1)
    mine = {"tokens": whole.chunk(layout.dp)[trainer.placed.dp_rank]}
    found: list[Any] = [trainer.step(mine, 1e-2) for _ in range(3)]
    sums, counts = trainer.evaluate(mine) or (None, None)
    assert sums is not None and counts is not None
    return [*found, (float(sums[0]), float(counts[0]))]


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(pp=2), Layout(cp=2), Layout(dp_shard=2)], ids=str
)
def test_a_pair_is_two_sequences_of_one_sample(pool: Pool, layout: Layout) -> None:
    """Bit for bit what twice as many samples and micro-batches of twice the size give."""
    singles = pool.run(layout.world_size, steps, Pretrain(), layout)
    assert pool.run(layout.world_size, steps, Pairs(), layout) == singles


def test_a_dry_run_counts_them(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(to_json(HOMOGENEOUS))

    def plan(objective: Objective, **changes: int) -> Plan:
        config = config_of(tmp_path, str(tmp_path / "spec.json"), "data.seq_len=32")
        train = config.train.model_copy(update=changes)
        config = config.model_copy(update={"train": train})
        made = make_plan(config, replace(layout_of(config, 4), pp=2, dp_shard=2), objective, [])
        return replace(made, seconds=0.0)

    pairs = plan(Pairs(), global_batch=8, micro_batch=1)
    assert pairs == plan(Pretrain(), global_batch=16, micro_batch=2)
    assert pairs.tokens_per_step == 8 * 2 * 32


def test_the_meter_counts_their_tokens() -> None:
    config = configuration()
    cpu = torch.device("cpu")
    meters = [
        Meter(config, HOMOGENEOUS, Layout(), device=cpu, folder=None, step=0, rows=rows)
        for rows in (1, 3)
    ]
    assert meters[1].tokens_per_step == 3 * meters[0].tokens_per_step
