"""Which shapes an architecture search compares: every combination of sizes near a parameter count.

No weights and no torch are needed. Sizes and counts come from the code that prunes
(`pruned_spec.shape`), so a candidate is exactly what `bevatron prune` makes of the same options.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from typing import Any

from bevatron.compress.importance_scores import Scores
from bevatron.compress.prune_report import class_of, family_of
from bevatron.compress.prune_targets import DEPTH_BY, PruneError, Targets
from bevatron.compress.pruned_spec import attentions, mlp_widths, shape
from bevatron.compress.verb_options import Axes, Goal
from bevatron.families.llama_nemotron import WIDTH_MULTIPLE
from bevatron.families.registry import Family
from bevatron.spec.count import parameter_count
from bevatron.spec.model import ModelSpec

UNSAID = "of sizes that the class cannot say"
EXPANSIONS = 4  # MLP widths per hidden size, as Minitron (arXiv 2407.14679) tried


@dataclass(frozen=True)
class Candidate:
    """One shape. `layers`: the old indices of those that stay, None while that is not known."""

    name: str
    targets: Targets
    layers: tuple[int, ...] | None
    spec: ModelSpec
    parameters: int
    exports_as: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Space:
    """Candidates, the largest first. `dropped`: of all `combinations`, how many went by which
    rule."""

    candidates: tuple[Candidate, ...]
    combinations: int
    dropped: tuple[tuple[str, int], ...]

    def to_dict(self) -> dict[str, Any]:
        dropped = [{"rule": rule, "count": n} for rule, n in self.dropped]
        return {"combinations": self.combinations, "dropped": dropped}


def enumerate_space(
    spec: ModelSpec, family: Family, axes: Axes, goal: Goal, scores: Scores | None
) -> Space:
    """All combinations within the tolerance that can be made, and what became of the others.

    Args:
        scores: say which layers go. Without them only the counts are known, if layers are equal.
    Raises PruneError for a value that the model cannot be pruned to, and if nothing is left.
    """
    _check(spec, axes, goal, scores)
    found: list[Candidate] = []
    nearest: Candidate | None = None
    seen: set[tuple[tuple[int, ...] | None, ModelSpec]] = set()
    gone: dict[str, int] = {}
    unsaid = ""
    whole = f"{100 * goal.within:g}%"
    outside = f"not within {whole} of {goal.params:,} parameters"

    def drop(rule: str) -> None:
        gone[rule] = gone.get(rule, 0) + 1

    combinations = grid(spec, family, axes, goal)
    for sizes in combinations:
        made = _made(spec, family, sizes, goal, scores)
        if made is None:
            drop("the model itself")
            continue
        off = abs(made.parameters - goal.params)
        if nearest is None or off < abs(nearest.parameters - goal.params):
            nearest = made
        if off > goal.within * goal.params:
            drop(outside)
        elif (made.layers, made.spec) in seen:
            drop("the same shape as another combination")
        else:
            seen.add((made.layers, made.spec))
            try:
                kind, notes = family_of(made.spec, family)
            except PruneError as error:
                unsaid = unsaid or str(error).partition("; choose other")[0]
                drop(UNSAID)
                continue
            exports = class_of(kind, made.spec)
            found.append(replace(made, exports_as=exports, notes=(*made.notes, *notes)))
    if UNSAID in gone:  # with the first reason
        gone = {f"{k} ({unsaid})" if k == UNSAID else k: n for k, n in gone.items()}
    if not found:
        raise PruneError(_none(len(combinations), gone, nearest, outside, spec))
    found.sort(key=lambda c: (abs(c.parameters - goal.params), c.name))
    if len(found) > goal.max_candidates:
        most = goal.max_candidates
        rule = f"beyond --max-candidates {most}, which keeps the nearest to the target"
        gone[rule] = len(found) - most
        found = found[: goal.max_candidates]
    found.sort(key=lambda c: (-c.parameters, c.name))
    return Space(tuple(found), len(combinations), tuple(gone.items()))


def grid(spec: ModelSpec, family: Family, axes: Axes, goal: Goal) -> list[Targets]:
    """Every combination. Where values are not given, as in Minitron's table 9, whose spaces these
    are for its model:

    - layers: from nine tenths (at least one less) to all of them
    - query heads: all, two thirds and half, in multiples of the KV heads
    - hidden size: the model's, and below it multiples of the largest `multiple` x 2^n that goes
      into it twelve times
    - MLP: the model's ratio to the hidden size and the three multiples of a half below it
    """
    hiddens = axes.hidden_size or _hiddens(spec.hidden_size, goal.multiple)
    heads: Sequence[int | None] = axes.num_attention_heads or _heads(spec)
    combinations = []
    for n, h, a in product(depths(spec, axes), sorted(set(hiddens)), heads):
        for f in axes.intermediate_size or _widths(spec, family, h, goal.multiple):
            combinations.append(
                Targets(
                    hidden_size=h,
                    intermediate_size=f,
                    num_attention_heads=a,
                    num_layers=n,
                    multiple=goal.multiple,
                    depth_by=goal.depth_by,
                )
            )
    return combinations


def depths(spec: ModelSpec, axes: Axes) -> list[int]:
    """The numbers of layers to try."""
    count = len(spec.layers)
    least = min(max(1, count - 1), -(-9 * count // 10))
    return sorted(set(axes.num_layers or range(least, count + 1)))


def _hiddens(hidden: int, multiple: int) -> tuple[int, ...]:
    step = multiple
    while 12 * 2 * step <= hidden:
        step *= 2
    return (*range(step, hidden, step), hidden)


def _heads(spec: ModelSpec) -> tuple[int | None, ...]:
    """None, as they are, where attentions differ or there is none."""
    kinds = {
        (a.num_attention_heads, a.num_key_value_heads)
        for _, a in attentions(spec, range(len(spec.layers)))
    }
    if len(kinds) != 1:
        return (None,)
    [(heads, groups)] = kinds
    each = {max(1, math.floor(Fraction(heads, groups) * s + Fraction(1, 2))) for s in _SHARES}
    return tuple(sorted(groups * n for n in each))


_SHARES = (Fraction(1, 2), Fraction(2, 3), Fraction(1))


def _widths(
    spec: ModelSpec, family: Family, hidden: int, multiple: int
) -> tuple[int, ...] | tuple[None]:
    """Of MLPs, beside this hidden size."""
    widest = max(mlp_widths(spec, range(len(spec.layers))), default=0)
    if not widest:
        return (None,)
    if family.name == "llama_nemotron":
        multiple = math.lcm(multiple, WIDTH_MULTIPLE)
    own = Fraction(widest, spec.hidden_size)
    halves = math.ceil(2 * own) - 1
    below = [Fraction(n, 2) for n in range(halves, max(0, halves - EXPANSIONS + 1), -1)]
    found = {widest} if hidden == spec.hidden_size else set()
    for ratio in [own, *below] if hidden < spec.hidden_size else below:
        steps = math.floor(hidden * ratio / multiple + Fraction(1, 2))
        found.add(min(widest, max(1, steps) * multiple))
    return tuple(sorted(found))


def _made(
    spec: ModelSpec, family: Family, sizes: Targets, goal: Goal, scores: Scores | None
) -> Candidate | None:
    """The candidate of these sizes; None if they are the model's own."""
    widest = max(mlp_widths(spec, range(len(spec.layers))), default=None)
    most = max(
        (a.num_attention_heads for _, a in attentions(spec, range(len(spec.layers)))), default=None
    )
    own = (len(spec.layers), spec.hidden_size, widest, most)
    wanted = (sizes.num_layers, sizes.hidden_size, sizes.intermediate_size or widest)
    if (*wanted, sizes.num_attention_heads or most) == own:
        return None
    asked = sizes
    gone = len(spec.layers) - (sizes.num_layers or len(spec.layers))
    if scores is None and gone > 0:  # layers are equal: any will do to count
        asked = replace(sizes, num_layers=None, drop_layers=tuple(range(gone)))
    made = shape(spec, asked, scores, family)
    parts = [f"L{sizes.num_layers}", f"H{sizes.hidden_size}"]
    parts += [f"A{sizes.num_attention_heads}"] if sizes.num_attention_heads else []
    parts += [f"F{sizes.intermediate_size}"] if sizes.intermediate_size else []
    known = made.layers if scores is not None or gone == 0 else None
    count = parameter_count(made.spec)
    return Candidate("-".join(parts), sizes, known, made.spec, count, None, made.notes)


def _check(spec: ModelSpec, axes: Axes, goal: Goal, scores: Scores | None) -> None:
    own = parameter_count(spec)
    if goal.multiple < 1:
        raise PruneError(f"--multiple is {goal.multiple}, expected at least 1")
    if goal.depth_by not in DEPTH_BY:
        raise PruneError(f"--depth-by is {goal.depth_by}, expected one of {', '.join(DEPTH_BY)}")
    if not 0 < goal.within < 1:
        raise PruneError(f"--within is {goal.within:.0%}, expected more than 0% and less than 100%")
    if goal.params >= own:
        raise PruneError(
            f"--params asks for {goal.params:,} parameters, the model has {own:,}; a search "
            "looks for smaller ones"
        )
    count, wanted = len(spec.layers), depths(spec, axes)
    for n in wanted:
        if not 1 <= n <= count:
            raise PruneError(f"--num-layers is {n}, expected 1 to {count}, as many as there are")
    if scores is None and len(set(spec.layers)) > 1 and wanted[0] < count:
        raise PruneError(
            "the model's layers differ, so what a candidate with fewer of them counts depends on "
            f"which ones go: give --scores, or --num-layers {count} for all of them"
        )


def _none(
    count: int, gone: dict[str, int], nearest: Candidate | None, outside: str, spec: ModelSpec
) -> str:
    """Why no candidate is left, and what is nearest."""
    said = "; ".join(f"{n:,} {rule}" for rule, n in gone.items())
    near = ""
    if outside in gone and nearest is not None:
        near = f"; the nearest is {nearest.name} with {nearest.parameters:,}"
    return (
        f"none of {count:,} combinations is a candidate: {said}{near} (the model has "
        f"{parameter_count(spec):,}): list other values per axis, or change --multiple, --within "
        "or --params"
    )
