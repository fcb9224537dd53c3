"""Which channels, heads and neurons pruning keeps: rows and columns of every parameter.

Only indices are computed here; no weights are read. The rules are those of Minitron (arXiv
2407.14679) and its implementations: the whole residual stream keeps one set of hidden channels;
each layer keeps its own neurons and its own query heads, the same number in every KV group; keys,
values, head_dim, vocabulary and rotation do not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bevatron.bridge.assemble import PAD, Bits, Change, Cut, Index
from bevatron.compress.importance_scores import Scores, units_name
from bevatron.compress.prune_targets import PruneError
from bevatron.compress.pruned_spec import Shape
from bevatron.spec import Attention, ModelSpec, ParameterSpec, Sublayer

MERGES = ("none", "residual", "sum")
Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Kept:
    """What stays of a model, as indices into it.

    Attributes:
        hidden: channels of the residual stream.
        layers: by the new layer's number the old one's.
        units: likewise, of each of its sublayers that has some, group by group: query heads of an
            `attention`, neurons of an `mlp`. They may end with PADs.
        pairs: per new layer (kept head, dropped head of the same group) for merging.
    """

    hidden: Index
    layers: tuple[int, ...]
    units: tuple[Mapping[str, Index], ...]
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
    units: list[dict[str, Index]] = []
    pairs: list[Pairs] = []
    for i, layer in zip(shape.layers, shape.spec.layers, strict=True):
        kept: dict[str, Index] = {}
        merged: Pairs = ()
        before = dict(spec.layers[i].present)
        for place, new in layer.present:
            old = before.get(place)
            if old is None or not old.units or not new.units:
                continue
            values = scores.tensors[units_name(i, place, old)] if scores else None
            per_group, stay = (s.units // s.unit_groups for s in (old, new))
            parts = []
            for first in range(0, old.units, per_group):
                own = values[first : first + per_group] if values is not None else None
                parts.append(top(own, per_group, stay) + first)
                if own is not None and old.unit == "heads":
                    merged += _pairs(own, stay, first)
            kept[place] = np.concatenate(parts)
        units.append(kept)
        pairs.append(merged)
    return Kept(hidden, shape.layers, tuple(units), tuple(pairs))


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
    first, *others = parameter.name.split(".")
    hidden = _unless_all(kept.hidden, spec.hidden_size)
    index: list[Index | None] = [hidden if a == "hidden" else None for a in parameter.axes]
    if first != "layers":
        return Cut(parameter.name, tuple(index))
    new, place, name = int(others[0]), others[1], ".".join(others[2:])
    source, layer = source_of(kept.layers, parameter.name), spec.layers[kept.layers[new]]
    old = dict(layer.present).get(place)  # None for a norm
    if old is None or (units := kept.units[new].get(place)) is None:
        return Cut(source, tuple(index))
    if _unless_all(units, old.units) is not None:
        [before] = [p for p in old.parameters("", spec.hidden_size) if p.name == f".{name}"]
        for dim, axis in enumerate(parameter.axes):
            if axis == "units":
                index[dim] = unit_rows(old, before, dim, units)
    change = None
    if isinstance(old, Attention):
        change = _merge(merge_heads, name, old, kept.pairs[new])
    return Cut(source, tuple(index), change)


def _unless_all(index: Index, size: int) -> Index | None:
    return None if len(index) == size and np.array_equal(index, np.arange(size)) else index


def unit_rows(sublayer: Sublayer, parameter: ParameterSpec, dim: int, units: Index) -> Index:
    """Entries of a dimension of an old parameter that belong to these units (as many in each group,
    group by group). Where other matrices lie behind the units of each group, as keys and values do,
    these stay."""
    width, (groups, rows) = sublayer.unit_width, parameter.fused or (1, ())
    if groups * sum(rows) != parameter.shape[dim]:  # no others lie in this dimension
        groups, rows = 1, (parameter.shape[dim],)
    start = np.arange(groups)[:, None] * sum(rows)
    local = units.reshape(groups, -1)
    first = np.where(local == PAD, PAD, start + local % (rows[0] // width) * width)[..., None]
    own = np.where(first == PAD, PAD, first + np.arange(width)).reshape(groups, -1)
    behind = start + np.arange(rows[0], sum(rows))
    return np.concatenate([own, behind], axis=1).reshape(-1)


def query_rows(attention: Attention, head: int) -> slice:
    """Where a query head lies in the fused matrix: [group][q heads, k, v][head_dim]."""
    q, d = attention.queries_per_group, attention.head_dim
    start = (head // q * (q + 2) + head % q) * d
    return slice(start, start + d)


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
