"""The layouts that tests compare, and what there is to compare: steps and the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bevatron.checkpoint.rank_boxes import box, is_first_copy
from bevatron.parallel.layout import Layout, LayoutError, check
from tests.specs import ALL
from tests.train_steps import GLOBAL_BATCH, SEQ_LEN, STEPS, Case, make_trainer, samples

# Large enough to move weights by several percent in five steps; small enough not to amplify the
# rounding of sums: at 1e-2 a step on squared ReLUs makes 100 times more of it.
LEARNING_RATE = 3e-3

# One layout, or a few with the same sizes, per line; every one runs on at least two specs.
LAYOUTS = [
    # data parallel: full shard, gradients alone, replicas, both
    *(Layout(dp_shard=n, shard=mode) for n in (2, 4, 8) for mode in ("full", "gradients")),
    *(Layout(dp_replicate=n) for n in (2, 4)),
    *(Layout(dp_replicate=2, dp_shard=2, shard=mode) for mode in ("full", "gradients")),
    # tensor parallel; 4 and 3 ranks do not divide 2, 3 or 1 KV heads
    *(Layout(tp=n, sequence_parallel=sp) for n in (2, 4) for sp in (True, False)),
    Layout(tp=3, sequence_parallel=False),
    Layout(tp=2, dp_shard=2),
    Layout(tp=2, dp_shard=2, shard="gradients", sequence_parallel=False),
    Layout(tp=2, dp_replicate=2),
    Layout(tp=2, dp_replicate=2, dp_shard=2),
    Layout(tp=4, dp_shard=2),
    # pipelines, every schedule
    *(Layout(pp=2, schedule=name) for name in ("1f1b", "gpipe", "interleaved_1f1b")),
    *(Layout(pp=2, schedule=name) for name in ("interleaved_zero_bubble", "zbv")),
    *(Layout(pp=4, schedule=name) for name in ("1f1b", "gpipe", "interleaved_1f1b", "zbv")),
    Layout(pp=3, schedule="gpipe"),
    Layout(pp=2, schedule="interleaved_1f1b", virtual_stages=3),
    Layout(pp=2, schedule="interleaved_zero_bubble", virtual_stages=4),
    Layout(pp=8),
    # products
    *(Layout(pp=2, dp_shard=2, schedule=name) for name in ("1f1b", "interleaved_1f1b", "zbv")),
    Layout(pp=2, dp_shard=2, schedule="interleaved_zero_bubble", virtual_stages=4),
    Layout(pp=2, dp_replicate=2, schedule="zbv"),
    Layout(pp=2, dp_replicate=2, dp_shard=2, schedule="gpipe"),
    *(Layout(pp=2, tp=2, schedule=name) for name in ("1f1b", "interleaved_zero_bubble", "zbv")),
    Layout(pp=2, tp=2, sequence_parallel=False, schedule="gpipe"),
    Layout(pp=2, tp=4, schedule="interleaved_1f1b"),
    *(Layout(pp=2, tp=2, dp_shard=2, schedule=name) for name in ("1f1b", "interleaved_1f1b")),
    *(Layout(pp=2, tp=2, dp_shard=2, schedule=name) for name in ("interleaved_zero_bubble", "zbv")),
    # context parallel layouts belong here
]

# The normal run: each of these keeps several of the promises above.
FEW = [
    ("heterogeneous", Layout(tp=2, sequence_parallel=False)),
    ("homogeneous", Layout(tp=4)),
    ("heterogeneous", Layout(tp=2, dp_shard=2)),
    ("nanochat", Layout(dp_shard=2, shard="gradients")),
    ("heterogeneous", Layout(dp_replicate=2, dp_shard=2)),
    ("nemotron", Layout(pp=2, schedule="gpipe")),
    ("homogeneous", Layout(pp=4)),
    ("heterogeneous", Layout(pp=2, dp_shard=2, split=(0, 7))),
    ("heterogeneous", Layout(pp=2, tp=2, schedule="interleaved_1f1b")),
    ("heterogeneous", Layout(pp=2, dp_shard=2, schedule="interleaved_zero_bubble")),
    ("heterogeneous", Layout(pp=2, dp_shard=2, schedule="zbv")),
    ("nanochat", Layout(pp=2, tp=2, dp_shard=2, schedule="zbv")),
]


def case(spec: str, layout: Layout) -> Case:
    """The layout with several micro-batches per step, and at least as many as its ranks of pp."""
    fits = (n for n in (2, 1) if GLOBAL_BATCH // layout.dp // n >= max(2, layout.pp))
    return Case(spec, layout, micro_batch=next(fits, 1))


def possible(spec: str, layout: Layout) -> bool:
    try:
        check(
            layout,
            ALL[spec],
            seq_len=SEQ_LEN,
            global_batch=GLOBAL_BATCH,
            micro=case(spec, layout).micro_batch,
        )
    except LayoutError:
        return False
    return True


def pairs() -> list[tuple[str, Layout]]:
    """Every layout on the heterogeneous spec, if it can, and on the others in turn."""
    chosen = []
    for i, layout in enumerate(LAYOUTS):
        names = [name for name in ALL if possible(name, layout)]
        others = [name for name in names if name != "heterogeneous"]
        chosen += [(name, layout) for name in names if name == "heterogeneous"]
        chosen += [(others[i % len(others)], layout)] if others else []
    return chosen


@dataclass
class Piece:
    """A rank's box of a global tensor of the optimizer."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: Tensor


def train_and_collect(case: Case) -> tuple[list[tuple[float, float]], list[Piece]]:
    """(loss, gradient norm) of every step, and this rank's part of the optimizer's state."""
    trainer = make_trainer(case)
    steps = [trainer.step(samples(trainer, s), LEARNING_RATE) for s in range(STEPS)]
    pieces = [
        Piece(s.name, tuple(s.placed.shape), box(s.placed)[0], s.values.clone())
        for s in trainer.to_save()
        if s.name.startswith("optimizer/") and is_first_copy(s.placed) and s.values.numel()
    ]
    return steps, pieces


def whole(ranks: Iterable[list[Piece]]) -> dict[str, Tensor]:
    """The global tensors; what no rank holds is NaN, what two hold is an error."""
    out: dict[str, Tensor] = {}
    for piece in (p for pieces in ranks for p in pieces):
        tensor = out.setdefault(piece.name, torch.full(piece.shape, torch.nan))
        where = tuple(
            slice(o, o + n) for o, n in zip(piece.offset, piece.values.shape, strict=True)
        )
        assert tensor[where].isnan().all(), f"{piece.name} is held twice"
        tensor[where] = piece.values
    return out
