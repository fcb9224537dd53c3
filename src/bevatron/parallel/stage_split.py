"""Which layers a pipeline stage gets: consecutive ones, balanced by time and memory, not by number.

A stage's time is what its layers compute for a token, forward and backward. Its memory is the state
of its parameters, and the activations of the micro-batches that its schedule keeps in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from bevatron.parallel.layout import Layout, LayoutError
from bevatron.parallel.memory_footprint import layer_activations
from bevatron.spec import ModelSpec
from bevatron.spec.count import layer_flops

# Stages may be slower than the best split's slowest by this share, if that balances memory.
TIME_SLACK = 0.02

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Load:
    """What a layer, the embedding or the head costs its stage.

    Attributes:
        time: FLOPs per token, forward and backward.
        state: bytes that are always there.
        activations: bytes that a micro-batch keeps from its forward to its backward.
    """

    time: float
    state: float = 0.0
    activations: float = 0.0


NOTHING = Load(0.0)


def stage_ranges(
    spec: ModelSpec, layout: Layout, seq_len: int, *, micro_batch: int, recompute: str
) -> list[range]:
    """Layers of every stage in model order, as the user wrote them or as `split` balances them."""
    if layout.split is not None:
        return given(layout.split, len(spec.layers), layout.num_stages)
    tokens = micro_batch * seq_len
    layers = [
        layer_load(spec, i, layout, seq_len, tokens, recompute) for i in range(len(spec.layers))
    ]
    first, last = end_loads(spec, layout, tokens)
    return split(layers, layout.num_stages, first=first, last=last, in_flight=in_flight(layout))


def split(
    layers: Sequence[Load],
    stages: int,
    *,
    first: Load = NOTHING,
    last: Load = NOTHING,
    in_flight: Sequence[float] | None = None,
) -> list[range]:
    """Cut `layers` into `stages` contiguous ranges, which may be empty: every layer in exactly one.

    The objective, in this order, each exactly (dynamic programming, O(stages * layers^2)):
    1. The slowest stage is at most TIME_SLACK slower than it is in the split where it is fastest.
    2. Among those splits, the stage with the most memory has the least.
    3. Among those, the sum of the squares of the stages' times is least.

    An interleaved schedule runs several stages on a rank: balanced stages bound a rank's sum.

    Args:
        first, last: of the embedding and of the head, which the outer stages have besides.
        in_flight: for each stage, how many micro-batches it keeps (1 each if absent).
    """
    flights = in_flight or [1.0] * stages
    besides = [NOTHING] * stages
    besides[0] = first
    besides[-1] = _plus(besides[-1], last)
    # Filling each stage up to the average overshoots by less than a layer: a bound of the optimum.
    each = [x.time for x in layers]
    bound = sum(each) / stages + max(each, default=0.0) + max(first.time, last.time)
    begins = _begins(each, bound * (1 + TIME_SLACK))
    times, states, kept = (
        _sums([getattr(x, name) for x in layers], begins)
        for name in ("time", "state", "activations")
    )

    def time(stage: int) -> Table:
        return times + besides[stage].time

    def memory(stage: int) -> Table:
        more = besides[stage]
        return states + more.state + flights[stage] * (kept + more.activations)

    # best[end]: of the stages so far over the first `end` layers.
    best = nothing_yet = np.array([0.0] + [np.inf] * len(layers))
    for stage in range(stages):
        best = np.maximum(best[begins], time(stage)).min(1)
    limit = best[-1] * (1 + TIME_SLACK)

    best = nothing_yet
    for stage in range(stages):
        allowed = np.where(time(stage) <= limit, memory(stage), np.inf)
        best = np.maximum(best[begins], allowed).min(1)
    ceiling = best[-1]

    best, cuts = nothing_yet, []
    for stage in range(stages):
        allowed = (time(stage) <= limit) & (memory(stage) <= ceiling)
        options = best[begins] + np.where(allowed, time(stage) ** 2, np.inf)
        cuts.append(options.argmin(1))
        best = options.min(1)

    bounds = [len(layers)]
    for cut in reversed(cuts):
        bounds.append(bounds[-1] - int(cut[bounds[-1]]))
    return [range(a, b) for a, b in pairwise(reversed(bounds))]


def _begins(times: Sequence[float], limit: float) -> NDArray[np.int64]:
    """[end, k] -> end - k, where a stage that ends at `end` may begin: for every k that some stage
    can have within the limit. Negative where there are fewer layers."""
    totals = np.concatenate(([0.0], np.cumsum(times)))
    ends = np.arange(len(totals))
    longest = int((ends - np.searchsorted(totals, totals - limit * (1 + 1e-9))).max())
    return ends[:, None] - np.arange(longest + 1)[None, :]


def _sums(values: Sequence[float], begins: NDArray[np.int64]) -> Table:
    """[end, k] -> the sum of values[end - k : end]; infinite where that begins before 0."""
    totals = np.concatenate(([0.0], np.cumsum(values)))
    return np.where(begins >= 0, totals[:, None] - totals[begins], np.inf)


def _plus(a: Load, b: Load) -> Load:
    return Load(a.time + b.time, a.state + b.state, a.activations + b.activations)


def layer_load(
    spec: ModelSpec, index: int, layout: Layout, seq_len: int, tokens: int, recompute: str
) -> Load:
    """Of one layer, with causal attention over `seq_len`, for micro-batches of `tokens` tokens.

    Recomputing everything adds a forward; recomputing selectively multiplies nothing again."""
    forward = layer_cost(spec, index, seq_len)
    again = forward if recompute == "full" else 0.0
    numel = sum(p.numel for p in spec.layer_parameters(index))
    kept = layer_activations(spec, index, layout, 2, recompute) * tokens / layout.cp
    return Load(3 * forward + again, _state_bytes(numel, layout), kept)


def end_loads(spec: ModelSpec, layout: Layout, tokens: int) -> tuple[Load, Load]:
    """Of the embedding and of the head. A lookup multiplies nothing: it counts one operation per
    element. The chunked loss keeps its two gradients: the hidden states' for every micro-batch."""
    h, rows = spec.hidden_size, spec.head_rows
    embedding = Load(3.0 * h, _state_bytes(spec.vocab_size * h, layout))
    per_token = 2 * 3 * h / (layout.tp * layout.cp)  # norm input, hidden states, their gradient
    head = Load(6.0 * rows * h, _state_bytes(rows * h, layout), per_token * tokens)
    return embedding, head


def layer_cost(spec: ModelSpec, index: int, seq_len: int) -> float:
    """Forward FLOPs per token of one layer, with causal attention over `seq_len`."""
    return layer_flops(spec, index, seq_len, causal=True)


def _state_bytes(numel: int, layout: Layout) -> float:
    """Sharded fp32 master, gradient and two moments; under a pipeline the gathered bf16 parameter
    and its gradient, accumulated in fp32, besides."""
    return numel / layout.tp * (16 / layout.dp_shard + 6)


def in_flight(layout: Layout) -> list[float]:
    """For each stage, how many micro-batches it has run forward and not yet backward, at most.

    An interleaved rank's number is spread evenly over its stages; gpipe keeps all micro-batches at
    every stage, for which as many as there are stages stand here."""
    pp, v = layout.pp, layout.stages_per_rank
    ranks = [layout.rank_of_stage(stage) for stage in range(layout.num_stages)]
    if layout.schedule == "1f1b":
        return [float(pp - r) for r in ranks]
    if layout.schedule in ("interleaved_1f1b", "interleaved_zero_bubble"):
        per_hop = 2 if layout.schedule == "interleaved_1f1b" else 1
        return [((v - 1) * pp + per_hop * (pp - 1 - r) + 1) / v for r in ranks]
    return [float(pp)] * layout.num_stages


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
