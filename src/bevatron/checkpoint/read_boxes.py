"""Reading tensors of a native checkpoint, however they are cut into chunks.

A chunk is a box of a tensor that lies as contiguous row-major bytes in a file. Two ways to read:
`read_box` fills any other box of the tensor (loading at a layout), `runs` lists the file ranges
that make up the tensor in row-major order (export, hashes). No torch here; numpy only in
`read_box`. Temporary memory is one buffer of `BUFFER` bytes, whatever the size of the tensor.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import xxhash

from bevatron.checkpoint.dtypes import ITEMSIZE
from bevatron.checkpoint.manifest import Chunk, TensorEntry
from bevatron.checkpoint.storage import File, open_file
from bevatron.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BUFFER = 4 << 20
HASH_BUFFER = 2 << 20  # read at a time; stays in the shared cache until hashed and written
SAMPLED = 256  # numbers at either end of a tensor that tell models apart
DIRECT = 64 << 10  # a contiguous piece of at least so many bytes is worth its own read


class Hasher(Protocol):
    """What the hashes here need of xxhash.xxh3_128."""

    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


def new_hasher() -> Hasher:
    """An empty XXH3 of 128 bit."""
    hasher: Hasher = xxhash.xxh3_128()
    return hasher


def spell(hasher: Hasher) -> str:
    """A hash as the manifest spells it: `xxh3:` and 32 hex digits."""
    return f"xxh3:{hasher.hexdigest()}"


def hash_bytes(data: bytes | memoryview) -> str:
    """`xxh3:...` of bytes in memory."""
    hasher = new_hasher()
    hasher.update(memoryview(data))
    return spell(hasher)


def hash_file(path: Path) -> str:
    """`xxh3:...` of a file on disk, read through in small parts. Raises OSError."""
    hasher, buffer = new_hasher(), memoryview(bytearray(HASH_BUFFER))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            hasher.update(buffer[:n])
    return spell(hasher)


class Run(NamedTuple):
    """`nbytes` bytes of a tensor from its row-major byte `begin` on lie in `file` at byte `at`, as
    part of its chunk number `chunk`."""

    begin: int
    file: str
    at: int
    nbytes: int
    chunk: int


def runs(entry: TensorEntry) -> Iterator[Run]:
    """The file ranges that make up the tensor, in row-major order, without gaps or overlaps.

    Raises CheckpointError if the chunks do not tile the tensor."""
    position = 0
    for run in heapq.merge(*(_chunk_runs(entry, number) for number in range(len(entry.chunks)))):
        if run.begin != position:
            what = "overlap" if run.begin < position else "leave a gap"
            raise CheckpointError(
                f"{run.file}: the chunks of a tensor of shape {list(entry.shape)} {what} at its "
                f"byte {min(position, run.begin)}; the checkpoint is damaged"
            )
        position += run.nbytes
        yield run
    if position != entry.nbytes:
        raise CheckpointError(
            f"the chunks of a tensor of shape {list(entry.shape)} end at its byte {position}, "
            f"expected {entry.nbytes}; the checkpoint is damaged"
        )


def _strides(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Bytes between neighbours, per dimension, of a row-major array."""
    strides = [itemsize] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    return strides


def _chunk_runs(entry: TensorEntry, number: int) -> Iterator[Run]:
    """The runs of one chunk: as long as the chunk spans the tensor's trailing dimensions."""
    chunk = entry.chunks[number]
    itemsize = ITEMSIZE[entry.dtype]
    if 0 in chunk.shape:
        return
    k = len(entry.shape) - 1
    while k > 0 and chunk.shape[k] == entry.shape[k]:
        k -= 1
    length = math.prod(chunk.shape[max(k, 0) :]) * itemsize
    strides = _strides(entry.shape, itemsize)
    begin = sum(o * s for o, s in zip(chunk.offset, strides, strict=True))
    lead, at = chunk.shape[: max(k, 0)], chunk.at
    for index in _indices(lead):
        position = begin + sum(i * s for i, s in zip(index, strides, strict=False))
        yield Run(position, chunk.file, at, length, number)
        at += length


def _indices(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All indices of an array, in row-major order (itertools.product would hold its ranges)."""
    if not shape:
        yield ()
        return
    for i in range(shape[0]):
        for rest in _indices(shape[1:]):
            yield (i, *rest)


def stream_rows(folder: Path, entry: TensorEntry, buffer: memoryview) -> Iterator[memoryview]:
    """The tensor's bytes in row-major order, in views of `buffer` that the next step overwrites."""
    files: dict[str, File] = {}
    filled = 0
    try:
        for run in runs(entry):
            file = files.get(run.file)
            if file is None:
                file = files[run.file] = open_file(folder / run.file)
            done = 0
            while done < run.nbytes:
                count = min(run.nbytes - done, len(buffer) - filled)
                view = buffer[filled : filled + count]
                file.read(view, run.at + done)
                done, filled = done + count, filled + count
                if filled == len(buffer):
                    yield buffer
                    filled = 0
        if filled:
            yield buffer[:filled]
    finally:
        for file in files.values():
            file.close()


def hash_tensor(folder: Path, entry: TensorEntry) -> str:
    """`xxh3:...` of the tensor's row-major bytes, whatever its chunking."""
    hasher = new_hasher()
    for view in stream_rows(folder, entry, memoryview(bytearray(HASH_BUFFER))):
        hasher.update(view)
    return spell(hasher)


def hash_range(file: File, at: int, nbytes: int, buffer: memoryview) -> str:
    """`xxh3:...` of a range of an open file."""
    hasher, done = new_hasher(), 0
    while done < nbytes:
        view = buffer[: min(len(buffer), nbytes - done)]
        file.read(view, at + done)
        hasher.update(view)
        done += len(view)
    return spell(hasher)


def verify_chunk(folder: Path, chunk: Chunk, itemsize: int, name: str = "") -> None:
    """Recompute the hash of a chunk. Raises CheckpointError if its bytes are not those written."""
    path = folder / chunk.file
    nbytes = math.prod(chunk.shape) * itemsize
    with closing(open_file(path)) as file:
        found = hash_range(file, chunk.at, nbytes, memoryview(bytearray(HASH_BUFFER)))
    if found != chunk.hash:
        raise damaged(path, chunk, nbytes, found, name)


def damaged(path: Path, chunk: Chunk, nbytes: int, found: str, name: str = "") -> CheckpointError:
    """The error for a chunk whose bytes are not those that were written."""
    return CheckpointError(
        f"{path}: bytes {chunk.at} to {chunk.at + nbytes} of {name or 'a tensor'} are damaged: "
        f"their hash is {found}, expected {chunk.hash}; restore the file from its source"
    )


# ---------------------------------------------------------------------------------------------
# Boxes, as numpy arrays
# ---------------------------------------------------------------------------------------------


def read_box(
    folder: Path,
    entry: TensorEntry,
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """A box of a tensor, read from the chunks that it meets.

    Args:
        offset, shape: the box, in elements per dimension of the global tensor.
        out: filled and returned instead of a new array, if given: of this shape and of unsigned
            integers of the tensor's item size; it need not be contiguous.

    Returns:
        The elements' bits as unsigned integers (uint16 for BF16 and F16, uint32 for F32, ...).
    """
    import numpy as np

    itemsize = ITEMSIZE[entry.dtype]
    _check_box(entry, offset, shape)
    if out is None:
        out = np.empty(shape, dtype=f"u{itemsize}")
    elif out.shape != shape or out.dtype != np.dtype(f"u{itemsize}"):
        raise CheckpointError(
            f"read_box: out is {out.dtype} of shape {list(out.shape)}, expected uint{8 * itemsize} "
            f"of shape {list(shape)}"
        )
    covered = 0
    for chunk in entry.chunks:
        low = tuple(max(a, b) for a, b in zip(offset, chunk.offset, strict=True))
        high = tuple(
            min(a + n, b + m)
            for a, n, b, m in zip(offset, shape, chunk.offset, chunk.shape, strict=True)
        )
        if any(lo >= hi for lo, hi in zip(low, high, strict=True)):
            continue
        covered += math.prod(hi - lo for lo, hi in zip(low, high, strict=True))
        target = out[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))]
        part = tuple((a - o, b - o) for a, b, o in zip(low, high, chunk.offset, strict=True))
        with closing(open_file(folder / chunk.file)) as file:
            _read_part(_Box(file, chunk.shape, itemsize), chunk.at, part, target)
    if covered != math.prod(shape):
        raise CheckpointError(
            f"{folder}: the chunks cover {covered} of the {math.prod(shape)} elements of the box "
            f"{list(shape)} at {list(offset)}; the checkpoint is damaged"
        )
    return out


def both_ends(
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Of every tensor, by name, a short box at its beginning and one at its end: (name, offset,
    shape). Enough to tell models apart, whatever the format; not safe against intent."""
    for name, shape in sorted(shapes.items()):
        size = (*[1] * (len(shape) - 1), min(shape[-1], SAMPLED))
        yield name, (0,) * len(shape), size
        yield name, tuple(n - s for n, s in zip(shape, size, strict=True)), size


def _check_box(entry: TensorEntry, offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
    inside = len(offset) == len(shape) == len(entry.shape) and all(
        o >= 0 and n >= 0 and o + n <= size
        for o, n, size in zip(offset, shape, entry.shape, strict=True)
    )
    if not inside:
        raise CheckpointError(
            f"the box {list(shape)} at {list(offset)} lies outside of a tensor of shape "
            f"{list(entry.shape)}"
        )


class _Box(NamedTuple):
    """A row-major array in an open file; its position is passed beside it."""

    file: File
    shape: tuple[int, ...]
    itemsize: int


def _read_part(
    box: _Box, at: int, part: tuple[tuple[int, int], ...], out: np.ndarray[Any, Any]
) -> None:
    """Fill `out` with the index ranges `part` of the array that begins at byte `at`.

    Long contiguous pieces are read straight into `out`; short ones (a few columns of every row) by
    reading whole rows into a buffer and copying from there."""
    import numpy as np

    k = len(part) - 1  # the innermost dimension of which not all is wanted
    while k > 0 and part[k] == (0, box.shape[k]):
        k -= 1
    strides = _strides(box.shape, box.itemsize)
    begin = at + (part[0][0] * strides[0] if part else 0)
    if k <= 0 and out.flags.c_contiguous:  # scalars too
        box.file.read(_bytes(out), begin)
        return
    slab = strides[0]  # bytes of one index of the first dimension
    run = (part[k][1] - part[k][0]) * strides[k]  # bytes of one contiguous piece
    if k > 0 and (run >= DIRECT or slab > BUFFER):
        inner = box._replace(shape=box.shape[1:])
        for i in range(out.shape[0]):
            _read_part(inner, begin + i * slab, part[1:], out[i])
        return
    window = tuple(slice(a, b) for a, b in part[1:])
    step = max(1, BUFFER // slab)
    rows = np.empty((min(step, out.shape[0]), *box.shape[1:]), dtype=out.dtype)
    for i in range(0, out.shape[0], step):
        some = rows[: min(step, out.shape[0] - i)]
        box.file.read(_bytes(some), begin + i * slab)
        out[i : i + step] = some[(slice(None), *window)]


def _bytes(array: np.ndarray[Any, Any]) -> memoryview:
    """The bytes of a contiguous array, writable."""
    return array.reshape(-1).view("u1").data
