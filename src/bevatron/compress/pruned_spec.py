"""The spec of a pruned model, from what the user asked for: its layers and their widths.

Neither weights nor torch are needed, so parameter counts are exact before any weight is read. The
user gives the widths, or a parameter count that they are chosen to meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bevatron.compress.importance_scores import Scores
from bevatron.compress.prune_targets import LayerTarget, PruneError, Targets
from bevatron.compress.verb_options import TOLERANCE
from bevatron.families.llama_nemotron import WIDTH_MULTIPLE
from bevatron.families.registry import Family, FamilyError, by_name
from bevatron.spec import MLP, Attention, LayerSpec, ModelSpec, Sublayer
from bevatron.spec.count import parameter_count


@dataclass(frozen=True)
class Shape:
    """The result: indices of the layers that stay, and the spec that is made of them."""

    layers: tuple[int, ...]
    spec: ModelSpec
    notes: tuple[str, ...] = ()


def shape(spec: ModelSpec, targets: Targets, scores: Scores | None, family: Family) -> Shape:
    """The pruned model's spec.

    Args:
        scores: needed only where `targets` leaves open which layers go.
        family: that the model belongs to; it may limit which widths can be exported.
    Raises PruneError for sizes that are impossible, and if there is nothing to prune.
    """
    layers = kept_layers(spec, targets, scores)
    check_sizes(spec, targets, layers)
    if targets.parameters is None:
        found = shaped(spec, targets, layers, targets.hidden_size, targets.intermediate_size)
        notes: list[str] = []
    else:
        found, notes = meet(spec, targets, layers, family)
    if len(set(found.layers)) > 1 or family.name == "llama_nemotron":
        found, more = decilm_widths(found, [spec.layers[i] for i in layers])
        notes += more
    notes += uneven(found, spec, targets)
    if found == spec:
        raise PruneError(
            "nothing to prune: the sizes asked for are those of the model; give smaller ones, "
            "--num-layers, --drop-layers or --params"
        )
    return Shape(layers, found, tuple(notes))


def shaped(
    spec: ModelSpec,
    targets: Targets,
    layers: Sequence[int],
    hidden: int | None,
    width: int | Callable[[int], int] | None,
) -> ModelSpec:
    """The spec with these sizes. `width`: of MLPs, at most; or how it follows from the old one."""
    most = {"num_attention_heads": targets.num_attention_heads, "intermediate_size": width}

    def layer(i: int) -> LayerSpec:
        old, own = spec.layers[i], targets.per_layer.get(i, LayerTarget())
        stays = {"attention": not own.no_attention, "mlp": not own.no_mlp}
        return LayerSpec(**{p: sized(s, own) for p, s in old.present if stays[p]})

    def sized(sublayer: Sublayer, own: LayerTarget) -> Sublayer:
        if (name := sublayer.unit_field) not in most:
            return sublayer
        if (exactly := getattr(own, name)) is not None:
            return sublayer.with_units(exactly)
        units, limit = sublayer.units, most[name]
        if limit is None:
            return sublayer
        return sublayer.with_units(limit(units) if callable(limit) else min(units, limit))

    hidden = hidden or spec.hidden_size
    return replace(spec, hidden_size=hidden, layers=tuple(layer(i) for i in layers))


def meet(
    spec: ModelSpec, targets: Targets, layers: Sequence[int], family: Family
) -> tuple[ModelSpec, list[str]]:
    """The spec with the parameter count asked for, by the widths that are still open.

    For every hidden size (multiples of `multiple`) the MLP width (likewise) that comes nearest;
    among those within TOLERANCE the one that keeps most nearly the same share of both; among
    equals the nearest. MLPs of different widths keep the same share each.
    """
    wanted = targets.parameters
    assert wanted is not None
    multiple = targets.multiple
    if family.name == "llama_nemotron":
        multiple = math.lcm(multiple, WIDTH_MULTIPLE)
    widest = max(mlp_widths(spec, layers), default=0)
    open_width = targets.intermediate_size is None and widest > 0
    hiddens = [targets.hidden_size or spec.hidden_size]
    if targets.hidden_size is None:
        hiddens = _steps(spec.hidden_size, targets.multiple)
        if getattr(family, "heads_divide_hidden", False):
            own = max((a.num_attention_heads for _, a in attentions(spec, layers)), default=1)
            heads = targets.num_attention_heads or own
            hiddens = [h for h in hiddens if h % heads == 0] or [spec.hidden_size]
    elif not open_width:
        raise PruneError(
            "--params has nothing to choose: hidden and intermediate size are both given; leave "
            "one of them out"
        )
    widths = _steps(widest, multiple) if open_width else [targets.intermediate_size or 0]

    def made(hidden: int, width: int) -> ModelSpec:
        def share(f: int) -> int:
            return min(f, -(-f * width // (widest * multiple)) * multiple)

        return shaped(spec, targets, layers, hidden, share if open_width else width or None)

    candidates = []
    for hidden in hiddens:
        width, count = _nearest(widths, wanted, lambda f, h=hidden: parameter_count(made(h, f)))  # type: ignore[misc]
        uneven = abs(math.log(hidden / spec.hidden_size) - math.log(width / widest or 1))
        candidates.append((abs(count - wanted), uneven if open_width else 0.0, hidden, width))
    near = [c for c in candidates if c[0] <= TOLERANCE * wanted]
    if not near:
        _, _, hidden, width = min(candidates)
        count = parameter_count(made(hidden, width))
        raise PruneError(
            f"--params asks for {wanted:,} parameters, but widths in multiples of {multiple} come "
            f"no nearer than {count:,} (hidden_size {hidden}, intermediate_size {width}); the "
            f"model has {parameter_count(spec):,}: try another --multiple or fewer layers"
        )
    _, _, hidden, width = min(near, key=lambda c: (round(c[1], 9), c[0], -c[2]))
    found = made(hidden, width)
    count = parameter_count(found)
    return found, [
        f"{count:,} parameters, {100 * (count / wanted - 1):+.2f}% off the {wanted:,} asked for"
    ]


def _steps(size: int, multiple: int) -> list[int]:
    """Multiples below a size, and the size itself."""
    return [*range(multiple, size, multiple), size]


def _nearest(widths: Sequence[int], wanted: int, count: Callable[[int], int]) -> tuple[int, int]:
    """The width whose count, which grows with it, comes nearest; and that count."""
    low, high = 0, len(widths) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(widths[middle]) <= wanted else (low, middle)
    found = [(abs(count(widths[i]) - wanted), widths[i], count(widths[i])) for i in (low, high)]
    return min(found)[1:]


def decilm_widths(found: ModelSpec, old: Sequence[LayerSpec]) -> tuple[ModelSpec, list[str]]:
    """Round MLP widths up so that DeciLMForCausalLM can say them, if all else can be said by it.
    What a layer has no neurons of its own for is filled up with zeros, which compute nothing."""

    def rounded(layer: LayerSpec) -> LayerSpec:
        if layer.mlp is None or not _width(layer):
            return layer
        up = -(-_width(layer) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        return replace(layer, mlp=layer.mlp.with_units(up))

    layers = tuple(rounded(layer) for layer in found.layers)
    fitted = replace(found, layers=layers)
    try:
        by_name("llama_nemotron").config(fitted, "float32")
    except FamilyError:
        return found, []  # the caller says that it cannot be exported, and why
    same: dict[str, list[int]] = {}
    for i, three in enumerate(zip(found.layers, layers, old, strict=True)):
        before, after, own = map(_width, three)
        if before != after:
            zeros = f", {after - own} of them zeros" if after > own else ""
            what = f"intermediate_size {before} became {after}{zeros}"
            same.setdefault(what, []).append(i)
    changed = [f"layers {ranges(numbers)}: {what}" for what, numbers in same.items()]
    if changed:
        changed.append(
            f"widths were rounded up to multiples of {WIDTH_MULTIPLE}: layers that differ are "
            "exported as DeciLMForCausalLM, whose ffn_mult can say no others"
        )
    return fitted, changed


def uneven(found: ModelSpec, old: ModelSpec, targets: Targets) -> list[str]:
    """Widths that are slow on accelerators: said, and left as asked for."""
    sizes = {("hidden_size", found.hidden_size)} if found.hidden_size != old.hidden_size else set()
    own = {x.mlp for x in old.layers}
    for layer in found.layers:
        if _width(layer) and layer.mlp not in own:
            sizes.add(("intermediate_size", _width(layer)))
    return [
        f"{name} {value} is no multiple of {targets.multiple}; accelerators are faster with one"
        for name, value in sorted(sizes)
        if value % targets.multiple
    ]


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
        own = {s.unit_field: s for _, s in spec.layers[i].present}
        for name in ("intermediate_size", "num_attention_heads"):
            if (wanted := getattr(target, name)) is not None:
                _fits(f"{where}: {name}", wanted, own[name].units if name in own else 0)
                _groups(i, own[name], wanted)


def _fits(what: str, wanted: int | None, own: int) -> None:
    if wanted is not None and not 1 <= wanted <= own:
        limit = f"1 to {own}, the model's own" if own else "none: there is nothing to prune there"
        raise PruneError(f"{what} is {wanted}, expected {limit}")


def _groups(i: int, sublayer: Sublayer, heads: int | None) -> None:
    """KV heads all stay, so each needs the same number of query heads."""
    groups = sublayer.unit_groups
    if heads is not None and heads < sublayer.units and heads % groups:
        raise PruneError(
            f"num_attention_heads {heads} cannot be shared out among the {groups} key/value heads "
            f"of layer {i}, which all stay; use {_near(heads, groups, sublayer.units)}"
        )


def _near(value: int, step: int, most: int) -> str:
    low, high = value // step * step, -(-value // step) * step
    options = [n for n in (low, high) if 1 <= n <= most]
    return " or ".join(map(str, options))


def attentions(spec: ModelSpec, layers: Sequence[int]) -> list[tuple[int, Attention]]:
    return [(i, a) for i, a in spec.each(Attention) if i in layers]


def mlp_widths(spec: ModelSpec, layers: Sequence[int]) -> list[int]:
    return [m.intermediate_size for i, m in spec.each(MLP) if i in layers]


def _width(layer: LayerSpec) -> int:
    """Of its MLP, 0 if it has none."""
    mlp = layer.mlp
    return mlp.units if mlp is not None and mlp.unit_field == "intermediate_size" else 0


def ranges(layers: Sequence[int]) -> str:
    """Such as 0-15, 31."""
    runs: list[list[int]] = []
    for i in layers:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
