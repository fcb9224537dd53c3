"""Saving and loading a native checkpoint at any layout, where each rank handles its own boxes.

A tensor's placement says which box of the global tensor a rank holds. Saving writes this box as one
chunk (of several equal copies only the first is written); loading reads all chunks that overlap the
box. No rank gathers a tensor.

A snapshot copies the boxes to host memory, so that training goes on while they are written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevatron.checkpoint.dtypes import ITEMSIZE, KINDS, NATIVE
from bevatron.checkpoint.manifest import Chunk, Manifest, TensorEntry
from bevatron.checkpoint.rank_boxes import box, shares
from bevatron.checkpoint.rank_tables import FOLDER, leave_table
from bevatron.checkpoint.read_boxes import new_hasher, read_box, spell, verify_chunk
from bevatron.errors import CheckpointError
from bevatron.progress import Advance, progress

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, KINDS[name].name) for name in NATIVE}
PIECE = 4 << 20  # bytes hashed and written at a time, while they are in the cache
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


class Snapshot:
    """One set of host buffers, used again by every save: memory is bounded at one copy of what
    this rank writes. With an accelerator they are page-locked, which its copies need for speed."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def take(self, tensors: Sequence[Saved]) -> list[Saved]:
        """The tensors with their present values, which stay as they are until the next call.

        What several of them share (weights, and the masters that they are rounded from) is copied
        once; the rounding is left to the writer."""
        seen: dict[tuple[int, int], Tensor] = {}
        out, device = [], None
        for saved in tensors:
            values = saved.values.detach()
            key = (values.data_ptr(), values.numel())
            if key not in seen:
                seen[key] = self._buffer(saved.name, values)
                seen[key].copy_(values, non_blocking=True)
            if values.device.type != "cpu":
                device = values.device
            out.append(replace(saved, values=seen[key]))
        if device is not None:
            torch.accelerator.synchronize(device)
        return out

    def _buffer(self, name: str, values: Tensor) -> Tensor:
        held = self.buffers.get(name)
        if held is None or held.shape != values.shape or held.dtype != values.dtype:
            pinned = values.device.type != "cpu"
            held = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
            self.buffers[name] = held
        return held


Boxes = dict[str, TensorEntry]


def own_share(tensors: Iterable[Saved]) -> list[Saved]:
    """What this rank writes of them: of equal copies on several ranks, one writes each."""
    tensors = list(tensors)
    mine = shares([(saved.placed, saved.dtype.itemsize) for saved in tensors])
    return [t for t, writes in zip(tensors, mine, strict=True) if writes and t.values.numel()]


def write_rank(
    folder: Path,
    tensors: Iterable[Saved],
    rank: int,
    own: Iterable[Saved] | None = None,
    shown: str | None = None,
) -> None:
    """Write this rank's boxes below `folder`, and leave its table of them there, for the one that
    joins all ranks' tables to a manifest (`rank_tables.merge_tables`).

    Args:
        tensors: all that the rank has a box of; `own`: those whose box it writes, if they are known
            already (as copies in host memory, say).
        shown: the progress's name."""
    tensors = list(tensors)
    (folder / FOLDER).mkdir(exist_ok=True)
    written = write_share(folder, own_share(tensors) if own is None else own, rank, shown)
    leave_table(folder, rank, without_chunks(tensors) | written)


def without_chunks(tensors: Iterable[Saved]) -> Boxes:
    """Entries of tensors of which nothing is written yet."""
    return {t.name: TensorEntry(SPELLED[t.dtype], tuple(t.placed.shape), ()) for t in tensors}


def write_share(
    folder: Path, tensors: Iterable[Saved], rank: int, shown: str | None = None
) -> Boxes:
    """Write all of these boxes, each as one chunk, below `folder`; `shown`: the progress's name."""
    tensors = list(tensors)
    total = sum(t.values.numel() * t.dtype.itemsize for t in tensors)
    with progress(shown or "", total, "B", show=shown is not None) as advance:
        return _write_files(folder, tensors, rank, advance)


def _write_files(folder: Path, tensors: Iterable[Saved], rank: int, advance: Advance) -> Boxes:
    by_file: dict[str, list[Saved]] = {}
    entries: Boxes = {}
    for saved in tensors:
        file = f"{saved.name.partition('/')[0]}/rank-{rank:05d}.safetensors"
        by_file.setdefault(file, []).append(saved)
    for file, items in by_file.items():
        (folder / file).parent.mkdir(exist_ok=True)
        try:
            _write_file(folder, file, items, entries, advance)
        except OSError as error:  # of a write, which does not say to what
            raise OSError(error.errno, error.strerror, str(folder / file)) from error
    return entries


def _write_file(
    folder: Path, file: str, items: list[Saved], entries: Boxes, advance: Advance
) -> None:
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
            for i in range(0, len(data), PIECE):
                hasher.update(data[i : i + PIECE])
                advance(out.write(data[i : i + PIECE]))
            offset, shape = box(item.placed)
            chunk = Chunk(offset, shape, file, start, spell(hasher))
            dtype, whole = SPELLED[item.dtype], tuple(item.placed.shape)
            entries[item.name] = TensorEntry(dtype, whole, (chunk,))
            start += len(data)
        out.flush()
        os.fsync(out.fileno())


def _bytes(tensor: Tensor) -> memoryview:
    raw: Any = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(raw)


def verify_share(folder: Path, manifest: Manifest, rank: int, world: int) -> None:
    """Check the hashes of this rank's share of the checkpoint's bytes: each chunk by one rank.
    (Weights that are merged as they are read have none.)

    Raises CheckpointError naming the file and the tensor of a chunk that changed."""
    chunks = [(name, t, c) for name, t in manifest.tensors.items() for c in t.chunks if c.hash]
    chunks.sort(key=lambda item: -math.prod(item[2].shape))
    own = chunks[rank::world]
    total = sum(math.prod(chunk.shape) * ITEMSIZE[tensor.dtype] for _, tensor, chunk in own)
    with progress(f"checking {folder.name}", total, "B", show=rank == 0) as advance:
        for name, tensor, chunk in own:
            verify_chunk(folder, chunk, ITEMSIZE[tensor.dtype], name)
            advance(math.prod(chunk.shape) * ITEMSIZE[tensor.dtype])


def box_reader(folder: Path, manifest: Manifest, prefix: str) -> ReadBox:
    """Reads boxes of the tensors `prefix` + name of a native checkpoint."""

    def read(name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        entry = manifest.tensors[prefix + name]
        raw = read_box(folder, entry, offset, shape)
        return torch.from_numpy(raw).view(DTYPES[entry.dtype])

    return read


def load(
    into: Mapping[str, tuple[Tensor, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    read: ReadBox,
    shown: str | None = None,
) -> None:
    """Fill local values from a checkpoint, cast to their dtype; shows the progress as `shown`.

    Args:
        into: name -> (the tensor whose placement says which box, the local values to fill).
        shapes: name -> global shape in the checkpoint.
    """
    total = sum(values.numel() for _, values in into.values())
    with progress(shown or "", total, "elements", show=shown is not None) as advance:
        for name, (placed, values) in into.items():
            if name not in shapes:
                raise CheckpointError(
                    f"{name} is not in the checkpoint; it belongs to another model"
                )
            if tuple(placed.shape) != tuple(shapes[name]):
                raise CheckpointError(
                    f"{name} has shape {tuple(shapes[name])} in the checkpoint, the model expects "
                    f"{tuple(placed.shape)}"
                )
            if values.numel():
                offset, shape = box(placed)
                values.copy_(read(name, offset, shape))
                advance(values.numel())
