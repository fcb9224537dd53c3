"""A native checkpoint made of parts of others: pruned, merged, or put together of trained blocks.

For every parameter of the new model the caller names a checkpoint and a cut of one tensor there:
which rows and columns stay, and how values change before the cut. Without a cut the tensor is
copied as it is. Several such cuts with weights are added up (`Share`). The parts are streamed a few
megabytes at a time, checked and hashed; the new folder appears whole or not at all. No torch is
needed: a tensor is a set of boxes in files (`checkpoint/read_boxes.py`). Memory holds one block of
each part, or one whole tensor where its rows are reordered or its values change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bevatron.bridge.conversion_report import shown_progress
from bevatron.bridge.merged_weights import read_through
from bevatron.bridge.open_native import CONFIG, family_of
from bevatron.bridge.open_weights import Opened
from bevatron.bridge.provenance import fingerprint
from bevatron.bridge.source_changes import Stamp, stamps, unchanged
from bevatron.bridge.write_native import commit, write_tensors
from bevatron.checkpoint.dtypes import FLOATS, ITEMSIZE, KINDS, Converter, NonFinite
from bevatron.checkpoint.manifest import Manifest, TensorEntry
from bevatron.checkpoint.new_folder import check_space, check_target, new_folder
from bevatron.checkpoint.read_boxes import read_box, verify_chunk
from bevatron.checkpoint.storage import located
from bevatron.errors import BevatronError
from bevatron.families.registry import FamilyError
from bevatron.spec import ModelSpec, ParameterSpec

BLOCK = 4 << 20  # elements
RECORD = "assembly.json"
PAD = -1  # in an index: not an entry of the old tensor but zeros; at its end only

# What the values of several parts are added up in, before they are rounded once.
SUM = {"BF16": "F32", "F16": "F32", "F32": "F64", "F64": "F64"}

Bits = NDArray[Any]
Index = NDArray[np.int64]
Change = Callable[[Bits], Bits]


class AssemblyError(BevatronError):
    """Parts that make no model."""


@dataclass(frozen=True)
class Cut:
    """What is taken of one stored tensor.

    Attributes:
        source: the parameter's name in its own checkpoint.
        index: per dimension which entries stay, in their new order, with PADs for zeros at the end;
            None where all do, and for all dimensions. The first of three dimensions is whole.
        change: of the whole matrix before it is cut, as its float values.
    """

    source: str
    index: tuple[Index | None, ...] | None = None
    change: Change | None = None

    def shape(self, old: tuple[int, ...]) -> tuple[int, ...]:
        """What a tensor of shape `old` is cut to."""
        index = self.index or (None,) * len(old)
        return tuple(n if i is None else len(i) for n, i in zip(old, index, strict=True))


class Share(NamedTuple):
    """A cut out of a checkpoint, and what it is multiplied with where several are added up."""

    opened: Opened
    cut: Cut
    weight: float = 1.0


Parts = Callable[[ParameterSpec], tuple[Opened, Cut] | list[Share]]


def assemble(
    spec: ModelSpec,
    parts: Parts,
    dst: str | Path,
    *,
    origin: Opened,
    family: str | None = None,
    config: Mapping[str, Any] | None = None,
    records: Mapping[str, str] = MappingProxyType({}),
    before: Mapping[Path, Mapping[str, Stamp]] = MappingProxyType({}),
    title: str = "assembling",
    overwrite: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Write a model as a native checkpoint at `dst`.

    Args:
        parts: parameter of `spec` -> the checkpoint that it comes from, and how it is cut out of
            the one there, or several of these, which are added up. Every parameter keeps the dtype
            that it has there, in the first one of several.
        origin: whose tokenizer, other files and provenance the result takes along.
        family: that the result belongs to, and the `config` of that; if absent the origin's own, or
            the first family that can say the spec, and the origin's config.json with its sizes.
        records: other files, name -> text.
        before: folder of a checkpoint -> its files as they were when it was first looked at; they
            may not have changed by the end.
    Returns what reading everything back showed. Where the parts come from several checkpoints,
    assembly.json lists those and which parameter is whose, with the weights of sums.

    Raises BevatronError; nothing is left at `dst` then, and an old one stays as it was: for a part
    that does not exist or has not the parameter's shape, for damaged sources, for sources that
    change meanwhile, and for values among those that stay that are NaN or infinite.
    """
    dst = located(dst)
    plan = {p.name: _shares(parts(p)) for p in spec.parameters()}
    entries = {
        p.name: [_checked(p, share.opened, share.cut) for share in plan[p.name]]
        for p in spec.parameters()
    }
    dtypes = {name: of[0].dtype for name, of in entries.items()}
    table = [(f"model/{p.name}", dtypes[p.name], p.shape) for p in spec.parameters()]
    nbytes = sum(p.numel * ITEMSIZE[dtypes[p.name]] for p in spec.parameters())
    check_space(dst, nbytes)
    if family is None:
        family, config = _said(spec, origin)
    checkpoints = {s.opened.folder: s.opened for shares in plan.values() for s in shares}
    named = dict.fromkeys((origin.folder, *checkpoints))
    folders = dict.fromkeys(part for folder in named for part in read_through(folder))
    seen = {folder: before.get(folder) or stamps(folder) for folder in folders}
    with ExitStack() as stack:
        for folder in folders:
            check_target(dst, overwrite=overwrite, apart_from=folder)
        new = stack.enter_context(new_folder(dst, overwrite=overwrite, apart_from=origin.folder))
        for folder, stamp in seen.items():
            stack.enter_context(unchanged(folder, stamp))
        read = sum(entry.nbytes for of in entries.values() for entry in of)
        with shown_progress(title, read, show_progress) as advance:

            def content(name: str) -> Iterator[memoryview]:
                own = name.removeprefix("model/")
                yield from _content(plan[own], entries[own])
                advance(sum(entry.nbytes for entry in entries[own]))

            written = write_tensors(new, table, content)
        with shown_progress("verifying", nbytes, show_progress) as advance:
            for name, entry in written.items():
                verify_chunk(new, entry.chunks[0], ITEMSIZE[entry.dtype], name)
                advance(entry.nbytes)
        origin.copy_origin(new)
        if config is not None:
            text = json.dumps(config, indent=2) + "\n"
            (new / "source" / CONFIG).write_text(text, encoding="utf-8")
        if len(checkpoints) > 1:
            records = {**records, RECORD: _record(plan, checkpoints)}
        for name, text in records.items():
            (new / name).write_text(text, encoding="utf-8")
        commit(new, spec, Manifest(family, 0, written))
    return {"tensors": len(written), "equal": True, "by": "xxh3-128 of each, read back"}


def _checked(parameter: ParameterSpec, opened: Opened, cut: Cut) -> TensorEntry:
    """The stored tensor that a parameter is cut out of. Raises AssemblyError."""
    entry = opened.manifest.tensors.get(f"model/{cut.source}")
    if entry is None:
        raise AssemblyError(
            f"{opened.folder}: has no parameter {cut.source}, which {parameter.name} is to be made "
            "of; name another part"
        )
    index = cut.index or (None,) * len(entry.shape)
    fits = len(index) == len(entry.shape) and cut.shape(entry.shape) == parameter.shape
    if not fits or (len(index) == 3 and index[0] is not None):
        found = list(cut.shape(entry.shape)) if len(index) == len(entry.shape) else "no cut of it"
        raise AssemblyError(
            f"{opened.folder}: {cut.source} {list(entry.shape)} gives {found}, but "
            f"{parameter.name} is {list(parameter.shape)}; choose parts of the same sizes"
        )
    for size, kept in zip(entry.shape, index, strict=True):
        where = f"{opened.folder}: {cut.source} {list(entry.shape)}, for {parameter.name}"
        if kept is not None and len(beyond := kept[(kept < PAD) | (kept >= size)]):
            raise AssemblyError(f"{where}: has no entry {beyond[0]}; expected 0 to {size - 1}")
        if kept is not None and (np.diff((kept == PAD).astype(np.int8)) < 0).any():
            raise AssemblyError(f"{where}: zeros ({PAD}) can stand at the end of an index only")
    return entry


def _said(spec: ModelSpec, origin: Opened) -> tuple[str, dict[str, Any] | None]:
    """The family of the result, and its config.json if the origin has one that can say it."""
    text = origin.source_text(CONFIG)
    base = json.loads(text) if text is not None else None
    family, _ = family_of(origin.manifest.family, spec, base)
    if base is None:
        return family.name, None
    try:
        return family.name, family.config(spec, FLOATS[origin.dtype], base)
    except FamilyError:
        return family.name, None


def _shares(part: tuple[Opened, Cut] | list[Share]) -> list[Share]:
    """One cut as the only one of a sum."""
    return part if isinstance(part, list) else [Share(*part)]


def _record(plan: Mapping[str, Sequence[Share]], checkpoints: Mapping[Path, Opened]) -> str:
    """assembly.json: the checkpoints, and by their number what each parameter is made of; of a sum
    every part with its weight."""
    folders = [
        {
            "path": str(opened.folder),
            "step": opened.manifest.step,
            "weights": fingerprint(opened.manifest),
        }
        for opened in checkpoints.values()
    ]
    number = {folder: i for i, folder in enumerate(checkpoints)}

    def told(shares: Sequence[Share]) -> list[Any]:
        made = [[number[s.opened.folder], s.cut.source, s.weight] for s in shares]
        return made if len(made) > 1 else made[0][:2]

    parameters = {name: told(shares) for name, shares in plan.items()}
    return json.dumps({"checkpoints": folders, "parameters": parameters}, indent=1) + "\n"


def _content(shares: Sequence[Share], entries: Sequence[TensorEntry]) -> Iterator[memoryview]:
    """The bytes of a part, or of the sum of several. Raises CheckpointError for damage,
    AssemblyError for values."""
    found = [_part(share, entry) for share, entry in zip(shares, entries, strict=True)]
    if len(shares) == 1:
        for block in found[0]:
            yield block.view("u1").data
        return
    dtype = entries[0].dtype
    wide = SUM[dtype]
    read = [Converter(entry.dtype, wide) for entry in entries]
    write, watch = Converter(wide, dtype), NonFinite(dtype)
    for blocks in _side_by_side(found):
        total = np.zeros(len(blocks[0]), KINDS[wide].numpy)
        for share, convert, block in zip(shares, read, blocks, strict=True):
            values = np.frombuffer(convert(block.view("u1").data), total.dtype)
            total += total.dtype.type(share.weight) * values
        data = write(total.view("u1").data)
        watch.update(data)
        yield data
    if watch.count:
        raise AssemblyError(
            f"{watch.count} values of the sum of {shares[0].cut.source} are too large for "
            f"{FLOATS[dtype]}; give weights that are nearer to each other, or take checkpoints in "
            "another dtype"
        )


def _part(share: Share, entry: TensorEntry) -> Iterator[Bits]:
    """What is cut out of one checkpoint, as flat blocks of bits, verified."""
    opened, cut, _ = share
    for chunk in entry.chunks:
        if chunk.hash:  # a Hugging Face folder has none
            verify_chunk(opened.folder, chunk, ITEMSIZE[entry.dtype], cut.source)
    watch = NonFinite(entry.dtype)
    for block in _blocks(opened.folder, entry, cut):
        flat = np.ascontiguousarray(block).reshape(-1)
        if flat.size:
            watch.update(flat.view("u1").data)
        yield flat
    if watch.count:
        raise AssemblyError(
            f"{opened.folder}: {cut.source} holds {watch.count} NaN or infinite values among those "
            "that would stay; take a checkpoint from before they came"
        )


def _side_by_side(parts: Sequence[Iterator[Bits]]) -> Iterator[list[Bits]]:
    """The same elements of every part at a time, however each is cut into blocks."""
    empty = np.zeros(0, "u1")
    rest: list[Bits] = [empty] * len(parts)
    while True:
        rest = [r if len(r) else next(p, empty) for r, p in zip(rest, parts, strict=True)]
        n = min(map(len, rest))
        if not n:
            return
        yield [r[:n] for r in rest]
        rest = [r[n:] for r in rest]


def _blocks(folder: Path, entry: TensorEntry, cut: Cut) -> Iterator[Bits]:
    """The bits of what is cut out of a tensor of one, two or three dimensions, in row-major order,
    in contiguous pieces."""
    index, change = cut.index or (None,) * len(entry.shape), cut.change
    if len(entry.shape) == 1:
        whole = read_box(folder, entry, (0,), entry.shape)
        if change is not None:
            whole = _changed(whole[:, None], entry.dtype, change)[:, 0]
        kept, empty = _parted(index[0])
        yield np.pad(whole if kept is None else whole[kept], (0, empty))
        return
    (rows, below), (columns, beside) = _parted(index[-2]), _parted(index[-1])
    for lead in range(entry.shape[0]) if len(entry.shape) == 3 else (None,):
        for block in _matrix(folder, entry, lead, rows, change):
            found = block if columns is None else np.take(block, columns, axis=1)
            yield np.pad(found, ((0, 0), (0, beside))) if beside else found
        if below:
            width = entry.shape[-1] if columns is None else len(columns)
            yield np.zeros((below, width + beside), f"u{ITEMSIZE[entry.dtype]}")


def _parted(index: Index | None) -> tuple[Index | None, int]:
    """The entries that are read, and how many zeros follow them."""
    if index is None:
        return None, 0
    kept: Index = index[index != PAD]
    return kept, len(index) - len(kept)


def _matrix(
    folder: Path, entry: TensorEntry, lead: int | None, rows: Index | None, change: Change | None
) -> Iterator[Bits]:
    height, width = entry.shape[-2:]

    def read(first: int, last: int) -> Bits:
        if lead is None:
            return read_box(folder, entry, (first, 0), (last - first, width))
        box: Bits = read_box(folder, entry, (lead, first, 0), (1, last - first, width))[0]
        return box

    per_block = max(1, BLOCK // max(1, width))
    if rows is None:
        rows = np.arange(height)
    if change is not None or (np.diff(rows) < 0).any():
        whole = read(0, height)
        if change is not None:
            whole = _changed(whole, entry.dtype, change)
        for at in range(0, len(rows), per_block):
            yield whole[rows[at : at + per_block]]
        return
    at = 0
    while at < len(rows):
        first = int(rows[at])
        end = int(np.searchsorted(rows, first + per_block))
        some = rows[at:end] - first
        block = read(first, first + int(some[-1]) + 1)
        yield block if len(some) == len(block) else block[some]
        at = end


def _changed(bits: Bits, dtype: str, change: Change) -> Bits:
    """Bits -> float values, changed -> bits, rounded to the same dtype."""
    wide = "F64" if dtype == "F64" else "F32"
    raw = Converter(dtype, wide)(np.ascontiguousarray(bits).reshape(-1).view("u1").data)
    values = np.frombuffer(raw, {"F64": "<f8", "F32": "<f4"}[wide]).reshape(bits.shape)
    out = np.ascontiguousarray(change(values)).reshape(-1).view("u1").data
    back = Converter(wide, dtype)(out)
    return np.frombuffer(back, bits.dtype).reshape(bits.shape)
