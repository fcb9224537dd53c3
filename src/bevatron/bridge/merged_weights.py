"""An adapter's step and its base read as one model: each weight is merged while it is read.

The manifest of such a model says of an adapted weight that it lies in a file of the step's folder
that is not there: opening it computes it. So all that reads checkpoints reads this model too (the
engine, export, verify, another run), a box or a range of bytes at a time, in bounded memory.

W + s B A (DoRA: its rows in the lengths that were learnt) is computed in float64, and rounded to
fp32, then once to the dtype that the base has it in. A weight is always computed in the same blocks
of rows, so whoever reads it, in whatever parts, reads the same bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bevatron.bridge.adapter_base import values
from bevatron.checkpoint.dtypes import ITEMSIZE, Converter
from bevatron.checkpoint.manifest import Chunk, Manifest, TensorEntry
from bevatron.checkpoint.read_boxes import read_box, verify_chunk
from bevatron.checkpoint.storage import File
from bevatron.spec import ModelSpec, ParameterSpec

MERGED, BASE = "merged:", "base:"  # how names begin that are no files of the step's folder
BLOCK = 1 << 22  # elements that are merged at a time
KEPT = 4  # blocks of a weight, and
OPEN = 2  # weights, that stay for the next reading

if TYPE_CHECKING:
    _Path = Path
else:
    _Path = type(Path())


class MergedFolder(_Path):
    """A step's folder, in which names that begin with MERGED are weights to merge, and those that
    begin with BASE lie in the base's folder."""

    base: Path
    what: str
    weights: Mapping[str, Merge]
    latest: OrderedDict[str, MergedFile]  # those that were read last

    def __truediv__(self, name: Any) -> Path:  # type: ignore[override]
        text = str(name)
        if text.startswith(BASE):
            return self.base / text.removeprefix(BASE)
        path = super().__truediv__(name)
        if text.startswith(MERGED):
            computed = ComputedPath(path)
            computed.folder, computed.weight = self, text.removeprefix(MERGED)
            return computed
        return path

    def merge(self, weight: str) -> MergedFile:
        """The file of a weight; one that was read lately has its blocks still."""
        if weight not in self.latest:
            if len(self.latest) >= OPEN:
                self.latest.popitem(last=False)
            self.latest[weight] = MergedFile(self.weights[weight])
        self.latest.move_to_end(weight)
        return self.latest[weight]


class ComputedPath(_Path):
    """The path of a weight that is merged when it is read; see `checkpoint.storage.open_file`."""

    folder: MergedFolder
    weight: str

    def open_computed(self) -> File:
        return self.folder.merge(self.weight)


def merged(
    step: tuple[Path, Manifest, ModelSpec], base: tuple[Path, Manifest], *, check: bool
) -> tuple[Path, Manifest]:
    """The folder and the manifest of the merged model, whose spec is the step's `base`.

    Args:
        step: an adapter's step, with the spec that has the adapter.
        base: the model that it belongs to.
        check: whether the hashes of the base's adapted weights are checked before these are read,
            where it has any. (Those of the adapter always are.)"""
    folder, manifest, spec = step
    adapter = spec.adapter
    assert adapter is not None
    weights: dict[str, Merge] = {}
    tensors: dict[str, TensorEntry] = {}
    for number in (-1, *range(len(spec.layers))):
        for p in _parameters(spec, number):
            name = f"model/{p.name}"
            if adapter.owns(p.name):
                tensors[name] = manifest.tensors[name]
                continue
            there = _at(base[1].tensors[name], BASE)
            tensors[name] = there
            if adapter.parts(p, number):
                weights[p.name] = Merge(step, base, p, number, check)
                whole = Chunk((0,) * len(p.shape), p.shape, f"{MERGED}{p.name}", 0, "")
                tensors[name] = TensorEntry(there.dtype, p.shape, (whole,))
    for name, entry in base[1].tensors.items():
        if name.startswith("carried/"):
            tensors[name] = _at(entry, BASE)
    tensors |= {n: e for n, e in manifest.tensors.items() if n.startswith("optimizer/")}
    place = MergedFolder(folder)
    place.what = f"{adapter.kind} of rank {adapter.rank}"
    place.base, place.weights, place.latest = base[0], weights, OrderedDict()
    order = [f"model/{p.name}" for p in spec.base.parameters()]
    ordered = {n: tensors[n] for n in (*order, *(n for n in tensors if n not in set(order)))}
    extra = {k: v for k, v in manifest.extra.items() if k != "files"}
    return place, replace(manifest, tensors=ordered, extra=extra)


def merge_notes(folder: Path) -> list[str]:
    """A line that says so, if the model in this folder is merged as it is read."""
    if not isinstance(folder, MergedFolder):
        return []
    return [f"{folder} holds an adapter ({folder.what}), merged into its base {folder.base}"]


def read_through(folder: Path) -> list[Path]:
    """The folders that a checkpoint is read from: its own, of a merged one also its base's."""
    bases = read_through(folder.base) if isinstance(folder, MergedFolder) else []
    return [folder, *bases]


def _parameters(spec: ModelSpec, layer: int) -> list[ParameterSpec]:
    """The base's parameters of one layer; for -1, those outside of the layers."""
    base = spec.base
    if layer >= 0:
        return list(base.layer_parameters(layer))
    return [p for p in base.parameters() if not p.name.startswith("layers.")]


def _at(entry: TensorEntry, prefix: str) -> TensorEntry:
    chunks = (chunk._replace(file=prefix + chunk.file) for chunk in entry.chunks)
    return replace(entry, chunks=tuple(chunks))


class Merge:
    """How one weight is merged."""

    def __init__(
        self,
        step: tuple[Path, Manifest, ModelSpec],
        base: tuple[Path, Manifest],
        weight: ParameterSpec,
        layer: int,
        check: bool,
    ) -> None:
        self.check = check
        self.folder, self.manifest, spec = step
        self.base, self.entry = base[0], base[1].tensors[f"model/{weight.name}"]
        assert spec.adapter is not None
        self.weight, self.adapter = weight, spec.adapter
        self.parts = spec.adapter.parts(weight, layer)
        *rows, self.width = weight.shape
        self.rows = int(np.prod(rows))
        self.per_block = max(1, BLOCK // self.width)

    def factors(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """A [m, r, in], B [rows of the adapted parts, r] and the magnitude of those, in float64,
        after checking their hashes, and if asked for, the base's."""
        for chunk in self.entry.chunks if self.check else ():
            if chunk.hash:
                verify_chunk(self.base, chunk, ITEMSIZE[self.entry.dtype], self.weight.name)
        found: list[NDArray[Any] | None] = []
        for last in ("lora_a", "lora_b", "magnitude"):
            name = f"{self.weight.name.removesuffix('weight')}{last}"
            entry = self.manifest.tensors.get(f"model/{name}")
            if entry is None:
                found.append(None)
                continue
            for chunk in entry.chunks:
                if chunk.hash:
                    verify_chunk(self.folder, chunk, ITEMSIZE[entry.dtype], name)
            whole = values(self.folder, entry, (0,) * len(entry.shape), entry.shape)
            found.append(whole.astype("f8"))
        a, b, magnitude = found
        assert a is not None and b is not None
        r = self.adapter.rank
        right = None if magnitude is None else magnitude.reshape(-1)
        return a.reshape(-1, r, self.width), b.reshape(-1, r), right

    def base_rows(self, first: int, last: int) -> NDArray[Any]:
        """Rows of the base's weight, all of its leading dimensions in one, in float64."""
        *_, height, _ = self.entry.shape
        out, at = [], first
        while at < last:
            lead, row = divmod(at, height)
            count = min(height - row, last - at)
            offset, shape = (row, 0), (count, self.width)
            if len(self.entry.shape) == 3:
                offset, shape = (lead, *offset), (1, *shape)  # type: ignore[assignment]
            bits = np.ascontiguousarray(read_box(self.base, self.entry, offset, shape))
            wide = "F64" if self.entry.dtype == "F64" else "F32"
            raw = Converter(self.entry.dtype, wide)(bits.reshape(-1).view("u1").data)
            found = np.frombuffer(raw, "<f8" if wide == "F64" else "<f4")
            out.append(found.reshape(count, self.width).astype("f8"))
            at += count
        return np.concatenate(out)


def row_places(
    weight: ParameterSpec, parts: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of every row of a weight, which of the matrices that it is fused of it belongs to, and which
    row of B it has if these `parts` are adapted, -1 for none."""
    *rows, _ = weight.shape
    groups, sizes = weight.fused or (1, (int(np.prod(rows)),))
    part = np.tile(np.repeat(np.arange(len(sizes)), sizes), groups)
    adapted = np.isin(part, parts)
    return part, np.where(adapted, np.cumsum(adapted) - 1, -1)


class MergedFile:
    """The bytes of a merged weight, row after row, in the base's dtype."""

    def __init__(self, merge: Merge) -> None:
        self.merge = merge
        self.dtype = merge.entry.dtype
        self.size = merge.entry.nbytes
        self.a, self.b, self.magnitude = merge.factors()
        self.part, self.row = row_places(merge.weight, merge.parts)
        self.blocks: OrderedDict[int, memoryview] = OrderedDict()

    def read(self, out: memoryview, at: int) -> None:
        bytes_per_block = self.merge.per_block * self.merge.width * ITEMSIZE[self.dtype]
        done = 0
        while done < len(out):
            number, begin = divmod(at + done, bytes_per_block)
            piece = self._block(number)[begin : begin + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)

    def close(self) -> None:
        """Nothing: the folder keeps it for a while."""

    def _block(self, number: int) -> memoryview:
        if number not in self.blocks:
            if len(self.blocks) >= KEPT:
                self.blocks.popitem(last=False)
            self.blocks[number] = self._merged(number)
        self.blocks.move_to_end(number)
        return self.blocks[number]

    def _merged(self, number: int) -> memoryview:
        merge = self.merge
        first = number * merge.per_block
        last = min(merge.rows, first + merge.per_block)
        found = merge.base_rows(first, last)
        part, row = self.part[first:last], self.row[first:last]
        for i, adapted in enumerate(merge.parts):
            here = np.flatnonzero(part == adapted)
            if not len(here):
                continue
            left = self.a[0 if len(self.a) == 1 else i]
            found[here] += merge.adapter.scale * (self.b[row[here]] @ left)
            if self.magnitude is not None:
                lengths = np.linalg.norm(found[here], axis=1)
                found[here] *= (self.magnitude[row[here]] / lengths)[:, None]
        if self.dtype == "F64":
            return found.reshape(-1).view("u1").data
        wide = found.astype("<f4").reshape(-1).view("u1").data
        return Converter("F32", self.dtype)(wide)
