"""From what a user asks for to the spec of the pruned model: which layers stay, how wide each is.

No weights and no torch: counts are exact before anything is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bevatron.compress.importance_scores import Scores
from bevatron.errors import BevatronError
from bevatron.spec import MLP, Attention, ModelSpec

DEPTH_BY = ("influence", "loss", "span")


class PruneError(BevatronError):
    """Sizes that the model cannot be pruned to."""


@dataclass(frozen=True)
class LayerTarget:
    """Sizes of one layer; None leaves one as the other options have it."""

    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    no_attention: bool = False
    no_mlp: bool = False


@dataclass(frozen=True)
class Targets:
    """What is asked for; None leaves an axis as it is.

    Attributes:
        num_layers: how many stay; `depth_by`: which ones, one of DEPTH_BY.
        drop_layers: which ones go, counted from 0.
        parameters: of the result; the widths that are not given are chosen to meet it.
        per_layer: by the layer's index in the model that is pruned.
        multiple: of chosen widths.
    """

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    drop_layers: tuple[int, ...] = ()
    parameters: int | None = None
    per_layer: Mapping[int, LayerTarget] = field(default_factory=dict)
    multiple: int = 64
    depth_by: str = "influence"


@dataclass(frozen=True)
class Shape:
    """The result: indices of the layers that stay, and the spec that is made of them."""

    layers: tuple[int, ...]
    spec: ModelSpec
    notes: tuple[str, ...] = ()


def kept_layers(spec: ModelSpec, targets: Targets, scores: Scores | None) -> tuple[int, ...]:
    count = len(spec.layers)
    if targets.drop_layers:
        wrong = [i for i in targets.drop_layers if not 0 <= i < count]
        if wrong:
            raise PruneError(
                f"--drop-layers names layer {wrong[0]}, the model has layers 0 to {count - 1}"
            )
        kept = tuple(i for i in range(count) if i not in targets.drop_layers)
        if not kept:
            raise PruneError(f"--drop-layers names all {count} layers; leave at least one")
        if targets.num_layers not in (None, len(kept)):
            raise PruneError(
                f"--drop-layers leaves {len(kept)} layers, but --num-layers is "
                f"{targets.num_layers}; give one of the two"
            )
        return kept
    keep = targets.num_layers
    if keep is None or keep == count:
        return tuple(range(count))
    if not 1 <= keep <= count:
        raise PruneError(f"--num-layers is {keep}, expected 1 to {count}, as many as there are")
    if scores is None:
        raise PruneError(
            "--num-layers needs to know which layers matter: give --data or --scores, or name "
            "the ones that go with --drop-layers"
        )
    return layers_to_keep(scores, count, keep, targets.depth_by)


def layers_to_keep(scores: Scores, count: int, keep: int, by: str) -> tuple[int, ...]:
    """Which layers stay.

    Args:
        by: `influence` drops those that change the residual stream least; `loss` those without
            which the loss is lowest, each left out alone; `span` neighbours: by the loss without
            all of them if it was measured, else by the sum of their influence.
    """
    number = count - keep
    values = scores.block_influence
    if by == "loss":
        losses = scores.loss_without(1)
        if losses is None:
            raise PruneError(
                "the scores hold no loss without each layer; measure them with it (see "
                "`bevatron importance --help`), or choose layers by influence or span"
            )
        values = losses
    if by == "span":
        losses = scores.loss_without(number)
        if losses is None:
            losses = np.convolve(values.astype("f8"), np.ones(number), "valid").astype("f4")
        start = int(np.argmin(losses))
        dropped = set(range(start, start + number))
    else:
        dropped = {int(i) for i in np.argsort(values, kind="stable")[:number]}
    return tuple(i for i in range(count) if i not in dropped)


def check_sizes(spec: ModelSpec, targets: Targets, layers: Sequence[int]) -> None:
    """Refuse sizes that are larger than the model's or cannot be shared out among its groups."""
    if targets.multiple < 1:
        raise PruneError(f"--multiple is {targets.multiple}, expected at least 1")
    _fits("--hidden-size", targets.hidden_size, spec.hidden_size)
    widest = max(mlp_widths(spec, layers), default=0)
    _fits("--intermediate-size", targets.intermediate_size, widest)
    most = max((a.num_attention_heads for _, a in attentions(spec, layers)), default=0)
    _fits("--num-attention-heads", targets.num_attention_heads, most)
    for i, attention in attentions(spec, layers):
        _groups(i, attention, targets.num_attention_heads)
    for i, target in targets.per_layer.items():
        where = f"per-layer sizes, layer {i}"
        if i not in layers:
            what = "is dropped" if 0 <= i < len(spec.layers) else "does not exist"
            raise PruneError(f"{where}: {what}; the layers that stay are {ranges(layers)}")
        layer = spec.layers[i]
        if target.intermediate_size is not None:
            own = layer.mlp.intermediate_size if isinstance(layer.mlp, MLP) else 0
            _fits(f"{where}: intermediate_size", target.intermediate_size, own)
        if target.num_attention_heads is not None:
            attention_ = layer.attention
            heads = attention_.num_attention_heads if isinstance(attention_, Attention) else 0
            _fits(f"{where}: num_attention_heads", target.num_attention_heads, heads)
            assert isinstance(attention_, Attention)
            _groups(i, attention_, target.num_attention_heads)


def _fits(what: str, wanted: int | None, own: int) -> None:
    if wanted is not None and not 1 <= wanted <= own:
        limit = f"1 to {own}, the model's own" if own else "none: there is nothing to prune there"
        raise PruneError(f"{what} is {wanted}, expected {limit}")


def _groups(i: int, attention: Attention, heads: int | None) -> None:
    """KV heads all stay, so each needs the same number of query heads."""
    groups = attention.num_key_value_heads
    if heads is not None and heads < attention.num_attention_heads and heads % groups:
        raise PruneError(
            f"num_attention_heads {heads} cannot be shared out among the {groups} key/value heads "
            f"of layer {i}, which all stay; use {_near(heads, groups, attention)}"
        )


def _near(value: int, step: int, attention: Attention) -> str:
    low, high = value // step * step, -(-value // step) * step
    options = [n for n in (low, high) if 1 <= n <= attention.num_attention_heads]
    return " or ".join(map(str, options))


def attentions(spec: ModelSpec, layers: Sequence[int]) -> list[tuple[int, Attention]]:
    found = ((i, spec.layers[i].attention) for i in layers)
    return [(i, a) for i, a in found if isinstance(a, Attention)]


def mlp_widths(spec: ModelSpec, layers: Sequence[int]) -> list[int]:
    mlps = (spec.layers[i].mlp for i in layers)
    return [m.intermediate_size for m in mlps if isinstance(m, MLP)]


def ranges(layers: Sequence[int]) -> str:
    """Such as 0-15, 31."""
    runs: list[list[int]] = []
    for i in layers:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
