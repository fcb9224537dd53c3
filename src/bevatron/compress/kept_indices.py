"""Which channels, heads and neurons stay, and which rows and columns of every parameter that means.

Index logic alone: no weights are read here. The rules are those of Minitron (arXiv 2407.14679) and
its implementations: one set of hidden channels for the whole residual stream; per layer its own
neurons, and its own query heads, as many in every KV group; keys, values, head_dim, vocabulary and
rotation are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bevatron.bridge.assemble import PAD, Bits, Change, Cut, Index
from bevatron.compress.importance_scores import Scores
from bevatron.compress.prune_targets import PruneError
from bevatron.compress.pruned_spec import Shape
from bevatron.spec import MLP, Attention, ModelSpec, ParameterSpec

MERGES = ("none", "residual", "sum")
Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Kept:
    """What stays of a model, as indices into it.

    Attributes:
        hidden: channels of the residual stream.
        layers: by the new layer's number the old one's; `heads`, `neurons`: likewise, None where
            there are none. Neurons may end with PADs. Heads are those of queries, group by group.
        pairs: per new layer (kept head, dropped head of the same group) for merging.
    """

    hidden: Index
    layers: tuple[int, ...]
    heads: tuple[Index | None, ...]
    neurons: tuple[Index | None, ...]
    pairs: tuple[Pairs, ...]


def keep(spec: ModelSpec, shape: Shape, scores: Scores | None, *, ranked: bool = False) -> Kept:
    """The kept sets that `shape` asks for, highest scores first to stay.

    Args:
        scores: may be None if no width changes.
        ranked: in order of importance instead of the old order, also where all stay. What the
            model computes is the same.
    Raises PruneError if scores are needed and absent.
    """

    def top(values: NDArray[np.float32] | None, size: int, count: int) -> Index:
        if count > size:  # as many zeros more
            pad = np.full(count - size, PAD)
            return np.concatenate([top(values, size, size), pad])
        if values is None:
            if count == size:
                return np.arange(size)
            raise PruneError(
                "pruning widths needs to know what matters: give --data, a token store to measure "
                "it on, or --scores, a file of `bevatron importance`"
            )
        order = np.argsort(-values, kind="stable")[:count]
        return order if ranked else np.sort(order)

    channels = scores.channels if scores else None
    hidden = top(channels, spec.hidden_size, shape.spec.hidden_size)
    heads: list[Index | None] = []
    neurons: list[Index | None] = []
    pairs: list[Pairs] = []
    for i, layer in zip(shape.layers, shape.spec.layers, strict=True):
        old = spec.layers[i]
        kept: Index | None = None
        merged: Pairs = ()
        if isinstance(layer.attention, Attention) and isinstance(old.attention, Attention):
            values = scores.heads(i) if scores else None
            per_group, stay = old.attention.queries_per_group, layer.attention.queries_per_group
            parts = []
            for first in range(0, old.attention.num_attention_heads, per_group):
                own = values[first : first + per_group] if values is not None else None
                parts.append(top(own, per_group, stay) + first)
                if own is not None:
                    merged += _pairs(own, stay, first)
            kept = np.concatenate(parts)
        heads.append(kept)
        pairs.append(merged)
        width = None
        if isinstance(layer.mlp, MLP) and isinstance(old.mlp, MLP):
            values = scores.neurons(i) if scores else None
            width = top(values, old.mlp.intermediate_size, layer.mlp.intermediate_size)
        neurons.append(width)
    return Kept(hidden, shape.layers, tuple(heads), tuple(neurons), tuple(pairs))


def _pairs(values: NDArray[np.float32], stay: int, first: int) -> Pairs:
    """(kept, dropped) heads of a group: the least important survivor with the most important of
    those that go, and so on outwards; from the start again where more go than stay."""
    order = [int(i) + first for i in np.argsort(-values, kind="stable")]
    dropped = order[stay:]
    return tuple((order[stay - 1 - r % stay], head) for r, head in enumerate(dropped))


def source_of(layers: tuple[int, ...], name: str) -> str:
    """The old name of a parameter of the result, given which layers stayed."""
    parts = name.split(".")
    if parts[0] == "layers":
        parts[1] = str(layers[int(parts[1])])
    return ".".join(parts)


def cut(spec: ModelSpec, kept: Kept, merge_heads: str, parameter: ParameterSpec) -> Cut:
    """How a parameter of the result is cut out of the model `spec`.

    Args:
        merge_heads: what becomes of dropped heads, one of MERGES; see `_merge`."""
    parts = parameter.name.split(".")
    h = _unless_all(kept.hidden, spec.hidden_size)
    if parts[0] != "layers":
        return Cut(parameter.name, _outer(parameter, h))
    new = int(parts[1])
    old = kept.layers[new]
    layer, part, kind = spec.layers[old], ".".join(parts[2:-1]), parts[-1]
    source = source_of(kept.layers, parameter.name)
    f = q = rows = None
    if (neurons := kept.neurons[new]) is not None and isinstance(layer.mlp, MLP):
        f = _unless_all(neurons, layer.mlp.intermediate_size)
    if (heads := kept.heads[new]) is not None and isinstance(layer.attention, Attention):
        heads_ = _unless_all(heads, layer.attention.num_attention_heads)
        if heads_ is not None:
            q = _spread(heads_, layer.attention.head_dim)
            rows = qkv_rows(layer.attention, heads_)
    index: dict[str, tuple[Index | None, ...]] = {
        "attention.qkv": (rows, h),
        "attention.o": (h, q),
        "attention.linear": (h, h),
        "attention_norm": (h,),
        "mlp_norm": (h,),
        "mlp.gate_up": (None, f, h),
        "mlp.up": (f, h),
        "mlp.down": (h, f),
        "mlp.linear": (h, h),
    }
    found = index[part]
    change = None
    if isinstance(layer.attention, Attention) and part in ("attention.qkv", "attention.o"):
        change = _merge(merge_heads, f"{part[10:]}.{kind}", layer.attention, kept.pairs[new])
    is_matrix = kind == "weight" and not part.endswith("norm")
    return Cut(source, found if is_matrix or part.endswith("norm") else found[:-1], change)


def _outer(parameter: ParameterSpec, h: Index | None) -> tuple[Index | None, ...]:
    """Of parameters outside of layers: embedding and heads [rows, hidden], the final norm [hidden],
    the bias of a head [rows]."""
    if parameter.role == "bias":
        return (None,)
    return (h,) if parameter.role == "norm" else (None, h)


def _unless_all(index: Index, size: int) -> Index | None:
    return None if len(index) == size and np.array_equal(index, np.arange(size)) else index


def _spread(heads: Index, head_dim: int) -> Index:
    """Rows (or columns) of these heads."""
    spread: Index = (heads[:, None] * head_dim + np.arange(head_dim)).reshape(-1)
    return spread


def query_rows(attention: Attention, head: int) -> slice:
    """Where a query head lies in the fused matrix: [group][q heads, k, v][head_dim]."""
    q, d = attention.queries_per_group, attention.head_dim
    start = (head // q * (q + 2) + head % q) * d
    return slice(start, start + d)


def qkv_rows(attention: Attention, heads: Index) -> Index:
    """Rows of the fused matrix for these query heads (as many in each group, group by group) and
    all keys and values."""
    groups, q = attention.num_key_value_heads, attention.queries_per_group
    local = heads.reshape(groups, -1) % q
    both = np.broadcast_to([q, q + 1], (groups, 2))
    slots = np.concatenate([local, both], axis=1) + np.arange(groups)[:, None] * (q + 2)
    return _spread(slots.reshape(-1), attention.head_dim)


def _merge(mode: str, part: str, attention: Attention, pairs: Pairs) -> Change | None:
    """What merging dropped heads into kept ones does to a tensor of the attention.

    Args:
        mode: `residual`, Minitron's (arXiv 2407.14679, section 2.3): the query rows of a survivor
            become twice its own less those of the head that it is paired with. `sum`: the output
            columns of a dropped head are added to those of the survivor, as if the two computed
            the same.
        part: of the attention, such as `qkv.bias`.
    Raises PruneError for `residual` where fewer than half of the heads stay.
    """
    merged = {"none": (), "residual": ("qkv.weight", "qkv.bias"), "sum": ("o.weight",)}
    if not pairs or part not in merged[mode]:
        return None
    if mode == "residual" and len({kept for kept, _ in pairs}) < len(pairs):
        raise PruneError(
            "--merge-heads residual is defined only where at least half of the heads of a group "
            "stay; keep more heads, or use sum"
        )
    d = attention.head_dim

    def residual(values: Bits) -> Bits:
        new = values.copy()
        for kept, dropped in pairs:
            rows = query_rows(attention, kept)
            new[rows] = 2 * values[rows] - values[query_rows(attention, dropped)]
        return new

    def add(values: Bits) -> Bits:
        new = values.copy()
        for kept, dropped in pairs:
            new[:, kept * d : (kept + 1) * d] += values[:, dropped * d : (dropped + 1) * d]
        return new

    return residual if mode == "residual" else add
