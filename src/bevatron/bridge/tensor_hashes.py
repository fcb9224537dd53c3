"""The hash of every Hugging Face tensor of a checkpoint, however the checkpoint stores it.

In a native checkpoint the hash of a tensor is computed over the rows that make it up. So equal
hashes say that q, k and v are equal each, and not only the matrix that they are fused into.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from bevatron.bridge.conversion_plan import pieces
from bevatron.bridge.conversion_report import shown_progress
from bevatron.bridge.hf_folder import shown
from bevatron.bridge.open_native import Native
from bevatron.checkpoint.manifest import TensorEntry
from bevatron.checkpoint.read_boxes import (
    HASH_BUFFER,
    hash_range,
    new_hasher,
    spell,
)
from bevatron.checkpoint.safetensors_file import Header
from bevatron.checkpoint.storage import File, open_file
from bevatron.errors import BevatronError
from bevatron.families.weight_map import Entry

Advance = Callable[[int], None]


class Found(NamedTuple):
    """What a checkpoint holds under a Hugging Face name."""

    dtype: str
    shape: tuple[int, ...]
    hash: str


Hashes = dict[str, Found]


def hashes_of_files(folder: Path, headers: Mapping[str, Header], advance: Advance) -> Hashes:
    """Read and hash every tensor of safetensors files, given their headers by name."""
    found, buffer = {}, memoryview(bytearray(HASH_BUFFER))
    for file, header in headers.items():
        with closing(open_file(folder / file)) as opened:
            for name, t in header.tensors.items():
                digest = hash_range(opened, t.begin, t.nbytes, buffer)
                found[name] = Found(t.dtype, t.shape, digest)
                advance(t.nbytes)
    return found


def hashes_of_native(native: Native, advance: Advance) -> tuple[Hashes, list[str]]:
    """Read and hash every HF tensor of a native checkpoint; and a sentence for every chunk whose
    bytes are not those that the manifest was written for."""
    found: Hashes = {}
    damage: list[str] = []
    for name, entry, tensor in native.entries():
        digests = _hash(native, name, entry, tensor, damage)
        for source, digest in zip(entry.sources, digests, strict=True):
            found[source.name] = Found(tensor.dtype, source.shape, digest)
        advance(tensor.nbytes)
    for copy, other in native.duplicates().items():
        found[copy] = found[other]
    return found, damage


def _hash(
    native: Native, name: str, entry: Entry, tensor: TensorEntry, damage: list[str]
) -> list[str]:
    sources = [new_hasher() for _ in entry.sources]
    chunks = [new_hasher() for _ in tensor.chunks]
    buffer = memoryview(bytearray(HASH_BUFFER))
    files: dict[str, File] = {}
    try:
        for piece in pieces(entry, tensor):
            if piece.file not in files:
                files[piece.file] = open_file(native.folder / piece.file)
            for done in range(0, piece.nbytes, len(buffer)):
                data = buffer[: min(len(buffer), piece.nbytes - done)]
                files[piece.file].read(data, piece.at + done)
                sources[piece.source].update(data)
                chunks[piece.chunk].update(data)
    finally:
        for file in files.values():
            file.close()
    for chunk, hasher in zip(tensor.chunks, chunks, strict=True):
        if chunk.hash and spell(hasher) != chunk.hash:  # other formats record none
            damage.append(
                f"{name}: damaged in {native.folder / chunk.file}: its hash is {spell(hasher)}, "
                f"the manifest says {chunk.hash}"
            )
    return [spell(h) for h in sources]


def prove(
    written: Hashes, expected: Mapping[str, str], damage: list[str], where: str
) -> dict[str, Any]:
    """Check what was read back from a new checkpoint, and say what that shows.

    Args:
        expected: HF tensor -> its hash as it was read (or as it became, if its dtype changed).
    Raises BevatronError naming the tensors that came back different.
    """
    wrong = [name for name, digest in expected.items() if written[name].hash != digest]
    if wrong or damage:
        raise BevatronError(
            f"{where}: {len(wrong) or len(damage)} tensors came back different from what was "
            f"written ({shown(wrong) or damage[0]}); the disk or the memory is at fault: check "
            "them, then run again"
        )
    return {"tensors": len(expected), "equal": True, "by": "xxh3-128 of each, read back"}


def read_back(
    native: Native, hashes: dict[str, str], dtype: str | None, show_progress: bool = True
) -> dict[str, Any]:
    """Read all native files again and compare with the source, tensor by tensor; where the dtype
    changed there is only the hash of what was written to compare with."""
    total = sum(t.nbytes for _, _, t in native.entries())
    with shown_progress("verifying", total, show_progress) as advance:
        found, damage = hashes_of_native(native, advance)
    same = {n: h for n, h in hashes.items() if n in found} if dtype is None else {}
    return prove(found, same, damage, str(native.folder))
