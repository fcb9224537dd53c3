"""What a teacher costs: the FLOPs that torch counts and the bytes that it leaves on real ranks are
those of a dry run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.flop_counter import FlopCounterMode

from bevatron.checkpoint.rank_boxes import local
from bevatron.compress.distill import Distill
from bevatron.compress.distill_states import EMBEDDING, States, StatesLoss
from bevatron.compress.logit_divergence import Divergence
from bevatron.parallel.companion import Companion
from bevatron.parallel.layout import Layout
from bevatron.parallel.process_groups import mesh
from bevatron.spec import ModelSpec
from bevatron.spec.count import flops_per_token, forward_flops_per_token
from bevatron.spec.json import to_json
from bevatron.train.config import OptimizerConfig, TrainConfig
from bevatron.train.config_file import load_config
from bevatron.train.dry_run import Plan, make_plan, to_text
from bevatron.train.objectives import Pretrain
from bevatron.train.trainer import Trainer
from tests.processes import Pool
from tests.specs import HETEROGENEOUS, HOMOGENEOUS
from tests.train_steps import GLOBAL_BATCH, SEQ_LEN, samples

STUDENT = replace(HOMOGENEOUS, vocab_size=HETEROGENEOUS.vocab_size)
TEACHERS = {
    "heterogeneous": HETEROGENEOUS,
    "tied": replace(STUDENT, tie_word_embeddings=True, hidden_size=24, layers=STUDENT.layers * 2),
}


@dataclass(frozen=True)
class Case:
    layout: Layout
    teacher: str = "heterogeneous"
    precision: str = "fp32"
    pairs: tuple[tuple[int, int], ...] = ()


def objective(case: Case) -> Distill:
    spec, loss = TEACHERS[case.teacher], StatesLoss(dict(case.pairs), project=True)
    companion = Companion(spec, None, seed=7, pairs=loss.pairs)
    states = States(loss, STUDENT, spec) if case.pairs else None
    return Distill(companion, Divergence(ce=0.5), states)


def make(case: Case) -> Trainer:
    device = torch.device("cpu")
    trainer = Trainer(
        STUDENT,
        case.layout,
        mesh(case.layout, device),
        objective(case),
        seq_len=SEQ_LEN,
        train=TrainConfig(
            steps=3, global_batch=GLOBAL_BATCH, micro_batch=2, precision=case.precision
        ),
        optimizer=OptimizerConfig(lr=1e-2),
        device=device,
    )
    trainer.fill_random(seed=0)
    trainer.fill_companions()
    return trainer


def counted(case: Case) -> tuple[int, int]:
    """FLOPs of a step, and of a validation, without those of attention."""
    trainer = make(case)
    found = []
    for work in (lambda: trainer.step(samples(trainer, 0), 1e-3),
                 lambda: trainer.evaluate(samples(trainer, 0))):  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            work()
        products = counter.get_flop_counts()["Global"]
        found.append(sum(n for op, n in products.items() if "attention" not in str(op)))
    return found[0], found[1]


def matrices(flops, spec: ModelSpec) -> int:
    """Without attention, whose share doubles with its square."""
    return 2 * flops(spec, SEQ_LEN, causal=True) - flops(spec, SEQ_LEN, causal=False)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_step_takes_the_flops_of_both_models(pool: Pool, teacher: str) -> None:
    step, validation = pool.run(1, counted, Case(Layout(), teacher))[0]
    tokens = GLOBAL_BATCH * SEQ_LEN
    forward = tokens * matrices(forward_flops_per_token, TEACHERS[teacher])
    # The gradient of the head's weight is added in place, which torch does not count
    in_place = tokens * 2 * STUDENT.vocab_size * STUDENT.hidden_size
    assert step + in_place == tokens * matrices(flops_per_token, STUDENT) + forward
    assert validation == tokens * matrices(forward_flops_per_token, STUDENT) + forward


def kept(case: Case) -> tuple[int, int, int]:
    """(place in the pipeline, bytes of the teacher's shards, bytes that its forward leaves)."""
    trainer = make(case)
    teacher = trainer.objective.companions["teacher"]
    ids, batch, _ = trainer._agreed(samples(trainer, 0))
    assert ids is not None
    with trainer._accompanied(ids, batch) as whole:
        states = [x for name, x in whole.items() if name.partition(".")[0] == "teacher"]
        left = sum(s.nbytes() for s in {x.untyped_storage() for x in states})
        for stage in teacher.placed.mine.values():
            for module in stage.modules():
                group = module._get_fsdp_state()._fsdp_param_group if is_sharded(module) else None
                if group is not None and group.is_unsharded:
                    left += sum(local(p.unsharded_param).nbytes for p in group.fsdp_params)
    shards = [
        p.to_local().nbytes
        for stage in teacher.placed.mine.values()
        for p in stage.decoder.parameters()
    ]
    coordinates = trainer.mesh.get_coordinate()
    first = coordinates is not None and not any(coordinates[1:])
    return (trainer.mesh.get_local_rank("pp") if first else -1), sum(shards), left


def is_sharded(module: torch.nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def plan_of(folder: Path, case: Case) -> tuple[Plan, Plan]:
    """With the teacher, and without."""
    (folder / "spec.json").write_text(to_json(STUDENT))
    (folder / "run.yaml").write_text(
        f"model: {{spec: {folder}/spec.json}}\n"
        f"data: {{train: [{{path: absent}}], seq_len: {SEQ_LEN}}}\n"
        f"train: {{steps: 3, global_batch: {GLOBAL_BATCH}, micro_batch: 2, "
        f"precision: {case.precision}}}\n"
        "optimizer: {lr: 1.0e-2}\nrun: {dir: run}\n"
    )
    config = load_config(folder / "run.yaml", [])
    one = make_plan(config, case.layout, objective(case), [])
    return one, make_plan(config, case.layout, Pretrain(), [])


CASES = [
    Case(Layout(pp=2, tp=2), precision="bf16"),
    Case(Layout(dp_shard=2), "tied", "bf16"),
    Case(Layout(), precision="bf16"),
    Case(Layout(pp=2, tp=2), pairs=((0, 1), (1, 1), (3, 5), (EMBEDDING, EMBEDDING))),
]
MORE = [
    Case(Layout(pp=2, dp_shard=2), "tied"),
    Case(Layout(tp=2, sequence_parallel=False), precision="bf16"),
    Case(Layout(cp=2)),
    Case(Layout(pp=2, schedule="interleaved_1f1b")),
    Case(Layout(dp_shard=2, shard="gradients")),
]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(c, marks=pytest.mark.slow) for c in MORE)], ids=str
)
def test_what_a_teacher_keeps_on_paper_is_what_it_keeps_on_real_ranks(
    pool: Pool, tmp_path: Path, case: Case
) -> None:
    real = {r[0]: r[1:] for r in pool.run(case.layout.world_size, kept, case)}
    plan, alone = plan_of(tmp_path, case)
    for stage, without in zip(plan.stages, alone.stages, strict=True):
        assert (stage.weights - without.weights, stage.beside) == real[stage.stage]
        more = stage.optimizer - without.optimizer  # a projection of states
        assert stage.peak - without.peak == sum(real[stage.stage]) + more
        assert without.beside == 0
    assert sum(s.flops for s in plan.stages) == pytest.approx(1.0)


def test_a_plan_says_what_the_teacher_takes(tmp_path: Path) -> None:
    plan, alone = plan_of(tmp_path, Case(Layout(pp=2)))
    tokens = GLOBAL_BATCH * SEQ_LEN
    assert plan.teacher_flops_per_step == tokens * forward_flops_per_token(
        HETEROGENEOUS, SEQ_LEN, causal=True
    )
    assert plan.flops_per_step == alone.flops_per_step + plan.teacher_flops_per_step
    assert "of it the teacher's" in to_text(plan) and "  teacher  " in to_text(plan)
    assert "teacher" not in to_text(alone)
    lines = to_text(plan).splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("rank"))
    assert {len(line) for line in lines[header : header + 3]} == {len(lines[header])}
