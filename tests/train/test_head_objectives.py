"""Losses and gradients on heads are those of transformers' classes, at every layout."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bevatron.families import by_name
from bevatron.parallel.layout import Layout
from bevatron.parallel.process_groups import mesh
from bevatron.spec import Head, ModelSpec
from bevatron.train.config import OptimizerConfig, TrainConfig
from bevatron.train.head_objectives import best_span
from bevatron.train.trainer import Trainer
from tests.processes import Pool
from tests.specs import HETEROGENEOUS, HOMOGENEOUS
from tests.train.tiny_run import configuration

T, PAD, N = 16, 3, 8
LABELS = ("a", "b", "c")
SEQUENCE = Head("sequence_classification", LABELS, pad_token_id=PAD)
HEADS = {
    "single": SEQUENCE,
    "multi": replace(SEQUENCE, problem_type="multi_label_classification"),
    "regression": replace(SEQUENCE, problem_type="regression", labels=("x",)),
    "several numbers": replace(SEQUENCE, problem_type="regression"),
    "tokens": Head("token_classification", LABELS, bias=True),
    "answers": Head("question_answering", bias=True),
    "answers of equal length": Head("question_answering", bias=True),
}


@dataclass(frozen=True)
class Case:
    head: str
    layout: Layout = field(default_factory=Layout)
    spec: ModelSpec = HOMOGENEOUS
    precision: str = "fp32"


def samples(head: str, step: int = 0) -> dict[str, torch.Tensor]:
    """A global batch: padded to the right, some labels ignored."""
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(4, 90, (N, T), generator=g)
    lengths = torch.randint(2, T + 1, (N, 1), generator=g)
    ids = torch.where(torch.arange(T) < lengths, ids, PAD)
    if head == "single":
        return {"tokens": ids, "labels": torch.randint(3, (N,), generator=g)}
    if head == "multi":
        return {"tokens": ids, "labels": torch.randint(2, (N, 3), generator=g).float()}
    if head in ("regression", "several numbers"):
        shape = (N, 1 if head == "regression" else 3)
        return {"tokens": ids, "labels": torch.randn(shape, generator=g)}
    if head == "tokens":
        labels = torch.randint(3, (N, T), generator=g)
        dropped = torch.rand(N, T, generator=g) < 0.3
        return {"tokens": ids, "labels": labels.masked_fill(dropped | (ids == PAD), -100)}
    starts = torch.randint(0, T, (N,), generator=g)
    ends = torch.minimum(starts + 3, torch.tensor(T + 1))  # some end outside, starts inside
    starts[1] = T + 5
    context = (torch.arange(T) > 3).expand(N, T)
    if head == "answers of equal length":
        ids, lengths = ids.masked_fill(ids == PAD, 5), torch.full((N, 1), T)
    else:  # without any outside
        lengths = lengths.clamp(min=5)
        starts, ends = (torch.minimum(x, lengths[:, 0] - 1) for x in (starts, ends))
    return {"tokens": ids, "starts": starts, "ends": ends, "lengths": lengths[:, 0],
            "context": context, "null": torch.zeros(N, dtype=torch.int64)}  # fmt: skip


def make(case: Case) -> Trainer:
    spec = replace(case.spec, head=HEADS[case.head], tie_word_embeddings=False)
    config = configuration(objective={"name": HEADS[case.head].kind})
    trainer = Trainer(
        spec,
        case.layout,
        mesh(case.layout, torch.device("cpu")),
        config.objective.make(spec, config),
        seq_len=T,
        train=TrainConfig(steps=3, global_batch=N, micro_batch=2, precision=case.precision),
        optimizer=OptimizerConfig(lr=1e-2),
        device=torch.device("cpu"),
    )
    trainer.fill_random(seed=0)
    return trainer


def mine(trainer: Trainer, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.chunk(trainer.layout.dp)[trainer.placed.dp_rank] for k, v in whole.items()}


def theirs(spec: ModelSpec, weights: dict[str, torch.Tensor]) -> Any:
    """The class of transformers that config.json names, with our weights."""
    family = by_name("llama")
    config = transformers.LlamaConfig(
        **{k: v for k, v in family.config(spec, "float32").items() if k != "torch_dtype"},
        classifier_dropout=0.0,
    )
    model = getattr(transformers, config.architectures[0])(config)
    state = {}
    for entry in family.weight_map(spec):
        rows = weights[entry.native.name]
        rows = rows.reshape(-1, rows.shape[-1]) if rows.ndim > 1 else rows
        for i, source in enumerate(entry.sources):
            parts = [rows[r.native_start : r.native_start + r.count] for r in entry.rows
                     if r.source == i]  # fmt: skip
            state[source.name] = torch.cat(parts).reshape(source.shape)
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and not missing.missing_keys
    return model, state.keys()


def their_loss(model: Any, head: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = batch["tokens"]
    if "answers" not in head:
        return model(ids, attention_mask=(ids != PAD).long(), labels=batch["labels"]).loss
    # Their softmax is over the padding too, whose hidden states mean nothing: one by one, without.
    step = N if "equal" in head else 1
    parts = [
        model(
            ids[i : i + step, : batch["lengths"][i]],
            start_positions=batch["starts"][i : i + step],
            end_positions=batch["ends"][i : i + step],
        ).loss
        for i in range(0, N, step)
    ]
    return torch.stack(parts).mean()


def one_step(head: str) -> tuple[float, float, float]:
    """Our loss and gradients, and those of transformers for the same weights: compared here."""
    trainer = make(Case(head))
    whole = samples(head)
    ids, batch = trainer.objective.batch(whole)
    named = dict(trainer.placed.stage.decoder.named_parameters())
    weights = {n: p.full_tensor().detach().clone() for n, p in named.items()}
    counts = np.array(trainer.objective.count(batch), dtype=np.float64)
    sums = trainer.runner.step(ids, batch, torch.tensor(1 / counts, dtype=torch.float32))
    loss = trainer.objective.report(sums.double().numpy(), counts)["loss"]
    grads = {n: p.grad.full_tensor() for n, p in named.items()}  # type: ignore[union-attr]

    model, names = theirs(trainer.spec, weights)
    theirs_ = their_loss(model, head, whole)
    theirs_.backward()
    by_name_ = dict(model.named_parameters())
    wanted, found = [], []
    for entry in by_name("llama").weight_map(trainer.spec):
        rows = grads[entry.native.name]
        rows = rows.reshape(-1, rows.shape[-1]) if rows.ndim > 1 else rows
        for i, source in enumerate(entry.sources):
            parts = [rows[r.native_start : r.native_start + r.count] for r in entry.rows
                     if r.source == i]  # fmt: skip
            found.append(torch.cat(parts).flatten())
            wanted.append(by_name_[source.name].grad.flatten())
    a, b = torch.cat(found), torch.cat(wanted)
    difference = float((a - b).norm() / b.norm())
    assert len(names) == len(by_name_)
    return loss, float(theirs_), difference


@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_are_those_of_transformers(pool: Pool, head: str) -> None:
    ours, wanted, difference = pool.run(1, one_step, head)[0]
    assert ours == pytest.approx(wanted, rel=1e-5)
    assert difference < 1e-5, "gradients, relative to their norm"


def train(case: Case) -> list[list[float]]:
    """Loss, gradient norm and metrics of three updates, then of a validation batch."""
    trainer = make(case)
    out = []
    for step in range(3):
        loss, norm = trainer.step(mine(trainer, samples(case.head, step)), 1e-2)
        out.append([loss, norm, *trainer.reported.values()])
    sums, counts = trainer.evaluate(mine(trainer, samples(case.head, 9)))
    return [*out, list(trainer.objective.report(sums, counts).values())]


LAYOUTS = [
    Case("single", Layout(tp=2, pp=2, dp_shard=2)),
    Case("multi", Layout(pp=2, dp_replicate=2)),
    Case("several numbers", Layout(tp=2, dp_shard=2)),
    Case("tokens", Layout(tp=2, sequence_parallel=False)),
    Case("tokens", Layout(tp=2, pp=2), HETEROGENEOUS),
    Case("answers", Layout(tp=2, dp_shard=2)),
    Case("answers", Layout(pp=2, dp_shard=2)),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda c: f"{c.head} at {c.layout}")
def test_every_layout_equals_one_process(pool: Pool, case: Case) -> None:
    expected = pool.run(1, train, replace(case, layout=Layout()))[0]
    for got in pool.run(case.layout.world_size, train, case):
        for step, (ours, wanted) in enumerate(zip(got, expected, strict=True)):
            # AdamW follows the sign of gradients that are noise, so later steps part a little.
            assert ours == pytest.approx(wanted, rel=3e-5 if step else 1e-5)


def test_metrics_count_what_they_say() -> None:
    """By hand: scores whose best labels and spans are known."""
    spec = replace(HOMOGENEOUS, head=SEQUENCE)
    config = configuration(objective={"name": "sequence_classification"})
    single = config.objective.make(spec, config)
    scores = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 2.0, 0]])[:, None]
    last = torch.zeros(3, dtype=torch.int64)
    batch = {"labels": torch.tensor([0, 2, -100]), "last": last}
    sums = np.array([float(x) for x in single.sums(scores, batch)])
    assert single.report(sums, np.array(single.count(batch)))["accuracy"] == 0.5

    multi = config.objective.make(replace(spec, head=HEADS["multi"]), config)
    scores = torch.tensor([[1.0, -1, 1], [1, 1, 1]])[:, None]
    labels = torch.tensor([[1.0, 1, 0], [torch.nan] * 3])
    batch = {"labels": labels, "last": last[:2]}
    sums = np.array([float(x) for x in multi.sums(scores, batch)])
    assert multi.count(batch) == (3,), "the blank sample counts for nothing"
    assert multi.report(sums, np.array([3.0]))["micro_f1"] == 0.5, "1 hit, 2 said, 2 true"

    config = configuration(objective={"name": "question_answering"})
    answers = config.objective.make(spec, config)
    scores = torch.zeros(3, 8, 2)
    scores[0, 4, 0] = scores[0, 5, 1] = 9  # says 4 to 5
    scores[1, 0] = 9  # says there is none
    batch = {
        "starts": torch.tensor([5, 0, 8]),
        "ends": torch.tensor([6, 0, 8]),
        "lengths": torch.full((3,), 8),
        "context": torch.arange(8).expand(3, 8) > 2,
        "null": torch.zeros(3, dtype=torch.int64),
    }
    sums = np.array([float(x) for x in answers.sums(scores, batch)])
    found = answers.report(sums, np.array(answers.count(batch)))
    assert (found["exact_match"], found["f1"]) == (0.5, 0.75)


def test_the_best_span_is_the_best_of_all() -> None:
    scores = torch.randn(50, 12, 2, generator=torch.Generator().manual_seed(0))
    context = (torch.arange(12) > 3).expand(50, 12)
    first, last = best_span(scores, context, torch.zeros(50, dtype=torch.int64))
    for s, a, b in zip(scores, first.tolist(), last.tolist(), strict=True):
        spans = [(0, 0), *((i, j) for i in range(4, 12) for j in range(i, 12))]
        assert max(spans, key=lambda ij: float(s[ij[0], 0] + s[ij[1], 1])) == (a, b)


def test_bf16_computes_losses_in_fp32(pool: Pool) -> None:
    low, high = (pool.run(1, train, Case("tokens", precision=p))[0] for p in ("bf16", "fp32"))
    assert [x[0] for x in low] == pytest.approx([x[0] for x in high], rel=2e-2)
