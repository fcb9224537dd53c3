"""Writing the weights of a native checkpoint, whatever their source, and committing it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bevatron.bridge.byte_mover import Mover
from bevatron.checkpoint.dtypes import ITEMSIZE
from bevatron.checkpoint.manifest import FILE_NAME, Chunk, Manifest, TensorEntry
from bevatron.checkpoint.rank_tables import Merged
from bevatron.checkpoint.read_boxes import new_hasher, spell
from bevatron.checkpoint.safetensors_file import write_header
from bevatron.spec import ModelSpec
from bevatron.spec.json import to_json

FILE_BYTES = 4 << 30  # of a native weight file, unless one tensor is larger

# Of a native tensor: its name in the manifest, dtype and shape.
Table = Sequence[tuple[str, str, tuple[int, ...]]]


def lay_out(
    tensors: Table, file_bytes: int = FILE_BYTES
) -> tuple[dict[str, tuple[str, int]], dict[str, bytes]]:
    """Places of native tensors in `model/00001.safetensors`, ... and those files' headers."""
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = []
    filled = 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * ITEMSIZE[dtype]
        if not groups or (filled and filled + nbytes > file_bytes):
            groups.append([])
            filled = 0
        groups[-1].append((name, dtype, shape))
        filled += nbytes
    places: dict[str, tuple[str, int]] = {}
    headers: dict[str, bytes] = {}
    for number, group in enumerate(groups, 1):
        file = f"model/{number:05d}.safetensors"
        group.sort(key=lambda t: -ITEMSIZE[t[1]])  # keeps every tensor aligned to its elements
        # The key in a native safetensors file leaves `model/` out.
        table = [(name.removeprefix("model/"), dtype, shape) for name, dtype, shape in group]
        headers[file] = write_header(table, {"format": "pt"})
        at = len(headers[file])
        for name, dtype, shape in group:
            places[name] = (file, at)
            at += math.prod(shape) * ITEMSIZE[dtype]
    return places, headers


def write_tensors(
    folder: Path, tensors: Table, content: Callable[[str], Iterable[memoryview]]
) -> dict[str, TensorEntry]:
    """Write `model/` in a new folder, each tensor as a whole.

    Args:
        content: gives a tensor's bytes in row-major order, in pieces of any size, which are written
            and hashed before the next one is asked for.
    Returns the tensors as a manifest lists them."""
    places, headers = lay_out(tensors)
    (folder / "model").mkdir()
    entries: dict[str, TensorEntry] = {}
    with Mover(lambda n: None) as mover:
        for file, header in headers.items():
            mover.write(folder / file, 0, header)
        for name, dtype, shape in tensors:
            file, at = places[name]
            hasher, done = new_hasher(), 0
            for data in content(name):
                hasher.update(data)
                mover.write(folder / file, at + done, data)
                done += len(data)
            chunk = Chunk((0,) * len(shape), shape, file, at, spell(hasher))
            entries[name] = TensorEntry(dtype, shape, (chunk,))
    return entries


def commit(folder: Path, spec: ModelSpec, manifest: Manifest | Merged) -> None:
    """What every native checkpoint has beside its weights; the manifest, which makes the folder
    one, comes last."""
    (folder / "spec.json").write_text(to_json(spec), encoding="utf-8")
    (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
