"""A few real training steps on synthetic tokens, at any layout: what the layout tests compare."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bevatron.parallel.layout import Layout
from bevatron.parallel.process_groups import mesh
from bevatron.spec import Adapter
from bevatron.train.config import MuonConfig, OptimizerConfig, TrainConfig
from bevatron.train.objectives import Objective, Pretrain, Samples
from bevatron.train.trainer import Trainer
from tests.specs import ALL

GLOBAL_BATCH, SEQ_LEN, STEPS = 8, 16, 5
OPTIMIZERS = {
    "adamw": OptimizerConfig(lr=1e-2, clip_grad=1.0, weight_decay=0.1),
    "muon": OptimizerConfig(
        name="muon", lr=1e-2, lr_scale={"embedding": 1.0}, muon=MuonConfig(momentum_warmup=4)
    ),
}


@dataclass(frozen=True)
class Case:
    """One run: which spec, at which layout, in how large micro-batches."""

    spec: str
    layout: Layout = field(default_factory=Layout)
    micro_batch: int = 2
    precision: str = "fp32"
    recompute: str = "none"
    compile: bool = False
    documents: bool = False
    optimizer: str = "adamw"
    freeze: tuple[str, ...] = ()
    adapter: Adapter | None = None


def make_trainer(case: Case, objective: Objective | None = None) -> Trainer:
    device = torch.device("cpu")
    train = TrainConfig(
        steps=STEPS,
        global_batch=GLOBAL_BATCH,
        micro_batch=case.micro_batch,
        precision=case.precision,
        recompute=case.recompute,
        compile=case.compile,
        freeze=list(case.freeze),
    )
    trainer = Trainer(
        ALL[case.spec].with_adapter(case.adapter),
        case.layout,
        mesh(case.layout, device),
        objective or Pretrain(),
        seq_len=SEQ_LEN,
        train=train,
        optimizer=OPTIMIZERS[case.optimizer],
        device=device,
    )
    trainer.fill_random(seed=0)
    return trainer


def samples(trainer: Trainer, step: int, documents: bool = False) -> Samples:
    """This rank's part of global batch `step`."""
    generator = torch.Generator().manual_seed(step)
    shape = (GLOBAL_BATCH, SEQ_LEN + 1)
    whole = {"tokens": torch.randint(trainer.spec.vocab_size, shape, generator=generator)}
    if documents:
        whole["documents"] = torch.rand(shape, generator=generator).lt(0.2).cumsum(1)
    dp, rank = trainer.layout.dp, trainer.placed.dp_rank
    return {name: rows.chunk(dp)[rank].contiguous() for name, rows in whole.items()}


def train(case: Case) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    trainer = make_trainer(case)
    return [trainer.step(samples(trainer, s, case.documents), 1e-2) for s in range(STEPS)]
