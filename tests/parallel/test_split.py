"""Stages are balanced by cost, and every layer is in exactly one."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given as given_any
from hypothesis import strategies as st

from bevatron.parallel.layout import SCHEDULES, Layout, LayoutError, check, check_documents
from bevatron.parallel.stage_split import TIME_SLACK, Load, given, in_flight, split, stage_ranges
from bevatron.spec import Head, LayerSpec, ModelSpec, Rope
from tests.specs import HETEROGENEOUS, HOMOGENEOUS

COSTS = st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.5, 7.0]) | st.floats(0, 1e15)
LOADS = st.builds(Load, COSTS, COSTS, COSTS)


def loads(
    ranges: list[range], layers: list[Load], first: Load, last: Load, flights: list[float]
) -> tuple[list[float], list[float]]:
    """Time and memory of every stage."""
    times, memories = [], []
    for number, stage in enumerate(ranges):
        parts = [layers[i] for i in stage]
        parts += [first] if number == 0 else []
        parts += [last] if number == len(ranges) - 1 else []
        times.append(sum(p.time for p in parts))
        kept = flights[number] * sum(p.activations for p in parts)
        memories.append(kept + sum(p.state for p in parts))
    return times, memories


@given_any(st.lists(LOADS, max_size=7), st.integers(1, 5), LOADS, LOADS)
def test_the_split_is_what_its_docstring_says(
    layers: list[Load], stages: int, first: Load, last: Load
) -> None:
    """Against all splits there are; the relative 1e-9 is for the order of sums."""
    flights = [float(stages - s) for s in range(stages)]
    every = []
    for cuts in combinations_with_replacement(range(len(layers) + 1), stages - 1):
        ranges = [range(a, b) for a, b in pairwise([0, *cuts, len(layers)])]
        every.append(loads(ranges, layers, first, last, flights))
    limit = min(max(times) for times, _ in every) * (1 + TIME_SLACK)
    least = min(max(m) for t, m in every if max(t) <= limit * (1 - 1e-9) or max(t) == 0)
    ranges = split(layers, stages, first=first, last=last, in_flight=flights)
    assert [i for r in ranges for i in r] == list(range(len(layers)))
    times, memories = loads(ranges, layers, first, last, flights)
    assert max(times) <= limit * (1 + 1e-9)
    assert max(memories) <= least * (1 + 1e-9)


@given_any(st.lists(COSTS, max_size=130), st.integers(1, 20))
def test_every_layer_is_in_exactly_one_stage(times: list[float], stages: int) -> None:
    """126 layers on 16 stages, 30 on 4, more stages than layers, runs of layers without cost."""
    ranges = split([Load(t, t, 1.0) for t in times], stages)
    assert len(ranges) == stages
    assert [i for r in ranges for i in r] == list(range(len(times)))


@pytest.mark.parametrize(("layers", "stages"), [(126, 16), (30, 4), (500, 64), (3, 8), (80, 80)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_layers_of_one_kind_are_spread_evenly(layers: int, stages: int, schedule: str) -> None:
    """To one layer, the head and its weight in memory apart, with runs of empty layers inside."""
    full = HOMOGENEOUS.layers[0]
    spec = replace(HOMOGENEOUS, layers=(full,) * layers)
    layout = Layout(pp=stages // SCHEDULES[schedule], schedule=schedule)
    ranges = stage_ranges(spec, layout, 64, micro_batch=1, recompute="none")
    assert [i for r in ranges for i in r] == list(range(layers))
    assert max(len(r) for r in ranges) <= -(-layers // stages) + 1

    holes = replace(spec, layers=(*spec.layers, *([LayerSpec()] * 40), *spec.layers[:2]))
    ranges = stage_ranges(holes, layout, 64, micro_batch=1, recompute="none")
    assert [i for r in ranges for i in r] == list(range(layers + 42))


def test_the_head_counts_and_so_do_activations_in_flight() -> None:
    """A vocabulary as dear as several layers leaves the last stage fewer; the first stage, which
    keeps the most micro-batches, does not get more than the second."""
    spec: ModelSpec = replace(HOMOGENEOUS, layers=HOMOGENEOUS.layers * 8, vocab_size=1024)
    layout = Layout(pp=4)
    counts = [len(r) for r in stage_ranges(spec, layout, 64, micro_batch=1, recompute="none")]
    assert counts[-1] < min(counts[:-1])
    assert counts[0] <= counts[1]
    assert in_flight(layout) == [4, 3, 2, 1]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_heterogeneous_model_is_split_at_any_recomputation(recompute: str) -> None:
    layout = Layout(pp=2, schedule="zbv")
    ranges = stage_ranges(HETEROGENEOUS, layout, 64, micro_batch=2, recompute=recompute)
    assert [i for r in ranges for i in r] == list(range(7))


def test_a_written_split_must_fit() -> None:
    assert given([0, 3, 1], 4, 3) == [range(0), range(3), range(3, 4)]
    with pytest.raises(LayoutError, match="add up to 4 layers"):
        given([2, 1], 4, 2)
    layout = Layout(pp=2, schedule="interleaved_1f1b", split=(2, 2))
    with pytest.raises(LayoutError, match="must have 4 entries"):
        stage_ranges(HOMOGENEOUS, layout, 64, micro_batch=1, recompute="none")


def test_context_parallel_and_documents_refuse_what_they_cannot_do() -> None:
    sizes = {"seq_len": 16, "global_batch": 8, "micro": 1}
    with pytest.raises(LayoutError, match=r"not a multiple of 32 \(2 x cp 4 x tp 4\).* use 32 or"):
        check(Layout(cp=4, tp=4), HOMOGENEOUS, seq_len=48, global_batch=8, micro=1)
    with pytest.raises(LayoutError, match=r"seq_len=18 is not a multiple of 4 \(2 x cp 2\)"):
        check(Layout(cp=2), HOMOGENEOUS, seq_len=18, global_batch=8, micro=1)
    with pytest.raises(LayoutError, match="cp=2 needs a model with a causal_lm head"):
        check(Layout(cp=2), replace(HOMOGENEOUS, head=Head("none")), **sizes)
    dynamic = Rope(kind="dynamic", factor=2.0, original_max_position_embeddings=16)
    check_documents(replace(HOMOGENEOUS, rope=dynamic), 16)
    with pytest.raises(LayoutError, match=r"data\.seq_len: 16, or drop data\.document_mask"):
        check_documents(replace(HOMOGENEOUS, rope=dynamic), 17)
