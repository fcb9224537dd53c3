"""Losses of reward models are TRL's on the same batch, and the same at every layout."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trl import RewardTrainer

from bevatron.align.reward_objective import Attributes, BradleyTerry
from bevatron.families import by_name
from bevatron.parallel.layout import Layout
from bevatron.parallel.process_groups import mesh
from bevatron.spec import Head, ModelSpec
from bevatron.train.config import OptimizerConfig, TrainConfig
from bevatron.train.trainer import Trainer
from tests.processes import Pool
from tests.specs import HETEROGENEOUS, HOMOGENEOUS
from tests.train.test_head_objectives import theirs

T, PAD, N = 16, 3, 8
LABELS = ("helpfulness", "verbosity")
ONE = Head("sequence_classification", ("reward",), pad_token_id=PAD, problem_type="regression")
KINDS = ("plain", "margin", "centred", "attributes")


@dataclass(frozen=True)
class Case:
    kind: str
    layout: Layout = field(default_factory=Layout)
    spec: ModelSpec = HOMOGENEOUS


def samples(kind: str, step: int = 0) -> dict[str, Tensor]:
    """A global batch, padded to the right."""
    g = torch.Generator().manual_seed(step)
    rows = 1 if kind == "attributes" else 2
    ids = torch.randint(4, 90, (N, rows, T), generator=g)
    lengths = torch.randint(2, T + 1, (N, rows, 1), generator=g)
    ids = torch.where(torch.arange(T) < lengths, ids, PAD)
    if kind == "attributes":
        return {"tokens": ids[:, 0], "scores": torch.randn(N, len(LABELS), generator=g)}
    margin = torch.rand(N, generator=g) * 3
    return {"tokens": ids} | ({"margin": margin} if kind != "plain" else {})


def make(case: Case) -> Trainer:
    head = replace(ONE, labels=LABELS) if case.kind == "attributes" else ONE
    objective: Any = Attributes(head)
    if case.kind != "attributes":
        objective = BradleyTerry(head, 0.3 if case.kind == "centred" else 0.0)
    trainer = Trainer(
        replace(case.spec, head=head, tie_word_embeddings=False),
        case.layout,
        mesh(case.layout, torch.device("cpu")),
        objective,
        seq_len=T,
        train=TrainConfig(steps=3, global_batch=N, micro_batch=2, precision="fp32"),
        optimizer=OptimizerConfig(lr=1e-2),
        device=torch.device("cpu"),
    )
    trainer.fill_random(seed=0)
    return trainer


def of_trl(model: Any, kind: str, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """What RewardTrainer's own compute_loss says, and the metrics that it keeps."""
    chosen, rejected = batch["tokens"].unbind(1)
    ids = torch.cat((chosen, rejected))
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if kind != "plain":
        inputs["margin"] = batch["margin"]

    def same(value: Tensor) -> Tensor:
        return value

    metrics: dict[str, Any] = {"train": defaultdict(list)}
    own = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=0.3 if kind == "centred" else None),
        accelerator=SimpleNamespace(gather=same, gather_for_metrics=same),
        _metrics=metrics, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    loss = RewardTrainer.compute_loss(own, model, inputs)
    return loss, {name: values[0] for name, values in metrics["train"].items()}


def one_step(kind: str) -> tuple[dict[str, float], dict[str, float], float]:
    """Our numbers and TRL's for the same weights, and how far apart the gradients are."""
    trainer = make(Case(kind))
    whole = samples(kind)
    ids, batch = trainer.objective.batch(whole)
    named = dict(trainer.placed.stage.decoder.named_parameters())
    weights = {n: p.full_tensor().detach().clone() for n, p in named.items()}
    counts = np.array(trainer.objective.count(batch), dtype=np.float64)
    sums = trainer.runner.step(ids, batch, torch.tensor(1 / counts, dtype=torch.float32))
    ours = trainer.objective.report(sums.double().numpy(), counts)
    grads = {n: p.grad.full_tensor() for n, p in named.items()}  # type: ignore[union-attr]
    model, _ = theirs(trainer.spec, weights)
    if kind == "attributes":  # transformers' own regression loss
        ids = whole["tokens"]
        out = model(ids, attention_mask=(ids != PAD).long(), labels=whole["scores"])
        loss, metrics = out.loss, {}
    else:
        loss, metrics = of_trl(model, kind, whole)
    loss.backward()
    by_name_ = dict(model.named_parameters())
    found, wanted = [], []
    for entry in by_name("llama").weight_map(trainer.spec):
        rows = grads[entry.native.name]
        rows = rows.reshape(-1, rows.shape[-1]) if rows.ndim > 1 else rows
        for i, source in enumerate(entry.sources):
            parts = [rows[r.native_start : r.native_start + r.count] for r in entry.rows
                     if r.source == i]  # fmt: skip
            found.append(torch.cat(parts).flatten())
            wanted.append(by_name_[source.name].grad.flatten())
    a, b = torch.cat(found), torch.cat(wanted)
    return ours, metrics | {"loss": float(loss)}, float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_loss_metrics_and_gradients_are_those_of_trl(pool: Pool, kind: str) -> None:
    ours, wanted, apart = pool.run(1, one_step, kind)[0]
    names = {"loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward"}
    if kind != "attributes":
        assert names <= set(wanted)
    for name in names & set(wanted):
        assert ours[name] == pytest.approx(wanted[name], abs=1e-6), name
    assert apart < 1e-5, "gradients, relative to their norm"
    assert ours["dropped"] == 0


def train(case: Case) -> list[dict[str, float]]:
    """Loss, gradient norm and metrics of three updates, then of two validation batches."""
    trainer = make(case)

    def mine(step: int) -> dict[str, Tensor]:
        whole = samples(case.kind, step)
        whole["cut"] = torch.zeros(whole["tokens"].shape[:-1], dtype=torch.bool)
        whole["cut"][1] = True
        return {k: v.chunk(trainer.layout.dp)[trainer.placed.dp_rank] for k, v in whole.items()}

    out = []
    for step in range(3):
        found = trainer.step(mine(step), 1e-2)
        assert found is not None
        out.append({**trainer.reported, "norm": found[1]})
    parts = [trainer.evaluate(mine(step)) for step in (8, 9)]
    return [*out, trainer.objective.report(*trainer.all_batches(parts))]  # type: ignore[arg-type]


LAYOUTS = [
    Case("centred", Layout(tp=2)),
    Case("centred", Layout(pp=2), HETEROGENEOUS),
    Case("centred", Layout(cp=2), HETEROGENEOUS),
    Case("attributes", Layout(cp=2)),
    Case("centred", Layout(tp=2, pp=2, dp_shard=2), HETEROGENEOUS),
    Case("attributes", Layout(tp=2, dp_replicate=2)),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda c: f"{c.kind} at {c.layout}")
def test_every_layout_equals_one_process(pool: Pool, case: Case) -> None:
    expected = pool.run(1, train, replace(case, layout=Layout()))[0]
    assert expected[0]["dropped"] == 1 / 8
    for got in pool.run(case.layout.world_size, train, case):
        for step, (ours, wanted) in enumerate(zip(got, expected, strict=True)):
            assert ours == pytest.approx(
                wanted, rel=3e-5 if step else 1e-5, abs=1e-5 if step else 1e-6
            )


def test_a_sample_that_lost_its_end_or_is_blank_counts_for_nothing() -> None:
    objective = BradleyTerry(ONE)
    whole = samples("margin")
    cut = torch.zeros(N, 2, dtype=torch.bool)
    cut[2, 1] = True
    real = torch.arange(N) < 6
    _, batch = objective.batch({**whole, "cut": cut, "real": real})
    assert objective.count(batch) == (5,)
    assert batch["kept"].tolist() == [True, True, False, True, True, True, False, False]
