"""Reading the rows and columns of a tensor that stay, a few megabytes at a time.

No torch: a tensor is boxes in files (`checkpoint/read_boxes.py`), its elements are bits. Memory is
one block, or one tensor where rows change their order or heads are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bevatron.bridge.cast import Converter
from bevatron.checkpoint.manifest import ITEMSIZE, TensorEntry
from bevatron.checkpoint.read_boxes import read_box
from bevatron.compress.kept_indices import PAD, Index, Pairs, query_rows
from bevatron.compress.pruned_spec import PruneError
from bevatron.spec import Attention

BLOCK = 16 << 20  # bytes
MERGES = ("none", "residual", "sum")

Bits = NDArray[Any]
Change = Callable[[Bits], Bits]


def blocks(
    folder: Path, entry: TensorEntry, index: Sequence[Index | None], change: Change | None = None
) -> Iterator[Bits]:
    """The bits of `tensor[index]` in row-major order, in contiguous pieces.

    Args:
        index: per dimension the entries that stay; None for all. A tensor has one, two or three
            dimensions, the first of three is whole. PADs at the end of one become zeros.
        change: of a whole matrix before it is cut, as its float values.
    """
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

    per_block = max(1, BLOCK // max(1, width * ITEMSIZE[entry.dtype]))
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


def merge(mode: str, part: str, attention: Attention, pairs: Pairs) -> Change | None:
    """What merging dropped heads into kept ones does to a tensor of the attention.

    Args:
        mode: `residual`, Minitron's (arXiv 2407.14679, section 2.3): the query rows of a survivor
            become twice its own less those of the head that it is paired with. `sum`: the output
            columns of a dropped head are added to those of the survivor, as if the two computed
            the same.
        part: `qkv` or `o`.
    Raises PruneError for `residual` where fewer than half of the heads stay.
    """
    if mode == "none" or not pairs or {"residual": "qkv", "sum": "o"}[mode] != part:
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


def cut_shape(shape: tuple[int, ...], index: Sequence[Index | None]) -> tuple[int, ...]:
    """The shape of `tensor[index]`."""
    return tuple(n if i is None else len(i) for n, i in zip(shape, index, strict=True))
