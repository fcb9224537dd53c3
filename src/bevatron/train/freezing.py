"""Frozen parameters: which parameters a run does not train, and how much that saves.

A frozen parameter takes part in the forward and passes gradients on to the layers before it. It has
no gradient of its own, no moments and no fp32 master: it is held, and saved, in the run's dtype.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from bevatron.errors import BevatronError
from bevatron.spec import ModelSpec
from bevatron.spec.count import layer_flops
from bevatron.train.optimizer_and_schedule import MATRICES

KEY = "train.freeze"
NEAR = 3  # names that an error lists
RANGE = re.compile(r"\[[^\]]*(-\d\d|\d\d-)[^\]]*\]")  # [0-11], which would be 0 and 1


def frozen_parameters(spec: ModelSpec, patterns: Sequence[str]) -> frozenset[str]:
    """The parameters that any of the patterns names: `*` stands for anything, dots included, `?`
    for one character, and `[0-7]` for one digit of these.

    Of a model with an adapter also all that lies in its base, but for what is trained whole.

    Raises BevatronError for a pattern that names nothing or has a range of larger numbers, and if
    nothing is left to train."""
    names = [p.name for p in spec.parameters()]
    found: set[str] = set()
    for pattern in patterns:
        if ranged := RANGE.search(pattern):
            raise BevatronError(
                f"{KEY}: {ranged[0]} in {pattern} stands for one character, not for numbers; "
                "layers 0 to 11 are two patterns, layers.[0-9].* and layers.1[01].*"
            )
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise BevatronError(f"{KEY}: {pattern} is not a parameter; {_instead(spec, pattern)}")
        found |= set(matched)
    if spec.adapter is not None:
        found |= {name for name in names if not spec.adapter.owns(name)}
    if found == set(names):
        raise BevatronError(f"{KEY}: {', '.join(patterns)} leaves no parameter to train; name less")
    return frozenset(found)


def _instead(spec: ModelSpec, pattern: str) -> str:
    """What the pattern may have meant."""
    if spec.tied and fnmatchcase("head.weight", pattern):
        return "the head is tied to embed.weight, so name that"
    names = [p.name for p in spec.parameters()]
    parts = [name.split(".") for name in names]
    wider = {".".join(p[:n]) + ".*": None for p in parts for n in range(1, len(p))}
    near = difflib.get_close_matches(pattern, [*names, *wider], NEAR) or names[:NEAR]
    return f"near it are {', '.join(near)} (manifest.json of a checkpoint has all; * is anything)"


def describe(spec: ModelSpec, frozen: Collection[str]) -> str:
    """`12 of 20 parameters' tensors, 1,234 of 5,678 elements (21.7%)`."""
    sizes = {p.name: p.numel for p in spec.parameters()}
    held, whole = sum(sizes[name] for name in frozen), sum(sizes.values())
    return (
        f"{len(frozen)} of {len(sizes)} tensors, {held:,} of {whole:,} parameters "
        f"({held / whole:.1%})"
    )


def first_trained_layer(spec: ModelSpec, frozen: Collection[str]) -> int:
    """The first layer that has a backward, counted from 0; len(layers) if it is what comes after
    them. Layers before it keep no activations."""
    if "embed.weight" not in frozen:
        return 0
    for index in range(len(spec.layers)):
        if any(p.name not in frozen for p in spec.layer_parameters(index)):
            return index
    return len(spec.layers)


def training_flops(
    spec: ModelSpec, seq_len: int, causal: bool, frozen: Collection[str]
) -> list[int]:
    """FLOPs per token of one training step: of every layer, and the head's, last.

    The backward of a frozen matrix skips its own gradient, and all that lies before the first
    trained parameter has no backward. With nothing frozen they sum to `flops_per_token`."""
    out, reached = [], "embed.weight" not in frozen
    for index in range(len(spec.layers)):
        parameters, total = list(spec.layer_parameters(index)), 0
        products = {p.name: 2 * p.numel for p in parameters if p.role in MATRICES}
        scores = layer_flops(spec, index, seq_len, causal) - sum(products.values())
        products |= {p.name: 2 * p.numel for p in parameters if p.role in ("lora_a", "lora_b")}
        for parameter in parameters:
            trained = parameter.name not in frozen
            total += products.get(parameter.name, 0) * (1 + reached + trained)
            reached = reached or trained
            if parameter.role == "qkv":
                total += scores * (1 + 2 * reached)
        out.append(total)
    norm = {p.name for p in spec.parameters() if p.name.startswith("final_norm.")}
    reached = reached or bool(norm - set(frozen))
    head = "embed.weight" if spec.tied else "head.weight"
    times = 1 + reached + (head not in frozen)
    return [*out, 2 * spec.head_rows * spec.hidden_size * times]
