"""Stages are balanced by cost, and every layer is in exactly one."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement, pairwise

import pytest

from bevatron.parallel.layout import Layout, LayoutError, check, check_documents
from bevatron.parallel.split import given, split
from bevatron.spec import Head, Rope
from tests.specs import HETEROGENEOUS, HOMOGENEOUS


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("costs", [[1.0] * 6, [0, 0, 9, 1, 0, 4, 4], [5.0], [3, 1, 4, 1, 5, 9, 2]])
def test_the_split_is_optimal_and_complete(costs: list[float], stages: int) -> None:
    ranges = split(costs, stages, first=0.5, last=2.0)
    assert [i for r in ranges for i in r] == list(range(len(costs)))

    def worst(bounds: tuple[int, ...]) -> float:
        edges = [0, *bounds, len(costs)]
        loads = [sum(costs[a:b]) for a, b in pairwise(edges)]
        loads[0] += 0.5
        loads[-1] += 2.0
        return max(loads)

    cuts = [r.stop for r in ranges[:-1]]
    choices = combinations_with_replacement(range(len(costs) + 1), stages - 1)
    assert worst(tuple(cuts)) == min(worst(c) for c in choices)


def test_a_written_split_must_fit() -> None:
    assert given([0, 3, 1], 4, 3) == [range(0), range(3), range(3, 4)]
    with pytest.raises(LayoutError, match="add up to 4 layers"):
        given([2, 1], 4, 2)


def test_what_a_layout_refuses_names_the_valid_sizes() -> None:
    sizes = {"seq_len": 16, "global_batch": 8, "micro": 1}
    with pytest.raises(LayoutError, match="4 query heads, which tp=3 does not divide; use tp=1 or"):
        check(Layout(tp=3), HOMOGENEOUS, **sizes)
    with pytest.raises(LayoutError, match=r"layers\.2\.attention has 6 query heads"):
        check(Layout(tp=4), HETEROGENEOUS, **sizes)
    with pytest.raises(LayoutError, match="not a multiple of tp=2"):
        check(Layout(tp=2), HOMOGENEOUS, seq_len=15, global_batch=8, micro=1)
    with pytest.raises(LayoutError, match="multiple of 3"):
        check(Layout(dp_shard=3), HOMOGENEOUS, **sizes)
    with pytest.raises(LayoutError, match="needs at least 4 micro-batches"):
        check(Layout(pp=4), HOMOGENEOUS, seq_len=16, global_batch=2, micro=1)
    with pytest.raises(LayoutError, match=r"not a multiple of 32 \(2 x cp 4 x tp 4\).* use 32 or"):
        check(Layout(cp=4, tp=4), HOMOGENEOUS, seq_len=48, global_batch=8, micro=1)
    with pytest.raises(LayoutError, match=r"seq_len=18 is not a multiple of 4 \(2 x cp 2\)"):
        check(Layout(cp=2), HOMOGENEOUS, seq_len=18, global_batch=8, micro=1)
    with pytest.raises(LayoutError, match="cp=2 needs a model with a causal_lm head"):
        check(Layout(cp=2), replace(HOMOGENEOUS, head=Head("none")), **sizes)
    dynamic = Rope(kind="dynamic", factor=2.0, original_max_position_embeddings=16)
    check_documents(replace(HOMOGENEOUS, rope=dynamic), 16)
    with pytest.raises(LayoutError, match=r"data\.seq_len: 16 or no document mask"):
        check_documents(replace(HOMOGENEOUS, rope=dynamic), 17)
