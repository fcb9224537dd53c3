"""What a layout refuses, and that what it accepts can be run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import (
    REDUCE_GRAD,
    RESHARD,
    UNSHARD,
    PipelineScheduleSingle,
    _simulate_comms_compute,
)

from bevatron.parallel.layout import SCHEDULES, Layout, LayoutError, check
from bevatron.parallel.pipeline import SCHEDULES as CLASSES
from bevatron.spec import Head
from tests.specs import HETEROGENEOUS, HOMOGENEOUS


def test_what_a_layout_refuses_names_the_valid_sizes() -> None:
    sizes = {"seq_len": 16, "global_batch": 8, "micro": 1}

    def refused(layout: Layout, match: str, **changed: Any) -> None:
        with pytest.raises(LayoutError, match=match):
            check(layout, HOMOGENEOUS, **{**sizes, **changed})

    refused(Layout(tp=3), "4 query heads, which tp=3 does not divide; use tp=1 or")
    refused(Layout(tp=2), "not a multiple of tp=2", seq_len=15)
    refused(Layout(dp_shard=3), "multiple of 3")
    refused(Layout(pp=4), "needs at least 4 micro-batches", global_batch=2)
    refused(Layout(shard="zero3"), "expected full or gradients")
    refused(Layout(pp=2, schedule="dualpipe"), "expected one of 1f1b, gpipe, interleaved_1f1b")
    refused(Layout(pp=2, virtual_stages=2), "expected always 1, or leave it out")
    refused(Layout(pp=2, schedule="zbv", virtual_stages=3), "expected always 2")
    refused(Layout(pp=4, schedule="interleaved_1f1b"), "use 8 or 10 per step", global_batch=9)
    zero_bubble = Layout(pp=2, schedule="interleaved_zero_bubble")
    refused(zero_bubble, "train.compile cannot be used", compiled=True)
    refused(zero_bubble, "recompute: selective cannot be used", recompute="selective")
    check(zero_bubble, HOMOGENEOUS, **sizes, recompute="full")
    with pytest.raises(LayoutError, match=r"layers\.2\.attention has 6 query heads"):
        check(Layout(tp=4), HETEROGENEOUS, **sizes)
    scorer = replace(HOMOGENEOUS, head=Head("sequence_classification", labels=("score",)))
    with pytest.raises(LayoutError, match="needs a model with a causal_lm head"):
        check(Layout(cp=2), scorer, **sizes)
    check(Layout(cp=2), scorer, **sizes, trained=False)  # as a reward model beside another one


@given(st.sampled_from(list(SCHEDULES)), st.integers(2, 6), st.integers(1, 4), st.integers(1, 30))
def test_torch_runs_every_schedule_that_a_layout_accepts(
    schedule: str, pp: int, virtual: int, count: int
) -> None:
    """torch builds it, gives every rank our stages, and its order of actions comes to an end."""
    layout = Layout(pp=pp, schedule=schedule)
    if schedule.startswith("interleaved"):
        layout = Layout(pp=pp, schedule=schedule, virtual_stages=virtual)
    try:
        check(layout, HOMOGENEOUS, seq_len=16, global_batch=count, micro=1)
    except LayoutError:
        assume(False)
    made: Any = CLASSES[schedule]
    for rank in range(pp):
        stages = [
            SimpleNamespace(
                num_stages=layout.num_stages,
                group_size=pp,
                group_rank=rank,
                stage_index=number,
                submod=None,
            )
            for number in layout.stages_of_rank(rank)
        ]
        if issubclass(made, PipelineScheduleSingle):
            made(stages[0], count, scale_grads=False)
            continue
        built = made(stages, count, scale_grads=False)
        mapping = built.stage_index_to_group_rank
        assert mapping == {s: layout.rank_of_stage(s) for s in range(layout.num_stages)}
        if rank == 0:
            comes_to_an_end(built, layout)


def comes_to_an_end(schedule: Any, layout: Layout) -> None:
    """torch's simulation, which raises if a rank waits for ever; it knows no sharding."""
    apart = (UNSHARD, RESHARD, REDUCE_GRAD)
    order = {
        rank: [a for a in actions if a.computation_type not in apart]
        for rank, actions in schedule.pipeline_order_with_comms.items()
    }
    _simulate_comms_compute(order, layout.rank_of_stage, layout.num_stages)
