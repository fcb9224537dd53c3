"""Saving and loading a native checkpoint at any layout: each rank its own boxes.

A tensor's placement says which box of the global tensor a rank holds; saving writes that box as one
chunk (of equal copies, the first), loading reads whatever chunks meet it. Nobody gathers a tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevatron.checkpoint.boxes import new_hasher, read_box, spell, verify_chunk
from bevatron.checkpoint.manifest import (
    ITEMSIZE,
    CheckpointError,
    Chunk,
    Manifest,
    TensorEntry,
)
from bevatron.checkpoint.shard import box, is_first_copy

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SPELLED = {dtype: name for name, dtype in DTYPES.items()}

# Fills any box of a tensor, as raw unsigned integers: (entry, offset, shape) -> array.
ReadBox = Callable[[str, tuple[int, ...], tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Saved:
    """One tensor to write. `placed` says which box of the global tensor `values` are."""

    name: str
    placed: Tensor
    values: Tensor
    dtype: torch.dtype


Boxes = dict[str, TensorEntry]


def write_rank(folder: Path, tensors: Iterable[Saved], rank: int) -> Boxes:
    """Write this rank's boxes below `folder`; returns them as entries with (at most) one chunk."""
    by_file: dict[str, list[Saved]] = {}
    entries: Boxes = {}
    for saved in tensors:
        entries[saved.name] = TensorEntry(SPELLED[saved.dtype], tuple(saved.placed.shape), ())
        if is_first_copy(saved.placed) and saved.values.numel():
            file = f"{saved.name.partition('/')[0]}/rank-{rank:05d}.safetensors"
            by_file.setdefault(file, []).append(saved)
    for file, items in by_file.items():
        (folder / file).parent.mkdir(exist_ok=True)
        _write_file(folder, file, items, entries)
    return entries


def _write_file(folder: Path, file: str, items: list[Saved], entries: Boxes) -> None:
    """A safetensors file of boxes; keys are `name@offset` so that it can be read on its own."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for item in items:
        offset, shape = box(item.placed)
        size = math.prod(shape) * item.dtype.itemsize
        entry = {"dtype": SPELLED[item.dtype], "shape": shape, "data_offsets": (at, at + size)}
        header[f"{item.name}@{','.join(map(str, offset))}"] = entry
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with (folder / file).open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for item in items:
            data = _bytes(item.values.detach().to(item.dtype))
            hasher = new_hasher()
            hasher.update(data)
            offset, shape = box(item.placed)
            chunk = Chunk(offset, shape, file, start, spell(hasher))
            entry_of = entries[item.name]
            entries[item.name] = TensorEntry(entry_of.dtype, entry_of.shape, (chunk,))
            out.write(data)
            start += len(data)
        out.flush()
        os.fsync(out.fileno())


def _bytes(tensor: Tensor) -> memoryview:
    raw: Any = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(raw)


def verify_share(folder: Path, manifest: Manifest, rank: int, world: int) -> None:
    """Check the hashes of this rank's share of the checkpoint's bytes: each chunk by one rank.

    Raises CheckpointError naming the file and the tensor of a chunk that changed."""
    chunks = [(name, t, c) for name, t in manifest.tensors.items() for c in t.chunks]
    chunks.sort(key=lambda item: -math.prod(item[2].shape))
    for name, tensor, chunk in chunks[rank::world]:
        verify_chunk(folder, chunk, ITEMSIZE[tensor.dtype], name)


def merge(ranks: Iterable[Boxes]) -> Boxes:
    """All ranks' boxes as one table of global tensors."""
    table: Boxes = {}
    for entries in ranks:
        for name, entry in entries.items():
            held = table.setdefault(name, entry)
            if held is not entry:
                chunks = tuple(sorted((*held.chunks, *entry.chunks), key=lambda c: c.offset))
                table[name] = TensorEntry(held.dtype, held.shape, chunks)
    return table


def box_reader(folder: Path, manifest: Manifest, prefix: str) -> ReadBox:
    """Reads boxes of the tensors `prefix` + name of a native checkpoint."""

    def read(name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        entry = manifest.tensors[prefix + name]
        raw = read_box(folder, entry, offset, shape)
        return torch.from_numpy(raw).view(DTYPES[entry.dtype])

    return read


def load(
    into: Mapping[str, tuple[Tensor, Tensor]], shapes: Mapping[str, tuple[int, ...]], read: ReadBox
) -> None:
    """Fill local values from a checkpoint, cast to their dtype.

    Args:
        into: name -> (the tensor whose placement says which box, the local values to fill).
        shapes: name -> global shape in the checkpoint.
    """
    for name, (placed, values) in into.items():
        if name not in shapes:
            raise CheckpointError(f"{name} is not in the checkpoint; it belongs to another model")
        if tuple(placed.shape) != tuple(shapes[name]):
            raise CheckpointError(
                f"{name} has shape {tuple(shapes[name])} in the checkpoint, the model expects "
                f"{tuple(placed.shape)}"
            )
        if values.numel():
            offset, shape = box(placed)
            values.copy_(read(name, offset, shape))
