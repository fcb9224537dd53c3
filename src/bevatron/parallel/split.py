"""Which layers a pipeline stage gets: contiguous, balanced by cost rather than by count."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from bevatron.parallel.layout import LayoutError
from bevatron.spec import ModelSpec
from bevatron.spec.count import layer_flops


def split(
    costs: Sequence[float], stages: int, first: float = 0.0, last: float = 0.0
) -> list[range]:
    """Cut `costs` (one per layer) into `stages` contiguous ranges with the least maximal cost.

    `first` and `last` are the costs of the embedding and of the head. Stages may be empty of
    layers. Exact, by dynamic programming; ties go to the split that fills early stages most evenly.
    """
    n = len(costs)
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)

    def load(stage: int, begin: int, end: int) -> float:
        extra = (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)
        return total[end] - total[begin] + extra

    # best[s][e]: (maximal cost, sum of squares) of the first s + 1 stages over the first e layers
    best = [[(load(0, 0, e), load(0, 0, e) ** 2) for e in range(n + 1)]]
    cut: list[list[int]] = []
    for stage in range(1, stages):
        row, where = [], []
        for end in range(n + 1):
            options = []
            for begin in range(end + 1):
                worst, squares = best[-1][begin]
                own = load(stage, begin, end)
                options.append((max(worst, own), squares + own * own, begin))
            choice = min(options)
            row.append(choice[:2])
            where.append(choice[2])
        best.append(row)
        cut.append(where)
    bounds = [n]
    for where in reversed(cut):
        bounds.append(where[bounds[-1]])
    bounds.append(0)
    bounds.reverse()
    return [range(a, b) for a, b in pairwise(bounds)]


def layer_cost(spec: ModelSpec, index: int, seq_len: int) -> float:
    """Forward FLOPs per token of one layer, with causal attention over `seq_len`."""
    return layer_flops(spec, index, seq_len, causal=True)


def given(counts: Sequence[int], layers: int, stages: int) -> list[range]:
    """The split that a user wrote as layers per stage."""
    if len(counts) != stages or sum(counts) != layers or min(counts) < 0:
        raise LayoutError(
            f"parallel.split {list(counts)} must have {stages} entries (one per stage) that add "
            f"up to {layers} layers"
        )
    ranges, at = [], 0
    for count in counts:
        ranges.append(range(at, at + count))
        at += count
    return ranges
