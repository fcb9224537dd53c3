"""A student learns from its teacher as plain torch has it, and the same at every layout."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F

from bevatron.compress.distill import Distill
from bevatron.compress.logit_divergence import Divergence
from bevatron.parallel.companion import Companion
from bevatron.parallel.layout import Layout
from bevatron.parallel.process_groups import mesh
from bevatron.spec import MLP, Attention, LayerSpec, ModelSpec
from bevatron.train.config import OptimizerConfig, TrainConfig
from bevatron.train.trainer import Trainer
from tests.processes import Pool
from tests.specs import HETEROGENEOUS, HOMOGENEOUS, LLAMA3_ROPE, NANOCHAT
from tests.train.test_head_objectives import theirs
from tests.train_steps import SEQ_LEN, samples

# Another width, depth and number of KV heads than its teachers.
STUDENT = ModelSpec(
    101,
    16,
    (LayerSpec(Attention(4, 4, 4), MLP(24)),) * 3,
    rope=LLAMA3_ROPE,
    init=replace(HOMOGENEOUS.init, std=0.15),
)
WIDER = replace(HOMOGENEOUS, vocab_size=101, init=replace(HOMOGENEOUS.init, std=0.2))
CAPPED = replace(NANOCHAT, vocab_size=101, init=replace(NANOCHAT.init, std=0.2))
TEACHERS = {"heterogeneous": HETEROGENEOUS, "homogeneous": WIDER, "capped": CAPPED}
OPTIONS = {
    "plain": Divergence(),
    "all": Divergence("jsd", 2.0, ce=0.3),
    "top": Divergence(temperature=1.5, top_k=7, ce=0.1),
}


@dataclass(frozen=True)
class Case:
    layout: Layout = field(default_factory=Layout)
    teacher: str = "heterogeneous"
    options: str = "plain"
    precision: str = "fp32"
    documents: bool = False


def make(case: Case) -> Trainer:
    device = torch.device("cpu")
    teacher = Companion(TEACHERS[case.teacher], None, seed=7)
    trainer = Trainer(
        STUDENT,
        case.layout,
        mesh(case.layout, device),
        Distill(teacher, OPTIONS[case.options]),
        seq_len=SEQ_LEN,
        train=TrainConfig(steps=3, global_batch=8, micro_batch=2, precision=case.precision),
        optimizer=OptimizerConfig(lr=1e-2),
        device=device,
    )
    trainer.fill_random(seed=0)
    trainer.fill_companions()
    return trainer


def train(case: Case) -> list[list[float]]:
    """Loss, gradient norm and metrics of three updates, then of a validation batch."""
    trainer = make(case)
    out = []
    for step in range(3):
        loss, norm = trainer.step(samples(trainer, step, case.documents), 3e-3)
        out.append([loss, norm, *trainer.reported.values()])
    sums, counts = trainer.evaluate(samples(trainer, 9, case.documents))
    return [*out, list(trainer.objective.report(sums, counts).values())]


LAYOUTS = [
    Case(Layout(tp=2), options="all"),
    Case(Layout(pp=2), options="top"),
    Case(Layout(dp_shard=2), "homogeneous"),
    Case(Layout(tp=2, pp=2, split=(1, 2)), documents=True),
]
MORE = [
    Case(Layout(tp=2, pp=2, dp_shard=2), documents=True),
    Case(Layout(tp=2, pp=2, dp_shard=2, split=(1, 2)), "capped", "top"),
    Case(Layout(pp=2, schedule="gpipe")),
    Case(Layout(pp=2, schedule="interleaved_1f1b"), options="all"),
    Case(Layout(pp=2, schedule="interleaved_zero_bubble")),
    Case(Layout(pp=2, dp_shard=2, schedule="zbv")),
    Case(Layout(tp=2, sequence_parallel=False), options="top"),
    Case(Layout(dp_replicate=2, dp_shard=2, shard="gradients"), "capped"),
    Case(Layout(cp=2), options="all", documents=True),
    Case(Layout(pp=2, tp=2), "capped", "all"),
]


@pytest.mark.parametrize(
    "case", [*LAYOUTS, *(pytest.param(c, marks=pytest.mark.slow) for c in MORE)], ids=str
)
def test_every_layout_equals_one_process(pool: Pool, case: Case) -> None:
    expected = pool.run(1, train, replace(case, layout=Layout()))[0]
    assert expected[0][0] > 0.05 and expected[2][0] != expected[0][0]
    for got in pool.run(case.layout.world_size, train, case):
        for step, (ours, wanted) in enumerate(zip(got, expected, strict=True)):
            # AdamW follows the sign of gradients that are noise, so later steps part a little.
            assert ours == pytest.approx(wanted, rel=5e-5 if step else 1e-5)


def beside_transformers(case: Case) -> list[tuple[float, float, float]]:
    """Loss, their loss, and the distance of gradients, of a step in our trainer and of a plain loop
    with two models of transformers."""
    trainer = make(case)
    options = OPTIONS[case.options]
    placed = trainer.objective.companions["teacher"].placed

    def weights(of: object) -> dict[str, torch.Tensor]:
        named = of.stage.decoder.named_parameters()  # type: ignore[attr-defined]
        return {n: p.full_tensor().detach().clone() for n, p in named}

    student, _ = theirs(trainer.spec, weights(trainer.placed))
    teacher, _ = theirs(placed.spec, weights(placed))
    batch = samples(trainer, 0)
    ids, labels = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    s = student(ids).logits.flatten(0, 1)
    with torch.no_grad():
        t = teacher(ids).logits.flatten(0, 1)
    tau = options.temperature
    loss = tau**2 * F.kl_div(
        (s / tau).log_softmax(-1), (t / tau).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    (loss + options.ce * F.cross_entropy(s, labels.flatten())).backward()
    norm = torch.cat([p.grad.flatten() for p in student.parameters()]).double().norm()

    found, ours = trainer.step(batch, 0.0, lambda loss, norm: False)
    wanted = loss + options.ce * F.cross_entropy(s, labels.flatten())
    assert not any(p.requires_grad for p in placed.parameters.values())
    return [(found, float(wanted.detach()), 0.0), (ours, float(norm), 0.0)]


def test_loss_and_gradient_are_those_of_a_plain_loop_with_transformers(pool: Pool) -> None:
    for ours, wanted, _ in pool.run(1, beside_transformers, Case(teacher="homogeneous"))[0]:
        assert ours == pytest.approx(wanted, rel=1e-5)


def in_bf16(case: Case) -> tuple[float, set[torch.dtype]]:
    trainer = make(case)
    done = trainer.step(samples(trainer, 0), 1e-3)
    assert done is not None
    teacher = trainer.objective.companions["teacher"].placed
    return done[0], {p.dtype for p in teacher.parameters.values()}


def test_in_bf16_the_teacher_is_stored_as_bf16(pool: Pool) -> None:
    exact, _ = pool.run(1, in_bf16, Case())[0]
    for layout in (Layout(), Layout(tp=2, pp=2)):
        for loss, dtypes in pool.run(layout.world_size, in_bf16, Case(layout, precision="bf16")):
            assert dtypes == {torch.bfloat16}
            assert loss == pytest.approx(exact, rel=0.03)
