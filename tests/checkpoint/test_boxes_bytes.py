"""Any box of a tensor comes back whatever boxes it was stored in; damage is named."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import xxhash

from bevatron.checkpoint import read_boxes
from bevatron.checkpoint.manifest import Chunk, TensorEntry
from bevatron.checkpoint.read_boxes import hash_tensor, read_box, runs, stream_rows, verify_chunk
from bevatron.errors import CheckpointError

NAMES = {1: "U8", 2: "BF16", 4: "F32", 8: "I64"}


def split(rng: random.Random, offset, shape, depth):
    """Cut a box into boxes at random places, unevenly."""
    wide = [d for d, n in enumerate(shape) if n > 1]
    if not depth or not wide:
        return [(offset, shape)]
    d = rng.choice(wide)
    cut = rng.randint(1, shape[d] - 1)
    low = (*shape[:d], cut, *shape[d + 1 :])
    high = (*shape[:d], shape[d] - cut, *shape[d + 1 :])
    moved = (*offset[:d], offset[d] + cut, *offset[d + 1 :])
    return split(rng, offset, low, depth - 1) + split(rng, moved, high, depth - 1)


def store(folder: Path, array: np.ndarray, rng: random.Random, depth: int) -> TensorEntry:
    """Write an array in random boxes over two files, with junk between."""
    parts = split(rng, (0,) * array.ndim, array.shape, depth)
    rng.shuffle(parts)
    files = {"a.bin": bytearray(b"junk"), "b.bin": bytearray(b"!")}
    chunks = []
    for offset, shape in parts:
        name = rng.choice(sorted(files))
        box = array[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))].tobytes()
        digest = "xxh3:" + xxhash.xxh3_128_hexdigest(box)
        chunks.append(Chunk(offset, shape, name, len(files[name]), digest))
        files[name] += box + bytes(rng.randint(0, 3))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return TensorEntry(NAMES[array.dtype.itemsize], array.shape, tuple(chunks))


SHAPES = [(), (1,), (13,), (7, 5), (1, 9), (2, 6, 5), (3, 4, 2, 5), (0, 4)]


@pytest.mark.parametrize("seed", range(40))
def test_any_box_from_any_chunking(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(read_boxes, "BUFFER", rng.choice([8, 40, 4096]))
    monkeypatch.setattr(read_boxes, "DIRECT", rng.choice([4, 32, 4096]))
    shape = rng.choice(SHAPES)
    dtype = rng.choice(["u1", "u2", "u4", "u8"])
    array = np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)
    entry = store(tmp_path, array, rng, depth=rng.randint(0, 4))
    for _ in range(6):
        low = tuple(rng.randint(0, n) for n in shape)
        size = tuple(rng.randint(0, n - a) for a, n in zip(low, shape, strict=True))
        got = read_box(tmp_path, entry, low, size)
        want = array[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))]
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    whole = np.empty((*shape, 2), dtype=dtype)[..., 0] if shape else np.empty((), dtype=dtype)
    np.testing.assert_array_equal(read_box(tmp_path, entry, (0,) * len(shape), shape, whole), array)
    assert whole.ndim == 0 or np.array_equal(whole, array)


@pytest.mark.parametrize("seed", range(20))
def test_row_major_order_from_any_chunking(tmp_path, seed):
    rng = random.Random(seed)
    shape = rng.choice(SHAPES)
    array = np.random.default_rng(seed).integers(0, 250, shape).astype("u2")
    entry = store(tmp_path, array, rng, depth=4)
    for size in (2, 6, 1 << 16):
        views = stream_rows(tmp_path, entry, memoryview(bytearray(size)))
        assert b"".join(bytes(v) for v in views) == array.tobytes()
    assert hash_tensor(tmp_path, entry) == "xxh3:" + xxhash.xxh3_128_hexdigest(array.tobytes())
    for chunk in entry.chunks:
        verify_chunk(tmp_path, chunk, 2)


def test_whole_rows_are_one_run(tmp_path):
    array = np.arange(24, dtype="u2").reshape(2, 3, 4)
    entry = store(tmp_path, array, random.Random(0), depth=0)
    assert [r.nbytes for r in runs(entry)] == [48]


def test_a_flipped_bit_is_named(tmp_path):
    array = np.arange(64, dtype="u4").reshape(8, 8)
    entry = store(tmp_path, array, random.Random(1), depth=0)
    (chunk,) = entry.chunks
    data = bytearray((tmp_path / chunk.file).read_bytes())
    data[chunk.at + 5] ^= 4
    (tmp_path / chunk.file).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{chunk.file}.*embed.weight.*{chunk.hash}"):
        verify_chunk(tmp_path, chunk, 4, "embed.weight")


def test_truncated_missing_and_outside_are_clear(tmp_path):
    array = np.arange(64, dtype="u4").reshape(8, 8)
    entry = store(tmp_path, array, random.Random(1), depth=0)
    with pytest.raises(CheckpointError, match="outside of a tensor"):
        read_box(tmp_path, entry, (0, 4), (8, 5))
    path = tmp_path / entry.chunks[0].file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="truncated"):
        read_box(tmp_path, entry, (0, 0), (8, 8))
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_box(tmp_path, entry, (0, 0), (8, 8))


def test_chunks_that_overlap_or_miss_are_refused(tmp_path):
    (tmp_path / "a").write_bytes(bytes(64))
    left, right = Chunk((0,), (2,), "a", 0, ""), Chunk((1,), (2,), "a", 0, "")
    with pytest.raises(CheckpointError, match="overlap"):
        list(runs(TensorEntry("F32", (4,), (left, right))))
    with pytest.raises(CheckpointError, match="end at its byte"):
        list(runs(TensorEntry("F32", (4,), (left,))))
    with pytest.raises(CheckpointError, match="cover 2 of the 4"):
        read_box(tmp_path, TensorEntry("F32", (4,), (left,)), (0,), (4,))
