"""Nanotron's weight files: which there are, and the text in their headers. Both directions.

A Nanotron parameter is the Hugging Face tensors that make up a native one, one below the other:
qkv_proj is [q | k | v], gate_up_proj [gate | up]. Tensor parallelism cuts each of them on its own
(o_proj and down_proj along their columns), so a shard is no range of the whole: the slice pairs in
its header say which part of it lies where.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bevatron.errors import BevatronError
from bevatron.families.registry import by_name
from bevatron.families.weight_map import Entry
from bevatron.spec import ModelSpec, Shape

VERSION = "1.5"  # of the checkpoint format, as Nanotron 0.4 writes it
KEY = "data"  # the one tensor in every file
SHAPE, SLICES = "unsharded_shape", "local_global_slices_pairs"

# Native module -> Nanotron module, and the dimension that tensor parallelism cuts.
_MODULES: dict[str, tuple[str, int | None]] = {
    "embed": ("token_position_embeddings.pp_block.token_embedding", 0),
    "attention_norm": ("input_layernorm", None),
    "attention.qkv": ("attn.qkv_proj", 0),
    "attention.o": ("attn.o_proj", 1),
    "mlp_norm": ("post_attention_layernorm", None),
    "mlp.gate_up": ("mlp.gate_up_proj", 0),
    "mlp.down": ("mlp.down_proj", 1),
    "final_norm": ("final_layer_norm.pp_block", None),
    "head": ("lm_head.pp_block", 0),
}


class FormatError(BevatronError):
    """A Nanotron file that says something else than the format allows."""


class Cut(NamedTuple):
    """Indices `start` to `stop` of the whole parameter's cut dimension begin at index `local` of
    the shard's."""

    local: int
    start: int
    stop: int


@dataclass(frozen=True)
class Parameter:
    """One Nanotron parameter.

    Attributes:
        entry: the native parameter and the HF tensors that this one consists of.
        name: dotted, below the folder `model/`; `split`: the dimension that is cut, if any.
    """

    entry: Entry
    name: str
    split: int | None

    @property
    def shape(self) -> Shape:
        """Of the whole parameter."""
        tail = self.entry.sources[0].shape[1:]
        return (sum(s.shape[0] for s in self.entry.sources), *tail)

    @property
    def folder(self) -> str:
        return "model/" + self.name.rpartition(".")[0].replace(".", "/")

    @property
    def stem(self) -> str:
        """How its files' names begin."""
        return "model_" + self.name.rpartition(".")[2]


def parameters(spec: ModelSpec) -> list[Parameter]:
    """Every Nanotron parameter of a model with attention and MLP in each layer, in native order."""
    found = []
    for entry in by_name("llama").weight_map(spec):
        *module, kind = entry.native.name.split(".")
        prefix = "model."
        if module[0] == "layers":
            prefix, module = f"model.decoder.{module[1]}.pp_block.", module[2:]
        name, split = _MODULES[".".join(module)]
        found.append(Parameter(entry, f"{prefix}{name}.{kind}", split))
    return found


# ---------------------------------------------------------------------------------------------
# The text of headers
# ---------------------------------------------------------------------------------------------

_INTEGER = r"(?:np\.int[0-9]{1,2}\(([0-9]{1,15})\)|([0-9]{1,15}))"
_INTEGERS = re.compile(_INTEGER)
_TUPLE = re.compile(rf"\({_INTEGER}(?:, ?{_INTEGER})*,?\)")
_SLICE = re.compile(r"(None|[0-9]{1,15}),(None|[0-9]{1,15}),(?:None|1)")


def parse_shape(text: str) -> Shape:
    """`(128, 64)`, `(64,)` or, with numpy 2, `(np.int64(128), 64)`. Raises FormatError."""
    if not _TUPLE.fullmatch(text):
        raise FormatError(f"{SHAPE} is {text[:100]!r}, expected a tuple such as (128, 64)")
    return tuple(int(a or b) for a, b in _INTEGERS.findall(text))


def parse_slices(text: str, local: Shape, whole: Shape, split: int) -> list[Cut]:
    """The slice pairs of a shard of shape `local`, which must cut dimension `split` alone.

    Raises FormatError if they are malformed, lie outside, do not use every element of the shard
    once, or cut anything else."""
    cuts = []
    for pair in text.split(";"):
        sides = [side.split("|") for side in pair.split("#")]
        if len(sides) != 2 or any(len(side) != len(whole) for side in sides):
            raise _bad_pair(pair, f"expected local#global with {len(whole)} slices each")
        here = [_range(pair, s, size) for s, size in zip(sides[0], local, strict=True)]
        there = [_range(pair, s, size) for s, size in zip(sides[1], whole, strict=True)]
        for d, ((a, b), (c, e)) in enumerate(zip(here, there, strict=True)):
            if b - a != e - c:
                raise _bad_pair(pair, f"its two sides have {b - a} and {e - c} indices")
            if d != split and (e - c != whole[d] or b - a != local[d]):
                raise _bad_pair(pair, f"it cuts dimension {d}, expected {split} alone")
        cuts.append(Cut(here[split][0], *there[split]))
    position = 0
    for cut in sorted(cuts):
        if cut.local != position:
            what = "twice" if cut.local < position else "never"
            raise FormatError(f"{SLICES} {text[:200]!r} use index {position} of the shard {what}")
        position += cut.stop - cut.start
    if position != local[split]:
        raise FormatError(
            f"{SLICES} {text[:200]!r} use {position} of the shard's {local[split]} indices"
        )
    return cuts


def _range(pair: str, text: str, size: int) -> tuple[int, int]:
    match = _SLICE.fullmatch(text)
    if not match:
        raise _bad_pair(pair, f"{text[:40]!r} is no slice such as 0,32,None")
    start = 0 if match[1] == "None" else int(match[1])
    stop = size if match[2] == "None" else int(match[2])
    if not start < stop <= size:
        raise _bad_pair(pair, f"{text} lies outside of a dimension of {size}")
    return start, stop


def _bad_pair(pair: str, why: str) -> FormatError:
    return FormatError(f"{SLICES} has the pair {pair[:100]!r}: {why}")


def spell_metadata(parameter: Parameter) -> dict[str, str]:
    """What the header of the one shard of an uncut parameter says; nothing for a norm."""
    if parameter.split is None:
        return {}
    shape, split = parameter.shape, parameter.split
    sizes = [s.shape[0] for s in parameter.entry.sources] if split == 0 else [shape[split]]
    pairs, at = [], 0
    for size in sizes:
        here = f"{at},{at + size},None"
        local = here if len(sizes) > 1 else "None,None,None"
        pairs.append(f"{_slices(local, split, shape)}#{_slices(here, split, shape)}")
        at += size
    return {"version": VERSION, SLICES: ";".join(pairs), SHAPE: str(tuple(shape))}


def _slices(cut: str, split: int, shape: Sequence[int]) -> str:
    return "|".join(cut if d == split else "None,None,None" for d in range(len(shape)))
